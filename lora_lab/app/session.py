"""One call of `lora-lab run` or `lora-lab plan`: what Hydra composed comes in here, jobs go out, an exit code stays.

`hydra.main` returns nothing and builds its plug-ins itself, so the call that is going on is kept in one place for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig

from lora_lab.app.compose import Composer, Composition, plain_mapping
from lora_lab.app.locations import sweep_folders
from lora_lab.errors import InputError, Problem
from lora_lab.plan.expand import count, expand
from lora_lab.plan.study_file import find_study, read_study
from lora_lab.schema.study import Study


@dataclass(frozen=True, slots=True)
class Request:
    """All points of one call, and the study they belong to, if any."""

    points: tuple[Composition, ...]
    study: Study | None


@dataclass(slots=True)
class Session:
    """`carry_out` gets the request once everything is composed; its exit code is the call's."""

    carry_out: Callable[[Request], int]
    exit_code: int = 0

    def handle_single(self, config: DictConfig, overrides: Sequence[str]) -> None:
        """The task function of a plain `run` (or of one job of another launcher)."""
        mapping = plain_mapping(config)
        if mapping["study"] is not None:
            raise InputError(Problem("study", f"a study is a sweep: lora-lab run -m study={mapping['study']}"))
        self._finish(Request((Composition(mapping, tuple(overrides)),), None))

    def handle_sweep(self, loader: ConfigLoader, master: DictConfig, points: Sequence[Sequence[str]]) -> None:
        """All points of `-m`, at once; `study=NAME` stands for the sweep of that study."""
        composer = Composer(loader, master)
        composed: list[Composition] = []
        study: Study | None = None
        with _collected() as collect:
            for point in points:
                with collect():
                    first = composer.compose(point)
                    if first.mapping["study"] is None:
                        composed.append(first)
                        continue
                    study = read_study(find_study(first.mapping["study"], sweep_folders()))
                    composed += _study_points(composer, study, first, point)
        self._finish(Request(tuple(composed), study))

    def _finish(self, request: Request) -> None:
        self.exit_code = max(self.exit_code, self.carry_out(request))


def _study_points(composer: Composer, study: Study, first: Composition, point: Sequence[str]) -> list[Composition]:
    size, limit = count(study), first.mapping["max_runs"]
    if size > limit:
        raise InputError(Problem("max_runs", f"{size:,} runs; limit {limit:,}; pass max_runs={size} to allow it"))
    points: list[Composition] = []
    with _collected() as collect:
        for values in expand(study):
            with collect():
                points.append(composer.compose(point, under=values))
    return points


@contextlib.contextmanager
def _collected() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Collects the input errors of many points and raises them together; a problem that many share is listed once."""
    found: dict[Problem, None] = {}

    @contextlib.contextmanager
    def collect() -> Iterator[None]:
        try:
            yield
        except InputError as error:
            found.update(dict.fromkeys(error.problems))

    yield collect
    if found:
        raise InputError(found)


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
