"""The data behind tasks, without a model: loaded as `evaluate_model` would load it, and where it then lies."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from lora_lab.errors import EvaluationError, LabError, MachineError, Problem, first_line
from lora_lab.evaluate.check import check_evaluation, locate_tasks
from lora_lab.evaluate.mirror import mirror_configs
from lora_lab.evaluate.surroundings import console_to, data_cache, kept_random_state
from lora_lab.evaluate.tasks import prepare_tasks
from lora_lab.schema.evaluation import Evaluation


def mirrored_files(evaluation: Evaluation, *, cache: Path) -> dict[Path, int]:
    """Files of `evaluation.mirror` that its tasks read, with their bytes; each is checked against the manifest.

    Raises:
        InputError, IdentityError: a task that cannot be scored, a file that is missing or is not the declared one.
    """
    check_evaluation(evaluation, cache=cache)
    located = locate_tasks(evaluation, cache=cache)
    if located.mirror is None:
        return {}
    configs = mirror_configs(located.mirror, located.catalogue, located.official)
    listed = [config["dataset_kwargs"]["data_files"] for config in configs.values() if "dataset_kwargs" in config]
    paths = {Path(name) for files in listed for names in files.values() for name in names}
    return {path: path.stat().st_size for path in sorted(paths)}


def load_task_data(evaluation: Evaluation, *, cache: Path) -> dict[Path, int]:
    """Builds the tasks of `evaluation`, which fetches what is not below `cache` yet; files of rows with their bytes.

    Where HF_HUB_OFFLINE is set nothing is fetched, so that the same call tells whether a run finds everything.

    Raises:
        InputError, IdentityError: see `prepare_tasks`.
        MachineError: the hub cannot be reached. EvaluationError: lm-eval cannot build a task.
    """
    tasks = prepare_tasks(evaluation, cache=cache)
    with console_to(Path(os.devnull)), kept_random_state(), data_cache(cache, offline=False):
        try:
            built = _manager(tasks.folders, tasks.needs_defaults).load(list(tasks.names))["tasks"]
        except LabError:
            raise
        except (ConnectionError, TimeoutError) as error:
            message = f"the data of {', '.join(tasks.names)} could not be fetched: {first_line(error)}"
            raise MachineError(Problem("", message)) from None
        except (ValueError, KeyError, TypeError, AssertionError, ImportError, OSError, RuntimeError) as error:
            message = f"lm-eval cannot build {', '.join(tasks.names)}: {type(error).__name__}: {first_line(error)}"
            raise EvaluationError(Problem("evaluation.tasks", message)) from None
    paths = {Path(file["filename"]) for task in built.values() for file in _files(getattr(task, "dataset", None))}
    return {path: path.stat().st_size for path in sorted(paths)}


@functools.lru_cache(maxsize=4)
def _manager(folders: tuple[Path, ...], needs_defaults: bool) -> Any:
    """lm-eval's own index takes 8 to 18 seconds to build, so that several tasks share it."""
    return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=needs_defaults)


def _files(data: Any) -> Iterator[Mapping[str, str]]:
    """Files of all splits of a task's data."""
    for table in data.values() if isinstance(data, Mapping) else [data]:
        yield from getattr(table, "cache_files", ())
