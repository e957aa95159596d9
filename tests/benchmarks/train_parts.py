"""The measurements of `train_speed`: a line of the table, the memory of cohorts, the bill of compiling."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lora_lab.data.encode import Encoded
from tests.benchmarks.machine_speed import product_gflops
from tests.benchmarks.train_compile import bill
from tests.benchmarks.train_memory import MEMBERS, serve_memory
from tests.benchmarks.train_processes import Task, remote_sides
from tests.benchmarks.train_rows import RIVALS, Case, base_of, members_of, rows_of, tokenizer_of
from tests.benchmarks.train_trainer import why_no_trl
from tests.benchmarks.train_turns import steps_of_a_turn, summary, take_turns
from tests.benchmarks.train_work import mean_tokens, operations, own_shapes_limit, products

_GRAPHS = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True, slots=True)
class Setting:
    """What all parts have in common. turns: of each side of a case; compile_turns: of each side of the bill. log: gets
    what other libraries print."""

    cache: Path
    log: Path
    threads: int
    turns: int
    compile_turns: int


def measure_case(case: Case, sides: Sequence[str], setting: Setting) -> dict[str, Any]:
    """All sides of one line of the table, in turn, and what its limits follow from."""
    rows = _rows(case, setting)
    why = why_no_trl()
    absent = {} if why is None else {side: why for side in sides if side.startswith("trl")}
    taking = [side for side in sides if side not in absent]
    limits = _limits(case, taking, rows, setting)
    groups = [[side] for side in taking if side in RIVALS] + [[side for side in taking if side not in RIVALS]]
    load = os.getloadavg()[0]
    steps = {side: steps_of_a_turn(side) for side in taking}
    with remote_sides([_task(case, group, rows, setting) for group in groups if group]) as remotes:
        turns, gone = take_turns({remote.name: remote for remote in remotes}, turns=setting.turns, steps=steps)
    return {
        **asdict(case),
        "sides": summary(turns, "trainer"),
        "missing": absent | gone,
        "load_average": [load, os.getloadavg()[0]],
        **limits,
    }


def _limits(case: Case, sides: Sequence[str], rows: Sequence[Encoded], setting: Setting) -> dict[str, Any]:
    """own_shapes: the limit by members, since it depends on the tokens of a forward."""
    (trial,) = case.trials(1)
    found = products(base_of(trial, setting.cache).model)
    tokens, loss_tokens = mean_tokens(rows)
    own = {}
    for members in sorted({members_of(side) for side in sides}):
        count = members * case.micro_batch
        rows_now, loss_rows = round(count * tokens), max(1, round(count * loss_tokens))
        own[str(members)] = asdict(own_shapes_limit(found, rows=rows_now, loss_rows=loss_rows))
    return {
        "row_tokens": tokens,
        "row_loss_tokens": loss_tokens,
        "operations_per_token": operations(found, tokens=1, loss_tokens=loss_tokens / tokens),
        "matrix_product_gflops": product_gflops(),
        "own_shapes": own,
    }


def measure_memory(model: str, target: str, setting: Setting) -> dict[str, Any]:
    """Peaks of one run and of cohorts, in a process of their own."""
    rows = _rows(Case(model, target, 1), setting)
    asked = {"model": model, "target": target, "rows": rows, "cache": setting.cache, "members": MEMBERS}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_memory, args=(theirs, asked), daemon=True)
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        found = {"model": model, "target": target, "failed": "its process has ended; out of memory is the usual reason"}
    process.join()
    return found


def measure_compile(case: Case, side: str, how: str, setting: Setting) -> dict[str, Any]:
    """The side with and without compiled regions: from no compiled graphs on disk, and again with those of before."""
    rows = _rows(case, setting)
    with TemporaryDirectory() as folder, _graphs_in(folder):
        states = {state: _compiled(case, (side, side + how), rows, setting) for state in ("cold", "warm")}
    return {**asdict(case), "side": side, "how": how, **states}


def _compiled(case: Case, both: tuple[str, str], rows: Sequence[Encoded], setting: Setting) -> dict[str, Any]:
    with remote_sides([_task(case, [one], rows, setting) for one in both]) as remotes:
        sides = {remote.name: remote for remote in remotes}
        turns, gone = take_turns(sides, turns=setting.compile_turns, steps=dict.fromkeys(both, 1), warm_up=0)
    return {"missing": "; ".join(gone.values())} if gone else bill(turns[both[1]], turns[both[0]])


@contextlib.contextmanager
def _graphs_in(folder: str) -> Iterator[None]:
    """Where the processes that are started meanwhile keep compiled graphs."""
    before = os.environ.get(_GRAPHS)
    os.environ[_GRAPHS] = folder
    try:
        yield
    finally:
        os.environ.pop(_GRAPHS)
        if before is not None:
            os.environ[_GRAPHS] = before


def _rows(case: Case, setting: Setting) -> list[Encoded]:
    return rows_of(case, tokenizer_of(case, setting.cache), setting.cache)


def _task(case: Case, sides: Sequence[str], rows: Sequence[Encoded], setting: Setting) -> Task:
    return Task(case, sides, rows, setting.cache, setting.threads, setting.log)


def with_limits(line: Mapping[str, Any], *, gflops: float) -> dict[str, Any]:
    """The line with `limit_tokens_per_second` at this speed, and of each side its share of both limits."""
    limit = gflops * 1e9 / line["operations_per_token"]
    sides = {}
    for name, side in line["sides"].items():
        speed = side["tokens_per_second"]["median"]
        own = line["own_shapes"][str(members_of(name))]["tokens_per_second"]
        sides[name] = {**side, "share_of_limit": speed / limit, "share_of_own_shapes": speed / own}
    return {**line, "limit_tokens_per_second": limit, "sides": sides}
