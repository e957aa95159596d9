"""The page holds what the study computed, nothing runs in it but its own two scripts, and it fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.report.page import Subject, draw_page
from lora_lab.report.text import cell_text
from lora_lab.schema.study import Source
from lora_lab.study.findings import Findings, findings_of
from tests.page_ledger import HOSTILE, add_run, fill, fill_hostile
from tests.unit.ledger_samples import claim, trial_of

METRICS = ["heldout/loss", "skills/acc"]


class Page(HTMLParser):
    """A page taken apart: elements with attributes, visible text, and the content of script elements."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.blocks: dict[str, Any] = {}
        self.text = ""
        self._open = ""
        self._id: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open, self._id = tag, dict(attrs).get("id")
        if tag == "script" and dict(attrs).get("type") is None:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script" and self._id is not None:
            self.blocks[self._id] = json.loads(data)
        elif self._open == "script":
            self.scripts[-1] += data
        elif self._open != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every element of that kind."""
        return [attributes for name, attributes in self.elements if name == tag]


def drawn(
    root: Path, *, question: str = "Does it?", source: Source | None = None, metrics: list[str] | None = None
) -> tuple[Page, Findings, str]:
    """The page of a whole ledger."""
    records = Ledger(root).runs()
    findings = findings_of(records, metrics=metrics)
    subject = Subject(title="s", question=question, source=source, planned=len(records), ledger=root)
    text = draw_page(subject, findings, folder=root / "studies" / "s")
    return Page(text), findings, text


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lab")
    fill(root, ranks=[2, 8], rates=[1e-3, 2e-3], seeds=[0, 1, 2])
    add_run(root, trial_of(rank=99, learning_rate=9.0), status=Status.DIVERGED, reason="step 3: loss NaN")
    return root


def test_it_needs_nothing_from_outside_and_runs_only_its_own_scripts(ledger: Path) -> None:
    page, _, text = drawn(ledger)
    policy = next(str(meta["content"]) for meta in page.all("meta") if meta.get("http-equiv"))
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert len(hashes) == 2
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}';")
    assert not [tag for tag, attributes in page.elements if "src" in attributes or tag in ("link", "iframe", "object")]
    addresses = [str(attributes["href"]) for attributes in page.all("a")]
    assert addresses and all(address.startswith("#") for address in addresses)
    assert "\r" not in text, "a browser would read another script than the one that was hashed"


def test_every_number_of_the_table_is_the_studys(ledger: Path) -> None:
    page, findings, _ = drawn(ledger, metrics=METRICS)
    data = page.blocks["settings-data"]
    for row in findings.table.rows:
        shown = data[row.setting[:12]]
        assert shown["means"] == [[name, cell_text(row.cells[name])] for name in METRICS]
        for name in METRICS:
            assert cell_text(row.cells[name]) in page.text
    assert [column["name"] for column in findings.table.to_json()["metrics"]] == METRICS


def test_every_number_leads_to_its_runs_and_their_files(ledger: Path) -> None:
    page, findings, _ = drawn(ledger)
    targets = {str(link["href"]) for link in page.all("a")}
    page_folder = ledger / "studies" / "s"
    page_folder.mkdir(parents=True, exist_ok=True)
    listed = [run for setting in page.blocks["settings-data"].values() for run in setting["runs"]]
    assert sorted(run["id"] for run in listed) == sorted(record.run_id for record in findings.records)
    for run in listed:
        assert f"#run-{run['id']}" in targets
        details = page.blocks[f"run-data-{run['id']}"]
        assert run["folder"] == details["folder"]
        assert {"trial.json", "result.json", "steps.jsonl", "eval/answers.jsonl"} <= set(details["files"])
        for name in details["files"]:
            assert (page_folder / details["folder"] / name).is_file()


def test_a_runs_page_has_its_own_configuration_curve_and_answers(ledger: Path) -> None:
    page, findings, _ = drawn(ledger)
    record = next(one for one in findings.records if one.trial["rank"] == 8 and one.trial["seed"] == 1)
    details, common = page.blocks[f"run-data-{record.run_id}"], page.blocks["runs-common"]
    assert details["config"]["rank"] == "8" and details["config"]["seed"] == "1"
    assert not set(details["config"]) & set(common["config"])
    assert common["config"]["target.query"] == "true"
    lines = [json.loads(line) for line in record.steps_path.read_text().splitlines()]
    assert details["curves"]["steps"] == [line["step"] for line in lines]
    assert details["curves"]["values"]["loss"]["y"] == [pytest.approx(line["loss"], rel=1e-4) for line in lines]
    assert details["curves"]["values"]["tokens_per_second"]["y"][0] == 800
    assert details["answers"] == [{"prompt": "What is 42?", "expected": "42", "answer": "42", "is_complete": True}]
    environment = dict(common["environments"][details["environment"]])
    assert environment == {"machine_id": "m1"}


def test_hosts_are_not_named(tmp_path: Path) -> None:
    record = add_run(tmp_path, trial_of())
    path = record.folder / "environment.json"
    path.write_text(json.dumps({"hostname": "secret-host", "cpu": "c", "gpu": None}))
    page, _, text = drawn(tmp_path)
    assert "secret-host" not in text
    assert page.blocks["runs-common"]["environments"] == [[["cpu", "c"]]]


def test_what_is_not_in_a_mean_is_told(ledger: Path) -> None:
    page, _, _ = drawn(ledger)
    assert "Not in a mean: lora-r99-s0: DIVERGED: step 3: loss NaN" in page.text
    assert "1 diverged" in re.sub(r"\s+", " ", page.text) or "diverged1" in re.sub(r"\s+", "", page.text)


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    fill_hostile(tmp_path)
    source = Source(title=HOSTILE[0], url="javascript:alert(1)", notes=HOSTILE[2])
    page, _, text = drawn(tmp_path, question=HOSTILE[1], source=source)
    assert len(page.scripts) == 2, "no script element of another's"
    known = {"a", "img", "svg", "script", "base", "style", "title"}
    counts = {tag: len(page.all(tag)) for tag in known}
    assert counts["img"] == counts["base"] == 0 and counts["style"] == counts["title"] == 1
    handlers = [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not handlers
    assert all(str(link["href"]).startswith("#") for link in page.all("a")), "a source is linked by http only"
    assert HOSTILE[1] in page.text and HOSTILE[0] in page.text
    assert "{{ 7 * 7 }}" in page.text, "no template in a template"
    answers = [page.blocks[key]["answers"][0]["answer"] for key in page.blocks if key.startswith("run-data-")]
    assert sorted(answers) == sorted(HOSTILE), "what a model wrote is kept as it is, in JSON"
    assert "\x1b" not in text and "\u202e" not in page.text


def test_plotly_gets_no_markup_from_names(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        add_run(tmp_path, trial_of(rank=4, seed=seed), name=f"<b>%{{x}}</b>-s{seed}")
        add_run(tmp_path, trial_of(rank=8, seed=seed), name=f"<a href='x'>-s{seed}")
    page, _, _ = drawn(tmp_path)
    figures = json.dumps([block for key, block in page.blocks.items() if key.startswith("figures-")])
    assert "&lt;b&gt;% {x}&lt;/b&gt;" in figures
    assert "<a href" not in figures and "<b>%{x}" not in figures


def test_no_run_yet(tmp_path: Path) -> None:
    page, _, _ = drawn(tmp_path)
    assert "No run has ended yet." in page.text and "No run has begun yet." in page.text
    assert not [key for key in page.blocks if key.startswith("figures-")]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = claim(Ledger(tmp_path), trial_of())
    assert folder is not None
    with folder:
        page, _, _ = drawn(tmp_path)
    assert "RUNNING" in page.text and "No run has ended yet." in page.text


def test_a_damaged_run_is_on_the_page(tmp_path: Path) -> None:
    record = add_run(tmp_path, trial_of())
    (record.folder / "result.json").write_text("{")
    add_run(tmp_path, trial_of(seed=1))
    page, _, _ = drawn(tmp_path)
    assert "DAMAGED" in page.text and "Cannot be read" in page.text
    assert page.blocks[f"run-data-{record.run_id}"]["reason"]


def test_curves_of_many_runs_are_thinned_and_say_where_they_end(tmp_path: Path) -> None:
    record = add_run(tmp_path, trial_of(), steps=1000)
    page, _, _ = drawn(tmp_path)
    curves = page.blocks[f"run-data-{record.run_id}"]["curves"]
    assert len(curves["steps"]) <= 120 and curves["steps"][-1] == 1000
    assert len(curves["values"]["loss"]["y"]) == len(curves["steps"])
