"""``benchmarks/gpu.sh``: its stages and their budget by a stubbed clock; all of it on the CPU."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .load import stretched

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


class Machine:
    """A clock, and commands that take and return what was said of them."""

    def __init__(self, **stages: tuple[float, int]) -> None:
        self.stages, self.now, self.limits = stages, 1000.0, dict[str, float]()
        self.commands: list[Sequence[str]] = []

    def clock(self) -> float:
        return self.now

    def execute(self, command: Sequence[str], limit: float, name: str) -> int:
        from staging import TIMED_OUT

        seconds, status = self.stages[name]
        self.limits[name] = limit
        self.commands.append(command)
        self.now += min(seconds, limit)
        return TIMED_OUT if seconds > limit else status

    def run(self, budget: float, *stages: Any) -> list[Any]:
        from staging import run_stages

        return run_stages(stages, budget, self.execute, self.clock, lambda text: None)


def _stage(name: str, limit: float, missing: str = "") -> Any:
    from staging import Stage

    return Stage(name, ("run", name, "{seconds}"), limit, missing)


def test_each_stage_has_its_limit_and_at_most_what_is_left() -> None:
    from staging import exit_status, summary

    machine = Machine(a=(150, 0), b=(60, 0))
    found = machine.run(300, _stage("a", 200), _stage("b", 200))
    assert machine.limits == {"a": 200, "b": 150}
    assert [tuple(c) for c in machine.commands] == [("run", "a", "200"), ("run", "b", "150")]
    assert [o.seconds for o in found] == [150, 60]
    assert exit_status(found) == 0
    assert summary(found).splitlines() == [
        "  a: passed after 150 s", "  b: passed after 60 s", "=== passed",
    ]  # fmt: skip


def test_what_fails_or_hangs_stops_no_other_stage() -> None:
    from staging import exit_status, summary

    machine = Machine(a=(5, 3), b=(500, 0), c=(5, 0))
    found = machine.run(300, _stage("a", 100), _stage("b", 100), _stage("c", 100))
    assert [o.failed for o in found] == ["status 3", "over 100 s", ""]
    assert exit_status(found) == 1
    assert "  b: failed, over 100 s after 100 s" in summary(found)
    assert summary(found).endswith("=== failed")


def test_a_stage_without_time_is_skipped_and_fails() -> None:
    from staging import exit_status

    machine = Machine(a=(90, 0), b=(1, 0))
    found = machine.run(105, _stage("a", 100), _stage("b", 100))
    assert set(machine.limits) == {"a"}
    assert found[1].skipped == found[1].failed == "only 15 s are left"
    assert exit_status(found) == 1


def test_what_cannot_run_here_is_skipped_with_its_reason() -> None:
    from staging import exit_status, summary

    found = Machine(b=(1, 0)).run(100, _stage("a", 90, "pytest is not installed"), _stage("b", 90))
    assert exit_status(found) == 0
    assert summary(found).splitlines()[0] == "  a: skipped, pytest is not installed"


def _execution(folder: Path) -> Any:
    from staging import Execution

    return Execution(lambda name: folder / f"{name}.txt", folder, dict(os.environ))


def test_commands_are_logged_and_return_their_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    assert _execution(tmp_path)([sys.executable, "-c", code], 60, "one") == 7
    assert sorted((tmp_path / "one.txt").read_text().split()) == ["err", "out"]
    assert sorted(capsys.readouterr().out.split()) == ["err", "out"]


@pytest.mark.long
def test_a_command_that_hangs_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    from staging import TIMED_OUT

    child = "import time; time.sleep(600)"
    code = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(p.pid, flush=True); time.sleep(600)"
    )
    start = time.monotonic()
    assert _execution(tmp_path)([sys.executable, "-c", code], 5, "hangs") == TIMED_OUT
    assert time.monotonic() - start < 60
    pid = int((tmp_path / "hangs.txt").read_text().split()[0])  # then its traceback
    state = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the command's child is still there")


ALL = pytest.mark.parametrize("smoke", [False, True], ids=["whole", "smoke"])


@ALL
@pytest.mark.parametrize("part", ["ops", "steps"])
def test_the_stages_fit_into_the_budget_and_know_their_programs(part: str, smoke: bool) -> None:
    import gpu
    import ops
    import step_matrix

    make = {"ops": gpu.ops_stages, "steps": gpu.steps_stages}[part]
    setting = gpu.Setting(
        Path("/x/gpu-card"), smoke=smoke, cache=Path("/x/cache"), has=lambda name: True
    )
    stages = make(setting)
    assert sum(s.limit for s in stages) <= gpu.BUDGET < 600
    parsers: dict[str, Callable[[Sequence[str]], Any]] = {
        "benchmarks/ops.py": lambda a: ops._parse(a, sorted(ops.CASES)),
        "benchmarks/step_matrix.py": step_matrix._parse,
    }
    known = set()
    for stage in stages:
        assert stage.missing == ""
        command = [c.replace("{seconds}", "9") for c in stage.command]
        for program in parsers.keys() & set(command):
            parsers[program](command[command.index(program) + 1 :])
            known.add(stage.name)
    assert known == {stage.name for stage in stages} - {"tests"}


def test_what_is_not_installed_is_a_reason() -> None:
    import gpu

    def stages(make: Any, *absent: str) -> list[Any]:
        made: list[Any] = make(gpu.Setting(Path("/x"), has=lambda name: name not in absent))
        return made

    def missing(make: Any, *absent: str) -> dict[str, str]:
        return {s.name: s.missing for s in stages(make, *absent) if s.missing}

    assert missing(gpu.ops_stages, "pytest", "xdist") == {"tests": "pytest is not installed"}
    watched = dict.fromkeys(("memcheck", "racecheck"), "compute-sanitizer is not there")
    assert missing(gpu.ops_stages, "compute-sanitizer") == watched
    assert missing(gpu.steps_stages, "bitsandbytes") == {"qlora": "bitsandbytes is not installed"}
    everything = dict.fromkeys(("lora", "small", "qlora", "long"), "PEFT is not installed")
    assert missing(gpu.steps_stages, "peft", "bitsandbytes") == everything
    tests = stages(gpu.ops_stages)[0].command
    assert tests[tests.index("-n") + 1] == "12"
    small = gpu.ops_stages(gpu.Setting(Path("/x"), memory=15.0, has=lambda name: True))[0].command
    assert small[small.index("-n") + 1] == "3"
    assert "-x" not in tests
    alone = stages(gpu.ops_stages, "xdist")[0].command
    assert alone[alone.index("-k") + 1] == "not 2x256x2048"


def test_the_models_are_of_the_card() -> None:
    import gpu

    def options(name: str, **card: Any) -> set[str]:
        stages = gpu.steps_stages(gpu.Setting(Path("/x"), has=lambda package: True, **card))
        return set(next(s for s in stages if s.name == name).command)

    assert {"llama-8b", "bfloat16"} <= options("lora", memory=80.0)
    assert {"llama-8b-4layers", "float16"} <= options("lora", memory=15.0, bf16=False)
    assert "1x16384-autocast" in options("long")


def test_the_files_with_gpu_tests_are_found() -> None:
    import gpu

    found = gpu.gpu_test_files()
    assert {"tests/kernels/test_gpu.py", "tests/kernels/test_gpu_steady.py"} <= set(found)
    assert all((ROOT / name).exists() for name in found)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("echo 580.82.07, 1980, 1980, 2619, 700.00, 34, 80000, 81559", {
            "driver_version": "580.82.07", "clocks.sm": "1980", "memory.free": "80000",
            "memory.total": "81559",
        }),
        ("exit 9", {"nvidia_smi": "CalledProcessError"}),
    ],
)  # fmt: skip
def test_the_state_of_the_card_is_written_down(
    line: str, found: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import environment

    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{line}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    said = environment._of_card()
    assert {name: said[name].partition(":")[0] for name in found} == found


def test_gaps_are_when_nothing_runs() -> None:
    from idle_gaps import Span, idle_gaps

    spans = [
        Span(100, 110, "a"), Span(105, 130, "b"), Span(106, 107, "c"),  # overlapping
        Span(132, 140, "d"),  # too short a gap to count as one
        Span(240, 250, "e"), Span(260, 270, "f"),
    ]  # fmt: skip
    found = idle_gaps(spans[::-1], most=1)
    assert (found["busy_ms"], found["idle_ms"]) == (0.058, 0.112)
    assert (found["gaps"], found["kernels"]) == (2, 6)
    assert found["longest"] == [{"us": 100, "after": "d", "before": "e"}]
    assert idle_gaps([])["gaps"] == 0


def test_kernels_are_summed_by_name() -> None:
    from idle_gaps import Span, by_name

    spans = [Span(0, 5, "a"), Span(5, 6, "b"), Span(7, 10, "a")]
    assert by_name(spans) == [
        {"name": "a", "count": 2, "us": 8}, {"name": "b", "count": 1, "us": 1},
    ]  # fmt: skip
    assert len(by_name(spans, most=1)) == 1


def _matrix(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], replies: dict[str, dict[str, Any]]
) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
    """``step_matrix.main`` with engines that answer at once, on a clock that they move."""
    import harness
    import step_matrix

    now, loads = [0.0], list[str]()
    peaks = {"rss_mb": 150.0, "gpu_mb": 90.0}

    class Process:
        def __init__(self, job: Any, worker: Path, cache: Path | None) -> None:
            self.job, self.run = job, SimpleNamespace(setting={})
            loads.append(job.engine)

        def __enter__(self) -> Process:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def load(self) -> None:
            now[0] += seconds[self.job.engine]
            if "load" in replies.get(self.job.engine, {}):
                raise harness.EngineError(replies[self.job.engine]["load"])

        def ask(self, text: str) -> dict[str, Any]:
            now[0] += seconds[self.job.engine]
            reply = replies.get(self.job.engine, {})
            if "died" in reply:
                raise harness.EngineError(reply["died"])
            return {
                "losses": [3.0, 2.0], "first_step_s": 1.0, "all_step_s": [0.5, 0.25, 0.5],
                "loaded": {"rss_mb": 100.0, "gpu_mb": 50.0}, "first_peak": peaks,
                "steady_peak": peaks, "fallbacks": {}, "free_step_s": 0.125,
                "planned": {"predicted_mb": 70.0, "measured_mb": 90.0},
            } | reply  # fmt: skip

    monkeypatch.setattr(step_matrix, "EngineProcess", Process)

    def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
        loads.clear()
        file = tmp_path / "rows.json"
        given = ["--device", "cpu", "--json", str(file), *arguments]
        status = step_matrix.main(given, lambda: now[0])
        return status, json.loads(file.read_text())

    run.loads = loads  # type: ignore[attr-defined]
    return run


def _of(rows: list[dict[str, Any]], engine: str, *names: str) -> list[Any]:
    return [tuple(r.get(n) for n in names) for r in rows if r["engine"] == engine]


def test_the_matrix_writes_figures_for_each_engine_and_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = _matrix(monkeypatch, {"hf": 0.1, "fusewright": 0.1}, {})
    status, rows = run(tmp_path, "--engines", "hf,fusewright,unsloth")
    assert status == 0
    assert len(rows) == 9
    first = rows[0]
    assert first["free_step_s"] == 0.125
    assert first["planned"] == {"predicted_mb": 70.0, "measured_mb": 90.0}
    assert (first["workload"], first["tokens_per_s"]) == ("1x2048-autocast", 4096)
    assert (first["loaded_mb"], first["growth_mb"], first["step_s"]) == (100, 50, 0.5)
    assert {"commit", "card", "versions", "first_step_growth_mb"} <= set(first)
    reasons = {reason for (reason,) in _of(rows, "unsloth", "skipped")}
    assert reasons == {"unsloth is not installed"}


def test_the_matrix_skips_what_it_has_no_time_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every engine has its share of the time, ours twice; the rest of one is the next one's."""
    run = _matrix(monkeypatch, {"hf": 10, "fusewright": 10}, {})
    names = ",".join(f"1x{n}" for n in range(1, 9))
    given = ("--engines", "hf,fusewright", "--seconds", "105", "--workloads", names)
    status, rows = run(tmp_path, *given)
    assert status == 0
    done = {e: sum("step_s" in r for r in rows if r["engine"] == e) for e in ("hf", "fusewright")}
    assert done == {"hf": 2, "fusewright": 5}
    assert ("no time left",) in _of(rows, "hf", "skipped")


@pytest.mark.parametrize(
    "reply", [{"died": "status -6"}, {"failed": "CUDA error: illegal access", "ended": True}]
)
def test_an_engine_that_ends_is_loaded_again_for_the_next_workload(
    reply: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = _matrix(monkeypatch, {"hf": 0.1, "fusewright": 0.1}, {"hf": reply})
    _, rows = run(tmp_path, "--engines", "hf,fusewright")
    assert run.loads == ["hf"] * 3 + ["fusewright"]  # type: ignore[attr-defined]
    assert len(_of(rows, "hf", "error")) == 3
    assert all("step_s" in row for row in rows if row["engine"] == "fusewright")


@pytest.mark.long
def test_a_worker_whose_context_is_broken_says_so_and_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import step_matrix

    worker = tmp_path / "worker.py"
    worker.write_text(
        f"""import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
import matrix_worker
def fails(*_): raise RuntimeError("CUDA error: an illegal memory access was encountered")
matrix_worker._measured, matrix_worker.broken_context = fails, lambda: "CUDA error"
sys.exit(matrix_worker.main(matrix_worker._serve))
"""
    )
    monkeypatch.setattr(step_matrix, "WORKER", worker)
    file = tmp_path / "rows.json"
    given = ["--device", "cpu", "--smoke", "--engines", "hf", "--json", str(file)]
    assert step_matrix.main(given) == 1
    rows = json.loads(file.read_text())
    assert ["illegal memory access" in row["error"] for row in rows] == [True, True]


def test_packs_are_told_to_rivals_by_where_their_samples_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a stand-in for ``varlen_attn``, which is for GPUs alone."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import varlen

    import competitors
    import op_cases
    import shapes
    from fusewright.kernels.attention import attention

    def stand_in(q: Any, k: Any, v: Any, cu: Any, *_: Any, **options: Any) -> torch.Tensor:
        assert options["window_size"] == (-1, 0)
        parts = []
        for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
            rows = [t[start:end].transpose(0, 1) for t in (q, k, v)]
            out = F.scaled_dot_product_attention(
                *rows, is_causal=True, scale=options["scale"], enable_gqa=True
            )
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    shape = shapes.op_shapes("cpu", quick=True, smallest=True)["tiny-2x16"]
    for name in ("attention", "attention-packed"):
        case = op_cases.Maker(shape, torch.float32, "cpu", False).make(name)
        rival = competitors.RIVALS[name]["varlen"](*case.args)
        expected = attention.attention_reference(*case.args)
        torch.testing.assert_close(rival(*case.args), expected)


def test_workloads_are_known_by_their_names() -> None:
    from argparse import ArgumentTypeError

    from step_matrix import workload

    def sizes(name: str) -> tuple[int, int, int, str | None]:
        w = workload(name)
        return w.batch, w.seq, w.sample, w.autocast

    assert sizes("2x2048") == (2, 2048, 0, None)
    assert sizes("pack-8192-autocast") == (1, 8192, 512, "bfloat16")
    assert sizes("pack-48") == (1, 48, 16, None)
    for name in ("2048", "packs-48", "1x2-auto"):
        with pytest.raises(ArgumentTypeError, match="is no workload"):
            workload(name)


@pytest.mark.parametrize(
    ("engine", "reply", "status", "text"),
    [
        ("hf", {"failed": "OutOfMemoryError: CUDA out of memory"}, 0, "out of memory"),
        ("fusewright", {"failed": "ValueError: wrong"}, 1, "ValueError: wrong"),
        ("fusewright", {"losses": [3.2]}, 1, "LOSSES DISAGREE"),
        ("fusewright", {"losses": [float("nan")]}, 1, "LOSSES DISAGREE"),
        ("fusewright", {"fallbacks": {"glu_forward": "PTXASError"}}, 1, "without its kernel"),
        ("fusewright", {"load": "the process ended with status -9"}, 1, "status -9"),
        ("hf", {"load": "EngineUnavailableError: no GPU"}, 0, "no GPU"),
    ],
)
def test_what_makes_the_matrix_fail(
    engine: str, reply: dict[str, Any], status: int, text: str,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = _matrix(monkeypatch, {"hf": 0.1, "fusewright": 0.1}, {engine: reply})
    assert run(tmp_path, "--engines", "hf,fusewright")[0] == status
    assert text in capsys.readouterr().out


def test_a_pack_has_samples_of_its_own() -> None:
    import torch

    from workload import packed

    batch = packed(torch.arange(1, 7)[None], 3)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, 6]]


def _smoke(part: str, out: Path) -> str:
    done = subprocess.run(
        [str(BENCHMARKS / "gpu.sh"), part, "--device", "cpu", "--smoke", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=stretched(600),
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


OPS = ("--device", "cpu", "--smallest", "--seconds", "0.01", "--providers", "reference,fusewright")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_ops_go_on_in_another_process_when_one_breaks_the_context(tmp_path: Path) -> None:
    file = tmp_path / "ops.csv"
    program = str(BENCHMARKS / "ops.py")
    command = [program, *OPS, "--ops", "rms_norm,glu", "--csv", str(file)]
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import ops; "
        f"sys.argv = {command!r}; ops.broken_context = lambda: 'CUDA error'; ops.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        timeout=stretched(300),
        env=os.environ | {"PYTHONPATH": str(Path(sys.modules["fusewright"].__path__[0]).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["op"] for row in _rows(file)] == ["rms_norm"] * 4 + ["glu"] * 4
    assert len(done.stdout.splitlines()) == 8  # nothing is measured twice


@pytest.mark.long
def test_what_is_ended_leaves_every_row_and_no_process(tmp_path: Path) -> None:
    file = tmp_path / "gpu-cpu-ops.csv"
    command = [str(BENCHMARKS / "gpu.sh"), "ops", "--device", "cpu", "--smoke"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for _ in range(2400):
        if file.exists() and len(_rows(file)) > 5:
            break
        time.sleep(0.05)
    said = len(_rows(file))
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    rows = _rows(file)
    assert len(rows) >= said > 5
    assert all(row["provider"] and row["commit"] for row in rows)
    assert (tmp_path / "gpu-cpu-tests.jsonl").exists()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            assert str(tmp_path) not in path.read_text(errors="replace")


@pytest.mark.long
def test_ops_on_the_cpu(tmp_path: Path) -> None:
    said = _smoke("ops", tmp_path)
    assert "ops: passed" in said
    rows = _rows(tmp_path / "gpu-cpu-ops.csv")
    rivals = {row["provider"] for row in rows} - {"reference", "fusewright"}
    assert {"F.rms_norm", "F.linear_cross_entropy", "liger"} <= rivals
    measured = [row for row in rows if not row["error"]]
    assert all(float(row["median_ms"]) > 0 for row in measured)
    assert all(float(row["difference"]) < 0.05 for row in measured)
    assert all(row["provider"] in rivals for row in rows if row["error"])
    assert {"host_median_ms", "gb_per_s", "gflop_per_s"} <= set(rows[0])


@pytest.mark.slow
def test_steps_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    said = _smoke("steps", tmp_path)
    assert "lora: passed" in said
    rows = json.loads((tmp_path / "gpu-cpu-lora.json").read_text())
    for engine in ("hf", "fusewright"):
        own = [r for r in rows if r["engine"] == engine]
        assert [r["workload"] for r in own] == ["1x32-autocast", "pack-48"]
        assert all(r["tokens_per_s"] > 0 and r["growth_mb"] >= 0 for r in own)
        assert own[0]["profile"]["kernels"] > 10
        assert own[0]["profile"]["by_name"][0]["us"] > 0
        assert all(r["free_step_s"] > 0 for r in own)
        assert (tmp_path / f"gpu-cpu-trace-{engine}.json.gz").stat().st_size > 1000
    assert "qlora: passed" in said or "qlora: skipped, bitsandbytes" in said
