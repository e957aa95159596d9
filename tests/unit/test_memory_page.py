"""The page and the bars that explain a predicted peak hold its numbers, in words and in figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from lora_lab.plan.timeline import PARTS, Event, Place, Timeline
from lora_lab.report.memory_page import draw_memory_page, write_memory_page
from lora_lab.report.memory_text import LETTERS, memory_bar, timeline_bar
from lora_lab.report.text import encodable
from tests.page_ledger import HOSTILE
from tests.unit.test_report_page import Page
from tests.unit.timeline_samples import peak_of, prediction_of_parts, step_of


def figures_of(text: str) -> dict[str, Any]:
    figures: dict[str, Any] = Page(text).blocks["figures-timeline"]
    return figures


@pytest.fixture(scope="module")
def text() -> str:
    notes = ("Attention is assumed to keep no scores.", "Buffers within an operation are not seen.")
    prediction = prediction_of_parts(peak_of(6), notes=notes, peak_reserved_bytes=2_000_000, device_kind="cuda")
    return draw_memory_page(step_of(6), prediction, title="lora-r8")


def test_the_areas_add_up_to_the_live_bytes_at_every_point(text: str) -> None:
    timeline = step_of(6)
    figure = figures_of(text)["all"]
    areas = [trace for trace in figure["data"] if "stackgroup" in trace]
    moments = list(timeline.moments())[2:]
    assert areas[0]["x"] == list(range(len(moments)))
    assert [sum(heights) for heights in zip(*(area["y"] for area in areas), strict=True)] == [m.total for m in moments]
    named = {area["name"]: area["y"] for area in areas}
    assert named["optimizer state"] == [moment.parts["optimizer_state"] for moment in moments]
    assert "quantization constants" not in named, "what is nowhere has no area"


def test_the_peak_is_marked_with_its_value_and_place(text: str) -> None:
    (mark,) = (trace for trace in figures_of(text)["all"]["data"] if trace["name"] == "peak")
    assert mark["y"] == [sum(peak_of(6).values())] == [1742]
    told = [note["text"] for note in figures_of(text)["all"]["layout"]["annotations"]]
    assert told[0] == "<b>peak 1.74 kB</b>, backward, layer 5"
    assert told[1:] == ["forward", "backward", "clip", "update"]


def test_what_moves_is_drawn_from_what_is_always_there(text: str) -> None:
    figure = figures_of(text)["moving"]
    assert {trace["name"] for trace in figure["data"] if "stackgroup" in trace} == {
        "activations", "gradients", "temporary"
    }  # fmt: skip
    (mark,) = (trace for trace in figure["data"] if trace["name"] == "peak")
    assert mark["y"] == [1742 - 1000 - 30 - 60]
    assert "above the 1.09 kB" in figure["layout"]["yaxis"]["title"]["text"]


def test_plotly_takes_both_figures(text: str) -> None:
    for figure in figures_of(text).values():
        go.Figure(figure)


def test_parts_assumptions_and_tensors_stand_below(text: str) -> None:
    page = Page(text)
    for told in (
        "Predicted peak: 1.74 kB allocated, in backward, layer 3. Of it weights 1.00 kB, activations 607 B",
        "Attention is assumed to keep no scores.",
        "Buffers within an operation are not seen.",
        "bytes as CUDA's allocator counts them",
        "2.00 MB",
        "the longest of 512 rows",
        "forward, layers 0 to 5",
        "optimizer state",
    ):
        assert told in page.text, told
    for part, size in peak_of(6).items():
        assert f"{part.replace('_', ' ')}{size:,}{size / 1e9:.6f}" in page.text.replace("\n", ""), part
    assert "bytes at the peak of the figure" not in page.text


def test_a_figure_that_was_counted_otherwise_says_so() -> None:
    predicted = prediction_of_parts({**peak_of(6), "temporary": 99})
    page = Page(draw_memory_page(step_of(6), predicted, title="t"))
    assert "bytes at the peak of the figure" in page.text and "1,796" in page.text and "1,742" in page.text


def test_many_events_become_some_two_thousand_points() -> None:
    timeline = step_of(40, steps_in_layer=100)
    assert len(timeline.events) > 8000
    text = draw_memory_page(timeline, prediction_of_parts(peak_of(40)), title="t")
    points = figures_of(text)["all"]["data"][0]["x"]
    assert 1000 < len(points) <= 2000
    assert max(figures_of(text)["all"]["data"][-2]["y"]) == timeline.peak.total
    ticks = figures_of(text)["all"]["layout"]["xaxis"]["ticktext"]
    assert 5 < len(ticks) <= 25 and set(ticks) <= set(map(str, range(40)))


def test_it_is_one_file_that_fetches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "memory.html"
    write_memory_page(step_of(2), prediction_of_parts(peak_of(2)), path, title="t")
    page = Page(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
    policy = next(str(meta["content"]) for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert not [tag for tag, attributes in page.elements if "src" in attributes or tag in ("link", "iframe", "object")]
    assert all(str(link["href"]).startswith("#") for link in page.all("a"))


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_texts_stay_text(hostile: str) -> None:
    prediction = prediction_of_parts(peak_of(2), notes=(hostile,), rows=hostile, how=hostile)
    page = Page(draw_memory_page(step_of(2), prediction, title=hostile))
    assert len(page.scripts) == 2 and len(page.blocks) == 1
    assert not [one for tag, one in page.elements if "onerror" in one or "onload" in one or tag == "img"]


def test_a_bar_has_every_parts_share_of_its_letters() -> None:
    parts = {"weights": 600, "activations": 250, "temporary": 150}
    first, bar, *legend = memory_bar(prediction_of_parts(parts), width=20)
    assert first == "peak 1.00 kB in backward, layer 3"
    assert bar == "|" + "W" * 12 + "X" * 5 + "T" * 3 + "|"
    assert [line.split() for line in legend] == [
        ["W", "weights", "600", "B", "60.0", "%"],
        ["X", "activations", "250", "B", "25.0", "%"],
        ["T", "temporary", "150", "B", "15.0", "%"],
    ]
    assert len(set(LETTERS.values())) == len(LETTERS) == len(PARTS)


@pytest.mark.parametrize("width", [1, 2, 10, 33, 80])
def test_a_bar_is_as_wide_as_it_was_asked_to_be(width: int) -> None:
    parts = dict(zip(PARTS, (13_476, 3, 17, 17, 34, 6_008, 334, 19), strict=True))
    lines = memory_bar(prediction_of_parts(parts), width=width)
    assert len(lines[1]) == width + 2
    for name, size in parts.items():
        letters = lines[1].count(LETTERS[name])
        assert abs(letters - width * size / sum(parts.values())) < 1
        (line,) = (line for line in lines[2:] if f" {name.replace('_', ' ')} " in line)
        assert ("less than a letter" in line) == (letters == 0)


def test_a_chart_rises_to_the_peak_over_the_phases() -> None:
    first, *rows = timeline_bar(step_of(6), 40)
    chart, phases = rows[:4], rows[4:]
    columns = [sum(" ▁▂▃▄▅▆▇█".index(row[column]) if column < len(row) else 0 for row in chart) for column in range(40)]
    at = first.index("v")
    assert first[at:].startswith("v peak 1.74 kB: backward, layer 5")
    assert columns[at] == max(columns) == 32 and columns[0] == round(32 * 1090 / 1742)
    assert max(map(len, chart)) == 40
    assert phases[0].strip().startswith("|forward") and phases[0].index("|backward") <= at
    named = [name for line in phases for name in line.replace("|", " ").split()]
    assert sorted(named) == ["backward", "clip", "forward", "update"]


def test_a_peak_at_the_end_is_told_before_its_mark() -> None:
    events = tuple(Event(number, 1, Place("forward", 0)) for number in range(100))
    first = timeline_bar(Timeline(events), 50)[0]
    assert first == " " * (49 - len("peak 100 B: forward, layer 0") - 1) + "peak 100 B: forward, layer 0 v"


def test_a_terminal_without_blocks_gets_letters() -> None:
    for line in timeline_bar(step_of(6), 40):
        plain = encodable(line, "ascii")
        assert plain.isascii() and "?" not in plain and len(plain) == len(line)
