"""Claims and designs of a study file: what they may say, and every slip named with the nearest valid choice."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_lab.errors import InputError
from lora_lab.schema.claims import Exact, arm_names, is_deterministic, needs_runs
from lora_lab.schema.study import Study, study_from

SUPERIOR = {
    "id": "bigger", "statement": "More rank is better.", "rule": "superiority", "metric": "heldout/loss", "arm": "big",
    "against": "small", "claimed": "lower", "smallest_difference": 0.05, "forms": ["as_published", "tuned"],
}  # fmt: skip
EXACT = {
    "id": "slower", "statement": "39 % longer.", "rule": "exact", "low": 0.38, "high": 0.40, "value": "nf4 / lora - 1",
    "published": [
        {"id": "nf4", "value": 10059.53, "unit": "s", "what": "QLoRA", "provenance": "its table"},
        {"id": "lora", "value": 6685.75, "unit": "s", "what": "LoRA", "provenance": "its table"},
    ],
}  # fmt: skip
STUDY = {
    "question": "Does rank matter?",
    "base": {"model": "smollm2_135m"},
    "seeds": [0, 1, 2],
    "grids": [{"rank": [2, 4, 8], "learning_rate": [2e-3, "tuned"]}],
    "arms": {"small": {"rank": 2}, "middle": {"rank": 4}, "big": {"rank": 8}},
    "tuning": {"metric": "heldout/loss", "seeds": [9], "rates": [{"values": [1e-3, 2e-3, 4e-3]}]},
}


def study(*claims: dict[str, Any], **values: Any) -> Study:
    return study_from({**STUDY, "claims": list(claims), **values}, name="ranks")


def problems(*claims: dict[str, Any], **values: Any) -> str:
    with pytest.raises(InputError) as caught:
        study(*claims, **values)
    return "\n".join(map(str, caught.value.problems))


def test_a_study_with_claims_is_read_and_read_back_from_json() -> None:
    made = study(SUPERIOR, EXACT)
    assert Study.model_validate(json.loads(json.dumps(made.model_dump(mode="json")))) == made
    superior, exact = made.claims
    assert (arm_names(superior), needs_runs(superior), is_deterministic(superior)) == (("big", "small"), True, False)
    assert isinstance(exact, Exact)
    assert (arm_names(exact), needs_runs(exact), is_deterministic(exact)) == ((), False, True)
    assert [term.name for term in exact.formula.terms] == ["nf4", "lora"]


def test_of_several_arms_the_mean_may_be_meant() -> None:
    assert arm_names(study({**SUPERIOR, "arm": ["big", "middle"]}).claims[0]) == ("big", "middle", "small")


def test_arms_are_those_of_the_scales_where_a_claim_is_judged() -> None:
    published = {"grids": [{"rank": [8, 256]}], "arms": {"small": {"rank": 8}, "big": {"rank": 256}}}
    assert study(SUPERIOR, published=published).design("published").arms["big"] == {"rank": 256}
    one_less = {**published, "arms": {"small": {"rank": 8}}}
    assert 'published has no arm "big"' in problems(SUPERIOR, published=one_less)
    assert study({**SUPERIOR, "scales": ["pocket"]}, published=one_less).claims_at("published") == ()


def test_a_scale_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no published scale"):
        study(SUPERIOR).design("published")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rule": "superior"}, 'no such choice "superior"; did you mean "superiority"?'),
        ({"margn": 1}, "unknown key"),
        ({"arm": "bigg"}, 'no arm "bigg"; did you mean "big"?'),
        ({"arm": "small"}, "arm and against share small"),
        ({"seeds": 2}, "must be >= 3, got 2"),
        ({"smallest_difference": -0.1}, "must be >= 0, got -0.1"),
        ({"claimed": "better"}, 'no such choice "better"'),
        ({"forms": []}, "must have at least 1"),
        ({"id": "a b"}, "expected letters, digits and _"),
        ({"scales": ["pockt"]}, 'did you mean "pocket"?'),
        ({"rule": "monotone", "arms": ["small", "big"]}, "must have at least 3"),
        ({"rule": "best_of", "arms": ["small", "big"], "best": "middle"}, '"middle" is none of the arms small, big'),
    ],
)
def test_slips_in_a_claim(changed: dict[str, Any], message: str) -> None:
    claim = {**SUPERIOR, **changed}
    if claim["rule"] in ("monotone", "best_of"):
        claim = {key: value for key, value in claim.items() if key not in ("arm", "against")}
    assert message in problems(claim)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"value": "nf4 / lra"}, 'no published number "lra" in this claim; did you mean "lora"?'),
        ({"value": "nf4 ** 2"}, "is not a number, a published number"),
        ({"value": "planned(total_parameters, bg)"}, 'no arm "bg"; did you mean "big"?'),
        ({"low": 2.0}, "low 2.0 is above high 0.4"),
        ({"low": None, "high": None}, "needs low, high, or both"),
    ],
)
def test_slips_in_an_exact_claim(changed: dict[str, Any], message: str) -> None:
    assert message in problems({**EXACT, **changed})


def test_claims_are_told_apart_and_parts_are_claims() -> None:
    assert "two claims have the id bigger" in problems(SUPERIOR, SUPERIOR)
    both = {"id": "both", "statement": "Both.", "rule": "conjunction", "parts": ["bigger", "slowr"]}
    assert 'parts: no other claim "slowr"; did you mean "slower"?' in problems(SUPERIOR, EXACT, both)


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (None, "so the study needs tuning"),
        ({"seeds": [2]}, "tuning.seeds: 2 would be judged too"),
        ({"rates": [{"values": [1e-3, 2e-3]}]}, "must have at least 3"),
        ({"rates": [{"values": [2e-3, 1e-3, 4e-3]}]}, "rates must ascend"),
        (
            {"rates": [{"when": {"rank": 2}, "values": [1e-3, 2e-3, 4e-3, 8e-3]}, {"values": [1e-3, 2e-3, 4e-3]}]},
            "grids of rates must be of equal size, got 3 and 4 rates",
        ),
    ],
)
def test_slips_in_tuning(tuning: dict[str, Any] | None, message: str) -> None:
    assert message in problems(SUPERIOR, tuning=None if tuning is None else {**STUDY["tuning"], **tuning})  # type: ignore[dict-item]


def test_a_seed_stands_once() -> None:
    assert "seeds: each once, got 0, 1, 1" in problems(seeds=[0, 1, 1])
