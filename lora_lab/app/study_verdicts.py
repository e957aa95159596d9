"""Verdicts of a study from what lies in a folder: its points, its runs, its registration. Nothing runs, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_lab.errors import InputError, Problem
from lora_lab.record.ledger import Ledger
from lora_lab.record.looks import seeds_of_look
from lora_lab.record.planned_facts import read_planned
from lora_lab.record.registration import Registration, check_unchanged, read_registration
from lora_lab.record.study_folder import StudyRecord, study_folder
from lora_lab.record.study_points import read_points
from lora_lab.record.verdicts import Look, VerdictsFile, read_verdicts
from lora_lab.report.claims_view import ClaimsView
from lora_lab.schema.claims import Scale
from lora_lab.schema.study import Study
from lora_lab.study.judge import judge_study
from lora_lab.study.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdicts of a look. looks: all that were begun. registration: None where nothing was fixed yet."""

    verdicts: tuple[Verdict, ...]
    seeds: tuple[int, ...]
    looks: tuple[Look, ...]
    registration: Registration | None


def judge_folder(
    root: Path, folder_name: str, study: Study, scale: Scale, *, seeds: Sequence[int] | None = None
) -> Judged:
    """Judges a look by the runs that are there now; what is not there makes a claim inconclusive, or `not run`.

    seeds: of the look; None is the last that was begun.

    Raises:
        InputError: the study has changed since it was registered; the seeds make no look; an arm is no one setting.
        DataError: a file is damaged.
    """
    folder = study_folder(root, folder_name)
    registration = read_registration(folder)
    if registration is not None:
        check_unchanged(registration, study)
    design = study.design(scale)
    known = read_verdicts(folder)
    looks = _looks(known, registration)
    tuning = () if design.tuning is None else design.tuning.seeds
    chosen = seeds_of_look(looks, seeds, registered=design.seeds, tuning=tuning)
    verdicts = judge_study(
        study,
        scale,
        read_points(folder),
        {run_id: facts.by_name() for run_id, facts in read_planned(folder).items()},
        Ledger(root),
        seeds=None if chosen == design.seeds else chosen,
        registered_at=None if registration is None else registration.registered_at,
    )
    return Judged(tuple(verdicts), chosen, looks, registration)


def claims_view(root: Path, asked: StudyRecord) -> ClaimsView | None:
    """The claims of a study that was begun, judged by the runs that are there now; None where it has none.

    Raises as `judge_folder`.
    """
    if asked.study is None or not asked.study.claims:
        return None
    known = read_registration(asked.folder)
    scale: Scale = "pocket" if known is None else known.scale
    judged = judge_folder(root, asked.name, asked.study, scale)
    wanted = {run_id for verdict in judged.verdicts for arm in verdict.arms for run_id in arm.run_ids}
    records = {record.run_id: record for record in Ledger(root).runs() if record.run_id in wanted}
    return ClaimsView(asked.study, scale, judged.seeds, judged.verdicts, judged.looks, judged.registration, records)


def looks_of(folder: Path) -> tuple[Look, ...]:
    """The looks of a study that were begun."""
    return _looks(read_verdicts(folder), read_registration(folder))


def _looks(known: VerdictsFile | None, registration: Registration | None) -> tuple[Look, ...]:
    """Raises InputError where verdicts lie there that were given by other criteria than those that are registered."""
    if known is None:
        return ()
    if registration is None or known.registration != registration.digest:
        raise InputError(
            Problem("verdicts.json", "the verdicts are by other criteria than those registered beside them")
        )
    return known.looks
