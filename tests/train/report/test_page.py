"""The report page: whole runs, runs that ended early, hostile answers; without a browser."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fusewright.errors import DataError
from fusewright.report import Report, Site
from fusewright.train.report import page
from fusewright.train.report.format import millions
from fusewright.train.report.page_sections import numbers
from fusewright.train.report.run_facts import Facts

from ...load import stretched

HOSTILE = (
    "</title></style><script>alert('1')</script><img src=x onerror=\"alert(2)\">&amp; ü 好 \x00"
)
VOID = {"meta", "link", "br", "img", "wbr", "input", "hr"}


class Parsed(HTMLParser):
    """Reads a page, and objects to tags that are not closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"nothing to close for {tag}"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def parsed(run: Any) -> Parsed:
    return Parsed(page.render(Facts.of(run)))


def test_a_whole_run(run: dict[str, Any], run_folder: Path, tmp_path: Path) -> None:
    assert f"{run['val_loss_after']:.3f}" in (run_folder / "report.html").read_text(
        encoding="utf-8"
    )
    path = page.write(run_folder, tmp_path)
    assert path == tmp_path / "report.html"
    assert list(tmp_path.iterdir()) == [path]
    found = Parsed(path.read_text(encoding="utf-8"))
    before, after = run["val_loss_before"], run["val_loss_after"]
    for words in (
        f"{before:.3f} → {after:.3f}",
        "over the run",
        "What it saves",
        "finished",
        "LoRA rank 4",
        "What is 3?",
        run["sample"]["after"].split()[0] if run["sample"]["after"].split() else "empty",
        "plain PEFT gives the same logits",
        "max_steps: 6",
        "more keys at their defaults",
        "fusewright generate",
        "AutoPeftModelForCausalLM",
        run["versions"]["torch"],
    ):
        assert words in found.text
    assert '<th scope="row">lora_<wbr>linear</th>' in path.read_text(encoding="utf-8")
    charts = [a for a in found.named("svg") if a.get("role") == "img"]
    assert len(charts) == 5  # loss, learning rate, gradient norm, tokens per second, memory
    for curve in charts:  # each has a title and a description, by id
        ids = {a.get("id") for tag, a in found.tags if tag in ("title", "desc")}
        assert set(str(curve["aria-labelledby"]).split()) <= ids


def test_the_same_page_from_every_form_of_a_run(run: dict[str, Any], run_folder: Path) -> None:
    pages = [page.render(Facts.of(r)) for r in (run, run_folder, run_folder / "run.json")]
    assert pages[0] == pages[1] == pages[2]


def test_a_page_can_be_made_without_torch() -> None:
    modules = "from fusewright.train.report import model_card, page"
    code = f"import sys; {modules}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=stretched(120),
    )
    assert done.stdout.strip() == "False"


def test_it_is_accessible_in_structure(run: dict[str, Any]) -> None:
    found = parsed(run)
    assert found.named("html") == [{"lang": "en"}]
    for landmark in ("header", "nav", "main", "footer"):
        assert len(found.named(landmark)) == 1
    assert len(found.named("h1")) == 1
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for anchor in found.named("a"):
        assert str(anchor["href"]).removeprefix("#") in ids
    for section in found.named("section"):
        assert section["aria-labelledby"] in ids
    assert all(cell.get("scope") in ("col", "row") for cell in found.named("th"))


def test_it_needs_nothing_else(run: dict[str, Any]) -> None:
    text = page.render(Facts.of(run))
    found = Parsed(text)
    assert found.named("script") == []
    assert found.named("img") == []
    for tag, attrs in found.tags:
        for name in ("src", "href", "xlink:href", "srcset"):
            value = str(attrs.get(name) or "")
            assert value.startswith(("#", "data:")) or not value, (tag, name, value)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a for a in found.named("meta") if a.get("http-equiv"))
    assert "default-src 'none'" in str(policy["content"])


def replaced(value: Any, text: str) -> Any:
    """``value`` with every piece of text in it, keys too, made ``text``."""
    if isinstance(value, dict):
        return {(k if k in KEPT else f"{k}{text}"): replaced(v, text) for k, v in value.items()}
    if isinstance(value, list):
        return [replaced(v, text) for v in value]
    return text if isinstance(value, str) else value


KEPT = {
    "recipe", "base_model", "adapter", "datasets", "path", "sample", "question", "before", "after",
    "status", "reason", "problems", "part", "error", "warnings", "key", "note", "optimize",
    "sites", "bypasses", "module", "rule", "op", "codegen", "memory", "data", "seconds", "history",
    "step", "loss", "eval_loss", "versions", "machine", "started", "output_dir", "steps",
    "steps_planned", "checkpoint", "learning_rate", "grad_norm", "epoch",
    "trained_tokens_per_s", "rss_mb",
}  # fmt: skip
"""Keys that must stay, for what is below them to be shown."""


def test_nothing_that_is_shown_can_become_markup(run: dict[str, Any]) -> None:
    bad = replaced(run, HOSTILE)
    bad |= {
        "reason": HOSTILE, "checkpoint": HOSTILE, "problems": [{"part": HOSTILE, "error": HOSTILE}],
        "warnings": [HOSTILE, {"key": HOSTILE, "status": HOSTILE, "note": HOSTILE}],
    }  # fmt: skip
    bad["optimize"]["bypasses"] = [{"module": HOSTILE, "reason": HOSTILE}]
    plain, found = parsed(run), parsed(bad)
    assert found.named("script") == []
    assert found.named("img") == []
    assert not [a for _, attrs in found.tags for a in attrs if a.startswith("on")]
    assert len(found.named("style")) == 1
    assert len(found.named("figure")) == len(plain.named("figure"))
    assert found.text.count("<script>alert('1')</script>") > 50  # it is all there, as text
    assert "ü 好" in found.text


def without(run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The run with each entry missing, null, and of a wrong kind; and with none at all."""
    for key in run:
        yield {k: v for k, v in run.items() if k != key}
        for wrong in (None, "text", ["a"], {"a": None}, math.nan):
            yield {**run, key: wrong}
    yield {}


@pytest.mark.long
def test_every_entry_may_be_missing_or_odd(run: dict[str, Any]) -> None:
    for odd in without(run):
        assert parsed(odd).named("main")


def test_the_audit_is_shown_with_what_is_wrong_first(run: dict[str, Any]) -> None:
    assert run["audit"]["passed"]
    assert "Audit of the training" in parsed(run).text
    findings = [
        *run["audit"]["findings"],
        {"check": "warmup", "verdict": "fail", "reason": HOSTILE},
    ]
    text = parsed({**run, "audit": {"findings": findings}}).text
    assert "1 failed" in text
    assert "(failed: warmup)" in text
    assert text.index("warmup fail") < text.index("weights-moved pass")
    assert "Audit of the training" not in parsed({**run, "audit": None}).text


def test_a_run_that_lost_a_number(run: dict[str, Any]) -> None:
    lost = json.loads(json.dumps(run))
    del lost["val_loss_after"], lost["adapter_check"], lost["sample"]["after"]
    lost["history"] = [e for e in lost["history"] if e["step"] <= 3]
    lost["history"].append({"step": 4, "loss": "nan", "grad_norm": "inf", "learning_rate": 0.01})
    lost |= {"status": "nan", "steps": 3, "loss_last": "nan", "reason": "the loss of step 4 is nan"}
    lost["checkpoint"] = "/runs/a/checkpoint-2"
    found = parsed(lost)
    for words in (
        "stopped: not a number",
        "the loss of step 4 is nan.",
        "after step 3 of 6",
        "The adapter of the last complete step is saved",
        "To resume from checkpoint-2",
        "Not asked: the run ended early.",
    ):
        assert words in found.text
    assert any("lost" in str(a.get("class")) for a in found.named("path"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "interrupted", "signal": 15, "steps": 2}, "after step 2 of 6, on SIGTERM."),
        (
            {"status": "interrupted", "signal": 2},
            "All steps were done; the steps after training were",
        ),
        (
            {
                "val_loss_after": None,
                "history": [{"step": 0, "eval_loss": 3.0}, {"step": 4, "eval_loss": 2.5}],
            },
            "3.000 → 2.500 −0.500 at step 4",
        ),
        ({"status": "watchdog"}, "stopped by the loss watchdog"),
        ({"status": "disk full", "reason": "no space left"}, "the disk is full"),
        ({"status": "something new"}, "something new"),
        ({"adapter_check": {"exact": False}}, "The saved adapter is broken"),
        ({"problems": [{"part": "plot", "error": "no font"}]}, "plot failed: no font"),
        ({"warnings": ["liger_rope: subsumed"]}, "liger_rope: subsumed"),
        ({"resumed_from": 3}, "resumed at step 3"),
        ({"peak_cuda_mb": 2048.0}, "Peak GPU memory 2.0 GiB"),
        ({"optimize": Report(sites=()).to_dict()}, "No formula was recognised."),
    ],
)
def test_what_else_a_run_can_tell(run: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    assert words not in parsed(run).text
    assert words in parsed({**run, **changes}).text


def test_columns_of_the_rules_are_there_when_they_tell_something(run: dict[str, Any]) -> None:
    def head(sites: tuple[Site, ...]) -> str:
        found = parsed({**run, "optimize": Report(sites=sites).to_dict()}).text
        return found[found.index("Rules, how often") :][:200]

    done = Site(module="a", rule="glu", op="glu", status="rewritten")
    missed = Site(module="b", rule="glu", op="glu", status="missed", reason="no spelling")
    assert "(never refused or missed)" in head((done,))
    assert "rule rewritten error gradient error" in head((done,))
    assert "(never refused)" in head((done, missed))
    assert "rule rewritten missed error gradient error" in head((done, missed))


def test_keys_without_effect_are_told(run: dict[str, Any]) -> None:
    assert "subsumed" not in parsed(run).text
    recipe = {**run["recipe"], "liger_rope": True}
    assert "liger_rope: subsumed: " in parsed({**run, "recipe": recipe}).text
    assert "subsumed" not in parsed({**run, "recipe": {**recipe, "datasets": "odd"}}).text


def test_it_tells_no_folders_of_this_machine(run: dict[str, Any], run_folder: Path) -> None:
    out = str(run_folder)
    failed = {"part": "plot", "error": f"OSError: [Errno 13] Permission denied: '{out}/loss.png'"}
    told = {
        **run, "status": "disk full", "reason": f"{out}/part could not be written",
        "checkpoint": f"{out}/checkpoint-4", "problems": [failed], "resumed_from": 2,
        "optimize": {**run["optimize"], "bypasses": [{"module": "a", "reason": "/opt/lib/x.py:3"}]},
    }  # fmt: skip
    told["recipe"] = {**run["recipe"], "mlflow_tracking_uri": "file:///home/me/mlruns"}
    text = page.render(Facts.of(told))
    for folder in (out, str(run_folder.parent), "/home/", "/opt/"):
        assert folder not in text
    assert run["recipe"]["base_model"] not in text
    for words in ("loss.png", "checkpoint-4", "x.py:3", "mlruns", "rows.jsonl", "generate . "):
        assert words in text
    sample = {"question": "Where is /usr/bin/env?", "before": "/usr/bin", "after": "/usr/bin"}
    assert "Where is /usr/bin/env?" in page.render(Facts.of({**run, "sample": sample}))


def test_the_parameters_of_base_and_adapter_are_told_apart(run: dict[str, Any]) -> None:
    trained, total = run["parameters"]["trained"], run["parameters"]["total"]
    sizes = f"{millions(total - trained)} in the base model, {millions(trained)} in the adapter"
    assert f"parameters {sizes}" in parsed(run).text
    full = {**run, "recipe": {**run["recipe"], "adapter": None}}
    some = f"parameters {millions(total)}, {millions(trained)} of them trained"
    assert some in parsed(full).text
    whole = {**full, "parameters": {"trained": total, "total": total}}
    assert f"parameters {millions(total)}, all trained" in parsed(whole).text


def test_secrets_are_not_shown(run: dict[str, Any]) -> None:
    recipe = {**run["recipe"], "comet_api_key": "sesame", "special_tokens": {"pad_token": "<pad>"}}
    text = parsed({**run, "recipe": recipe}).text
    assert "sesame" not in text
    assert "comet_api_key: (hidden)" in text
    assert "pad_token: <pad>" in text


def test_a_path_that_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not the record of a run"):
        page.write(tmp_path, tmp_path)
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(DataError, match="holds no keys and values"):
        page.write(tmp_path, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_the_numbers_of_a_long_run_keep_every_validation() -> None:
    loss = [(float(i), 1.0 / i) for i in range(1, 2001)]
    checks = [(float(i), 0.5) for i in range(37, 2001, 190)]
    table = numbers([("loss", loss), ("validation", checks)])
    assert table is not None
    assert len(table.rows) <= 60 + len(checks)
    shown = {row[0]: row for row in table.rows}
    assert all(shown[f"{step:,.0f}"][2] == "0.5" for step, _ in checks)
    assert {"1", "2,000"} <= set(shown)
    assert "of 2,000 steps" in table.caption
    assert numbers([("loss", [])]) is None
