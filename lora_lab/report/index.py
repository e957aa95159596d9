"""`sweeps/README.md`: every study with its claims, their rules in words, verdicts, cost, and how to run it.

Made from the study files and from the verdicts that are recorded beside them (`records/studies/NAME/verdicts.json`);
`python -m lora_lab.report.index` writes it anew. A claim without a recorded verdict is `not run`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_lab.errors import LabError
from lora_lab.plan.shown_study import folder_name, reproduce_command
from lora_lab.plan.study_file import read_study
from lora_lab.record.atomic import write_text
from lora_lab.record.kept_records import FOLDER
from lora_lab.record.registration import check_unchanged, read_registration
from lora_lab.record.study_folder import study_folder
from lora_lab.record.verdicts import VerdictsFile, read_verdicts
from lora_lab.report.claim_rules import link_of, rule_text
from lora_lab.report.claims_view import form_text
from lora_lab.report.text import clean, seconds_text
from lora_lab.schema.claims import Claim, Conjunction, NotRunnable, Scale
from lora_lab.schema.study import Study
from lora_lab.study.judge import claims_judged, forms_of
from lora_lab.study.study_cost import busy_seconds, count_runs, results_of
from lora_lab.study.verdict import Verdict, verdict_from_json

NOT_RUN = "not run"
_HEAD = """\
# Studies

<!-- Made by `python -m lora_lab.report.index` from the study files and their recorded verdicts; do not edit. -->

Every file here is a study: a question, what runs to answer it, and the published claims that it judges, by rules fixed
before running. `lora-lab reproduce NAME` runs what is missing, judges every claim and draws the page; `--dry-run` shows
the plan, `--recorded` judges the runs kept in `records/` and runs nothing, `--scale published` is the set-up of the
source. What the rules and words mean stands in the main README.
"""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What is recorded of a study at one scale. verdicts: by claim. runs, seconds: of the recorded runs; 0 and None
    where there are none. looks: how many were begun. problem: why no recorded verdict is shown."""

    verdicts: Mapping[str, tuple[Verdict, ...]]
    runs: int
    seconds: float | None
    looks: int
    problem: str | None


_NOTHING = Recorded({}, 0, None, 0, None)


def render_index(folder: Path) -> str:
    """The index of the studies of a folder, as markdown.

    Raises:
        InputError: a study file is wrong. DataError: a record is damaged.
    """
    studies = [read_study(path) for path in sorted(folder.glob("*.yaml"))]
    recorded = {
        (study.name, scale): recorded_of(folder / FOLDER, study, scale) for study in studies for scale in study.scales
    }
    rows = [_overview_row(study, scale, recorded[study.name, scale]) for study in studies for scale in study.scales]
    table = _table(("study", "scale", "claims", "verdicts", "runs", "took"), rows)
    parts = [_HEAD, table]
    for study in studies:
        parts.append("\n".join(_study_lines(study, {scale: recorded[study.name, scale] for scale in study.scales})))
    return "\n".join(parts).rstrip() + "\n"


def recorded_of(records: Path, study: Study, scale: Scale) -> Recorded:
    """The verdicts of the newest look that lie beside the study files.

    Raises:
        DataError: a file is damaged.
    """
    name = folder_name(study.name, scale)
    folder = study_folder(records, name)
    known, registration = read_verdicts(folder), read_registration(folder)
    if known is None or known.newest is None or registration is None:
        return _NOTHING
    results = results_of(records, name)
    runs, seconds = len(results), busy_seconds(results) if results else None
    problem = None
    if registration.digest != known.registration:
        problem = "the recorded verdicts are by other criteria than those registered beside them"
    else:
        try:
            check_unchanged(registration, study)
        except LabError:
            problem = "the file's criteria have changed since they were registered"
    verdicts = {} if problem is not None else _by_claim(known)
    return Recorded(verdicts, runs, seconds, len(known.looks), problem)


def _by_claim(known: VerdictsFile) -> dict[str, tuple[Verdict, ...]]:
    found: dict[str, tuple[Verdict, ...]] = {}
    for values in () if known.newest is None else known.newest.verdicts:
        verdict = verdict_from_json(values)
        found[verdict.claim] = (*found.get(verdict.claim, ()), verdict)
    return found


def _overview_row(study: Study, scale: Scale, recorded: Recorded) -> tuple[str, ...]:
    claims = claims_judged(study, scale)
    counts = Counter(word for claim in claims for word in _words(claim, recorded))
    told = recorded.problem or ", ".join(f"{count} {word}" for word, count in counts.items()) or "no claims"
    link = f"[{study.name}](#{study.name.replace('.', '')})"
    took = "-" if recorded.seconds is None else seconds_text(recorded.seconds)
    return (link, scale, str(len(claims)), told, str(count_runs(study.design(scale))), took)


def _words(claim: Claim, recorded: Recorded) -> list[str]:
    if claim.id in recorded.verdicts:
        return [verdict.word for verdict in recorded.verdicts[claim.id]]
    if isinstance(claim, NotRunnable):
        return ["not runnable"]
    return [NOT_RUN] if isinstance(claim, Conjunction) else [NOT_RUN for _ in forms_of(claim)]


def _study_lines(study: Study, recorded: Mapping[Scale, Recorded]) -> Iterator[str]:
    yield f"\n## {study.name}\n"
    yield f"{_escaped(study.question)}\n"
    if study.source is not None and study.source.title:
        title = _escaped(study.source.title)
        yield f"Source: [{title}]({study.source.url})\n" if study.source.url else f"Source: {title}\n"
        if study.source.notes:
            yield f"Known differences: {_escaped(study.source.notes)}\n"
    for scale, found in recorded.items():
        yield f"{_cost_line(study, scale, found)}\n"
    if study.claims:
        titles = ("claim", "holds if", *recorded, "source")
        yield _table(titles, [_claim_row(claim, study, recorded) for claim in study.claims])


def _cost_line(study: Study, scale: Scale, found: Recorded) -> str:
    command = reproduce_command(study.name, scale) if study.claims else f"lora-lab run -m study={study.name}"
    runs = count_runs(study.design(scale))
    told = f"{runs} run{'' if runs == 1 else 's'}"
    if found.seconds is not None:
        told += f"; the {found.runs} recorded ones took {seconds_text(found.seconds)}"
    looks = f"; {found.looks} looks" if found.looks > 1 else ""
    problem = f"; {found.problem}" if found.problem else ""
    return f"{scale.capitalize()}: `{command}`, {told}{looks}{problem}."


def _claim_row(claim: Claim, study: Study, recorded: Mapping[Scale, Recorded]) -> tuple[str, ...]:
    rule = claim.reason if isinstance(claim, NotRunnable) else rule_text(claim, study)
    verdicts = [_verdict_cell(claim, study, scale, found) for scale, found in recorded.items()]
    return (f"**{claim.id}**: {_escaped(claim.statement)}", _escaped(rule), *verdicts, _sources(claim))


def _verdict_cell(claim: Claim, study: Study, scale: Scale, recorded: Recorded) -> str:
    if claim not in claims_judged(study, scale):
        return ""
    if claim.id not in recorded.verdicts:
        return "not runnable" if isinstance(claim, NotRunnable) else NOT_RUN
    return "<br>".join(_told(verdict) for verdict in recorded.verdicts[claim.id])


def _told(verdict: Verdict) -> str:
    """The sentence, its word in bold, with the form before it."""
    sentence = clean(verdict.sentence)
    begins = len(verdict.word) if sentence.lower().startswith(verdict.word.lower()) else 0
    head = f"**{_escaped(sentence[:begins])}**" if begins else f"**{_escaped(verdict.word)}**: "
    form = f"{form_text(verdict.form)}: " if verdict.form == "tuned" else ""
    return f"{form}{head}{_escaped(sentence[begins:])}"


def _sources(claim: Claim) -> str:
    """Where the claim's numbers are from, each place once."""
    places = dict.fromkeys(number.provenance for number in claim.published)
    return "<br>".join(_place(text) for text in places) or "as the study"


def _place(provenance: str) -> str:
    url = link_of(provenance)
    if url is None:
        return _escaped(provenance)
    rest = provenance[len(url) :].strip(" ,;")
    name = url.split("://", 1)[1].rstrip("/")
    return f"[{_escaped(name)}]({url})" + (f" {_escaped(rest)}" if rest else "")


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _escaped(text: str) -> str:
    """Text that stays text in a cell of a markdown table."""
    plain = clean(text)
    for sign in "\\|*_`[]<>":
        plain = plain.replace(sign, f"\\{sign}")
    return plain


def main(arguments: Sequence[str]) -> int:
    """Writes the index of the folder that is given (`sweeps`); returns the exit code: 2 where a file is wrong."""
    folder = Path(arguments[0] if arguments else "sweeps")
    try:
        write_text(folder / "README.md", render_index(folder))
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
