"""English prose that every Python carries: the language reference in `pydoc_data.topics`. Torch-free.

Its text changes with the Python version, so its hash belongs to the identity of what was evaluated.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from functools import cache
from pydoc_data.topics import topics

_MIN_WORDS = 12
_MAX_WORDS = 24
_SENTENCE_END = re.compile(r"(?<=[a-z)\"][.])\s+(?=[A-Z])")


@cache
def prose_text() -> str:
    """All topics in their own order, separated by an empty line."""
    return "\n\n".join(text.strip() for text in topics.values()) + "\n"


def prose_identity() -> str:
    """SHA-256 (hex) of the whole text."""
    return hashlib.sha256(prose_text().encode()).hexdigest()


def prose_passages(words: int, *, passage_words: int) -> list[str]:
    """The first `words` words of the text as consecutive passages of `passage_words` words (the last may be shorter).

    A word is what stands between white space, as in lm-eval's word perplexity, so the passages are the same for every
    tokenizer. White space inside a passage is kept as it is.
    """
    starts = [match.start() for match in re.finditer(r"\S+", prose_text())]
    starts.append(len(prose_text()))
    cuts = [*range(0, min(words, len(starts) - 1), passage_words), min(words, len(starts) - 1)]
    pieces = itertools.pairwise(dict.fromkeys(cuts))
    return [prose_text()[starts[begin] : starts[end]].rstrip() for begin, end in pieces]


def prose_sentences() -> list[str]:
    """Different sentences of 12 to 24 words from paragraphs of plain prose, in order of the text.

    Indented paragraphs (code and grammar), headings, lists and sentences with markup are left out.
    """
    found: dict[str, None] = {}
    for paragraph in prose_text().split("\n\n"):
        lines = paragraph.split("\n")
        if any(line.startswith((" ", "*", "=", "-", "\t")) for line in lines):
            continue
        for sentence in _SENTENCE_END.split(" ".join(lines)):
            if _is_plain(sentence):
                found[sentence] = None
    return list(found)


def _is_plain(sentence: str) -> bool:
    words = sentence.split()
    return (
        _MIN_WORDS <= len(words) <= _MAX_WORDS
        and sentence[0].isupper()
        and sentence.endswith(".")
        and not re.search(r"[\"*`_=<>\[\]{}()|\\]|::", sentence)
    )
