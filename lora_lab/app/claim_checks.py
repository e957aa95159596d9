"""What can be known to be wrong with a study's claims before anything runs."""

from __future__ import annotations

from collections.abc import Iterator

from lora_lab.errors import InputError, Problem
from lora_lab.plan import stages
from lora_lab.schema.claims import Claim, Exact, Scale, arm_names, needs_runs
from lora_lab.schema.study import Study
from lora_lab.study.arms import arm_setting
from lora_lab.study.judge import claims_judged, forms_of


def check_claims(study: Study, scale: Scale) -> None:
    """Every arm that a claim of this scale compares must be one setting, in every form of the claim.

    Raises:
        InputError: with all arms that are not.
    """
    problems: dict[Problem, None] = {}
    for claim in claims_judged(study, scale):
        if needs_runs(claim):
            problems.update(dict.fromkeys(_problems(claim, study, scale)))
    if problems:
        raise InputError(problems)


def _problems(claim: Claim, study: Study, scale: Scale) -> Iterator[Problem]:
    design = study.design(scale)
    for form in forms_of(claim):
        for name in arm_names(claim):
            try:
                if form is None:
                    stages.arm_setting(design, name, where=f"claims.{claim.id}")
                else:
                    arm_setting(design, name, form)
            except InputError as error:
                yield from (Problem(one.where, f"{one.message} (claim {claim.id})") for one in error.problems)


def metrics_of(study: Study, scale: Scale) -> list[str]:
    """The metrics that runs of this scale must have: those of the table, and those that claims compare."""
    claims = [claim for claim in claims_judged(study, scale) if not isinstance(claim, Exact)]
    compared = [getattr(claim, "metric", None) for claim in claims]
    return list(dict.fromkeys([*study.design(scale).metrics, *(name for name in compared if name is not None)]))
