"""What a data source yields: rows of messages or of plain text, before any tokenizer has seen them. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. role: one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One example: either `messages`, the last of which is the assistant's answer, or plain `text`.

    source: `path:line`, `repo:split:index`, or the id of the generator that made it. skill: label of the kind of task,
    where there is one. type: what LoRAMoE's groups of experts are told apart by. context: the second part of an
    instruction (Alpaca's "input"), which the user message holds too (after an empty line); the Alpaca template prints
    it under a heading of its own.
    """

    messages: tuple[Message, ...] | None
    text: str | None
    source: str
    skill: str | None = None
    context: str | None = None
    type: str | None = None

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise ValueError(f"{self.source}: a row holds either messages or text")
        if self.messages is not None and (len(self.messages) < 2 or self.messages[-1].role != "assistant"):
            raise ValueError(f"{self.source}: messages must end with an assistant message that answers something")

    @classmethod
    def from_pair(cls, prompt: str, answer: str, *, source: str, skill: str | None = None) -> Row:
        """A row of one user message and its answer."""
        return cls((Message("user", prompt), Message("assistant", answer)), None, source, skill)

    @classmethod
    def from_instruction(cls, instruction: str, context: str, answer: str, *, source: str) -> Row:
        """A row of Alpaca's three fields; an empty `context` (Alpaca's "input") is left out."""
        prompt = f"{instruction}\n\n{context}" if context else instruction
        messages = (Message("user", prompt), Message("assistant", answer))
        return cls(messages, None, source, None, context or None)

    @classmethod
    def from_text(cls, text: str, *, source: str) -> Row:
        """A row of plain text."""
        return cls(None, text, source)

    @property
    def content(self) -> tuple[tuple[str, str], ...]:
        """What makes two rows equal: roles and texts, not where they came from."""
        if self.messages is None:
            return (("text", self.text or ""),)
        return tuple((message.role, message.content) for message in self.messages)

    @property
    def answer(self) -> str:
        """The last assistant message, or the text."""
        return self.content[-1][1]


@dataclass(frozen=True, slots=True)
class Rows:
    """The two sides of a data set; no row of `train` has the content of a row of `heldout`."""

    train: list[Row]
    heldout: list[Row]
