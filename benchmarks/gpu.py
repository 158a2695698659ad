"""Checks and measures fusewright on a GPU, in two calls of under ten minutes, without a network.

    benchmarks/gpu.sh ops   [--out DIR] [--device cuda|cpu] [--smoke]
    benchmarks/gpu.sh steps [--out DIR] [--device cuda|cpu] [--smoke]

``ops``: the GPU tests, then each op against its reference. ``steps``: whole training steps of an
8B Llama with LoRA and QLoRA, several engines and batches, and a profile of one step.

It needs Python with torch, Triton and transformers, and nothing installed from this checkout. What
else is missing (pytest, PEFT, bitsandbytes, Liger-Kernel) is skipped with its reason; pure Python
wheels on ``PYTHONPATH`` are as good as installed packages. Results go to DIR (default:
``benchmarks/results``) as ``gpu-CARD-*.{txt,csv,json}``. ``--smoke`` runs the same stages on the
smallest sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from staging import Execution, Stage, exit_status, run_stages, summary

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 570.0
"""Seconds for all stages of a call."""

WORKERS = 12
"""Processes of the tests: one does not compile the kernels of 700 of them in ten minutes."""

SMOKE_OPS = "rms_norm,glu,lora_linear,quant_linear,linear_cross_entropy,moe_experts"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages of one part; 0 when each passed, or cannot run here."""
    options = _parse(arguments)
    # the stage that runs then is ended, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.out.mkdir(parents=True, exist_ok=True)
    results = f"gpu-{_card(options.device)}"
    make = {"ops": ops_stages, "steps": steps_stages}[options.part]
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "fusewright").symlink_to(ROOT / "src")  # the package, by its folder
        execution = Execution(
            lambda name: options.out / f"{results}-{name}.txt", ROOT, _environment(scratch)
        )
        stages = make(options.device, options.smoke, options.out / results)
        outcomes = run_stages(stages, options.budget, execution)
    print(summary(outcomes), f"results: {options.out / results}-*", sep="\n")
    return exit_status(outcomes)


def ops_stages(
    device: str, smoke: bool, results: Path, found: Callable[[str], bool] | None = None
) -> list[Stage]:
    """The GPU tests, and each op against its reference.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        smoke: the smallest sizes.
        results: how the files of this call begin.
        found: whether a package is there; asks Python unless it is given.
    """
    has = found or _has
    files = gpu_test_files()
    tests = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--strict-markers"]
    tests += ["-m", "gpu", "-p", "no:cacheprovider", "--tb", "short"]
    tests += ["-p", "benchmarks.gpu_reports", "--reports", f"{results}-tests"]
    tests += ["--continue-on-collection-errors"]
    if smoke:
        tests += ["-p", "no:xdist"] if has("xdist") else []
    elif has("xdist"):
        tests += ["-n", str(WORKERS), "--max-worker-restart", "1000"]
    else:  # half of them fit into one process
        tests += ["-k", "not 2x256x2048"]
    tests += files[:1] if smoke else files
    ops = [sys.executable, "benchmarks/ops.py", "--device", device, "--csv", f"{results}-ops.csv"]
    if smoke:
        ops += ["--smallest", "--ops", SMOKE_OPS, "--seconds", "0.01"]
    else:
        ops += ["--quick"]
    ops += ["--providers", "reference,fusewright"]  # compiling references takes the time of all
    return [
        Stage("tests", tuple(tests), 300, "" if has("pytest") else "pytest is not installed"),
        Stage("ops", tuple(ops), 270),
    ]


def steps_stages(
    device: str, smoke: bool, results: Path, found: Callable[[str], bool] | None = None
) -> list[Stage]:
    """Steps with LoRA, with QLoRA, and a profile; arguments as those of ``ops_stages``."""
    has = found or _has
    peft = "" if has("peft") else "PEFT is not installed"
    bitsandbytes = "" if has("bitsandbytes") else "bitsandbytes is not installed"
    stages = []
    limits = {"lora": 260, "qlora": 310}  # what the first leaves is the second's
    for method, missing in (("lora", peft), ("qlora", peft or bitsandbytes)):
        command = [sys.executable, "benchmarks/step_matrix.py", "--device", device]
        command += ["--method", method, "--seconds", "{seconds}"]
        command += ["--json", f"{results}-{method}.json"]
        if method == "lora":
            command += ["--trace", f"{results}-trace"]
        command += ["--smoke"] if smoke else []
        stages.append(Stage(method, tuple(command), limits[method], missing))
    return stages


def gpu_test_files() -> list[str]:
    """The files with tests that are marked ``gpu``, relative to the checkout."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in paths if "mark.gpu" in p.read_text("utf-8")]


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _environment(scratch: str) -> dict[str, str]:
    path = [scratch, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _card(device: str) -> str:
    """The card's name, as part of a file's name; asked in a process that then lets go of it."""
    if device == "cpu":
        return "cpu"
    code = "import torch; print(torch.cuda.get_device_name())"
    name = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return re.sub(r"\W+", "-", name.stdout.strip()).strip("-")


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
