"""The page is drawn again as runs end, but never for more than a small share of the time, and never stops a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_lab.errors import MachineError
from lora_lab.record.ledger import Ledger
from lora_lab.report.redraw import Redraw
from tests.unit.ledger_samples import claim, result_of, trial_of


class Drawing:
    """Counts; each drawing takes `seconds` of its own clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.count = seconds, 0.0, 0

    def __call__(self) -> None:
        self.count += 1
        self.now += self.seconds


def ends(redraw: Redraw, root: Path) -> None:
    folder = claim(Ledger(root), trial_of())
    assert folder is not None
    with folder:
        redraw.run_finished(folder.header, folder.path, result_of(folder))


@pytest.mark.parametrize(("seconds", "between", "drawn"), [(1.0, 21.0, 2), (1.0, 19.0, 1)])
def test_drawing_takes_a_twentieth_of_the_time_at_most(
    tmp_path: Path, seconds: float, between: float, drawn: int
) -> None:
    drawing = Drawing(seconds)
    redraw = Redraw(drawing, lambda: drawing.now)
    redraw.begin(3)
    drawing.now += between
    ends(redraw, tmp_path)
    assert drawing.count == drawn


def test_nothing_to_run_is_drawn_at_the_end_only() -> None:
    drawing = Drawing(1.0)
    redraw = Redraw(drawing, lambda: drawing.now)
    redraw.begin(0)
    assert drawing.count == 0
    redraw.now()
    assert drawing.count == 1


def test_what_cannot_be_drawn_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise MachineError("no space left")

    redraw = Redraw(refuse, lambda: 0.0)
    redraw.begin(1)
    redraw.now()
    assert capsys.readouterr().err == "the page is not drawn: no space left\n"
