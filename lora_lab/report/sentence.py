"""The answer at the head of a page: one sentence, no surer than the numbers behind it."""

from __future__ import annotations

from lora_lab.record.result import Status
from lora_lab.report.text import clean, interval_text, number_text, value_text
from lora_lab.study.answer import Answer, Standing
from lora_lab.study.effects import Effect

_MOST_AXES = 3


def answer_sentence(answer: Answer) -> str:
    """The answer in plain text; names in it are cleaned, and not escaped for HTML.

    Intervals are those of the table and of the effects (95 %). Whether something is established is judged by the
    stricter, corrected ones.
    """
    metric = "a score" if answer.metric is None else clean(answer.metric.name)
    if answer.case == "nothing_ended":
        return "No run has ended yet."
    if answer.case == "only_base" and answer.base is not None:
        return f"So far only the untouched base has a score: {metric} {number_text(answer.base.mean)}."
    if answer.case == "cut_short":
        told = "runs of every setting that has a score were stopped early"
        return f"No setting is compared: {told} ({_counted(answer)})."
    if answer.case in ("none_completed", "no_score") or answer.best is None:
        return _nothing_scored(answer, metric)
    if answer.case == "few_seeds":
        value = f"{number_text(answer.best.mean)} {_seeds(answer.best)}{_base_aside(answer)}"
        caution = "intervals need three seeds, so nothing is claimed"
        return f"{'; '.join([f'{_leads(answer, answer.best, metric)} so far, {value}', caution, *_stopped(answer)])}."
    return _compared(answer, answer.best, metric)


def _nothing_scored(answer: Answer, metric: str) -> str:
    total = sum(answer.counts.values())
    told = _counted(answer)
    if answer.case == "no_score":
        text = f"No completed run has {metric} ({told})"
    elif "RUNNING" in answer.counts:
        text = f"No run has completed yet ({told})"
    else:
        text = f"None of {total} runs completed ({told})" if total > 1 else f"The only run did not complete ({told})"
    return text + (f"; the untouched base has {metric} {number_text(answer.base.mean)}." if answer.base else ".")


def _counted(answer: Answer) -> str:
    return ", ".join(f"{count} {status}" for status, count in answer.counts.items())


def _compared(answer: Answer, best: Standing, metric: str) -> str:
    value = number_text(best.mean) if best.interval is None else interval_text(best.mean, best.interval.half_width)
    parts = [f"{_leads(answer, best, metric)}, {value} {_seeds(best)}{_base_aside(answer)}{_others(answer)}"]
    if answer.not_compared:
        several = len(answer.not_compared) > 1
        parts.append(f"{_some(len(answer.not_compared), 'setting')} {'have' if several else 'has'} too few seeds")
    if answer.effect is not None:
        parts.append(f"the largest established effect is {_effect(answer.effect)}")
    elif answer.axes_tested:
        parts.append(f"no effect of {_axes(answer.axes_tested, 'or')} is established")
    return "; ".join([*parts, *_stopped(answer)]) + "."


def _stopped(answer: Answer) -> list[str]:
    """What early stopping has taken out of the comparison."""
    stopped = answer.counts.get(Status.STOPPED.value, 0)
    if not stopped:
        return []
    told = f"{_some(stopped, 'run')} {'was' if stopped == 1 else 'were'} stopped early"
    if cut := len(answer.cut_short):
        told += f", and {_some(cut, 'setting')} with other runs {'is' if cut == 1 else 'are'} left out"
    return [told]


def _leads(answer: Answer, best: Standing, metric: str) -> str:
    top = "best" if answer.metric is None else "highest" if answer.metric.higher_is_better else "lowest"
    if answer.equals:
        return f"{clean(best.name)} and {_some(answer.equals, 'other')} share the {top} {metric}"
    return f"{clean(best.name)} has the {top} {metric}"


def _seeds(best: Standing) -> str:
    lost = f" ({_some(best.lost, 'run')} without a score)" if best.lost else ""
    return f"over {_some(best.seeds, 'seed')}{lost}"


def _base_aside(answer: Answer) -> str:
    if answer.base is None:
        return ""
    verdict = None if answer.against_base is None else answer.against_base.verdict
    told = {"worse": ", which is better", "open": ", not told apart"}.get(verdict or "", "")
    return f" (untouched base: {number_text(answer.base.mean)}{told})"


def _others(answer: Answer) -> str:
    """How the best setting stands to those it could be compared with."""
    ties, compared = len(answer.ties), len(answer.ties) + len(answer.beaten)
    if compared == 0:
        return ""
    if compared == 1:
        name = clean((answer.ties or answer.beaten)[0])
        return f", but cannot be told apart from {name}" if ties else f", better than {name}"
    if ties == 0:
        return f", better than each of {compared} others"
    return f", but cannot be told apart from {f'{ties} of' if ties < compared else 'any of'} {compared} others"


def _effect(effect: Effect) -> str:
    moved = f" (with {_axes(effect.along, 'and')})" if effect.along else ""
    ends = f"{clean(value_text(effect.low))} to {clean(value_text(effect.high))}"
    interval = effect.interval
    if interval is None:
        return f"{clean(effect.axis)} {ends}{moved}"
    sign = "+" if interval.mean > 0 else ""
    return f"{clean(effect.axis)} {ends}{moved}: {sign}{interval_text(interval.mean, interval.half_width)}"


def _axes(names: tuple[str, ...], joint: str) -> str:
    if len(names) > _MOST_AXES:
        return f"{len(names)} keys"
    listed = [clean(name) for name in names]
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} {joint} {listed[-1]}"


def _some(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
