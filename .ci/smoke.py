"""Whether built artifacts of the package work where they are installed, and nothing else is.

    python .ci/smoke.py dist/*                  # each in a fresh environment, with its dependencies
    python .ci/smoke.py dist/* --shared         # the dependencies are those of this environment

Each wheel and source distribution is installed into a virtual environment of its own. There, in an
empty folder that holds one called ``fusewright``, as a clone is called, every module is imported, a
model is optimized and compared with itself, and the command is called.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

_PROGRAM = """
import importlib
import importlib.metadata
import pathlib
import pkgutil
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fusewright
from fusewright import explain, optimize, restore

home = pathlib.Path(fusewright.__file__).resolve()
assert pathlib.Path(sys.prefix).resolve() in home.parents, f"{home} is not what was installed"
names = [m.name for m in pkgutil.walk_packages(fusewright.__path__, "fusewright.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
files = [f for f in importlib.metadata.files("fusewright") if f.suffix in (".cpp", ".css", ".j2")]
assert files and all(f.locate().is_file() for f in files)

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2,
)).train()
ids = torch.randint(64, (2, 16))
expected = model(input_ids=ids, labels=ids).loss
found = optimize(model)(input_ids=ids, labels=ids).loss
found.backward()
torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
assert explain(model).by_rule()["rms_norm"]
restore(model)
print(f"{len(names)} modules, {len(files)} other files, a model optimized")
"""


def main() -> None:
    """Try each artifact; the first that does not work ends the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--shared", action="store_true")
    arguments = parser.parse_args()
    for artifact in arguments.artifacts:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            _try(artifact.resolve(), Path(folder), arguments.shared)
        print(f"{artifact.name} works ({time.perf_counter() - start:.0f} s)", flush=True)


def _try(artifact: Path, folder: Path, shared: bool) -> None:
    venv.create(folder / "venv", symlinks=True, with_pip=not shared)
    python = folder / "venv" / "bin" / "python"
    options = [str(artifact)] if shared else [f"{artifact}[train]"]
    installer = [str(python), "-m", "pip"]
    if shared:
        (site,) = folder.glob("venv/lib/python*/site-packages")
        (site / "shared.pth").write_text(sysconfig.get_path("purelib"))
        installer = [sys.executable, "-m", "pip", f"--python={python}"]
        options += ["--no-deps"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["FUSEWRIGHT_SMALL"] = "optimize"  # else blocks so small keep their own code
    _run([*installer, "install", "--quiet", *options], folder, environment)
    empty = folder / "empty"
    (empty / "fusewright").mkdir(parents=True)
    print(_run([str(python), "-c", _PROGRAM], empty, environment), end="", flush=True)
    command = [str(folder / "venv" / "bin" / "fusewright"), "--help"]
    _run(command, empty, environment)
    _run([str(python), "-m", "fusewright", "doctor", "--help"], empty, environment)


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = "\n".join(f"{done.stdout}{done.stderr}".splitlines()[-40:])
        sys.exit(f"{' '.join(command)[:200]} failed:\n{said}")
    return done.stdout


if __name__ == "__main__":
    main()
