"""What the doctor says of this machine, and of machines where something is really not there.

A package is hidden by a folder of links to all the others, or broken by a package of its name in
front of it; a compiler is hidden by a ``PATH`` without one. Nothing of fusewright is replaced.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from fusewright.kernels.launch import has_triton
from fusewright.kernels.native import build
from fusewright.packages import install
from fusewright.passes import PIPELINE
from fusewright.rewrite.op_table import OPS
from fusewright.train.doctor.machine import _kept
from fusewright.train.doctor.rules import ops_of_rules

from ...load import stretched

SOURCE = Path(sys.modules["fusewright"].__path__[0]).parent
COMMAND = [sys.executable, "-m", "fusewright.cli", "doctor"]


def diagnose(
    folder: Path, *front: Path, json_: bool = True, **variables: str
) -> tuple[int, Any, float]:
    """Run the command; its exit code, what it prints, and its seconds."""
    places = [*map(str, front), str(SOURCE)]
    inherited = {name: value for name, value in os.environ.items() if name != "CXX"}
    environment = {**inherited, "PYTHONPATH": os.pathsep.join(places), **variables}
    start = time.monotonic()
    done = subprocess.run(
        [*COMMAND, *["--json"] * json_],
        capture_output=True, text=True, check=False,
        timeout=stretched(120), cwd=folder, env=environment,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    found = json.loads(done.stdout) if json_ else done.stdout
    return done.returncode, found, time.monotonic() - start


def broken(folder: Path, name: str, line: str) -> Path:
    """A folder with a package that does ``line`` where it is imported."""
    package = folder / "broken" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(line)
    return package.parent


def of(found: dict[str, Any], section: str) -> dict[str, Any]:
    return {one["name"]: one for one in found[section]}


def mends(found: dict[str, Any]) -> str:
    return "\n".join(gap["mend"] for gap in found["gaps"])


@pytest.mark.long
def test_this_machine(tmp_path: Path) -> None:
    own = tmp_path / "own"
    code, found, seconds = diagnose(tmp_path, TORCHINDUCTOR_CACHE_DIR=str(own))
    assert code == 0
    assert found["can_train"] is True
    assert seconds < 30
    kept = own / "fusewright" / "kernels"  # where runs keep things, and not where doctor does
    assert of(found, "machine")["kept for later processes"]["note"] == str(kept)
    assert list(tmp_path.iterdir()) == []
    versions = of(found, "packages")
    assert versions["torch"]["value"] == version("torch")
    assert versions["torch"]["note"] == "wanted: >=2.11"
    without_rule = {"linear_logprob"}
    assert {r["rule"] for r in found["rules"]} == {rule.name for rule in PIPELINE} | without_rule
    assert of(found, "attention")["sdpa"]["value"].endswith("math")
    assert of(found, "communication")["gloo"]["state"] == "ok"
    assert not [row for row in found["rules"] if "unknown" in (row["float32"], row["bfloat16"])]
    expected = "Triton" if torch.cuda.is_available() and has_triton() else "CPU"
    assert next(r for r in found["rules"] if r["op"] == "rms_norm")["float32"] == expected


@pytest.mark.long
def test_no_compiler(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    code, found, _ = diagnose(tmp_path, PATH=str(empty))
    assert code == 0
    if torch.cuda.is_available():  # where Triton compiles
        assert found["compiler"][0]["state"] == "unused"
        return
    assert found["compiler"][0]["state"] == "missing"
    assert "apt-get install g++" in mends(found)
    assert found["codegen"][0]["value"] == "eager"
    assert "no C++ compiler" in found["codegen"][0]["note"]


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, for which Triton compiles")
def test_a_compiler_that_does_not_run(tmp_path: Path) -> None:
    code, found, _ = diagnose(tmp_path, CXX="/bin/false")
    assert code == 0
    assert "the variable CXX names '/bin/false'" in found["compiler"][0]["note"]
    assert "unset CXX" in mends(found)
    assert found["codegen"][0]["value"] == "eager"


@pytest.mark.slow
def test_a_compiler_that_cannot_compile(tmp_path: Path) -> None:
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(
        "#!/bin/sh\n[ $# -eq 1 ] && echo 'g++ 13.2.0' && exit 0\n"
        "echo 'try.cpp:2:10: fatal error: Python.h: No such file or directory' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    code, found, _ = diagnose(tmp_path, PATH=f"{compiler.parent}:/usr/bin:/bin")
    assert code == 0
    assert found["compiler"][0]["state"] == "broken"
    assert "Python.h" in found["compiler"][0]["note"]
    assert "python3-dev" in mends(found)


@pytest.mark.long
def test_without_triton_and_bitsandbytes(tmp_path: Path) -> None:
    links = tmp_path / "packages"
    links.mkdir()
    for place in site.getsitepackages():
        for entry in Path(place).iterdir():
            if not entry.name.lower().startswith(("triton", "bitsandbytes")):
                (links / entry.name).symlink_to(entry)
    ours = links / "fusewright"  # an editable install is found by a hook, which -S leaves out
    if not ours.exists():
        ours.symlink_to(sys.modules["fusewright"].__path__[0])
    runner = (
        "import sys; from fusewright.cli import main; sys.argv[1:] = ['doctor', '--json']; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(links)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", runner, "doctor", "--json"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
        timeout=stretched(120),
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert of(found, "packages")["triton"]["value"] == "not installed"
    assert of(found, "bitsandbytes")["bitsandbytes"]["state"] == "missing"
    assert 'pip install "fusewright[quant]"' in mends(found)
    assert found["rules"], "the rewrites do not need either"
    if not torch.cuda.is_available():
        assert done.returncode == 0
        assert of(found, "Triton")["Triton"]["state"] == "unused"
        assert "triton" not in mends(found)


@pytest.mark.long
def test_a_broken_bitsandbytes_keeps_adapters_from_training(tmp_path: Path) -> None:
    front = broken(tmp_path, "bitsandbytes", "raise RuntimeError('libbitsandbytes: no symbol')")
    code, text, _ = diagnose(tmp_path, front, json_=False)
    assert code == 1
    gaps = text[text.index(": fails (training needs this)") :]  # below the tables
    assert "RuntimeError: libbitsandbytes: no symbol" in gaps
    assert "mend: pip install --force-reinstall bitsandbytes" in gaps
    assert gaps.count("--force-reinstall") == 1, "one line for one fault"


@pytest.mark.long
def test_a_broken_triton_keeps_everything_from_training(tmp_path: Path) -> None:
    front = broken(tmp_path, "triton", "raise RuntimeError('libtriton.so: cannot open')")
    code, found, _ = diagnose(tmp_path, front)
    assert code == 1
    assert of(found, "import torch._dynamo")["import torch._dynamo"]["needed"] is True
    assert "pip install --force-reinstall triton" in mends(found)
    assert of(found, "machine")["CPU"]["state"] == "ok", "the other checks are still made"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "said", "expected"),
    [
        ("import os; os.abort()", "SIGABRT", 1),
        ("raise ImportError('built for CUDA 11')", "built for CUDA 11", 0),  # PEFT does without
    ],
)
def test_what_else_a_package_may_do(tmp_path: Path, line: str, said: str, expected: int) -> None:
    code, found, _ = diagnose(tmp_path, broken(tmp_path, "bitsandbytes", line))
    assert said in found["bitsandbytes"][0]["note"]
    assert code == expected
    assert found["gaps"]
    assert of(found, "communication")["gloo"]["state"] == "ok"
    assert expected or found["rules"], "they import what does not end the process"


@pytest.mark.slow
def test_a_missing_need(tmp_path: Path) -> None:
    line = "raise ModuleNotFoundError(\"No module named 'peft'\", name='peft')"
    code, found, _ = diagnose(tmp_path, broken(tmp_path, "peft", line))
    assert code == 1
    assert found["gaps"][0]["mend"] == install("peft")


def test_each_op_that_a_rule_may_call_is_asked() -> None:
    found = list(ops_of_rules())
    assert len(found) == len({op.name for _, op in found})
    assert {op.name for _, op in found} == {op.name for op in OPS if op.rule is not None}
    pairs = {op.name: rule for rule, op in found}
    assert pairs["dora"] == "lora_linear"
    assert pairs["linear_logprob"] == "linear_logprob"


OF_TRITON = {op.name for op in OPS if op.rule is not None} - {
    "attention",
    "dora",
    "dora_row_norms",
    "gated_delta_rule",
    "kda",
    "segment_attention",
    "selective_scan",
    "short_conv",
    "ssd",
}
"""The ops that have kernels of Triton."""


@pytest.mark.long
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_what_triton_runs(tmp_path: Path) -> None:
    """In its interpreter, tensors on the CPU get the kernels that they would get on a GPU."""
    code, found, _ = diagnose(tmp_path, TRITON_INTERPRET="1")
    assert code == 0
    assert "runs a kernel" in found["Triton"][0]["note"]
    assert {row["op"] for row in found["rules"] if row["bfloat16"] == "Triton"} == OF_TRITON


def test_what_is_kept_for_later_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("glu-1.so", "verdict-1.json", "verdict-2.json", "choice-1.json", "other"):
        (tmp_path / name).touch()
    monkeypatch.setattr(build, "kept_folder", lambda cache, make: tmp_path)
    (result,) = _kept()
    assert result.value == "1 libraries, 2 verdicts, 1 choices"
    assert result.note == str(tmp_path)

    def none_there(cache: str | None, make: bool) -> Path:
        raise PermissionError("others may write to it")

    monkeypatch.setattr(build, "kept_folder", none_there)
    assert _kept() == []
