"""What is fixed before a study runs: any criterion that changes is found and named, words may change."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lora_lab.errors import DataError, InputError
from lora_lab.record.registration import content_of, digest_of, read_registration, register
from lora_lab.schema.study import Study, study_from

CLAIM = {
    "id": "bigger",
    "statement": "Rank 8 is better.",
    "rule": "superiority",
    "metric": "heldout/loss",
    "arm": "large",
    "against": "small",
    "claimed": "lower",
    "smallest_difference": 0.05,
    "published": [{"id": "gain", "value": 0.3, "unit": "nats", "what": "gain", "provenance": "table 1"}],
}
CONTENT: dict[str, Any] = {
    "question": "Does the rank matter?",
    "source": {"title": "A paper", "notes": "another model"},
    "base": {"training.max_steps": 12},
    "seeds": [0, 1, 2],
    "grids": [{"rank": [2, 8]}],
    "metrics": ["heldout/loss"],
    "arms": {"small": {"rank": 2}, "large": {"rank": 8}},
    "claims": [CLAIM],
}


def made(*changes: tuple[tuple[str | int, ...], Any]) -> Study:
    """The study above with values set at paths."""
    content = copy.deepcopy(CONTENT)
    for path, value in changes:
        node: Any = content
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = value
    return study_from(content, name="ranks")


def test_words_may_change(tmp_path: Path) -> None:
    first = register(tmp_path, made(), "pocket")
    claim = ("claims", 0)
    words = made(
        (("question",), "Does it?"),
        (("source", "notes"), "a smaller model"),
        ((*claim, "statement"), "Rank 8 is better than rank 2."),
        ((*claim, "differences"), "fewer steps"),
        ((*claim, "finding"), "ranks-1"),
        ((*claim, "published", 0, "what"), "a gain"),
        ((*claim, "published", 0, "provenance"), "table 2"),
    )
    assert register(tmp_path, words, "pocket") == first, "the time of the first registration stays too"


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("claims", 0, "smallest_difference"), 0.04, "claims.bigger.smallest_difference: 0.05 became 0.04"),
        (("claims", 0, "claimed"), "higher", "claims.bigger.claimed: lower became higher"),
        (("claims", 0, "published", 0, "value"), 0.2, "0.2"),
        (("claims", 0, "seeds"), 3, "claims.bigger.seeds: None became 3"),
        (("claims", 0, "forms"), ["as_published", "tuned"], "claims.bigger.forms"),
        (("claims", 0, "family"), "ranks", "claims.bigger.family: None became ranks"),
        (("claims", 0, "id"), "larger", "claims.larger.rule: (absent) became superiority"),
        (("seeds",), [0, 1, 2, 3], "design.seeds: [0, 1, 2] became [0, 1, 2, 3]"),
        (("base", "training.max_steps"), 13, "design.base.training.max_steps: 12 became 13"),
        (("grids", 0, "rank"), [2, 8, 16], "design.grids"),
        (("arms", "small", "rank"), 8, "design.arms.small.rank: 2 became 8"),
    ],
)
def test_a_changed_criterion_is_named_with_both_values(
    tmp_path: Path, path: tuple[str | int, ...], value: object, told: str
) -> None:
    first = register(tmp_path, made(), "pocket")
    with pytest.raises(InputError) as caught:
        register(tmp_path, made((path, value)), "pocket")
    assert told in str(caught.value) and "another study" in str(caught.value)
    assert read_registration(tmp_path) == first, "what was registered stays"


def test_the_published_design_is_fixed_where_a_formula_counts_on_it(tmp_path: Path) -> None:
    exact = {**CLAIM, "rule": "exact", "value": "planned(trainable_parameters, large)", "low": 1}
    exact = {key: value for key, value in exact.items() if key in ("id", "statement", "rule", "value", "low")}
    published = {"base": {"model": "llama2_7b"}, "grids": [{"rank": [8]}], "arms": {"large": {"rank": 8}}}
    changed = {**published, "base": {"model": "llama2_13b"}}
    counting = [made((("claims",), [exact]), (("published",), one)) for one in (published, changed)]
    assert content_of(counting[0], "pocket") != content_of(counting[1], "pocket")
    own = {**exact, "scales": ["pocket"]}
    running = [made((("claims",), [own]), (("published",), one)) for one in (published, changed)]
    assert content_of(running[0], "pocket") == content_of(running[1], "pocket"), "pocket claims do not use it"


def test_a_registration_edited_by_hand_is_found(tmp_path: Path) -> None:
    register(tmp_path, made(), "pocket")
    path = tmp_path / "registration.json"
    content = json.loads(path.read_text())
    content["content"]["claims"]["bigger"]["smallest_difference"] = 0.01
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="edited by hand"):
        read_registration(tmp_path)


def test_the_digest_is_that_of_the_content_whatever_the_order_of_its_keys() -> None:
    content = content_of(made(), "pocket")
    assert digest_of(content) == digest_of(dict(reversed(content.items())))
    assert digest_of(content) == digest_of(json.loads(json.dumps(content))), "the same after it was on disk"
