"""Checks and measures fusewright on a GPU, in two calls of under ten minutes, without a network.

    benchmarks/gpu.sh ops   [--out DIR] [--device cuda|cpu] [--smoke]
    benchmarks/gpu.sh steps [--out DIR] [--device cuda|cpu] [--smoke]

``ops``: the GPU tests, each op against its reference and what libraries have for it, and one call
of each under compute-sanitizer. ``steps``: whole training steps of an 8B Llama with LoRA and QLoRA,
of a small model and of long sequences, several engines, and a profile of one step.

It needs Python with torch, Triton and transformers, and nothing installed from this checkout. What
else is missing (pytest, PEFT, bitsandbytes, Liger-Kernel) is skipped with its reason; pure Python
wheels on ``PYTHONPATH`` are as good as installed packages (``wheels.sh`` fetches them). Results go
to DIR (default: ``benchmarks/results``) as ``gpu-CARD-*.{txt,csv,json,jsonl}``, each row at once:
whatever ends a call leaves what it has measured. ``--smoke`` runs the same stages on the smallest
sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from staging import Execution, Stage, exit_status, run_stages, summary

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 570.0
"""Seconds for all stages of a call."""

WORKERS = 12
"""Processes of the tests, at most, since one does not compile all their kernels in ten minutes."""

MEMORY_OF_A_TEST = 4
"""GiB for each process of the tests."""

SMOKE_OPS = "rms_norm,glu,lora_linear,quant_linear,linear_cross_entropy,moe_experts"
COMPILED_OPS = "rms_norm,add_rms_norm,glu,rope,lora_linear,quant_linear,linear_cross_entropy"
"""Ops whose compiled reference is worth its minute: what Inductor would run in their place."""

SANITIZER = "compute-sanitizer"
_PATH = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin"


@dataclass(frozen=True)
class Setting:
    """Where a call runs, and what it is to do.

    Attributes:
        results: how the files of this call begin.
        device: ``"cuda"`` or ``"cpu"``.
        smoke: the smallest sizes.
        memory: GiB of the card.
        bf16: whether the card has products of bf16.
        cache: folder of compiled code that all engines share.
        has: whether a package or a program is there.
    """

    results: Path
    device: str = "cuda"
    smoke: bool = False
    memory: float = 80.0
    bf16: bool = True
    cache: Path | None = None
    has: Callable[[str], bool] = lambda name: _has(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages of one part; 0 when each passed, or cannot run here."""
    options = _parse(arguments)
    # the stage that runs then is ended, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.out.mkdir(parents=True, exist_ok=True)
    make = {"ops": ops_stages, "steps": steps_stages}[options.part]
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "fusewright").symlink_to(ROOT / "src")  # the package, by its folder
        for wheel in sorted(ROOT.glob(".whl/*.whl")):  # of wheels.sh
            zipfile.ZipFile(wheel).extractall(scratch)
        sys.path.insert(0, scratch)
        name, about = _card(options.device)
        results = options.out / f"gpu-{name}"
        setting = Setting(results, options.device, options.smoke, *about, Path(scratch) / "cache")
        execution = Execution(
            lambda stage: results.with_name(f"{results.name}-{stage}.txt"), ROOT,
            _environment(scratch),
        )  # fmt: skip
        outcomes = run_stages(make(setting), options.budget, execution)
    print(summary(outcomes), f"results: {results}-*", sep="\n")
    return exit_status(outcomes)


def ops_stages(setting: Setting) -> list[Stage]:
    """The GPU tests; each op against its reference and its rivals; a call of each, watched."""
    python, results, has = sys.executable, setting.results, setting.has
    files = gpu_test_files()
    tests = [python, "-m", "pytest", "-q", "-o", "addopts=--strict-markers", "--tb", "short"]
    tests += ["-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    tests += ["-p", "benchmarks.gpu_reports", "--reports", f"{results}-tests"]
    if setting.smoke:
        tests += ["-p", "no:xdist"] if has("xdist") else []
    elif has("xdist"):
        workers = max(1, min(WORKERS, int(setting.memory) // MEMORY_OF_A_TEST))
        tests += ["-n", str(workers), "--max-worker-restart", "1000"]
    else:  # half of them fit into one process
        tests += ["-k", "not 2x256x2048"]
    tests += files[:1] if setting.smoke else files

    def ops(name: str, *options: str) -> tuple[str, ...]:
        program = [python, "benchmarks/ops.py", "--device", setting.device]
        program += ["--csv", f"{results}-{name}.csv", "--dtype", _dtype(setting)]
        if setting.smoke:
            program += ["--smallest", "--seconds", "0.01", "--ops", SMOKE_OPS]
        return *program, *options

    size = () if setting.smoke else ("--quick",)
    stages = [
        Stage("tests", tuple(tests), 270, "" if has("pytest") else "pytest is not installed"),
        Stage("ops", ops("ops", *size, "--providers", "reference,fusewright,rivals"), 120),
    ]
    missing = "" if has(SANITIZER) else f"{SANITIZER} is not there"
    for tool in ("memcheck", "racecheck"):
        # of PyTorch's own blocks of memory it would not see where a tensor ends
        watched = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        watched += [SANITIZER, "--tool", tool, "--error-exitcode", "9"]
        once = ops(tool, "--smallest", "--once", "--providers", "fusewright")
        stages.append(Stage(tool, (*watched, *once), 50, missing))
    compiled = ("--providers", "reference,compile,fusewright-compiled", "--within", "{seconds}")
    if not setting.smoke:
        compiled = (*compiled, "--ops", COMPILED_OPS)
        stages.append(Stage("compiled", ops("compiled", *size, *compiled), 70))
    return stages


def steps_stages(setting: Setting) -> list[Stage]:
    """Steps of a large model with LoRA and with QLoRA, of a small one, and of long sequences."""
    large = "llama-8b" if setting.memory >= 40 else "llama-8b-4layers"
    peft = "" if setting.has("peft") else "PEFT is not installed"
    bitsandbytes = "" if setting.has("bitsandbytes") else "bitsandbytes is not installed"
    usual = "1x2048-autocast,pack-8192-autocast"
    short = "1x2048-autocast,1x512-autocast"
    stages = []
    for name, model, engines, workloads, limit in (
        ("lora", large, "hf,fusewright,hf+gc,liger,unsloth", usual, 190),
        ("small", "qwen3-0.6b", "hf,fusewright,fusewright-graphs", short, 110),
        ("qlora", large, "hf,fusewright,hf+gc,liger,unsloth", usual, 150),
        # "auto" has a plan, whose peak is compared with what is measured
        ("long", "llama-8b-4layers", "hf,fusewright,fusewright:auto", "1x16384-autocast", 110),
    ):
        command = [sys.executable, "benchmarks/step_matrix.py", "--device", setting.device]
        command += ["--method", "qlora" if name == "qlora" else "lora", "--seconds", "{seconds}"]
        command += ["--json", f"{setting.results}-{name}.json", "--dtype", _dtype(setting)]
        command += ["--model", model, "--engines", engines, "--workloads", workloads]
        command += ["--cache", str(setting.cache)] if setting.cache else []
        if name == "lora":
            command += ["--trace", f"{setting.results}-trace"]
        command += ["--smoke"] if setting.smoke else []
        missing = peft or (bitsandbytes if name == "qlora" else "")
        if not setting.smoke or name in ("lora", "qlora"):
            whole = BUDGET / 2 if setting.smoke else limit  # a CPU takes its time to compile
            stages.append(Stage(name, tuple(command), whole, missing))
    return stages


def _dtype(setting: Setting) -> str:
    return "bfloat16" if setting.bf16 else "float16"


def gpu_test_files() -> list[str]:
    """The files with tests that are marked ``gpu``, relative to the checkout."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in paths if "mark.gpu" in p.read_text("utf-8")]


def _has(name: str) -> bool:
    return bool(shutil.which(name, path=_PATH) or importlib.util.find_spec(name))


def _environment(scratch: str) -> dict[str, str]:
    path = [scratch, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PATH": _PATH,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _card(device: str) -> tuple[str, tuple[float, bool]]:
    """The card's name as part of a file's, its GiB, and whether it has products of bf16.

    Asked in a process that then lets go of the card.
    """
    if device == "cpu":
        return "cpu", (0.0, True)
    code = (
        "import torch; p = torch.cuda.get_device_properties(0); "
        "print(p.name, p.total_memory / 2**30, int(p.major >= 8), sep='\\n')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, memory, bf16 = said.stdout.strip().splitlines()[-3:]
    return re.sub(r"\W+", "-", name).strip("-"), (float(memory), bf16 == "1")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["ops", "steps"])
    parser.add_argument(
        "--out", type=lambda t: Path(t).resolve(), default=ROOT / "benchmarks" / "results"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--smoke", action="store_true", help="the smallest sizes, to try the script"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
