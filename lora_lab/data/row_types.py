"""Whether the types of rows are those that LoRAMoE's groups of experts are told apart by. Torch-free.

Types from the configuration (`data.types`) are judged with the trial; those of a column only once rows are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_lab.data.heldout import SHOWN_PROBLEMS, more_problems
from lora_lab.data.rows import Row
from lora_lab.errors import Problem, nearest
from lora_lab.schema.expert_methods import Loramoe
from lora_lab.schema.method import Method


def types_of(rows: Iterable[Row]) -> dict[str, str]:
    """Each type, and the source of the first row that has it; rows without a type are passed over."""
    types: dict[str, str] = {}
    for row in rows:
        if row.type is not None:
            types.setdefault(row.type, row.source)
    return types


def group_problems(method: Method, types: Mapping[str, str]) -> list[Problem]:
    """A problem per type of `types_of` that is in none of the method's groups; none for methods without groups."""
    if not isinstance(method, Loramoe) or method.beta == 0:
        return []
    groups = list(method.groups)
    problems = [
        Problem(source, f'type "{one[:60]}" is in none of method.groups' + nearest(one, groups))
        for one, source in types.items()
        if one not in groups
    ]
    return [*problems[:SHOWN_PROBLEMS], *more_problems(len(problems), "types")]
