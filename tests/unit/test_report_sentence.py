"""The sentence at the head of a page, read in full for every case."""

from __future__ import annotations

import pytest

from lora_lab.report.sentence import answer_sentence
from lora_lab.study.answer import answer_of
from lora_lab.study.effects import Effect
from lora_lab.study.interval import t_interval
from lora_lab.study.table import SettingsTable
from tests.unit.study_samples import ACCURACY, LOSS, base_row, row_of, table_of

GOOD, MIDDLE, BAD = [2.00, 2.10, 2.22], [2.50, 2.61, 2.70], [2.02, 2.05, 2.31]


def _effect(differences: list[float], along: tuple[str, ...] = ()) -> Effect:
    interval = t_interval(differences)
    return Effect(
        "target", "qv", "all_linear", LOSS.name, interval.mean, interval, dict(enumerate(differences)), 1, 0, along,
        False, None,
    )  # fmt: skip


CASES: list[tuple[SettingsTable, list[Effect], str]] = [
    (table_of(column=None), [], "No run has ended yet."),
    (table_of(base_row(4.9)), [], "So far only the untouched base has a score: heldout/loss 4.90."),
    (
        table_of(base_row(4.9), row_of("a", [], statuses={"FAILED": 2, "DIVERGED": 1})),
        [],
        "None of 3 runs completed (2 FAILED, 1 DIVERGED); the untouched base has heldout/loss 4.90.",
    ),
    (
        table_of(row_of("a", [], statuses={"FAILED": 2, "RUNNING": 1}), column=None),
        [],
        "No run has completed yet (2 FAILED, 1 RUNNING).",
    ),
    (
        table_of(row_of("a", [], statuses={"FAILED": 1}), column=None),
        [],
        "The only run did not complete (1 FAILED).",
    ),
    (
        table_of(row_of("a", [], statuses={"COMPLETED": 2}), column=None),
        [],
        "No completed run has a score (2 COMPLETED).",
    ),
    (
        table_of(base_row(4.9), row_of("a", [2.0, 2.1]), row_of("b", [2.5])),
        [],
        "a has the lowest heldout/loss so far, 2.05 over 2 seeds (untouched base: 4.90); intervals need three seeds, "
        "so nothing is claimed.",
    ),
    (
        table_of(base_row(4.9), row_of("a", GOOD)),
        [],
        "a has the lowest heldout/loss, 2.1 ± 0.3 over 3 seeds (untouched base: 4.90).",
    ),
    (
        table_of(row_of("a", GOOD, statuses={"COMPLETED": 3, "DIVERGED": 1}), row_of("b", MIDDLE)),
        [_effect([0.1, -0.2, 0.3])],
        "a has the lowest heldout/loss, 2.1 ± 0.3 over 3 seeds (1 run without a score), better than b; no effect of "
        "target is established.",
    ),
    (
        table_of(base_row(4.9), row_of("m", MIDDLE), row_of("g", GOOD), row_of("b", BAD), row_of("late", [1.9])),
        [_effect([-0.40, -0.41, -0.42], ("alpha",))],
        "g has the lowest heldout/loss, 2.1 ± 0.3 over 3 seeds (untouched base: 4.90), but cannot be told apart from 1 "
        "of 2 others; 1 setting has too few seeds; the largest established effect is target qv to all_linear (with "
        "alpha): -0.41 ± 0.02.",
    ),
    (
        table_of(row_of("g", GOOD), row_of("b", BAD), row_of("c", BAD)),
        [],
        "g has the lowest heldout/loss, 2.1 ± 0.3 over 3 seeds, but cannot be told apart from any of 2 others.",
    ),
    (
        table_of(base_row(1.0), row_of("g", GOOD)),
        [],
        "g has the lowest heldout/loss, 2.1 ± 0.3 over 3 seeds (untouched base: 1.00, which is better).",
    ),
    (
        table_of(base_row(2.2), row_of("g", GOOD), row_of("m", MIDDLE)),
        [],
        "g has the lowest heldout/loss, 2.1 ± 0.3 over 3 seeds (untouched base: 2.20, not told apart), better than m.",
    ),
    (
        table_of(*(row_of(name, [0.0] * 3, column=ACCURACY) for name in "abc"), column=ACCURACY),
        [],
        "a and 2 others share the highest skills/acc, 0.000 ± 0 over 3 seeds, but cannot be told apart from any of 2 "
        "others.",
    ),
]


@pytest.mark.parametrize(("table", "effects", "expected"), CASES)
def test_sentence(table: SettingsTable, effects: list[Effect], expected: str) -> None:
    sentence = answer_sentence(answer_of(table, effects))
    assert sentence == expected
    assert len(sentence.split()) <= 45


def test_axes_are_listed_and_many_are_counted() -> None:
    def told(along: tuple[str, ...]) -> str:
        effect = _effect([-0.40, -0.41, -0.42], along)
        return answer_sentence(answer_of(table_of(row_of("g", GOOD)), [effect])).partition("all_linear ")[2]

    assert told(("alpha", "rank")).startswith("(with alpha and rank): ")
    assert told(("a", "b", "c", "d")).startswith("(with 4 keys): ")


def test_names_cannot_write_to_the_terminal_or_break_the_line() -> None:
    sentence = answer_sentence(answer_of(table_of(row_of("a\x1b[31m\nb\u202e", GOOD)), []))
    assert sentence.startswith("a b has the lowest")
