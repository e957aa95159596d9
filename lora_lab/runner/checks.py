"""What a run checks as it loads, and warns about."""

from __future__ import annotations

from pathlib import Path

from lora_lab.data.encode import EncodedSet
from lora_lab.errors import IdentityError, Problem
from lora_lab.evaluate.identity import evaluation_identities
from lora_lab.plan.identity import identities_of
from lora_lab.plan.job import Job
from lora_lab.record.gathered import Gathered
from lora_lab.record.parents import PARENT_ROLES
from lora_lab.schema.evaluation import Evaluation
from lora_lab.schema.trial import Trial

# Above this share of cut rows a result says so.
_MANY_CUTS = 0.05


def verify_identities(job: Job, *, cache: Path) -> None:
    """Files may change while a sweep goes on; a run on other texts than were planned would mix two trials.

    Raises:
        IdentityError: one has changed.
    """
    now = identities_of(job.trial, cache=cache, extra=evaluation_identities(job.trial.evaluation, cache=cache))
    own = {role: identity for role, identity in job.identities.items() if role not in PARENT_ROLES}
    changed = [role for role, identity in own.items() if now.get(role) != identity]
    if changed:
        raise IdentityError(
            [
                Problem(role, f"changed since the sweep was planned: {job.identities[role]} -> {now.get(role)}")
                for role in changed
            ]
        )


def warn_about_cuts(gathered: Gathered, examples: EncodedSet, *, side: str, trial: Trial) -> None:
    """Where many rows lost their end."""
    if examples.cut_share > _MANY_CUTS:
        gathered.warnings.append(
            f"{examples.cut_rows} of {len(examples.examples)} {side} rows are longer than "
            f"data.max_length={trial.data.max_length} tokens and were cut"
        )


def warn_about_limit(gathered: Gathered, evaluation: Evaluation) -> None:
    """Where a task has fewer documents than were asked for."""
    counts = {name.partition("/")[0]: metric.num_examples for name, metric in gathered.metrics.items()}
    for task in evaluation.tasks:
        count = counts.get(task)
        if evaluation.limit is not None and count is not None and count < evaluation.limit:
            gathered.warnings.append(f"{task} has {count} documents, fewer than evaluation.limit={evaluation.limit}")
