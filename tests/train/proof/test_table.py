"""What is printed and written, for made-up ways."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from fusewright.auditing.drift import Drift
from fusewright.train.data import Sample
from fusewright.train.proof.command import (
    Comparison,
    Row,
    Run,
    Runner,
    _compared,
    _judge_again,
    _merged,
    _run,
)
from fusewright.train.proof.compare import (
    ALL,
    CHANGES,
    GRADIENTS,
    Allowed,
    Deviations,
    exceeded,
)
from fusewright.train.proof.ways import BatchLayout, Way, select
from fusewright.train.proof.worker import NO_ROOM

from ..conftest import small_recipe

SAMPLES = [[Sample([1] * n, [-100] + [1] * (n - 1))] for n in (10, 20, 30, 40)]
CHOSEN = select(SAMPLES, 2, 2)
LAYOUT = BatchLayout.of(CHOSEN.steps, True, 2)
DRIFT = Drift("", "size", bias=-1e-4, eager=0.0, error=1e-4, allowed=5e-4, least=1e-3)
NEAR = Deviations((1e-3, 2e-3), {ALL: 3e-3, "q_proj": 3e-3}, 4e-3, drift=(DRIFT,))


def _figures(**changes: Any) -> dict[str, Any]:
    return {
        "losses": [2.0, 1.5], "norms": [1.0, 1.0], "seconds": [9.0, 0.5],
        "memory": [{"rss_mb": 512.0}], "dtype": "bfloat16", "masks": [], "stride": 1,
        "rewritten": {"rms_norm": 5}, "weighs_tokens": True, **changes,
    }  # fmt: skip


def _row(name: str, verdict: str, *exceeded: str, **changes: Any) -> Row:
    way = Way(name, optimize=True, layout=LAYOUT)
    found = None if verdict == "reference" else NEAR
    return Row(Run(way, "trained", figures=_figures(**changes)), found, verdict, list(exceeded))


def _comparison(*rows: Row) -> Comparison:
    both = (_row("exact", "reference", dtype="float32"), _row("eager", "limit"))
    return Comparison("r.yaml", CHOSEN, [*both, *rows], Allowed.of(NEAR, "bfloat16", 50))


def _printed(comparison: Comparison) -> list[str]:
    console = Console(width=200, file=io.StringIO())
    console.print(comparison.table())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_row_for_each_way() -> None:
    skipped = Row(Run(Way("packed", True, skipped="why"), "skipped", "why"), None, "skipped")
    lines = _printed(_comparison(_row("optimized", "passed"), skipped))
    assert len(lines) == 6
    assert lines[0].split()[:2] == ["way", "batches"]
    assert lines[1].endswith("512 MiB  the reference, in float32")
    assert "2.0000 → 1.5000" in lines[2]
    assert lines[3].split() == ["allowed", "1.3e-02", "1.2e-02", "1.4e-02"]
    cells = ["2.0e-03", "3.0e-03", "-1.0e-04", "4.0e-03", "140", "512", "MiB", "passed"]
    assert lines[4].split()[-8:] == cells
    assert lines[5].split() == ["packed", *["-"] * 8, "skipped"]


def test_the_first_step_is_not_timed() -> None:
    made = _comparison()
    assert made.rate(made.rows[0].run) == 70 / 0.5
    once = _row("optimized", "passed", seconds=[9.0])
    assert math.isnan(made.rate(once.run))


def test_the_memory_of_each_process_and_of_gpus() -> None:
    two = _row("2 processes", "passed", memory=[{"rss_mb": 512.0}, {"rss_mb": 2048.0}])
    assert "512 MiB + 2.0 GiB" in _printed(_comparison(two))[-1]
    gpu = _row("2 processes", "passed", memory=[{"rss_mb": 512.0, "cuda_mb": 100.0}])
    assert " 100 MiB" in _printed(_comparison(gpu))[-1]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [_row("optimized", "failed", "the loss differs")],
            ["optimized: FAILED: the loss differs. ", "FUSEWRIGHT_DISABLE=RULE", "rms_norm",
             "fusewright explain"],
        ),
        (
            [_row("optimized", "passed"), _row("unpacked", "failed", "the loss differs")],
            ["unpacked: FAILED: the loss differs. ", "sample_packing: false"],
        ),
        (
            [_row("optimized", "passed"), _row("1 x 2", "failed", "the loss differs")],
            ["1 x 2: FAILED: ", "gradient_accumulation_steps: 1, and report it"],
        ),
        (
            [_row("optimized", "passed"), _row("1 x 2", "failed", "x", weighs_tokens=False)],
            ["takes no num_items_in_batch"],
        ),
        (
            [_row("optimized", "passed"), _row("2 processes", "failed", "the loss differs")],
            ["2 processes: FAILED: ", "--nproc 1"],
        ),
        (
            [_row("optimized", "failed", "x"), _row("unpacked", "failed", "y")],
            ["unpacked: FAILED: y. The optimized model differs with the recipe's own batches"],
        ),
        (
            [Row(Run(Way("unpacked", True, LAYOUT), "failed", "killed"), None, "failed",
                 ["killed"])],
            ["unpacked: FAILED: killed. It did not run to its end"],
        ),
    ],
)  # fmt: skip
def test_what_to_do_about_a_failure(rows: list[Row], words: list[str]) -> None:
    said = list(_comparison(*rows).sentences())
    failures = [line for line in said if "FAILED" in line]
    assert len(failures) == sum(row.verdict == "failed" for row in rows)
    assert all(any(word in line for line in failures) for word in words)


def test_a_merged_model_has_a_row_and_a_cost() -> None:
    figures = {
        "dtype": "bfloat16", "tokens": 256, "loss_trained": 2.9, "loss_adapter": 2.5,
        "loss_merged": 2.51, "off": 0.02, "allowed": 0.03, "merge_seconds": 1.0,
    }  # fmt: skip
    passed, failed = _merged(figures), _merged({**figures, "off": 0.04})
    skipped = _merged({"skipped": "why"})
    lines = _printed(_comparison(passed, failed, skipped))
    assert lines[-3].split()[:5] == ["merged", "-", "2.5000", "→", "2.5100"]
    assert [line.split()[-1] for line in lines[-3:]] == ["passed", "FAILED", "skipped"]
    said = list(_comparison(passed).sentences())
    assert any("from 2.5000 to 2.5100" in line and "--dequantize" in line for line in said)
    said = list(_comparison(failed).sentences())
    assert any("merged: FAILED: the logits" in line and "4.0e-02" in line for line in said)
    assert "merged: skipped: why" in list(_comparison(skipped).sentences())
    found = json.loads(json.dumps(_comparison(failed).to_dict(), allow_nan=False))
    assert (found["passed"], found["ways"][-1]["loss_merged"]) == (False, 2.51)


def test_a_bias_fails() -> None:
    drift = Drift("q_proj", "size", bias=-2e-3, eager=0.0, error=1e-4, allowed=5e-4, least=1e-3)
    limits = Allowed.of(NEAR, "bfloat16", 50)
    (said,) = exceeded(dataclasses.replace(NEAR, drift=(DRIFT, drift)), limits)
    assert said.startswith("the gradients of q_proj are too small by 2.0e-03 of their size")


def test_what_was_random_is_named() -> None:
    said = " ".join(
        _comparison(_row("optimized", "passed", masks=["attention_dropout"])).sentences()
    )
    assert "0 in all ways (this recipe or model has attention_dropout)" in said


def test_json_has_all_figures_and_no_nan() -> None:
    odd = _row("optimized", "failed", "x", losses=[2.0, math.nan])
    text = json.dumps(_comparison(odd).to_dict(), allow_nan=False)
    found = json.loads(text)
    assert not found["passed"]
    assert (found["steps"], found["tokens"], found["trained_tokens"]) == (2, 100, 96)
    assert found["factor"] == 1.5
    assert found["limits"]["gradients"]["q_proj"] == pytest.approx(1.5 * 3e-3 + 2**-7)
    way = found["ways"][2]
    assert way["losses"] == [2.0, "nan"]
    assert way["deviations"]["change"] == 4e-3
    assert (way["rows"], way["passes"], way["processes"], way["packing"]) == (2, 1, 1, True)


class _Scripted:
    """In the place of ``run_way``: each way by its name trains, or does what is said."""

    def __init__(self, **said: tuple[str, str]) -> None:
        self.said, self.names = said, list[str]()

    def __call__(self, recipe: Any, way: Way, *_: Any) -> Run:
        self.names.append(way.name)
        status, reason = self.said.get(way.name.replace(" ", "_"), ("trained", ""))
        return Run(way, status, reason, figures=_figures())


def test_without_room_for_a_higher_precision_eager_runs_twice(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusewright.errors import RecipeError
    from fusewright.train.proof.ways import ways_of
    from fusewright.train.recipe.load import load_recipe

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    recipe = load_recipe(small_recipe(tmp_path, tmp_path / "rows.jsonl", tmp_path / "out"))
    ways = ways_of(recipe, CHOSEN, 1, None)
    said: list[str] = []
    runner = Runner(recipe, 2, tmp_path, said.append)

    scripted = _Scripted(exact=("failed", NO_ROOM))
    monkeypatch.setattr("fusewright.train.proof.command.run_way", scripted)
    runs = _run(ways, CHOSEN, runner)
    assert runs[0].way.name == "eager again"
    assert scripted.names[:3] == ["exact", "eager", "eager again"]
    assert f"no higher precision: {NO_ROOM}; a second eager run takes its place" in said

    scripted.said["eager_again"] = ("failed", "no memory")
    with pytest.raises(RecipeError, match="no reference to compare with: no memory"):
        _run(ways, CHOSEN, runner)


class _Rounding:
    """In the place of ``run_way``: gradients whose errors vary from step to step.

    ``factors``: how large they are on average by the way's name; in the first step of ``optimized``
    they are three times as large.
    """

    def __init__(self, **factors: float) -> None:
        self.factors, self.ran = {"exact": 0.0, "eager": 1.0, **factors}, list[tuple[str, int]]()

    def __call__(self, recipe: Any, way: Way, steps: int, folder: Path, *_: Any) -> Run:
        own = folder / way.name
        own.mkdir()
        self.ran.append((way.name, steps))
        generator = torch.Generator().manual_seed(len(way.name))
        names = [f"layers.{layer}.{kind}.weight" for layer in (0, 1) for kind in ("q", "k")]
        for step in range(steps if way.fixed_weights else 1):
            luck = 3.0 if step == 0 and way.optimize else 1.0
            off = self.factors[way.name] * luck * 1e-6
            gradients = {
                name: torch.ones(8, 8) + off * torch.randn(8, 8, generator=generator)
                for name in names
            }
            save_file(gradients, own / GRADIENTS.format(step))
        save_file({"q": torch.ones(9)}, own / CHANGES)
        figures = _figures(losses=[2.0] * steps, dtype="float32")
        return Run(way, "trained", folder=own, figures=figures)


@pytest.mark.parametrize(
    ("size", "verdict", "again"),
    [(1.0, "passed", True), (2.0, "failed", True), (99, "failed", False)],
)
def test_what_fails_by_one_step_is_judged_by_several(
    tmp_path: Path, size: float, verdict: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounding = _Rounding(optimized=size, other=0.3)
    monkeypatch.setattr("fusewright.train.proof.command.run_way", rounding)
    said: list[str] = []
    runner = Runner(SimpleNamespace(consent=None), 2, tmp_path, said.append)  # type: ignore[arg-type]
    ways = [
        Way(name, optimize=name in ("optimized", "other"), layout=LAYOUT, exact=name == "exact")
        for name in ("exact", "eager", "optimized", "other")
    ]
    rows, limits = _compared(_run(ways, CHOSEN, runner), CHOSEN)
    assert [row.verdict for row in rows] == ["reference", "limit", "failed", "passed"]
    first = rows[2].exceeded
    assert first
    _judge_again(rows, limits, CHOSEN, runner)
    repeated = [(name, 16) for name in ("exact", "eager", "optimized")]
    assert rounding.ran[4:] == (repeated if again else [])
    assert (rows[2].verdict, rows[3].verdict) == (verdict, "passed")
    assert any("16 steps with the initial weights decide" in line for line in said) == again
    lines = list(Comparison("r.yaml", CHOSEN, rows, limits).sentences())
    judged = [line for line in lines if "judged by 16 steps with the initial weights" in line]
    assert [first[0] in line for line in judged] == [True] * again
    assert any("FAILED" in line for line in lines) == (verdict == "failed")
    found = Comparison("r.yaml", CHOSEN, rows, limits).to_dict()["ways"]
    assert found[2]["deviations"]["draws"] == (16 if again else 1)
    assert found[2]["by_first_step"] == (first if again else [])
    assert (found[2]["limits"] is None, found[3]["limits"]) == (not again, None)


def test_draws_that_cannot_be_run_change_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounding = _Rounding(optimized=1.0)
    monkeypatch.setattr("fusewright.train.proof.command.run_way", rounding)
    runner = Runner(SimpleNamespace(consent=None), 2, tmp_path, lambda text: None)  # type: ignore[arg-type]
    ways = [Way(name, name == "optimized", LAYOUT) for name in ("exact", "eager", "optimized")]
    rows, limits = _compared(_run(ways, CHOSEN, runner), CHOSEN)
    scripted = _Scripted(eager=("failed", "no memory"))
    monkeypatch.setattr("fusewright.train.proof.command.run_way", scripted)
    _judge_again(rows, limits, CHOSEN, runner)
    assert scripted.names == ["exact", "eager"]
    assert (rows[2].verdict, rows[2].first) == ("failed", [])
