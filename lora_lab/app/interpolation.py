"""From OmegaConf to a plain mapping: every `${...}` resolved, and no value of the environment told to anyone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.app.changes import value_at
from lora_lab.errors import InputError, Problem

_ENVIRONMENT = "oc.env"
_VARIABLE = re.compile(r"oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)")


def plain_mapping(config: DictConfig) -> dict[str, Any]:
    """A composed configuration without Hydra's own node, every interpolation resolved.

    Raises:
        InputError: naming the key whose interpolation fails; values of environment variables are never shown.
    """
    without_hydra = _without_hydra(config)
    try:
        mapping = OmegaConf.to_container(without_hydra, resolve=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        raise InputError(Problem(key, _failure(without_hydra, key, first_line(error)))) from None
    assert isinstance(mapping, dict)
    return {str(key): value for key, value in mapping.items()}


def hidden_keys(config: DictConfig) -> dict[str, Any]:
    """Dotted keys whose values may come from an environment variable, and how they were written."""
    written = dict(_interpolated(_raw(_without_hydra(config)), ""))
    return written if any(_ENVIRONMENT in str(text) for text in written.values()) else {}


def first_line(error: BaseException) -> str:
    """The first line of an error of Hydra or OmegaConf, and of its cause."""
    cause = error.__cause__
    text = str(error).splitlines()[0].rstrip(".")
    return f"{text}: {str(cause).splitlines()[0]}" if cause is not None and str(cause) else text


def _failure(config: DictConfig, key: str, text: str) -> str:
    raw = _raw(config)
    if "Recursive" in text:
        return f"interpolations in a circle: {' -> '.join(_circle(raw, key))}"
    if any(_ENVIRONMENT in str(written) for _, written in _interpolated(raw, "")):
        written = str(value_at(raw, key))
        unset = [name for name in _VARIABLE.findall(written) if name not in os.environ]
        if unset:
            return f"environment variable {', '.join(unset)} is not set (in {written})"
        return f"{written} cannot be resolved"  # the library's own text may quote the variable's value
    return text


def _without_hydra(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _raw(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=False)


def _interpolated(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Keys of values with `${...}`; a list counts as one value."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _interpolated(value, f"{prefix}.{key}" if prefix else str(key))
    elif "${" in str(node):
        yield prefix, node


def _circle(raw: Any, start: str) -> list[str]:
    """The keys that refer to each other, from `start` until one comes again."""
    chain = [start]
    while match := re.search(r"\$\{([\w.]+)\}", str(value_at(raw, chain[-1]))):
        chain.append(match.group(1))
        if chain[-1] in chain[:-1]:
            break
    return chain
