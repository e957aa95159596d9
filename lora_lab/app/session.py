"""One call of `lora-lab run` or `lora-lab plan`: what Hydra composed comes in, a plan goes out, an exit code stays.

`hydra.main` returns nothing and builds its plug-ins itself, so the call that is going on is kept in one place for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig

from lora_lab.app.compose import Composer, Composition
from lora_lab.app.interpolation import hidden_keys, plain_mapping
from lora_lab.app.planning import Plan, make_plan
from lora_lab.app.request import Request, gather, single
from lora_lab.errors import LabError


@dataclass(slots=True)
class Session:
    """`carry_out` gets the plan; its exit code is the call's. needs_weights: see `Request`.

    prepared: the points that were composed and judged before Hydra started, and their plan; None where another launcher
    hands over one point at a time. error: of `carry_out`, kept for the end, since Hydra would print the overrides, and
    not the error, on its way.
    """

    carry_out: Callable[[Plan], int]
    needs_weights: bool = True
    prepared: tuple[Sequence[Sequence[str]], Plan] | None = None
    exit_code: int = 0
    error: LabError | None = None

    def handle_single(self, config: DictConfig, overrides: Sequence[str]) -> None:
        """The task function of a plain `run` (or of one job of another launcher)."""
        try:
            if self.prepared is not None:
                self._finish(self.prepared[1])
            else:
                point = Composition(plain_mapping(config), tuple(overrides), hidden=hidden_keys(config))
                self._finish(self.plan(single(point)))
        except LabError as error:
            self.error = self.error or error

    def handle_sweep(self, loader: ConfigLoader, master: DictConfig, points: Sequence[Sequence[str]]) -> None:
        """All points of `-m`, at once."""
        if self.prepared is not None and [list(point) for point in points] == list(self.prepared[0]):
            self._finish(self.prepared[1])
        else:
            self._finish(self.plan(gather(Composer(loader, master), points)))

    def plan(self, request: Request) -> Plan:
        """The plan of what is asked for by this call; raises as `make_plan` does."""
        return make_plan(replace(request, needs_weights=self.needs_weights))

    def _finish(self, plan: Plan) -> None:
        self.exit_code = max(self.exit_code, self.carry_out(plan))


_active: list[Session] = []


def active_session() -> Session:
    """The call that is going on; for Hydra's plug-ins, which Hydra builds without our arguments."""
    return _active[-1]


@contextlib.contextmanager
def activated(session: Session) -> Iterator[Session]:
    """Makes `session` the active one within the block."""
    _active.append(session)
    try:
        yield session
    finally:
        _active.pop()
