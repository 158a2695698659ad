"""Engines side by side: each in a fresh process with a cold compile cache, stepping in turn.

Whatever the machine does meanwhile then hits all engines alike. Loads and first steps run one
after another, never at once; a process that waits for its turn blocks on a pipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from workload import Job

WORKER = Path(__file__).resolve().parent / "worker.py"


class EngineError(Exception):
    """The engine's process failed; the message is one line, ``details`` the traceback."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


@dataclass
class Run:
    """What one engine did.

    Attributes:
        job: what it was asked to do.
        loaded: memory once the model was loaded, by kind, in MB.
        setting: how the resident peak was read, and the number of threads.
        activation_mb: what a forward pass keeps for backward, in MB.
        plan: what our planner chose, predicted and measured.
        steps: per step ``loss``, ``seconds`` and ``peak`` (memory since loading).
        error: why it stopped early, or None.
    """

    job: Job
    loaded: dict[str, float] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    activation_mb: float | None = None
    plan: str | None = None
    error: str | None = None

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [step["loss"] for step in self.steps]

    @property
    def seconds(self) -> list[float]:
        """The duration of every step, the first one (with its compilation) included."""
        return [step["seconds"] for step in self.steps]


class EngineProcess:
    """A running worker; a context manager, so that none outlives the benchmark.

    Args:
        job: what it shall do, as the worker's command line has it.
        worker: its program.
        cache: a folder of compiled code that it shares with others; else its own, which is empty.
        python: the interpreter, of another environment.
    """

    def __init__(
        self, job: Any, worker: Path = WORKER, cache: Path | None = None,
        python: str = sys.executable,
    ) -> None:  # fmt: skip
        self.run = Run(job)
        self._cache = tempfile.TemporaryDirectory(
            prefix="fusewright-bench-", ignore_cleanup_errors=True
        )
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache or self._cache.name}/inductor",
            "TRITON_CACHE_DIR": f"{cache or self._cache.name}/triton",
        }
        self._process = subprocess.Popen(
            [python, str(worker), json.dumps(dataclasses.asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:  # a closed pipe tells a waiting worker to end, and its compile helpers with it
            self._process.communicate(timeout=10 if error is None else 0.1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._cache.cleanup()

    def load(self) -> None:
        """Wait until the model is loaded."""
        reply = self._receive()
        self.run.loaded, self.run.setting = reply["loaded"], reply["setting"]

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line, and wait for the reply."""
        self._send(line)
        return self._receive()

    def step(self, tokens: int | None = None) -> None:
        """Let the engine take one step, of the first ``tokens`` of a sequence, and wait for it."""
        self.run.steps.append(self.ask("step" if tokens is None else f"step {tokens}"))
        job, last = self.run.job, self.run.steps[-1]
        number = f"step {len(self.run.steps)}/{job.steps}"
        say(f"{job.engine}: {number}, {last['seconds']:.2f} s, loss {last['loss']:.4f}")

    def measure(self) -> None:
        """Let the engine count what it keeps for backward, in a forward pass of its own."""
        reply = self.ask("activations")
        self.run.activation_mb, self.run.plan = reply["activation_mb"], reply["plan"]

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_receive` raises, and says why it ended
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"the process ended with status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineError(reply["error"], reply["traceback"])
        return reply


def run_interleaved(jobs: Sequence[Job]) -> list[Run]:
    """Run the jobs, one process each: load all, first steps in turn, then step by step in turn.

    Args:
        jobs: one per engine, with equal ``steps``.

    Returns:
        One ``Run`` per job. An engine that fails has its ``error`` set; the others go on.
    """
    with contextlib.ExitStack() as stack:
        processes: list[EngineProcess] = []
        for job in jobs:
            say(f"{job.engine}: loading {job.model}")
            process = stack.enter_context(EngineProcess(job))
            processes.append(process)
            attempt(process, process.load)
        for number in range(jobs[0].steps):
            turn = number % len(processes)  # nobody is always the one after the same neighbour
            for process in processes[turn:] + processes[:turn]:
                attempt(process, process.step)
        for process in processes:
            attempt(process, process.measure)
    return [process.run for process in processes]


def attempt(process: EngineProcess, action: Callable[[], None]) -> None:
    run = process.run
    if run.error is not None:
        return
    try:
        action()
    except EngineError as error:
        run.error = str(error)
        say(f"{run.job.engine}: failed: {error}\n{error.details}")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
