"""`--model_args` of `lora-lab eval`, looked through before a weight is read."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.plan.paths import existing

FLAG = "--model_args"
_REPOSITORY = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_OWN_FLAGS = ("batch_size", "max_batch_size", "device")
# Above it a name that is neither a folder nor a model of the lab is taken for a misspelt one, below for one of the hub.
_MISSPELT = 0.75


def model_argument_problems(arguments: Mapping[str, Any], lab_models: Sequence[str]) -> list[Problem]:
    """Everything wrong with the arguments that can be told without a model or the network.

    lab_models: names that `pretrained` may have besides folders and repositories. Imports torch.
    """
    problems = [*_name_problems(arguments)]
    if "pretrained" not in arguments:
        message = f"pretrained=MODEL is needed: a folder, org/name of the hub, or one of {', '.join(lab_models)}"
        problems.append(Problem(FLAG, message))
    for key, marker in (("pretrained", "config.json"), ("peft", "adapter_config.json"), ("tokenizer", None)):
        if arguments.get(key) is not None:
            problems += _source_problems(key, arguments[key], marker, lab_models if key == "pretrained" else ())
    if "revision" in arguments and is_lab_model(arguments.get("pretrained"), lab_models):
        message = f"{arguments['pretrained']} is a model of the lab, which has its revision; give pretrained=org/name"
        problems.append(Problem(f"{FLAG} revision", message))
    return [*problems, *_value_problems(arguments)]


def is_lab_model(pretrained: object, lab_models: Sequence[str]) -> bool:
    """Whether a model of the lab is meant: a folder of the same name comes first."""
    return isinstance(pretrained, str) and pretrained in lab_models and not Path(pretrained).is_dir()


def with_home(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`~` spelt out, which a shell does only at the beginning of a word."""
    is_home = {key for key in ("pretrained", "peft", "tokenizer") if str(arguments.get(key)).startswith("~")}
    return {key: str(Path(value).expanduser()) if key in is_home else value for key, value in arguments.items()}


def _name_problems(arguments: Mapping[str, Any]) -> Iterator[Problem]:
    """Misspelt names. Others are not ours to judge: HFLM hands what it does not know to transformers."""
    known = _known_names()
    for key in arguments:
        if key in _OWN_FLAGS:
            yield Problem(f"{FLAG} {key}", f"is a flag of its own: --{key}")
        elif key not in known and (close := difflib.get_close_matches(key, known, n=1, cutoff=0.8)):
            yield Problem(f"{FLAG} {key}", f'unknown; did you mean "{close[0]}"?')


def _known_names() -> list[str]:
    from lora_lab.evaluate.lab_model import LabModel

    signatures = [inspect.signature(one.__init__) for one in LabModel.__mro__ if "__init__" in vars(one)]
    return sorted({name for signature in signatures for name in signature.parameters} - {"self", *_OWN_FLAGS})


def _source_problems(key: str, value: object, marker: str | None, lab_models: Sequence[str]) -> list[Problem]:
    """What is wrong with the name of a folder or repository; `marker` is the file such a folder must hold."""
    where = f"{FLAG} {key}"
    if not isinstance(value, str) or not value:
        return [Problem(where, f"expected a folder or a name, got {value!r}; a folder of that name is ./{value}")]
    path = Path(value).expanduser()
    if path.is_dir():
        return [] if marker is None or (path / marker).is_file() else [_without(where, path, marker)]
    if value in lab_models:
        return []
    if value[0] in "./~" or not _REPOSITORY.fullmatch(value):
        try:
            existing(path, where=where, kind="folder")
        except InputError as error:
            return list(error.problems)
    if difflib.get_close_matches(value, lab_models, n=1, cutoff=_MISSPELT):
        return [Problem(where, f'no model "{value}"{nearest(value, lab_models)[:-1]}, a folder, org/name)')]
    return []


def _without(where: str, folder: Path, marker: str) -> Problem:
    message = f'no {marker} in "{folder}"'
    if marker == "config.json" and (folder / "adapter_config.json").is_file():
        message += "; it holds an adapter: pretrained=BASE,peft=" + str(folder)
    elif (folder / "adapter" / marker).is_file():
        message += f"; did you mean {folder / 'adapter'}?"
    return Problem(where, message)


def _value_problems(arguments: Mapping[str, Any]) -> Iterator[Problem]:
    """lm-eval reads a value as a number where it can, and else hands the text on as it is."""
    from lora_lab.evaluate.generating_model import Engine

    for key, choices in (("engine", get_args(Engine)), ("dtype", _dtypes())):
        value = arguments.get(key, choices[0])
        if value not in choices:
            yield Problem(f"{FLAG} {key}", f'no such {key} "{value}"{nearest(str(value), choices)}')
    for key in ("chunk_tokens", "max_length"):
        value = arguments.get(key)
        if value is not None and (type(value) is not int or value < 1):
            yield Problem(f"{FLAG} {key}", f"expected a whole number >= 1, got {value!r}; leave it out for the default")


def _dtypes() -> list[str]:
    import torch

    found = {
        name for name in dir(torch) if isinstance(one := getattr(torch, name), torch.dtype) and one.is_floating_point
    }
    return ["auto", *sorted(found)]
