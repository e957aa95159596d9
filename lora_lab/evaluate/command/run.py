"""lm-eval's own command, run with the model `lora_lab`."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lm_eval.evaluator  # before its TaskManager is exchanged below, which it would keep
import lm_eval.tasks
import lm_eval.utils
import torch
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from lm_eval._cli.run import Run
from safetensors import SafetensorError

from lora_lab.errors import InputError, LabError, MachineError, Problem, first_line
from lora_lab.evaluate.command.checks import Command
from lora_lab.evaluate.command.line import CommandLine
from lora_lab.evaluate.registration import MODEL_NAME
from lora_lab.evaluate.surroundings import data_cache, kept_random_state

_NOT_THERE = (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError, DatasetNotFoundError)
_OUT_OF_REACH = (ConnectionError, TimeoutError, LocalEntryNotFoundError, HfHubHTTPError)
_OF_LM_EVAL = (ValueError, KeyError, TypeError, AssertionError, OSError, SafetensorError)


def score(command: Command, *, pretrained: str) -> None:
    """Runs lm-eval's `run`; its table goes to standard output, its log to standard error.

    pretrained: the folder or repository of the model, where `command` names a model of the lab.

    Raises:
        InputError: lm-eval, transformers or PEFT refuse. MachineError: no network, no memory, a package is missing.
        EvaluationError: a log-likelihood is not finite.
    """
    options = copy.deepcopy(command.line.options)
    options.model = MODEL_NAME
    options.model_args = {**command.model_args, "pretrained": pretrained}
    options.tasks = list(command.tasks.names)
    options.include_path = list(command.tasks.folders) or None
    with (
        _log_of_lm_eval(),
        kept_random_state(),
        data_cache(command.line.cache, offline=_is_all_here(command, options.model_args)),
        _index_of(command.tasks.needs_defaults),
        _errors_of_ours(),
    ):
        Run._execute(options)
    sys.stdout.flush()


def pass_on(line: CommandLine) -> int:
    """Runs lm-eval's `ls` or `validate`; the exit code is 2 where a task is not found."""
    try:
        line.options.func(line.options)
    except SystemExit as stop:
        return 2 if stop.code else 0
    sys.stdout.flush()
    return 0


def _is_all_here(command: Command, model_args: Mapping[str, Any]) -> bool:
    """Whether model and rows are local files; `datasets` would knock at the hub and wait all the same."""
    sources = [model_args.get(key) for key in ("pretrained", "peft", "delta", "tokenizer")]
    is_local = all(Path(source).is_dir() for source in sources if source is not None)
    return is_local and set(command.tasks.names) == set(command.tasks.prepared)


@contextlib.contextmanager
def _log_of_lm_eval() -> Iterator[None]:
    """lm-eval's log on standard error, as its own command writes it; afterwards its logger is as before."""
    logger = logging.getLogger("lm_eval")
    handlers, propagate, level = list(logger.handlers), logger.propagate, logger.level
    is_set_up = lm_eval.utils._LOGGING_CONFIGURED
    lm_eval.utils._LOGGING_CONFIGURED = False
    logger.handlers[:] = []
    lm_eval.utils.setup_logging()
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
        lm_eval.utils._LOGGING_CONFIGURED = is_set_up


@contextlib.contextmanager
def _index_of(defaults: bool) -> Iterator[None]:
    """Without `defaults` lm-eval's command does not read its own 15,000 task files, which takes 4 to 18 seconds."""
    before = lm_eval.tasks.TaskManager
    if not defaults:
        lm_eval.tasks.TaskManager = functools.partial(before, include_defaults=False)
    try:
        yield
    finally:
        lm_eval.tasks.TaskManager = before


@contextlib.contextmanager
def _errors_of_ours() -> Iterator[None]:
    """What lm-eval and the libraries below it raise, in the lab's words; what only a bug can raise stays as it is."""
    try:
        yield
    except (LabError, BrokenPipeError):
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MachineError(f"out of memory: {first_line(error)}") from error
    except ImportError as error:
        raise MachineError(f"a package is missing or damaged: {first_line(error)}") from error
    except _OF_LM_EVAL as error:
        raise _in_our_words(error) from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise InputError(Problem("--model_args", f"weights do not fit: {first_line(error)}")) from error


def _in_our_words(error: BaseException) -> LabError:
    chain = list(_causes(error))
    text = f"{type(error).__name__}: {first_line(error)}"
    if any(isinstance(one, _NOT_THERE) for one in chain):
        return InputError(Problem("", f"the hub has no such model or data, or wants you to log in: {text}"))
    if any(isinstance(one, _OUT_OF_REACH) for one in chain):
        return MachineError(
            Problem("", f"a model or the rows of a task are not here, and the hub was not reached: {text}")
        )
    return InputError(Problem("", f"lm-eval stopped: {text}"))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
