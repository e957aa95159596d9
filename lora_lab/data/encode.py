"""Rows -> token ids and a loss mask.

The prompt's tokens are exactly those that generation and evaluation start from: the prompt is tokenised by itself. The
answer takes the tokens of the whole text where these begin with the prompt's; where a token would straddle the boundary
(the model never sees that one when it generates) the answer is tokenised by itself too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lora_lab.data.heldout import SHOWN_PROBLEMS, more_problems
from lora_lab.data.rows import Row
from lora_lab.data.templates import Rendered, render, special_strings, uses_chat_template
from lora_lab.errors import DataError, InputError, Problem
from lora_lab.schema.data import HubData, JsonlData, SkillsData


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example. loss_mask[i]: token i is a target that carries loss (the training loop shifts).

    loss_mask[0] is False always: nothing predicts the first token. cut: it was longer than max_length. type:
    of its row.
    """

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    cut: bool
    type: str | None = None

    @property
    def loss_tokens(self) -> int:
        """Targets that carry loss."""
        return sum(self.loss_mask)


@dataclass(frozen=True, slots=True)
class EncodedSet:
    """All examples of one side, in the order of its rows."""

    examples: tuple[Encoded, ...]
    cut_rows: int
    loss_tokens: int
    total_tokens: int

    @property
    def loss_share(self) -> float:
        """Share of all tokens that carry loss, in 0..1."""
        return self.loss_tokens / self.total_tokens

    @property
    def cut_share(self) -> float:
        """Share of the rows that were cut at max_length, in 0..1."""
        return self.cut_rows / len(self.examples)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per example."""
        return tuple(len(example.input_ids) for example in self.examples)


def encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, template: str, loss_on: str, max_length: int
) -> Encoded:
    """One row as tokens.

    Messages: template, then the answer and the token that ends the turn, once (the template's own, else the tokenizer's
    end-of-sequence token). Text: the text, begun by BOS if the tokenizer does so, ended by the end-of-sequence token.
    loss_on: `answer` (for text: all of it) or `all` tokens. Longer rows lose their end, the end token with it.

    Raises:
        DataError: no token that carries loss is left, or the template refuses the row.
        InputError: the tokenizer lacks a chat template that is asked for, or an end-of-sequence token.
    """
    encoded = _Encoder(tokenizer, template).encode(row, loss_on=loss_on, max_length=max_length)
    if not encoded.loss_tokens:
        raise DataError(_no_loss(row, encoded, max_length))
    return encoded


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: SkillsData | JsonlData | HubData, *, vocab_size: int
) -> EncodedSet:
    """All rows of one side as tokens, see `encode_row`.

    vocab_size: rows of the model's input embedding; an id beyond it would fail inside a kernel, far from its cause.

    Raises:
        DataError: no rows, rows without loss tokens, or ids beyond `vocab_size` (the first 20, and how many).
    """
    if not rows:
        raise DataError(Problem("data", "0 rows to encode"))
    encoder = _Encoder(tokenizer, data.template)
    examples = []
    problems: list[Problem] = []
    for row in rows:
        try:
            encoded = encoder.encode(row, loss_on=data.loss_on, max_length=data.max_length)
        except DataError as error:
            problems += error.problems
            continue
        examples.append(encoded)
        if not encoded.loss_tokens:
            problems.append(_no_loss(row, encoded, data.max_length))
        elif max(encoded.input_ids) >= vocab_size:
            top = max(encoded.input_ids)
            problems.append(Problem(row.source, f"token id {top} is beyond the model's vocabulary ({vocab_size})"))
    if problems:
        raise DataError([*problems[:SHOWN_PROBLEMS], *more_problems(len(problems), "rows with problems")])
    return EncodedSet(
        examples=tuple(examples),
        cut_rows=sum(example.cut for example in examples),
        loss_tokens=sum(example.loss_tokens for example in examples),
        total_tokens=sum(len(example.input_ids) for example in examples),
    )


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[int, ...]:
    """The tokens before the answer, as in training; what generation starts from. DataError for plain text."""
    encoder = _Encoder(tokenizer, template)
    return encoder.prompt(encoder.render(row))


def stop_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[int, ...]:
    """Tokens at which generation ends: the one that ends an answer in training, and the end-of-sequence token."""
    encoder = _Encoder(tokenizer, template)
    probe = encoder.encode(Row.from_pair("a", "b", source="probe"), loss_on="answer", max_length=2**31)
    return tuple(sorted({probe.input_ids[-1], encoder.eos_id}))


class _Encoder:
    """A tokenizer with what is asked of it once per row set."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.tokenizer = tokenizer
        self.chat = uses_chat_template(tokenizer, template)
        self.specials: re.Pattern[str] | None = special_strings(tokenizer)
        self.eos_id = _eos_id(tokenizer)
        self.bos_ids = _bos_ids(tokenizer)

    def render(self, row: Row) -> Rendered:
        return render(row, self.tokenizer, chat=self.chat, specials=self.specials)

    def encode(self, row: Row, *, loss_on: str, max_length: int) -> Encoded:
        if row.text is not None:
            prompt: tuple[int, ...] = ()
            ids = (*self.bos_ids, *self._plain(row.text), self.eos_id)
        else:
            rendered = self.render(row)
            prompt = self.prompt(rendered)
            ids = (*prompt, *self._answer(rendered, prompt))
        first_target = 1 if loss_on == "all" else max(1, len(prompt))
        loss_mask = tuple(index >= first_target for index in range(len(ids)))
        return Encoded(ids[:max_length], loss_mask[:max_length], cut=len(ids) > max_length, type=row.type)

    def prompt(self, rendered: Rendered) -> tuple[int, ...]:
        return (*self._start, *self._ids(rendered.prompt, rendered))

    @property
    def _start(self) -> tuple[int, ...]:
        return () if self.chat else self.bos_ids  # a chat template writes BOS itself where the model wants one

    def _answer(self, rendered: Rendered, prompt: tuple[int, ...]) -> tuple[int, ...]:
        whole = (*self._start, *self._ids(rendered.prompt + rendered.answer, rendered))
        clean = whole[: len(prompt)] == prompt
        answer = whole[len(prompt) :] if clean else self._ids(rendered.answer, rendered)
        return answer if rendered.ends else (*answer, self.eos_id)

    def _ids(self, text: str, rendered: Rendered) -> tuple[int, ...]:
        """Ids of a rendered text. Only where the row spells out special tokens is it cut at the template's own ones,
        and the pieces between them tokenised as plain text; special tokens are boundaries in the whole text too."""
        if self.specials is None or not rendered.stand_ins:
            return self._tokens(text, plain=False)
        ids: list[int] = []
        start = 0
        for match in self.specials.finditer(text) if self.chat else ():
            ids += self._plain(_restored(text[start : match.start()], rendered))
            ids.append(int(self.tokenizer.convert_tokens_to_ids(match.group())))
            start = match.end()
        ids += self._plain(_restored(text[start:], rendered))
        return tuple(ids)

    def _plain(self, text: str) -> tuple[int, ...]:
        return self._tokens(text, plain=True) if text else ()

    def _tokens(self, text: str, *, plain: bool) -> tuple[int, ...]:
        encoding = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)
        return tuple(encoding["input_ids"])


def _restored(text: str, rendered: Rendered) -> str:
    for character, name in rendered.stand_ins.items():
        text = text.replace(character, name)
    return text


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise InputError(Problem("model", "the tokenizer has no end-of-sequence token: nothing could teach it to stop"))
    return int(tokenizer.eos_token_id)


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """BOS, if this tokenizer puts it in front of a text by itself."""
    if tokenizer.bos_token_id is None:
        return ()
    with_specials = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    begins = with_specials[0] == tokenizer.bos_token_id and without[0] != tokenizer.bos_token_id
    return (int(tokenizer.bos_token_id),) if begins else ()


def _no_loss(row: Row, encoded: Encoded, max_length: int) -> Problem:
    if encoded.cut:
        message = f"no loss token left: the prompt alone fills max_length={max_length}; raise it or drop the row"
        return Problem(row.source, message)
    return Problem(row.source, "no token carries loss")
