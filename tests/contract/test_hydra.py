"""Hydra's command line behaves as people know it, and leaves nothing behind in the working folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.journey.program import Answer, Lab, call, python

# `lora-lab ARGUMENTS`, then a line that says which heavy packages came along.
_LOADED = """
import sys
from lora_lab.app.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "peft", "bitsandbytes", "lm_eval", "datasets", "wandb"}
print("loaded:", sorted(heavy & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder that is still empty when the test ends."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """An empty lab outside the working folder."""
    return Lab(tmp_path / "lab", tmp_path / "cache")


def plan_names(answer: Answer) -> list[str]:
    assert answer.code == 0, answer.err
    return [row["name"] for row in answer.json()]


def test_cfg_job(lab: Lab) -> None:
    answer = lab.run("rank=4", "--cfg", "job")
    assert answer.code == 0, answer.err
    config = yaml.safe_load(answer.out)
    assert config["rank"] == 4
    assert config["model"]["kind"] == "random"
    assert "hydra" not in config
    assert not lab.root.exists()


def test_cfg_of_a_package(lab: Lab) -> None:
    answer = lab.run("--cfg", "job", "-p", "training")
    assert answer.code == 0, answer.err
    assert yaml.safe_load(answer.out)["batch_size"] == 4


def test_cfg_with_a_sweep_is_explained(lab: Lab) -> None:
    answer = lab.run("-m", "rank=2,4", "--cfg", "job")
    assert answer.code == 2 and "plan -m" in answer.err


@pytest.mark.parametrize("flag", [["--info", "defaults"], ["--info", "searchpath"], ["--help"], ["--hydra-help"]])
def test_flags_that_only_print(flag: list[str]) -> None:
    answer = call("run", *flag)
    assert answer.code == 0, answer.err
    assert answer.out.strip()


def test_help_names_the_groups() -> None:
    out = call("run", "--help").out
    for group in ("model", "method", "quantization", "target", "optimizer", "scheduler", "data", "training"):
        assert f"{group}: " in out
    assert "qlora" in out


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], []])
def test_the_program_tells_about_itself(arguments: list[str]) -> None:
    answer = call(*arguments)
    assert answer.code == 0 and "lora-lab" in answer.out


def test_an_unknown_command_and_an_unknown_flag() -> None:
    answer = call("rnu")
    assert answer.code == 2 and 'did you mean "run' in answer.err
    assert call("run", "--nope").code == 2


def test_a_config_of_ones_own(lab: Lab, tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "training").mkdir(parents=True)
    (own / "mine.yaml").write_text("defaults:\n  - config\n  - _self_\nrank: 5\n")
    (own / "training" / "tiny.yaml").write_text("defaults: [short]\nmax_steps: 9\n")
    answer = call("plan", "-cn", "mine", "-cd", str(own), "model=tiny_random", "training=tiny", "--json")
    assert answer.code == 0, answer.err
    (row,) = answer.json()
    assert (row["name"], row["steps"]) == ("lora-r5-qv-s0", 9)
    swept = call(
        "plan", "-m", "--config-name", "mine", "--config-dir", str(own), "model=tiny_random", "seed=0,1", "--json"
    )
    assert plan_names(swept) == ["lora-r5-qv-s0", "lora-r5-qv-s1"]
    unknown = call("plan", "-cn", "none", "-cd", str(own))
    assert unknown.code == 2 and "none" in unknown.err


def test_a_sweep_in_a_config_file(lab: Lab, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    text = """\
defaults:
  - config
  - _self_
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      rank: 2,4
      seed: range(0,2)
"""
    (own / "swept.yaml").write_text(text)
    answer = lab.plan("-cn", "swept", "-cd", str(own), "--json")
    assert plan_names(answer) == [f"lora-r{rank}-qv-s{seed}" for rank in (2, 4) for seed in (0, 1)]
    narrowed = lab.plan("-cn", "swept", "-cd", str(own), "seed=7", "--json")
    assert plan_names(narrowed) == ["lora-r2-qv-s7", "lora-r4-qv-s7"]


@pytest.mark.parametrize(
    ("sweep", "names"),
    [
        (["rank=range(2,5)"], ["lora-r2-qv-s0", "lora-r3-qv-s0", "lora-r4-qv-s0"]),
        (["rank=choice(4,2)"], ["lora-r4-qv-s0", "lora-r2-qv-s0"]),
        (["rank=2,4", "seed=0,1"], [f"lora-r{rank}-qv-s{seed}" for rank in (2, 4) for seed in (0, 1)]),
        (["target=[query],[query,value]"], ["lora-r8-q-s0", "lora-r8-qv-s0"]),
        (["target=qv,all_linear"], ["lora-r8-qv-s0", "lora-r8-all_linear-s0"]),
        (["method=glob(l*a)"], ["lisa-s0", "lora-r8-qv-s0"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_sweeps(lab: Lab, sweep: list[str], names: list[str]) -> None:
    assert plan_names(lab.plan("-m", *sweep, "--json")) == names


def test_group_sweeps_reach_the_trials(lab: Lab) -> None:
    fingerprints = [row["fingerprint"] for row in lab.plan("-m", "optimizer=adamw,sgd", "--json").json()]
    assert len(set(fingerprints)) == 2
    (globbed,) = lab.plan("-m", "optimizer=glob(*sgd*)", "--json").json()
    assert globbed["fingerprint"] == fingerprints[1]
    every = lab.plan("-m", "optimizer=glob(*)", "--json").json()
    assert len({row["fingerprint"] for row in every}) == 7


def test_hydras_own_launcher(lab: Lab) -> None:
    answer = lab.run("-m", "hydra/launcher=basic", "rank=2,4")
    assert answer.code == 0, answer.err
    assert [record.name for record in lab.runs()] == ["lora-r2-qv-s0", "lora-r4-qv-s0"]
    assert sorted(path.name for path in lab.root.iterdir()) == ["runs"]
    again = lab.run("-m", "rank=2,4")
    assert again.code == 0 and "nothing to run" in again.err, "the same trials, however they are launched"


def test_hydras_own_launcher_tells_of_failures(lab: Lab) -> None:
    answer = lab.run("-m", "hydra/launcher=basic", "rank=2,-1")
    assert answer.code == 2
    assert "rank" in answer.err and "-1" in answer.err and "Traceback" not in answer.err


def test_a_plain_run_leaves_nothing_in_the_working_folder(lab: Lab) -> None:
    assert lab.run("rank=2").code == 0


def test_plan_says_what_scripts_rely_on(lab: Lab) -> None:
    (row,) = lab.plan("method=dora", "rank=4", "--json").json()
    assert set(row) >= {"fingerprint", "trainable_parameters", "total_parameters", "steps", "state", "overrides"}
    assert row["trainable_parameters"] == 4 * 2 * (2 * 64 + 64 + 32) + 2 * (64 + 32)
    assert len(row["fingerprint"]) == 64
    assert {"method=dora", "rank=4"} <= set(row["overrides"])
    text = lab.plan("-m", "rank=4,4,8")
    assert "3 trials: 2 new, 0 done, 1 duplicate" in text.out


def test_plan_of_500_trials_is_light(tmp_path: Path) -> None:
    """How long it takes is measured by tests/benchmarks/plan_speed.py."""
    arguments = ("plan", "-m", "seed=range(0,50)", "rank=1,2,3,4,5,6,7,8,9,10", f"root={tmp_path / 'lab'}", "--json")
    answer = python(_LOADED, *arguments, cwd=tmp_path / "here")
    assert answer.code == 0, answer.err
    assert len({row["fingerprint"] for row in answer.json()}) == 500
    assert answer.err.splitlines()[-1] == "loaded: []"


def test_a_study_and_the_ledgers_commands_are_light_too(tmp_path: Path, tiny_runs: Path) -> None:
    for arguments in (["plan", "-m", "study=first_look"], ["runs", "--root", str(tiny_runs)]):
        answer = python(_LOADED, *arguments, cwd=tmp_path / "here")
        assert answer.code == 0, answer.err
        assert answer.err.splitlines()[-1] == "loaded: []"


@pytest.fixture
def tiny_runs(lab: Lab) -> Path:
    """A ledger with one run."""
    assert lab.run("rank=2").code == 0
    return lab.root
