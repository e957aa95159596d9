"""Judging: every claim of a study, from the runs of a ledger and the files beside them. Reads only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_lab.record.ledger import Ledger
from lora_lab.record.study_points import StudyPoint
from lora_lab.schema.claims import Scale
from lora_lab.schema.study import Study
from lora_lab.study.verdict import Verdict

# By run id: each known number by its name, or the reason why it has none as a text; or one reason for all of them.
Planned = Mapping[str, Mapping[str, float | int | str] | str]


def judge_study(
    study: Study,
    scale: Scale,
    points: Sequence[StudyPoint],
    planned: Planned,
    ledger: Ledger,
    *,
    seeds: Sequence[int] | None = None,
    registered_at: str | None = None,
) -> list[Verdict]:
    """A verdict for every claim at this scale and each of its forms, in the order of the file.

    points: as `points.json` has them, of all stages; a claim over planned quantities of the published design finds
    them among points of the stage `planned`. Rates that tuning picked stand in the points; they are picked again from
    the tuning runs, and another outcome is a reason not to decide. seeds: of a later look, which is judged on them
    alone; None: those of the design. registered_at: when the criteria were fixed (UTC); runs that ended before are
    counted in the verdict.

    Raises:
        InputError: the study has no such scale; an arm picks no setting, or several.
    """
    raise NotImplementedError
