"""Formulas of exact claims: their value, what they ask for, and that nothing else is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.schema.formula import Formula, Term, formula_of


def value(text: str, **numbers: float) -> float:
    return formula_of(text).value(lambda term: numbers[term.name if term.arm is None else f"{term.name}_{term.arm}"])


def test_the_slowdown_of_qlora_by_the_sources_own_seconds() -> None:
    """Raschka (2023): 6,685.75 s for LoRA, 10,059.53 s for nf4; the text says 39 %."""
    assert value("nf4 / lora - 1", nf4=10059.53, lora=6685.75) == pytest.approx(0.5046, abs=1e-4)


def test_precedence_brackets_and_signs_are_those_of_arithmetic() -> None:
    assert value("1 + 2 * 3 - -4 / (5 - 3)") == 9.0
    assert value("-a * -b", a=2.0, b=3.0) == 6.0


def test_terms_are_listed_once_in_order() -> None:
    formula = formula_of("planned(total_parameters, big) / x + measured(train_seconds, small) - x")
    assert formula.terms == (
        Term("planned", "total_parameters", "big"),
        Term("published", "x", None),
        Term("measured", "train_seconds", "small"),
    )
    assert [str(term) for term in formula.terms] == [
        "planned(total_parameters, big)",
        "x",
        "measured(train_seconds, small)",
    ]


NOT_FORMULAS = """
a +|a b|__import__('os')|a.b|a[0]|a if b else c|'text'|True|a ** b|a // b|f(a, b)|planned(a)|planned(a, 1)
planned(a, b, c)|planned(a, arm=b)|lambda: 1|[1]|1 < 2|~a|1j
"""


@pytest.mark.parametrize("text", ["", "(" * 400, "1" + "+1" * 400, *NOT_FORMULAS.strip().replace("\n", "|").split("|")])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        formula_of(text)


def test_what_has_no_finite_value_is_refused() -> None:
    with pytest.raises(ValueError, match="a / b divides by zero"):
        value("a / b", a=1.0, b=0.0)
    with pytest.raises(ValueError, match="is inf"):
        value("a * a", a=1e200)


def test_what_the_lookup_raises_passes_through() -> None:
    def lookup(term: Term) -> float:
        raise LookupError(term.name)

    with pytest.raises(LookupError, match="a"):
        formula_of("a + 1").value(lookup)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(0.1, 1e6))
def test_equals_pythons_own_arithmetic(a: float, b: float, c: float) -> None:
    formula = formula_of("(a - b) / c * 2 + a")
    assert isinstance(formula, Formula)
    assert value(formula.text, a=a, b=b, c=c) == (a - b) / c * 2 + a
