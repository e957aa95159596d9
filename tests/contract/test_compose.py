"""Merging leaves and setting values on the plain mapping equals full composition by Hydra, and costs a fraction."""

from __future__ import annotations

import random
import time

import pytest
from hydra.types import RunMode

from lora_lab.app.compose import Composer, config_loader
from lora_lab.app.interpolation import plain_mapping
from lora_lab.app.locations import conf_folder
from lora_lab.errors import InputError
from tests.tiers import mostly_slow

POINTS = [
    [],
    ["rank=4"],
    ["rank=4", "alpha=r/2", "seed=3", "learning_rate=1e-4"],
    ["optimizer=sgd", "optimizer.momentum=0.5", "optimizer.nesterov=true"],
    ["target=[query,mlp,head]", "model.tie_embeddings=false"],
    ["target=attention", "target.modules=[lm_head]"],
    ["method=qlora", "quantization.double_quantization=false"],
    ["method=qlora", "optimizer=lion"],
    ["scheduler=wsd", "scheduler.warmup_steps=null", "scheduler.warmup_ratio=0.1"],
    ["data=jsonl", "data.path='a b.jsonl'", "data.heldout_path=null"],
    ["debug=one_step", "training.batch_size=4", "training.micro_batch_size=2"],
    ["data.mixture={chain_sum: 2.0}"],
    ["seeds.data=5", "seeds.init=${seed}"],
    ["model=llama2_7b", "training.gradient_checkpointing=sqrt", "training.precision=bf16"],
    ["evaluation.tasks=[prose_completion]", "tag='r=1'"],
]


@pytest.mark.parametrize("point", POINTS, ids=" ".join)
def test_equals_full_composition(composer: Composer, point: list[str]) -> None:
    whole = plain_mapping(config_loader().load_configuration("config", point, RunMode.RUN))
    assert composer.compose(point).mapping == whole


@pytest.mark.parametrize("share", mostly_slow(range(5), keep=[0]))
def test_every_choice_and_many_combinations_equal_full_composition(composer: Composer, share: int) -> None:
    """A fifth of the points in every test run: Hydra takes its time."""
    groups = {
        folder.name: sorted(leaf.stem for leaf in folder.glob("*.yaml"))
        for folder in conf_folder().iterdir()
        if folder.is_dir() and folder.name != "local"
    }
    draw = random.Random(0)
    points = [[f"{group}={name}"] for group, names in groups.items() for name in names]
    for _ in range(25):
        some = draw.sample(sorted(groups), 4)
        points.append([f"{group}={draw.choice(groups[group])}" for group in some])
    parts = groups["target"]
    points += [[f"target=[{','.join(draw.sample(parts, 3))}]", f"method={name}"] for name in groups["method"]]
    loader = config_loader()
    for point in points[share::5]:
        whole = plain_mapping(loader.load_configuration("config", point, RunMode.RUN))
        ours = composer.attempt(point).mapping
        assert ours == whole, point


def test_choices_cost_next_to_nothing(composer: Composer) -> None:
    """A product of group choices must not cost a composition of Hydra's for each combination."""
    start = time.perf_counter()
    config_loader().load_configuration("config", ["optimizer=lion"], RunMode.RUN)
    one_composition = time.perf_counter() - start
    start = time.perf_counter()
    parts = ["query", "key", "value", "projection", "mlp", "head"]
    subsets = [[part for bit, part in enumerate(parts) if number >> bit & 1] for number in range(1, 64)]
    for subset in subsets:
        composer.compose([f"target=[{','.join(subset)}]", "model=tiny_random", "optimizer=sgd"])
    assert time.perf_counter() - start < 15 * one_composition


def test_points_do_not_leak_into_each_other(composer: Composer) -> None:
    composer.compose(["rank=4", "seeds.data=9"])
    assert composer.compose([]).mapping["rank"] == 8
    assert composer.compose([]).mapping["seeds"]["data"] is None


def test_values_cost_next_to_nothing(composer: Composer) -> None:
    start = time.perf_counter()
    config_loader().load_configuration("config", ["optimizer=lion"], RunMode.RUN)
    one_choice = time.perf_counter() - start
    start = time.perf_counter()
    for seed in range(500):
        composer.compose(["optimizer=sgd", f"seed={seed}"])
    assert time.perf_counter() - start < 20 * one_choice


def test_study_values_come_under_the_command_line(composer: Composer) -> None:
    under = {"rank": 32, "target": ["query", "mlp"], "training.max_steps": 7, "optimizer": "sgd"}
    mapping = composer.compose(["rank=4", "optimizer=adamw"], under=under).mapping
    assert mapping["rank"] == 4
    assert mapping["training"]["max_steps"] == 7
    assert mapping["target"]["mlp"] and mapping["target"]["query"] and not mapping["target"]["value"]
    assert mapping["optimizer"]["kind"] == "adamw"


@pytest.mark.parametrize(
    ("point", "said"),
    [
        (["lrr=0.1"], "lrr: unknown key"),
        (["learning_rat=0.1"], 'did you mean "learning_rate"'),
        (["training.batchsize=4"], 'did you mean "batch_size"'),
        (["optimizer=adam"], 'did you mean "adamw"'),
        (["optimizer="], "optimizer: empty value"),
        (["target=[query,typo]"], 'no such choice "typo"'),
        (["+rak=3"], 'did you mean "rank"'),
        (["data=jsonl"], "data.path: a value is needed"),
        (["tag=${oc.env:NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE"),
        (["tag=${nope}"], "nope"),
        (["tag=${study}", "study=${tag}"], "study -> tag -> study"),
    ],
)
def test_says_what_is_wrong(composer: Composer, point: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        composer.compose(point)
    assert said in str(caught.value)


def test_says_everything_at_once(composer: Composer) -> None:
    with pytest.raises(InputError) as caught:
        composer.compose(["lrr=1", "training.epoch=3"])
    assert len(caught.value.problems) == 2
