"""Two tiers of tests: what is slow is told, and a case to keep must be one."""

from __future__ import annotations

import pytest

from tests.tiers import mostly_slow


def test_cases_keep_their_order_and_the_others_are_slow() -> None:
    first, second, third = mostly_slow(["a", ("b", 1), "c"], keep=[("b", 1)])
    assert second == ("b", 1)
    assert (first.values, third.values) == (("a",), ("c",))
    assert [mark.name for case in (first, third) for mark in case.marks] == ["slow", "slow"]


@pytest.mark.parametrize("keep", [["d"], [], ["a", "b"]])
def test_a_case_to_keep_that_is_none_is_refused(keep: list[str]) -> None:
    with pytest.raises(ValueError, match="cases"):
        mostly_slow(["a", "b"], keep=keep)
