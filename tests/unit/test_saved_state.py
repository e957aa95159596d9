"""What a checkpoint refuses, and that there is always one: damage, other trainings, kills and full disks."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_lab.adapters.attach import Attached
from lora_lab.errors import DataError, InputError, MachineError
from lora_lab.record.atomic import read_json
from lora_lab.record.checkpoint import is_complete, read_checkpoint, write_checkpoint
from lora_lab.schema.trial import Trial
from lora_lab.train import saved_state
from lora_lab.train.loop import train
from lora_lab.train.member import Member, StepRecord, member_of
from lora_lab.train.record_columns import columns_of, records_of
from lora_lab.train.saved_state import load_state, save_state
from tests.conftest import MakeTrial
from tests.contract.test_every_method import CPU, attached_to, load, rows, trial_of

pytestmark = pytest.mark.usefixtures("one_core")

Begun = tuple[Attached, Member]


def begun(trial: Trial, cache: Path) -> Begun:
    attached = attached_to(trial, load(trial, cache))
    return attached, member_of(trial, attached, rows(), name="test")


def trained(trial: Trial, cache: Path, *, until: int) -> Begun:
    attached, member = begun(trial, cache)
    go_on(attached, member, until=until)
    return attached, member


def go_on(attached: Attached, member: Member, *, until: int) -> None:
    total, member.total_steps = member.total_steps, until
    train(attached.model, [member], pad_id=256, device=CPU, on_step=lambda *_: None)
    member.total_steps = total


def picture(attached: Attached, member: Member) -> dict[str, Any]:
    """All that loading may change, copied."""
    return {
        "weights": {name: one.detach().clone() for name, one in attached.model.named_parameters()},
        "trained": [one.requires_grad for one in member.parameters],
        "groups": [[id(one) for one in group["params"]] for group in member.optimizer.param_groups],
        "rates": [group["lr"] for group in member.optimizer.param_groups],
        "states": len(member.optimizer.state),
        "schedule": member.schedule.state_dict(),
        "step": member.step,
        "records": list(member.records),
        "course": None if member.course is None else member.course.state(0),
        "routing": None if attached.routing is None else dict(attached.routing.sums),
    }


def assert_untouched(pair: Begun, before: dict[str, Any]) -> None:
    after = picture(*pair)
    weights, old = after.pop("weights"), before.pop("weights")
    assert [name for name in old if not torch.equal(weights[name], old[name])] == []
    assert after == before


def assert_refused(trial: Trial, cache: Path, folder: Path, match: str) -> None:
    """Refused with one line that names the folder; the member is as it was and trains as one that never saw it."""
    pair = begun(trial, cache)
    before = picture(*pair)
    with pytest.raises(InputError, match=match) as caught:
        load_state(pair[1], pair[0], folder)
    assert all(str(folder) in line for line in str(caught.value).splitlines())
    assert_untouched(pair, before)
    go_on(*pair, until=2)
    fresh = trained(trial, cache, until=2)
    for (name, one), (_, other) in zip(pair[0].trained, fresh[0].trained, strict=True):
        assert torch.equal(one, other), name


@pytest.fixture
def lora(make_trial: MakeTrial) -> Trial:
    return trial_of(make_trial, "lora", "llama", "dropout=0.1")


@pytest.fixture
def checkpoint(lora: Trial, shared: Path, tmp_path: Path) -> Path:
    """Of the second step of `lora`."""
    folder = tmp_path / "run" / "checkpoint"
    attached, member = trained(lora, shared, until=2)
    save_state(member, attached, folder)
    return folder


def tensors_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (lambda folder: [one.unlink() for one in folder.iterdir()], "checkpoint.json: no such file"),
    "no manifest": (lambda folder: (folder / "checkpoint.json").unlink(), "no such file"),
    "torn manifest": (lambda folder: os.truncate(folder / "checkpoint.json", 300), "damaged JSON"),
    "empty manifest": (lambda folder: os.truncate(folder / "checkpoint.json", 0), "damaged JSON"),
    "a list": (lambda folder: (folder / "checkpoint.json").write_text("[]"), "schema_version"),
    "no tensors": (lambda folder: tensors_file(folder).unlink(), "not found"),
    "torn tensors": (lambda folder: os.truncate(tensors_file(folder), 1000), "1000 bytes"),
    "one bit of a weight": (lambda folder: flip(tensors_file(folder), -9), "SHA-256"),
    "one bit of the header": (lambda folder: flip(tensors_file(folder), 20), "SHA-256"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_refused(lora: Trial, shared: Path, checkpoint: Path, kind: str) -> None:
    damage, match = DAMAGE[kind]
    assert is_complete(checkpoint)
    damage(checkpoint)
    assert not is_complete(checkpoint)
    assert_refused(lora, shared, checkpoint, match)


def test_every_number_of_the_manifest_is_under_its_digest(checkpoint: Path) -> None:
    path = checkpoint / "checkpoint.json"
    whole = path.read_bytes()
    digits = [index for index, byte in enumerate(whole) if chr(byte).isdigit()]
    assert len(digits) > 100
    for index in random.Random(0).sample(digits, 60):
        flip(path, index)
        with pytest.raises(DataError):
            read_checkpoint(checkpoint)
        path.write_bytes(whole)
    assert is_complete(checkpoint)


def test_one_of_a_later_lab_is_refused(lora: Trial, shared: Path, checkpoint: Path) -> None:
    path = checkpoint / "checkpoint.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    assert_refused(lora, shared, checkpoint, "expected schema_version 1, got 2")


OTHERS = {
    "rank": ("lora", ("rank=4",), r"lora_A.* is \(8, 64\) of torch.float32, here it is \(4, 64\)"),
    "target": ("lora", ("target=all_linear",), "weights are missing: .*down_proj"),
    "method": ("ia3", (), "weights are missing.*\n.*weights are of no place here"),
    "precision": ("lora", ("training.precision=fp64",), "float32, here it is .* of torch.float64"),
    "optimizer": ("lora", ("optimizer=sgd",), "optimizer .*torch.AdamW.*here it is .*torch.SGD"),
    "betas": ("lora", ("optimizer.betas=[0.5,0.9]",), r"optimizer .*0.999.*here it is .*\[0.5, 0.9\]"),
    "learning rate": (
        "lora",
        ("learning_rate=0.02",),
        r"learning rates after 2 steps \[0\.0.*\], here they are \[0\.0",
    ),
    "schedule": ("lora", ("scheduler=cosine",), "learning rates after 2 steps"),
    "dropout": ("lora", ("dropout=0",), "dropout seed 0, here it is None"),
    "seed": ("lora", ("seed=3",), "dropout seed 0, here it is 3"),
    "shorter": ("lora", ("training.max_steps=1", "scheduler=constant"), "2 steps, this training has 1"),
    "groups": ("lora_plus", (), "optimizer "),
    "a course": ("adalora", (), "course None, here it is BudgetSchedule"),
    "routers": ("mov", (), "routers False, here it is True"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_one_of_another_training_is_refused(make_trial: MakeTrial, shared: Path, checkpoint: Path, kind: str) -> None:
    method, more, match = OTHERS[kind]
    given = {line.partition("=")[0] for line in more}
    dropout = [] if "dropout" in given or method in ("ia3", "mov", "adalora") else ["dropout=0.1"]
    assert_refused(trial_of(make_trial, method, "llama", *dropout, *more), shared, checkpoint, match)


def test_the_layers_of_another_lisa_are_refused(make_trial: MakeTrial, shared: Path, tmp_path: Path) -> None:
    """The same weights have changed, in another order: only the course knows."""
    trials = [trial_of(make_trial, "lisa", "llama", f"seeds.layers={seed}") for seed in range(20)]
    courses = [begun(trial, shared)[1].course for trial in trials]
    drawn = [[course.state(step).values["layers"] for step in (1, 2, 3)] for course in courses if course is not None]
    first, other = drawn.index([[0], [1], [0]]), drawn.index([[1], [0], [1]])
    attached, member = trained(trials[first], shared, until=3)
    save_state(member, attached, tmp_path / "checkpoint")
    match = r"LISA trained the layers \[0\] at step 3, this trial draws \[1\]"
    assert_refused(trials[other], shared, tmp_path / "checkpoint", match)


def rewritten(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """A checkpoint that is whole and says something else."""
    state, path = read_checkpoint(folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(state, tensors)
    write_checkpoint(folder, state, lambda path: save_file(tensors, path))


def cut(part: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    """One row less of the first tensor of a part, or one more number of one."""

    def change(state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if part in name)
        tensors[name] = tensors[name][:-1].clone() if tensors[name].ndim else tensors[name].repeat(2)

    return change


def dropped(part: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def change(state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(name for name in sorted(tensors) if part in name)]

    return change


def renamed(state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(state["optimizer"]))
    state["optimizer"]["nowhere"] = state["optimizer"].pop(name)
    for key in [key for key in tensors if key.startswith(f"optimizer/{name}/")]:
        tensors[key.replace(name, "nowhere")] = tensors.pop(key)


def foreign(state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["routing/nowhere"] = torch.zeros(6)


MISFITS = {
    "momentum of another size": ("lora", (), cut("exp_avg_sq"), r"optimizer state exp_avg_sq is \("),
    "a counter of another size": ("lora", (), cut("/step"), "optimizer state step is"),
    "states of nobody": ("lora", (), renamed, "states of 1 parameters of no place here"),
    "8-bit momentum": ("full", ("optimizer=adamw8bit",), cut("absmax1"), "optimizer state absmax1 is"),
    "8-bit, one missing": (
        "full",
        ("optimizer=adamw8bit",),
        dropped("absmax1"),
        "optimizer states .*this optimizer has",
    ),
    "a basis": ("galore", (), cut("/left"), "bases of sizes"),
    "a basis is missing": ("galore", (), dropped("/left"), "bases of sizes"),
    "inside a basis": ("galore", (), cut("exp_avg_sq"), "optimizer state exp_avg_sq is"),
    "a weight": ("lora", (), cut("weights/"), "here it is"),
    "a weight is missing": ("lora", (), dropped("weights/"), "1 weights are missing"),
    "importance": ("adalora", (), cut("course/sensitivity"), "AdaLoRA's state of .* is"),
    "records": ("lora", (), cut("records/loss"), "different lengths"),
    "a field of the records": ("lora", (), dropped("records/loss"), "step records of"),
    "routers": ("mov", (), foreign, "1 routers are of no place here: nowhere"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_whatever_does_not_fit_is_found_before_anything_changes(
    make_trial: MakeTrial, shared: Path, tmp_path: Path, kind: str
) -> None:
    method, more, change, match = MISFITS[kind]
    trial, folder = trial_of(make_trial, method, "llama", *more), tmp_path / "checkpoint"
    attached, member = trained(trial, shared, until=2)
    save_state(member, attached, folder)
    rewritten(folder, change)
    assert_refused(trial, shared, folder, match)


def test_a_file_of_something_else_is_refused(lora: Trial, shared: Path, checkpoint: Path) -> None:
    state, _ = read_checkpoint(checkpoint)
    write_checkpoint(checkpoint, state, lambda path: path.write_bytes(b"\x80\x04 pickle"))
    assert_refused(lora, shared, checkpoint, "is not a state of a training")
    write_checkpoint(checkpoint, state, lambda path: save_file({"x": torch.zeros(1)}, path))
    assert_refused(lora, shared, checkpoint, "is not a state of a training")


def test_it_belongs_between_two_steps_of_a_training_that_goes_on(lora: Trial, shared: Path, tmp_path: Path) -> None:
    attached, member = trained(lora, shared, until=2)
    folder = tmp_path / "checkpoint"
    member.parameters[0].grad = torch.zeros_like(member.parameters[0])
    with pytest.raises(ValueError, match="middle of a step"):
        save_state(member, attached, folder)
    member.parameters[0].grad = None
    save_state(member, attached, folder)
    with pytest.raises(ValueError, match="has begun"):
        load_state(member, attached, folder)
    member.diverged = "step 3: loss nan"
    with pytest.raises(ValueError, match="has diverged"):
        save_state(member, attached, folder)


def test_weights_that_are_not_finite_are_kept_as_they_are(lora: Trial, shared: Path, tmp_path: Path) -> None:
    """An update may overflow; the step after finds it out, here as there."""
    attached, member = trained(lora, shared, until=2)
    with torch.no_grad():
        member.parameters[0][0, 0], member.parameters[0][0, 1] = torch.nan, -torch.inf
    save_state(member, attached, tmp_path / "checkpoint")
    again, resumed = begun(lora, shared)
    load_state(resumed, again, tmp_path / "checkpoint")
    for name, one, other in zip(*zip(*attached.trained, strict=True), resumed.parameters, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32)), name
    go_on(again, resumed, until=6)
    assert resumed.step == 2 and str(resumed.diverged).startswith("step 3: loss nan")


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_what_was_taken_out_of_the_base_is_what_training_began_with(
    make_trial: MakeTrial, shared: Path, tmp_path: Path, method: str
) -> None:
    """A decomposition that is computed again, on other cores, may come out a little different."""
    trial = trial_of(make_trial, method, "llama")
    attached, member = trained(trial, shared, until=2)
    save_state(member, attached, tmp_path / "checkpoint")
    again, resumed = begun(trial, shared)
    starts = {name: one for name, one in again.model.named_parameters() if ".default_start." in name}
    assert len(starts) == len(attached.trained)
    with torch.no_grad():
        for parameter in starts.values():
            parameter.mul_(1 + 1e-6)
    load_state(resumed, again, tmp_path / "checkpoint")
    expected = dict(attached.model.named_parameters())
    assert all(torch.equal(one, expected[name]) for name, one in starts.items())


def test_only_two_files_are_kept_and_their_bytes_counted(lora: Trial, shared: Path, tmp_path: Path) -> None:
    attached, member = begun(lora, shared)
    folder = tmp_path / "deep" / "checkpoint"
    for step in (1, 2, 3):
        go_on(attached, member, until=step)
        size = save_state(member, attached, folder)
        (folder / "tensors-0.safetensors").write_bytes(b"left by a kill")
        (folder / ".checkpoint.json.1.tmp").write_bytes(b"left by a kill")
    size = save_state(member, attached, folder)
    assert len(list(folder.iterdir())) == 2
    assert size == sum(file.stat().st_size for file in folder.iterdir())
    assert read_json(folder / "checkpoint.json")["state"]["step"] == 3


def test_records_come_back_to_the_last_bit() -> None:
    """Also what a cohort does not measure, and integers beyond what a float holds."""
    made = [
        StepRecord(
            step=index,
            loss=0.1 * index,
            learning_rate=1e-3 / 3,
            gradient_norm=0.0,
            tokens=2**60 + index,
            loss_tokens=7,
            padded_tokens=11,
            seconds=None if index == 2 else 0.25,  # type: ignore[arg-type]
            auxiliary={"b_loss": 1 / (index + 1), "a_loss": 2.0},
        )
        for index in range(4)
    ]
    back = records_of(columns_of(made))
    assert back == made and [list(record.auxiliary) for record in back] == [["b_loss", "a_loss"]] * 4
    assert all(type(record.tokens) is int and type(record.loss) is float for record in back)
    assert records_of(columns_of([])) == []
    with pytest.raises(ValueError, match="different auxiliary losses"):
        columns_of([*made, dataclasses.replace(made[0], auxiliary={})])


# Kills and full disks


def fill(member: Member, number: int) -> None:
    """Weights that say which state they are of."""
    with torch.no_grad():
        for parameter in member.parameters:
            parameter.fill_(number)
    member.step = number


def loaded_number(trial: Trial, cache: Path, folder: Path) -> int:
    """The number of the state that is there: the same in all of its parts."""
    attached, member = begun(trial, cache)
    member.total_steps = 10**9
    load_state(member, attached, folder)
    for parameter in member.parameters:
        assert torch.equal(parameter, torch.full_like(parameter, member.step))
    return member.step


@pytest.fixture
def constant(make_trial: MakeTrial) -> Trial:
    """A rate that is the same at every step, so that the number of a state may be any."""
    return trial_of(make_trial, "lora", "llama", "scheduler=constant", "dropout=0.1")


def in_child(act: Callable[[], None]) -> int:
    """Forks; the child runs `act` and is gone without any tidying up."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(1)
    return child


def test_kill_9_at_any_moment_leaves_one(constant: Trial, shared: Path, tmp_path: Path) -> None:
    folder, chance = tmp_path / "checkpoint", random.Random(1)
    attached, member = trained(constant, shared, until=1)
    fill(member, 1)
    start = time.perf_counter()
    save_state(member, attached, folder)
    seconds, last = time.perf_counter() - start, 1
    for _ in range(20):

        def save_on(begin: int = last) -> None:
            for number in range(begin, 10**9):
                fill(member, number)
                save_state(member, attached, folder)

        child = in_child(save_on)
        time.sleep(chance.uniform(1, 6) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        number = loaded_number(constant, shared, folder)
        assert number >= last
        last = number
    assert last > 1, "it was killed while it saved, not before"


def calls_to_die_at() -> Iterator[tuple[Any, str]]:
    """What a save asks of the disk, in the order of a save."""
    yield saved_state, "save_file"
    yield os, "fsync"
    yield Path, "replace"
    yield Path, "unlink"


def test_death_at_every_call_leaves_the_older_or_the_newer(constant: Trial, shared: Path, tmp_path: Path) -> None:
    """Unlike a kill at random: before and after each thing that a save asks of the disk."""
    folder = tmp_path / "checkpoint"
    attached, member = trained(constant, shared, until=1)
    found: list[int] = []
    for moment in range(100):
        fill(member, 1)
        save_state(member, attached, folder)

        def die_at(moment: int = moment) -> None:
            calls = 0

            def watched(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **kwargs: Any) -> Any:
                    nonlocal calls
                    if calls == moment:
                        os._exit(9)
                    calls += 1
                    result = real(*args, **kwargs)
                    if calls == moment:
                        os._exit(9)
                    calls += 1
                    return result

                return call

            for owner, name in calls_to_die_at():
                setattr(owner, name, watched(getattr(owner, name)))
            fill(member, 2)
            save_state(member, attached, folder)
            os._exit(0)

        _, status = os.waitpid(in_child(die_at), 0)
        found.append(loaded_number(constant, shared, folder))
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.waitstatus_to_exitcode(status) == 9
    assert found == sorted(found) and {1, 2} == set(found) and len(found) > 12


def test_tensors_are_on_disk_before_anything_names_them(
    constant: Trial, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut would find out."""
    folder, seen = tmp_path / "checkpoint", list[str]()
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink
    monkeypatch.setattr(
        os, "fsync", lambda one: (seen.append(Path(f"/proc/self/fd/{one}").readlink().name), fsync(one))
    )
    monkeypatch.setattr(Path, "replace", lambda one, to: (seen.append(f"-> {to.name}"), replace(one, to))[1])
    monkeypatch.setattr(Path, "unlink", lambda one, **how: (seen.append(f"no {one.name}"), unlink(one, **how))[1])
    attached, member = trained(constant, shared, until=1)
    save_state(member, attached, folder)
    (old,) = (file.name for file in folder.glob("*.safetensors"))
    seen.clear()
    save_state(member, attached, folder)
    (new,) = (file.name for file in folder.glob("*.safetensors"))
    named = seen.index("-> checkpoint.json")
    assert new in seen[:named] and "checkpoint" in seen[seen.index(new) : named]
    assert "checkpoint" in seen[named : seen.index(f"no {old}")]


def test_a_disk_that_refuses_leaves_the_older(
    constant: Trial, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    attached, member = trained(constant, shared, until=1)
    fill(member, 1)
    save_state(member, attached, folder)
    fill(member, 2)

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    for owner, name in ((os, "fsync"), (Path, "replace")):
        monkeypatch.setattr(owner, name, refuse)
        with pytest.raises(MachineError, match="No space left on device"):
            save_state(member, attached, folder)
        monkeypatch.undo()
        assert len(list(folder.iterdir())) == 2 and loaded_number(constant, shared, folder) == 1


def test_a_full_disk_is_one_line(constant: Trial, shared: Path, tmp_path: Path) -> None:
    """A real one, where a small file system may be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs may be mounted here")
    try:
        attached, member = trained(constant, shared, until=1)
        fill(member, 1)
        size = save_state(member, attached, small / "checkpoint")
        filler = (small / "filler").open("wb", buffering=0)
        filler.write(b"x" * (200 * 1024 - int(1.5 * size)))
        fill(member, 2)
        with pytest.raises(MachineError) as caught:
            save_state(member, attached, small / "checkpoint")
        assert "\n" not in str(caught.value) and str(small) in str(caught.value)
        assert len(list((small / "checkpoint").iterdir())) == 2
        assert loaded_number(constant, shared, small / "checkpoint") == 1
        filler.close()
    finally:
        subprocess.run(["umount", str(small)], check=True)
