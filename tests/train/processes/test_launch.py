"""``--nproc``: how many processes are started, what they are told, and how they end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusewright.errors import RecipeError
from fusewright.train.processes import launch as launch_module
from fusewright.train.processes.launch import launch, number_of_processes

from ...load import stretched

# --- how many ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, and no GPU."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch_module, "_gpus", lambda: 0)


def test_one_without_a_wish_and_without_gpus() -> None:
    assert number_of_processes(None) == 1
    assert number_of_processes("auto") == 1


@pytest.mark.parametrize("wanted", ["1", "2", "64"])
def test_a_number(wanted: str) -> None:
    assert number_of_processes(wanted) == int(wanted)


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_one_for_each_gpu(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "_gpus", lambda: gpus)
    assert [number_of_processes(w) for w in (None, "gpu", "auto")] == [gpus] * 3
    assert number_of_processes("3") == 3
    # a recipe with ddp: false
    assert [number_of_processes(w, alone=True) for w in (None, "gpu", "3")] == [1, gpus, 3]


@pytest.mark.parametrize("wanted", ["0", "-1", "two", "", "1.5", "²", "GPU"])
def test_no_number(wanted: str) -> None:
    with pytest.raises(RecipeError) as error:
        number_of_processes(wanted)
    assert str(error.value) == f"--nproc: {wanted} is neither a number of processes nor gpu"


def test_gpu_without_one() -> None:
    with pytest.raises(RecipeError, match="--nproc: there is no GPU here; give a number"):
        number_of_processes("gpu")


LAUNCHED: list[dict[str, str]] = [
    {"RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "1"},
    {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
    {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
]


@pytest.mark.parametrize("environ", LAUNCHED)
def test_what_a_launcher_has_started_starts_no_others(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        if name not in environ:  # to be unset again
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
    monkeypatch.setattr(launch_module, "_gpus", lambda: 8)
    assert number_of_processes(None) == 1
    for wanted in ("2", "1", "gpu"):
        with pytest.raises(RecipeError, match=r"--nproc: a launcher \(.*\) has started this"):
            number_of_processes(wanted)


# --- what they do --------------------------------------------------------------------------------

HEAD = f"""#!{sys.executable} -SE
import os, signal, sys, time
rank = int(os.environ["RANK"])
def note(name, text):
    with open(os.path.join(FOLDER, f"{{name}}.{{rank}}"), "a") as file:
        file.write(text)
def heard(number, frame):
    note("signals", f"{{number}} ")
def listen():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, heard)
    note("ready", "")
"""

Launch = Callable[[str], int]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Launch two processes that run a piece of code in place of ``fusewright``."""
    monkeypatch.setattr(launch_module, "_MESSAGE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(launch_module, "_SAVING", 1.0)

    def run(code: str) -> int:
        stub = tmp_path / "stub"
        stub.write_text(HEAD.replace("FOLDER", repr(str(tmp_path)), 1) + code, encoding="utf-8")
        stub.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(stub))
        return launch(2, ["train", "recipe.yaml", "--max_steps", "3"])

    return run


def test_the_others_end_within_30_seconds() -> None:
    assert launch_module._MESSAGE_TIMEOUT_S + launch_module._SAVING <= 30


def test_what_they_are_told(
    start: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = """
import json, socket
port = int(os.environ["MASTER_PORT"])
socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=5).close()
note("told", json.dumps([sys.argv[1:], dict(os.environ), os.getppid(), os.getsid(0), os.getpid()]))
"""
    assert start(code) == 0
    for rank in range(2):
        arguments, environ, parent, session, own = json.loads(
            (tmp_path / f"told.{rank}").read_text()
        )
        assert arguments == [
            "-P",
            "-m",
            "fusewright.cli",
            "train",
            "recipe.yaml",
            "--max_steps",
            "3",
        ]
        given = {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "FUSEWRIGHT_PARENT": str(os.getpid()),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        assert {name: environ[name] for name in given} == given
        assert parent == os.getpid()
        assert session == own  # what a terminal sends does not reach it directly
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("number", "threads"), [(1, 6), (2, 3), (4, 1), (100, 1)])
def test_processors_are_divided(number: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch_module.rank_environment(0, number, 1)["OMP_NUM_THREADS"] == str(threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch_module.rank_environment(0, number, 1)["OMP_NUM_THREADS"] == "7"


def test_the_command_itself() -> None:
    assert launch(2, ["--version"]) == 0
    assert launch(2, ["train"]) == 2


# --- how they end --------------------------------------------------------------------------------


def test_the_code_of_the_first_that_fails(
    start: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other one has a moment to end by itself, and is not signalled then."""
    code = """
if rank == 1:
    sys.exit(3)
listen()
time.sleep(0.5)
note("end", "by itself")
sys.exit(1)
"""
    assert start(code) == 3
    assert (tmp_path / "end.0").read_text() == "by itself"
    assert not (tmp_path / "signals.0").exists()
    assert capfd.readouterr().err == ""  # it has said why


def test_one_that_stays_is_asked_to_end_and_may_save(start: Launch, tmp_path: Path) -> None:
    code = """
if rank == 1:
    sys.exit(2)
listen()
while not os.path.exists(os.path.join(FOLDER, "signals.0")):
    time.sleep(0.02)
time.sleep(0.3)
note("end", "saved")
""".replace("FOLDER", repr(str(tmp_path)))
    begun = time.monotonic()
    assert start(code) == 2
    assert 1 <= time.monotonic() - begun < 10
    assert (tmp_path / "signals.0").read_text() == "15 "
    assert (tmp_path / "end.0").read_text() == "saved"


def test_one_that_does_not_end_is_killed(start: Launch, tmp_path: Path) -> None:
    begun = time.monotonic()
    assert start("if rank == 0:\n    sys.exit(5)\nlisten()\nwhile True:\n    time.sleep(0.05)") == 5
    assert 2 <= time.monotonic() - begun < 10
    assert (tmp_path / "signals.1").read_text() == "15 "


@pytest.mark.parametrize(
    ("number", "hint"),
    [("SIGKILL", " (the system does that when memory is short)"), ("SIGSEGV", "")],
)
def test_one_that_was_killed(
    start: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: str, hint: str
) -> None:
    """It is named, although the other one fails because of it, and has a lower number."""
    code = f"""
note("pid", str(os.getpid()))
if rank == 1:
    os.kill(os.getpid(), signal.{number})
time.sleep(0.2)
sys.exit(1)
"""
    assert start(code) == 128 + getattr(signal, number)
    pid = (tmp_path / "pid.1").read_text()
    assert capfd.readouterr().err == (
        f"fusewright: rank 1 (process {pid}) was killed by {number}{hint}, and the others were "
        "stopped; start the run again with auto_resume_from_checkpoints: true to resume\n"
    )


@pytest.mark.parametrize("later", [0.0, 0.7])
def test_one_that_was_killed_as_another_failed(
    start: Launch, capfd: pytest.CaptureFixture[str], later: float
) -> None:
    code = f"if rank == 1:\n    time.sleep({later})\n    os.kill(os.getpid(), 9)\nsys.exit(1)"
    assert start(code) == 137
    assert "rank 1 (process" in capfd.readouterr().err


# --- signals -------------------------------------------------------------------------------------


def _send(tmp_path: Path, *numbers: int) -> threading.Thread:
    """Send this process signals, each once both have had the one before."""

    def wait(name: str, text: str) -> None:
        end = time.monotonic() + 20
        files = [tmp_path / f"{name}.{rank}" for rank in range(2)]
        while time.monotonic() < end:
            if all(file.exists() and file.read_text() == text for file in files):
                return
            time.sleep(0.02)

    def send() -> None:
        wait("ready", "")
        had = ""
        for number in numbers[:-1]:
            os.kill(os.getpid(), number)
            had += f"{int(number)} "
            wait("signals", had)
        os.kill(os.getpid(), numbers[-1])
        time.sleep(0.3)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


WAIT = """
listen()
end = time.time() + 20
while time.time() < end:
    time.sleep(0.05)
"""


def test_each_gets_a_signal_once_and_the_third_ends_it_by_force(
    start: Launch, tmp_path: Path
) -> None:
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]
    thread = _send(tmp_path, *signals)
    assert start(WAIT) == 137
    thread.join()
    for rank in range(2):
        assert (tmp_path / f"signals.{rank}").read_text() == "15 2 "
    assert [signal.getsignal(number) for number in signals] == before


@pytest.mark.long
def test_they_decide_what_a_signal_means(
    start: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An orderly end may take as long as it does."""
    code = """
listen()
while not os.path.exists(os.path.join(FOLDER, f"signals.{rank}")):
    time.sleep(0.02)
time.sleep(1.5 * (rank + 1))
note("end", "saved")
sys.exit(143 * (rank == 1))
""".replace("FOLDER", repr(str(tmp_path)))
    thread = _send(tmp_path, signal.SIGTERM)
    assert start(code) == 143
    thread.join()
    for rank in range(2):
        assert (tmp_path / f"end.{rank}").read_text() == "saved"
        assert (tmp_path / f"signals.{rank}").read_text() == "15 "
    assert capfd.readouterr().err == ""


def test_a_signal_that_is_ignored_stays_ignored(start: Launch, tmp_path: Path) -> None:
    """As under nohup, when the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        thread = _send(tmp_path, signal.SIGHUP)
        assert start("listen()\ntime.sleep(2)") == 0
        thread.join()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    for rank in range(2):
        assert not (tmp_path / f"signals.{rank}").exists()


def test_none_is_left_where_another_cannot_be_started(
    start: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    popen = subprocess.Popen

    def failing(*given: Any, **options: Any) -> Any:
        if started:
            raise OSError(12, "Cannot allocate memory")
        started.append(popen(*given, **options))
        return started[0]

    monkeypatch.setattr(launch_module.subprocess, "Popen", failing)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        start(WAIT)
    assert started[0].wait(timeout=stretched(10)) == -signal.SIGKILL
