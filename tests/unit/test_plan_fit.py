"""What fits, by a prediction of closed form: weights, what the adapter takes, and so much per row of a micro-batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_lab.plan.devices import DeviceMemory
from lora_lab.plan.fit import NF4, Suggestion, closest_that_fit, fit_of, needed_bytes
from lora_lab.plan.prediction import LongestRows, Prediction
from lora_lab.schema.combinations import combination_problems
from lora_lab.schema.trial import Trial
from tests.unit.test_plan_trials import trial_of

WEIGHTS, ADAPTER, PER_ROW, CONTEXT, UNUSED = 1000, 10, 40, 7, 3
CHECKPOINT = "training.gradient_checkpointing=every_layer"
NF4_BASE = "quantization=nf4"


def micro(size: int) -> str:
    return f"training.micro_batch_size={size}"


def device(total: int) -> DeviceMemory:
    return DeviceMemory("a100", total, CONTEXT, "made up")  # a card whose workspaces are those of a prediction


def rows(count: int = 8) -> LongestRows:
    return LongestRows((16,) * count, (4,) * count, "made up")


def trial(micro_batch_size: int = 8, batch_size: int = 8, checkpointing: str | int = "off", **changes: Any) -> Trial:
    training = {
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "gradient_checkpointing": checkpointing,
        **changes.pop("training", {}),
    }
    return trial_of(training=training, **changes)


class Predicted:
    """1000 of weights, or 250 in 4 bits; 40 per row, or 10 checkpointed. gradients: kept between micro-batches."""

    def __init__(self, *, kind: str = "cuda", gradients: int = 0) -> None:
        self.asked: list[tuple[int, object, str]] = []
        self._kind, self._gradients = kind, gradients

    def __call__(self, asked: Trial, longest: LongestRows) -> Prediction:
        training = asked.training
        assert not combination_problems(asked)
        assert training.batch_size % training.micro_batch_size == 0
        self.asked.append((training.micro_batch_size, training.gradient_checkpointing, asked.quantization.kind))
        together = min(training.micro_batch_size, len(longest.lengths))
        base = WEIGHTS if asked.quantization.kind == "none" else WEIGHTS // 4
        activations = together * (PER_ROW if training.gradient_checkpointing == "off" else PER_ROW // 4)
        kept = self._gradients if together < min(training.batch_size, len(longest.lengths)) else 0
        peak = base + ADAPTER + activations + kept
        return Prediction(
            device_kind="cuda" if self._kind == "cuda" else "cpu",
            style="own",
            trainable_parameters=1,
            total_parameters=2,
            peak_allocated_bytes=peak,
            peak_reserved_bytes=peak + UNUSED if self._kind == "cuda" else None,
            parts={},
            place="backward, layer 0",
            paged_bytes=0,
            base_bytes=base,
            micro_batch_size=training.micro_batch_size,
            longest_row=max(longest.lengths),
            rows=longest.source,
            how="closed form",
            notes=(),
        )


def need(micro_batch_size: int) -> int:
    return WEIGHTS + ADAPTER + micro_batch_size * PER_ROW + UNUSED + CONTEXT


def test_what_is_needed_is_what_is_reserved_and_the_context() -> None:
    predicted = Predicted()
    prediction = predicted(trial(), rows())
    fit = fit_of(trial(), rows(), prediction, device(1500), predicted)
    assert fit.needed_bytes == 1000 + 10 + 8 * 40 + 3 + 7
    assert (fit.fits, fit.headroom_bytes) == (True, 1500 - fit.needed_bytes)
    assert fit.device == device(1500)


def test_without_an_allocator_what_is_alive_counts() -> None:
    predicted = Predicted(kind="cpu")
    fit = fit_of(trial(), rows(), predicted(trial(), rows()), device(1500), predicted)
    assert fit.needed_bytes == 1000 + 10 + 8 * 40 + 7


def test_it_fits_to_the_last_byte_and_not_beyond() -> None:
    predicted = Predicted()
    prediction = predicted(trial(), rows())
    exact = fit_of(trial(), rows(), prediction, device(need(8)), predicted)
    assert (exact.fits, exact.headroom_bytes, exact.side_by_side) == (True, 0, 1)
    short = fit_of(trial(), rows(), prediction, device(need(8) - 1), predicted)
    assert (short.fits, short.headroom_bytes, short.side_by_side) == (False, -1, 0)


@pytest.mark.parametrize("current", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("largest", [None, 1, 2, 3, 4, 6, 8, 12, 24])
def test_largest_micro_batch_of_every_divisor(current: int, largest: int | None) -> None:
    predicted = Predicted()
    asked = trial(current, 24)
    prediction = predicted(asked, rows(24))
    predicted.asked.clear()
    total = need(1) - 1 if largest is None else need(largest)
    fit = fit_of(asked, rows(24), prediction, device(total), predicted)
    assert fit.largest_micro_batch == largest
    # Eight divisors: the whole batch, and a bisection of the seven others; never what is known, and nothing twice.
    assert len(predicted.asked) <= 4
    assert current not in [size for size, _, _ in predicted.asked]
    assert len(set(predicted.asked)) == len(predicted.asked)


def test_a_batch_that_fits_is_one_question() -> None:
    predicted = Predicted()
    prediction = predicted(trial(1), rows())
    assert fit_of(trial(1), rows(), prediction, device(10_000), predicted).largest_micro_batch == 8
    assert len(predicted.asked) == 2
    prediction = predicted(trial(8), rows())
    assert fit_of(trial(8), rows(), prediction, device(10_000), predicted).largest_micro_batch == 8
    assert len(predicted.asked) == 3


def test_a_micro_batch_cannot_outgrow_the_rows() -> None:
    predicted = Predicted()
    # Three rows: 4 and 8 hold all of them and need the same.
    prediction = predicted(trial(4), rows(3))
    predicted.asked.clear()
    assert fit_of(trial(4), rows(3), prediction, device(need(3)), predicted).largest_micro_batch == 8
    assert predicted.asked == []
    assert fit_of(trial(4), rows(3), prediction, device(need(3) - 1), predicted).largest_micro_batch == 2


def test_one_micro_batch_may_need_less_than_two() -> None:
    """Gradients of the first of two are alive while the second goes forward: the batch as a whole keeps none."""
    predicted = Predicted(gradients=300)
    prediction = predicted(trial(4), rows())
    assert fit_of(trial(4), rows(), prediction, device(need(8)), predicted).largest_micro_batch == 8
    assert fit_of(trial(4), rows(), prediction, device(need(8) - 1), predicted).largest_micro_batch is None


@pytest.mark.parametrize(("own_runs", "beside"), [(1, 1), (2, 2), (2.99, 2), (7, 7), (0.99, 0)])
def test_side_by_side_shares_base_and_context(own_runs: float, beside: int) -> None:
    predicted = Predicted()
    prediction = predicted(trial(), rows())
    own = ADAPTER + 8 * PER_ROW + UNUSED
    total = WEIGHTS + CONTEXT + int(own_runs * own)
    assert fit_of(trial(), rows(), prediction, device(total), predicted).side_by_side == beside


def test_less_than_a_base_holds_no_runs() -> None:
    predicted = Predicted()
    fit = fit_of(trial(), rows(), predicted(trial(), rows()), device(100), predicted)
    assert (fit.side_by_side, fit.largest_micro_batch) == (0, None)


@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "base"}])
def test_what_shares_no_base_stands_alone(method: dict[str, Any]) -> None:
    predicted = Predicted()
    asked = trial(method=method)
    prediction = predicted(asked, rows())
    assert fit_of(asked, rows(), prediction, device(10**6), predicted).side_by_side == 1
    assert fit_of(asked, rows(), prediction, device(need(8) - 1), predicted).side_by_side == 0


def closest(asked: Trial, total: int, *, count: int = 8, predicted: Predicted | None = None) -> list[Suggestion]:
    return closest_that_fit(asked, rows(count), device(total), predicted or Predicted())


def test_each_change_by_itself_comes_first() -> None:
    assert closest(trial(), need(8) - 1) == [
        Suggestion((micro(4),), need(4)),
        Suggestion((CHECKPOINT,), need(2)),
        Suggestion((NF4_BASE,), need(8) - 750),
    ]


def test_the_largest_micro_batch_that_fits_is_suggested() -> None:
    found = closest(trial(24, 24), need(12) - 1, count=24)
    assert found[0] == Suggestion((micro(8),), need(8))


def test_pairs_where_nothing_is_enough_by_itself() -> None:
    # Checkpointed, one row needs 10; without nf4 nothing fits below 1030.
    assert closest(trial(), need(1) - 1) == [
        Suggestion((NF4_BASE,), need(8) - 750),
        Suggestion((micro(1), CHECKPOINT), 1000 + 10 + 10 + 10),
    ]
    # 4-bit weights, and 8 rows at 40 are too many.
    assert closest(trial(), 400) == [
        Suggestion((micro(1), NF4_BASE), 250 + 10 + 40 + 10),
        Suggestion((CHECKPOINT, NF4_BASE), 250 + 10 + 80 + 10),
    ]


def test_all_three() -> None:
    assert closest(trial(), 250 + 10 + 10 + 10) == [Suggestion((micro(1), CHECKPOINT, NF4_BASE), 280)]


def test_nothing_fits() -> None:
    predicted = Predicted()
    assert closest(trial(), 279, predicted=predicted) == []
    # Three divisors below 8 by bisection, two changes, three pairs, all three.
    assert len(predicted.asked) <= 2 + 2 + 3 + 1


def test_what_is_so_already_is_not_suggested() -> None:
    predicted = Predicted()
    nf4 = {"kind": "nf4", "double_quantization": True}
    assert closest(trial(1, checkpointing="every_layer", quantization=nf4), 10, predicted=predicted) == []
    assert predicted.asked == []
    for checkpointing in ("sqrt", 2):
        found = closest(trial(1, checkpointing=checkpointing), 900)
        assert [one.overrides for one in found] == [(NF4_BASE,)]


def test_rows_that_all_fit_into_half_a_micro_batch_are_no_smaller_in_it() -> None:
    predicted = Predicted()
    found = closest(trial(8), need(3) - 1, count=3, predicted=predicted)
    assert found[0] == Suggestion((micro(2),), need(2))
    assert max(size for size, *others in predicted.asked if others == ["off", "none"]) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"kind": "full"}},
        {"method": {"kind": "base"}},
        {"method": {"kind": "pissa", "rank_factors": []}},
        {"training": {"precision": "fp64"}},
    ],
)
def test_rules_of_the_schema_are_kept(changes: dict[str, Any]) -> None:
    """`Predicted` asserts that it is asked of no trial that breaks a rule."""
    found = closest(trial(1, **changes), 1000 + 10 + 10 + 10)
    assert [one.overrides for one in found] == [(CHECKPOINT,)]
    assert closest(trial(1, **changes), 600) == []


def test_every_suggestion_is_what_its_overrides_make_of_the_trial() -> None:
    asked = trial()
    for total in range(270, need(8), 10):
        for one in closest(asked, total):
            changed = trial(
                1 if micro(1) in one.overrides else next((size for size in (2, 4) if micro(size) in one.overrides), 8),
                checkpointing="every_layer" if CHECKPOINT in one.overrides else "off",
                **({"quantization": NF4.model_dump()} if NF4_BASE in one.overrides else {}),
            )
            needed = Predicted()(changed, rows()).peak_reserved_bytes
            assert needed is not None
            assert one.peak_bytes == needed + CONTEXT <= total


def test_nf4_is_what_the_configuration_calls_so() -> None:
    leaf = Path(__file__).resolve().parents[2] / "conf" / "quantization" / "nf4.yaml"
    assert yaml.safe_load(leaf.read_text()) == NF4.model_dump()


def test_a_fit_is_plain_values() -> None:
    predicted = Predicted()
    fit = fit_of(trial(), rows(), predicted(trial(), rows()), device(5000), predicted)
    assert dataclasses.asdict(fit)["device"] == {
        "name": "a100", "total_bytes": 5000, "context_bytes": 7, "source": "made up",
    }  # fmt: skip


def test_cards_with_larger_workspaces_need_more() -> None:
    predicted = Predicted()(trial(), rows())
    usual, larger = device(0), dataclasses.replace(device(0), name="h100")
    assert needed_bytes(predicted, larger) - needed_bytes(predicted, usual) == 2 * (32 * 2**20 - 8_519_680)
    on_cpu = Predicted(kind="cpu")(trial(), rows())
    assert needed_bytes(on_cpu, larger) == needed_bytes(on_cpu, usual)
