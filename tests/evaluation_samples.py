"""An evaluation section and a tiny shape, for tests of the evaluate floor."""

from __future__ import annotations

from lora_lab.schema.evaluation import Evaluation
from lora_lab.schema.model import Shape

TINY_SHAPE = Shape(
    family="llama",
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_size=16,
    vocab_size=260,
    max_positions=4096,
    tied_embeddings=False,
)


def evaluation(*tasks: str, **changes: object) -> Evaluation:
    """A small evaluation of `tasks`, with some values changed."""
    values = {
        "heldout": False,
        "answers": {"rows": 0, "max_new_tokens": 8},
        "tasks": list(tasks),
        "engine": "tree",
        "chunk_tokens": None,
        "batch_size": 8,
        "limit": None,
        "num_fewshot": None,
        "apply_chat_template": False,
        "bootstrap_iters": 0,
        "mirror": None,
        "include_path": None,
        "skills": {"documents": 8, "seed": 0},
        "prose": {"perplexity_words": 100, "completion_documents": 4, "seed": 0},
    }
    return Evaluation.model_validate({**values, **changes})
