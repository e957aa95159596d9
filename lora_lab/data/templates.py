"""A row as text: the tokenizer's own chat template, or the Alpaca template where there is none.

Special tokens spelled out in a row's content (`<|im_end|>` in a user's question) stay text. While the template is
rendered a stand-in character takes their place, so every special token in the rendered text is the template's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lora_lab.data.rows import Message, Row
from lora_lab.errors import DataError, InputError, Problem

# Wording of Taori et al., "Stanford Alpaca: An Instruction-following LLaMA model" (2023). The answer starts on a line
# of its own, as in Alpaca-LoRA and LitGPT. A system message takes the place of the first paragraph; earlier turns of a
# conversation repeat the two headings.
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

# Llama 3 templates print the day of rendering into the prompt unless it is given: the same trial would train on other
# text tomorrow. This is the day those templates fall back to themselves.
_DATE = "26 Jul 2024"

_STAND_INS = range(0xE000, 0xF900)  # Unicode's private use area


@dataclass(frozen=True, slots=True)
class Rendered:
    """prompt: what the model is given; answer: what it is to write, up to and including the end of its turn, if the
    template marks one (`ends`). stand_ins: character -> the special token it stands for."""

    prompt: str
    answer: str
    ends: bool
    stand_ins: Mapping[str, str]


def uses_chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether rows go through the tokenizer's own template. Raises InputError for `model` where it has none."""
    if template == "model" and not tokenizer.chat_template:
        raise InputError(Problem("data.template", 'the tokenizer has no chat template; use "alpaca" or "auto"'))
    return template == "model" or (template == "auto" and bool(tokenizer.chat_template))


def special_strings(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches the special tokens of a tokenizer in a text, longest first; None where it has none."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names |= set(tokenizer.all_special_tokens)
    names.discard("")
    if not names:
        return None
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name))))


def render(row: Row, tokenizer: PreTrainedTokenizerBase, *, chat: bool, specials: re.Pattern[str] | None) -> Rendered:
    """Prompt and answer of a row of messages.

    Raises:
        DataError: the template refuses the messages, or does not build the answer after the prompt.
    """
    if row.messages is None:
        raise DataError(Problem(row.source, "plain text has no prompt and no answer"))
    messages, stand_ins = _shielded(row.messages, specials)
    if not chat:
        context = None if row.context is None else _stand_in(row.context, stand_ins)
        return Rendered(_alpaca_prompt(messages, context), messages[-1].content, False, stand_ins)
    prompt = _chat_text(messages[:-1], tokenizer, row.source, prompt=True)
    whole = _chat_text(messages, tokenizer, row.source, prompt=False)
    if not whole.startswith(prompt):
        message = "the model's chat template does not continue its prompt with the answer; use data.template=alpaca"
        raise DataError(Problem(row.source, message))
    answer, ends = _to_end_of_turn(whole[len(prompt) :], specials)
    return Rendered(prompt, answer, ends, stand_ins)


def _to_end_of_turn(answer: str, specials: re.Pattern[str] | None) -> tuple[str, bool]:
    """The answer up to the special token that ends it. White space after that (ChatML has a line feed) opens the next
    turn: nobody generates it, so it is left out."""
    found = list(specials.finditer(answer)) if specials else []
    if not found or answer[found[-1].end() :].strip():
        return answer, False
    return answer[: found[-1].end()], True


def _chat_text(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, source: str, *, prompt: bool) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, date_string=_DATE)
    except (TemplateError, ValueError) as error:
        raise DataError(Problem(source, f"the model's chat template refuses these messages ({error})")) from None
    return str(text)


def _alpaca_prompt(messages: Sequence[Message], context: str | None) -> str:
    turns = list(messages[:-1])
    preamble = _ALPACA_WITH_INPUT if context else _ALPACA
    if turns and turns[0].role == "system":
        preamble = turns.pop(0).content
    blocks = [preamble]
    for turn in turns:
        heading = "Response" if turn.role == "assistant" else "Instruction"
        blocks.append(f"### {heading}:\n{turn.content}")
    if context:  # Row.from_instruction put it at the end of the one user message
        instruction = blocks[-1].removesuffix(f"\n\n{context}")
        blocks[-1:] = [instruction, f"### Input:\n{context}"]
    return "\n\n".join([*blocks, "### Response:\n"])


def _shielded(
    messages: Sequence[Message], specials: re.Pattern[str] | None
) -> tuple[tuple[Message, ...], dict[str, str]]:
    found = sorted({name for message in messages for name in (specials.findall(message.content) if specials else ())})
    if specials is None or not found:
        return tuple(messages), {}
    used = {character for message in messages for character in message.content}
    free = (chr(code) for code in _STAND_INS if chr(code) not in used)
    # Longest first, as the pattern matches, so that no name is taken apart by one that it contains.
    stand_ins = {next(free): name for name in sorted(found, key=len, reverse=True)}
    return tuple(Message(message.role, _stand_in(message.content, stand_ins)) for message in messages), stand_ins


def _stand_in(text: str, stand_ins: Mapping[str, str]) -> str:
    for character, name in stand_ins.items():
        text = text.replace(name, character)
    return text
