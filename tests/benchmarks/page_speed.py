"""How long the page takes, to draw and to open, for ledgers of 60 and of 1,000 runs; prints a table and writes JSON.

python -m tests.benchmarks.page_speed --output page_speed.json

Opening is a whole Chromium process (`--dump-dom`, after load) beside the same process on an empty page, in turn; the
difference is the page's. Left out where there is no Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.browser import BROWSER
from tests.page_ledger import fill

SIZES = {
    60: {"ranks": [2, 4, 8, 16], "rates": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]},
    1000: {"ranks": [2, 3, 4, 6, 8, 12, 16, 24, 32], "rates": [1e-4 * 1.15**step for step in range(37)]},
}


def seconds_of(command: list[str]) -> float:
    """Wall seconds of a process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def opening(path: Path, folder: Path) -> list[str]:
    """Opens a page in Chromium and ends."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--window-size=1400,1200"]
    return [str(BROWSER), *flags, "--dump-dom", f"file://{path}"]


def measure(size: int, *, runs: int, folder: Path) -> dict[str, Any]:
    """Seconds to draw and to open the page of a ledger of that many runs."""
    root = folder / str(size)
    fill(root, seeds=[0, 1, 2], steps=100, **SIZES[size])
    page, empty = root / "report.html", folder / "empty.html"
    empty.write_text("<!doctype html><p>empty")
    drawing = [sys.executable, "-m", "lora_lab.app.cli", "report", "--root", str(root)]
    drawn = [seconds_of(drawing) for _ in range(runs)]
    found: dict[str, Any] = {
        "runs": sum(1 for _ in (root / "runs").iterdir()),
        "page_bytes": page.stat().st_size,
        "draw_seconds": drawn,
    }
    if BROWSER is not None:
        pairs = [
            (seconds_of(opening(page, folder / "profile")), seconds_of(opening(empty, folder / "profile")))
            for _ in range(runs + 1)
        ][1:]  # the first makes the profile
        found |= {"open_seconds": [pair[0] for pair in pairs], "empty_seconds": [pair[1] for pair in pairs]}
    return found


def main() -> None:
    """Prints a table and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("page_speed.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(size, runs=options.runs, folder=Path(folder)) for size in SIZES]
    options.output.write_text(json.dumps({"load_average": os.getloadavg()[0], "pages": rows}, indent=2))
    print(f"{'runs':>6}{'page':>10}{'draw':>10}{'open':>10}   (medians; draw with the process's start, open without)")
    for row in rows:
        opened = "-"
        if "open_seconds" in row:
            differences = [a - b for a, b in zip(row["open_seconds"], row["empty_seconds"], strict=True)]
            opened = f"{statistics.median(differences):.2f} s"
        size, drawn = f"{row['page_bytes'] / 1e6:.1f} MB", f"{statistics.median(row['draw_seconds']):.2f} s"
        print(f"{row['runs']:>6}{size:>10}{drawn:>10}{opened:>10}")


if __name__ == "__main__":
    main()
