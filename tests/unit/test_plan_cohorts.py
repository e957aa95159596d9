"""Which jobs train together, in which order, and that an order of seats leaves nobody to go on alone for long."""

from __future__ import annotations

import heapq
import itertools
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest

from lora_lab.plan.cohorts import PlannedCohort, cohort_key, plan_cohorts, why_not_fused
from lora_lab.plan.job import Job, job_of
from lora_lab.plan.steps import steps_of
from lora_lab.record.parents import WEIGHTS
from lora_lab.schema.method import FUSED_KINDS, METHODS
from tests.unit.test_plan_trials import NF4, SHAPE, TRIAL, trial_of

LORA_PLUS = {"kind": "lora_plus", "ratio": 16.0, "rank_factors": [1.0, 2.0]}
SGD = {"kind": "sgd", "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
SOPHIA = {"kind": "sophia", "weight_decay": 0.0, "betas": [0.9, 0.9], "rho": 1.0, "estimate_interval": 10}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora_plus": {"ratio": 16.0, "rank_factors": []},
    "adalora": {
        "initial_rank": None, "initial_factor": 1.5, "initial_share": 0.1, "final_share": 0.3, "interval": 1,
        "importance_betas": [0.85, 0.85], "orthogonality_weight": 0.5,
    },
    "prompt_tuning": {"virtual_tokens": 4, "init": "random", "init_text": None},
    "p_tuning": {"virtual_tokens": 4, "encoder": "mlp", "encoder_hidden_size": 8, "encoder_layers": 1},
    "prefix_tuning": {"virtual_tokens": 4, "projection": False, "encoder_hidden_size": 8},
    "bottleneck": {"style": "houlsby", "reduction_factor": 2, "activation": "gelu", "scaling": 1.0},
    "mov": {"experts": 2, "router_input": "site_input"},
    "molora": {"experts": 2},
    "loramoe": {
        "experts": 2, "groups": ["a", "b"], "delta": 0.1, "beta": 0.0, "balance": "variance_over_mean",
    },
    "mola": {"experts": [2], "top_k": 1, "balance_weight": 0.0},
    "freeze": {"last_layers": 1, "modules": []},
    "lisa": {"layers": 1, "interval": 2, "probabilities": "uniform", "weights": [], "norm_log": []},
    "galore": {"update_gap": 2, "scale": 0.25, "side": "std"},
    **{kind: {} for kind in ("base", "full", "ia3")},
}  # fmt: skip


def method_of(kind: str) -> dict[str, Any]:
    return {"kind": kind, **SETTINGS.get(kind, {"rank_factors": []})}


def job(
    *, repeat: int = 0, train_rows: int | None = 100, identities: dict[str, str] | None = None, **changes: Any
) -> Job:
    known = {"base": "random", "data": "skills", **(identities or {})}
    return job_of(trial_of(**changes), known, train_rows=train_rows, repeat=repeat, tag=None, overrides=())


def kind_job(kind: str, **changes: Any) -> Job:
    parts = {"ia3": ("key", "value", "mlp"), "mov": ("key", "value", "mlp"), "loramoe": ("mlp",)}
    return job(method=method_of(kind), parts=parts.get(kind, ("query", "value")), **changes)


def members(cohorts: Sequence[PlannedCohort]) -> list[list[int]]:
    """The seeds of each cohort's jobs."""
    return [[one.trial.seed for one in cohort.jobs] for cohort in cohorts]


def test_whatever_belongs_to_a_member_alone_may_differ() -> None:
    jobs = [
        job(),
        job(rank=64, alpha=1.0, dropout=0.1, learning_rate=1e-4, seed=1),
        job(optimizer=SGD, scheduler={"kind": "constant", "warmup_steps": 3, "warmup_ratio": None}, seed=2),
        job(target={"modules": ["k_proj"]}, parts=("mlp",), method=LORA_PLUS, seed=3),
        job(training={"epochs": None, "max_steps": 7, "batch_size": 2, "micro_batch_size": 1}, seed=4),
        job(training={"max_gradient_norm": None, "bucket_batches": 1, "layer_rates": [1.0, 0.5]}, seed=5),
        job(data={"train_size": 3, "max_length": 64, "mixture": {"gcd": 1.0}}, train_rows=3, seed=6),
        job(evaluation={"limit": 5}, seed=7),
        job(identities={"init_from": "a" * 64}, init_from="other", seed=8),
        job(repeat=2, seed=9),
        *(kind_job(kind, seed=10 + number) for number, kind in enumerate(FUSED_KINDS)),
    ]
    (cohort,) = plan_cohorts(jobs, cohort="auto")
    assert sorted(one.trial.seed for one in cohort.jobs) == list(range(10 + len(FUSED_KINDS)))
    assert (cohort.seats, cohort.why_alone) == (None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"identities": {"base": "sha256:1"}},
        {"identities": {WEIGHTS: "b" * 64}},
        {"quantization": NF4},
        {"training": {"precision": "bf16"}},
        {"training": {"gradient_checkpointing": "sqrt"}},
        {"model": {**TRIAL["model"], "seed": 1}},
        {"model": {**TRIAL["model"], "shape": {**SHAPE, "num_layers": 3}}},
        {"model": {**TRIAL["model"], "tie_embeddings": False}},
    ],
    ids=str,
)
def test_what_the_members_share_must_agree(changes: dict[str, Any]) -> None:
    """Every other job has the change: two cohorts, not one, and not four."""
    jobs = [job(seed=seed, **(changes if seed % 2 else {})) for seed in range(4)]
    cohorts = plan_cohorts(jobs, cohort="auto")
    assert members(cohorts) == [[0, 2], [1, 3]]
    assert cohorts[0].key != cohorts[1].key == cohort_key(jobs[3])


def test_only_checkpointing_keeps_the_base() -> None:
    plain, sqrt = (cohort_key(job(training={"gradient_checkpointing": mode})) for mode in ("off", "sqrt"))
    assert plain != sqrt and plain.base == sqrt.base
    assert cohort_key(job(quantization=NF4)).base != plain.base


@pytest.mark.parametrize("kind", list(METHODS))
def test_every_method_is_fused_or_says_why_not(kind: str) -> None:
    jobs = [kind_job(kind, seed=seed) for seed in range(2)]
    cohorts = plan_cohorts(jobs, cohort="auto")
    if kind in FUSED_KINDS:
        assert members(cohorts) == [[0, 1]] and why_not_fused(jobs[0].trial) is None
    else:
        # Of method=base the seed is no part, so the two are one run.
        assert members(cohorts) == ([[0]] if kind == "base" else [[0], [1]])
        assert all(str(one.why_alone).startswith(f"method={kind} ") and one.seats == 1 for one in cohorts)


def test_int8_and_sophia_stay_alone() -> None:
    int8 = [job(quantization={"kind": "int8", "double_quantization": False}, seed=seed) for seed in range(2)]
    sophia = [job(optimizer=SOPHIA, seed=seed) for seed in range(2)]
    for jobs, why in ((int8, "an int8 base rounds"), (sophia, "sophia estimates curvature in passes of its own")):
        cohorts = plan_cohorts([*jobs, job(seed=2), job(seed=3)], cohort="auto")
        assert sorted(members(cohorts)) == [[0], [1], [2, 3]]
        assert [str(one.why_alone).startswith(why) for one in cohorts if len(one.jobs) == 1] == [True, True]


def test_off_a_number_and_the_only_one() -> None:
    jobs = [job(seed=seed) for seed in range(5)]
    off = plan_cohorts([*jobs, kind_job("full")], cohort="off")
    assert members(off) == [[0], [1], [2], [3], [4], [0]]
    assert [one.why_alone for one in off[:5]] == ["launch.cohort=off"] * 5
    assert str(off[5].why_alone).startswith("method=full"), "off would not change that"
    for seats, expected in ((1, 1), (3, 3), (5, 5), (16, 5)):
        (cohort,) = plan_cohorts(jobs, cohort=seats)
        assert (len(cohort.jobs), cohort.seats, cohort.why_alone) == (5, expected, None)
    (alone,) = plan_cohorts(jobs[:1], cohort="auto")
    assert alone.seats == 1 and str(alone.why_alone).startswith("no other new run shares its model")


def test_what_is_done_or_asked_for_twice_is_left_out() -> None:
    jobs = [job(seed=0), job(seed=1), job(seed=0), job(seed=2), job(seed=0, repeat=1)]
    (cohort,) = plan_cohorts(jobs, cohort="auto", done={(jobs[1].fingerprint, 0)})
    assert [(one.trial.seed, one.repeat) for one in cohort.jobs] == [(0, 0), (2, 0), (0, 1)]
    assert plan_cohorts(jobs, cohort="auto", done={(one.fingerprint, one.repeat) for one in jobs}) == []


def test_runs_on_one_base_are_neighbours_and_those_that_change_it_come_last() -> None:
    jobs = [
        kind_job("base"),
        kind_job("full"),
        job(seed=1),
        job(quantization=NF4, seed=2),
        kind_job("bottleneck", seed=3),
        job(training={"gradient_checkpointing": "sqrt"}, seed=4),
        kind_job("base", quantization=NF4),
        job(seed=5),
    ]
    cohorts = plan_cohorts(jobs, cohort="auto")
    told = [
        (one.jobs[0].trial.quantization.kind, [f"{j.trial.method.kind}{j.trial.seed}" for j in one.jobs])
        for one in cohorts
    ]
    assert told == [
        ("none", ["base0"]),
        ("none", ["lora1", "lora5"]),
        ("none", ["bottleneck3"]),
        ("none", ["lora4"]),
        ("none", ["full0"]),
        ("nf4", ["lora2"]),
        ("nf4", ["base0"]),
    ]
    bases = [one.key.base for one in cohorts]
    assert len(list(itertools.groupby(bases))) == len(set(bases)) == 2


def test_the_longest_take_seats_first() -> None:
    """Ticks decide: one micro-batch of every member each. Rows break ties, then the order of the jobs."""

    def long(seed: int, steps: int, batch: int, micro: int) -> Job:
        return job(
            training={"epochs": None, "max_steps": steps, "batch_size": batch, "micro_batch_size": micro}, seed=seed
        )

    jobs = [
        long(0, steps=10, batch=4, micro=4),  # 10 ticks
        long(1, steps=30, batch=4, micro=4),  # 30
        long(2, steps=10, batch=16, micro=4),  # 40
        long(3, steps=10, batch=8, micro=8),  # 10, twice the rows of job 0
        long(4, steps=30, batch=4, micro=4),  # as job 1
        job(train_rows=None, seed=5),  # epochs of an unknown number of rows
        job(seed=6),  # 2 epochs of 100 rows: 26 steps of two micro-batches, 52
        long(7, steps=50, batch=1, micro=1),  # 50, of one row each
    ]
    assert members(plan_cohorts(jobs, cohort="auto")) == [[5, 6, 7, 2, 1, 4, 3, 0]]


def test_ids_are_of_the_members() -> None:
    jobs = [job(seed=seed) for seed in range(4)]
    (cohort,) = plan_cohorts(jobs, cohort="auto")
    assert re.fullmatch(r"c-[0-9a-f]{8}", cohort.id)
    assert plan_cohorts(jobs[::-1], cohort=2)[0].id == cohort.id, "neither order nor seats are part of it"
    others = [plan_cohorts(some, cohort="auto")[0].id for some in (jobs[:3], [*jobs[:3], job(seed=3, repeat=1)])]
    assert len({cohort.id, *others}) == 3
    # The job at another time, on another machine: nothing of this process is in it.
    assert plan_cohorts([job(seed=seed) for seed in range(4)], cohort="auto")[0].id == cohort.id


# Makespan: ticks until the last member is through, when each free seat goes to the next of the queue.


def makespan(lengths: Sequence[int], seats: int) -> int:
    free = [0] * seats
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def optimum(lengths: Sequence[int], seats: int) -> int:
    """The fewest ticks possible, by trying every assignment."""
    best = sum(lengths)
    for choice in itertools.product(range(seats), repeat=len(lengths) - 1):
        loads = [0] * seats
        for seat, length in zip((0, *choice), lengths, strict=True):
            loads[seat] += length
        best = min(best, max(loads))
    return best


def ticks(one: Job) -> int:
    steps = steps_of(one.trial, one.train_rows)
    assert steps is not None
    return steps.steps * steps.micro_batches_per_step


def jobs_of(lengths: Sequence[int]) -> list[Job]:
    training = {"epochs": None, "batch_size": 4, "micro_batch_size": 4}
    return [job(training={**training, "max_steps": length}, seed=seed) for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("seats", [2, 3])
def test_stragglers_do_not_hold_a_cohort(seats: int) -> None:
    """Graham's bound for longest first, 4/3 - 1/(3 seats), against the optimum.

    Every second list ends with a run as long as the others fill a seat with: in the jobs' own order it comes last, goes
    on alone, and breaks the bound.
    """
    draw = random.Random(seats)
    bound = 4 / 3 - 1 / (3 * seats)
    worst_as_asked_for = 0.0
    for number in range(26):
        lengths = [draw.choice([1, 2, 3, 5, 8, 13, 21]) for _ in range(7)]
        lengths.append(sum(lengths) // (seats - 1) if number % 2 else draw.randint(1, 30))
        (cohort,) = plan_cohorts(jobs_of(lengths), cohort=seats)
        best = optimum(lengths, seats)
        assert makespan([ticks(one) for one in cohort.jobs], seats) <= bound * best
        worst_as_asked_for = max(worst_as_asked_for, makespan(lengths, seats) / best)
    assert worst_as_asked_for > 4 / 3


def test_the_published_worst_case_is_met_exactly() -> None:
    """Graham 1969: lengths 2m-1, 2m-1, ..., m+1, m+1, m, m, m on m machines take 4m - 1 in place of 3m."""
    seats = 3
    lengths = [5, 5, 4, 4, 3, 3, 3]
    (cohort,) = plan_cohorts(jobs_of(lengths[::-1]), cohort=seats)
    assert makespan([ticks(one) for one in cohort.jobs], seats) == 4 * seats - 1
    assert optimum(lengths, seats) == 3 * seats


# Several devices: one cohort each.


def test_each_device_gets_a_cohort_of_about_the_same_length() -> None:
    lengths = [1, 2, 3, 5, 8, 13, 21, 21, 13, 8, 5, 3, 2, 1]
    jobs = [*jobs_of(lengths), kind_job("full")]
    cohorts = plan_cohorts(jobs, cohort="auto", devices=3)
    *together, alone = cohorts
    assert len(together) == 3 and [one.jobs for one in cohorts[3:]] == [(jobs[-1],)] and alone.seats == 1
    assert sorted(one.trial.seed for cohort in together for one in cohort.jobs) == list(range(len(lengths)))
    loads = [sum(ticks(one) for one in cohort.jobs) for cohort in together]
    assert max(loads) <= (4 / 3 - 1 / 9) * -(-sum(lengths) // 3)
    for cohort in together:
        assert [ticks(one) for one in cohort.jobs] == sorted((ticks(one) for one in cohort.jobs), reverse=True)
        assert (cohort.seats, cohort.why_alone) == (None, None)
    assert len({one.id for one in cohorts}) == 4


def test_fewer_runs_than_devices() -> None:
    cohorts = plan_cohorts([job(seed=0), job(seed=1)], cohort="auto", devices=4)
    assert members(cohorts) == [[0], [1]]
    assert {one.why_alone for one in cohorts} == {
        "each of the 2 runs that could share its base has a device of its own"
    }


def test_a_length_that_is_not_known_counts_as_the_longest_that_is() -> None:
    jobs = [*jobs_of([10, 10, 1]), job(train_rows=None, seed=3)]
    assert members(plan_cohorts(jobs, cohort="auto", devices=2)) == [[3, 1], [0, 2]]
