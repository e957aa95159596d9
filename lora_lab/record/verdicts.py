"""The verdicts of a study, look by look: `verdicts.json` beside its other files.

A look is one set of seeds that the claims are judged by. Added seeds are another look, judged on them alone; it is
written down before its runs begin, so that none is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.errors import DataError, InputError, Problem
from lora_lab.record.atomic import read_json, write_json
from lora_lab.record.environment import utc_now
from lora_lab.schema.claims import Scale

_FILE = "verdicts.json"


@dataclass(frozen=True, slots=True)
class Look:
    """seeds: those that are judged. begun_at: UTC, before its runs. judged_at, verdicts (`Verdict.to_json`): None and
    none until it was judged; the last judgement counts."""

    seeds: tuple[int, ...]
    begun_at: str
    judged_at: str | None
    verdicts: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class VerdictsFile:
    """registration: the hash of the criteria that the verdicts were given by. looks: in order; the first is that of the
    study's own seeds."""

    registration: str
    scale: Scale
    looks: tuple[Look, ...]

    @property
    def newest(self) -> Look | None:
        """The last look that was judged."""
        return next((one for one in reversed(self.looks) if one.judged_at is not None), None)


def read_verdicts(folder: Path) -> VerdictsFile | None:
    """A study's verdicts; None where nothing was asked for yet.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        looks = tuple(
            Look(
                tuple(map(int, one["seeds"])), str(one["begun_at"]), one["judged_at"], tuple(map(dict, one["verdicts"]))
            )
            for one in content["looks"]
        )
        return VerdictsFile(str(content["registration"]), content["scale"], looks)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(Problem(str(path), f"damaged: {error!r}; judge the study again to mend it")) from None


def begin_look(folder: Path, registration: str, scale: Scale, seeds: Sequence[int]) -> VerdictsFile:
    """Writes down that these seeds are to be judged, before their runs; a look that was begun before goes on.

    Raises:
        InputError: some of the seeds, not all, were looked at before, or a look of other criteria is there.
        DataError: the file is damaged. MachineError: the disk refuses.
    """
    known = read_verdicts(folder)
    looks = () if known is None else known.looks
    if known is not None and known.registration != registration:
        rule = "holds verdicts by other criteria; the study needs another name, or another root"
        raise InputError(Problem(str(folder / _FILE), rule))
    if any(set(one.seeds) == set(seeds) for one in looks):
        return VerdictsFile(registration, scale, looks)
    used = sorted(set(seeds) & {seed for one in looks for seed in one.seeds})
    if used:
        shown = ", ".join(map(str, used))
        raise InputError(
            Problem(
                "--seeds", f"{shown}: looked at before; added seeds are judged alone, so give only seeds that are new"
            )
        )
    made = VerdictsFile(registration, scale, (*looks, Look(tuple(seeds), utc_now(), None, ())))
    _write(folder, made)
    return made


def put_verdicts(folder: Path, seeds: Sequence[int], verdicts: Sequence[Mapping[str, Any]]) -> VerdictsFile:
    """Puts the verdicts of a look in place; those it had before are replaced.

    Raises:
        InputError: no look at these seeds was begun. DataError, MachineError: as `begin_look`.
    """
    known = read_verdicts(folder)
    if known is None or not any(set(one.seeds) == set(seeds) for one in known.looks):
        raise InputError(Problem(str(folder / _FILE), f"no look at the seeds {', '.join(map(str, seeds))} was begun"))
    looks = tuple(
        Look(one.seeds, one.begun_at, utc_now(), tuple(verdicts)) if set(one.seeds) == set(seeds) else one
        for one in known.looks
    )
    made = VerdictsFile(known.registration, known.scale, looks)
    _write(folder, made)
    return made


def _write(folder: Path, verdicts: VerdictsFile) -> None:
    looks = [
        {
            "seeds": list(one.seeds),
            "begun_at": one.begun_at,
            "judged_at": one.judged_at,
            "verdicts": [dict(verdict) for verdict in one.verdicts],
        }
        for one in verdicts.looks
    ]
    write_json(folder / _FILE, {"registration": verdicts.registration, "scale": verdicts.scale, "looks": looks})
