"""One call of `lora-lab run` or `lora-lab plan`: what Hydra composed comes in here, jobs go out, an exit code stays.

`hydra.main` returns nothing and builds its plug-ins itself, so the call that is going on is kept in one place for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig

from lora_lab.app.compose import Composer, Composition
from lora_lab.app.interpolation import hidden_keys, plain_mapping
from lora_lab.app.locations import sweep_folders
from lora_lab.app.overrides import parse
from lora_lab.errors import InputError, LabError, Problem
from lora_lab.plan.expand import count, expand
from lora_lab.plan.study_file import find_study, read_study_with_places, value_key
from lora_lab.schema.study import Study

_Places = Mapping[tuple[str, str], str]


@dataclass(frozen=True, slots=True)
class Request:
    """All points of one call, the study they belong to, if any, and what is wrong with the call as a whole.

    places: `file:line:column` of what the study sets, by `plan.study_file.value_key`.
    """

    points: tuple[Composition, ...]
    study: Study | None
    problems: tuple[Problem, ...] = ()
    places: _Places = field(default_factory=dict)


@dataclass(slots=True)
class Session:
    """`carry_out` gets the request once everything is composed; its exit code is the call's.

    prepared: the request that was composed beforehand from these points, so that it need not be composed again.
    """

    carry_out: Callable[[Request], int]
    prepared: tuple[Sequence[Sequence[str]], Request] | None = None
    exit_code: int = 0
    error: LabError | None = None

    def handle_single(self, config: DictConfig, overrides: Sequence[str]) -> None:
        """The task function of a plain `run` (or of one job of another launcher).

        An error of the lab is kept for the end: Hydra would print the overrides, and not the error, on its way.
        """
        try:
            point = Composition(plain_mapping(config), tuple(overrides), hidden=hidden_keys(config))
            self._finish(Request((point,), None, no_study(point.mapping)))
        except LabError as error:
            self.error = self.error or error

    def handle_sweep(self, loader: ConfigLoader, master: DictConfig, points: Sequence[Sequence[str]]) -> None:
        """All points of `-m`, at once; `study=NAME` stands for the sweep of that study."""
        if self.prepared is not None and [list(point) for point in points] == list(self.prepared[0]):
            request = self.prepared[1]
        else:
            request = gather(Composer(loader, master), points)
        self._finish(request)

    def _finish(self, request: Request) -> None:
        self.exit_code = max(self.exit_code, self.carry_out(request))


def no_study(mapping: Mapping[str, Any]) -> tuple[Problem, ...]:
    """A study asked for without `-m`."""
    if mapping["study"] is None:
        return ()
    return (Problem("study", f"a study is a sweep: lora-lab run -m study={mapping['study']}"),)


def gather(composer: Composer, points: Sequence[Sequence[str]]) -> Request:
    """Composes all points; what is wrong with a point is kept with it, and with a study in `problems`."""
    composed: list[Composition] = []
    problems: dict[Problem, None] = {}
    study: Study | None = None
    places: _Places = {}
    for point in points:
        first = composer.attempt(point)
        if first.mapping["study"] is None:
            composed.append(first)
            continue
        try:
            study, places = read_study_with_places(find_study(str(first.mapping["study"]), sweep_folders()))
            _check_size(study, limit=first.mapping["max_runs"])
        except InputError as error:
            problems.update(dict.fromkeys(error.problems))
            composed.append(first)
            continue
        composed += _study_points(composer, study, point, places)
    return Request(tuple(composed), study, tuple(problems), places)


def _check_size(study: Study, *, limit: object) -> None:
    size = count(study)
    if isinstance(limit, int) and 1 <= limit < size:
        raise InputError(Problem("max_runs", f"{size:,} runs; limit {limit:,}; pass max_runs={size} to allow it"))


def _study_points(composer: Composer, study: Study, point: Sequence[str], places: _Places) -> Iterator[Composition]:
    own = {parse(text).key_or_group for text in point}
    for values in expand(study):
        found = {key: places[value_key(key, value)] for key, value in values.items() if key not in own}
        yield dataclasses.replace(composer.attempt(point, under=values), places=found)


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
