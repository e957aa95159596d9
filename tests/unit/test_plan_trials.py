"""Names, differences and rows of a plan; that planning needs no torch and little time. Also the trial others vary."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from typing import Any

import pytest

from lora_lab.errors import InputError
from lora_lab.plan.cohorts import plan_cohorts
from lora_lab.plan.job import Job, job_of
from lora_lab.plan.readable import ABSENT, difference, readable_name, varying_keys
from lora_lab.plan.row import PlanRow, plan_rows
from lora_lab.schema.adaptation import PARTS
from lora_lab.schema.labels import check_label
from lora_lab.schema.trial import Trial, read_trial

SHAPE = {
    "family": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
    "mlp_size": 128, "vocab_size": 260, "max_positions": 1024, "tied_embeddings": False,
}  # fmt: skip
TRIAL: dict[str, Any] = {
    "model": {"kind": "random", "name": "tiny", "seed": 0, "shape": SHAPE, "tie_embeddings": None},
    "method": {"kind": "lora", "rank_factors": []},
    "quantization": {"kind": "none", "double_quantization": False},
    "target": {**{part: part in ("query", "value") for part in PARTS}, "modules": []},
    "rank": 8,
    "alpha": "2r",
    "dropout": 0.0,
    "learning_rate": 1e-3,
    "optimizer": {"kind": "adamw", "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8},
    "scheduler": {"kind": "linear", "warmup_steps": 0, "warmup_ratio": None},
    "data": {
        "kind": "skills", "package_version": "0.1.25", "mixture": {"sums": 1.0}, "types": {},
        "train_size": 100, "train_seed": 0, "heldout_size": 10, "heldout_seed": 1,
        "template": "auto", "loss_on": "answer", "max_length": 512,
    },
    "training": {
        "epochs": 2, "max_steps": None, "batch_size": 8, "micro_batch_size": 4, "max_gradient_norm": 1.0,
        "gradient_checkpointing": "off", "precision": "fp32", "bucket_batches": 8,
        "layer_rates": [],
    },
    "evaluation": {
        "heldout": True, "answers": {"rows": 0, "max_new_tokens": 8}, "tasks": [], "engine": "tree",
        "chunk_tokens": None, "batch_size": 8, "limit": None, "num_fewshot": None,
        "apply_chat_template": False, "bootstrap_iters": 0, "mirror": None, "include_path": None,
        "skills": {"documents": 1, "seed": 0}, "prose": {"perplexity_words": 1, "completion_documents": 1, "seed": 0},
    },
    "seed": 0,
    "seeds": {"data": None, "init": None, "dropout": None, "layers": None},
    "init_from": None,
    "init_as": "adapter",
}  # fmt: skip


def trial_of(**changes: Any) -> Trial:
    """TRIAL with values replaced; a dict is merged into its section, and `parts=` names those of the target."""
    mapping = copy.deepcopy(TRIAL)
    if "parts" in changes:
        parts = changes.pop("parts")
        mapping["target"].update({part: part in parts for part in PARTS})
    for key, value in changes.items():
        mapping[key] = {**mapping[key], **value} if isinstance(value, dict) and "kind" not in value else value
    return read_trial(mapping)


def job(trial: Trial, *, repeat: int = 0, train_rows: int | None = 100) -> Job:
    identities = {"base": "random", "data": "skills"}
    return job_of(trial, identities, train_rows=train_rows, repeat=repeat, tag=None, overrides=())


NF4 = {"kind": "nf4", "double_quantization": False}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rank": 16}, "lora-r16-qv-s0"),
        ({"quantization": {**NF4, "double_quantization": True}, "seed": 1}, "lora-nf4dq-r8-qv-s1"),
        ({"quantization": NF4, "method": {"kind": "dora", "rank_factors": []}}, "dora-nf4-r8-qv-s0"),
        ({"method": {"kind": "full"}}, "full-s0"),
        ({"method": {"kind": "base"}}, "base"),
        ({"method": {"kind": "base"}, "quantization": NF4}, "base-nf4"),
        ({"parts": ("query", "key", "value", "projection")}, "lora-r8-attention-s0"),
        ({"parts": ("mlp",)}, "lora-r8-mlp-s0"),
        ({"parts": PARTS[:5]}, "lora-r8-all_linear-s0"),
        ({"parts": PARTS[:6]}, "lora-r8-all_linear_head-s0"),
        ({"parts": ("embedding",)}, "lora-r8-embedding-s0"),
        ({"parts": ("key", "mlp", "embedding")}, "lora-r8-kme-s0"),
        ({"target": {"modules": ["q_proj"]}}, "lora-r8-custom-s0"),
    ],
)
def test_readable_names(changes: dict[str, Any], name: str) -> None:
    assert readable_name(trial_of(**changes)) == name
    assert check_label(name) == name


def test_difference_names_what_differs_and_nothing_else() -> None:
    assert difference(trial_of(), trial_of()) == {}
    assert difference(trial_of(), trial_of(rank=4, alpha=16)) == {"rank": (8, 4)}
    assert difference(trial_of(), trial_of(seed=3)) == {"seed": (0, 3)}
    assert difference(trial_of(), trial_of(seeds={"init": 5})) == {"seeds.init": (0, 5)}


def test_a_key_that_only_one_has_is_absent_not_null() -> None:
    sgd = {"kind": "sgd", "weight_decay": 0.0, "momentum": 0.9, "nesterov": False}
    changed = difference(trial_of(), trial_of(optimizer=sgd))
    assert changed["optimizer.kind"] == ("adamw", "sgd")
    assert changed["optimizer.betas"] == ([0.9, 0.999], ABSENT)
    assert changed["optimizer.momentum"] == (ABSENT, 0.9)
    assert "optimizer.weight_decay" not in changed


def test_varying_keys() -> None:
    assert varying_keys([]) == []
    assert varying_keys([trial_of(seed=seed, rank=rank, alpha=8) for seed in (0, 1) for rank in (2, 4)]) == [
        "rank",
        "seed",
    ]


def test_rows_tell_new_done_and_duplicate() -> None:
    jobs = [job(trial_of()), job(trial_of(rank=4)), job(trial_of(alpha=16)), job(trial_of(), repeat=1)]
    rows = plan_rows(jobs, done={(jobs[1].fingerprint, 0)})
    assert [row.state for row in rows] == ["new", "done", "duplicate", "new"]
    assert rows[0].setting == rows[2].setting
    assert rows[0].setting != rows[1].setting


def test_a_row_counts() -> None:
    row = plan_rows([job(trial_of())], done=())[0]
    assert (row.steps, row.train_rows) == (2 * 13, 100)
    assert row.trainable_parameters == 2 * 8 * ((64 + 64) + (64 + 32))
    assert row.total_parameters == row.trainable_parameters + 260 * 64 * 2 + 64 + 2 * (
        2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    )
    assert row.missing == {}


def test_a_row_says_why_a_number_is_missing() -> None:
    model = {"kind": "hub", "name": None, "repo": "a/b", "revision": "main", "shape": None, "tie_embeddings": None}
    row = plan_rows([job(trial_of(model=model), train_rows=None)], done=())[0]
    assert (row.steps, row.train_rows, row.trainable_parameters, row.total_parameters) == (None, None, None, None)
    counts = {f"{kind}_parameters" for kind in ("trainable", "adapter", "router", "total")}
    assert row.missing.keys() == {"steps", "train_rows", *counts}


def test_the_base_has_no_steps_and_nothing_to_train() -> None:
    row = plan_rows([job(trial_of(method={"kind": "base"}), train_rows=None)], done=())[0]
    assert (row.steps, row.trainable_parameters) == (0, 0)
    assert row.missing.keys() == {"train_rows"}


def test_problems_of_all_jobs_are_shown_together() -> None:
    late = {"kind": "linear", "warmup_steps": 26, "warmup_ratio": None}
    jobs = [
        job(trial_of(target={"modules": ["q_prj"]})),
        job(trial_of(scheduler=late)),
        job(trial_of(scheduler=late, rank=2)),
    ]
    with pytest.raises(InputError) as caught:
        plan_rows(jobs, done=())
    assert [problem.where for problem in caught.value.problems] == ["target.modules", "scheduler"]


def test_planning_imports_no_heavy_package() -> None:
    """Every module of the plan and schema floors, in a fresh interpreter."""
    code = """
import pkgutil, importlib, sys
import lora_lab.plan, lora_lab.schema
for package in (lora_lab.plan, lora_lab.schema):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
heavy = {"torch", "transformers", "peft", "bitsandbytes", "numpy", "hydra", "omegaconf", "lm_eval", "datasets"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_planning_grows_with_the_trials_and_not_faster() -> None:
    """500 trials at most ten times what 120 take; a quadratic plan would take seventeen."""

    def planned(count: int) -> tuple[float, list[PlanRow], list[str]]:
        trials = [trial_of(rank=rank, seed=seed) for rank in range(1, count // 10 + 1) for seed in range(10)]
        start = time.process_time()
        jobs = [job(trial) for trial in trials]
        rows = plan_rows(jobs, done=(), cohorts=plan_cohorts(jobs, cohort="auto"))
        varying = varying_keys(trials)
        return time.process_time() - start, rows, varying

    few = min(planned(120)[0] for _ in range(3))
    seconds, rows, varying = planned(500)
    assert seconds < 10 * few
    assert (len(rows), varying) == (500, ["rank", "alpha", "seed"])
