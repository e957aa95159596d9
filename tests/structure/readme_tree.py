"""The README's tree: every module with the first clause of its own docstring, so that the two never tell two stories.

python -m tests.structure.readme_tree      puts it into README.md
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
README = CHECKOUT / "README.md"
_BEGIN, _END = "<!-- tree -->\n```\n", "```\n<!-- /tree -->"
_WIDTH = 34
_LONGEST = 92

# What is no module, and the folders, in the order of the tree.
FOLDERS = {
    "conf/": "every default, one group per folder",
    "sweeps/": "one YAML per study",
    "notebooks/": "read the ledger, executed by the tests",
    "lora_lab/": "",
    "lora_lab/schema/": "what may be asked",
    "lora_lab/plan/": "arithmetic before any weight",
    "lora_lab/record/": "what happened",
    "lora_lab/models/": "bases: load, convert, quantize",
    "lora_lab/adapters/": "what a method puts on a base",
    "lora_lab/adapters/cohort/": "many adapters in one pass over one base",
    "lora_lab/optim/": "how weights move",
    "lora_lab/data/": "rows, templates, batches",
    "lora_lab/memory/": "what is alive, and at its peak",
    "lora_lab/runner/": "jobs to results: alone, or together",
    "lora_lab/train/": "one loop",
    "lora_lab/predict/": "memory of a run that is not there yet",
    "lora_lab/predict/styles/": "other libraries' steps, for their published numbers",
    "lora_lab/evaluate/": "scores; the only door to lm-eval",
    "lora_lab/evaluate/command/": "`lora-lab eval`",
    "lora_lab/evaluate/greedy/": "answers, every shared beginning once",
    "lora_lab/evaluate/tree/": "log-likelihoods, every shared token once",
    "lora_lab/study/": "statistics",
    "lora_lab/report/": "what people look at",
    "lora_lab/launch/": "where jobs run",
    "lora_lab/app/": "command line and Hydra",
    "hydra_plugins/": "",
    "tests/": "unit, parity, contract, structure, journey, benchmarks, gpu",
}


def phrase_of(path: Path) -> str:
    """The first clause of a module's docstring that says enough."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[^.])\.(?: (?=[A-Z`])|$)", text, maxsplit=1)[0]
    clauses = re.split(r"(?<=[:;,]) ", sentence)
    phrase = clauses[0]
    for clause in clauses[1:]:
        if len(phrase) + len(clause) >= _LONGEST:
            break
        phrase += f" {clause}"
    return phrase.rstrip(":;,")


def tree() -> str:
    """The lines of the tree."""
    lines: list[str] = []
    for folder, phrase in FOLDERS.items():
        lines.append(f"{folder:<{_WIDTH}}{phrase}".rstrip())
        for path in sorted((CHECKOUT / folder).glob("*.py")):
            if folder.split("/")[0] in ("lora_lab", "hydra_plugins") and path.name != "__init__.py":
                lines.append(f"{'  ' + path.name:<{_WIDTH}}{phrase_of(path)}")
    return "\n".join(lines) + "\n"


def in_readme() -> str:
    """What the README holds between its two marks."""
    return README.read_text(encoding="utf-8").split(_BEGIN, 1)[1].split(_END, 1)[0]


def write() -> None:
    """Puts the tree into the README."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN, 1)
    README.write_text(f"{before}{_BEGIN}{tree()}{_END}{rest.split(_END, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    write()
