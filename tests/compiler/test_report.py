"""What the report says in numbers."""

from __future__ import annotations

import logging
from xml.etree import ElementTree

import pytest

from fusewright import optimize, restore
from fusewright.report import Bypass, Figures, Report, Site
from tests.explained import explain

from ..models.zoo import FAMILIES, build

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_the_traffic_of_a_norm_is_its_input_and_its_output() -> None:
    model = build(FAMILIES[0], lora=False)
    row = 4 * model.config.hidden_size
    norms = [s for s in explain(optimize(model)).sites if s.rule == "rms_norm"]
    assert len(norms) == 5
    for site in norms:
        assert site.moved_after == 2 * row
        # x², its mean, eps, rsqrt, the product with x, the weight: full rows and single numbers
        assert site.moved_before == 2 * row + (row + 4) + 2 * 4 + 2 * 4 + (2 * row + 4) + 2 * row


def test_a_rewrite_of_a_rewrite_is_compared_with_what_stood_first() -> None:
    first = Figures(saved_before=100, saved_after=40, moved_before=900, moved_after=300)
    then = Figures(saved_before=80, saved_after=50, moved_before=600, moved_after=500)
    merged = then.after([first, first])
    assert (merged.saved_before, merged.saved_after) == (80 + 2 * 60, 50)
    assert (merged.moved_before, merged.moved_after) == (600 + 2 * 600, 500)
    assert Figures().after([first]) == Figures()


def test_nested_modules_that_fail_at_one_line_of_code_share_a_line() -> None:
    left = [
        Bypass("layers.0", "no: branch Explanation: gate (at moe.py:9 < llama.py:5)"),
        Bypass("layers.0.attn", "no: branch Explanation: scores (at llama.py:7 < llama.py:3)"),
        Bypass("layers.0.mlp", "no: branch Explanation: gate (at moe.py:9)"),
        Bypass("layers.0.mlp.gate", "no: call Explanation: gate (at moe.py:9)"),
        Bypass("layers.0.mlp.experts", "no: branch Explanation: experts"),
        Bypass("layers.01", "no: branch Explanation: other (at moe.py:9)"),
    ]
    assert [text for _, _, text in Report((), tuple(left)).remarks()] == [
        "layers.0, with 1 of its parts: no: branch Explanation: gate (at moe.py:9 < llama.py:5)",
        "layers.0.attn: no: branch Explanation: scores (at llama.py:7 < llama.py:3)",
        "layers.0.mlp.gate: no: call Explanation: gate (at moe.py:9)",
        "layers.0.mlp.experts: no: branch Explanation: experts",
        "layers.01: no: branch Explanation: other (at moe.py:9)",
    ]
    root = [
        Bypass("", "no: a Explanation: b (at c.py:1)"),
        Bypass("", "no: a Explanation: d (at c.py:1)"),
    ]
    assert len(Report((), tuple(root)).remarks()) == 2


def test_a_model_that_is_not_optimized_is_said_to_be_that() -> None:
    model = build(FAMILIES[0], lora=False)
    assert str(explain(model)) == (
        "fusewright: this model is not optimized\n  runs as it was: the model: "
        "optimize(model) was not called, or restore(model) was called since"
    )
    assert str(explain(restore(optimize(model)))) == str(explain(model))


def test_a_report_fits_a_notebook() -> None:
    sites = [Site(f"layers.{i}", "glu", "glu", "rewritten", error=1e-7) for i in range(400)]
    gap = Site("head", "rope", "rope", "refused", "a <b> & c")
    report = Report((*sites, gap), regions=4, graphs=2, codegen="eager", choices=("x 1 us",))
    assert repr(report) == (
        "<Report: 400 rewrites in 4 regions (2 graphs), codegen eager; refused: 1; "
        "print it for the table>"
    )
    page = report._repr_html_()
    assert len(page) < 1500
    tables = ElementTree.fromstring(f"<div>{page}</div>").findall("table")  # well formed
    rows = [[[cell.text or "" for cell in row] for row in table] for table in tables]
    assert rows[0][0] == ["rule", "rewritten", "refused", "missed", "error", "gradient error"]
    assert rows[0][1] == ["glu", "400", "0", "0", "1.0e-07", "-"]
    assert rows[1:] == [[["kernel:", "x 1 us"]], [["refused", "rope", "head: a <b> & c"]]]
    assert "this model is not optimized" in Report(())._repr_html_()


def test_one_of_a_kind_is_not_counted_in_the_plural() -> None:
    site = Site("", "glu", "glu", "rewritten")
    report = Report((site,), regions=1, graphs=1, codegen="eager")
    assert report.headline() == "1 rewrite in 1 region (1 graph), codegen eager"
    assert Report((), codegen="eager").headline().startswith("0 rewrites in 0 regions (0 graphs)")


def test_the_first_step_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    model = optimize(build(FAMILIES[0], lora=False), codegen="eager", passes=())
    with caplog.at_level(logging.INFO, "fusewright"):
        explain(model)
        explain(model)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "takes longer than later ones (codegen eager: as requested)" in record.getMessage()


def test_fuel_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWRIGHT_FUEL", "some")
    with pytest.raises(ValueError, match="FUSEWRIGHT_FUEL='some'"):
        optimize(build(FAMILIES[0], lora=False))
