"""What only a run needs, and can be known before the first weight is read."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_lab.app.planning import Plan
from lora_lab.errors import InputError, Problem
from lora_lab.record.ledger import Ledger


def check_before_loading(plan: Plan) -> None:
    """Refuses a plan that cannot run here, and prints what a user should read before it does.

    Raises:
        InputError: runs that a newer lab has written, or that are predicted not to fit.
        MachineError: a device is not there, or the disk refuses.
    """
    from lora_lab.app.memory_check import refuse_what_does_not_fit
    from lora_lab.launch.device import choose_devices  # torch from here on

    ledger = Ledger(Path(plan.lab.root))
    records = [record for job in plan.jobs if (record := ledger.find(job.fingerprint, job.repeat)) is not None]
    if newer := [Problem("", str(record.problem)) for record in records if record.state == "NEWER"]:
        raise InputError(newer)
    choose_devices(plan.lab.launch.device)
    ledger.prepare()
    refuse_what_does_not_fit(plan)
    for note in plan.notes:
        print(note, file=sys.stderr)
