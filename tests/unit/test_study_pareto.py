"""The Pareto front against brute force over the definition."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.errors import InputError
from lora_lab.study.pareto import pareto_front
from lora_lab.study.table import MetricColumn
from tests.unit.study_samples import ACCURACY, LOSS, base_row, row_of, table_of

PEAK = "peak_allocated_bytes"
small = st.integers(0, 6)  # a coarse grid, so that ties are common


@given(st.lists(st.tuples(small, small), max_size=14), st.booleans())
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]], higher_is_better: bool) -> None:
    column: MetricColumn = ACCURACY if higher_is_better else LOSS
    rows = [
        row_of(f"row{index}", [float(score)], column=column, cost={PEAK: cost})
        for index, (cost, score) in enumerate(points)
    ]
    sign = 1 if higher_is_better else -1

    def dominates(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] <= b[0] and sign * a[1] >= sign * b[1]

    front = pareto_front(table_of(*rows, column=column), column.name, PEAK)
    expected = {f"row{i}": not any(dominates(other, point) for other in points) for i, point in enumerate(points)}
    assert {point.name: point.on_front for point in front.points} == expected
    assert [point.cost for point in front.points] == sorted(cost for cost, _ in points)


def test_what_lacks_score_or_cost_is_listed_with_the_reason() -> None:
    rows = [
        base_row(5.0),
        row_of("a", [2.0], cost={PEAK: 10}),
        row_of("b", [2.5], missing={PEAK: "no run was executed alone"}),
        row_of("c", [2.5]),
        row_of("d", []),
    ]
    front = pareto_front(table_of(*rows), LOSS.name, PEAK)
    assert [point.name for point in front.points] == ["a"]
    assert [front.missing[row.setting] for row in rows if row.name != "a"] == [
        f"no {PEAK}: nothing is trained",
        f"no {PEAK}: no run was executed alone",
        f"no {PEAK}: not measured",
        f"no {LOSS.name}: no completed run",
    ]
    json.dumps(front.to_json(), allow_nan=False)


def test_the_base_takes_part_where_it_has_both_and_parameters_are_a_cost() -> None:
    rows = [base_row(5.0, trainable_parameters=0), row_of("a", [2.0]), row_of("b", [2.0])]
    front = pareto_front(table_of(*rows), LOSS.name, "trainable_parameters")
    assert [(point.name, point.on_front) for point in front.points] == [("base", True), ("a", True), ("b", True)]
    unknown = pareto_front(table_of(row_of("a", [2.0], trainable_parameters=None)), LOSS.name, "trainable_parameters")
    assert unknown.points == () and list(unknown.missing.values()) == ["no trainable_parameters: not measured"]


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(InputError, match='did you mean "heldout/loss"'):
        pareto_front(table_of(row_of("a", [2.0])), "heldout/lss", PEAK)
