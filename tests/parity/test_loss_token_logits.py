"""Logits of loss tokens only: equal to the rows of full logits, to transformers' own loss, and to its gradients."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lora_lab.models.loss_token_logits import loss_token_logits

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        ends = {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        model = GPT2LMHeadModel(GPT2Config(**shape, **ends))
    elif name == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.05))
    elif name == "cohere":
        model = CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3))
    else:
        classes = {
            "llama": (LlamaForCausalLM, LlamaConfig),
            "mistral": (MistralForCausalLM, MistralConfig),
            "qwen2": (Qwen2ForCausalLM, Qwen2Config),
        }
        model_class, config_class = classes[name]
        model = model_class(config_class(**SHAPE))
    return model.double()


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """Three ragged rows, right-padded: ids, attention mask, loss mask with holes."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    lengths = torch.tensor([9, 5, 7])
    attention = (torch.arange(9)[None, :] < lengths[:, None]).long()
    ids = ids * attention
    loss = torch.zeros(3, 9, dtype=torch.bool)
    loss[0, 6:9] = True
    loss[1, 1] = loss[1, 4] = True
    loss[2, 3:7] = True
    return ids, attention, loss


ALL = ["llama", "gpt2", "mistral", "qwen2", "gemma2", "cohere"]


@pytest.mark.parametrize("name", ALL)
def test_equal_to_full_logits_and_to_the_models_own_loss(name: str) -> None:
    model = _build(name).eval()
    ids, attention, loss_mask = _batch()
    full = model(input_ids=ids, attention_mask=attention, labels=ids.masked_fill(~loss_mask, -100))
    with loss_token_logits(model) as head:
        logits = head(input_ids=ids, attention_mask=attention, loss_mask=loss_mask)
    assert logits.shape == (int(loss_mask.sum()), VOCABULARY)
    rows, columns = loss_mask.nonzero(as_tuple=True)
    assert (logits - full.logits[rows, columns - 1]).abs().max() < 1e-12
    ours = nn.functional.cross_entropy(logits.float(), ids[loss_mask])  # transformers takes its loss in float32
    assert abs(float(ours - full.loss)) < 1e-6
    after = model(input_ids=ids, attention_mask=attention).logits
    assert torch.equal(after, full.logits), "the hook is gone after the block"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_with_an_adapter_that_covers_the_head(name: str, checkpointing: bool) -> None:
    model = _build(name)
    # Soft capping and tied weights make a small gradient; the adapter's B must not be zero for A to have one.
    names = ["c_attn", "lm_head"] if name == "gpt2" else ["q_proj", "lm_head"]
    config = LoraConfig(r=2, target_modules=names, lora_alpha=4, init_lora_weights=False)
    peft_model = get_peft_model(model, config).double().train()
    if checkpointing:
        peft_model.enable_input_require_grads()
        peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, attention, loss_mask = _batch()
    full = peft_model(input_ids=ids, attention_mask=attention).logits
    labels = ids.masked_fill(~loss_mask, -100)
    nn.functional.cross_entropy(full[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
    trained = {key: value for key, value in peft_model.named_parameters() if value.requires_grad}
    expected = {key: value.grad.clone() for key, value in trained.items()}
    peft_model.zero_grad()
    with loss_token_logits(peft_model) as head:
        logits = head(input_ids=ids, attention_mask=attention, loss_mask=loss_mask)
        nn.functional.cross_entropy(logits, ids[loss_mask]).backward()
    assert any("lm_head" in key for key in trained)
    for key, value in trained.items():
        assert value.grad.abs().max() > 0, key
        assert (value.grad - expected[key]).abs().max() < 1e-12, key


def test_virtual_tokens_in_front_of_the_row_are_skipped() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(_build("llama"), config).double().eval()
    ids, attention, loss_mask = _batch()
    full = model(input_ids=ids, attention_mask=attention).logits[:, 4:]
    with loss_token_logits(model) as head:
        logits = head(input_ids=ids, attention_mask=attention, loss_mask=loss_mask)
    rows, columns = loss_mask.nonzero(as_tuple=True)
    assert (logits - full[rows, columns - 1]).abs().max() < 1e-12


def test_prompt_tokens_get_no_logits() -> None:
    """The point of it: the output embedding sees the chosen states only."""
    model = _build("llama").eval()
    ids, attention, loss_mask = _batch()
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    with loss_token_logits(model) as head:
        head(input_ids=ids, attention_mask=attention, loss_mask=loss_mask)
    assert seen == [torch.Size([1, int(loss_mask.sum()), VOCABULARY])]


@pytest.mark.parametrize(("row", "column", "what"), [(0, 0, "first token"), (1, 8, "padding")])
def test_a_token_that_cannot_be_predicted_is_refused(row: int, column: int, what: str) -> None:
    ids, attention, loss_mask = _batch()
    loss_mask[row, column] = True
    with loss_token_logits(_build("llama")) as head, pytest.raises(ValueError, match=what):
        head(input_ids=ids, attention_mask=attention, loss_mask=loss_mask)


def test_the_hook_goes_even_when_the_block_raises() -> None:
    model = _build("llama").eval()
    ids, attention, _ = _batch()
    with pytest.raises(RuntimeError, match="through the object"), loss_token_logits(model):
        model(input_ids=ids, attention_mask=attention)
    assert model(input_ids=ids, attention_mask=attention).logits.shape == (3, 9, VOCABULARY)
