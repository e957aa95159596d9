"""What must start fast loads nothing heavy: planning and reading the ledger work on a laptop without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "lora_lab"
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval", "datasets", "wandb")
LIGHT_FLOORS = ("schema", "plan", "record", "study", "report")
LIGHT_ROOMS = (
    "lora_lab.app.cli",
    "lora_lab.app.hydra_commands",
    "lora_lab.app.ledger_commands",
    "lora_lab.app.planning",
    "lora_lab.app.execution",
    "lora_lab.app.memory_plan",
    "lora_lab.app.memory_check",
)

# Imports the modules named on the command line, one by one, and says which of them brought something heavy along.
_CODE = """
import importlib, sys
heavy = sys.argv[1].split(",")
for name in sys.argv[2:]:
    importlib.import_module(name)
    found = [one for one in heavy if one in sys.modules]
    if found:
        sys.exit(f"{name} imports {', '.join(found)}")
print(len(sys.argv) - 2)
"""


def light_modules() -> list[str]:
    """Every module of the light floors, and the rooms of app that plan and list."""
    files = [file for floor in LIGHT_FLOORS for file in sorted((PACKAGE / floor).rglob("*.py"))]
    dotted = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]
    return ["lora_lab", "lora_lab.errors", *(name for name in dotted if not name.endswith("__init__")), *LIGHT_ROOMS]


def imported(*modules: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python that imports the modules."""
    return subprocess.run(
        [sys.executable, "-c", _CODE, ",".join(HEAVY), *modules],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_light_floors_load_nothing_heavy() -> None:
    modules = light_modules()
    assert len(modules) > 40
    done = imported(*modules)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(len(modules))


def test_the_check_can_fail() -> None:
    done = imported("lora_lab.errors", "lora_lab.optim.optimizers")
    assert done.returncode != 0
    assert "lora_lab.optim.optimizers imports torch" in done.stderr
