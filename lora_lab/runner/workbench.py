"""What a sweep pays for once: the base's weights in memory, rows, tokens, and whether rows may be laid end to end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora_lab.data.encode import EncodedSet, encode_rows
from lora_lab.data.rows import Row, Rows
from lora_lab.data.sources import load_rows
from lora_lab.models.load import LoadedBase
from lora_lab.models.ragged import why_not_ragged
from lora_lab.models.shared_copy import shared_copy
from lora_lab.plan.cohorts import BaseKey, cohort_key, why_not_fused
from lora_lab.plan.job import Job
from lora_lab.record.parents import PARENT_ROLES
from lora_lab.restore import Restorer

_K = TypeVar("_K")
_T = TypeVar("_T")
# Data sets of a sweep that are kept as rows, and as tokens.
_KEPT_SETS = 4


@dataclass(frozen=True, slots=True)
class Tokens:
    """Both sides of a trial's data as tokens."""

    train: EncodedSet
    heldout: EncodedSet


@dataclass(slots=True)
class Workbench:
    """One base at a time, the last that was asked for. cache: of prepared models. ledger_root: where parents lie."""

    restorer: Restorer
    cache: Path
    device: torch.device
    _key: BaseKey | None = None
    _base: LoadedBase | None = None
    _ragged: dict[int, str | None] = field(default_factory=dict)
    _rows: dict[str, Rows] = field(default_factory=dict)
    _tokens: dict[tuple[str, BaseKey], Tokens] = field(default_factory=dict)

    def base_of(self, job: Job) -> LoadedBase:
        """The base of a job, to put its method on: a copy over the kept tensors, which nothing of the method reaches.

        A method that trains the base's own weights gets the kept ones, and the next who asks loads them again.
        """
        kept = self._loaded(job)
        if job.trial.method.trains == "weights":
            self._key = self._base = None
            return kept
        return LoadedBase(shared_copy(kept.model), kept.tokenizer, kept.facts)

    def plain_base(self, job: Job) -> Any:
        """The model that the copies are taken of."""
        return self._loaded(job).model

    def rows_of(self, job: Job) -> Rows:
        """Rows of a job; raises DataError as `load_rows` does."""
        return _kept(self._rows, _data_key(job), lambda: load_rows(job.trial.data, cache=self.cache))

    def tokens_of(self, job: Job, base: LoadedBase) -> Tokens:
        """Its rows as tokens of `base`; raises DataError as `encode_rows` does."""

        def encode(side: Sequence[Row]) -> EncodedSet:
            return encode_rows(side, base.tokenizer, job.trial.data, vocab_size=base.model.config.vocab_size)

        def encode_both() -> Tokens:
            rows = self.rows_of(job)
            return Tokens(encode(rows.train), encode(rows.heldout))

        return _kept(self._tokens, (_data_key(job), cohort_key(job).base), encode_both)

    def why_not_together(self, job: Job, longest: int) -> str | None:
        """Why a job cannot take a seat beside others: its method, the base's quantization, or the model's attention."""
        why = why_not_fused(job.trial)
        if why is not None:
            return why
        model = self.plain_base(job)
        if longest not in self._ragged:
            self._ragged[longest] = why_not_ragged(model, longest=longest)
        return self._ragged[longest]

    def _loaded(self, job: Job) -> LoadedBase:
        key = cohort_key(job).base
        if self._base is None or key != self._key:
            self._key = self._base = None  # gone before the next is loaded
            self._ragged.clear()
            self._base = self.restorer.base_of(job.trial, job.identities)
            self._key = key
        return self._base


def _kept(made: dict[_K, _T], key: _K, make: Callable[[], _T]) -> _T:
    """What was made for `key`, or is made now; the oldest are let go."""
    if key not in made:
        made[key] = make()
        while len(made) > _KEPT_SETS:
            del made[next(iter(made))]
    return made[key]


def _data_key(job: Job) -> str:
    identities = {role: value for role, value in job.identities.items() if role not in PARENT_ROLES}
    return json.dumps([identities, job.trial.data.model_dump(mode="json")], sort_keys=True)
