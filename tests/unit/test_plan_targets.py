"""From a target to modules: parts, exact names, globs; what matches nothing is refused with the nearest name."""

from __future__ import annotations

import time

import pytest

from lora_lab.errors import InputError
from lora_lab.plan.targets import part_suffixes, select_modules, selected_modules
from lora_lab.schema.adaptation import PARTS, Target
from lora_lab.schema.model import Shape
from tests.unit.test_plan_trials import SHAPE, trial_of

LLAMA = Shape.model_validate(SHAPE)
GPT2 = Shape.model_validate({**SHAPE, "family": "gpt2", "num_kv_heads": 4, "tied_embeddings": True})


def chosen(*names: str, parts: tuple[str, ...] = (), shape: Shape = LLAMA) -> list[str]:
    target = Target(**{part: part in parts for part in PARTS}, modules=names)
    return [module.name for module in select_modules(shape, target)]


def both(suffix: str) -> list[str]:
    return [f"model.layers.{layer}.{suffix}" for layer in (0, 1)]


def test_a_name_is_exact_or_an_end_behind_a_dot() -> None:
    assert chosen("q_proj") == chosen("self_attn.q_proj") == both("self_attn.q_proj")
    assert chosen("model.layers.1.self_attn.q_proj") == both("self_attn.q_proj")[1:]
    assert chosen("layers.0.mlp.up_proj") == both("mlp.up_proj")[:1]
    assert chosen("lm_head") == ["lm_head"]


def test_globs() -> None:
    assert chosen("layers.1.*_proj") == [name for name in chosen("*_proj") if ".1." in name]
    assert len(chosen("*_proj")) == 14
    assert chosen("*") == ["model.embed_tokens", *chosen("*_proj"), "lm_head"]  # everything but the norms


def test_parts_and_names_add_up_once_each_in_model_order() -> None:
    assert chosen("v_proj", "q_proj", parts=("query",)) == sorted(chosen("q_proj") + chosen("v_proj"))


def test_gpt2_parts() -> None:
    blocks = [f"transformer.h.{layer}." for layer in (0, 1)]
    assert chosen(parts=("query", "key", "value"), shape=GPT2) == [f"{block}attn.c_attn" for block in blocks]
    assert chosen(parts=("projection",), shape=GPT2) == [f"{block}attn.c_proj" for block in blocks]
    assert chosen(parts=("embedding",), shape=GPT2) == ["transformer.wte"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q_prj", 'matches no module; did you mean "q_proj"'),
        ("proj", "matches no module"),
        ("self_attn", "matches no module"),
        ("layers.7.self_attn.q_proj", "matches no module"),
        ("nothing*", "matches no module"),
        ("Q_PROJ", "matches no module"),
        ("input_layernorm", "normalisation layer; an adapter needs a linear layer"),
        ("*layernorm", "normalisation layer"),
        (".*(q|v)_proj", "not a module name"),
        ("[qv]_proj", "not a module name"),
        ("(", "not a module name"),
    ],
)
def test_a_name_that_selects_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as caught:
        chosen("q_proj", name)
    assert caught.value.problems[0].where == "target.modules"
    assert "q_proj, k_proj, v_proj, o_proj" in str(caught.value)


def test_all_wrong_names_are_listed() -> None:
    with pytest.raises(InputError) as caught:
        chosen("q_prj", "norm", "v_prj")
    assert len(caught.value.problems) == 3


def test_a_hostile_glob_is_answered_at_once() -> None:
    """A matcher that goes back for every star would need years; four times the stars may take sixteen times as long."""

    def seconds(stars: int) -> float:
        start = time.process_time()
        with pytest.raises(InputError):
            chosen("*a*a" * (stars // 2) + "x")
        return time.process_time() - start

    assert seconds(98) < 40 * max(seconds(24) for _ in range(3))


def test_trials_without_an_adapter_select_nothing() -> None:
    assert selected_modules(trial_of(method={"kind": "full"})) == ()
    assert selected_modules(trial_of(method={"kind": "base"})) == ()


def test_unknown_family() -> None:
    with pytest.raises(InputError, match='did you mean "gpt2"'):
        part_suffixes("gpt")
