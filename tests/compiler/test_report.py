"""What the report says in numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fusewright import explain, optimize
from fusewright.report import Bypass, Figures, Report, Site

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


def test_the_time_saved_is_the_traffic_avoided() -> None:
    site = Site("a", "glu", "glu", "rewritten", moved_before=5000.0, moved_after=2000.0)
    gap = Site("b", "glu", "glu", "refused", moved_before=7.0)
    report = Report((site, gap), bandwidth=1e9)
    assert report.seconds_saved() == pytest.approx(3 * 3000 / 1e9)
    assert "estimated time saved: 9 us per token" in str(report)
    assert Report((site,)).seconds_saved() is None


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


@pytest.mark.long
def test_explain_measures_the_bandwidth() -> None:
    report = explain(optimize(build(FAMILIES[0], lora=True)))
    assert report.bandwidth is not None
    assert report.bandwidth > 1e8
    assert "at 0 GB/s" not in str(replace(report, bandwidth=4e8))
    assert "at 0.4 GB/s" in str(replace(report, bandwidth=4e8))
    assert (report.seconds_saved() or 0) > 0
    assert "estimated time saved" in str(report)
    assert "bandwidth" in report.to_dict()


def test_fuel_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWRIGHT_FUEL", "some")
    with pytest.raises(ValueError, match="FUSEWRIGHT_FUEL='some'"):
        optimize(build(FAMILIES[0], lora=False))
