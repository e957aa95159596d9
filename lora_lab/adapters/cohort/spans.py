"""Which tokens of a pass are whose: the members' rows stand one member after another in the ragged rows of the call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lab.data.encode import Encoded
from lora_lab.models.ragged import RaggedRows, ragged_rows


@dataclass(frozen=True, slots=True)
class Span:
    """A member's part of what one module sees: positions start to stop of the dimension of all tokens.

    rows: how these tokens are laid out as rows of their own; None for the output embedding, which sees chosen tokens in
    a single row. Masks and losses that depend on the shape of a batch see the member's own shape, as if it were alone.
    """

    start: int
    stop: int
    rows: RaggedRows | None

    def by_rows(self, own: Tensor) -> Tensor:
        """[its tokens, width] -> [its rows, their length, width], zeros on padding."""
        return own.unsqueeze(0) if self.rows is None else self.rows.padded(own)

    def flat(self, by_rows: Tensor) -> Tensor:
        """[its rows, their length, ...] -> [its tokens, ...]."""
        return by_rows.squeeze(0) if self.rows is None else self.rows.flat(by_rows)

    def shape(self, width: int) -> tuple[int, int, int]:
        """Of `by_rows`."""
        if self.rows is None:
            return (1, self.stop - self.start, width)
        return (len(self.rows.lengths), max(self.rows.lengths), width)


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over the rows of several members, in their order.

    input_ids: int64 [1, tokens]. chosen: int64 [chosen], tokens whose logits are wanted: those in front of each loss
    token. targets: int64 [chosen]. tokens, outputs: each member's span among all tokens, and among the chosen ones.
    """

    input_ids: Tensor
    rows: RaggedRows
    chosen: Tensor
    targets: Tensor
    tokens: Mapping[str, Span]
    outputs: Mapping[str, Span]


def pass_over(batches: Mapping[str, Sequence[Encoded]], device: torch.device | str) -> Pass:
    """The pass over a micro-batch of each member, by its name."""
    ids: list[int] = []
    chosen: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    tokens: dict[str, Span] = {}
    outputs: dict[str, Span] = {}
    for name, examples in batches.items():
        first, first_output = len(ids), len(chosen)
        for example in examples:
            places = [place for place, counts in enumerate(example.loss_mask) if counts]
            chosen += [len(ids) + place - 1 for place in places]
            targets += [example.input_ids[place] for place in places]
            ids += example.input_ids
        own = [len(example.input_ids) for example in examples]
        lengths += own
        tokens[name] = Span(first, len(ids), ragged_rows(own, device))
        outputs[name] = Span(first_output, len(chosen), None)
    return Pass(
        input_ids=torch.tensor([ids], dtype=torch.int64, device=device),
        rows=ragged_rows(lengths, device),
        chosen=torch.tensor(chosen, dtype=torch.int64, device=device),
        targets=torch.tensor(targets, dtype=torch.int64, device=device),
        tokens=tokens,
        outputs=outputs,
    )
