"""The bookkeeping of `make bench-train`: counts worked by hand, turns on a clock of the test's own, its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_lab.adapters.attach import count_parameters
from lora_lab.data.encode import Encoded
from lora_lab.models.load import model_folder
from lora_lab.models.random import random_network
from tests.benchmarks.train_compile import bill, compile_regions
from tests.benchmarks.train_memory import memory, same_length
from tests.benchmarks.train_parts import with_limits
from tests.benchmarks.train_plot import write_plot
from tests.benchmarks.train_rows import (
    LAYERS_COMPILED,
    PARTS_COMPILED,
    Case,
    chosen_cases,
    members_of,
    rows_of,
    tokenizer_of,
)
from tests.benchmarks.train_sides import lab_side, run_rival
from tests.benchmarks.train_speed import PARTS, measure
from tests.benchmarks.train_table import cases_text, tail_text
from tests.benchmarks.train_trainer import NO_LOSS, examples_of, plain_model
from tests.benchmarks.train_turns import Gone, Turn, steps_of_a_turn, summary, take_turns
from tests.benchmarks.train_work import large_product_limit, operations, own_shapes_limit, products
from tests.evaluation_samples import TINY_SHAPE

pytestmark = pytest.mark.usefixtures("one_core")
CASE = Case("tiny_random", "qv", micro_batch=2, batch=4)


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> Any:
    return tokenizer_of(CASE, shared)


@pytest.fixture(scope="module")
def rows(tokenizer: Any, shared: Path) -> list[Encoded]:
    return rows_of(CASE, tokenizer, shared)


class Ticking:
    """A clock that a side moves on by what its step takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeSide:
    """Takes `seconds` per step, tokens as given, and is gone after `steps`."""

    def __init__(self, name: str, clock: Ticking, order: list[str], *, seconds: float, steps: int = 99) -> None:
        self.name, self.clock, self.order, self.seconds, self.left = name, clock, order, seconds, steps

    def step(self) -> int:
        if self.left == 0:
            raise Gone("no more")
        self.left -= 1
        self.order.append(self.name)
        self.clock.now += self.seconds
        return 10


def test_operations_of_the_tiny_shape() -> None:
    """Of a layer q and o have 16 x 16 weights, k and v 16 x 8, the MLP three times 16 x 16; the head 260 x 16. The
    first layer's q, k and v need no gradient of their input."""
    found = products(random_network(TINY_SHAPE, seed=0))
    reading, others = 16 * 16 + 2 * 16 * 8, 16 * 16 + 3 * 16 * 16
    layers = TINY_SHAPE.num_layers
    forward = layers * (reading + others)
    backward = forward - reading
    expected = 2 * (forward + backward) * 7 + 4 * 260 * 16 * 3
    assert operations(found, tokens=7, loss_tokens=3) == expected
    limit = large_product_limit(found, tokens=7, loss_tokens=3, gflops=2.0)
    assert limit == pytest.approx(7 * 2e9 / expected)


def test_the_limit_of_own_shapes_is_the_best_pass() -> None:
    times = iter([0.0, 1.5, 10.0, 10.25, 20.0, 20.5])
    found = products(random_network(TINY_SHAPE, seed=0))
    shapes = own_shapes_limit(found, rows=6, loss_rows=2, clock=lambda: next(times))
    assert shapes.tokens_per_second == pytest.approx(6 / 0.25), "of three passes the second was the best"
    assert shapes.gflops == pytest.approx(operations(found, tokens=6, loss_tokens=2) / 0.25 / 1e9)


def test_cases_are_named_and_checked() -> None:
    assert [case.name for case in chosen_cases(["tiny_random"], ["qv"], [1, 8])] == [
        "tiny_random qv 1",
        "tiny_random qv 8",
    ]
    with pytest.raises(ValueError, match=r"gpt9.*heads.*3 \(divides 8\)"):
        chosen_cases(["gpt9"], ["heads"], [3])
    assert [members_of(side) for side in ("trainer", "solo", "cohort_8", "cohort_8" + PARTS_COMPILED)] == [1, 1, 8, 8]
    assert [steps_of_a_turn(side) for side in ("solo", "cohort_2", "cohort_16")] == [2, 1, 1]


def test_turns_rotate_and_leave_the_first_step_out() -> None:
    clock, order = Ticking(), list[str]()
    sides = {name: FakeSide(name, clock, order, seconds=seconds) for name, seconds in (("a", 1.0), ("b", 2.0))}
    found, gone = take_turns(sides, turns=2, steps={"a": 2, "b": 1}, clock=clock)
    assert order == [*"ba", *"aab", *"baa"]
    assert found == {"a": [Turn(20, 2.0)] * 2, "b": [Turn(10, 2.0)] * 2}
    assert gone == {}


def test_a_side_that_is_gone_leaves_the_others() -> None:
    clock, order = Ticking(), list[str]()
    sides = {name: FakeSide(name, clock, order, seconds=1.0, steps=steps) for name, steps in (("a", 9), ("b", 2))}
    found, gone = take_turns(sides, turns=3, steps={"a": 1, "b": 1}, clock=clock)
    assert (len(found["a"]), list(found), gone) == (3, ["a"], {"b": "no more"})


def test_ratios_are_of_the_same_round() -> None:
    """The machine is twice as slow in the second round: speeds spread, the ratio does not."""
    turns = {"trainer": [Turn(10, 1.0), Turn(10, 2.0)], "solo": [Turn(30, 1.0), Turn(30, 2.0)]}
    found = summary(turns, "trainer")
    assert found["solo"]["ratio"] == {"median": 3.0, "least": 3.0, "most": 3.0}
    assert found["solo"]["tokens_per_second"] == {"median": 22.5, "least": 15.0, "most": 30.0}
    assert summary({"solo": turns["solo"]}, "trainer")["solo"]["ratio"] is None


def test_compiling_is_paid_back_by_the_gain() -> None:
    """12 tokens a turn: eager 2 s, compiled 1 s after a first turn of 31 s. 30 s of compiling at 1 s a turn."""
    found = bill([Turn(12, 31.0), *[Turn(12, 1.0)] * 5], [Turn(12, 2.0)] * 6)
    assert found["compile_seconds"] == pytest.approx(30.0)
    assert found["steps_until_it_pays"] == pytest.approx(30.0)
    assert bill([Turn(12, 9.0), *[Turn(12, 2.0)] * 5], [Turn(12, 2.0)] * 6)["steps_until_it_pays"] is None


@pytest.mark.parametrize(("target", "parts"), [("qv", 3), ("all_linear", 2)])
def test_parts_with_an_adapter_are_not_compiled(target: str, parts: int, rows: list[Encoded], shared: Path) -> None:
    """Of a layer two norms, and the MLP where nothing in it is adapted."""
    case = Case("tiny_random", target, micro_batch=2, batch=4)
    layers = case.trials(1)[0].model.shape.num_layers
    network = lab_side(case.trials(2), rows, shared).network
    assert compile_regions(network, PARTS_COMPILED) == parts * layers
    assert compile_regions(network, LAYERS_COMPILED) == layers


def test_all_sides_train_the_same_parameters_on_the_same_tokens(
    rows: list[Encoded], tokenizer: Any, shared: Path
) -> None:
    """A whole epoch of each: every row once, without padding; and labels where the lab has loss."""
    case = Case("tiny_random", "all_linear", micro_batch=2, batch=4)
    some = rows[:8]
    tokens = sum(len(row.input_ids) for row in some)
    (trial,) = case.trials(1)
    alone, cohort = lab_side([trial], some, shared), lab_side(case.trials(3), some, shared)
    assert [alone.step() + alone.step(), cohort.step() + cohort.step()] == [tokens, 3 * tokens]
    told: list[int] = []

    def hold(real: int) -> bool:
        told.append(real)
        return len(told) < 2

    run_rival("trainer", trial, some, tokenizer, shared, hold=hold)
    assert (len(told), sum(told)) == (2, tokens)
    theirs = plain_model(model_folder(trial.model, shared), "all_linear", rank=trial.rank, alpha=trial.alpha, seed=0)
    ours = sum(one.numel() for one in alone.tensors() if one.requires_grad)
    assert count_parameters(theirs).trainable == ours > 0
    one = examples_of(some)[0]
    assert [label != NO_LOSS for label in one["labels"]] == list(some[0].loss_mask)


def test_trl_trains_on_the_same_tokens(rows: list[Encoded], tokenizer: Any, shared: Path) -> None:
    pytest.importorskip("trl")
    (trial,) = CASE.trials(1)
    told: list[int] = []

    def hold(real: int) -> bool:
        told.append(real)
        return len(told) < 2

    run_rival("trl_kept", trial, rows[:8], tokenizer, shared, hold=hold)
    assert sum(told) == sum(len(row.input_ids) for row in rows[:8])


def test_memory_of_cohorts_of_one_pass(rows: list[Encoded], shared: Path) -> None:
    """Of a member lives on what it trains and Adam's two moments and step of each tensor, all in float32."""
    found = memory("tiny_random", "qv", rows, shared, members=(1, 4))
    (trial,) = CASE.trials(1)
    trained = [one for one in lab_side([trial], rows, shared).tensors() if one.requires_grad]
    own = sum(3 * one.nbytes + 4 for one in trained)
    assert found["further_member_persistent_bytes"] == own
    assert found["further_member_bytes"] >= own
    assert found["ratio"]["1"] == 1.0 < found["ratio"]["4"]
    assert len({len(row.input_ids) for row in same_length(rows)}) == 1 < len(same_length(rows))


@pytest.fixture
def options(shared: Path, tmp_path: Path) -> Iterator[Any]:
    threads = torch.get_num_threads()
    yield SimpleNamespace(
        models=["tiny_random"],
        targets=["qv"],
        micro_batches=[2],
        sides=["solo", "cohort_2"],
        parts=["cases"],
        turns=1,
        compile_turns=2,
        threads=1,
        quick=True,
        cache=shared,
        output=tmp_path / "train.json",
    )
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_second_call_measures_only_what_is_missing(options: Any, tmp_path: Path) -> None:
    kept: list[dict[str, Any]] = []
    measure(options, {}, lambda result: kept.append(json.loads(json.dumps(result, allow_nan=False))))
    first = kept[-1]
    case = first["cases"]["tiny_random qv 2"]
    assert (sorted(case["sides"]), case["missing"]) == (["cohort_2", "solo"], {})
    side = case["sides"]["cohort_2"]
    speed = side["turns"][0]["tokens"] / side["turns"][0]["seconds"]
    assert side["tokens_per_second"]["median"] == pytest.approx(speed)
    limit = case["matrix_product_gflops"] * 1e9 / case["operations_per_token"]
    assert side["share_of_limit"] == pytest.approx(speed / limit)
    assert set(PARTS) <= set(first)
    measure(options, first, lambda result: kept.append(json.loads(json.dumps(result, allow_nan=False))))
    assert kept[-1]["cases"] == first["cases"]
    write_plot(first, tmp_path / "plot.html")
    assert "<script" in (tmp_path / "plot.html").read_text()
    assert "cohort of 2" in cases_text(first["cases"].values()) + tail_text(first)


def test_limits_are_of_the_fastest_product(options: Any) -> None:
    line = {
        "operations_per_token": 100.0,
        "own_shapes": {"8": {"tokens_per_second": 5e6}},
        "sides": {"cohort_8": {"tokens_per_second": {"median": 1e6}}},
    }
    found = with_limits(line, gflops=0.2)
    assert found["limit_tokens_per_second"] == pytest.approx(2e6)
    assert found["sides"]["cohort_8"]["share_of_limit"] == pytest.approx(0.5)
    assert found["sides"]["cohort_8"]["share_of_own_shapes"] == pytest.approx(0.2)
