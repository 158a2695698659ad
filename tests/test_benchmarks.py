"""The benchmark programs run and write the fields that are promised; no figure is judged here."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusewright.rewrite.op_table import OPS

from .load import stretched

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ("--model", "tiny-llama", "--batch", "2", "--seq", "16", "--dtype", "float32")


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=stretched(600),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("times", "verdict"), [(1.2, "gains"), (0.9, "loses"), (1.015, "noise"), (0.985, "noise")]
)
def test_a_rule_that_costs_more_than_noise_loses(
    times: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import rules

    rounds = [1.0, 2.0, 3.0]  # of a machine that grows slower
    taken = {rules.ALL: rounds, rules.AGAIN: [1.01 * t for t in rounds]}
    row = rules.rows({**taken, "glu": [times * t for t in rounds]})[-1]
    assert row["ratio"] == pytest.approx(times)
    assert row["noise"] == pytest.approx(0.02)
    assert row["verdict"] == verdict


@pytest.mark.slow
def test_rules_are_switched_off_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    options = ("--model", "tiny-llama", "--batch", "2", "--seq", "16", "--rounds", "1")
    one = ("--workloads", "lora-float32", "--codegen", "eager", "--json", file)
    done = run("rules.py", *options, *one)
    assert done.returncode in (0, 1), done.stderr
    rows = {row["off"]: row for row in json.loads(file.read_text())}
    assert rows["lora_linear"]["sites"] == 14
    assert rows["all rules"]["ratio"] == 1
    assert {"eager", "all rules, again", "mlp_block", "linear_cross_entropy"} <= set(rows)
    assert "| mlp_block | 2 |" in done.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The objects that one run of several engines writes, the first of which cannot run here."""
    file = tmp_path_factory.mktemp("train_step") / "steps.json"
    engines = "liger,eager,hf+gc,fusewright,fusewright:min"
    options = ("--engines", engines, "--steps", "2", "--warmup", "1", "--flat")
    done = run("train_step.py", *TINY, *options, "--json", file)
    assert file.exists(), done.stdout + done.stderr
    assert done.returncode == 1
    assert "losses agree" in done.stdout, done.stdout + done.stderr
    return {row["engine"]: row for row in json.loads(file.read_text())}


@pytest.mark.long("eager", "fusewright", "hf+gc")
@pytest.mark.parametrize("engine", ["eager", "hf+gc", "fusewright"])
def test_train_step_writes_the_promised_fields(
    rows: dict[str, dict[str, Any]], engine: str
) -> None:
    row = rows[engine]
    assert row["error"] is None
    for field in (
        "tokens_per_s",
        "first_step_s",
        "peak_rss_mb",
        "loss",
        "growth_mb",
        "activation_mb",
    ):
        assert isinstance(row[field], float), field
        assert row[field] >= 0, field
    assert row["peak_rss_mb"] >= row["loaded_rss_mb"] > 0
    assert (row["model"], row["batch"], row["seq"]) == ("tiny-llama", 2, 16)
    assert len(row["losses"]) == len(row["all_step_s"]) == 3
    assert row["steps"] == 2
    assert {"torch", "transformers", "peft", "triton", "fusewright"} <= set(row["versions"])
    assert {"commit", "cpu", "threads", "date", "command", "peak_rss_from"} <= set(row)


@pytest.mark.long
def test_an_engine_that_cannot_run_does_not_stop_the_others(
    rows: dict[str, dict[str, Any]],
) -> None:
    assert "liger-kernel" in rows["liger"]["error"]
    assert rows["liger"]["tokens_per_s"] is None


def test_engines_that_need_a_gpu_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import torch

    from engines import EngineUnavailableError, unsloth

    with pytest.raises(EngineUnavailableError, match=r"unsloth .* need a GPU"):
        unsloth(torch.nn.Linear(2, 2), None)  # type: ignore[arg-type]


@pytest.mark.long
def test_engines_of_ours_differ_by_memory(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["fusewright"]["memory"] == "speed"
    assert rows["fusewright:min"]["memory"] == "min"
    assert rows["eager"]["memory"] is None
    assert rows["fusewright"]["flat"]
    assert not rows["eager"]["flat"]


@pytest.mark.long
def test_what_is_kept_for_backward_is_counted_once(
    rows: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rows["hf+gc"]["activation_mb"] < rows["eager"]["activation_mb"] / 3
    monkeypatch.syspath_prepend(BENCHMARKS)
    import torch
    from torch.utils.checkpoint import checkpoint

    from activations import kept_for_backward

    layer = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8)

    def body(x: torch.Tensor) -> torch.Tensor:
        h = layer(x)  # keeps x
        return (h * h.t().t()).exp()  # keeps h, twice, and its own output

    for forward, kept in (
        (lambda: body(x).sum(), 3),
        (lambda: checkpoint(body, x, use_reentrant=False).sum(), 1),
        (lambda: checkpoint(body, x.requires_grad_(), use_reentrant=True).sum(), 1),
    ):
        loss, size = kept_for_backward(layer, forward)
        assert size == kept * x.nbytes
        layer.weight.grad = None
        loss.backward()
        mine = layer.weight.grad.clone()
        layer.weight.grad = None
        body(x).sum().backward()
        assert torch.equal(mine, layer.weight.grad)


@pytest.mark.slow
def test_trl_trains_the_same_loss(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    file = tmp_path / "steps.json"
    done = run("train_step.py", *TINY, "--engines", "hf,trl", "--steps", "1", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    plain, packed = json.loads(file.read_text())
    assert packed["losses"] == pytest.approx(plain["losses"], rel=1e-3)


@pytest.mark.long
def test_optimizer_compares_four_ways() -> None:
    done = run("optimizer.py", "--model", "tiny-llama", "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" ms  (") == 4


def test_an_unknown_engine_is_named_with_the_known_ones() -> None:
    done = run("train_step.py", "--engines", "eager,unslot")
    assert done.returncode == 2
    assert "unknown engine 'unslot'; known: eager, hf, hf+gc, compile, " in done.stderr
    assert run("train_step.py", "--engines", "eager:min").returncode == 2


@pytest.mark.parametrize(
    ("ours", "status"),
    [([3.0, 2.0], 0), ([3.0, 2.0019], 0), ([3.0, 2.0021], 1), ([float("nan"), 2.0], 1)],
)
def test_loss_curve_fails_beyond_the_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: list[float], status: int
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import loss_curve
    from harness import Run

    def fixed(jobs: list[Any]) -> list[Run]:
        curves = {"eager": [3.0, 2.0], "fusewright": ours}
        return [Run(j, steps=[{"loss": loss} for loss in curves[j.engine]]) for j in jobs]

    monkeypatch.setattr(loss_curve, "run_interleaved", fixed)
    file = tmp_path / "curve.json"
    assert loss_curve.main([*TINY, "--tolerance", "1e-3", "--json", str(file)]) == status
    curve = json.loads(file.read_text())
    assert curve["passed"] is (status == 0)
    assert curve["eager"] == [3.0, 2.0]


@pytest.mark.long
def test_ops_writes_a_row_per_direction_and_provider(tmp_path: Path) -> None:
    file = tmp_path / "ops.csv"
    few = ("--quick", "--ops", "glu", "--providers", "reference,fusewright")
    done = run("ops.py", *few, "--seconds", "0.01", "--csv", file)
    assert done.returncode == 0, done.stdout + done.stderr
    with file.open() as lines:
        found = list(csv.DictReader(lines))
    assert [(row["direction"], row["provider"]) for row in found] == [
        ("forward", "reference"),
        ("forward", "fusewright"),
        ("forward+backward", "reference"),
        ("forward+backward", "fusewright"),
    ]
    for row in found:
        assert float(row["median_ms"]) > 0
        assert int(row["samples"]) >= 5
        assert float(row["difference"]) < 2**-7
        assert {"card", "torch_version", "commit", "threads"} <= set(row)
    saved = {row["provider"]: float(row["saved_mb"]) for row in found}
    assert saved["fusewright"] < saved["reference"]


def test_every_op_has_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from op_cases import CASES, op_of

    assert {op.name for op in OPS} == set(map(op_of, CASES))


@pytest.mark.slow
def test_the_longest_sequence_of_each_budget(tmp_path: Path) -> None:
    file = tmp_path / "longest.json"
    few = ("--model", "tiny-llama", "--dtype", "float32", "--step", "32", "--most", "64")
    done = run("longest.py", *few, "--budgets", "0.1GB,100GB", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(r["engine"], round(r["budget_gb"], 6)): r for r in json.loads(file.read_text())}
    engines = ("fusewright:speed", "fusewright:min", "fusewright:budget", "eager", "hf+gc")
    assert set(rows) == {(e, b) for e in engines for b in (0.1, 100)}
    for engine in engines:
        assert rows[engine, 0.1]["longest"] == 0
        assert rows[engine, 100]["longest"] == 64
        assert rows[engine, 100]["capped"]
    assert 100 < rows["eager", 100]["peak_mb"] < 5000
    least, fastest = (rows[f"fusewright:{e}", 100]["predicted_mb"] for e in ("min", "speed"))
    assert 100 < least < fastest < 5000
    assert "| eager | none | at least 64 (" in done.stdout
    assert "| fusewright:min | none | at least 64 (predicted) |" in done.stdout


@pytest.mark.parametrize(
    ("per_token", "longest", "first"), [(1.0, 2048, None), (1.2, 1536, 2048), (99.0, 0, 2048)]
)
def test_a_prediction_that_was_too_long_is_shortened_and_told(
    monkeypatch: pytest.MonkeyPatch, per_token: float, longest: int, first: int | None
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import longest as program
    from workload import Job

    steps: list[tuple[str, int]] = []

    def peaks(job: Any, lengths: list[int], enough: int) -> tuple[float, list[float]]:
        steps.append((job.engine, job.seq))
        return 0.0, [per_token * length for length in lengths]

    monkeypatch.setattr(program, "_peaks", peaks)
    job = Job("fusewright", "smollm2", "bfloat16", 1, 64, "lora", "auto", False, "cpu", 1)
    found = program.Longest("fusewright:budget", 2048 << 20, tokens=2048, predicted=1.0)
    found = program.verified(job, found, 256)
    assert (found.tokens, found.first) == (longest, first)
    assert steps[0] == ("fusewright:2GB", 2048)
    assert len(steps) <= program.TRIES
    assert (found.peak is not None) == (longest > 0)


def test_an_engine_that_fails_says_nothing_about_what_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import longest as program
    from harness import EngineError, EngineProcess, Run
    from workload import Job

    said = ["the process ended with status -9", "OptimizeError: memory='1GB' is too small"]

    def fail(self: Any) -> None:
        raise EngineError(said.pop(0))

    monkeypatch.setattr(EngineProcess, "__init__", lambda self, job: setattr(self, "run", Run(job)))
    monkeypatch.setattr(EngineProcess, "__exit__", lambda self, *_: None)
    monkeypatch.setattr(EngineProcess, "load", fail)
    job = Job("fusewright", "smollm2", "bfloat16", 1, 64, "lora", "auto", False, "cpu", 1)
    with pytest.raises(EngineError, match="status -9"):
        program._peaks(job, [64], 1)
    assert program._peaks(job, [64], 1) == (0.0, [])
    assert "too small" in capsys.readouterr().err


def test_the_picture_of_a_terminal_has_every_word() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from terminal import picture; "
        "print(picture('a <b> loss 1.234\\n' + 'word ' * 30, 'fusewright train x.yaml', 60))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text = done.stdout.replace("&#160;", " ")
    assert text.startswith("<svg")
    assert "$ fusewright train x.yaml" in text
    assert "a &lt;b&gt; loss 1.234" in text
    assert text.count("word") == 30


@pytest.mark.slow
def test_a_tiny_model_learns_to_name_drawn_images(tmp_path: Path) -> None:
    file = tmp_path / "images.json"
    done = run("images.py", "--families", "llava", "--rows", "600", "--steps", "200",
               "--json", file)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(file.read_text())
    assert found["unseen"] > 3 * found["chance"]
    assert {"swapped", "no_image", "first_loss", "last_loss", "versions", "cpu"} <= set(found)


@pytest.mark.slow
def test_steps_on_images_are_compared(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    sizes = ("--batch", "1", "--side", "56", "--words", "8", "--steps", "2", "--warmup", "1")
    done = run("image_step.py", *sizes, "--codegen", "eager", "--json", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["largest_loss_difference"] < 1e-4
    assert found["rewrites"]["lora_linear"] > 0
    assert {"ratio_of_medians", "ratio_of_growths", "tokens_of_a_row"} <= set(found)
