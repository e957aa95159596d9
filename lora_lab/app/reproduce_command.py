"""`lora-lab reproduce STUDY`: runs what is missing, judges every claim, writes the page, prints the verdicts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lora_lab.app.study_call import open_call
from lora_lab.app.study_stages import run_stages


def main(arguments: Sequence[str]) -> int:
    """Runs `reproduce ...`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="lora-lab reproduce", description=__doc__.partition(": ")[2])
    parser.add_argument("study", help="a file of sweeps/, by name")
    parser.add_argument("overrides", nargs="*", help="housekeeping, as root=DIR or launch.device=cuda:0")
    parser.add_argument("--scale", choices=("pocket", "published"), default="pocket")
    options = parser.parse_intermixed_args(list(arguments[1:]))
    call = open_call(options.study, options.scale, options.overrides)
    _, is_whole = run_stages(call)
    return 0 if is_whole else 3
