"""How long `lora-lab plan` takes for about 500 trials, as whole processes; prints a table and writes JSON.

python -m tests.benchmarks.plan_speed --output plan_speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CALLS = {
    "500 trials, values only": ["rank=1,2,3,4,5,6,7,8,9,10", "seed=range(0,50)"],
    "512 trials, 128 choices of groups": [
        "target=[query],[key],[value],[query,value],[projection],[mlp],[key,mlp],[query,mlp]",
        "optimizer=adamw,sgd,lion,adamw8bit",
        "scheduler=constant,linear,cosine,wsd",
        "seed=0,1,2,3",
    ],
}


def seconds_of(arguments: list[str]) -> float:
    """Wall seconds of one `plan -m`."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "lora_lab.app.cli", "plan", "-m", *arguments], check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def main() -> None:
    """Prints a table and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("plan_speed.json"))
    options = parser.parse_args()
    seconds = {name: [seconds_of(arguments) for _ in range(options.runs)] for name, arguments in CALLS.items()}
    options.output.write_text(json.dumps({"load_average": os.getloadavg()[0], "seconds": seconds}, indent=2))
    for name, values in seconds.items():
        print(f"{name:<36}{statistics.median(values):6.2f} s (median of {len(values)})")


if __name__ == "__main__":
    main()
