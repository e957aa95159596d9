"""When a row of `generate_until` has ended: lm-eval's own criterion, and what it lets be left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.utils import postprocess_generated_text

# lm-eval looks back by as many tokens as the stop string has, and by two more (MultiTokenEOSCriteria).
_MORE = 2


class Stops:
    """The stop strings of one batch.

    stop: strings; lm-eval has put the end-of-text token's among them. tokenizer: lm-eval's, from transformers.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = list(stop)
        # Stop strings by the number of tokens to look back on: one decoding serves all of the same number.
        self._windows: dict[int, list[str]] = {}
        for text in self._stop:
            length = len(tokenizer.encode(text, add_special_tokens=False)) + _MORE
            self._windows.setdefault(length, []).append(text)

    def are_met(self, new: Sequence[int]) -> bool:
        """Whether lm-eval would note a stop string after the last of the new tokens (special ones are shown)."""
        for length, texts in self._windows.items():
            shown = self._tokenizer.decode(list(new[-length:]))
            if any(text in shown for text in texts):
                return True
        return False

    def settle(self, new: Sequence[int]) -> bool:
        """Whether the text that lm-eval will take from a row is the same whatever tokens follow `new`.

        lm-eval leaves out special tokens and cuts at a stop string. So a stop string that is a special token, or that
        another one might still overlap, settles nothing.
        """
        text = self._tokenizer.decode(list(new), skip_special_tokens=True)
        cut = len(postprocess_generated_text(text, self._stop, None))
        return cut < len(text) and not any(_may_begin(stop, text, cut) for stop in self._stop)


def _may_begin(stop: str, text: str, cut: int) -> bool:
    """Whether `stop` has begun before `cut` and not ended within `text`."""
    return any(text.endswith(stop[:size]) and len(text) - size < cut for size in range(1, len(stop)))
