"""The suite of benchmarks as one: what it names is there, and pages say what results say."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .test_benchmarks import BENCHMARKS


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs import each other by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.parametrize("program", sorted(p.name for p in BENCHMARKS.glob("*.py")))
def test_what_a_program_takes_from_the_package_and_from_others_is_there(program: str) -> None:
    tree = ast.parse((BENCHMARKS / program).read_text("utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        beside = (BENCHMARKS / f"{node.module}.py").exists()
        if not beside and not node.module.startswith("fusewright"):
            continue
        module = importlib.import_module(node.module)
        for name in (alias.name for alias in node.names):
            if not hasattr(module, name):
                importlib.import_module(f"{node.module}.{name}")


def test_the_suite_asks_for_options_that_programs_have() -> None:
    from suite import SUITE

    assert len({one.name for one in SUITE}) == len(SUITE)
    for one in SUITE:
        source = (BENCHMARKS / one.program).read_text("utf-8")
        if "add_workload_options" in source:
            source += (BENCHMARKS / "train_step.py").read_text("utf-8")
        for quick in (False, True):
            program, *given = one.command(quick)
            assert program == one.program
            for option in [*given, "--json"]:
                assert not option.startswith("--") or f'"{option}"' in source, (one.name, option)


def test_measurements_are_found_by_the_beginning_of_their_names() -> None:
    from suite import SUITE, named

    assert named([]) == list(SUITE)
    assert [one.name for one in named(["training-p", "curves"])] == [
        "training-peers-smollm2-bf16-cpu", "curves-cpu",
    ]  # fmt: skip
    alone, beside = (one.command(False, ("unsloth",)) for one in named(["training-"]))
    assert "unsloth" not in alone[-1]
    assert beside[-1] == "stock,fusewright,fusewright:min,unsloth"
    with pytest.raises(ValueError, match="no measurement is named 'trainings'; there are train_"):
        named(["trainings"])


def test_pages_and_tables_are_what_results_give() -> None:
    import report

    for path, text in report.made().items():
        written = path.read_text("utf-8")
        assert written == text, f"{path.name}: run `python -m benchmarks report`"


def test_a_figure_that_is_changed_by_hand_is_found() -> None:
    import report

    page = report.PAGES[1].read_text("utf-8")
    speed = re.search(r"\| fusewright \| (\d+) \|", page)
    assert speed is not None
    changed = page.replace(speed[0], speed[0].replace(speed[1], "9999"))
    assert report.filled(changed) == page != changed
    with pytest.raises(KeyError, match="no-such-table"):
        report.filled("<!-- table: no-such-table -->\n<!-- end -->")


def test_headlines_compare_like_with_like(monkeypatch: pytest.MonkeyPatch) -> None:
    import report

    step = [{"engine": e, "tokens_per_s": t, "growth_mb": g}
            for e, t, g in (("hf", 100, 1000), ("fusewright", 200, 250))]  # fmt: skip
    figures = {"stock": (50, 4000), "stock-packed": (100, 2000), "trl": (80, 1500),
               "fusewright": (150, 900), "fusewright:min": (125, 700)}  # fmt: skip
    run = [{"engine": e, "trained_tokens_per_s": t, "peak_rss_mb": m}
           for e, (t, m) in figures.items()]  # fmt: skip
    monkeypatch.setattr(report, "results", lambda name: run if "training" in name else step)
    said = report.headline()
    assert "**2.00x** the speed of HF + PEFT with 25% of its memory growth" in said
    assert "**3.00x** that of the HF Trainer, which pads" in said
    assert "**1.50x** that of the HF Trainer without padding" in said
    assert "**1.88x** that of TRL, packed, with its default checkpointing" in said
    assert "takes 18% of the peak memory of the HF Trainer, which pads, and 35% of that" in said
    assert "at 2.50x and 1.25x the speed" in said


def test_csv_files_have_what_a_figure_depends_on() -> None:
    import report

    head, first, *_ = report.as_csv("train_step-smollm2-bf16-cpu").splitlines()
    assert {"engine", "tokens_per_s", "cpu", "commit", "date", "versions"} <= set(head.split(","))
    assert "torch=2." in first


def test_curves_that_bend_the_wrong_way() -> None:
    from curves import bends, varied
    from shapes import model_shape
    from workload import Job

    points: list[dict[str, Any]] = [
        {"axis": "tokens", "value": value, "ratio": ratio}
        for value, ratio in ((64, 1.0), (256, 1.5), (1024, 1.4), (2048, 1.2), (4096, None))
    ]
    assert bends(points) == ["tokens: 1.40x at 1,024, 1.20x at 2,048"]
    job = Job("eager", "tiny-llama", "float32", 2, 16, "lora", "auto", False, "cpu", 1)
    assert varied(job, "tokens", 32).seq == 32
    assert varied(job, "rank", 8).rank == varied(job, "packing", 8).sample == 8
    shape = model_shape(varied(varied(job, "layers", 3), "vocabulary", 99).model)
    assert (shape.layers, shape.vocab, shape.hidden) == (3, 99, 64)
    for wrong in ("tiny-llama,width=3", "tiny-llama,layers=two"):
        with pytest.raises(ValueError, match=r"sizes are .*layers"):
            model_shape(wrong)
    with pytest.raises(ValueError, match="unknown model 'tiny'"):
        model_shape("tiny")


def test_a_long_run_that_does_not_stay() -> None:
    from soak import summary

    resident, seconds = [900.0] * 10 + [1000.0] * 190, [2.0] * 2 + [1.0] * 198
    steady = summary(seconds, resident, [5, 6, 7] + [7] * 197, 10)
    assert (steady["drift"], steady["late_graphs"], steady["slope"]) == (0.0, 0, 1.0)
    assert steady["last_new_graph"] == 3
    leak = [1000 + 0.1 * step for step in range(200)]
    leaking = summary(seconds, leak, [5] * 150 + [6] * 50, 10)
    assert leaking["drift"] == pytest.approx(0.0141, abs=5e-4)
    assert (leaking["late_graphs"], leaking["last_new_graph"]) == (1, 151)


def test_a_command_is_one_that_others_can_type(tmp_path: Path) -> None:
    from environment import repeatable

    words = [str(BENCHMARKS / "soak.py"), "--method", "lora", "--json", str(tmp_path / "it.json")]
    assert repeatable(words) == "python benchmarks/soak.py --method lora --json FILE"


def test_an_environment_is_there_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import peers

    monkeypatch.setenv("FUSEWRIGHT_PEERS", str(tmp_path))
    made = tmp_path / "unsloth"
    made.mkdir()
    assert peers.python("unsloth") is peers.installed("unsloth") is None  # pip has not ended
    (made / "installed.txt").write_text("numpy==2.0\ntorch==2.13.0\nunsloth==1.0\n")
    assert peers.python("unsloth") == str(made / "bin" / "python")
    assert peers.installed("unsloth") == ["torch==2.13.0", "unsloth==1.0"]
    assert peers.main(["unsloht"]) == 2
    assert "unknown peer 'unsloht'; known: unsloth, " in capsys.readouterr().err


def test_the_entry_lists_what_there_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks"], cwd=BENCHMARKS.parent, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "training-smollm2-bf16-cpu" in done.stdout
    assert re.search(r"peers: unsloth \((not )?installed\)", done.stdout)


@pytest.mark.slow
def test_the_whole_suite_runs_in_small(tmp_path: Path) -> None:
    from suite import SUITE

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", "--quick", "--out", str(tmp_path)],
        cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert {path.stem for path in tmp_path.glob("*.json")} == {one.name for one in SUITE}
