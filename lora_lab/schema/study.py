"""Study: one question, what is run to answer it, and the claims it is judged by (design.md section 7).

The schema classes of a study file have defaults. A trial is composed from `conf/`, where every default stands once; a
study file is a user's own document, in which a key that is absent means that there is none: no source, no fixed values,
no claims.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError, field_validator, model_validator

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.schema.claims import Claim, Conjunction, Exact, Scale, arm_names
from lora_lab.schema.design import Design
from lora_lab.schema.labels import check_label
from lora_lab.schema.problems import problems_of
from lora_lab.schema.section import Section, as_tuple


class Source(Section):
    """Where a question or finding was published. notes: how the study departs from it."""

    title: str | None = None
    url: str | None = None
    notes: str | None = None


class Study(Design):
    """What a study file says; `name` is the file's name. Its own keys are the design at pocket scale.

    published: the design at the scale of the source, keys as at the top; None where there is none. claims: judged at
    either scale, with the arms of that scale.
    """

    name: str
    question: str
    source: Source | None = None
    published: Design | None = None
    claims: Annotated[tuple[Claim, ...], BeforeValidator(as_tuple)] = ()

    @field_validator("name")
    @classmethod
    def _label(cls, name: str) -> str:
        check_label(name)
        return name

    @field_validator("question")
    @classmethod
    def _has_text(cls, question: str) -> str:
        if not question.strip():
            raise ValueError("empty; say in a sentence what the study asks")
        return question

    @model_validator(mode="after")
    def _claims_fit(self) -> Study:
        problems = list(_claim_problems(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def design(self, scale: Scale) -> Design:
        """What is run at this scale.

        Raises:
            InputError: the study has no published scale.
        """
        if scale == "pocket":
            return self
        if self.published is None:
            raise InputError(Problem("--scale", f"the study {self.name} has no published scale, only pocket"))
        return self.published

    @property
    def scales(self) -> tuple[Scale, ...]:
        """The scales that it has a design for."""
        return ("pocket",) if self.published is None else ("pocket", "published")

    def planned_scale(self, claim: Claim) -> Scale:
        """Whose design the planned quantities of a claim belong to, whichever scale is judged: the published one, where
        the study has it and the claim is made there."""
        return "published" if self.published is not None and "published" in claim.scales else "pocket"

    def claims_at(self, scale: Scale) -> tuple[Claim, ...]:
        """The claims that are judged at this scale."""
        return tuple(claim for claim in self.claims if scale in claim.scales)


def _claim_problems(study: Study) -> Iterator[str]:
    ids = [claim.id for claim in study.claims]
    for one in sorted({one for one in ids if ids.count(one) > 1}):
        yield f"two claims have the id {one}"
    for claim in study.claims:
        yield from (f"claims: {claim.id}: {text}" for text in _problems_of_claim(claim, study, ids))


def _problems_of_claim(claim: Claim, study: Study, ids: list[str]) -> Iterator[str]:
    for scale in (scale for scale in claim.scales if scale in study.scales):
        arms = list(study.design(scale).arms)
        for name in arm_names(claim):
            if name not in arms:
                yield f'{scale} has no arm "{name}"' + nearest(name, arms)
    if isinstance(claim, Conjunction):
        others = [one for one in ids if one != claim.id]
        yield from (f'parts: no other claim "{one}"' + nearest(one, others) for one in claim.parts if one not in others)
    if isinstance(claim, Exact):
        known = [number.id for number in claim.published]
        asked = [term.name for term in claim.formula.terms if term.function == "published"]
        unknown = [name for name in asked if name not in known]
        yield from (f'value: no published number "{name}" in this claim' + nearest(name, known) for name in unknown)


def study_from(mapping: Mapping[str, Any], *, name: str) -> Study:
    """A validated study from the content of its file.

    Raises:
        InputError: with every problem found; `where` is the dotted path inside the file.
    """
    if "name" in mapping:
        raise InputError(Problem("name", f"unknown key; a study is named by its file, here {name}"))
    content = {"name": name, **mapping}
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        raise InputError(problems_of(error, Study, content)) from None
