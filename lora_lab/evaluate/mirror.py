"""Official tasks on a local folder of official rows: `evaluation.mirror=DIR`. Torch-free.

DIR holds JSON-lines files and a MANIFEST.csv with at least the columns `split`, `file`, `sha256` and `lm_eval_task`
(one name, or several with commas). A task file written here includes lm-eval's own file by absolute path, keeps its
name and points its data at the mirror, so that prompts and metrics are lm-eval's.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.errors import IdentityError, InputError, Problem, nearest
from lora_lab.evaluate.catalogue import Catalogue, leaves

MANIFEST = "MANIFEST.csv"
_COLUMNS = ("split", "file", "sha256", "lm_eval_task")
_EVALUATED = ("test_split", "validation_split")


@dataclass(frozen=True, slots=True)
class MirrorFile:
    """One row of a manifest: the rows of one split of a task."""

    split: str
    path: Path
    sha256: str


Mirror = Mapping[str, Sequence[MirrorFile]]


def read_mirror(folder: str) -> Mirror:
    """Files by task name.

    Raises:
        InputError: no such folder, no manifest, a column missing, or a file outside the folder.
    """
    root = Path(folder).expanduser().absolute()
    manifest = root / MANIFEST
    if not manifest.is_file():
        what = "no such folder" if not root.is_dir() else f"the folder has no {MANIFEST}"
        raise InputError(Problem("evaluation.mirror", f'{what}: "{folder}"'))
    with manifest.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        absent = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if absent:
            raise InputError(Problem(str(manifest), f"columns missing: {', '.join(absent)}"))
        files: dict[str, list[MirrorFile]] = {}
        for line, row in enumerate(reader, start=2):
            path = (root / row["file"]).resolve()
            if not path.is_relative_to(root.resolve()):
                raise InputError(Problem(f"{manifest}:{line}", f'file is outside the mirror folder: "{row["file"]}"'))
            for name in row["lm_eval_task"].split(","):
                files.setdefault(name.strip(), []).append(MirrorFile(row["split"], path, row["sha256"]))
    return files


def mirror_problems(mirror: Mirror, catalogue: Catalogue, names: Sequence[str]) -> list[Problem]:
    """Tasks (or members of a group or tag) whose data the mirror does not have."""
    problems = []
    for name in names:
        tasks, _ = leaves(catalogue, name)
        without = [task for task in tasks if not _evaluated_splits(catalogue, mirror, task)]
        if without:
            shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
            has = sorted(task for task in mirror if task in catalogue)
            hint = nearest(name, has) if has else ""
            problems.append(Problem("evaluation.mirror", f"the mirror has no rows to score for {shown}{hint}"))
    return problems


def mirror_configs(mirror: Mirror, catalogue: Catalogue, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """File stem -> content of the YAML file, for every task and group that `names` stand for.

    Raises:
        IdentityError: a mirrored file is missing or is not the one its manifest declares; names every such file.
    """
    configs: dict[str, dict[str, Any]] = {}
    used: dict[Path, MirrorFile] = {}
    for name in names:
        tasks, groups = leaves(catalogue, name)
        for group in groups:
            configs[f"group_{group}"] = {"include": catalogue[group].path, "group": group}
        for task in tasks:
            configs[task] = _task_config(catalogue, mirror, task)
            used |= {file.path: file for file in mirror[task]}
    _verify(used.values())
    return configs


def mirror_identity(mirror: Mirror, catalogue: Catalogue, names: Sequence[str]) -> str:
    """SHA-256 over the declared hashes of all files that `names` read."""
    tasks = {task for name in names for task in leaves(catalogue, name)[0]}
    lines = {f"{task} {file.split} {file.sha256}" for task in tasks for file in mirror.get(task, ())}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _task_config(catalogue: Catalogue, mirror: Mirror, task: str) -> dict[str, Any]:
    data_files: dict[str, list[str]] = {}
    for file in mirror[task]:
        data_files.setdefault(file.split, []).append(str(file.path))
    lost = {key: None for key, split in catalogue[task].splits.items() if split is not None and split not in data_files}
    return {
        "include": catalogue[task].path,
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data_files},
        **lost,
    }


def _evaluated_splits(catalogue: Catalogue, mirror: Mirror, task: str) -> list[str]:
    """Splits lm-eval would score that the mirror has. lm-eval takes the test split where a task names one."""
    named = [split for key in _EVALUATED if (split := catalogue[task].splits[key]) is not None]
    present = {file.split for file in mirror.get(task, ())}
    return [split for split in named[:1] if split in present]


def _verify(files: Iterable[MirrorFile]) -> None:
    problems = []
    for file in files:
        if not file.path.is_file():
            problems.append(Problem(str(file.path), f"listed in {MANIFEST}, but there is no such file"))
            continue
        digest = hashlib.sha256(file.path.read_bytes()).hexdigest()
        if digest != file.sha256:
            problems.append(Problem(str(file.path), f"SHA-256 is {digest}, but {MANIFEST} declares {file.sha256}"))
    if problems:
        raise IdentityError(problems)
