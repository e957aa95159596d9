"""Arithmetic in a claim: numbers, published numbers by their id, and quantities of arms, with + - * / and brackets.

`planned(NAME, ARM)` is known before anything runs (parameters, predicted bytes); `measured(NAME, ARM)` comes from runs.
A formula is data: it is taken apart by Python's parser, and nothing but these five kinds of terms is accepted.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

_OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
FUNCTIONS = ("planned", "measured")
_LONGEST = 500


@dataclass(frozen=True, slots=True)
class Term:
    """What a formula asks for: `function` is planned, measured or, for a published number with no arm, published."""

    function: str
    name: str
    arm: str | None

    def __str__(self) -> str:
        return self.name if self.arm is None else f"{self.function}({self.name}, {self.arm})"


@dataclass(frozen=True, slots=True)
class Formula:
    """A formula that was read. `terms`: what it needs, each once, in order of appearance."""

    text: str
    terms: tuple[Term, ...]

    def value(self, lookup: Callable[[Term], float]) -> float:
        """The formula's value, finite.

        Raises:
            ValueError: a division by zero, or a value that is not finite. What `lookup` raises passes through.
        """
        result = _evaluate(_tree(self.text), lookup)
        if not math.isfinite(result):
            raise ValueError(f"{self.text} is {result}")
        return result


def formula_of(text: str) -> Formula:
    """Reads a formula.

    Raises:
        ValueError: with the part that is not understood.
    """
    terms: dict[Term, None] = {}

    def note(term: Term) -> float:
        terms[term] = None
        return 1.0

    _walk(_tree(text), note)
    return Formula(text, tuple(terms))


def _tree(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise ValueError(f"a formula may have {_LONGEST} characters, this one has {len(text)}")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f'"{text}" is not a formula such as a / b - 1 or planned(total_parameters, ARM)') from None


def _walk(node: ast.expr, note: Callable[[Term], float]) -> None:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        _walk(node.left, note)
        _walk(node.right, note)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        _walk(node.operand, note)
    else:
        _leaf(node, note)


def _evaluate(node: ast.expr, lookup: Callable[[Term], float]) -> float:
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, lookup), _evaluate(node.right, lookup)
        try:
            return _OPERATIONS[type(node.op)](left, right)
        except ZeroDivisionError:
            raise ValueError(f"{ast.unparse(node)} divides by zero") from None
    if isinstance(node, ast.UnaryOp):
        return -_evaluate(node.operand, lookup)
    return _leaf(node, lookup)


def _leaf(node: ast.expr, lookup: Callable[[Term], float]) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        return lookup(Term("published", node.id, None))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
        names = [one.id for one in node.args if isinstance(one, ast.Name)]
        if len(names) == len(node.args) == 2 and not node.keywords:
            return lookup(Term(node.func.id, names[0], names[1]))
        raise ValueError(f"{ast.unparse(node)}: {node.func.id} takes the name of a quantity and an arm")
    raise ValueError(
        f'"{ast.unparse(node)}" is not a number, a published number, planned(NAME, ARM) or measured(NAME, ARM)'
    )
