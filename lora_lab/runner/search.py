"""Early stopping of a search: a run is scored on the held-out rows at its points, and ended where it falls behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lora_lab.data.encode import Encoded
from lora_lab.errors import EvaluationError
from lora_lab.evaluate.heldout import score_heldout
from lora_lab.plan.stopping import Stop, evaluation_points
from lora_lab.record.evaluation_log import LOSS, early_stop, write_evaluation
from lora_lab.record.run_folder import RunFolder
from lora_lab.schema.evaluation import Evaluation
from lora_lab.schema.stopping import Stopping
from lora_lab.train.member import Member


class Contestant:
    """One run of a search. `member` is read only; `heldout`: rows that its `model` is scored on at each point."""

    def __init__(
        self,
        member: Member,
        model: Any,
        heldout: Sequence[Encoded],
        *,
        evaluation: Evaluation,
        stopping: Stopping,
        rivals: Sequence[tuple[str, int]],
    ) -> None:
        self._member, self._model, self._heldout, self._evaluation = member, model, heldout, evaluation
        self._stopping, self._rivals = stopping, rivals
        self._points = evaluation_points(stopping, member.total_steps)

    @property
    def is_at_point(self) -> bool:
        """Whether the run stands at one of its points, between two steps."""
        return self._member.step in self._points and self._member.open_step is None and self._member.diverged is None

    def evaluate(self, folder: RunFolder) -> None:
        """Logs the held-out loss, which is NaN where it is not finite."""
        device = next(self._model.parameters()).device
        pad_id, size = self._model.config.pad_token_id, self._evaluation.batch_size
        try:
            scores = score_heldout(self._model, self._heldout, pad_id=pad_id, batch_size=size, device=device)
            loss = scores.metrics[LOSS].value
        except EvaluationError:
            loss = math.nan
        write_evaluation(folder.path, self._member.step, total_steps=self._member.total_steps, values={LOSS: loss})

    def judge(self, folder: RunFolder) -> Stop | None:
        """Whether the rule ends the run here; asked when all who came to a point with it have been evaluated."""
        return early_stop(folder, self._stopping, self._member.step, self._rivals)
