"""False verdicts and power of every rule in simulated studies with known truth; prints two tables and writes JSON.

python -m tests.calibration.full --output calibration.json

Ends with 1 if more than 5 % of the studies of some kind got a false verdict, beyond what chance in counting explains.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from scipy import special

from tests.calibration.counting import Count, everything

SEEDS = (3, 5, 10)
# Examples: studies of each kind.
SIZES = {100: 3000, 500: 1000, 2000: 500}
# A kind counts as out of bounds where so low a bound on its true rate is above what is allowed.
_CHANCE = 0.001


def out_of_bounds(count: Count) -> bool:
    """Whether the rate is above its bound even at the lower end of its exact binomial interval (Clopper-Pearson)."""
    wrong = round(count.false * count.studies)
    return wrong > 0 and float(special.betaincinv(wrong, count.studies - wrong + 1, _CHANCE)) > count.bound


def _table(
    counts: Iterable[Count], row: Callable[[Count], str], value: Callable[[Count], float | None], worst: bool
) -> list[str]:
    """Rows by what `row` says, columns by seeds: mean and largest value (or all of them, by examples)."""
    cells: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for count in counts:
        number = value(count)
        if number is not None:
            cells[row(count)][count.seeds].append(100 * number)
    lines = []
    for name, columns in cells.items():
        shown = []
        for seeds in SEEDS:
            values = columns[seeds]
            numbers = [f"{one:3.0f}" for one in values]
            if worst and values:
                numbers = [f"{sum(values) / len(values):.1f} / {max(values):.1f}"]
            shown.append(" ".join(numbers) or "-")
        lines.append(f"{name:<72}" + "".join(f"{one:>16}" for one in shown))
    return lines


def report(counts: list[Count]) -> str:
    """Both tables."""
    head = "".join(f"{f'{seeds} seeds':>16}" for seeds in SEEDS)
    sizes = ", ".join(map(str, SIZES))

    def by_rule(count: Count) -> str:
        edge = " (edge: any verdict)" if count.right is None else ""
        return f"{count.outcome}: {count.rule}, truth {count.truth}{edge}"

    def by_noise(count: Count) -> str:
        return f"{count.outcome}, {count.noise}: {count.rule}, {count.truth}"

    informative = ("superiority by d", "equality", "best", "monotone", "ratio")
    powerful = [one for one in counts if one.rule.startswith(informative) and one.outcome in ("normal", "binary")]
    several = [one for one in counts if one.outcome in ("four arms", "times")]
    lines = [
        f"False verdicts, % of studies: mean / worst of all kinds of noise and of {sizes} examples",
        f"{'':<72}{head}",
    ]
    lines += _table(counts, by_rule, lambda one: one.false, worst=True)
    lines += ["", f"Right verdicts, % of studies: with {sizes} examples", f"{'':<72}{head}"]
    lines += _table([*powerful, *several], by_noise, lambda one: one.power, worst=False)
    return "\n".join(lines)


def main() -> int:
    """Prints the tables, writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("calibration.json"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    counts = list(everything(np.random.default_rng(options.seed), SEEDS, SIZES))
    seconds = time.perf_counter() - start
    rows = [count.to_json() for count in counts]
    options.output.write_text(json.dumps({"seed": options.seed, "seconds": seconds, "counts": rows}, indent=1))
    wrong = [count for count in counts if out_of_bounds(count)]
    print(report(counts))
    print(f"\n{len(counts)} kinds of study in {seconds:.0f} s; {len(wrong)} out of bounds; {options.output}")
    for count in wrong:
        print(f"  {count}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
