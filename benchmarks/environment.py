"""What a figure depends on, written beside every figure: versions, commit, card, threads, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = "torch transformers peft triton trl liger-kernel bitsandbytes unsloth"


def describe() -> dict[str, Any]:
    """Describe this machine, its software and the command line, as JSON-ready values."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": repeatable(sys.argv),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "card": card,
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    } | (_of_card() if card else {})


def _of_card() -> dict[str, Any]:
    """The card's driver, clocks in MHz, power limit in W and memory in MiB, as it is now."""
    import torch

    found: dict[str, Any] = {"cuda": torch.version.cuda}
    names = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    names += ",memory.free,memory.total"
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return found | {"nvidia_smi": f"{type(error).__name__}: {error}"}
    return found | dict(zip(names.split(","), map(str.strip, said.stdout.split(",")), strict=False))


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: whoever is ended while writing leaves the last one, not a part."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, "utf-8")
    part.replace(path)


def _versions() -> dict[str, str | None]:
    """Python's and the libraries'; fusewright's is this checkout's, installed or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = {"python": platform.python_version(), "fusewright": project["version"]}
    for name in _PACKAGES.split():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def repeatable(words: Sequence[str]) -> str:
    """A command line without the folders of this machine: what anybody can type in a clone."""
    program, *given = words
    path = Path(program).resolve()
    program = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    for at, word in enumerate(given[:-1]):
        if word in ("--json", "--csv"):
            given[at + 1] = "FILE"
    return shlex.join(["python", program, *given])


def _commit() -> str | None:
    """The checkout's commit, with ``+changes`` when tracked files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(
            [*command, "--dirty=+changes"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return described.stdout.strip() or None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
