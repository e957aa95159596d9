"""`lora-lab reproduce STUDY`: runs what is missing, judges every claim, writes the page, prints the verdicts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lab.app.locations import sweep_folders
from lora_lab.app.study_call import StudyCall, check_overrides, open_call
from lora_lab.app.study_list import list_studies
from lora_lab.app.study_plan import print_stages
from lora_lab.app.study_stages import folder_of, plan_stages, run_stages
from lora_lab.app.study_verdicts import Judged, judge_folder, looks_of
from lora_lab.errors import InputError, Problem
from lora_lab.plan.shown_study import folder_name
from lora_lab.plan.study_file import find_study, read_study
from lora_lab.record.kept_records import FOLDER, keep
from lora_lab.record.ledger import Ledger
from lora_lab.record.looks import seeds_of_look
from lora_lab.record.registration import check_unchanged, read_registration
from lora_lab.record.study_folder import page_path, study_folder
from lora_lab.record.study_points import read_points
from lora_lab.record.verdicts import put_verdicts
from lora_lab.report.terminal_verdicts import print_verdicts
from lora_lab.schema.claims import Scale
from lora_lab.schema.study import Study

_EXCLUSIVE = ("list", "dry_run", "recorded", "keep")


def main(arguments: Sequence[str]) -> int:
    """Runs `reproduce ...`; returns the exit code: 3 where some runs failed."""
    options = _options(arguments[1:])
    seeds = None if options.seeds is None else _seeds(options.seeds)
    if options.list:
        return list_studies(_root(options.overrides), as_json=options.json)
    if options.recorded:
        return _recorded(options.study, options.scale, seeds, as_json=options.json)
    call = open_call(options.study, options.scale, options.overrides)
    chosen = _chosen(call, seeds)
    if options.dry_run:
        print_stages(call, plan_stages(call, seeds=chosen), chosen, as_json=options.json)
        return 0
    if options.keep:
        return _keep(call, as_json=options.json)
    _, is_whole = run_stages(call, seeds=chosen)
    judged = judge_folder(call.root, call.shown.name, call.study, call.scale, seeds=chosen)
    folder = folder_of(call)
    put_verdicts(folder, judged.seeds, [one.to_json() for one in judged.verdicts])
    page = _draw(call)
    _print(call.study, call.scale, judged, as_json=options.json, page=page)
    return 0 if is_whole else 3


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lora-lab reproduce",
        description="Check published claims: run what is missing of a study, judge every claim, draw the page.",
        epilog="OVERRIDES are housekeeping only: root=DIR, cache=DIR, tracking=off, launch.device=cuda:0, ...",
    )
    parser.add_argument("study", nargs="?", help="a file of sweeps/, by name")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDES", help="KEY=VALUE")
    parser.add_argument("--scale", choices=("pocket", "published"), default="pocket", help="(default: pocket)")
    parser.add_argument("--list", action="store_true", help="every study: claims, source, cost, verdicts so far")
    parser.add_argument("--dry-run", action="store_true", help="what would run; nothing is written")
    parser.add_argument("--seeds", metavar="A,B,C", help="fresh seeds: a new look, judged on them alone")
    parser.add_argument("--recorded", action="store_true", help="judge the records kept with the study; run nothing")
    parser.add_argument("--keep", action="store_true", help="copy the study's runs, small, beside its file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_intermixed_args(list(arguments))
    if options.study is not None and "=" in options.study:
        options.study, options.overrides = None, [options.study, *options.overrides]
    chosen = [f"--{name.replace('_', '-')}" for name in _EXCLUSIVE if getattr(options, name)]
    if len(chosen) > 1:
        raise InputError(Problem("", f"only one of {', '.join(chosen)} can be given"))
    if options.list and options.study is not None:
        raise InputError(Problem("--list", f"lists every study; leave out {options.study}"))
    if options.study is None and not options.list:
        raise InputError(Problem("study", "a name is needed: lora-lab reproduce STUDY (--list shows them)"))
    if options.recorded and options.overrides:
        raise InputError(Problem(options.overrides[0], "has no meaning with --recorded: nothing runs"))
    return options


def _seeds(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(Problem("--seeds", f"expected whole numbers with commas between, as 5,6,7; got {text[:100]}"))
    return tuple(map(int, parts))


def _root(overrides: Sequence[str]) -> Path:
    """Of the one override that a list takes."""
    check_overrides(overrides)
    given = dict(text.split("=", 1) for text in overrides)
    if other := [key for key in given if key != "root"]:
        raise InputError(Problem(other[0], "--list takes root=DIR only"))
    return Path(given.get("root", "lab").strip("'\""))


def _chosen(call: StudyCall, seeds: Sequence[int] | None) -> tuple[int, ...]:
    """The look's seeds; raises InputError where they make none, or the study has changed since it was registered."""
    folder, design = folder_of(call), call.design
    if (known := read_registration(folder)) is not None:
        check_unchanged(known, call.study)
    tuning = () if design.tuning is None else design.tuning.seeds
    return seeds_of_look(looks_of(folder), seeds, registered=design.seeds, tuning=tuning)


def _recorded(name: str, scale: Scale, seeds: Sequence[int] | None, *, as_json: bool) -> int:
    path = find_study(name, sweep_folders())
    study = read_study(path)
    study.design(scale)
    records, folder = path.parent / FOLDER, folder_name(name, scale)
    if read_registration(study_folder(records, folder)) is None:
        text = f"no records of {folder} are kept in {records}; lora-lab reproduce {name} runs it"
        raise InputError(Problem("--recorded", text))
    _print(study, scale, judge_folder(records, folder, study, scale, seeds=seeds), as_json=as_json, page=None)
    return 0


def _keep(call: StudyCall, *, as_json: bool) -> int:
    """Copies, and judges the copy: it must say what the original says."""
    folder = folder_of(call)
    if read_registration(folder) is None:
        raise InputError(Problem("--keep", f"{call.shown.name} has not been run under {call.root}"))
    points = [point.run_id for point in read_points(folder) if point.stage != "planned"]
    records = call.file.parent / FOLDER
    kept = keep(call.root, call.shown.name, _with_baseline(call, points), records)
    here, there = (
        judge_folder(place, call.shown.name, call.study, call.scale).verdicts for place in (call.root, records)
    )
    if here != there:
        changed = [a.claim for a, b in zip(here, there, strict=True) if a != b]
        raise InputError(Problem("--keep", f"the kept records do not give the same verdicts: {', '.join(changed)}"))
    size = sum(path.stat().st_size for one in kept for path in (records / "runs" / one.run_id).rglob("*.jso*"))
    told = {"runs": len(kept), "of": len(set(points)), "bytes": size, "folder": str(records)}
    print(json.dumps(told) if as_json else f"{len(kept)} runs, {size:,} bytes: {records}")
    return 0


def _with_baseline(call: StudyCall, run_ids: Sequence[str]) -> list[str]:
    asked = json.loads((folder_of(call) / "runs.json").read_text())["runs"]
    return list(dict.fromkeys([*run_ids, *asked]))


def _draw(call: StudyCall) -> Path:
    from lora_lab.app.report_command import draw_page

    draw_page(Ledger(call.root), call.shown)
    return page_path(folder_of(call))


def _print(study: Study, scale: Scale, judged: Judged, *, as_json: bool, page: Path | None) -> None:
    if as_json:
        registration = judged.registration
        told: dict[str, Any] = {
            "study": study.name,
            "scale": scale,
            "registration": None if registration is None else registration.digest,
            "registered_at": None if registration is None else registration.registered_at,
            "seeds": list(judged.seeds),
            "looks": [list(one.seeds) for one in judged.looks],
            "verdicts": [one.to_json() for one in judged.verdicts],
            "page": None if page is None else str(page),
        }
        json.dump(told, sys.stdout, indent=2, allow_nan=False)
        print()
        return
    print_verdicts(study, scale, judged.verdicts, seeds=judged.seeds, looks=len(judged.looks))
    if page is not None:
        print(f"page: {page}", file=sys.stderr)
