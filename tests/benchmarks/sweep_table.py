"""What `sweep_speed` prints: both sides of the sweep, where their time went, the equal pair, and growth."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

GOAL = 10.0
# Phases of ours by the key of a run. What a cohort shares stands with each of its members: the longest is that of all.
_OWN = ("load", "probe", "train", "evaluate", "save")
_SHARED = "cohort_train"


def sweep_text(result: Mapping[str, Any]) -> str:
    """The whole text."""
    return "\n".join(_lines(result))


def totals(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """ours: the median of its sweeps. theirs: the sum of its runs, those not measured at the mean of the others.
    ratio: of both. None where a side has nothing yet."""
    ours = [one["seconds"] for one in result["ours"].values()]
    theirs = [one["seconds"] for one in result["theirs"].values()]
    if not ours or not theirs:
        return None
    trials = len(result["sweep"]["rates"]) * result["sweep"]["seeds"]
    whole = statistics.fmean(theirs) * trials
    middle = statistics.median(ours)
    return {"ours": middle, "theirs": whole, "ratio": whole / middle, "measured": len(theirs), "trials": trials}


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    sweep = result["sweep"]
    yield (
        f"{len(sweep['rates']) * sweep['seeds']} trials, {sweep['steps']} steps of {sweep['batch']} rows in pieces of "
        f"{sweep['micro_batch']}, {sweep['questions']} questions of each task"
    )
    for name, one in result["ours"].items():
        yield f"ours, {name} time: {one['seconds']:.0f} s ({one['cpu_seconds']:.0f} s of processors){_phases(one)}"
    for name, one in result["theirs"].items():
        spent = ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in one["seconds_of"].items())
        yield f"theirs, {name}: {one['seconds']:.0f} s ({one['cpu_seconds']:.0f} s of processors; {spent})"
    if (both := totals(result)) is not None:
        rest = both["trials"] - both["measured"]
        note = f", {rest} of them at the mean of the others" if rest else ""
        short = "" if both["ratio"] >= GOAL or result["quick"] else f"   below its goal: {GOAL:g}"
        yield f"theirs {both['theirs']:.0f} s{note}, ours {both['ours']:.0f} s: {both['ratio']:.2f} times{short}"
    for pair in result["equality"].values():
        yield (
            f"equal pair, {pair['run']} (ours {pair['executed']}), {pair['steps']} steps: losses at most "
            f"{pair['loss']:.1e} apart{'' if pair['within'] else ', BEYOND the tolerance'}; weights at most "
            f"{pair['weights']:.1e}, {pair['weights_relative']:.1e} of their norm"
        )
    for trials, one in result["growth"].items():
        yield f"growth, {trials} trials: {one['seconds']:.0f} s, {one['seconds'] / int(trials):.1f} s each"
    yield from _machine(result)


def _machine(result: Mapping[str, Any]) -> Iterator[str]:
    if result["quick"]:
        yield "few trials, steps and questions: its times mean nothing"
    speeds = result["matrix_product_gflops"]
    parts = ("ours", "theirs", "growth")
    loads = [load for part in parts for one in result[part].values() for load in one["load_average"]]
    if speeds and loads:
        yield (
            f"{min(speeds):.0f} to {max(speeds):.0f} GFLOP/s in one large product between processes, load average "
            f"{min(loads):.1f} to {max(loads):.1f} on {result['threads']} threads"
        )
    yield f"{result['seconds']:.0f} s in all"


def _phases(one: Mapping[str, Any]) -> str:
    """Sums over the runs, and over the cohorts of what their members share."""
    runs = [(run.get("cohort"), run.get("measurements", {})) for run in one["runs"].values()]
    sums = {phase: sum(found.get(f"{phase}_seconds", 0.0) for _, found in runs) for phase in _OWN}
    cohorts: dict[str, float] = {}
    for cohort, found in runs:
        if cohort is not None:
            cohorts[cohort] = max(cohorts.get(cohort, 0.0), found.get(f"{_SHARED}_seconds", 0.0))
    sums["train"] += sum(cohorts.values())
    text = ", ".join(f"{phase} {value:.0f}" for phase, value in sums.items() if value)
    return f" ({text})" if text else ""
