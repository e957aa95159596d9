"""`reproduce --dry-run`: every stage of a study as far as it is known, and what of it is done."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from lora_lab.app.picked_rates import told
from lora_lab.app.study_call import StudyCall
from lora_lab.app.study_stages import Stages
from lora_lab.report.terminal import plan_json, print_plan


def print_stages(call: StudyCall, stages: Stages, seeds: Sequence[int], *, as_json: bool) -> None:
    """Prints them, and nothing else happens."""
    known = {"tuning": stages.tuning, "judged": stages.judged, "timing": stages.timing}
    if as_json:
        parts: list[dict[str, Any]] = [
            {"stage": name, "runs": [plan_json(row) for row in stage.plan.rows]}
            for name, stage in known.items()
            if stage is not None
        ]
        picks = [{"values": dict(one.values), "rate": one.rate, "edge": one.edge} for one in stages.picks]
        content = {
            "study": call.study.name,
            "scale": call.scale,
            "seeds": list(seeds),
            "claims": [claim.id for claim in call.study.claims_at(call.scale)],
            "stages": parts,
            "picks": picks,
            "waiting_for_a_rate": len(stages.waiting),
        }
        json.dump(content, sys.stdout, indent=2)
        print()
        return
    for name, stage in known.items():
        if stage is not None:
            done = sum(row.state == "done" for row in stage.plan.rows)
            print(f"{name}: {len(stage.plan.jobs)} runs, {done} done")
            print_plan(stage.plan.rows)
    for line in told(stages.picks, base=call.design.base):
        print(f"picked: {line}")
    if stages.waiting:
        print(f"{len(stages.waiting)} judged runs wait for the rates that tuning picks")
