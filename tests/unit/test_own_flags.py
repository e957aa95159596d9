"""The lab's own flags of `run` and `plan`: where they may stand, what they need, what is said of a wrong one."""

from __future__ import annotations

import pytest

from lora_lab.app.own_flags import OwnFlags, take_own_flags
from lora_lab.errors import InputError


@pytest.mark.parametrize(
    ("line", "own", "rest"),
    [
        ("rank=4 -m", OwnFlags(False, False, None, False), "rank=4 -m"),
        ("--json rank=4", OwnFlags(True, False, None, False), "rank=4"),
        ("-m --memory rank=4,8", OwnFlags(False, True, None, False), "-m rank=4,8"),
        ("--memory --device h100 rank=4", OwnFlags(False, True, "h100", False), "rank=4"),
        ("--device=24GiB rank=4 --memory --json", OwnFlags(True, True, "24GiB", False), "rank=4"),
        ("rank=4 --explain", OwnFlags(False, True, None, True), "rank=4"),
        ("--explain --device 4090", OwnFlags(False, True, "4090", True), ""),
        ("--memory -cd folder -cn name", OwnFlags(False, True, None, False), "-cd folder -cn name"),
    ],
)
def test_taken_out_wherever_they_stand(line: str, own: OwnFlags, rest: str) -> None:
    assert take_own_flags("plan", line.split()) == (own, rest.split())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan --device h100", "--device: needs --memory: lora-lab plan --memory --device h100"),
        ("plan --memory --device", "--device: needs a device such as h100, or a size: --device 24GiB"),
        ("plan --memory --device rank=4", "--device: needs a device such as h100"),
        ("plan --memory --device --json", "--device: needs a device such as h100"),
        ("plan --memory --device=", "--device: needs a device such as h100"),
        ("plan --memory --device h100 --device a100", "--device: is given twice"),
        ("plan --memory=yes", '--memory: takes no value, got "yes"'),
        ("plan --json=yes", '--json: takes no value, got "yes"'),
        ("run --memory", "--memory: is of plan: lora-lab plan --memory"),
        ("run --explain", "--explain: is of plan: lora-lab plan --memory --explain"),
        ("run --device a100", "memory.device=a100 checks whether it would fit"),
    ],
)
def test_refused_with_what_to_write(line: str, said: str) -> None:
    command, *arguments = line.split()
    with pytest.raises(InputError) as caught:
        take_own_flags(command, arguments)
    assert said in str(caught.value)
    assert len(caught.value.problems) == 1


def test_all_problems_at_once() -> None:
    with pytest.raises(InputError) as caught:
        take_own_flags("run", ["--memory", "--explain=1", "--device"])
    assert {problem.where for problem in caught.value.problems} == {"--memory", "--explain", "--device"}
