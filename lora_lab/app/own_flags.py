"""The lab's own flags of `run` and `plan`: `--json` and what asks for memory, taken out before Hydra reads the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.errors import InputError, Problem

JSON, MEMORY, DEVICE, EXPLAIN = "--json", "--memory", "--device", "--explain"
OWN_FLAGS = (JSON, MEMORY, DEVICE, EXPLAIN)

_OF_A_RUN = {
    MEMORY: "is of plan: lora-lab plan --memory ...; a run checks by itself whether it fits (memory.on_overflow)",
    EXPLAIN: "is of plan: lora-lab plan --memory --explain ...",
    DEVICE: "is of plan --memory; a run goes to launch.device=cuda:0, and memory.device={device} checks whether it "
    "would fit on that device",
}


@dataclass(frozen=True, slots=True)
class OwnFlags:
    """memory: predictions are asked for. device: the name or size they are compared with; None leaves it to
    `memory.device`. explain: a page of each trial's step."""

    as_json: bool
    memory: bool
    device: str | None
    explain: bool


def take_own_flags(command: str, arguments: Sequence[str]) -> tuple[OwnFlags, list[str]]:
    """The lab's own flags among `arguments`, wherever they stand, and the other arguments in their order.

    Raises:
        InputError: a flag of another command, `--device` without a value, twice or without `--memory`.
    """
    rest: list[str] = []
    given: dict[str, str] = {}
    problems: list[Problem] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        flag, equals, value = argument.partition("=")
        if flag not in OWN_FLAGS:
            rest.append(argument)
            continue
        if flag == DEVICE:
            if not equals and left and _is_value(left[0]):
                value = left.pop(0)
            problems += _device_problems(value, twice=flag in given)
        elif equals:
            problems.append(Problem(flag, f'takes no value, got "{value[:100]}"; leave out ={value[:100]}'))
        given[flag] = value
    problems += _place_problems(command, given)
    if problems:
        raise InputError(problems)
    explain = EXPLAIN in given
    return OwnFlags(JSON in given, MEMORY in given or explain, given.get(DEVICE), explain), rest


def _is_value(text: str) -> bool:
    """Neither a flag nor an override, which is what stands there when the name was forgotten."""
    return not text.startswith("-") and "=" not in text


def _device_problems(value: str, *, twice: bool) -> list[Problem]:
    if twice:
        return [Problem(DEVICE, "is given twice; one plan is for one device")]
    if not value:
        return [Problem(DEVICE, "needs a device such as h100, or a size: --device 24GiB")]
    return []


def _place_problems(command: str, given: dict[str, str]) -> list[Problem]:
    if command != "plan":
        device = given.get(DEVICE) or "h100"
        return [Problem(flag, _OF_A_RUN[flag].format(device=device)) for flag in given if flag in _OF_A_RUN]
    if DEVICE in given and not {MEMORY, EXPLAIN} & set(given):
        return [Problem(DEVICE, f"needs --memory: lora-lab plan --memory --device {given[DEVICE] or 'h100'} ...")]
    return []
