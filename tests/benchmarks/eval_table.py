"""What `eval_speed` prints: a line per row, metrics of both engines, and the parts behind the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_HEAD = ("row", "share", "requests", "flat", "nodes", "stock s", "ours s", "ratio", "target", "largest", "of limit")
_WIDTHS = (20, 7, 9, 9, 8, 9, 9, 8, 8, 9, 9)


def rows_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, then per row the metrics of both and the documents that differ."""
    return "\n".join([*_table(rows), "", *(line for row in rows for line in _metrics(row))])


def tail_text(result: Mapping[str, Any]) -> str:
    """The parts, the machine, and what the columns mean."""
    return "\n".join(_tail(result))


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield _line(_HEAD)
    for row in rows:
        cells = (
            row["row"],
            f"{_share(row['documents']):.0%}",
            str(row["requests"]),
            str(row["flat_tokens"]),
            str(row["nodes"]),
            f"{row['seconds']['stock']:.1f}",
            f"{row['seconds']['ours']:.1f}",
            f"{row['ratio']:.2f}",
            f">= {row['target']:g}",
            _number(row["largest_difference"], ".0e"),
            _number(row["share_of_limit"], ".0%"),
        )
        short = "" if row["ratio"] >= row["target"] else "   below its target"
        yield _line(cells) + short + "".join(f"   lm-eval's own engine: {why}" for why in row["why_stock"])
    yield "share: of the task's documents; flat, nodes: tokens of all requests and of their tree; largest: difference"
    yield "of a log-likelihood, in nats; of limit: what the tree's arithmetic alone would take, of our seconds."


def _metrics(row: Mapping[str, Any]) -> Iterator[str]:
    sizes = ", ".join(f"{task} {one['run']} of {one['all']}" for task, one in row["documents"].items())
    other = row["other_seconds"]
    yield f"{row['row']}: {sizes} documents; around the model {other['stock']:.1f} s and {other['ours']:.1f} s"
    for name, values in row["metrics"].items():
        yield f"    {name:<44}{values['stock']:.6f}   ours {_number(values['ours'], '.6f')}"
    if row["other_texts"] is not None:
        yield f"    other texts: {row['other_texts']} of {row['requests']}"
    for one in row["beyond"]:
        where = f"{one['task']} document {one['document']}"
        yield (
            f"    BEYOND the tolerance: {where}, {one['stock']:.6f} against {one['ours']:.6f}; lm-eval's own without "
            f"other requests beside it {_number(one['alone'], '.6f')}"
        )
    for one in row["documents_that_differ"]:
        near = "a near-tie within the tolerance" if one["is_near_tie"] else "NOT a near-tie"
        gaps = f"log-likelihoods {_number(one['log_likelihood'], '.1e')}, logits {_number(one['logit'], '.1e')} apart"
        where = f"{one['task']} document {one['document']}, {one['metric']}"
        yield f"    {where}: {one['stock']:g} against {one['ours']:g}, {near} ({gaps})"


def _tail(result: Mapping[str, Any]) -> Iterator[str]:
    for part, key in (("request_growth", "requests"), ("prefix_growth", "prefix_tokens")):
        for point in result.get(part, []):
            seconds = {engine: _number(value, ".2f") for engine, value in point["seconds"].items()}
            yield (
                f"{part}: {key} {point[key]}, flat {point['flat_tokens']}, nodes {point['nodes']}: "
                f"stock {seconds['stock']} s, ours {seconds['tree']} s"
            )
    if spread := result.get("chunk_spread"):
        seconds_of = ", ".join(f"{one['chunk_tokens']} {one['seconds']:.1f} s" for one in spread["budgets"])
        yield (
            f"chunk budgets ({seconds_of}): log-likelihoods of {spread['requests']} requests at most "
            f"{spread['largest_spread']:.1e} nats apart, {spread['largest_share']:.0%} of the tolerance"
        )
    if guard := result.get("guard"):
        requests = sum(verdict["requests"] for verdict in guard["verdicts"])
        yield f"guard: {guard['seconds']:.1f} s for {requests} requests, once per base and kind of adapter"
    yield f"probe: {result['probe_seconds']:.1f} s, once per model object and kind of adapter"
    if result["quick"]:
        yield "two documents of each task: its times mean nothing"
    speeds, loads = result["matrix_product_gflops"], result["load_average"]
    yield (
        f"{min(speeds):.0f} to {max(speeds):.0f} GFLOP/s in one large product between rows, load average "
        f"{min(loads):.1f} to {max(loads):.1f} on {result['threads']} threads"
    )
    yield f"{result['seconds']:.0f} s in all"


def _share(documents: Mapping[str, Mapping[str, int]]) -> float:
    return sum(one["run"] for one in documents.values()) / sum(one["all"] for one in documents.values())


def _line(cells: Sequence[str]) -> str:
    first, *others = zip(cells, _WIDTHS, strict=True)
    return f"{first[0]:<{first[1]}}" + "".join(f"{text:>{width}}" for text, width in others)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
