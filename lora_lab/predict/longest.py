"""The longest rows that a trial's largest step computes: from its data set, or as long as they may be.

Only what lies on this machine is looked at: nothing is downloaded, and no weights are read.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from lora_lab.data.encode import EncodedSet, encode_rows
from lora_lab.data.sources import load_rows
from lora_lab.errors import LabError
from lora_lab.models.load import load_tokenizer
from lora_lab.models.quiet import quiet_transformers
from lora_lab.models.random import BYTE_VOCABULARY, byte_tokenizer
from lora_lab.plan.job import Job
from lora_lab.plan.prediction import LongestRows
from lora_lab.schema.data import HubData
from lora_lab.schema.model import EmbeddedModel, FolderModel, HubModel, RandomModel
from lora_lab.schema.trial import Trial

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "chat_template*")
_ANY_VOCABULARY = 2**31


def rows_of(job: Job, *, cache: Path) -> LongestRows:
    """The longest rows of a job's training set where it and the model's tokenizer are here, else rows of
    `data.max_length` tokens of which all count."""
    trial = job.trial
    try:
        examples = _encoded(json.dumps(_decisive(job)), job, cache)
    except _NotHere as error:
        most = trial.training.batch_size if job.train_rows is None else min(trial.training.batch_size, job.train_rows)
        length = trial.data.max_length
        return LongestRows((length,) * most, (length - 1,) * most, f"data.max_length, since {error}")
    return longest_rows(examples, trial)


def longest_rows(examples: EncodedSet, trial: Trial) -> LongestRows:
    """As many as a batch has, longest first."""
    order = sorted(range(len(examples.examples)), key=lambda index: (-examples.lengths[index], index))
    chosen = [examples.examples[index] for index in order[: trial.training.batch_size]]
    return LongestRows(
        tuple(len(one.input_ids) for one in chosen),
        tuple(one.loss_tokens for one in chosen),
        f"the longest of {len(examples.examples)} rows",
    )


class _NotHere(Exception):  # noqa: N818 - it is an answer, not a fault
    """Rows or tokenizer; str() says which."""


@functools.lru_cache(maxsize=4)
def _cached(key: str) -> dict[str, EncodedSet]:
    return {}


def _decisive(job: Job) -> list[Any]:
    return [job.trial.model.model_dump(mode="json"), job.trial.data.model_dump(mode="json"), dict(job.identities)]


def _encoded(key: str, job: Job, cache: Path) -> EncodedSet:
    """The training rows as tokens; kept for the trials of a sweep that share them."""
    kept = _cached(key)
    if "set" not in kept:
        if isinstance(job.trial.data, HubData):
            raise _NotHere("its rows come from a hub")
        try:
            tokenizer = _tokenizer(job, cache)
            rows = load_rows(job.trial.data, cache=cache)
            kept["set"] = encode_rows(rows.train, tokenizer, job.trial.data, vocab_size=_ANY_VOCABULARY)
        except LabError as error:
            raise _NotHere(f"its rows cannot be read ({error.problems[0].message})") from None
    return kept["set"]


def _tokenizer(job: Job, cache: Path) -> Any:
    model = job.trial.model
    if isinstance(model, RandomModel):
        assert model.shape.vocab_size >= BYTE_VOCABULARY
        return byte_tokenizer(model.shape.max_positions)
    folder = _folder(model, cache)
    try:
        with quiet_transformers():
            return load_tokenizer(model, folder)
    except Exception as error:  # noqa: BLE001 - transformers raises whatever it meets
        raise _NotHere(f"the tokenizer of {model.name or folder} cannot be read ({type(error).__name__})") from None


def _folder(model: EmbeddedModel | FolderModel | HubModel, cache: Path) -> Path:
    """Where the model's tokenizer lies."""
    if isinstance(model, FolderModel):
        return Path(model.path).expanduser()
    if isinstance(model, EmbeddedModel):
        folder = cache / "models" / f"{model.name}-{model.sha256[:12]}"
        if not folder.is_dir():
            raise _NotHere(f"{model.name} has not been converted on this machine yet (lora-lab fetch)")
        return folder
    try:
        found = snapshot_download(
            model.repo, revision=model.revision, allow_patterns=list(_TOKENIZER_FILES), local_files_only=True
        )
    except Exception:  # noqa: BLE001 - whatever keeps it from being found here
        raise _NotHere(f"the tokenizer of {model.repo} is not on this machine") from None
    return Path(found)
