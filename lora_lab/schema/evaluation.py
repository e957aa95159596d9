"""What a trained (or untouched) model is scored on."""

from __future__ import annotations

from typing import Literal

from lora_lab.schema.section import Count, Names, Natural, Section, Seed


class SkillsTasks(Section):
    """Multiple-choice tasks made like `data=skills`: over skills that are trained on, and over others."""

    documents: Count
    seed: Seed


class ProseTasks(Section):
    """Perplexity and 4-way sentence completion on a text every Python carries (`pydoc_data.topics`).

    The text changes with the Python version; its SHA-256 is in the trial's identities. perplexity_words: words from its
    start, the same for every tokenizer."""

    perplexity_words: Count
    completion_documents: Count
    seed: Seed


class SampleAnswers(Section):
    """Greedy answers to the first held-out prompts, kept for people to read. rows: how many; 0 is none."""

    rows: Natural
    max_new_tokens: Count


class Evaluation(Section):
    """Held-out loss and exact match, and lm-eval tasks by name.

    engine: tree computes every token that requests share once, stock is lm-eval's own batches. chunk_tokens: of one
    forward pass of the tree, null chooses. batch_size: of everything else, and lm-eval's scores depend on the batch
    shape, so it is fixed and recorded. mirror: a folder of official
    benchmark rows with a MANIFEST.csv. include_path: a folder of the user's own task YAML files.
    limit and num_fewshot: null is the task's own.
    """

    heldout: bool
    answers: SampleAnswers
    tasks: Names
    engine: Literal["tree", "stock"]
    chunk_tokens: Count | None
    batch_size: Count
    limit: Count | None
    num_fewshot: Natural | None
    apply_chat_template: bool
    bootstrap_iters: Natural
    mirror: str | None
    include_path: str | None
    skills: SkillsTasks
    prose: ProseTasks
