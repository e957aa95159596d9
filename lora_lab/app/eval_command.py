"""`eval`: lm-evaluation-harness's own command and flags, with the lab's model `lora_lab`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lora_lab.errors import EvaluationError, LabError, Problem
from lora_lab.evaluate.command.line import CommandLine, parse_command

_NOT_SCORED = 3  # as a run that did not complete


def main(arguments: Sequence[str]) -> int:
    """Runs `eval ...`; returns the exit code: 3 where a score would not be honest.

    Raises:
        InputError, MachineError: what is wrong with the flags, the model or the machine.
    """
    line = parse_command(arguments[1:])
    if line.kind != "run":
        from lora_lab.evaluate.command.run import pass_on  # imports torch, which --help can do without

        return pass_on(line)
    try:
        _score(line)
    except EvaluationError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return _NOT_SCORED
    return 0


def _score(line: CommandLine) -> None:
    """Everything is checked first; a model of the lab is made or fetched where it is not in the cache yet."""
    from lora_lab.app.parts import Shelf
    from lora_lab.evaluate.command.checks import check_command
    from lora_lab.evaluate.command.model_arguments import is_lab_model
    from lora_lab.evaluate.command.run import score
    from lora_lab.models.load import model_folder
    from lora_lab.schema.evaluation import Evaluation

    shelf = Shelf()
    defaults = shelf.task("").section
    assert isinstance(defaults, Evaluation)
    models = shelf.names("model")
    command = check_command(line, defaults=defaults, lab_models=models)
    if command.device is not None:
        _check_device(command.device)
    pretrained = command.model_args["pretrained"]
    if is_lab_model(pretrained, models):
        section = shelf.model(pretrained).section
        pretrained = str(model_folder(section, line.cache).absolute())  # type: ignore[arg-type]  # a model's is one
    score(command, pretrained=pretrained)


def _check_device(name: str) -> None:
    """lm-eval takes a device that is not there for none at all, and chooses."""
    from lora_lab.launch.device import choose_device

    try:
        choose_device(name)
    except LabError as error:
        messages = [one.message.replace("launch.device=", "--device ") for one in error.problems]
        raise type(error)([Problem("--device", message) for message in messages]) from None
