"""Rows of unequal length laid end to end, so that nothing is computed on padding: [1, tokens] instead of [rows, width].

Linear layers and norms see tokens one by one and do not care. Attention does: it is done per row, by transformers' own
`sdpa` function on rows that are padded for it alone (right padding, causal: a real token never looks at padding).
Positions start anew in each row. Any model of transformers whose attention goes through its attention interface is fit
for it unchanged; `why_not_ragged` finds the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lora_lab.errors import first_line
from lora_lab.models.config_limits import position_limits, rope_limits, text_sections, windows
from lora_lab.models.quiet import quiet_transformers
from lora_lab.models.shared_copy import shared_copy

_ATTENTION = "lora_lab_ragged"
# Of the probe: rows of which none is as long as another, so that places in the row and in the call differ.
_PROBE_LENGTHS = (7, 19, 12)
# Times the dtype's rounding that log-probabilities of the probe may differ by, relative to the largest of them.
_ALLOWED_ROUNDINGS = 256


@dataclass(frozen=True, slots=True)
class RaggedRows:
    """Which token of a call belongs to which row. lengths: tokens of each row, all >= 1, in order.

    places: [tokens] int64, where each token stands in the padded rows, flattened; None where no row is padded.
    """

    lengths: tuple[int, ...]
    places: Tensor | None
    position_ids: Tensor

    @property
    def tokens(self) -> int:
        """All tokens of the call."""
        return sum(self.lengths)

    def padded(self, flat: Tensor) -> Tensor:
        """[tokens, ...] as [rows, width, ...]; zeros on padding."""
        rows, width = len(self.lengths), max(self.lengths)
        if self.places is None:
            return flat.reshape(rows, width, *flat.shape[1:])
        whole = flat.new_zeros(rows * width, *flat.shape[1:])
        return whole.index_copy(0, self.places, flat).view(rows, width, *flat.shape[1:])

    def flat(self, padded: Tensor) -> Tensor:
        """The inverse: [rows, width, ...] as [tokens, ...], without padding."""
        joined = padded.flatten(0, 1)
        return joined if self.places is None else joined.index_select(0, self.places)


def ragged_rows(lengths: Sequence[int], device: torch.device | str) -> RaggedRows:
    """The layout of rows of these lengths."""
    width = max(lengths)
    inside = [torch.arange(length) for length in lengths]
    places = None
    if any(length != width for length in lengths):
        places = torch.cat([row * width + one for row, one in enumerate(inside)]).to(device)
    return RaggedRows(tuple(lengths), places, torch.cat(inside).unsqueeze(0).to(device))


class RaggedModel:
    """Calls a causal LM of transformers on ragged rows. It is changed for good: use a `shared_copy`.

    rows: the layout of the last call; it stays until the next one, as layers under gradient checkpointing are computed
    again in the backward pass.
    """

    def __init__(self, model: Any) -> None:
        """Raises ValueError where the model's attention cannot be chosen."""
        self.model = model
        self.rows: RaggedRows | None = None
        with quiet_transformers():
            model.set_attn_implementation(_ATTENTION)
        if model.config._attn_implementation != _ATTENTION:
            raise ValueError(f"the attention of {type(model).__name__} is its own and cannot be chosen")
        for module in model.modules():
            module.ragged_model = self

    def __call__(self, input_ids: Tensor, rows: RaggedRows) -> Any:
        """The model's output for `input_ids` [1, tokens]; what it has per token is [1, tokens, ...]."""
        self.rows = rows
        return self.model(input_ids=input_ids, attention_mask=None, position_ids=rows.position_ids, use_cache=False)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' interface: query, key, value [1, heads, tokens, size] to [1, tokens, heads, size]."""
    called: Any = getattr(module, "ragged_model", None)
    if called is None or called.rows is None or attention_mask is not None:
        raise ValueError(f"{type(module).__name__} is not called through its RaggedModel")
    rows: RaggedRows = called.rows
    # Token by token, as they lie in memory: all heads of a token are copied in one piece.
    by_row = [rows.padded(one.squeeze(0).transpose(0, 1)).transpose(1, 2) for one in (query, key, value)]
    settings.pop("is_causal", None)
    attended, _ = sdpa_attention_forward(module, *by_row, None, is_causal=True, **settings)
    return rows.flat(attended).unsqueeze(0), None


AttentionInterface.register(_ATTENTION, _attention)


def why_not_ragged(model: Any, *, longest: int) -> str | None:
    """Why a plain base computes something else on ragged rows of up to `longest` tokens; None where it does not.

    Asks the configuration for what only long rows would show, then compares three short rows with each alone.
    """
    why = why_rows_differ(model, longest=longest)
    if why is not None:
        return why
    sections = list(text_sections(model.config.get_text_config(decoder=True)))
    room = min([max(_PROBE_LENGTHS), *position_limits(sections), *windows(sections).values()])
    return _probe(model, [min(length, room) for length in _PROBE_LENGTHS])


def why_rows_differ(model: Any, *, longest: int) -> str | None:
    """The part of `why_not_ragged` that the configuration and the class of a model tell without its values."""
    sections = list(text_sections(model.config.get_text_config(decoder=True)))
    for name, window in windows(sections).items():
        if window < longest:
            return f"its {name} of {window} is shorter than the longest row ({longest} tokens)"
    for section in sections:
        for kind, limit in rope_limits(section):
            if longest > limit:
                return f"its {kind} rotary frequencies change in rows beyond {limit} tokens, and rows have {longest}"
    try:
        RaggedModel(shared_copy(model))
    except Exception as error:  # noqa: BLE001 - a model that cannot be called so is answered by its own words
        return f"its rows cannot be laid end to end: {first_line(error)}"
    return None


@torch.no_grad()
def _probe(model: Any, lengths: list[int]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    rows = [torch.randint(size, (1, length), generator=generator).to(model.device) for length in lengths]
    was_training = model.training
    model.eval()
    try:
        alone = torch.cat([_log_probabilities(model(input_ids=row, use_cache=False)) for row in rows])
        ragged = RaggedModel(shared_copy(model))
        together = _log_probabilities(ragged(torch.cat(rows, dim=1), ragged_rows(lengths, model.device)))
    except Exception as error:  # noqa: BLE001 - a model that cannot be called so is answered by its own words
        return f"its rows cannot be laid end to end: {first_line(error)}"
    finally:
        model.train(was_training)
    difference = float((alone - together).abs().max())
    allowed = _ALLOWED_ROUNDINGS * torch.finfo(model.dtype).eps * max(1.0, float(alone.abs().max()))
    if not difference <= allowed:
        return f"rows laid end to end change its log-probabilities by {difference:.2g} (allowed: {allowed:.2g})"
    return None


def _log_probabilities(output: Any) -> Tensor:
    logits: Tensor = output.logits.squeeze(0)
    return logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
