"""Every bad input is answered before weights load: where, which value, which rule; exit code 2 (input) or 4 (machine).

One table of commands, run in this process in an empty folder; then the files of data sets, studies and the ledger. The
loader of weights is replaced by one that fails the test, and after every refusal the ledger must be as it was.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_lab import restore
from lora_lab.app import hydra_commands, session
from lora_lab.app.cli import main
from lora_lab.app.compose import Composer, config_loader
from lora_lab.app.hydra_settings import load_master
from lora_lab.app.planning import make_plan
from lora_lab.record.atomic import write_json
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import RESULT_SCHEMA_VERSION
from lora_lab.schema.method import METHODS
from tests.tiers import SLOW, mostly_slow

CHECKOUT = Path(__file__).resolve().parents[2]
TINY = ("model=tiny_random", "evaluation.tasks=[]")


@dataclass(frozen=True)
class Answer:
    """What a command said. `err` without colours; no traceback was in it."""

    code: int
    out: str
    err: str


Call = Callable[..., Answer]


class WeightsLoadedError(BaseException):
    """Not an Exception: nothing in the lab may catch it."""


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lm-eval's names are read from its files once, which takes seconds."""
    return tmp_path_factory.mktemp("cache")


class Once:
    """Hydra's composition takes 0.1 to 0.3 s a call and is a pure function of its arguments: the calls of this file
    share it. Not shared: configurations of the user's own, whose files change, and the tests of the program itself."""

    def __init__(self) -> None:
        self._loader = config_loader()
        self._masters: dict[Any, Any] = {}
        self._composers: dict[int, Composer] = {}

    def config_loader(self, *, primary: Path | None, extra: Path | None) -> Any:
        return self._loader if primary is None and extra is None else config_loader(primary=primary, extra=extra)

    def load_master(self, loader: Any, flags: Any, lines: list[str]) -> Any:
        key = flags.config_name, flags.multirun, *lines
        if loader is not self._loader:
            return load_master(loader, flags, lines)
        if key not in self._masters:
            self._masters[key] = load_master(loader, flags, lines)
        return self._masters[key]

    def composer(self, loader: Any, master: Any) -> Composer:
        if loader is not self._loader:
            return Composer(loader, master)
        if id(master) not in self._composers:
            self._composers[id(master)] = Composer(loader, master)
        return self._composers[id(master)]


@pytest.fixture(scope="module")
def once() -> Once:
    return Once()


@pytest.fixture
def call(
    tmp_path: Path, shared_cache: Path, once: Once, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Call]:
    """call("plan", "rank=0"): in an empty folder of its own, with the lab's root at ./lab."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")  # no run of this file is worth a copy

    def refuse(*arguments: Any, **options: Any) -> None:
        raise WeightsLoadedError

    monkeypatch.setattr(restore, "load_base", refuse)
    monkeypatch.setattr(hydra_commands, "config_loader", once.config_loader)
    monkeypatch.setattr(hydra_commands, "load_master", once.load_master)
    monkeypatch.setattr(hydra_commands, "Composer", once.composer)

    def run(*arguments: str) -> Answer:
        line = list(arguments)
        if line[0] in ("run", "plan") and line[-1] != "-cn" and not any(one.startswith("cache=") for one in line):
            line.append(f"cache={shared_cache}")
        before = _tree(tmp_path / "lab" / "runs")
        capsys.readouterr()
        code = main(line)
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        if code in (2, 4):
            assert _tree(tmp_path / "lab" / "runs") == before, "a refusal changes nothing in the ledger"
            assert said.err.startswith("error: ") or "usage:" in said.err
        return Answer(code, said.out, said.err)

    yield run


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def check(answer: Answer, code: int, *fragments: str) -> None:
    assert answer.code == code, answer.err
    for fragment in fragments:
        assert fragment in answer.err


# (what is typed after `plan model=tiny_random evaluation.tasks=[]`, fragments of the answer); the exit code is 2.
OVERRIDES: list[tuple[str, tuple[str, ...]]] = [
    # 1, 2, 4, 5: the learning rate
    ("learning_rate=1e", ('learning_rate: expected a number, got "1e"', "did you mean 1e-4?")),
    ("learning_rate=", ("learning_rate: empty value", "a number")),
    ("learning_rate=null", ("learning_rate: empty value (null)", "a number")),
    ("learning_rate=''", ("learning_rate: empty value",)),
    ("learning_rate=nan", ("learning_rate: must be finite, got nan",)),
    ("learning_rate=inf", ("learning_rate: must be finite, got inf",)),
    ("learning_rate=-inf", ("learning_rate: must be", "got -inf")),
    ("learning_rate=-0.1", ("learning_rate: must be > 0, got -0.1",)),
    ("learning_rate=0", ("learning_rate: must be > 0, got 0",)),
    ("learning_rate=true", ("learning_rate: expected a number, got true",)),
    ("learning_rate=[1e-3]", ("learning_rate: expected a number", "0.001")),
    ("learning_rate={a: 1}", ("learning_rate: expected a number",)),
    # nulls and empty values of other keys
    ("rank=null", ("rank: empty value (null); expected an integer",)),
    ("rank=", ("rank: empty value",)),
    ("alpha=null", ("alpha: empty value",)),
    ("alpha=", ("alpha: empty value",)),
    ("dropout=null", ("dropout: empty value (null)",)),
    ("seed=null", ("seed: empty value (null)",)),
    ("root=", ("root: empty value",)),
    ("root=null", ("root: empty value (null)",)),
    ("training.precision=null", ("training.precision: empty value (null)", "fp32, bf16, fp64")),
    ("training.batch_size=null", ("training.batch_size: empty value (null)",)),
    ("optimizer=", ("optimizer: empty value", "adamw")),
    ("optimizer=null", ("optimizer: empty value", "adamw")),
    ("quantization=", ("quantization: empty value", "nf4")),
    ("target.query=null", ("target.query: empty value (null); expected true or false",)),
    ("launch.device=null", ("launch.device: empty value (null)",)),
    # 7, 8: unknown keys, and no advice to append them
    ("lrr=0.1", ("lrr: unknown key", 'did you mean "learning_rate"')),
    ("lr=0.1", ("lr: unknown key", 'did you mean "learning_rate"')),
    ("r=4", ("r: unknown key", 'did you mean "rank"')),
    ("lora_alpha=4", ("lora_alpha: unknown key", 'did you mean "alpha"')),
    ("target_modules=[q_proj]", ("target_modules: unknown key", 'did you mean "target"')),
    ("dtype=bf16", ("dtype: unknown key", 'did you mean "training.precision"')),
    ("tasks=[a]", ("tasks: unknown key", 'did you mean "evaluation.tasks"')),
    ("batch_size=4", ("batch_size: unknown key", 'did you mean "training.batch_size"')),
    ("learningrate=1", ("learningrate: unknown key", 'did you mean "learning_rate"')),
    ("learning.rate=1", ("learning.rate: unknown key",)),
    ("rank.x=1", ("rank.x: unknown key",)),
    ("training.batchsize=4", ("training.batchsize: unknown key", 'did you mean "batch_size"')),
    ("training.save_every=0", ("training.save_every: unknown key",)),
    ("optimizer.momentum=0.9", ("optimizer.momentum: unknown key", "weight_decay")),
    ("+lrr=0.1", ("lrr: unknown key", 'did you mean "learning_rate"')),
    ("++lrr=0.1", ("lrr: unknown key",)),
    ("+model.x=1", ("model.x: unknown key",)),
    ("++model.x=1", ("model.x: unknown key",)),
    ("lrr={a: 1}", ("lrr: unknown key",)),
    ("lrr=${seed}", ("lrr: unknown key",)),
    ("+rank=4", ("rank: is a key already",)),
    ("~rank", ("rank: missing",)),
    ("~seeds", ("seeds: missing",)),
    ("~optimizer", ("optimizer: a choice cannot be taken out",)),
    ("optimizer@training=sgd", ("optimizer@training: a choice cannot be put elsewhere",)),
    ("seeds=3", ("seeds: expected a mapping, got 3",)),
    ("seeds.nope=1", ("seeds.nope: unknown key", "layers")),
    # 10, 11, 13, 14: given twice; seeds
    ("learning_rate=0.1 learning_rate=0.2", ("learning_rate: given twice: learning_rate=0.1 and learning_rate=0.2",)),
    ("rank=8 ++rank=8", ("rank: given twice",)),
    ("seed=010", ('seed: expected an integer, got "010"',)),
    ("seed=-1", ("seed: must be 0 to 4294967295, got -1",)),
    ("seed=99999999999999999999", ("seed: must be 0 to 4294967295, got 99999999999999999999",)),
    ("seed=1.5", ("seed: expected an integer, got 1.5",)),
    ("seed=true", ("seed: expected an integer, got true",)),
    ("seed=1e3", ("seed: expected an integer",)),
    ("seeds.data=-1", ("seeds.data: must be 0 to 4294967295, got -1",)),
    # 16, 17, 22: syntax
    ("evaluation.limit=[a,b", ('evaluation.limit: unclosed "[" in evaluation.limit=[a,b',)),
    ("seeds={data:1", ('seeds: unclosed "{"',)),
    ("rank=8]", ('rank: "]" without "["',)),
    ("rank=4,8", ("rank=4,8 is a sweep, which needs -m", "rank=[a,b]")),
    ("rank=4,", ("rank: trailing comma in rank=4,",)),
    ("rank", ("rank: expected KEY=VALUE",)),
    ("=3", ("=3: expected KEY=VALUE",)),
    ("rank==3", ("rank: cannot read rank==3",)),
    ("rank=range(1,4)", ("rank=range(1,4) is a sweep, which needs -m",)),
    # 19, 20: interpolations
    ("tag=${oc.env:NO_SUCH_VARIABLE}", ("tag: environment variable NO_SUCH_VARIABLE is not set",)),
    ("tag=${nope}", ("tag: ", "'nope' not found")),
    ("tag=${study} study=${tag}", ("interpolations in a circle", "study -> tag -> study")),
    ("rank=${rank}", ("rank: interpolations in a circle: rank -> rank",)),
    ("rank=${data.kind}", ('rank: expected an integer, got "skills"',)),
    # 28, 31: nothing is written outside the root, nothing is instantiated
    ("hydra.run.dir=/proc/x", ("hydra.run.dir: not open to users", "root=")),
    ("hydra.sweep.dir=../..", ("hydra.sweep.dir: not open to users",)),
    ("hydra.sweep.subdir=../x", ("hydra.sweep.subdir: not open to users",)),
    ("hydra.output_subdir=../x", ("hydra.output_subdir: not open to users",)),
    ("hydra.job.chdir=true", ("hydra.job.chdir: not open to users",)),
    ("hydra.job_logging.x=1", ("hydra.job_logging.x: not open to users",)),
    ("+hydra.job_logging.handlers.x={(): os.system}", ("hydra.job_logging.handlers.x",)),
    ("hydra/job_logging=default", ("hydra/job_logging: not open to users",)),
    ("hydra/hydra_logging=default", ("hydra/hydra_logging: not open to users",)),
    ("+hydra.callbacks.x=1", ("hydra.callbacks.x: not open to users",)),
    ("hydra/launcher=basicc", ('hydra/launcher: no such choice "basicc"', 'did you mean "basic"')),
    ("hydra/sweeper=nope", ('hydra/sweeper: no such choice "nope"',)),
    ("hydra.mode=NOPE", ("hydra.mode=NOPE", "RUN, MULTIRUN")),
    ("hydra.searchpath=[file:///no/such/place]", ('hydra.searchpath: no such folder: "/no/such/place"',)),
    ("hydra.searchpath=3", ("hydra.searchpath: expected a list of folders", "got 3")),
    ("hydra.launcher._target_=os.system", ("hydra.launcher._target_: configuration holds values only",)),
    ("+hydra.launcher.x._target_=os.system", ("hydra.launcher.x._target_: configuration holds values only",)),
    ("+hydra.launcher.x={_target_: os.system}", ("hydra.launcher.x: configuration holds values only",)),
    ("+hydra.launcher.x=[{_target_: os.system}]", ("hydra.launcher.x: configuration holds values only",)),
    ("+model._target_=os.system", ("model._target_: configuration holds values only",)),
    ("++data.mixture._target_=1.0", ("data.mixture._target_: configuration holds values only",)),
    ("data.mixture={_target_: os.system}", ("data.mixture: configuration holds values only",)),
    ("tag={_target_: os.system}", ("tag: configuration holds values only",)),
    # 34 to 38: rank, alpha, dropout
    ("rank=0", ("rank: must be >= 1, got 0",)),
    ("rank=-1", ("rank: must be >= 1, got -1",)),
    ("rank=4.5", ("rank: expected an integer, got 4.5",)),
    ("rank=4.0", ("rank: expected an integer, got 4.0",)),
    ("rank=x", ('rank: expected an integer, got "x"',)),
    ("rank=true", ("rank: expected an integer, got true",)),
    ("rank=65", ("rank: must be <= 64", "tiny_random", "got 65")),
    ("alpha=x", ("alpha: expected a number > 0", '"2r"', 'got "x"')),
    ("alpha=nan", ("alpha: must be finite, got nan",)),
    ("alpha=1e30", ("alpha: must be <= 1000000, got 1e+30",)),
    ("alpha=0", ("alpha: must be > 0, got 0",)),
    ("alpha=-2", ("alpha: must be > 0, got -2",)),
    ("dropout=1.5", ("dropout: must be < 1, got 1.5",)),
    ("dropout=1.0", ("dropout: must be < 1, got 1.0",)),
    ("dropout=-0.1", ("dropout: must be >= 0, got -0.1",)),
    ("dropout=nan", ("dropout: must be finite, got nan",)),
    # 40, 41, 43: targets
    ("target=[q_proj,typo_proj]", ('target.modules: "typo_proj" matches no module', "q_proj")),
    ("target=[query,typo]", ('target: no such choice "typo"', "value")),
    ("target=querry", ('target: no such choice "querry"', 'did you mean "query"')),
    ("target=q_proj", ('target: no such choice "q_proj"', "target=[q_proj,v_proj]")),
    ("target=(", ('target: unclosed "("',)),
    ("target='('", ('target: no such choice "("',)),
    ("target.modules=['(']", ('target.modules: "(" is not a module name', "no regexps")),
    ("target.modules=['(a+)+$']", ('"(a+)+$" is not a module name',)),
    ("target.modules=['.*_proj']", ('".*_proj" matches no module',)),
    ("target.modules=[proj]", ('"proj" matches no module',)),
    ("target=", ("target: empty value", "qv")),
    ("target=[]", ("target: method=lora needs at least one module to adapt, got none",)),
    ("target=[input_layernorm]", ('"input_layernorm" is a normalisation layer', "q_proj")),
    ("target.modules=q_proj", ('target.modules: expected a list, got "q_proj"',)),
    ("target=[[q_proj]]", ("target: no such choice",)),
    ("target.query=3", ("target.query: expected true or false, got 3",)),
    # 47, 49: precision; lengths
    ("training.precision=fp16", ('training.precision: no such choice "fp16"', "fp32, bf16, fp64")),
    ("training.max_steps=0", ("training.max_steps: must be >= 1, got 0",)),
    ("training=one_epoch training.epochs=0", ("training.epochs: must be >= 1, got 0",)),
    ("training=one_epoch training.epochs=1.5", ("training.epochs: expected an integer, got 1.5",)),
    ("training=short training.epochs=1", ("training: set exactly one of epochs (now 1) and max_steps",)),
    ("training=one_epoch training.epochs=null", ("training: set exactly one of epochs (now None)",)),
    ("training.batch_size=0", ("training.batch_size: must be >= 1, got 0",)),
    ("training.batch_size=10 training.micro_batch_size=4", ("batch_size=10 is not divisible by micro_batch_size=4",)),
    ("training.max_steps=5 scheduler.warmup_steps=5", ("scheduler: warm-up of 5 steps", "the 5 steps of training")),
    ("training.max_steps=5 scheduler.warmup_steps=6", ("scheduler: warm-up of 6 steps",)),
    ("scheduler.warmup_ratio=0.1", ("scheduler: set exactly one of warmup_steps (now 0) and warmup_ratio (now 0.1)",)),
    ("scheduler.warmup_ratio=1.0 scheduler.warmup_steps=null", ("scheduler.warmup_ratio: must be < 1, got 1.0",)),
    ("scheduler=wsd scheduler.warmup_steps=5 training.max_steps=5", ("scheduler: warm-up",)),
    ("scheduler=cosin", ('scheduler: no such choice "cosin"', 'did you mean "cosine"')),
    ("training.max_gradient_norm=0", ("training.max_gradient_norm: must be > 0, got 0",)),
    ("training.gradient_checkpointing=0", ("training.gradient_checkpointing: must be >= 1, got 0",)),
    ("training.gradient_checkpointing=every", ('did you mean "every_layer"',)),
    # combinations that cannot be meant
    ("training.precision=fp64 quantization=nf4", ("training.precision: fp64 does not combine with quantization=nf4",)),
    ("training.precision=fp64 optimizer=lion", ("training.precision: fp64 does not combine with optimizer=lion",)),
    ("method=full quantization=nf4", ("quantization: nf4 weights cannot be trained themselves (method=full)",)),
    ("quantization.double_quantization=true", ("quantization: double_quantization=true needs quantization=nf4",)),
    ("optimizer=sgd optimizer.momentum=0 optimizer.nesterov=true", ("optimizer: nesterov=true needs momentum > 0",)),
    ("model.tie_embeddings=true", ("model.tie_embeddings: true is not possible",)),
    ("optimizer=adam", ('optimizer: no such choice "adam"', 'did you mean "adamw"')),
    ("optimizer=sgd optimizer.betas=[0.9,0.9]", ("optimizer.betas: unknown key", "momentum")),
    ("optimizer.betas=[0.9]", ("optimizer.betas.1: missing",)),
    ("optimizer.betas=[0.9,1.0]", ("optimizer.betas.1: must be < 1, got 1.0",)),
    ("optimizer.kind=foo", ('optimizer.kind: no such choice "foo"', "adamw")),
    ("method.kind=foo", ('method.kind: no such choice "foo"', "rslora")),
    ("method=lorra", ('method: no such choice "lorra"', 'did you mean "lora"')),
    ("tracking=wnb", ('tracking: no such choice "wnb"', 'did you mean "wandb"')),
    ("tracking.mode=on", ('tracking.mode: no such choice "on"', "offline", "online")),
    ("tracking.project=a/b", ("tracking.project: expected 1 to 128 characters without spaces", 'got "a/b"')),
    ("tracking.project=null", ("tracking.project: empty value (null); expected text",)),
    ("tracking=off tracking.mode=online", ("tracking.mode: unknown key",)),
    ("tracking.kind=trackio", ('tracking.kind: no such choice "trackio"',)),
    ("launch=slurmm", ('launch: no such choice "slurmm"',)),
    ("launch.kind=foo", ('launch.kind: no such choice "foo"',)),
    ("launch.device=foo", ('launch.device: expected auto, cpu, cuda or cuda:N, got "foo"',)),
    ("launch.device=cuda:x", ("launch.device: expected auto",)),
    ("launch.device=meta", ("launch.device: expected auto",)),
    ("launch.device=3", ("launch.device: expected auto, cpu, cuda or cuda:N, got 3", "a list of devices")),
    ("launch.device=[]", ("launch.device: expected a list of cpu, cuda or cuda:N, got an empty list",)),
    ("launch.device=[cpu,gpu:1]", ('launch.device: expected a list of cpu, cuda or cuda:N, got "gpu:1" in it',)),
    ("launch.device=[cuda:0,null]", ("launch.device: expected a list of cpu, cuda or cuda:N, got null in it",)),
    ("launch.device=[cuda:0,auto]", ("launch.device: auto stands for all devices by itself", "launch.device=auto")),
    ("launch.device=[cuda:1,cuda,cuda:0]", ("launch.device: names cuda:0 twice",)),
    ("launch.device=cuda:0,cuda:1", ("launch.device: ", "a list is written launch.device=[a,b]")),
    ("launch.cohort=sometimes", ('launch.cohort: expected auto, off or a number of seats >= 1, got "sometimes"',)),
    ("launch.cohort=true", ("launch.cohort: expected auto, off or a number of seats >= 1, got true",)),
    ("launch.cohort=0", ("launch.cohort: expected auto, off or a number of seats >= 1, got 0",)),
    ("launch.cohort=-4", ("launch.cohort: expected auto, off or a number of seats >= 1, got -4",)),
    ("launch.cohort=2.0", ("launch.cohort: expected auto, off or a number of seats >= 1, got 2.0",)),
    ("launch.cohort='4'", ('launch.cohort: expected auto, off or a number of seats >= 1, got "4"',)),
    ("launch.cohort=[4]", ("launch.cohort: expected auto, off or a number of seats >= 1, got [4]",)),
    ("launch.cohort=null", ("launch.cohort: empty value (null); expected auto, off or a number of seats >= 1",)),
    ("launch.cohort=", ('launch.cohort: empty value (""); expected auto, off or a number of seats >= 1',)),
    ("launch.cohort_size=4", ("launch.cohort_size: unknown key", "cohort")),
    ("launch.checkpoint_seconds=-1", ("launch.checkpoint_seconds: must be >= 0, got -1",)),
    ("launch.checkpoint_seconds=soon", ('launch.checkpoint_seconds: expected a number, got "soon"',)),
    ("launch.checkpoint_seconds=inf", ("launch.checkpoint_seconds: must be finite",)),
    ("launch.memory_fraction=0", ("launch.memory_fraction: must be > 0, got 0",)),
    ("launch.memory_fraction=80", ("launch.memory_fraction: must be <= 1, got 80",)),
    ("launch.memory_fraction=true", ("launch.memory_fraction: expected a number, got true",)),
    ("launch.retries=-1", ("launch.retries: must be >= 0, got -1",)),
    ("memory=big", ('memory: no such choice "big"',)),
    ("memory.style=trl", ('memory.style: no such choice "trl"', "own, hf, litgpt, litgpt_first")),
    ("memory.style=null", ("memory.style: empty value (null)",)),
    ("memory.on_overflow=ask", ('memory.on_overflow: no such choice "ask"', "refuse, try")),
    ("memory.device=h101", ('memory.device: no such device "h101"', 'did you mean "h100"', "24GiB")),
    ("memory.device=0.1GiB", ("memory.device: must be more than",)),
    ("memory.device=", ('memory.device: empty value ("")', "24GiB")),
    ("memory.device=true", ("memory.device: expected text, got true",)),
    ("memory.devices=h100", ("memory.devices: unknown key", 'did you mean "device"')),
    ("repeat=-1", ("repeat: must be >= 0, got -1",)),
    ("max_runs=0", ("max_runs: must be >= 1, got 0",)),
    ("max_runs=x", ('max_runs: expected an integer, got "x"',)),
    ("fail_fast=3", ("fail_fast: expected true or false, got 3",)),
    # the data section
    ("data=skils", ('data: no such choice "skils"', 'did you mean "skills"')),
    ("data.train_size=0", ("data.train_size: must be >= 1, got 0",)),
    ("data.max_length=0", ("data.max_length: must be >= 1, got 0",)),
    ("data.mixture.gcd=0", ("data.mixture.gcd: must be > 0, got 0",)),
    ("data.mixture.nope=1.0", ("data.mixture.nope: unknown key", "gcd")),
    ("++data.mixture.gdc=1.0", ('data.mixture.gdc: no such skill "gdc"', 'did you mean "gcd"')),
    ("data.package_version=0.0.1", ("data.package_version", "0.0.1")),
    ("data=jsonl", ("data.path: a value is needed: data.path=...",)),
    ("data=jsonl data.path=", ("data.path: empty value",)),
    ("data=jsonl data.path=null", ("data.path: empty value (null)",)),
    ("data=jsonl data.path=.", ("data.path: expected a file",)),
    ("data=jsonl data.path=/dev/null", ("data.path: expected a file",)),
    # evaluation
    ("evaluation.limit=0", ("evaluation.limit: must be >= 1, got 0",)),
    ("evaluation.limit=-1", ("evaluation.limit: must be >= 1, got -1",)),
    ("evaluation.num_fewshot=-1", ("evaluation.num_fewshot: must be >= 0, got -1",)),
    ("evaluation.batch_size=0", ("evaluation.batch_size: must be >= 1, got 0",)),
    ("evaluation.mirror=./nope", ("evaluation.mirror: no such folder", "nope")),
    ("evaluation.include_path=./nope", ("evaluation.include_path: no such folder", "nope")),
    ("evaluation.include_path=", ("evaluation.include_path: empty value",)),
]


@pytest.mark.parametrize(("line", "fragments"), OVERRIDES, ids=[line for line, _ in OVERRIDES])
def test_overrides(call: Call, line: str, fragments: tuple[str, ...]) -> None:
    check(call("plan", *TINY, *_split(line)), 2, *fragments)


def _split(line: str) -> list[str]:
    """Words of a line; a space after a colon or inside braces does not end one."""
    words: list[str] = []
    for word in line.split(" "):
        if words and words[-1].count("{") > words[-1].count("}"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


# What each method refuses before anything is loaded: what is typed, and fragments of the answer.
METHOD_OVERRIDES: list[tuple[str, tuple[str, ...]]] = [
    ("method=lora_pluss", ('method: no such choice "lora_pluss"', 'did you mean "lora_plus"')),
    ("method=moe", ('method: no such choice "moe"', "mola", "loramoe")),
    ("method.kind=lorra", ('method.kind: no such choice "lorra"', 'did you mean "lora"')),
    ("method=lora method.experts=4", ("method.experts: unknown key", "rank_factors")),
    ("method=mov method.expert=4", ("method.expert: unknown key", 'did you mean "experts"')),
    # ranks and rates by layer
    ("rank=5 method.rank_factors=[0.5,1]", ("method.rank_factors: rank 5 x 0.5 = 2.5 is no whole rank >= 1",)),
    ("rank=4 method.rank_factors=[0.1,1]", ("method.rank_factors: rank 4 x 0.1 = 0.4 is no whole rank >= 1",)),
    ("method.rank_factors=[0,1]", ("method.rank_factors.0: must be > 0, got 0",)),
    ("method.rank_factors=[nan]", ("method.rank_factors.0: must be finite, got nan",)),
    ("method.rank_factors=2", ("method.rank_factors: expected a list, got 2",)),
    ("method.rank_factors=[1,1,1]", ("method.rank_factors: 3 entries for a model of 2 layers; use at most as many",)),
    ("rank=32 method.rank_factors=[1,4]", ("method.rank_factors: rank 128 is beyond the hidden size 64",)),
    ("training.layer_rates=[1,1,1]", ("training.layer_rates: 3 entries for a model of 2 layers",)),
    ("training.layer_rates=[0]", ("training.layer_rates.0: must be > 0, got 0",)),
    ("method=lora_plus method.ratio=0", ("method.ratio: must be > 0, got 0",)),
    # adalora
    ("method=adalora rank=8 method.initial_rank=4", ("method.initial_rank: must be >= 8", "got 4")),
    ("method=adalora method.initial_share=0.5 method.final_share=0.5", ("method", "leave no steps", "must be < 1")),
    ("method=adalora training.max_steps=1", ("method: adalora with 1 steps", "train for more steps")),
    ("method=adalora method.interval=0", ("method.interval: must be >= 1, got 0",)),
    # weights that are trained themselves, or taken apart
    ("method=full quantization=nf4", ("quantization: nf4 weights cannot be trained", "method=full", "method=lora")),
    ("method=freeze quantization=fp4", ("quantization: fp4 weights cannot be trained", "method=freeze")),
    ("method=lisa quantization=int8", ("quantization: int8 weights cannot be trained", "method=lisa")),
    ("method=galore quantization=nf4", ("quantization: nf4 weights cannot be trained", "method=galore")),
    ("method=pissa quantization=nf4", ("quantization: method=pissa", "nf4", "method=lora")),
    ("method=olora quantization=int8", ("quantization: method=olora", "int8", "method=lora")),
    # freeze, lisa, galore
    ("method=freeze method.last_layers=0", ("method: nothing would be trained; expected last_layers >= 1",)),
    ("method=freeze method.last_layers=3", ("method.last_layers: must be <= 2, the layers of tiny_random, got 3",)),
    ("method=freeze method.last_layers=-1", ("method.last_layers: must be >= 0, got -1",)),
    ("method=freeze method.modules=[lm_heed]", ('method.modules: "lm_heed" matches no module', '"lm_head"')),
    ("method=lisa method.layers=3", ("method.layers: must be <= 2, the layers of tiny_random, got 3",)),
    ("method=lisa method.layers=-1", ("method.layers: must be >= 0, got -1",)),
    ("method=lisa method.interval=0", ("method.interval: must be >= 1, got 0",)),
    ("method=lisa method.probabilities=list method.weights=[1,0.5,0]", ("method.weights: ", "2 layers, got 3")),
    ("method=lisa method.probabilities=list method.weights=[1,2]", ("method.weights.1: must be <= 1, got 2",)),
    ("method=lisa method.weights=[1,0.5]", ("method: weights (a probability per layer) goes with probabilities=list",)),
    ("method=lisa method.probabilities=list", ("method: weights (a probability per layer)",)),
    ("method=lisa method.probabilities=from_norm_log", ("method: norm_log (two runs",)),
    ("method=lisa method.norm_log=[a,b]", ("method: norm_log (two runs", "probabilities=from_norm_log")),
    (
        "method=lisa method.probabilities=from_norm_log method.norm_log=[a,b]",
        ('method.norm_log: no run "a" under', 'method.norm_log: no run "b" under'),
    ),
    ("method=galore rank=33", ("rank: must be <= 32, the smaller side of model.layers.0.self_attn.k_proj, got 33",)),
    ("method=galore rank=65", ("rank: must be <= 64", "got 65")),
    ("method=galore optimizer=sophia", ("optimizer: sophia", "adamw")),
    ("method=galore target=[]", ("target: method=galore needs at least one module", "got none")),
    ("method=galore method.update_gap=0", ("method.update_gap: must be >= 1, got 0",)),
    ("method=galore method.side=top", ('method.side: no such choice "top"', "std", "left")),
    # experts
    ("method=mov method.experts=0", ("method.experts: must be >= 1, got 0",)),
    ("method=mov method.experts=[2,4]", ("method.experts: expected an integer",)),
    ("method=mov method.router_input=input", ('method.router_input: no such choice "input"', "site_input")),
    ("method=molora method.experts=0", ("method.experts: must be >= 1, got 0",)),
    ("method=mola method.experts=[]", ("method.experts: expected at least one entry, got an empty list",)),
    ("method=mola method.experts=[0,2]", ("method.experts.0: must be >= 1, got 0",)),
    ("method=mola method.experts=3", ("method.experts: expected a list, got 3",)),
    ("method=mola method.experts=[2,2,2]", ("method.experts: 3 entries for a model of 2 layers",)),
    ("method=mola", ("method.experts: 4 entries for a model of 2 layers",)),
    ("method=mola method.experts=[1,4]", ("method: top_k=2 is more than the 1 experts of a layer",)),
    ("method=mola method.experts=[2,4] method.top_k=0", ("method.top_k: must be >= 1, got 0",)),
    ("method=loramoe method.experts=5", ("method: experts=5 cannot be cut into two groups", "even number")),
    ("method=loramoe method.experts=0", ("method.experts: must be >= 1, got 0",)),
    ("method=loramoe method.delta=1.5", ("method.delta: must be <= 1, got 1.5",)),
    ("method=loramoe method.beta=-1", ("method.beta: must be >= 0, got -1",)),
    ("method=loramoe method.balance=cv", ('method.balance: no such choice "cv"', "variance_over_mean")),
    ("method=loramoe target=qv", ("target: method=loramoe", "target=mlp", "got query, value")),
    ("method=loramoe target=[mlp,query]", ("target: method=loramoe", "target=mlp")),
    ("method=loramoe data=skills", ("data: ", "data=skills_typed", "method.beta=0")),
    # sites inside the decoder layers
    ("method=ia3 target=head", ("target: method=ia3 works inside the decoder layers; take head out",)),
    ("method=mov target=[mlp,head]", ("target: method=mov works inside the decoder layers; take head out",)),
    ("method=molora target=[query,embedding]", ("target: method=molora", "take embedding out")),
    ("method=mola method.experts=[2,2] target=[head,embedding]", ("target: method=mola", "head and embedding")),
    ("method=pissa target=embedding", ("target: method=pissa", "embedding")),
    ("method=olora target=embedding", ("target: method=olora", "embedding")),
    ("method=adalora target=embedding", ("target: method=adalora", "embedding")),
    ("method=molora target=[lm_head]", ("target: ", "lm_head")),
    ("method=ia3 target=[lm_head]", ("target: ", "lm_head")),
    (
        "model.shape.family=gpt2 model.shape.num_kv_heads=4 target=qv",
        ("target: GPT-2 keeps query, key and value in one matrix (c_attn)", "got query, value"),
    ),
    # virtual tokens
    ("method=prompt_tuning method.virtual_tokens=0", ("method.virtual_tokens: must be >= 1, got 0",)),
    ("method=prompt_tuning method.virtual_tokens=1024", ("method.virtual_tokens: must be < 1024", "got 1024")),
    ("method=p_tuning method.virtual_tokens=2000", ("method.virtual_tokens: must be < 1024", "got 2000")),
    ("method=prefix_tuning method.virtual_tokens=1024", ("method.virtual_tokens: must be < 1024", "got 1024")),
    ("method=prompt_tuning method.init=text", ("method: init_text goes with init=text",)),
    ("method=prompt_tuning method.init_text=hello", ("method: init_text goes with init=text, and only with it",)),
    ("method=prompt_tuning method.init=text method.init_text=''", ("method.init_text: empty value",)),
    ("method=p_tuning method.encoder=gru", ('method.encoder: no such choice "gru"', "mlp", "lstm")),
    ("method=p_tuning method.encoder_hidden_size=0", ("method.encoder_hidden_size: must be >= 1, got 0",)),
    # bottlenecks
    ("method=bottleneck method.reduction_factor=0", ("method.reduction_factor: must be >= 1, got 0",)),
    ("method=bottleneck method.reduction_factor=65", ("method.reduction_factor: must be <= 64", "got 65")),
    ("method=bottleneck method.style=pfeifer", ('method.style: no such choice "pfeifer"', 'did you mean "pfeiffer"')),
    ("method=bottleneck method.scaling=0", ("method.scaling: must be > 0, got 0",)),
    # stages
    ("init_from=", ("init_from: empty value",)),
    ("init_from=nobody", ('init_from: no run "nobody" under', "the ledger is empty")),
    ("init_from=../x", ("init_from: not the name of a run",)),
    ("init_from=[a]", ("init_from: expected text",)),
    ("init_as=weight", ('init_as: no such choice "weight"', 'did you mean "weights"')),
    ("init_from=a method=base", ("init_from: method=base trains nothing",)),
    ("init_from=a method=full", ("init_as: method=full trains the model's own weights; use init_as=weights",)),
]


@pytest.mark.parametrize(("line", "fragments"), METHOD_OVERRIDES, ids=[line for line, _ in METHOD_OVERRIDES])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_methods(call: Call, command: str, line: str, fragments: tuple[str, ...]) -> None:
    check(call(command, *TINY, *_split(line)), 2, *fragments)


def test_every_method_refuses_something() -> None:
    named = {word.removeprefix("method=") for line, _ in METHOD_OVERRIDES for word in line.split() if "method=" in word}
    assert {kind for kind in METHODS if kind not in ("rslora", "dora", "lora")} <= named


SWEEPS: list[tuple[str, tuple[str, ...]]] = [
    ("learning_rate=", ("learning_rate: empty value",)),
    ("learning_rate=0.1,0.2,", ("learning_rate: trailing comma in learning_rate=0.1,0.2,",)),
    ("rank=range(0,1,0)", ("rank: range step is 0 in rank=range(0,1,0)",)),
    ("learning_rate=range(0.1,0.5,0)", ("range step is 0",)),
    ("learning_rate=range(0.1,inf,1)", ("learning_rate: a range must be finite",)),
    ("learning_rate=interval(0,1)", ("an interval has no points",)),
    ("seed=range(0,1000000)", ("max_runs: 1,000,000 runs; limit 10,000; pass max_runs=1000000",)),
    ("seed=range(0,1000) rank=range(1,1001)", ("1,000,000 runs; limit 10,000",)),
    ("seed=shuffle(range(0,1000000000000))", ("1,000,000,000,000 runs",)),
    ("learning_rate=range(0.5,1.5,1e-9)", ("000,000", "runs; limit 10,000")),
    ("seed=0,1,2 max_runs=2", ("max_runs: 3 runs; limit 2; pass max_runs=3",)),
    ("seed=range(0,0)", ("no points to run: seed=range(0,0) is empty",)),
    ("rank=4,8 seed=range(5,1)", ("no points to run: seed=range(5,1) is empty",)),
    ("target=glob(z*)", ("no points to run: target=glob(z*) is empty",)),
    ("rank=4,8 seed=0 rank=2", ("rank: given twice: rank=4,8 and rank=2",)),
    ("max_runs=1,2", ("max_runs: must be the same for all points of a sweep, got 1 and 2",)),
    ("root=a,b", ("root: must be the same for all points",)),
    ("launch.cohort=auto,off", ("launch.cohort: must be the same for all points of a sweep, got auto and off",)),
    ("launch.device=cuda:0,cuda:1", ("launch.device: must be the same for all points of a sweep",)),
    ("max_runs=0 rank=4,8", ("max_runs: must be >= 1, got 0",)),
    ("max_runs=x rank=4,8", ('max_runs: expected an integer, got "x"',)),
    ("optimizer=adam,sgd", ('optimizer: no such choice "adam"',)),
    ("optimizer=[adam],[sgd]", ('optimizer: no such choice "adam"',)),
    ("tag=${nope} seed=0,1", ("tag: ", "'nope' not found")),
    ("tag=${study} study=${tag}", ("study -> tag -> study",)),
    ("tag=${oc.env:NO_SUCH_VARIABLE},b", ("NO_SUCH_VARIABLE is not set",)),
    ("hydra.sweep.dir=../.. seed=0,1", ("hydra.sweep.dir: not open to users",)),
    ("hydra.sweeper.params.rank=0,8", ("settings of Hydra cannot be swept", "hydra.sweeper.params.rank='2,4'")),
    ("+hydra.sweeper.params.rank='0,8'", ("rank: must be >= 1, got 0",)),
    ("+hydra.sweeper.params.rank='range(0,0)'", ("rank=range(0,0) is empty",)),
    ("lrr=3,4", ("lrr: unknown key", 'did you mean "learning_rate"')),
    ("+lrr=3", ("lrr: unknown key",)),
    ("model=tiny_random,nope rank=4", ("model: given twice",)),
    ("study=nope", ('study: no study "nope"', "first_look")),
    ("study=frist_look", ('did you mean "first_look"',)),
    ("study=nope,nada", ('no study "nope"', 'no study "nada"')),
    ("study=../../etc", ("study: expected 1 to 80 of A-Z a-z 0-9",)),
    ("study=/etc/passwd", ("study: expected 1 to 80",)),
    ("study=", ("study: expected 1 to 80",)),
    ("study=3", ('study: no study "3"',)),
    ("study=first_look max_runs=3", ("runs; limit 3; pass max_runs=",)),
    ("study=first_look max_runs=x", ('max_runs: expected an integer, got "x"',)),
]


@pytest.mark.parametrize(("line", "fragments"), SWEEPS, ids=[line for line, _ in SWEEPS])
def test_sweeps(call: Call, line: str, fragments: tuple[str, ...]) -> None:
    check(call("plan", "-m", *TINY, *_split(line)), 2, *fragments)


COMMANDS: list[tuple[tuple[str, ...], int, tuple[str, ...]]] = [
    (("rnu",), 2, ('unknown command "rnu"', 'did you mean "run"')),
    (("frobnicate",), 2, ('unknown command "frobnicate"', "plan")),
    (("run", "--nope"), 2, ("--nope: unknown flag", "--multirun")),
    (("plan", "--jsn"), 2, ("--jsn: unknown flag", 'did you mean "--json"')),
    (("run", "-cn", "nope"), 2, ('--config-name: no configuration "nope"', "config")),
    (("run", "-cn"), 2, ("--config-name", "expected one argument")),
    (("run", "--cfg", "nope"), 2, ("--cfg", "'nope'", "job")),
    (("run", "-m", "--cfg", "job"), 2, ("--cfg: shows one configuration", "plan -m")),
    (("run", "--resolve"), 2, ("--resolve: needs --cfg",)),
    (("run", "--shell-completion"), 2, ("--shell-completion: needs one of install=",)),
    (("run", "--run", "--multirun"), 2, ("only one of --run, --multirun",)),
    (("run", "--config-dir", "nope"), 2, ('--config-dir: no such folder: "nope"',)),
    (("run", "--config-path", "nope"), 2, ('--config-path: no such folder: "nope"',)),
    (("run", "--experimental-rerun", "x.pickle"), 2, ("--experimental-rerun: reads a pickle",)),
    (("runs", "--root", "nowhere"), 2, ("--root: no ledger in nowhere",)),
    (("runs", "--format", "xml"), 2, ("--format", "'xml'")),
    (("compare", "a", "b", "--root", "nowhere"), 2, ("--root: no ledger in nowhere",)),
    (("compare", "a"), 2, ("run",)),
    (("generate", "a", "b", "--root", "nowhere"), 2, ("--root: no ledger in nowhere",)),
    (("generate", "a", "b", "--max-new-tokens", "0"), 2, ("--max-new-tokens: must be >= 1, got 0",)),
    (("merge", "a", "--output", "out", "--root", "nowhere"), 2, ("--root: no ledger in nowhere",)),
    (
        ("fetch", "model:tiny_randm", "data:skill"),
        2,
        ('no model "tiny_randm"', "mean model:tiny_random", "data:skills"),
    ),
    (("fetch", "rnk=3"), 2, ("rnk: unknown key",)),
    (("doctor", "--study", "first_lok"), 2, ('no study "first_lok"', 'did you mean "first_look"')),
    (("doctor", "rnk=3"), 2, ("rnk: unknown key",)),
    (("plan", "model=./missing"), 2, ('model.path: no such folder: "missing"',)),
    (("plan", "model=/no/such/place"), 2, ('model.path: no such folder: "/no/such/place"',)),
    (("plan", "model=nope"), 2, ('model: no such choice "nope"', "tiny_random")),
    (("plan", "model=gpt-2"), 2, ('model: no such choice "gpt-2"', 'did you mean "gpt2"')),
    (("plan", "model=folder"), 2, ("model.path: a value is needed: model.path=...",)),
    (("plan", "model=hub"), 2, ("model.repo: a value is needed: model.repo=...",)),
    (("plan", "model=hub", "model.repo="), 2, ("model.repo: empty value",)),
    (("plan", "model=folder", "model.path="), 2, ("model.path: empty value",)),
    (("plan", "~model"), 2, ("model: a choice cannot be taken out",)),
    (("plan", "model=smollm2_135m", "target=head"), 2, ("target: head shares its weight", "tie_embeddings=false")),
    (("plan", "model=smollm2_135m", "target=embedding"), 2, ("target: embedding shares its weight",)),
    (("plan", "model=smollm2_135m", "target=[lm_head]"), 2, ("target: lm_head", "share one weight")),
    (("plan", "model=gpt2", "target=qv"), 2, ("target: GPT-2 keeps query, key and value in one matrix",)),
    (("plan", "model=gpt2", "target=[q_proj]"), 2, ('"q_proj" matches no module', "c_attn")),
    (("plan", "study=first_look"), 2, ("study: a study is a sweep: lora-lab run -m study=first_look",)),
    (("run", *TINY, "launch.device=cuda:99"), 4, ("launch.device: cuda:99", "launch.device=cpu")),
    (("run", *TINY, "launch.device=foo"), 2, ("launch.device: expected auto",)),
    (("run", *TINY, "root=/proc/lab"), 4, ("/proc/lab",)),
    # 103, 106
    (("plan", TINY[0], "evaluation.tasks=[nope_task_x]"), 2, ('no such task "nope_task_x"', "skills_trained")),
    (("plan", TINY[0], "evaluation.tasks=[hellaswagg]"), 2, ('did you mean "hellaswag"',)),
    (("plan", TINY[0], "evaluation.tasks=[humaneval]"), 2, ("humaneval runs code",)),
    (("run", TINY[0], "evaluation.tasks=[humaneval,mbpp]"), 2, ("humaneval runs code", "mbpp runs code")),
    (("plan", TINY[0], "evaluation.tasks=[prose_completion,prose_completion]"), 2, ("is given twice",)),
    (("plan", TINY[0], "evaluation.tasks=null"), 2, ("evaluation.tasks: empty value (null); expected a list",)),
    (("plan", TINY[0], "evaluation.tasks=prose_completion"), 2, ("evaluation.tasks: expected a list",)),
    (("plan", TINY[0], "evaluation.tasks=[prose_completion]", "evaluation.num_fewshot=3"), 2, ("num_fewshot: got 3",)),
    (
        ("plan", TINY[0], "evaluation.tasks=[prose_completion]", "evaluation.prose.completion_documents=10000000"),
        2,
        ("evaluation.prose.completion_documents", "10000000"),
    ),
]


@pytest.mark.parametrize(("arguments", "code", "fragments"), COMMANDS, ids=[" ".join(case[0]) for case in COMMANDS])
def test_commands(call: Call, arguments: tuple[str, ...], code: int, fragments: tuple[str, ...]) -> None:
    if arguments[-1].startswith("evaluation.tasks"):
        call("plan", TINY[0], "evaluation.tasks=[hellaswag]")  # lm-eval's names are read once per cache
    check(call(*arguments), code, *fragments)


NAMES = ["../../etc", "/etc/x", ".", "..", "", "x" * 300, "a\nb", "a\0b", "-rf", ".hidden", "a b", "a/b", "${x", "ü"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_are_labels(call: Call, tmp_path: Path, name: str) -> None:
    """Row 29."""
    answer = call("plan", *TINY, f"tag='{name}'")
    check(answer, 2, "tag")
    assert len(answer.err) < 400
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["a", "A.b-c_1", "x" * 80])
def test_good_names_are_taken(call: Call, name: str) -> None:
    assert call("plan", *TINY, f"tag={name}").code == 0


def test_equal_points_are_one_trial(call: Call) -> None:
    answer = call("plan", "-m", *TINY, "rank=8,8")
    assert answer.code == 0
    assert "2 trials: 1 new, 0 done, 1 duplicate" in answer.out


def test_flags_may_stand_anywhere(call: Call) -> None:
    answer = call("plan", TINY[0], "-m", "rank=4,8", "--json", TINY[1])
    assert answer.code == 0, answer.err
    assert len(json.loads(answer.out)) == 2


def test_all_problems_of_a_command_together(call: Call, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": 1}\n')
    answer = call(
        "plan",
        "model=tiny_random",
        "lrr=1",
        "rank=0",
        "dropout=2",
        "optimizer=adam",
        "method=full",
        "quantization=nf4",
        "evaluation.tasks=[humaneval]",
        "evaluation.limit=3",
        "data=jsonl",
        "data.path=rows.jsonl",
        "tag=a b",
        "seed=[1",
        "hydra.run.dir=x",
        "training.epochs=3",
        "max_runs=0",
    )
    check(
        answer,
        2,
        "lrr: unknown key",
        "rank: must be >= 1",
        "dropout: must be < 1",
        'optimizer: no such choice "adam"',
        "quantization: nf4 weights cannot be trained",
        "humaneval runs code",
        'rows.jsonl:1: "text" must be text',
        "tag: expected 1 to 80",
        'seed: unclosed "["',
        "hydra.run.dir: not open",
        "training: set exactly one of epochs",
        "max_runs: must be >= 1",
    )
    assert len(answer.err.splitlines()) == 12, "each once, and nothing that only follows from another"


def test_a_sweep_names_every_bad_point_first(call: Call) -> None:
    answer = call("run", "-m", *TINY, "rank=0,8,65", "seed=-1,2", "optimizer=adam,sgd")
    check(answer, 2, "rank: must be >= 1, got 0", "seed: must be 0 to", 'optimizer: no such choice "adam"')
    check(call("run", "-m", *TINY, "rank=8,65", "seed=0,1"), 2, "rank: must be <= 64", "got 65")


def test_another_launcher_checks_every_point_first(call: Call) -> None:
    check(call("run", "-m", "hydra/launcher=basic", *TINY, "rank=8,-3"), 2, "rank: must be >= 1, got -3")


# What an environment variable holds is never printed.

SECRET = "hf_" + "SeCrEt'\"\\" * 12


@pytest.mark.parametrize(
    "line",
    [
        "tag=${oc.env:TOKEN_OF_MINE}",
        "rank=${oc.env:TOKEN_OF_MINE}",
        "seed=${rank} rank=${oc.env:TOKEN_OF_MINE}",
        "tag=${oc.decode:${oc.env:TOKEN_OF_MINE}}",
        "tag=${${oc.env:TOKEN_OF_MINE}}",
        "tag=${oc.env:NO_SUCH_VARIABLE}${oc.env:TOKEN_OF_MINE}",
        "training.precision=${oc.env:TOKEN_OF_MINE}",
        "data=jsonl data.path=${oc.env:TOKEN_OF_MINE}",
        "model=${oc.env:TOKEN_OF_MINE}",
        "evaluation.tasks=['${oc.env:TOKEN_OF_MINE}']",
        "target.modules=['${oc.env:TOKEN_OF_MINE}']",
        "launch.device=${oc.env:TOKEN_OF_MINE}",
    ],
)
@pytest.mark.parametrize("multirun", [(), ("-m",)], ids=["run", "multirun"])
def test_values_of_the_environment_are_not_printed(
    call: Call, monkeypatch: pytest.MonkeyPatch, line: str, multirun: tuple[str, ...]
) -> None:
    monkeypatch.setenv("TOKEN_OF_MINE", SECRET)
    own = set(_split(line))
    answer = call("plan", *multirun, *(one for one in TINY if one.split("=")[0] not in line), *own)
    check(answer, 2, "TOKEN_OF_MINE")
    said = answer.err + answer.out
    assert not any(SECRET[start : start + 8] in said for start in range(len(SECRET) - 8))


def test_a_path_from_the_environment_is_told_as_it_was_written(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret-place").mkdir()
    (tmp_path / "secret-place" / "rows.jsonl").write_text('{"text": 1}\n')
    monkeypatch.setenv("FOLDER_OF_MINE", str(tmp_path / "secret-place"))
    answer = call("plan", *TINY, "data=jsonl", "data.path=${oc.env:FOLDER_OF_MINE}/rows.jsonl")
    check(answer, 2, '${oc.env:FOLDER_OF_MINE}/rows.jsonl:1: "text" must be text')
    assert "secret-place" not in answer.err


def test_a_good_value_of_the_environment_is_used(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAME_OF_MINE", "mine")
    assert call("plan", *TINY, "tag=${oc.env:NAME_OF_MINE}").code == 0


# Study files: `file:line:column`.

STUDY = "question: Does it?\nbase: {model: tiny_random}\n"
STUDIES: list[tuple[str | bytes, str, tuple[str, ...]]] = [
    ("question: a\n\tgrids: []\n", ":2:1:", ("cannot start any token",)),
    ("question: a\nquestion: b\ngrids: [{rank: [1]}]\n", ":2:1:", ('key "question" is given twice',)),
    ("question: !!python/object/apply:os.system [id]\n", ":1:11:", ("the tag !!python",)),
    (STUDY + "a: &a [1,1]\nb: &b [*a,*a]\ngrids: [{rank: *b}]\n", ":4:8:", ("aliases (*name) are not taken",)),
    (STUDY + "gird: [{rank: [1]}]\n", ":1:1:", ("gird: unknown key", 'did you mean "grids"')),
    (STUDY + "grids: [{zip: {rank: [1, 2], alpha: [1]}}]\n", ":3:9:", ("zipped axes need equally many", "rank has 2")),
    (STUDY + "grids: [{rank: 8}]\n", ":3:16:", ("expected a list of values",)),
    (STUDY + "grids: [{rank: []}]\n", ":3:16:", ("has no values",)),
    (STUDY + "grids: []\n", ":3:8:", ("no grids, so no points",)),
    (STUDY + "grids: [{rankk: [1]}]\n", ":3:18:", ("rankk: unknown key", 'did you mean "rank"')),
    (STUDY + "grids:\n  - {rank: [8]}\n  - {rank: [8, 0]}\n", ":5:16:", ("rank: must be >= 1, got 0",)),
    (STUDY + "grids: [{optimizer: [sgd, adam]}]\n", ":3:27:", ('optimizer: no such choice "adam"',)),
    (STUDY + "grids: [{target: [qv, [q_proj, typo]]}]\n", ":3:23:", ('"typo" matches no module',)),
    (STUDY + "grids: [{zip: {rank: [2, 65], alpha: [1, 2]}}]\n", ":3:26:", ("rank: must be <= 64",)),
    (STUDY + "grids: [{rank: [2]}]\nseeds: [0, -1]\n", ":4:12:", ("must be 0 to 4294967295, got -1",)),
    ("question: a\nbase: {modle: gpt2}\ngrids: [{rank: [2]}]\n", ":2:15:", ('did you mean "model"',)),
    ("question: a\nbase: {model: gpt-2}\ngrids: [{rank: [2]}]\n", ":2:15:", ('no such choice "gpt-2"',)),
    (STUDY + "grids: [{rank: [2]}]\nmetrics: [heldout/loss, hedlout/acc]\n", ":4:25:", ('did you mean "heldout"',)),
    (STUDY + "grids: [{rank: [2]}]\nmetrics: heldout/loss\n", ":4:10:", ("metrics: expected a list",)),
    (STUDY + "grids: [{hydra.run.dir: [/tmp]}]\n", ":3:26:", ("hydra.run.dir: unknown key",)),
    (STUDY + "grids: [{model._target_: [os.system]}]\n", ":3:27:", ("model._target_: unknown key",)),
    ("question: ''\ngrids: [{rank: [2]}]\n", ":1:11:", ("question: empty",)),
    ("- a\n", "", ("expected a mapping of keys to values, got a list",)),
    ("", "", ("expected a mapping of keys to values, got an empty file",)),
    ("question: a\ngrids: [{rank: [2]}]\n".encode("utf-16"), "", ("UTF-16", "save it as UTF-8")),
    (b"question: \xff\n", ":1:", ("not UTF-8",)),
    ("question: " + "x" * 1_100_000, "", ("larger than",)),
    ("a: " + "[" * 200 + "]" * 200, ":1:", ("nested more than",)),
]


@pytest.mark.parametrize(("text", "place", "fragments"), STUDIES, ids=[case[2][0] for case in STUDIES])
def test_study_files(call: Call, tmp_path: Path, text: str | bytes, place: str, fragments: tuple[str, ...]) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    check(call("plan", "-m", "study=mine", TINY[1]), 2, f"mine.yaml{place}", *fragments)


def test_a_study_file_with_bom_and_crlf(call: Call, tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    text = (STUDY + "grids: [{rank: [2, 4]}]\n").replace("\n", "\r\n")
    (tmp_path / "sweeps" / "mine.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    answer = call("plan", "-m", "study=mine", TINY[1])
    assert answer.code == 0 and "2 trials: 2 new" in answer.out


def test_every_bad_line_of_a_study_at_once(call: Call, tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    text = STUDY + "grids:\n  - {rank: [0, 8], dropout: [0.0, 2.0]}\n  - {optimizer: [adam]}\nmetrics: [nope/acc]\n"
    (tmp_path / "sweeps" / "mine.yaml").write_text(text)
    answer = call("run", "-m", "study=mine", TINY[1], "learning_rate=0")
    check(answer, 2, "mine.yaml:4:", "mine.yaml:5:", "mine.yaml:6:", "error: learning_rate: must be > 0")
    assert len(answer.err.splitlines()) == 5


# Configuration files of the user's own.

OWN_CONFIGS = {
    "tabs": ("rank: 1\n\tseed: 2\n", ("own.yaml:2:1",)),
    "twice": ("rank: 1\nrank: 2\n", ("own.yaml:2:1", 'key "rank" is given twice')),
    "object": ("rank: !!python/object/apply:os.system [id]\n", ("own.yaml:1:7", "the tag !!python")),
    "bomb": ("a: &a [1,1]\nb: &b [*a,*a]\n", ("own.yaml:2:8", "aliases")),
    "writes elsewhere": ("defaults: [config]\nhydra: {run: {dir: /tmp/x}}\n", ("hydra.run: not open to users",)),
    "logging": (
        "defaults: [config]\nhydra: {job_logging: {handlers: {x: {(): os.system}}}}\n",
        ("hydra.job_logging: not open to users",),
    ),
    "target": (
        "defaults: [config]\nhydra: {launcher: {_target_: os.system}}\n",
        ("hydra.launcher._target_: configuration holds values only",),
    ),
    "target below": ("defaults: [config]\n+x: 1\nmodel: {_target_: os.system}\n", ("model._target_: unknown key",)),
    "unknown key": ("defaults: [config, _self_]\nlrr: 3\n", ("lrr: unknown key",)),
    "unknown choice": ("defaults:\n  - config\n  - override model: nope\n", ("nope",)),
}


@pytest.mark.parametrize("name", OWN_CONFIGS)
def test_configuration_files(call: Call, tmp_path: Path, name: str) -> None:
    text, fragments = OWN_CONFIGS[name]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own.yaml").write_text(text)
    check(call("plan", "-cd", "own", "-cn", "own", *TINY, "cache=c"), 2, *fragments)


# Model folders.

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 260,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
FOLDERS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "no config": ({"x.txt": ""}, ("model.path: no such file", "config.json")),
    "no weights": ({"config.json": json.dumps(CONFIG)}, ("model.path", "no *.safetensors file")),
    "not json": ({"config.json": "{"}, ("config.json: not valid JSON",)),
    "a list": ({"config.json": "[]"}, ("config.json: expected a JSON object",)),
    "auto_map": ({"config.json": json.dumps({**CONFIG, "auto_map": {}})}, ('key "auto_map"', "is refused")),
    "nested": (
        {"config.json": json.dumps({**CONFIG, "text_config": {"trust_remote_code": True}})},
        ('key "trust_remote_code"',),
    ),
    "pickle": ({"config.json": json.dumps(CONFIG), "pytorch_model.bin": "x"}, ("no *.safetensors file",)),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_model_folders(call: Call, tmp_path: Path, name: str) -> None:
    files, fragments = FOLDERS[name]
    (tmp_path / "model").mkdir()
    for file, text in files.items():
        (tmp_path / "model" / file).write_text(text)
    check(call("plan", "model=./model", TINY[1]), 2, *fragments)
    check(call("run", "model=folder", "model.path=model", TINY[1]), 2, *fragments)


def test_rules_about_the_shape_hold_for_a_folder(call: Call, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model" / "model.safetensors").write_text("x")
    check(call("plan", "model=./model", TINY[1], "target=head"), 2, "target: head shares its weight")
    check(call("plan", "model=./model", TINY[1], "rank=65"), 2, "rank: must be <= 64")


def test_a_hub_model_is_planned_without_the_hub(call: Call) -> None:
    assert call("plan", "model=org/name", TINY[1]).code == 0


# Data files (3b).

GOOD = '{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n'
TEXT = '{"text": "a"}\n'
DATA: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("rows.jsonl: 0 records",)),
    "only blank lines": (b"\n\n", ("rows.jsonl: 0 records",)),
    "last line cut": (TEXT.encode() * 3 + b'{"text": "ab', ("rows.jsonl:4: incomplete line (file cut off?)",)),
    "column missing": (b'{"text": "a"}\n{"txt": "b"}\n', ('rows.jsonl:2: "text" missing; found "txt"',)),
    "a number": (b'{"text": "a"}\n{"text": 1}\n', ('rows.jsonl:2: "text" must be text, got the number 1',)),
    "null": (b'{"text": null}\n', ('rows.jsonl:1: "text" must be text, got null',)),
    "nan": (b'{"text": "a"}\n{"text": NaN}\n', ('rows.jsonl:2: "text" must be text, got the number nan',)),
    "large integer": (b'{"text": 1180591620717411303424}\n', ("rows.jsonl:1", "1180591620717411303424")),
    "empty answer": (b'{"instruction": "a", "output": " "}\n', ('rows.jsonl:1: "output" is empty',)),
    "nul": (b'{"text": "a\\u0000b"}\n', ("rows.jsonl:1", "control character U+0000")),
    "raw nul": (b'{"text": "a\0b"}\n', ("rows.jsonl:1: control character U+0000",)),
    "surrogate": (b'{"text": "a\\ud800"}\n', ("rows.jsonl:1", "lone surrogate U+D800")),
    "key twice": (b'{"text": "a", "text": "b"}\n', ('rows.jsonl:1: key "text" given twice',)),
    "html": (b"<!DOCTYPE html><html>", ("rows.jsonl:1: looks like an HTML page (failed download?)",)),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", ("rows.jsonl:1: is a git-LFS pointer",)),
    "an array": (b'[{"text": "a"}]\n', ("rows.jsonl:1: expected one JSON object per line, got a list",)),
    "text": (b"hello\n", ("rows.jsonl:1: not valid JSON",)),
    "latin 1": (b'{"text": "\xe9"}\n', ("rows.jsonl:1: not UTF-8", "0xE9")),
    "utf-16": ('{"text": "a"}\n'.encode("utf-16"), ("rows.jsonl:1: is UTF-16 text",)),
    "parquet": (b"PAR1" + b"\0" * 100, ("rows.jsonl:1: is a parquet file",)),
    "zip": (b"PK\x03\x04" + b"\0" * 100, ("rows.jsonl:1: is a zip file",)),
    "cut gzip": (gzip.compress(GOOD.encode() * 100)[:-20], ("rows.jsonl: compressed file is cut off",)),
    "damaged gzip": (b"\x1f\x8b" + b"x" * 40, ("rows.jsonl: compressed file is damaged",)),
    "gzip bomb": (gzip.compress(b"0" * 60_000_000), ("rows.jsonl: decompresses to more than 200 times its size",)),
    "unknown columns": (b'{"question": "a", "answer": "b"}\n', ("rows.jsonl:1: columns of no known format",)),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", ("rows.jsonl:1", "nested too deeply")),
    "too few to hold out": (GOOD.encode(), ("heldout_size (100) must be smaller than the number of rows (2)",)),
}


@pytest.mark.parametrize("name", DATA)
def test_data_files(call: Call, tmp_path: Path, name: str) -> None:
    content, fragments = DATA[name]
    (tmp_path / "rows.jsonl").write_bytes(content)
    check(call("run", *TINY, "data=jsonl", "data.path=rows.jsonl"), 2, *fragments)


def test_missing_data_files_name_the_nearest(call: Call, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(GOOD)
    answer = call("plan", *TINY, "data=jsonl", "data.path=trian.jsonl", "data.heldout_path=nowhere/x.jsonl")
    check(answer, 2, 'data.path: no such file: "trian.jsonl"', 'did you mean "train.jsonl"', "data.heldout_path")


def test_problems_of_both_files_and_a_shared_row(call: Call, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(TEXT + '{"text": 1}\n')
    (tmp_path / "held.jsonl").write_text('{"text": 2}\n')
    line = ("plan", *TINY, "data=jsonl", "data.path=train.jsonl", "data.heldout_path=held.jsonl")
    check(call(*line), 2, "train.jsonl:2", "held.jsonl:1")
    (tmp_path / "train.jsonl").write_text(TEXT)
    (tmp_path / "held.jsonl").write_text(TEXT)
    check(call(*line), 2, "train.jsonl:1: also a held-out row (held.jsonl:1)")


def test_good_data_files_pass(call: Call, tmp_path: Path) -> None:
    """Row 59 (BOM), CRLF, row 73 (a 2 MB line), row 76: one row is enough; row 58: copies are counted."""
    lines = [b'{"text": "a"}\r\n', b'{"text": "' + b"x" * 2_000_000 + b'"}\r\n', b'{"text": "a"}\r\n']
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    (tmp_path / "held.jsonl").write_text('{"text": "z"}')
    line = (*TINY, "data=jsonl", "data.path=train.jsonl", "data.heldout_path=held.jsonl")
    answer = call("plan", *line, "--json")
    assert answer.code == 0
    assert json.loads(answer.out)[0]["train_rows"] == 3
    with pytest.raises(WeightsLoadedError):
        call("run", *line)


def test_copies_are_counted_before_a_run(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").write_text(TEXT * 3)
    (tmp_path / "held.jsonl").write_text('{"text": "z"}')
    with pytest.raises(WeightsLoadedError):
        call("run", *TINY, "data=jsonl", "data.path=train.jsonl", "data.heldout_path=held.jsonl")
    err = capsys.readouterr().err
    assert err.count("train.jsonl: 2 of 3 training rows repeat an earlier row") == 1
    assert err.count("held.jsonl: 1 rows, fewer than heldout_size (100)") == 1


def test_a_file_that_changes_during_the_sweep(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 77: the run is refused, not mixed; the model is never loaded."""
    (tmp_path / "train.jsonl").write_text(TEXT)
    (tmp_path / "held.jsonl").write_text('{"text": "z"}')

    def plan_then_change(request: Any) -> Any:
        plan = make_plan(request)
        (tmp_path / "train.jsonl").write_text('{"text": "other"}\n')
        return plan

    monkeypatch.setattr(session, "make_plan", plan_then_change)
    line = (*TINY, "data=jsonl", "data.path=train.jsonl", "data.heldout_path=held.jsonl")
    assert call("run", *line).code == 3
    (record,) = Ledger(tmp_path / "lab").runs()
    assert record.result is not None and "data: changed since the sweep was planned" in str(record.result.reason)


# Tasks of the user's own (107), and the mirror.


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("task: mine\nprocess_docs: !function evil.f\n", ("mine.yaml", "!function", "refused")),
        ("task: mine\nunsafe_code: true\n", ("mine.yaml", '"unsafe_code" is refused')),
        ("task: mine\nclass: !function evil.C\n", ("mine.yaml", "refused")),
        ("task: mine\ninclude: ../outside.yaml\n", ("mine.yaml", "outside.yaml")),
        ("task: prose_completion\n", ("mine.yaml", "already the name of a task")),
        ("task: mine\n\tx: 1\n", ("mine.yaml:2",)),
    ],
    ids=["function", "unsafe", "class", "outside", "taken name", "tab"],
)
def test_task_files_hold_no_code(call: Call, tmp_path: Path, text: str, fragments: tuple[str, ...]) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "outside.yaml").write_text("task: x\n")
    (tmp_path / "tasks" / "evil.py").write_text("open('ran', 'w').close()\ndef f(docs): return docs\n")
    (tmp_path / "tasks" / "mine.yaml").write_text(text)
    call("plan", TINY[0], "evaluation.tasks=[hellaswag]")
    answer = call("plan", TINY[0], "evaluation.tasks=[mine]", "evaluation.include_path=tasks")
    check(answer, 2, *fragments)
    assert not (tmp_path / "ran").exists()


# The ledger folder (109).


def test_root_is_a_file(call: Call, tmp_path: Path) -> None:
    (tmp_path / "lab").write_text("mine")
    check(call("run", *TINY), 4, "lab: root is a file; expected a folder")
    check(call("plan", *TINY), 4, "lab: root is a file")
    check(call("runs"), 2, "--root: no ledger in lab")
    assert (tmp_path / "lab").read_text() == "mine"


def test_runs_is_a_file(call: Call, tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "runs").write_text("mine")
    check(call("run", *TINY), 4, "runs")
    assert (tmp_path / "lab" / "runs").read_text() == "mine"


def test_a_root_that_may_not_be_written(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First its folders cannot be made, then they are there and cannot be written into."""

    def refusing(usual: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.absolute().is_relative_to(tmp_path / "lab"):
                raise OSError(30, "Read-only file system", str(path))
            return usual(path, *arguments, **options)

        return attempt

    monkeypatch.setattr(Path, "mkdir", refusing(Path.mkdir))
    check(call("run", *TINY), 4, "lab/runs: Read-only file system")
    os.makedirs(tmp_path / "lab" / "runs")  # noqa: PTH103 - Path.mkdir refuses
    monkeypatch.setattr(Path, "write_bytes", refusing(Path.write_bytes))
    check(call("run", *TINY), 4, "lab/runs: Read-only file system")


@pytest.fixture
def one_run(call: Call, tmp_path: Path) -> Path:
    """The folder of a run that was begun; its result is written by the test."""
    with pytest.raises(WeightsLoadedError):
        call("run", *TINY)
    (folder,) = (tmp_path / "lab" / "runs").glob("*/")
    return folder


def test_a_newer_result_is_left_alone(call: Call, one_run: Path) -> None:
    write_json(one_run / "result.json", {"schema_version": RESULT_SCHEMA_VERSION + 1})
    check(call("run", *TINY), 2, "result.json", "written by a newer lora-lab", "update lora-lab")
    check(call("run", "-m", *TINY, "seed=5,0"), 2, "written by a newer lora-lab")
    answer = call("runs")
    assert answer.code == 0 and "NEWER" in answer.out
    assert call("plan", *TINY).code == 0


DAMAGED = (b"", b"{", b"[]", b"\xff\xfe", b'{"schema_version": 1}', b'{"a": NaN}')


@pytest.mark.parametrize("file", ["result.json", "trial.json"])
@pytest.mark.parametrize("content", mostly_slow(DAMAGED, keep=(b"{", b'{"a": NaN}')), ids=repr)
def test_damaged_files_are_shown_and_kept(call: Call, one_run: Path, file: str, content: bytes) -> None:
    (one_run / file).write_bytes(content)
    answer = call("runs")
    assert answer.code == 0 and "DAMAGED" in answer.out
    assert call("plan", *TINY).code == 0
    with pytest.raises(WeightsLoadedError):  # such a run is tried again
        call("run", *TINY)
    assert (one_run / "attempts" / "1" / file).read_bytes() == content, "nothing is lost"


def test_damaged_runs_have_no_model(call: Call, one_run: Path) -> None:
    (one_run / "trial.json").write_bytes(b"{")
    for command in (("generate", one_run.name, "hello"), ("merge", one_run.name, "--output", "out")):
        check(call(*command), 2, "trial.json")


def test_names_of_runs(call: Call, one_run: Path) -> None:
    check(call("compare", one_run.name, "lora-r9"), 2, 'run: no run "lora-r9"', "lora-r8-qv-s0")
    check(call("compare", "../../etc", one_run.name), 2, "not the name of a run")
    check(call("compare", "", one_run.name), 2, "not the name of a run")
    check(call("generate", "nope", "hello"), 2, 'run: no run "nope"')
    check(call("runs", "--status", "DONE"), 2, '--status: no such status "DONE"', "COMPLETED")
    check(call("runs", "--study", "../x"), 2, '--study: no study "../x"')
    check(call("runs", "--format", "parquet"), 2, "--output")
    check(call("merge", one_run.name, "--output", "."), 2, "exists already")
    check(call("merge", one_run.name, "--output", "out"), 2, one_run.name)


def test_a_damaged_list_of_a_study(call: Call, one_run: Path) -> None:
    folder = one_run.parents[1] / "studies" / "mine"
    for content in ("{", "[]", '{"runs": 3}', "{}", '{"runs": [1]}'):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "runs.json").write_text(content)
        check(call("runs", "--study", "mine"), 2, "runs.json", "damaged")


# The program itself.


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (("frobnicate",), 2, "unknown command"),
        (("run", "model=tiny_random", "rank=0", "lrr=1"), 2, "rank: must be >= 1"),
        (("run", "-m", "model=tiny_random", "seed=range(0,1000000)"), 2, "1,000,000 runs"),
        pytest.param(
            ("run", "model=org/no-such-name", "evaluation.tasks=[]"), 4, "the hub cannot be reached", marks=SLOW
        ),
    ],
    ids=["command", "run", "sweep", "hub"],
)
def test_the_program(tmp_path: Path, arguments: tuple[str, ...], code: int, fragment: str) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(CHECKOUT),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "lora_lab.app.cli", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert fragment in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
