"""What is looked at between steps of a training: norms of layers, how routers spread tokens, how experts drift apart.

The observations of LISA (norms by layer, embedding and head included), of the mixtures of experts (load, entropy) and
of MoLA (distance of experts), for every method that has the thing. They change nothing and are left out of step times.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_lab.adapters.attach import Attached
from lora_lab.adapters.balance import expert_distances
from lora_lab.adapters.expert_layer import LoraExpertsLayer
from lora_lab.adapters.norms import OriginalWeights, layer_norms
from lora_lab.record.layer_log import write_observation


class Observer:
    """Writes to the layer log at `path`. `seconds`: what that took so far.

    original: the folder of the base, for methods that train its own weights; None where these started from another
    run's, so that their change is not known.
    """

    def __init__(self, attached: Attached, path: Path, *, original: Path | None, name: str = "default") -> None:
        self._attached, self._path, self._name = attached, path, name
        self._original = None if original is None else OriginalWeights(original)
        self.seconds = 0.0

    def observe(self, step: int) -> None:
        """After `step` optimizer steps."""
        start = time.perf_counter()
        for kind, values in self._observations():
            write_observation(self._path, step, kind, values)
        self.seconds += time.perf_counter() - start

    def _observations(self) -> list[tuple[str, Mapping[str, Any]]]:
        model = self._attached.model
        found: list[tuple[str, Mapping[str, Any]]] = [("norms", layer_norms(model, self._original))]
        if self._attached.routing is not None:
            routers = {name: asdict(one) for name, one in self._attached.routing.statistics().items()}
            found.append(("routing", {"routers": routers}))
            self._attached.routing.clear()  # the next observation is of the interval that begins here
        distances = {
            module.routing_name: expert_distances(module, self._name)
            for module in model.modules()
            if isinstance(module, LoraExpertsLayer)
        }
        if distances:
            found.append(("experts", {"distances": distances}))
        return found
