"""What `train_speed` prints: a line per side of every case, then memory, compiling and the machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

NAMES = {
    "trainer": "Trainer + PEFT",
    "trl": "TRL SFTTrainer",
    "trl_kept": "TRL, no checkpointing",
    "solo": "the lab, alone",
}
# The least ratio to Trainer + PEFT, and the least share of the limit, by the issue; at micro-batch 2.
GOALS: Mapping[str, tuple[float, float | None]] = {"solo": (1.5, None), "cohort_8": (2.5, 0.7)}
GOAL_MICRO_BATCH = 2
MEMORY_GOAL = 1.6
_HEAD = ("side", "tokens/s", "least..most", "ratio", "least..most", "of limit", "of own shapes")
_WIDTHS = (26, 10, 14, 8, 14, 10, 15)


def name_of(side: str) -> str:
    """For people."""
    return NAMES.get(side) or side.replace("_", " of ").replace("cohort", "the lab, cohort")


def cases_text(cases: Iterable[Mapping[str, Any]]) -> str:
    """The table."""
    return "\n".join(line for case in cases for line in _case(case))


def tail_text(result: Mapping[str, Any]) -> str:
    """Memory, compiling, the machine, and what the columns mean."""
    return "\n".join(_tail(result))


def _case(case: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{case['model']}, {case['target']}, micro-batch {case['micro_batch']}: limit "
        f"{case['limit_tokens_per_second']:.0f} tokens/s"
    )
    yield _line(_HEAD)
    for name, side in case["sides"].items():
        speed, ratio = side["tokens_per_second"], side["ratio"]
        cells = (
            name_of(name),
            f"{speed['median']:.0f}",
            f"{speed['least']:.0f}..{speed['most']:.0f}",
            "-" if ratio is None else f"{ratio['median']:.2f}",
            "-" if ratio is None else f"{ratio['least']:.2f}..{ratio['most']:.2f}",
            f"{side['share_of_limit']:.0%}",
            f"{side['share_of_own_shapes']:.0%}",
        )
        yield _line(cells) + _short(case, name, side)
    for name, why in case["missing"].items():
        yield f"{name_of(name):<{_WIDTHS[0]}}  {why}"
    yield ""


def _short(case: Mapping[str, Any], name: str, side: Mapping[str, Any]) -> str:
    """What falls short of its goal, where there is one."""
    if name not in GOALS or case["micro_batch"] != GOAL_MICRO_BATCH or side["ratio"] is None:
        return ""
    ratio, share = GOALS[name]
    short = [f"{ratio} times"] if side["ratio"]["median"] < ratio else []
    short += [f"{share:.0%} of the limit"] if share is not None and side["share_of_limit"] < share else []
    return f"   below its goal: {', '.join(short)}" if short else ""


def _tail(result: Mapping[str, Any]) -> Iterator[str]:
    yield "tokens/s: real tokens, padding not counted; ratio: to Trainer + PEFT in the same round; of limit: of what"
    yield "the frozen matrix products alone would allow at the speed of one large product; of own shapes: the same at"
    yield "the speed measured of the model's own products at that number of rows."
    for found in result["memory"].values():
        yield from _memory(found)
    for found in result["compile"].values():
        for state in ("cold", "warm"):
            what = found["how"].strip("_").replace("_", " ")
            yield f"{what}, {name_of(found['side'])}, {state}: {_bill(found[state])}"
    if result["quick"]:
        yield "a tiny model and one turn: its times mean nothing"
    speeds = result["matrix_product_gflops"]
    loads = [load for case in result["cases"].values() for load in case["load_average"]]
    if speeds:
        yield (
            f"{min(speeds):.0f} to {max(speeds):.0f} GFLOP/s in one large product, load average {min(loads):.1f} to "
            f"{max(loads):.1f} on {result['threads']} threads, medians of {result['turns']} turns"
        )
    yield f"{result['seconds']:.0f} s in all"


def _memory(found: Mapping[str, Any]) -> Iterator[str]:
    where = f"memory, {found['model']} {found['target']}"
    if "failed" in found:
        yield f"{where}: {found['failed']}"
        return
    peaks = ", ".join(f"{members} {_megabytes(peak)}" for members, peak in found["peak_bytes"].items())
    yield f"{where}, peak of a step with {found['rows']} rows of {found['row_tokens']} tokens, by members: {peaks}"
    if (ratio := found["ratio"].get("8")) is not None:
        short = "" if ratio <= MEMORY_GOAL else f"   above its goal: {MEMORY_GOAL}"
        yield f"    a cohort of 8: {ratio:.2f} times one run{short}"
    if found["further_member_bytes"] is not None:
        kept = _megabytes(found["further_member_persistent_bytes"])
        yield f"    each further member: {_megabytes(found['further_member_bytes'])}, of which {kept} between steps"


def _bill(found: Mapping[str, Any]) -> str:
    if "missing" in found:
        return str(found["missing"])
    steps = found["steps_until_it_pays"]
    pays = "never pays" if steps is None else f"pays after {steps:.0f} steps"
    speeds = found["tokens_per_second"]
    return (
        f"{speeds['compiled']:.0f} tokens/s against {speeds['eager']:.0f}, {found['compile_seconds']:.0f} s of "
        f"compiling, {pays}"
    )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _line(cells: Iterable[str]) -> str:
    first, *others = zip(cells, _WIDTHS, strict=True)
    return f"{first[0]:<{first[1]}}" + "".join(f"{text:>{width}}" for text, width in others)
