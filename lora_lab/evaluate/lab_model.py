"""lm-eval's model `lora_lab`: lm-eval's own Hugging Face model, with every shared token computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import Progress as Bar
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_lab.adapters.prompts import virtual_tokens
from lora_lab.evaluate.checked_model import check_finite
from lora_lab.evaluate.generating_model import Engine, GeneratingModel
from lora_lab.evaluate.guard import EXACT, Allowance, Guarded, Verdict, check_against_stock, read_verdict, write_verdict
from lora_lab.evaluate.guard_note import GuardNote
from lora_lab.evaluate.tree.rounding import logit_rounding
from lora_lab.evaluate.tree.scores import Answer, Progress, TreePlan, plan_rows, score_plan
from lora_lab.evaluate.tree.sizes import budget_of, costs_of
from lora_lab.evaluate.tree.support import why_not_tree
from lora_lab.evaluate.tree.token_tree import ScoredRow

# lm-eval's tokenised pair: (texts or None, context, continuation).
Pair = tuple[tuple[str, str] | None, list[int], list[int]]

# Where lm-eval chooses the batch size itself, the guard's comparison uses this one.
_BATCH_SIZE = 8


class LabModel(GeneratingModel):
    """HFLM whose log-likelihoods come from a prefix tree; it takes HFLM's own settings besides these.

    Tokens, truncation and arithmetic are lm-eval's, of `logits_cache=False`: its shortcut for requests with the same
    input (0.4.13, `Collator.get_cache`) scores a shorter continuation at the positions of a longer one. Where the tree
    is not valid for the model, lm-eval's own batches run instead, and `engine_facts` says why. The same requests in
    another order give the same bits; other requests beside them, or other `chunk_tokens`, move a score within rounding.

    Args:
        engine: `tree`, or `stock` for lm-eval's own batches.
        chunk_tokens: tokens of one forward pass; None chooses (`budget_of`).
        guard: whether drawn requests are scored by lm-eval's engine too, once per model object and kind of request, or
            once per `guard_note`.
        progress: told (tokens read, of how many) after each pass; None draws a bar in a terminal.

    engine_facts: one entry per call: kind of request, engine, why it is not the tree, sizes, counts, guard's verdict.

    Raises:
        EvaluationError: see `check_against_stock` and CheckedModel.
        ValueError: an unknown engine, or chunk_tokens below 1.
    """

    def __init__(
        self,
        pretrained: nn.Module | str,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        engine: Engine = "tree",
        chunk_tokens: int | None = None,
        guard: bool = True,
        guard_note: GuardNote | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> None:
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: must be >= 1, got {chunk_tokens}")
        super().__init__(pretrained, tokenizer=tokenizer, engine=engine, **settings)
        self.chunk_tokens = chunk_tokens
        self._guard, self._guard_note, self._progress = guard, guard_note, progress
        self._verdicts: dict[str, Verdict] = {}
        self._scored: tuple[Sequence[Pair], TreePlan] | None = None
        self._largest_logit = 0.0
        self._encoded: dict[tuple[str, bool | None], list[int]] = {}

    def allowed(self, score: float, text: str) -> float:
        """Nats by which the score of this continuation may be off, as far as the guard has measured it."""
        measured = [Allowance(**facts["guard"]["allowance"]) for facts in self.engine_facts if "guard" in facts]
        scored = len(self.tok_encode(text, add_special_tokens=False))
        return max(allowance.of(score, scored) for allowance in [EXACT, *measured])

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """[(log-likelihood in nats, whether greedy decoding gives the continuation)], one per request."""
        with self._call("loglikelihood"):
            answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            self._check_guarded(requests, [value for value, _ in answers])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, from lm-eval's disjoint windows, all in one call."""
        with self._call("loglikelihood_rolling"):
            windows = [self._windows(request.args[0]) for request in requests]
            pairs = [window for own in windows for window in own]
            if self.world_size > 1 or self._engine(pairs) == "stock":
                return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            scores = iter(self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm))
            values = [[next(scores)[0] for _ in own] for own in windows]
            totals = [sum(own) for own in values]
            check_finite(requests, totals)
            owners = [request for request, own in zip(requests, windows, strict=True) for _ in own]
            self._check_guarded(owners, [value for own in values for value in own])
        return totals

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **settings: Any) -> list[int]:
        """As HFLM does it. lm-eval encodes a context once per choice; within a call it is looked up."""
        key = (string, add_special_tokens)
        if settings or not self._facts:
            return super().tok_encode(string, add_special_tokens, **settings)  # type: ignore[no-any-return]
        if key not in self._encoded:
            self._encoded[key] = super().tok_encode(string, add_special_tokens)
        return list(self._encoded[key])

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if not self._facts:
            with self._call("tokens"):
                return self._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        if self._engine(requests) == "stock":
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        self._count_truncated(requests)
        rows = [
            ScoredRow.of(context, continuation, max_length=self.max_length) for _, context, continuation in requests
        ]
        budget = budget_of(self.model, self.chunk_tokens)
        plan = plan_rows(rows, budget, costs_of(self.model))
        self._facts |= asdict(budget) | asdict(plan.counts)
        with self._shown() as progress:
            scores = score_plan(
                self.model, plan, softmax_dtype=self.softmax_dtype, autocast=self._autocast(), progress=progress
            )
        self._scored = (requests, plan)
        self._largest_logit = max(self._largest_logit, scores.largest_logit)
        return list(scores.answers)

    @contextlib.contextmanager
    def _shown(self) -> Iterator[Progress]:
        """The progress that was given, or a bar."""
        if self._progress is not None:
            yield self._progress
            return
        console = Console(stderr=True)
        with Bar(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("scoring (tokens)", total=None)
            yield lambda read, total: bar.update(task, completed=read, total=total)

    def _engine(self, requests: Sequence[Pair]) -> str:
        """The engine of the current call, decided at its first tokens and noted."""
        if "engine" not in self._facts:
            longest = max((len(context) + len(target) - 1 for _, context, target in requests), default=0)
            depth = min(longest, self.max_length) + virtual_tokens(self.model)
            why = None if self.engine == "stock" else self._why_stock(depth)
            self._facts["engine"] = "stock" if self.engine == "stock" or why is not None else "tree"
            if why is not None:
                self._facts["why_stock"] = why
        return str(self._facts["engine"])

    def _why_stock(self, depth: int) -> str | None:
        if self.backend != "causal":
            return "it is not a causal language model"
        return why_not_tree(self.model, depth=depth, probes=self._kept_verdict() is None)

    def _kept_verdict(self) -> Verdict | None:
        """The guard's on requests of this kind, from this object or from `guard_note`."""
        kind = str(self._facts["kind"])
        kept = None if self._guard_note is None else read_verdict(self._guard_note.path(kind))
        return self._verdicts.get(kind, kept)

    @contextlib.contextmanager
    def _call(self, kind: str) -> Iterator[None]:
        self._scored = None
        try:
            with super()._call(kind):
                yield
        finally:
            self._encoded = {}

    def _windows(self, text: str) -> list[Pair]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(None, *make_disjoint_window(window)) for window in windows]

    def _check_guarded(self, owners: Sequence[Any], values: Sequence[float]) -> None:
        """Compares what the tree has just scored with lm-eval's engine, unless this has been done."""
        if self._scored is None or not self._guard:
            return
        pairs, plan = self._scored
        kind = str(self._facts["kind"])
        verdict = self._kept_verdict()
        self._facts["guard_remembered"] = verdict is not None
        if verdict is None:
            guarded = [
                Guarded(str(owner.task_name), int(owner.doc_id), pair[0], len(row.tokens), len(row.targets), value)
                for owner, pair, row, value in zip(owners, pairs, plan.rows, values, strict=True)
            ]
            verdict = check_against_stock(
                guarded,
                self._stock_of(pairs),
                self._nudged_of(pairs),
                rounding=self._rounding(),
                largest_logit=self._largest_logit,
            )
            if self._guard_note is not None:
                write_verdict(self._guard_note.path(kind), verdict, self._guard_note.about)
        self._verdicts[kind] = verdict
        self._facts["guard"] = asdict(verdict)

    def _stock_of(self, pairs: Sequence[Pair]) -> Any:
        def scores(indices: Sequence[int], batch_size: int | None) -> list[float]:
            own, shortcut = self.batch_size, self.logits_cache
            self.batch_size_per_gpu: Any = batch_size or (own if isinstance(own, int) else _BATCH_SIZE)
            self.logits_cache: bool = False
            try:
                chosen = [pairs[index] for index in indices]
                return [value for value, _ in HFLM._loglikelihood_tokens(self, chosen, disable_tqdm=True)]
            finally:
                self.batch_size_per_gpu, self.logits_cache = own, shortcut

        return scores

    def _nudged_of(self, pairs: Sequence[Pair]) -> Any:
        def scores(indices: Sequence[int], seed: int) -> list[float]:
            embedding = self.model.get_input_embeddings()
            handle = embedding.register_forward_hook(_nudge(torch.Generator().manual_seed(seed)))
            try:
                return self._stock_of(pairs)(indices, None)  # type: ignore[no-any-return]
            finally:
                handle.remove()

        return scores

    def _rounding(self) -> float | None:
        return logit_rounding(self.model, autocast=self.mixed_precision_dtype)


def _nudge(generator: torch.Generator) -> Any:
    """A forward hook that moves every number by one rounding, up or down."""

    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        signs = 2 * torch.randint(0, 2, output.shape, generator=generator) - 1
        return output * (1 + torch.finfo(output.dtype).eps * signs.to(output.device))

    return hook
