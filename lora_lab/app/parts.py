"""What trials need on this machine before they can run without a network: models, data sets, evaluation tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from lora_lab.app import overrides as checks
from lora_lab.app.compose import Composer, config_loader
from lora_lab.app.judgement import Findings, judge
from lora_lab.app.planning import cache_folder
from lora_lab.app.request import gather
from lora_lab.schema.data import Data, HubData, JsonlData, SkillsData
from lora_lab.schema.evaluation import Evaluation
from lora_lab.schema.model import EmbeddedModel, FolderModel, HubModel, Model, RandomModel
from lora_lab.schema.trial import LAB_KEYS, Lab, Trial, examine_trial

Kind = Literal["model", "data", "task"]
KINDS: tuple[Kind, ...] = ("model", "data", "task")


@dataclass(frozen=True, slots=True)
class Part:
    """One model, data set or task. `section` is what the trial says of it; a task has an evaluation of its own."""

    kind: Kind
    name: str
    section: Model | Data | Evaluation


@dataclass(frozen=True, slots=True)
class Needs:
    """The distinct parts of some trials, the housekeeping they share, where prepared models and rows are kept, and
    whether one of the trials needs bitsandbytes."""

    parts: tuple[Part, ...]
    lab: Lab
    cache: Path
    uses_bitsandbytes: bool


class Shelf:
    """The lab's configuration as a place to look up parts by name, or to find out what trials need."""

    def __init__(self) -> None:
        self._loader = config_loader()
        self._master: DictConfig = self._loader.load_configuration("config", [], RunMode.MULTIRUN)
        self._composer = Composer(self._loader, self._master)

    def names(self, kind: Kind) -> list[str]:
        """Choices of conf/model or conf/data that are complete by themselves."""
        needing = {"model": ("hub", "folder"), "data": ("jsonl",), "task": ()}[kind]
        return [name for name in sorted(self._loader.get_group_options(kind)) if name not in needing]

    def model(self, name: str) -> Part:
        """The model that `model=NAME` means; raises InputError where it means none."""
        section = self._section([f"model={name}"]).model
        return Part("model", _name_of(section), section)

    def data(self, name: str) -> Part:
        """The data that `data=NAME` means; raises InputError where it means none."""
        section = self._section([f"data={name}"]).data
        return Part("data", _name_of(section), section)

    def task(self, name: str) -> Part:
        """A task of lm-eval, or of the lab, with the settings of the default configuration; the name is not checked."""
        section = self._section([]).evaluation
        return Part("task", name, section.model_copy(update={"tasks": (name,)}))

    def needs(self, overrides: Sequence[str], *, root: Path | None, cache: Path | None) -> Needs:
        """What the trials of `run -m OVERRIDES` need (`study=NAME` among them stands for that study).

        Raises:
            InputError: with everything wrong with the overrides and the study that can be told without the parts.
        """
        checked = checks.check(list(overrides))
        found = Findings()
        found.add(checked.problems)
        found.raise_if_any()
        lines = [str(one.input_line) for one in checked.overrides if not one.key_or_group.startswith("hydra")]
        parsed = OverridesParser.create(config_loader=self._loader).parse_overrides(lines)
        request = gather(self._composer, checks.expand(parsed, max_runs=self._master.max_runs))
        found.add(request.problems)
        judged = [judge(point, None, found) for point in request.points]
        found.raise_if_any()
        lab = next(lab for lab, _ in judged if lab is not None)
        lab = lab if root is None else lab.model_copy(update={"root": str(root)})
        trials = [trial for _, trial in judged]
        return Needs(
            parts=_distinct(trials),
            lab=lab,
            cache=cache_folder(lab) if cache is None else cache,
            uses_bitsandbytes=any(map(_uses_bitsandbytes, trials)),
        )

    def choice_of(self, part: Part) -> str | None:
        """The name that by itself means exactly this part; None where other settings are needed to fetch it."""
        section = part.section
        if isinstance(section, HubModel) and part.name == section.repo:
            same = self.model(section.repo).section
            return section.repo if _source(same) == _source(section) else None
        if part.kind != "task" and part.name not in self.names(part.kind):
            return None
        same = {"model": self.model, "data": self.data, "task": self.task}[part.kind](part.name).section
        return part.name if _source(same) == _source(section) else None

    def _section(self, lines: Sequence[str]) -> Trial:
        mapping: Mapping[str, Any] = self._composer.compose(lines).mapping
        return examine_trial({key: value for key, value in mapping.items() if key not in LAB_KEYS}, left_out=()).trial


def _distinct(trials: Iterable[Trial]) -> tuple[Part, ...]:
    """Models first, then data, then tasks, each once."""
    found: dict[tuple[str, object], Part] = {}
    for trial in trials:
        found.setdefault(("model", _source(trial.model)), Part("model", _name_of(trial.model), trial.model))
        found.setdefault(("data", _source(trial.data)), Part("data", _name_of(trial.data), trial.data))
        for task in trial.evaluation.tasks:
            section = trial.evaluation.model_copy(update={"tasks": (task,)})
            found.setdefault((task, _source(section)), Part("task", task, section))
    return tuple(sorted(found.values(), key=lambda part: KINDS.index(part.kind)))


def _name_of(section: Model | Data) -> str:
    if isinstance(section, HubModel):
        return section.name or section.repo
    if isinstance(section, (FolderModel, JsonlData)):
        return section.path
    return "skills" if section.kind == "skills" else section.name


def _uses_bitsandbytes(trial: Trial) -> bool:
    return trial.quantization.kind != "none" or trial.optimizer.kind not in ("adamw", "sgd")


# What of a section decides which files it reads; the rest says how they are used.
_SOURCE: Mapping[type, tuple[str, ...]] = MappingProxyType(
    {
        EmbeddedModel: ("package", "package_version", "file", "sha256", "name"),
        HubModel: ("repo", "revision"),
        FolderModel: ("path",),
        RandomModel: ("name", "seed", "shape"),
        SkillsData: ("package_version",),
        JsonlData: ("path", "heldout_path"),
        HubData: ("repo", "config", "split", "revision"),
        Evaluation: ("mirror", "include_path"),
    }
)


def _source(section: Model | Data | Evaluation) -> tuple[object, ...]:
    """Equal for sections that read the same files."""
    return tuple(getattr(section, name) for name in _SOURCE[type(section)])
