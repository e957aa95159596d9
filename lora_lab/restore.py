"""Models of finished runs, from what the ledger keeps of them: as they were scored, or as the base of another run.

A run may itself have started from another run's weights (`init_from`); then these are put back first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_lab.adapters.changed import load_changed
from lora_lab.adapters.lisa import importance_probabilities
from lora_lab.adapters.merge import melt_into_base
from lora_lab.adapters.save import load_adapter, load_adapter_weights
from lora_lab.models.load import LoadedBase, load_base
from lora_lab.record.layer_log import observed_updates, read_observations
from lora_lab.record.ledger import Ledger
from lora_lab.record.parents import NORMS, START, WEIGHTS, parent_record, weights_identity
from lora_lab.record.run_record import RunRecord
from lora_lab.schema.model import FolderModel
from lora_lab.schema.trial import Trial, read_trial
from lora_lab.schema.weight_methods import Lisa


@dataclass(frozen=True, slots=True)
class Restorer:
    """Where models come from and go to: the ledger, the cache of prepared models, the device."""

    ledger: Ledger
    cache: Path
    device: torch.device

    def base_of(self, trial: Trial, identities: Mapping[str, str]) -> LoadedBase:
        """The base that a trial works on: its model, or what another run made of it.

        That is the run it starts from, or, where it goes on with that run's adapter, what lies under this one.

        Raises:
            InputError: the run is gone, or what it saved cannot be used.
        """
        if WEIGHTS not in identities:
            return self._load(trial)
        return self._weights_of(parent_record(self.ledger, identities, WEIGHTS), precision=trial.training.precision)

    def start_adapter(self, trial: Trial, identities: Mapping[str, str], model: Any, *, name: str = "default") -> None:
        """Gives adapter `name` of `model` the weights of the run that the trial goes on with, if there is one."""
        if trial.init_from is not None and trial.init_as == "adapter":
            load_adapter_weights(model, parent_record(self.ledger, identities, START).adapter_folder, name=name)

    def layer_probabilities(self, trial: Trial, identities: Mapping[str, str]) -> list[float] | None:
        """LISA's probabilities where they come from the layer logs of two other runs; None for every other trial."""
        method = trial.method
        if not isinstance(method, Lisa) or method.probabilities != "from_norm_log":
            return None
        records = [parent_record(self.ledger, identities, role) for role in NORMS]
        full, lora = (observed_updates(read_observations(one.layers_path, "norms")) for one in records)
        return importance_probabilities(full, lora, expected=method.layers)

    def model_of(self, record: RunRecord) -> tuple[Trial, LoadedBase, Any]:
        """The trial of a run whose weights are there, its base, and the model as it was scored."""
        trial, identities = read_trial(record.trial), {} if record.header is None else record.header.identities
        if not trial.method.has_adapter:
            base = self._weights_of(record, precision=trial.training.precision)
            return trial, base, base.model
        base = self.base_of(trial, identities)
        return trial, base, load_adapter(base.model, record.adapter_folder)

    def _weights_of(self, record: RunRecord, *, precision: str) -> LoadedBase:
        """The base of a run with all that was trained in its weights."""
        trial, identities = read_trial(record.trial), {} if record.header is None else record.header.identities
        if trial.method.saves == "model":
            model = FolderModel(
                kind="folder", name=trial.model.name, path=str(record.model_folder), shape=None, tie_embeddings=None
            )
            return self._load(trial.model_copy(update={"model": model}), precision=precision)
        base = self._based(trial, identities, precision=precision)
        model = base.model
        if trial.method.saves == "changed":
            load_changed(model, record.saved_folder("changed"), identity=weights_identity(identities))
        elif trial.method.saves == "adapter":
            model = melt_into_base(load_adapter(model, record.adapter_folder))
        if trial.method.trains != "nothing":
            model.name_or_path = model.config._name_or_path = ""  # an adapter saved on it would name the plain model
        return LoadedBase(model, base.tokenizer, base.facts)

    def _based(self, trial: Trial, identities: Mapping[str, str], *, precision: str) -> LoadedBase:
        training = trial.training.model_copy(update={"precision": precision})
        return self.base_of(trial.model_copy(update={"training": training}), identities)

    def _load(self, trial: Trial, *, precision: str | None = None) -> LoadedBase:
        return load_base(
            trial.model,
            precision=precision or trial.training.precision,
            quantization=trial.quantization,
            device=self.device,
            cache=self.cache,
        )
