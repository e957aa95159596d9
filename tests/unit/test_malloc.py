"""Freed memory that stays: pages are not cleared anew for each allocation, until they are given back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource
import torch
from lora_lab.memory.malloc import give_back, keep_freed

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(8_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults(10)
assert keep_freed()
faults(1)
kept = faults(10)
give_back()
print(usual, kept, faults(1))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_pages_are_kept_and_given_back() -> None:
    answer = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    usual, kept, after = map(int, answer.stdout.split())
    assert kept < usual / 10 and after > kept
