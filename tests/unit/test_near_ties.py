"""Which documents could turn: by hand."""

from __future__ import annotations

from typing import Any

import pytest

from lora_lab.evaluate.near_ties import near_ties


def exact(_score: float, _text: str) -> float:
    return 1e-4


def sample(document: int, scores: list[float], choices: list[str], **measures: float) -> dict[str, Any]:
    return {
        "doc_id": document,
        "filtered_resps": [(score, False) for score in scores],
        "arguments": [("Q:", f" {choice}") for choice in choices],
        **(measures or {"acc": 1.0}),
    }


def results(*samples: dict[str, Any], delimiter: str = " ") -> dict[str, Any]:
    return {"samples": {"task": list(samples)}, "configs": {"task": {"target_delimiter": delimiter}}}


def test_closer_than_the_tolerance_of_both() -> None:
    found = near_ties(
        results(sample(0, [-5.0, -5.00019], ["a", "b"]), sample(1, [-5.0, -5.00021, -9.0], ["a", "b", "c"])),
        exact,
    )
    assert [(tie.document, tie.measure) for tie in found] == [(0, "acc")]
    assert found[0].margin == pytest.approx(1.9e-4) and found[0].allowed == pytest.approx(2e-4)


def test_per_character_without_the_delimiter() -> None:
    """-4 over 2 characters and -6 over 3 are equal; with the space counted they would be -4/3 and -6/4."""
    tie = sample(0, [-4.0, -6.0], ["ab", "abc"], acc=1.0, acc_norm=0.0)
    assert [one.measure for one in near_ties(results(tie), exact)] == ["acc_norm"]
    assert near_ties(results(tie, delimiter=""), exact) == []


def test_wider_in_narrow_numbers() -> None:
    asked = results(sample(0, [-40.0, -40.5], ["a", "b"]))
    assert near_ties(asked, exact) == []
    (tie,) = near_ties(asked, lambda score, text: -score / 100 + (text == "b") * 0.2)
    assert tie.allowed == pytest.approx(0.4 + 0.405 + 0.2)


def test_what_has_no_choices_has_no_ties() -> None:
    rolling = {"doc_id": 0, "filtered_resps": [-100.0], "arguments": [("text",)], "word_perplexity": (1.0, 2)}
    generated = {"doc_id": 0, "filtered_resps": ["12"], "arguments": [("Q", {})], "exact_match": 1.0}
    single = sample(0, [-1.0], ["a"])
    mutual = sample(0, [-1.0, -1.0], ["a", "b"], acc=1.0, acc_mutual_info=0.0)
    for one in (rolling, generated, single, mutual):
        assert near_ties(results(one), lambda _score, _text: 3.0) == []
