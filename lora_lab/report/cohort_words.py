"""What is said where time or memory cannot be compared, because runs were trained together or for another reason."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_lab.record.cohort_facts import short_reason
from lora_lab.record.run_record import RunRecord
from lora_lab.study.alone import MEMORY, TIME, NotAlone
from lora_lab.study.cost import is_time
from lora_lab.study.settings import is_base
from lora_lab.study.table import SettingsTable

_KINDS = {TIME: "Time", MEMORY: "Memory"}
_NAMED = 8  # settings by name; the table shows the others
_REASONS = 3
_DEFAULT_ROOT = Path("lab")


def alone_sentences(lacking: Sequence[NotAlone], *, study: str | None = None, root: Path | None = None) -> list[str]:
    """Which settings have no run made alone, and what measures them; nothing where none is lacking.

    study: named in the command where it is known; root: the lab's folder, where it is not the default.
    """
    if len({one.settings for one in lacking}) == 1:
        kinds = " and ".join(_KINDS[one.cost] for one in lacking).replace(" Memory", " memory")
        return [_sentence(kinds, lacking[0], study, root, verb="are" if len(lacking) > 1 else "is")]
    return [_sentence(_KINDS[one.cost], one, study, root, verb="is") for one in lacking]


def _sentence(kinds: str, one: NotAlone, study: str | None, root: Path | None, *, verb: str) -> str:
    count = len(one.settings)
    if count == one.of:
        have = "the only setting has none" if count == 1 else f"none of {one.of} settings has one"
    else:
        have = f"{count} of {one.of} settings {'has' if count == 1 else 'have'} none"
    runs = ("its only run" if one.runs == 1 else f"its {one.runs} runs") if count == 1 else f"their {one.runs} runs"
    names = ", ".join(one.settings[:_NAMED]) + (f" and {count - _NAMED} more" if count > _NAMED else "")
    return (
        f"{kinds} {verb} compared between runs made alone only; {have} among {runs}: {names}. "
        f"To measure: {_command(one.repeat, study, root)}"
    )


def _command(repeat: int, study: str | None, root: Path | None) -> str:
    alone = f"launch.cohort=off repeat={repeat}"
    if study is None:
        return f"the same command with {alone}"
    where = ""
    if root is not None and root != _DEFAULT_ROOT:
        # No folder of this machine goes into a page that others read.
        where = " root=..." if root.is_absolute() else f" root={shlex.quote(root.as_posix())}"
    return f"lora-lab run -m study={study} {alone}{where}"


def empty_columns(table: SettingsTable, titles: Iterable[tuple[str, str]]) -> list[str]:
    """Why columns of costs (measurement, title) are empty in all rows; `alone_sentences` tells the rest."""
    told = {one.cost for one in table.not_alone if len(one.settings) == one.of}
    lines = []
    for name, title in titles:
        is_told = (TIME if is_time(name) else name) in told
        reasons = list(dict.fromkeys(row.why_no_cost(name) for row in table.rows))
        if reasons and not is_told and not any(name in row.cost for row in table.rows):
            lines.append(f"no {title}: {_listed(reasons)}")
    return lines


def missing_of_runs(records: Iterable[RunRecord], titles: Iterable[tuple[str, str]]) -> list[str]:
    """Why trained runs that have ended lack a measurement (name, title of its column), and how many for each reason."""
    ended = [record.result for record in records if record.header is not None and not is_base(record.trial)]
    lines = []
    for name, title in titles:
        lacking = [result for result in ended if result is not None and name not in result.measurements]
        reasons = Counter(short_reason(result, name) for result in lacking)
        parts = [f"{reason} ({count} run{'' if count == 1 else 's'})" for reason, count in reasons.items()]
        if parts:
            lines.append(f"no {title}: {_listed(parts)}")
    return lines


def _listed(reasons: Sequence[str]) -> str:
    return "; ".join(reasons[:_REASONS]) + (
        f"; and {len(reasons) - _REASONS} more reasons" if reasons[_REASONS:] else ""
    )
