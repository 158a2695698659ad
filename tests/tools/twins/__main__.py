"""Run recipes on tiny twins of their checkpoints, each in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .page import read_outcomes, write_outcomes, write_pages
from .run import Outcome, examples_in, run

# What forks of this process need, imported once.
_IMPORTS = (
    "bitsandbytes", "datasets", "deepspeed", "matplotlib.pyplot", "trl", "torch._dynamo",
    "torch._inductor.utils", "fusewright.compiler.pipeline", "fusewright.train.run",
    "fusewright.train.merge", "transformers.models.llama.modeling_llama",
)  # fmt: skip


def run_apart(
    file: Path, examples: Path, folder: Path, seconds: float, more: dict[str, Any]
) -> Outcome:
    """Run a recipe in a fork of this process, which is killed when it takes too long."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, file, examples, folder, more))
    process.start()
    sender.close()
    outcome, end = Outcome(str(file.relative_to(examples)), ""), time.monotonic() + seconds
    problem = f"took longer than {seconds:.0f} s"
    while receiver.poll(max(0.0, end - time.monotonic())):
        try:
            outcome = receiver.recv()
        except EOFError:
            problem = ""
            break
    if problem and process.pid is not None:
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if not outcome.why and not outcome.ran:
        outcome.why = problem or f"the process ended with {process.exitcode}"
    return outcome


def _child(pipe: Any, file: Path, examples: Path, folder: Path, more: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    os.setsid()
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    pipe.send(run(file, examples, folder, pipe.send, more))


def main() -> None:
    """Run the recipes that the command line names, and say what became of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.twins", description=__doc__)
    parser.add_argument("examples", type=Path, help="a folder of recipes, such as axolotl/examples")
    parser.add_argument("recipes", nargs="*", help="parts of their paths; default: all")
    parser.add_argument(
        "--plain", action="store_true", help="with optimize: false, for a quick look"
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="for each recipe")
    parser.add_argument("--keep", type=Path, help="where the folders of the runs are kept")
    parser.add_argument(
        "--write",
        action="store_true",
        help="store outcomes, write docs/axolotl.md and README's claim",
    )
    parser.add_argument(
        "--rest", action="store_true", help="leave out what is stored as having run"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="recipes at a time; each has one thread"
    )
    parser.add_argument("--commit", help="of the examples, if their folder is no git checkout")
    chosen = parser.parse_intermixed_args()
    examples, keep = chosen.examples.resolve(), chosen.keep and chosen.keep.resolve()
    of, stored = read_outcomes()
    outcomes = {o.recipe: o for o in stored}
    os.chdir(examples.parent)  # where Axolotl is started, and its deepspeed_configs are
    for module in _IMPORTS:
        with contextlib.suppress(ModuleNotFoundError):  # recipes that need it say so
            importlib.import_module(module)
    if chosen.write:
        of = {"commit": chosen.commit or _commit(examples), "versions": _versions()}
    files = {str(file.relative_to(examples)): file for file in examples_in(examples)}
    if chosen.recipes:
        files = {n: f for n, f in files.items() if any(part in n for part in chosen.recipes)}
    if chosen.rest:
        files = {n: f for n, f in files.items() if n not in outcomes or not outcomes[n].ran}
    more = {"optimize": False} if chosen.plain else {}

    def one(name: str) -> tuple[Outcome, float]:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="twin-") as temporary:
            folder = keep / name.replace("/", "-") if keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            outcome = run_apart(files[name], examples, folder, chosen.seconds, more)
        return outcome, time.monotonic() - start

    with ThreadPoolExecutor(chosen.jobs) as pool:
        for outcome, seconds in pool.map(one, files):
            outcomes[outcome.recipe] = outcome
            print(f"{outcome.recipe:55} {outcome.kind:20} {outcome.stage:12} {seconds:4.0f} s  "
                  f"{outcome.why}", flush=True)  # fmt: skip
            if chosen.write:
                write_outcomes(of, outcomes.values())
                write_pages()
    ran = sum(outcomes[name].ran for name in files)
    print(f"{sum(outcomes[name].accepted for name in files)} of {len(files)} accepted, {ran} ran")


def _commit(folder: Path) -> str:
    shown = subprocess.run(
        ["git", "log", "-1", "--format=%h (%cs)"], cwd=folder, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return shown.stdout.strip()


def _versions() -> str:
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


if __name__ == "__main__":
    main()
