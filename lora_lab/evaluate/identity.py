"""What the texts behind an evaluation are, so that another text is another trial. No torch, no lm-eval."""

from __future__ import annotations

from pathlib import Path

from lora_lab.data.prose import prose_identity
from lora_lab.evaluate.check import locate_tasks
from lora_lab.evaluate.mirror import mirror_identity
from lora_lab.evaluate.user_tasks import user_tasks_identity
from lora_lab.schema.evaluation import Evaluation


def evaluation_identities(evaluation: Evaluation, *, cache: Path) -> dict[str, str]:
    """Identities by role: `prose`, `tasks` (the user's task files) and `mirror`, each where it is used.

    Raises:
        InputError: a task is unknown, or a folder is not usable.
    """
    located = locate_tasks(evaluation, cache=cache)
    identities: dict[str, str] = {}
    if any(name.startswith("prose_") for name in located.local):
        identities["prose"] = f"pydoc_data.topics sha256:{prose_identity()}"
    if located.user and evaluation.include_path is not None:
        identities["tasks"] = f"sha256:{user_tasks_identity(evaluation.include_path)}"
    if located.official and located.mirror is not None:
        identities["mirror"] = f"sha256:{mirror_identity(located.mirror, located.catalogue, located.official)}"
    return identities
