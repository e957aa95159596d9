"""The house rules as tests: names, sizes, docstrings, formats that cannot run code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "lora_lab"
CHECKOUT = PACKAGE.parent
FILES = sorted([*PACKAGE.rglob("*.py"), *(CHECKOUT / "hydra_plugins").rglob("*.py")])
GRAB_BAGS = {"utils", "util", "helpers", "helper", "common", "core", "base", "manager", "misc"}
FORBIDDEN_CALLS = {"torch.load", "pickle.load", "pickle.loads", "dill.load", "eval", "exec"}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_file(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert path.stem not in GRAB_BAGS
    assert len(text.splitlines()) <= 300
    if path.name != "__init__.py":
        assert ast.get_docstring(tree), "every file says what room it is"
    for function in functions(tree):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= 60, f"{function.name} has {length} lines"
    for node in tree.body:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if public:
            assert ast.get_docstring(node), f"{node.name} has no docstring"  # type: ignore[arg-type]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_nothing_runs_code_from_files(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS
            if ast.unparse(node.func) == "yaml.load":
                assert "yaml.SafeLoader" in path.read_text(), "only loaders built on the safe one"
            assert not any(
                keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
                for keyword in node.keywords
            )
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "dill", "cloudpickle"} & set(names)


def test_leaves_hold_values_only_and_say_what_they_are() -> None:
    leaves = sorted((CHECKOUT / "conf").rglob("*.yaml"))
    assert len(leaves) > 40
    for leaf in leaves:
        text = leaf.read_text()
        lines = [line for line in text.splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("# "), f"{leaf}: the first line says what it is"
        assert "_target_" not in text, leaf
        assert "${" not in text, f"{leaf}: no computing interpolation"


def test_nothing_committed_names_the_workshop() -> None:
    words = re.compile(r"/work/|\.library|farm-|opt/pypi|scratch/venv")
    texts = [*FILES, *(CHECKOUT / "conf").rglob("*.yaml"), *(CHECKOUT / "sweeps").glob("*.yaml"), CHECKOUT / "Makefile"]
    texts += [path for path in (CHECKOUT / "tests").rglob("*.py") if path != Path(__file__).resolve()]
    assert not [str(path) for path in texts if words.search(path.read_text())]
