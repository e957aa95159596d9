"""`plan --memory` and the refusal of a run, with a predictor whose numbers are known: what is asked, shown, refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from lora_lab.launch.local import Tally
from lora_lab.plan.devices import device_memory
from lora_lab.plan.job import Job
from lora_lab.plan.prediction import LongestRows, Prediction, prediction_of
from lora_lab.plan.timeline import START, Event, Place, Timeline
from lora_lab.predict import predictor
from lora_lab.schema.trial import Trial
from tests.journey.program import Answer, Lab

WEIGHTS = 8_000_000_000
PER_ROW = 2_000_000_000
# Two cuBLAS workspaces of 32 MiB, as a device of any size may have, over two of :4096:2:16:8, which are predicted.
WORKSPACE = 2 * (32 * 2**20 - 2 * 4096 * 1024 - 8 * 16 * 1024)


@dataclass
class Known:
    """Predicts WEIGHTS, 1 GB per rank, and PER_ROW for each row of a micro-batch; notes what it was asked.

    refused: methods that it cannot predict.
    """

    refused: tuple[str, ...] = ()
    asked: list[tuple[str, int, int, str, str]] = field(default_factory=list)

    def rows_of(self, job: Job, *, cache: Path) -> LongestRows:
        """Four rows of 100 tokens."""
        return LongestRows((100,) * 4, (50,) * 4, "the longest of 16 rows")

    def predict(
        self, trial: Trial, rows: LongestRows, *, device_kind: str, style: str, cache: Path | None
    ) -> Prediction:
        """See the class."""
        micro = trial.training.micro_batch_size
        self.asked.append((trial.method.kind, trial.rank, micro, device_kind, style))
        if trial.method.kind in self.refused:
            raise predictor.Unpredictable(f"{trial.method.kind} is beyond me")
        adapter, activations = trial.rank * 1_000_000_000, micro * PER_ROW
        peak = WEIGHTS + adapter + activations
        parts = dict.fromkeys(("quantization_constants", "gradients", "optimizer_state", "temporary", "allocator"), 0)
        return Prediction(
            device_kind=device_kind,  # type: ignore[arg-type]
            style=style,  # type: ignore[arg-type]
            trainable_parameters=1234,
            total_parameters=99_999,
            peak_allocated_bytes=peak,
            peak_reserved_bytes=peak + 100_000_000 if device_kind == "cuda" else None,
            parts=parts | {"weights": WEIGHTS, "adapter": adapter, "activations": activations},
            place="backward, layer 1",
            paged_bytes=0,
            base_bytes=WEIGHTS,
            micro_batch_size=micro,
            longest_row=100,
            rows=rows.source,
            how="traced in full",
            notes=("a note",),
        )

    def trace(self, trial: Trial, rows: LongestRows, *, device_kind: str, style: str) -> Timeline:
        """Weights, and activations that come and go."""
        forward = Place("forward", 0)
        events = (Event(0, WEIGHTS, START), Event(1, PER_ROW, forward), Event(1, -PER_ROW, Place("backward", 0)))
        return Timeline(events, {0: "weights", 1: "activations"})


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    """In the place of the predictor."""
    one = Known()
    for name in ("rows_of", "predict", "trace"):
        monkeypatch.setattr(predictor, name, getattr(one, name))
    return one


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the jobs that would be run; none is."""
    names: list[str] = []

    def run_jobs(jobs: Sequence[Job], *_: object, **__: object) -> Tally:
        names.extend(job.name for job in jobs)
        return Tally(0, 0, (), 0)

    monkeypatch.setattr("lora_lab.launch.local.run_jobs", run_jobs)
    return names


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny random model is made."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def lab(tmp_path: Path, tiny_cache: Path) -> Lab:
    """An empty lab."""
    return Lab(tmp_path / "lab", tiny_cache)


def rows_of(answer: Answer) -> list[dict[str, Any]]:
    assert answer.code == 0, answer.err
    rows: list[dict[str, Any]] = answer.json()
    return rows


def test_json_holds_the_prediction_and_whether_it_fits(lab: Lab, known: Known) -> None:
    plain = rows_of(lab.plan("-m", "rank=1,2,1", "--json"))
    rows = rows_of(lab.plan("-m", "rank=1,2,1", "--memory", "--device", "24GiB", "--json"))
    for before, row, rank in zip(plain, rows, (1, 2), strict=False):
        memory = row.pop("memory")
        peak = WEIGHTS + rank * 1_000_000_000 + 4 * PER_ROW
        assert row.pop("predicted_peak_allocated_bytes") == peak == sum(memory["parts"].values())
        assert row == before, "what plain plan says is all there"
        device = device_memory("24GiB")
        needed = peak + 100_000_000 + device.context_bytes + WORKSPACE
        fit, expected = memory["fit"], {"fits": True, "needed_bytes": needed, "headroom_bytes": 24 * 2**30 - needed}
        assert expected.items() <= fit.items() and fit["device"]["total_bytes"] == 24 * 2**30
        assert memory["predicted_train_seconds"] is None
        assert memory["missing"] == {"predicted_train_seconds": "no run in this machine's ledger has trained anything"}
        kept = {key: memory[key] for key in Prediction.__dataclass_fields__}
        assert json.loads(json.dumps(prediction_of(kept).to_json())) == kept
    assert rows[2]["state"] == "duplicate" and rows[2]["memory"] is None
    assert rows[2]["predicted_peak_allocated_bytes"] is None
    assert "duplicate" in rows[2]["missing"]["predicted_peak_allocated_bytes"]


def test_what_cannot_be_predicted_has_its_reason_and_no_number(lab: Lab, known: Known) -> None:
    known.refused = ("ia3",)
    line = ("-m", "method=ia3,base,lora", "rank=1", "--memory", "--device", "h100")
    refused, base, predicted = rows_of(lab.plan(*line, "--json"))
    for row, reason in ((refused, "ia3 is beyond me"), (base, "method=base trains nothing")):
        assert row["predicted_peak_allocated_bytes"] is None and row["memory"]["fit"] is None
        assert row["memory"]["missing"]["prediction"] == reason
        assert row["missing"]["predicted_peak_allocated_bytes"] == reason
        assert "peak_allocated_bytes" not in row["memory"]
    assert predicted["memory"]["peak_allocated_bytes"] == WEIGHTS + 1_000_000_000 + 4 * PER_ROW
    text = lab.plan(*line).out
    assert f"not predicted: {refused['name']}: ia3 is beyond me" in text
    assert not any("GB" in one for one in text.splitlines() if one.startswith(refused["name"]))


def test_the_table(lab: Lab, known: Known) -> None:
    answer = lab.plan("-m", "rank=1,10", "--memory", "--device", "24GiB")
    assert answer.code == 0 and answer.err == "", "no progress in a pipe"
    lines = [one for one in answer.out.splitlines() if one.startswith("lora-r")]
    small, large, parts, _ = (line.split() for line in lines)
    left = 24 * 2**30 - 17_100_000_000 - device_memory("24GiB").context_bytes - WORKSPACE
    assert small[1:] == ["1,234", "17.0", "GB", "17.1", "GB", "yes,", f"{left / 1e9:.2f}", "GB", "left", "4", "1", "-"]
    assert large[1:] == ["1,234", "26.0", "GB", "26.1", "GB", "no,", "906", "MB", "short", "2", "0", "-"]
    assert parts[1:] == ["8.00", "GB", "0", "B", "1.00", "GB", "0", "B", "0", "B", "8.00", "GB", "0", "B", "0", "B",
                                    "backward,", "layer", "1"]  # fmt: skip
    for line in (
        "device: 24GiB, 25.8 GB (24.00 GiB) in all",
        "GB is 1e9 bytes, GiB is 2^30 bytes",
        "row lengths: the longest of 16 rows",
        "step: own, traced in full",
        "note: a note",
        "no time here: no run in this machine's ledger has trained anything",
    ):
        assert line in answer.out, line


def test_style_and_kind_of_device_are_handed_on(lab: Lab, known: Known) -> None:
    assert lab.plan("--memory", "memory.style=hf", "memory.device=h100").code == 0
    assert {one[3:] for one in known.asked} == {("cuda", "hf")}
    known.asked.clear()
    (row,) = rows_of(lab.plan("--memory", "launch.device=cpu", "--json"))
    assert {one[3:] for one in known.asked} == {("cpu", "own")}
    device = row["memory"]["fit"]["device"]
    assert (device["name"], device["total_bytes"]) == ("this machine", psutil.virtual_memory().total)
    assert row["memory"]["peak_reserved_bytes"] is None
    (row,) = rows_of(lab.plan("--memory", "memory.device=h100", "--device", "24GiB", "--json"))
    assert row["memory"]["fit"]["device"]["name"] == "24GiB", "the flag comes before the setting"


def test_a_plain_plan_predicts_nothing(lab: Lab, known: Known) -> None:
    assert "memory" not in rows_of(lab.plan("--json"))[0]
    assert known.asked == []


def test_explain_draws_a_page_and_bars(lab: Lab, known: Known) -> None:
    line = ("-m", "rank=1,2,1", "--explain", "--device", "h100")
    answer = lab.plan(*line)
    assert answer.code == 0, answer.err
    pages = [lab.root / "plans" / f"lora-r{rank}-qv-s0.html" for rank in (1, 2)]
    assert sorted((lab.root / "plans").iterdir()) == pages
    for page in pages:
        assert page.stem in page.read_text() and f"page: {page}" in answer.out
    assert "peak 17.0 GB in backward, layer 1" in answer.out, "of the prediction"
    assert "peak 10.0 GB: forward, layer 0" in answer.out, "of the timeline"
    first, second, copy = rows_of(lab.plan(*line, "--json"))
    assert [first["memory"]["page"], second["memory"]["page"]] == [str(page) for page in pages]
    assert copy["memory"] is None


def test_pages_of_equal_names_have_the_ids_beside_them(lab: Lab, known: Known) -> None:
    rows = rows_of(lab.plan("-m", "learning_rate=1e-3,1e-4", "--explain", "--device", "h100", "--json"))
    assert rows[0]["name"] == rows[1]["name"]
    assert [Path(row["memory"]["page"]).stem for row in rows] == [
        f"{row['name']}-{row['fingerprint'][:16]}" for row in rows
    ]


def test_explain_is_for_few(lab: Lab, known: Known) -> None:
    answer = lab.plan("-m", "seed=range(0,9)", "--explain", "--device", "h100")
    assert answer.code == 2 and "--explain: draws a page per trial; these are 9" in answer.err
    assert known.asked == []


def test_a_run_that_does_not_fit_is_refused_before_anything_is_loaded(lab: Lab, known: Known) -> None:
    answer = lab.run("-m", "rank=1,10", "memory.device=24GiB")
    assert answer.code == 2
    (line,) = [one for one in answer.err.splitlines() if one.startswith("error: ")]
    assert line.startswith("error: lora-r10-qv-s0: is predicted not to fit: needs 26.7 GB (26.0 GB of tensors, 26.1 GB")
    assert "906 MB more than the 25.8 GB of 24GiB" in line, "26.1 GB + 0.49 GiB + 50.1 MB - 24 GiB"
    assert "50.1 MB of cuBLAS workspace" in line
    assert "closest that fit: training.micro_batch_size=2 (22.7 GB); " in line
    assert line.endswith("memory.on_overflow=try runs it anyway")
    assert lab.runs() == [], "nor is the one that fits begun"


def test_the_memory_of_this_machine_is_what_is_free(
    lab: Lab, known: Known, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = WEIGHTS + 1_000_000_000 + 4 * PER_ROW

    def free(available: int) -> None:
        sizes = psutil.virtual_memory()._replace(available=available, total=10**12)
        monkeypatch.setattr("lora_lab.app.memory_device.psutil.virtual_memory", lambda: sizes)

    free(peak - 1)
    answer = lab.run("rank=1", "launch.device=cpu")
    assert answer.code == 2 and "1 B more than the 17.0 GB of this machine (free on this machine now)" in answer.err
    assert begun == []
    free(peak)
    lab.run("rank=1", "launch.device=cpu")
    assert begun == ["lora-r1-qv-s0"]


def test_workers_on_one_cpu_share_its_memory(
    lab: Lab, known: Known, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = WEIGHTS + 1_000_000_000 + 4 * PER_ROW
    sizes = psutil.virtual_memory()._replace(available=2 * peak - 2, total=10**12)
    monkeypatch.setattr("lora_lab.app.memory_device.psutil.virtual_memory", lambda: sizes)
    two = ("rank=1", "launch.device=[cpu,cpu]")
    lab.run(*two)
    assert begun == ["lora-r1-qv-s0"], "a single run has all of it"
    answer = lab.run("-m", *two, "seed=0,1")
    assert answer.code == 2 and "free on this machine now, among 2 workers" in answer.err


def test_try_runs_it_anyway(lab: Lab, known: Known, begun: list[str]) -> None:
    assert lab.run("rank=10", "memory.device=24GiB").code == 2 and begun == []
    lab.run("rank=10", "memory.device=24GiB", "memory.on_overflow=try")
    assert begun == ["lora-r10-qv-s0"]


def test_a_run_is_checked_in_the_labs_own_step(lab: Lab, known: Known, begun: list[str]) -> None:
    lab.run("rank=1", "memory.device=h100", "memory.style=litgpt")
    assert known.asked == [("lora", 1, 4, "cuda", "own")] and begun


def test_what_cannot_be_predicted_runs_and_what_trains_nothing_is_not_asked(
    lab: Lab, known: Known, begun: list[str]
) -> None:
    known.refused = ("lora",)
    lab.run("memory.device=24GiB", "rank=10")
    assert begun == ["lora-r10-qv-s0"] and len(known.asked) == 1
    lab.run("memory.device=24GiB", "method=base")
    assert begun == ["lora-r10-qv-s0", "base"] and len(known.asked) == 1


def test_what_is_done_is_not_asked(lab: Lab, known: Known) -> None:
    assert lab.run("rank=1", "memory.device=h100").code == 0
    known.asked.clear()
    assert lab.run("rank=1", "memory.device=24GiB").code == 0
    assert known.asked == []


def test_of_many_the_first_are_told_and_the_others_counted(lab: Lab, known: Known) -> None:
    answer = lab.run("-m", "rank=10", "seed=range(0,12)", "memory.device=24GiB")
    problems = [one for one in answer.err.splitlines() if one.startswith("error: ")]
    assert answer.code == 2 and len(problems) == 11 and "2 more do not fit" in problems[-1]
    counts = Counter(one[2] for one in known.asked)
    assert counts[4] >= 12
