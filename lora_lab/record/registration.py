"""What decides a study, fixed before its first run: `registration.json`, and what has changed since.

The hash covers what was parsed from the study's file at one scale: fixed values, grids, seeds, arms, tuning, timing and
the criteria of every claim with the numbers they are held against. Words (question, statements, provenance) are not in
it, so a typo may be mended; a changed criterion makes another study.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.errors import DataError, InputError, Problem
from lora_lab.record.atomic import read_json, write_json
from lora_lab.record.environment import utc_now
from lora_lab.record.flat import dotted
from lora_lab.schema.claims import Claim, Exact, Scale
from lora_lab.schema.design import Design
from lora_lab.schema.study import Study

_FILE = "registration.json"
_DESIGN = tuple(Design.model_fields)
_WORDS_OF_CLAIM = ("statement", "finding", "differences", "reason")
_NUMBERS_OF_PUBLISHED = ("id", "value", "unit")


@dataclass(frozen=True, slots=True)
class Registration:
    """digest: SHA-256 of `content` as canonical JSON. registered_at: UTC, before the first run."""

    digest: str
    scale: Scale
    registered_at: str
    content: Mapping[str, Any]


def content_of(study: Study, scale: Scale) -> dict[str, Any]:
    """What is fixed before running, as JSON values."""
    content = {"design": _design(study.design(scale)), "claims": {one.id: _criterion(one) for one in study.claims}}
    plans = {study.planned_scale(claim) for claim in study.claims if _asks_for_plans(claim)}
    if scale == "pocket" and "published" in plans:
        # What is counted before a run is counted of the published set-up, at either scale.
        content["published"] = _design(study.design("published"))
    return content


def _design(design: Design) -> dict[str, Any]:
    return design.model_dump(mode="json", include=set(_DESIGN))


def _asks_for_plans(claim: Claim) -> bool:
    return isinstance(claim, Exact) and any(term.function == "planned" for term in claim.formula.terms)


def digest_of(content: Mapping[str, Any]) -> str:
    """The content's hash."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def register(folder: Path, study: Study, scale: Scale) -> Registration:
    """Fixes the study at this scale, or finds that it was fixed as it stands.

    Raises:
        InputError: it was fixed otherwise, with every key that has changed. DataError: the file is damaged.
    """
    content = content_of(study, scale)
    known = read_registration(folder)
    if known is None:
        made = Registration(digest_of(content), scale, utc_now(), content)
        write_json(folder / _FILE, registration_json(made))
        return made
    check_unchanged(known, study)
    return known


def read_registration(folder: Path) -> Registration | None:
    """What was fixed; None where nothing was yet.

    Raises:
        DataError: the file is damaged, or its content was edited (the hash does not fit).
    """
    path = folder / _FILE
    if not path.is_file():
        return None
    values = read_json(path)
    try:
        known = Registration(values["digest"], values["scale"], values["registered_at"], values["content"])
    except (KeyError, TypeError) as error:
        raise DataError(Problem(str(path), f"damaged: {error!r}")) from None
    if digest_of(known.content) != known.digest:
        raise DataError(Problem(str(path), "its content does not fit its hash: the file was edited by hand"))
    return known


def check_unchanged(known: Registration, study: Study) -> None:
    """Raises InputError, naming what has changed, where the study's file is not what was registered."""
    changed = changes(known.content, content_of(study, known.scale))
    if not changed:
        return
    rule = (
        f"was registered on {known.registered_at[:10]}; a changed criterion makes another study: give the file another "
        f"name, or put back what it said"
    )
    told = [Problem(f"{study.name}: {key}", f"{old} became {new}") for key, old, new in changed]
    raise InputError([*told, Problem(study.name, rule)])


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both; `(absent)` where one has no such key."""
    first, second = dotted(old), dotted(new)
    pairs = [(key, first.get(key, "(absent)"), second.get(key, "(absent)")) for key in dict.fromkeys([*first, *second])]
    return [(key, a, b) for key, a, b in pairs if a != b]


def registration_json(registration: Registration) -> dict[str, Any]:
    """The registration as JSON values."""
    return {
        "digest": registration.digest,
        "scale": registration.scale,
        "registered_at": registration.registered_at,
        "content": dict(registration.content),
    }


def _criterion(claim: Claim) -> dict[str, Any]:
    values = claim.model_dump(mode="json", exclude=set(_WORDS_OF_CLAIM))
    published = [{key: one[key] for key in _NUMBERS_OF_PUBLISHED} for one in values.pop("published")]
    return {**values, "published": published}
