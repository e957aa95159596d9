"""The figure of a claim's card, with the choices that its reader has."""

from __future__ import annotations

from collections.abc import Sequence

from lora_lab.record.run_record import RunRecord
from lora_lab.report.claim_figures import cost_bars, forest_plot, number_bars
from lora_lab.report.claims_view import ClaimsView, form_text
from lora_lab.report.figures import Figure, missing_figure
from lora_lab.report.lattice_figures import LatticeRow, arm_map, colour_of, parts_of, swept_keys, target_lattice
from lora_lab.report.page_figures import Family, Pick
from lora_lab.schema.claims import Claim, Exact, Ratio, arm_names
from lora_lab.study.verdict import ArmScore, Verdict

_LEGENDS = {
    "differences": "Differences: square and whisker are difference and interval; shaded is where the whole interval "
    "must lie for the claim to hold, dashed its edge.",
    "costs": "Left what each arm cost, right the ratio with its interval; shaded: where it must lie.",
    "numbers": "Grey: published; blue: computed here.",
}


def figure_of(claim: Claim, verdicts: Sequence[Verdict], claims: ClaimsView) -> Family | None:
    """The figures of one claim, by what they show; None where nothing can be drawn."""
    if isinstance(claim, Exact):
        bars = number_bars(claim, verdicts[0])
        found = {} if bars is None else {"numbers": bars}
        legend = _LEGENDS["numbers"]
    elif isinstance(claim, Ratio):
        found, legend = {"costs": cost_bars(verdicts)}, _LEGENDS["costs"]
    else:
        found = {"differences": forest_plot(verdicts), **_of_arms(claim, verdicts, claims)}
        legend = _LEGENDS["differences"]
    drawn = {name: figure for name, figure in found.items() if "data" in figure}
    if not drawn:
        return None
    picks = (Pick("Show", tuple((name, name) for name in drawn), next(iter(drawn))),) if len(drawn) > 1 else ()
    return Family(
        id=f"claim-{claim.id}",
        menu="",
        title=f"Figure of {claim.id}",
        legend=legend,
        picks=picks,
        figures=drawn if picks else {"": next(iter(drawn.values()))},
        notes=(),
    )


def _of_arms(claim: Claim, verdicts: Sequence[Verdict], claims: ClaimsView) -> dict[str, Figure]:
    """A heat map where the arms lie on two axes, a lattice where they adapt different parts, in every form."""
    arms = {name: claims.study.design(claims.scale).arms.get(name, {}) for name in arm_names(claim)}
    figures: dict[str, Figure] = {}
    for verdict in verdicts:
        form = f" ({form_text(verdict.form)})" if len(verdicts) > 1 else ""
        scores = {arm.name: arm.value for arm in verdict.arms}
        if len(swept_keys(arms)) == 2 and len(arms) > 3:
            lower = getattr(claim, "claimed", "lower") == "lower"
            figures[f"{' and '.join(swept_keys(arms))}{form}"] = arm_map(
                arms, scores, unit=verdict.unit or "", lower_is_better=lower
            )
        figures[f"targets{form}"] = _lattice(verdict, claims)
    return figures


def _lattice(verdict: Verdict, claims: ClaimsView) -> Figure:
    rows = []
    for index, arm in enumerate(verdict.arms):
        record = _first_record(arm, claims)
        parts = None if record is None else parts_of(record.trial)
        if parts is None:
            return missing_figure(f"what {arm.name} adapts is not known part by part")
        rows.append(LatticeRow(arm.name, parts, arm.value, arm.standard_error, colour_of(index)))
    return target_lattice(rows, score=f"{verdict.metric} ({verdict.unit})", whisker="± one standard error")


def _first_record(arm: ArmScore, claims: ClaimsView) -> RunRecord | None:
    found = (claims.records.get(run_id) for run_id in arm.run_ids)
    return next((record for record in found if record is not None and record.header is not None), None)
