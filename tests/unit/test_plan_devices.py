"""Cards by name and sizes in two units; what the table says against what NVIDIA sells and PyTorch prints."""

from __future__ import annotations

import pytest

from lora_lab.errors import InputError
from lora_lab.plan.devices import DEVICES, DeviceMemory, device_memory, workspace_bytes

GIB = 2**30
# GiB on the data sheets (nvidia.com), as sold: H200 141 GB, B200 180 GB of HBM.
SOLD = {
    "b200": 180, "h200": 141, "h100": 80, "a100": 80, "a100-40": 40, "5090": 32, "4090": 24, "3090": 24, "a6000": 48,
    "l40": 48, "l40s": 48, "l4": 24, "a10": 24, "a10g": 24, "t4": 16, "v100-32": 32, "v100-16": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("a100", round(79.15 * GIB)),
        ("A100-40", round(39.39 * GIB)),
        (" 4090 ", round(23.64 * GIB)),
        ("24GiB", 24 * GIB),
        ("24GB", 24_000_000_000),
        ("80gb", 80_000_000_000),
        ("23.5 gib", 25_232_932_864),
        ("1gb", 1_000_000_000),
    ],
)
def test_total(text: str, total: int) -> None:
    assert device_memory(text).total_bytes == total


def test_a_size_keeps_its_spelling_and_has_a_context() -> None:
    found = device_memory(" 24GiB")
    assert found.name == "24GiB"
    assert found.context_bytes == DEVICES["a100"].context_bytes
    assert "asked for" in found.source


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("h10", 'no such device "h10"; did you mean "h100"?'),
        ("v100", 'did you mean "v100-32"? (choices: v100-32, v100-16), or a size such as 24GiB or 24GB'),
        ("", 'no such device ""'),
        ("24", 'no such device "24"'),
        ("24MiB", 'no such device "24MiB"'),
        ("-24GiB", 'no such device "-24GiB"'),
        ("1e3GB", 'no such device "1e3GB"'),
        ("nanGiB", 'no such device "nanGiB"'),
        ("9" * 400 + "GB", "no such device"),
        ("0GiB", "must be more than the 0.49 GiB of CUDA's context, got 0GiB"),
        ("0.4GiB", "must be more than the 0.49 GiB of CUDA's context, got 0.4GiB"),
    ],
)
def test_what_is_no_device(text: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        device_memory(text)
    assert caught.value.problems[0].where == "device"
    assert part in caught.value.problems[0].message
    assert len(caught.value.problems[0].message) < 400


def test_the_table_is_of_cards_as_they_are_sold() -> None:
    assert set(SOLD) == set(DEVICES)
    for name, gib in SOLD.items():
        card = DEVICES[name]
        assert card.name == name
        # Error correction in GDDR6 takes up to a sixteenth of a card, the driver a little more.
        assert 0.90 * gib < card.total_bytes / GIB < gib
        assert 0.1 < card.context_bytes / GIB < 1.0
        assert "#" in card.source or "public" in card.source or ".md" in card.source


@pytest.mark.parametrize("card", DEVICES.values(), ids=lambda card: card.name)
def test_a_context_is_the_difference_that_its_source_shows(card: DeviceMemory) -> None:
    """`both: ... (in use - allocated - reserved)`, in GiB, each rounded to 0.01."""
    shown = card.source.rpartition("(")[2].rstrip(")")
    if " - " in shown:
        first, *others = (float(number) for number in shown.split(" - "))
        assert card.context_bytes / GIB == pytest.approx(first - sum(others), abs=0.011)
    else:
        other = card.source.partition("as of ")[2].partition(",")[0]
        assert card.name in ("b200", "h200") or card.context_bytes == DEVICES[other].context_bytes


def test_workspace_of_cublas() -> None:
    # discuss.pytorch.org/t/178671 and pytorch/pytorch#95668 (on an A10G) show 8519680.
    assert workspace_bytes(DEVICES["a10g"]) == 8_519_680
    assert workspace_bytes(DEVICES["a100"]) == 8_519_680
    assert workspace_bytes(DEVICES["h100"]) == 33_554_432
    assert workspace_bytes(device_memory("24GiB")) == 33_554_432
