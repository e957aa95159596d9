"""`plan --memory --explain`: the memory of a trial over one step, as a page below ROOT/plans and as bars of text."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_lab.app.memory_predicted import Predictor
from lora_lab.app.planning import Plan
from lora_lab.record.ledger import run_id_of
from lora_lab.report.memory_page import memory_bar, timeline_bar, write_memory_page
from lora_lab.report.terminal_memory import MemoryRow

_FOLDER = "plans"
_UNSAFE = re.compile(r"[^A-Za-z0-9._+=-]+")


@dataclass(frozen=True, slots=True)
class Drawing:
    """path: of the page. text: the same for a terminal."""

    path: Path
    text: str
