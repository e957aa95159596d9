"""The guard's arithmetic: what is drawn, what is allowed, what is said, and what is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lora_lab.errors import EvaluationError
from lora_lab.evaluate.guard import (
    COUNT,
    Allowance,
    Guarded,
    Verdict,
    check_against_stock,
    draw,
    read_verdict,
    write_verdict,
)
from lora_lab.evaluate.guard_note import guard_note
from tests.conftest import MakeTrial


def requests(values: Sequence[float], *, scored: int = 3, tokens: int = 20) -> list[Guarded]:
    return [
        Guarded(f"task{index % 3}", index, (f"context {index}", " end"), tokens, scored, value)
        for index, value in enumerate(values)
    ]


def stock(values: Sequence[float], *, alone: Sequence[float] | None = None, calls: list[int | None] | None = None):  # type: ignore[no-untyped-def]
    def scores(indices: Sequence[int], batch_size: int | None) -> list[float]:
        if calls is not None:
            calls.append(batch_size)
        return [(alone if batch_size == 1 and alone is not None else values)[index] for index in indices]

    return scores


def still(indices: Sequence[int], _seed: int) -> list[float]:
    return [-float(index + 1) for index in indices]


@pytest.mark.parametrize(
    ("scored", "spread", "rounding", "allowed"),
    [
        (1, 0, 0, 1e-4),
        (100, 0, 0, 1e-4),
        (250, 0, 0, 2.5e-4),
        (1, 0.2, 0.01, 0.6),
        (9, 0.1, 0.01, 1.2),  # twice a hundredth of 20, times 3
        (1, 0.1, 0.01, 0.5),  # a hundredth of the score
    ],
)
def test_tolerance(scored: int, spread: float, rounding: float, allowed: float) -> None:
    assert Allowance(spread, rounding, 20.0).of(-50.0, scored) == pytest.approx(allowed)


def test_sixty_four_from_all_tasks_in_turn() -> None:
    """A task of 5 requests gives all of them; the larger ones share what is left, spread over their length."""
    tasks = ["large"] * 500 + ["small"] * 5 + ["middle"] * 200
    drawn = draw(tasks, [10] * len(tasks))
    assert len(drawn) == len(set(drawn)) == COUNT and drawn == sorted(drawn)
    counts = {name: sum(tasks[index] == name for index in drawn) for name in set(tasks)}
    assert counts == {"small": 5, "large": 30, "middle": 29}
    assert drawn[0] == 0 and max(index for index in drawn if tasks[index] == "large") > 200
    assert draw(["one"] * 3, [10] * 3) == [0, 1, 2]


def test_long_texts_are_drawn_up_to_a_share() -> None:
    assert draw(["book"] * 10, [8192] * 10) == [0, 1]  # 16,384 tokens
    assert len(draw(["book"] * 100, [8192] * 100)) == 10  # a tenth of all
    assert draw(["book"], [10**6]) == [0]


def test_within_the_tolerance() -> None:
    calls: list[int | None] = []
    values = [-1.0, -2.0, -3.0]
    verdict = check_against_stock(
        requests([-1.00005, -2.0, -3.0]), stock(values, calls=calls), still, rounding=None, largest_logit=1.0
    )
    assert verdict == Verdict(3, pytest.approx(5e-5), pytest.approx(0.5), Allowance(0.0, 0.0, 1.0))
    assert calls == [None]


def test_narrow_numbers_are_measured_by_lm_evals_own_spread() -> None:
    calls: list[int | None] = []
    theirs, alone = [-1.0, -2.0, -3.0], [-1.0, -2.1, -3.0]
    verdict = check_against_stock(
        requests([-1.25, -2.0, -3.0]), stock(theirs, alone=alone, calls=calls), still, rounding=0.001, largest_logit=1.0
    )
    assert calls == [1, 8]
    assert verdict.allowance.spread == pytest.approx(0.1) and verdict.largest_share == pytest.approx(0.25 / 0.3)
    with pytest.raises(EvaluationError, match=r"allowed is 0\.3"):
        check_against_stock(
            requests([-1.35, -2.0, -3.0]), stock(theirs, alone=alone), still, rounding=0.001, largest_logit=1.0
        )


def test_one_rounding_is_no_fault() -> None:
    """-44.75 and -44.5 are neighbours in bf16, and lm-eval's own scores may not move at all on a small model."""
    check_against_stock(requests([-44.75], scored=4), stock([-44.5]), still, rounding=2**-7, largest_logit=1.0)
    with pytest.raises(EvaluationError):
        check_against_stock(requests([-44.75], scored=4), stock([-44.5]), still, rounding=2**-8, largest_logit=1.0)


@pytest.mark.parametrize("value", [-2.0003, float("nan"), float("inf")])
def test_beyond_it_the_request_is_shown(value: float) -> None:
    with pytest.raises(EvaluationError) as caught:
        check_against_stock(
            requests([-1.0, value, -3.0]), stock([-1.0, -2.0, -3.0]), still, rounding=None, largest_logit=1.0
        )
    (problem,) = caught.value.problems
    assert problem.where == "task task1, document 1"
    for part in ("'context 1' -> ' end'", "-2.000000", f"{value:.6f}", "evaluation.engine=stock"):
        assert part in problem.message


def test_the_worst_request_is_shown() -> None:
    with pytest.raises(EvaluationError, match="document 2"):
        check_against_stock(
            requests([-1.5, -2.0, -4.0]), stock([-1.0, -2.0, -3.0]), still, rounding=None, largest_logit=1.0
        )


def test_kept_verdicts(tmp_path: Path) -> None:
    path = tmp_path / "guards" / "one.json"
    assert read_verdict(path) is None
    write_verdict(path, Verdict(64, 3e-5, 0.3, Allowance(0.1, 0.01, 30.0)), {"base": "x"})
    assert read_verdict(path) == Verdict(64, 3e-5, 0.3, Allowance(0.1, 0.01, 30.0))
    path.write_text("{broken")
    assert read_verdict(path) is None


def test_a_note_is_about_base_and_kind_of_adapter(make_trial: MakeTrial, tmp_path: Path) -> None:
    """Another rank, seed or rate is the same note; another base, precision, method or evaluation is not."""

    def path(*overrides: str, device: str = "cpu") -> Path:
        return guard_note(make_trial("method=lora", *overrides), device=device, cache=tmp_path).path("loglikelihood")

    same = [path(), path("rank=2"), path("seed=3"), path("learning_rate=0.1"), path("target=mlp")]
    others = [
        path("model=smollm2_135m"),
        path("model.seed=5"),
        path("training.precision=bf16"),
        path("quantization=nf4"),
        path("method=ia3"),
        path("evaluation.batch_size=3"),
        path("evaluation.tasks=[skills_unseen]"),
        path("evaluation.chunk_tokens=77"),
        path(device="cuda"),
    ]
    assert len(set(same)) == 1 and len({*same, *others}) == 1 + len(others)


def test_a_badly_conditioned_request_is_no_fault() -> None:
    """One rounding of its embeddings moves it by 2e-4, at most, so 6e-4 are allowed; only what is beyond is asked."""
    calls: list[tuple[list[int], int]] = []

    def nudged(indices: Sequence[int], seed: int) -> list[float]:
        calls.append((list(indices), seed))
        return [-2.0 + 1e-4 * (seed - 1)]

    ours = requests([-1.0, -2.0005, -3.0])
    theirs = stock([-1.0, -2.0, -3.0])
    verdict = check_against_stock(ours, theirs, nudged, rounding=None, largest_logit=1.0)
    assert verdict.largest_share == pytest.approx(5 / 6, rel=1e-3)
    assert calls == [([1], seed) for seed in range(4)]
    with pytest.raises(EvaluationError, match=r"allowed is 0\.0006"):
        check_against_stock(requests([-1.0, -2.001, -3.0]), theirs, nudged, rounding=None, largest_logit=1.0)
