"""The points of a study, stage by stage: those that tune, that are judged, for the clock, and those only counted.

Pure: from a design and the learning rates that tuning picked to flat mappings of configuration keys, not yet composed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.plan.expand import expand
from lora_lab.schema.design import RATE, TUNED, Design, Tuning, Value

# tuning: runs that rates are picked by. judged: those that claims are judged by. timing: those for the clock.
# planned: never run; what is known of them before.
Stage = Literal["tuning", "judged", "timing", "planned"]
SEED = "seed"

# What tells one setting of a study from another: its values without the seed.
SettingKey = tuple[tuple[str, Any], ...]
Rates = Mapping[SettingKey, float]


@dataclass(frozen=True, slots=True)
class StagePoint:
    """One run to be made.

    values: as the study's file has them, `tuned` still in place of a rate, without what the stage sets besides; arms
    are picked by these. trial: what is composed. rate: the learning rate that is tried, or that tuning picked; None
    where the file says it. repeat: of the run (0 but for timing).
    """

    stage: Stage
    values: Mapping[str, Value]
    trial: Mapping[str, Value]
    rate: float | None = None
    repeat: int = 0


@dataclass(frozen=True, slots=True)
class Pick:
    """What tuning found for one setting.

    rate: None where no rate was scored with every seed. edge: the picked rate is the lowest or the highest of its grid.
    tried: every rate with its mean score; None where one of its runs has none.
    """

    values: Mapping[str, Value]
    rate: float | None
    edge: Literal["lowest", "highest"] | None
    tried: tuple[tuple[float, float | None], ...]


def setting_key(values: Mapping[str, Any]) -> SettingKey:
    """The same for the points of one setting, whatever their seed, and however JSON has kept their lists."""
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key != SEED}
    return tuple(sorted(plain.items()))


def is_tuned(values: Mapping[str, Any]) -> bool:
    """Whether tuning picks this setting's learning rate."""
    return values.get(RATE) == TUNED


def tuning_points(design: Design) -> list[StagePoint]:
    """Every tuned setting with every rate of its grid and every tuning seed; none where nothing is tuned.

    Raises:
        InputError: a setting for which no grid of rates is meant.
    """
    if design.tuning is None:
        return []
    tuning = design.tuning
    points = []
    for values in settings_of(design):
        if not is_tuned(values):
            continue
        for rate in rates_of(tuning, values):
            for seed in tuning.seeds:
                own = {**values, SEED: seed}
                points.append(StagePoint("tuning", own, {**own, **tuning.base, RATE: rate, SEED: seed}, rate))
    return points


def rates_of(tuning: Tuning, values: Mapping[str, Value]) -> tuple[float, ...]:
    """The rates that are tried for a setting: of the first entry whose `when` fits it.

    Raises:
        InputError: none fits.
    """
    for entry in tuning.rates:
        if fits(values, entry.when):
            return entry.values
    told = told_values({key: value for key, value in values.items() if key not in (SEED, RATE)})
    raise InputError(Problem("tuning.rates", f"no entry fits {told}; an entry without `when` fits every setting"))


def pick_rates(
    design: Design, scores: Mapping[tuple[SettingKey, float], Sequence[float | None]], *, higher_is_better: bool
) -> list[Pick]:
    """The best mean for every tuned setting; of equal means the lower rate.

    scores: of a setting and a rate, the metric with each tuning seed, None where a run has no score.
    """
    if design.tuning is None:
        return []
    picks = []
    for values in settings_of(design):
        if is_tuned(values):
            key, rates = setting_key(values), rates_of(design.tuning, values)
            tried = [(rate, _mean(scores.get((key, rate), ()), len(design.tuning.seeds))) for rate in rates]
            picks.append(_pick(values, tried, sign=-1.0 if higher_is_better else 1.0))
    return picks


def _pick(values: Mapping[str, Value], tried: Sequence[tuple[float, float | None]], *, sign: float) -> Pick:
    scored = [(sign * mean, rate) for rate, mean in tried if mean is not None]
    if not scored:
        return Pick(values, None, None, tuple(tried))
    rate = min(scored)[1]
    edge: Literal["lowest", "highest"] | None = None
    if rate == tried[0][0]:
        edge = "lowest"
    elif rate == tried[-1][0]:
        edge = "highest"
    return Pick(values, rate, edge, tuple(tried))


def _mean(scores: Sequence[float | None], expected: int) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) == expected else None


def judged_points(design: Design, rates: Rates, *, seeds: Sequence[int] = ()) -> list[StagePoint]:
    """Every point of the grids, as `expand` has them; a tuned one whose rate is not picked is left out.

    seeds: those of a later look, in place of the design's.
    """
    if seeds:
        design = design.model_copy(update={"seeds": tuple(seeds)})
    points = []
    for values in expand(design):
        if not is_tuned(values):
            points.append(StagePoint("judged", values, values))
        elif (rate := rates.get(setting_key(values))) is not None:
            points.append(StagePoint("judged", values, {**values, RATE: rate}, rate))
    return points


def timing_points(design: Design, rates: Rates, *, first_repeat: int = 0) -> list[StagePoint]:
    """The runs for the clock in the order in which they are made: every repeat holds every arm once, shuffled.

    Of an arm the setting at a fixed rate is timed, where it has one. Empty where the design times nothing, or where a
    rate is not picked yet.

    Raises:
        InputError: an arm that is not exactly one setting.
    """
    timing = design.timing
    if timing is None:
        return []
    arms = {name: arm_setting(design, name, where="timing.arms") for name in timing.arms}
    tuned = [values for values in arms.values() if is_tuned(values)]
    if any(setting_key(values) not in rates for values in tuned):
        return []
    order = random.Random(timing.seed)
    points: list[StagePoint] = []
    for repeat in range(first_repeat, first_repeat + timing.repeats):
        shuffled = list(arms)
        order.shuffle(shuffled)
        points += [
            _with_rate(replace(_first(design, arms[name], "timing", timing.base), repeat=repeat), rates)
            for name in shuffled
        ]
    return points


def planned_points(design: Design, arms: Iterable[str]) -> list[StagePoint]:
    """A point per arm of which only facts are asked for that no rate changes: of tuned ones the first rate stands in.

    Raises:
        InputError: an arm that is not exactly one setting.
    """
    points = []
    for name in dict.fromkeys(arms):
        values = arm_setting(design, name, where="claims")
        point = _first(design, values, "planned", {})
        if is_tuned(values) and design.tuning is not None:
            point = replace(point, trial={**point.trial, RATE: rates_of(design.tuning, values)[0]})
        points.append(point)
    return points


def arm_setting(design: Design, name: str, *, where: str) -> Mapping[str, Value]:
    """The one setting that an arm picks: at a fixed rate where there is one, else the tuned one.

    Raises:
        InputError: no such arm; none or several settings.
    """
    if name not in design.arms:
        raise InputError(Problem(where, f'no arm "{name}"' + nearest(name, list(design.arms))))
    found = [values for values in settings_of(design) if fits(values, design.arms[name])]
    fixed = [values for values in found if not is_tuned(values)]
    chosen = fixed or found
    if len(chosen) == 1:
        return chosen[0]
    asked = told_values(design.arms[name])
    if not chosen:
        raise InputError(Problem(f"arms.{name}", f"no setting of the grids has {asked}"))
    varying = [key for key in chosen[0] if len({setting_key({key: one.get(key)}) for one in chosen}) > 1]
    told = "; ".join(told_values({key: one.get(key) for key in varying}) for one in chosen)
    raise InputError(Problem(f"arms.{name}", f"{asked} picks {len(chosen)} settings ({told}); an arm is one"))


def fits(values: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a point has all the wanted values, as they are written in the study's file."""
    first, second = dict(setting_key(values)), dict(setting_key(wanted))
    return all(key in first and first[key] == value for key, value in second.items())


def told_values(values: Mapping[str, Any]) -> str:
    """Values as on the command line."""
    return ", ".join(f"{key}={value}" for key, value in values.items())


def settings_of(design: Design) -> list[dict[str, Value]]:
    """Every setting of the grids once, without a seed."""
    seen: dict[SettingKey, dict[str, Value]] = {}
    for values in expand(design):
        seen.setdefault(setting_key(values), {key: value for key, value in values.items() if key != SEED})
    return list(seen.values())


def _first(design: Design, values: Mapping[str, Value], stage: Stage, base: Mapping[str, Value]) -> StagePoint:
    """A setting with the design's first seed, where it has seeds."""
    seed: dict[str, Value] = {SEED: design.seeds[0]} if design.seeds else {}
    return StagePoint(stage, {**values, **seed}, {**values, **base, **seed})


def _with_rate(point: StagePoint, rates: Rates) -> StagePoint:
    if not is_tuned(point.values):
        return point
    rate = rates[setting_key(point.values)]
    return replace(point, trial={**point.trial, RATE: rate}, rate=rate)
