"""Rows of LitGPT's config hub that the table beside the checkout does not hold, one A10G each, GB as 1e9 bytes.

Source: config_hub/finetune/README.md and the files beside it at commit 967cfda1 (April 2024). Every file says
devices: 1, precision: bf16-true, max_seq_length: 512, Alpaca2k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_QUERY_VALUE = "query,value"
_ALL = "all+head"


@dataclass(frozen=True, slots=True)
class HubRow:
    """steps_micro_batches: micro-batches of an optimizer step. published: GB."""

    model: str
    quantization: Literal["none", "bnb.nf4"]
    rank: int
    targets: str
    dropout: float
    micro_batch: int
    steps_micro_batches: int
    published: float


HUB_ROWS = (
    HubRow("mistral-7b", "none", 32, _QUERY_VALUE, 0.05, 2, 4, 20.66),
    HubRow("mistral-7b", "bnb.nf4", 32, _QUERY_VALUE, 0.05, 2, 4, 14.29),
    HubRow("llama-3-8b", "none", 32, _QUERY_VALUE, 0.05, 1, 8, 19.73),
    HubRow("llama-3-8b", "bnb.nf4", 32, _QUERY_VALUE, 0.05, 2, 4, 17.41),
    HubRow("phi-2", "none", 8, _ALL, 0.05, 4, 2, 13.98),
    HubRow("phi-2", "bnb.nf4", 8, _ALL, 0.05, 4, 2, 14.27),
    HubRow("tiny-llama", "none", 32, _ALL, 0.05, 8, 1, 13.50),
    HubRow("tiny-llama", "bnb.nf4", 32, _ALL, 0.05, 8, 1, 16.24),
    HubRow("gemma-2b", "none", 8, _ALL, 0.1, 2, 3, 12.62),
    HubRow("gemma-2b", "bnb.nf4", 16, _ALL, 0.1, 2, 3, 11.58),
    HubRow("gemma-7b", "bnb.nf4", 16, _ALL, 0.1, 1, 6, 17.18),
)
