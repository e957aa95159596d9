"""What can be known to be wrong with a call of `lora-lab eval` before a model loads; flags and --config together."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lm_eval.config.evaluate_config import EvaluatorConfig

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.evaluate.command.line import CommandLine
from lora_lab.evaluate.command.model_arguments import model_argument_problems, with_home
from lora_lab.evaluate.command.tasks import CommandTasks, command_tasks
from lora_lab.evaluate.registration import MODEL_NAME
from lora_lab.schema.evaluation import Evaluation

_BATCH_SIZE = re.compile(r"auto(:\d+(\.\d+)?)?|[1-9]\d*")


@dataclass(frozen=True, slots=True)
class Command:
    """What lm-eval is to do. model_args: as it read them. device: as asked for; None is lm-eval's choice."""

    line: CommandLine
    model_args: Mapping[str, Any]
    tasks: CommandTasks
    device: str | None


def check_command(line: CommandLine, *, defaults: Evaluation, lab_models: Sequence[str]) -> Command:
    """Reads flags and file as lm-eval will, and finds everything wrong with them. Imports torch, loads no model.

    defaults: settings of the lab's own tasks. lab_models: names that `pretrained` may have.

    Raises:
        InputError: see `command_tasks` and `model_argument_problems`; a model other than ours; lm-eval's cache.
    """
    file = _file_of(line.options)
    config = _config_of(line.options)
    problems = [*_model_problems(line, file), *_cache_problems(config), *_number_problems(config)]
    problems += model_argument_problems(config.model_args, lab_models)
    try:
        tasks = command_tasks(
            _names(config.tasks),
            defaults=defaults,
            mirror=line.mirror,
            include_path=config.include_path,
            cache=line.cache,
        )
    except InputError as error:
        raise InputError([*problems, *error.problems]) from None
    if tasks.prepared and config.cache_requests:
        message = f"lm-eval keeps prompts by the task's name alone, and {tasks.prepared[0]} may have had other rows"
        problems.append(Problem("--cache_requests", message))
    if problems:
        raise InputError(problems)
    return Command(line, with_home(config.model_args), tasks, line.options.device or file.get("device"))


def _names(tasks: str | Sequence[str] | None) -> list[str]:
    """Of --tasks, or of a file, where they may be one text."""
    return ",".join([tasks] if isinstance(tasks, str) else map(str, tasks or ())).split(",")


def _file_of(options: Any) -> dict[str, Any]:
    """The content of --config, {} without one; keys that lm-eval does not have are refused."""
    if options.config is None:
        return {}
    try:
        content: dict[str, Any] = EvaluatorConfig.load_yaml_config(options.config)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(Problem("--config", str(error))) from None
    known = [field.name for field in fields(EvaluatorConfig)]
    unknown = [
        Problem(options.config, f'no such key "{key}"{nearest(str(key), known)}') for key in content if key not in known
    ]
    if unknown:
        raise InputError(unknown)
    return content


def _config_of(options: Any) -> Any:
    """lm-eval's own reading of flags and file; what it says about them, it will say again when it runs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = EvaluatorConfig.from_cli(copy.deepcopy(options))
    except (ValueError, TypeError, OSError, AttributeError) as error:
        raise InputError(Problem("", str(error))) from None
    finally:
        logging.disable(before)
    if not isinstance(config.model_args, dict):
        raise InputError(
            Problem(str(options.config), f"model_args: expected names and values, got {config.model_args!r}")
        )
    return config


def _model_problems(line: CommandLine, file: Mapping[str, Any]) -> Iterator[Problem]:
    where, model = (
        ("--model", line.options.model) if line.options.model else (str(line.options.config), file.get("model"))
    )
    if model not in (None, MODEL_NAME):
        rule = f"this command scores with {MODEL_NAME}; for lm-eval's own batches add --model_args engine=stock"
        yield Problem(where, f'the model is "{model}", but {rule}')


def _cache_problems(config: Any) -> Iterator[Problem]:
    if config.use_cache:
        yield Problem("--use_cache", "refused: lm-eval's cache would hand one adapter's scores to another")


def _number_problems(config: Any) -> Iterator[Problem]:
    """Values that lm-eval takes and stumbles over once the model is there, or scores nothing with."""
    if config.limit is not None and not (_is_number(config.limit) and config.limit > 0):
        yield Problem("--limit", f"must be > 0, got {config.limit}")
    if config.num_fewshot is not None and not (isinstance(config.num_fewshot, int) and config.num_fewshot >= 0):
        yield Problem("--num_fewshot", f"must be a whole number >= 0, got {config.num_fewshot}")
    if not _BATCH_SIZE.fullmatch(str(config.batch_size)):
        yield Problem("--batch_size", f'expected a whole number >= 1, auto or auto:N, got "{config.batch_size}"')
    if config.max_batch_size is not None and not (isinstance(config.max_batch_size, int) and config.max_batch_size > 0):
        yield Problem("--max_batch_size", f"must be a whole number >= 1, got {config.max_batch_size}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
