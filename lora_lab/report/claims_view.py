"""What a page and a terminal say of a study's claims: its verdicts, and what was fixed before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_lab.plan.shown_study import reproduce_command
from lora_lab.record.registration import Registration
from lora_lab.record.run_record import RunRecord
from lora_lab.record.verdicts import Look
from lora_lab.schema.claims import Form, Scale
from lora_lab.schema.study import Study
from lora_lab.study.verdict import Verdict

FORMS: Mapping[Form, str] = {"as_published": "as published", "tuned": "rate tuned"}


@dataclass(frozen=True, slots=True)
class ClaimsView:
    """A study's claims at one scale.

    study: as its file has it, or as its folder at this scale does. verdicts: of the look at `seeds`, in the order of
    the file. looks: all that were begun. registration: None where nothing was fixed yet. records: by run id, the runs
    that the verdicts rest on, as far as the ledger has them.
    """

    study: Study
    scale: Scale
    seeds: tuple[int, ...]
    verdicts: tuple[Verdict, ...]
    looks: tuple[Look, ...]
    registration: Registration | None
    records: Mapping[str, RunRecord]

    @property
    def command(self) -> str:
        """How the study is run again."""
        return reproduce_command(self.study.name, self.scale)


def form_text(form: Form | None) -> str:
    """A form in words; nothing for claims that have none."""
    return "" if form is None else FORMS[form]
