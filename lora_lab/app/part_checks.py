"""Whether a part of a trial is on this machine, found out by the very call by which a run would load it.

`look` runs in a process with the hub switched off (see `app.questions`); `get` may use the network. A model is looked
at as a folder, never loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lora_lab.app.parts import Part
from lora_lab.data.skills import PACKAGE, check_skills_identity
from lora_lab.errors import MachineError, Problem
from lora_lab.evaluate.check import LOCAL_TASKS, check_evaluation
from lora_lab.schema.data import Data, HubData, JsonlData, SkillsData
from lora_lab.schema.evaluation import Evaluation
from lora_lab.schema.model import EmbeddedModel, FolderModel, HubModel, Model, RandomModel

# The hub client and `datasets` read these once, when they are imported.
HUB_SWITCHED_OFF: Mapping[str, str] = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

_DATA: TypeAdapter[Data] = TypeAdapter(Data)
_MODEL: TypeAdapter[Model] = TypeAdapter(Model)


@dataclass(frozen=True, slots=True)
class Holding:
    """A part that a run would find. path: None where no file of its own is needed. note: where it comes from.
    is_prepared: false where the first run still has to convert it."""

    note: str
    path: str | None = None
    bytes: int | None = None
    is_prepared: bool = True


def look(kind: str, section: str, cache: str) -> dict[str, Any]:
    """The holding of a part whose section is given as JSON; raises LabError where a run would not find it."""
    if kind == "task":
        return asdict(_task(Evaluation.model_validate_json(section), Path(cache)))
    if kind == "data":
        return asdict(_data(_DATA.validate_json(section), Path(cache)))
    return asdict(_model(_MODEL.validate_json(section), Path(cache)))


def can_be_fetched(part: Part) -> bool:
    """Whether `get` can bring it here; a folder or file of the user's own cannot be brought from anywhere."""
    section = part.section
    if isinstance(section, Evaluation):
        return section.tasks[0] not in LOCAL_TASKS and section.mirror is None
    if isinstance(section, HubData):
        return not Path(section.repo).expanduser().is_dir()
    return isinstance(section, (EmbeddedModel, HubModel))


def get(part: Part, cache: Path) -> None:
    """Downloads or converts a part, so that a later run finds it without a network.

    Raises:
        LabError: what the hub, the disk or the data itself has against it.
    """
    section = part.section
    if isinstance(section, Evaluation):
        from lora_lab.evaluate.task_data import load_task_data

        load_task_data(section, cache=cache)
    elif isinstance(section, (SkillsData, JsonlData, HubData)):
        from lora_lab.data.sources import load_rows

        load_rows(section, cache=cache)
    else:
        from lora_lab.models.folders import check_model_folder
        from lora_lab.models.load import model_folder

        check_model_folder(model_folder(section, cache))


def _model(model: Model, cache: Path) -> Holding:
    from lora_lab.models.folders import check_model_folder

    if isinstance(model, RandomModel):
        return Holding("made from its seed by the first run that needs it")
    if isinstance(model, EmbeddedModel):
        return _embedded(model, cache)
    folder = _hub_snapshot(model) if isinstance(model, HubModel) else Path(model.path).expanduser()
    check_model_folder(folder)
    note = "a folder of your own" if isinstance(model, FolderModel) else f"{model.repo} in the hub cache"
    return Holding(note, str(folder.absolute()), _bytes_of(folder.iterdir()))


def _embedded(model: EmbeddedModel, cache: Path) -> Holding:
    from lora_lab.models.embedded import locate_gguf
    from lora_lab.models.stored import check_stored

    folder = cache / "models" / f"{model.name}-{model.sha256[:12]}"
    if folder.is_dir():
        check_stored(folder)
        return Holding("converted", str(folder.absolute()), _bytes_of(folder.iterdir()))
    gguf = locate_gguf(model)
    note = f"in the package {model.package} {metadata.version(model.package)}, not converted yet"
    return Holding(note, str(gguf), gguf.stat().st_size, is_prepared=False)


def _hub_snapshot(model: HubModel) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import IncompleteSnapshotError

    from lora_lab.models.hub import hub_folder

    try:
        return hub_folder(model)
    except MachineError as error:
        is_partial = isinstance(error.__cause__, IncompleteSnapshotError)
        what = "only in part" if is_partial else "not"
        message = f"{model.repo} at revision {model.revision} is {what} in the hub cache {HF_HUB_CACHE}"
        raise MachineError(Problem("", message)) from None


def _data(data: Data, cache: Path) -> Holding:
    if isinstance(data, SkillsData):
        check_skills_identity(data)
        return Holding(f"comes with the package {PACKAGE} {data.package_version}")
    if isinstance(data, JsonlData):
        return _jsonl(data)
    folder = Path(data.repo).expanduser()
    if folder.is_dir():
        return Holding("a folder of your own", str(folder.absolute()), _bytes_of(folder.rglob("*")))
    from lora_lab.data.stored import load_stored

    try:
        stored = load_stored(data, cache=cache)
    except MachineError:
        message = f"{data.repo} at revision {data.revision} is not below {(cache / 'datasets').absolute()}"
        raise MachineError(Problem("", message)) from None
    return Holding(f"{data.repo} in the cache", str(stored.absolute()), _bytes_of(stored.iterdir()))


def _jsonl(data: JsonlData) -> Holding:
    from lora_lab.data.jsonl import check_jsonl

    check_jsonl(data)
    paths = [Path(path).expanduser() for path in (data.path, data.heldout_path) if path is not None]
    return Holding("a file of your own", str(paths[0].absolute()), _bytes_of(paths))


def _task(evaluation: Evaluation, cache: Path) -> Holding:
    (name,) = evaluation.tasks
    if name in LOCAL_TASKS:
        check_evaluation(evaluation, cache=cache)
        if name.startswith("prose_"):
            return Holding("comes with Python (its own documentation)")
        return Holding(f"comes with the package {PACKAGE} {metadata.version(PACKAGE)}")
    from lora_lab.evaluate.task_data import load_task_data, mirrored_files

    if evaluation.mirror is not None and (files := mirrored_files(evaluation, cache=cache)):
        return Holding("official rows in the mirror", str(_folder_of(files)), sum(files.values()))
    try:
        files = load_task_data(evaluation, cache=cache)
    except MachineError:
        message = f"its rows are not below {(cache / 'datasets').absolute()}"
        raise MachineError(Problem("", message)) from None
    return Holding("its rows are in the cache", str(_folder_of(files)) if files else None, sum(files.values()))


def _folder_of(files: Mapping[Path, int]) -> Path:
    """The deepest folder that holds all of them."""
    folder = next(iter(files)).parent
    while not all(path.is_relative_to(folder) for path in files):
        folder = folder.parent
    return folder.absolute()


def _bytes_of(paths: Any) -> int:
    """Bytes of the files among `paths`; a link counts as what it leads to."""
    return sum(path.stat().st_size for path in paths if path.is_file())
