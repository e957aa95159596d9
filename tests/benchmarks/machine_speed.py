"""What this machine can do at most: the speed of one large matrix product."""

from __future__ import annotations

import statistics
import time

import torch


def product_gflops() -> float:
    """Speed of one large fp32 matrix product, in 1e9 operations per second."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / statistics.median(seconds) / 1e9
