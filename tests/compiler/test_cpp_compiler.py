"""Inductor's C++ compiler: which vector instructions it may use, and when it is waited for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import codecache, config, cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile

from fusewright.compiler.codegen import cpp_compiler


class _Kind:
    def __init__(self, name: str, works: bool, tried: list[str]) -> None:
        self.name, self.works, self.tried = name, works, tried

    def __str__(self) -> str:
        return self.name

    def __bool__(self) -> bool:
        self.tried.append(self.name)
        return self.works


@pytest.mark.parametrize(
    ("working", "tried", "assumed"),
    [
        ("best good plain", ["best"], True),
        ("good plain", ["best", "good"], True),
        ("", ["best", "good", "plain"], None),  # Inductor finds out for itself
    ],
)
def test_what_comes_after_one_that_works_is_not_tried(
    working: str, tried: list[str], assumed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    names = ("of another CPU", "best", "good", "plain")
    kinds = [_Kind(name, name in working.split(), seen) for name in names]
    picked: list[Any] = []
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", kinds)
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["best", "good", "plain"])
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: picked.append(config.cpp.vec_isa_ok))
    before = config.cpp.vec_isa_ok
    cpp_compiler._find_vector_instructions()
    assert seen == tried
    assert picked == [assumed]
    assert config.cpp.vec_isa_ok == before


@pytest.mark.parametrize("refused", [False, True])
def test_headers_that_compile_prove_the_instructions(
    refused: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[Any] = []

    def compile_headers() -> None:
        done.append("headers")
        if refused and done.count("headers") == 1:
            raise RuntimeError("unrecognized command-line option")

    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["plain"])

    def pick() -> None:
        done.append(config.cpp.vec_isa_ok)
        assert cpu_vec_isa.VecAVX512().check_build("this is no program")
        with ThreadPoolExecutor(1) as pool:  # another thread's programs are compiled
            pool.submit(cpu_vec_isa.VecAVX512().check_build, "another").result()

    programs: list[str] = []
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda isa, code: programs.append(code))
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", pick)
    monkeypatch.setattr(cpp_compiler, "proof", lambda: tmp_path / "proof")
    monkeypatch.setattr(cpp_compiler, "_compile_headers", compile_headers)
    monkeypatch.setattr(cpp_compiler, "_forget_vector_instructions", lambda: done.append("forgot"))
    monkeypatch.setattr(cpp_compiler, "_find_vector_instructions", lambda: done.append("tried"))
    with config.patch({"cpp.vec_isa_ok": None, "cpp_cache_precompile_headers": True}):
        cpp_compiler._prepare()
    rest = ["forgot", "tried", "headers"] if refused else []
    assert done == [True, "headers", *rest]
    assert programs == ["another"]
    assert (tmp_path / "proof").exists() is not refused
    with config.patch({"cpp.vec_isa_ok": None, "cpp_cache_precompile_headers": True}):
        cpp_compiler._prepare()  # of a later process
    assert done[2 + len(rest) :] == [True, *["headers"] * refused]
    programs.clear()
    cpu_vec_isa.VecAVX512().check_build("later")
    assert programs == ["later"]


def test_what_was_taken_to_work_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    isa = cpu_vec_isa.VecAMX()
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", [isa])
    before = isa.build_arch_flags(), isa.is_amx_fp16_supported()
    isa._is_avx512_bf16_supported = isa._is_amx_fp16_supported = True
    type(isa).is_amx_fp16_supported.cache_clear()
    assert (isa.build_arch_flags(), isa.is_amx_fp16_supported()) != before
    cpp_compiler._forget_vector_instructions()
    assert (isa.build_arch_flags(), isa.is_amx_fp16_supported()) == before


def test_what_a_version_of_pytorch_lacks_is_not_replaced() -> None:
    with cpp_compiler._replaced(cpu_vec_isa, "no_such_function", lambda original: 1):
        assert not hasattr(cpu_vec_isa, "no_such_function")
    assert not hasattr(cpu_vec_isa, "no_such_function")


@pytest.mark.parametrize("started", [True, False])
def test_headers_are_compiled_after_the_kernels_that_are_needed_first(
    started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(cpp_compiler.native, "has_started", lambda: started)
    monkeypatch.setattr(cpp_compiler.native, "library", lambda: done.append("kernels"))
    compile_ = "_worker_compile_cpp"
    monkeypatch.setattr(codecache, compile_, lambda *_: done.append("headers"), raising=False)

    def load(source: str, device_type: str) -> None:
        done.append("preprocessed")
        codecache._worker_compile_cpp("lock", ())

    monkeypatch.setattr(codecache.CppPythonBindingsCodeCache, "load_async", load)
    cpp_compiler._compile_headers()
    assert done == ["preprocessed", *["kernels"] * started, "headers"]


@pytest.mark.parametrize(
    "settings", [{"cpp.vec_isa_ok": False}, {"cpp_cache_precompile_headers": False}]
)
def test_what_the_user_has_set_is_not_overridden(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(cpp_compiler, "_compile_headers", lambda: done.append("headers"))
    monkeypatch.setattr(cpp_compiler, "_find_vector_instructions", lambda: done.append("tried"))
    with config.patch(settings):
        thread = cpp_compiler.prepare(torch.nn.Linear(1, 1))
        assert thread is not None
        thread.join()  # before PyTorch 2.13, all threads have the settings of now
    assert done == ["tried", "headers"]


_REFUSING = """#!/bin/sh
for argument; do case "$argument" in -mavx*) echo "no $argument" >&2; exit 1;; esac; done
exec g++ "$@"
"""

_STEP = """
import copy, sys, torch
from torch._inductor import cpu_vec_isa
from fusewright import explain, optimize
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(32, 32)
    def forward(self, x):
        return x + self.linear(x).softmax(-1) * x.tanh()
class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(2))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
model = Stack()
eager = copy.deepcopy(model)
optimize(model, codegen="inductor")
x = torch.randn(2, 12, 32)
for m in (model, eager):
    m(x).square().sum().backward()
for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
    torch.testing.assert_close(mine.grad, theirs.grad)
print(explain(model))
print("instructions:", cpu_vec_isa.pick_vec_isa())
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to put a script around")
def test_a_compiler_that_refuses_the_instructions_is_used_without_them(tmp_path: Path) -> None:
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(_REFUSING.replace("exec g++", f"exec {shutil.which('g++')}"))
    compiler.chmod(0o755)
    environment = {
        **os.environ, "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _STEP], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "instructions: INVALID_VEC_ISA" in done.stdout
    assert "codegen inductor" in done.stdout
    assert "could not be captured" not in done.stdout


def test_headers_are_compiled_for_kernels_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled: list[str] = []
    precompile = lambda header, *args, **kwargs: compiled.append(header) or "header.h"  # noqa: E731
    monkeypatch.setattr(codecache, "_precompile_header", precompile)
    there, missing = tmp_path / "there.main.cpp", tmp_path / "missing.main.cpp"
    there.with_suffix(".so").touch()
    monkeypatch.setattr(codecache, "write", lambda code, *args, **kwargs: ("key", str(code)))
    with cpp_compiler.headers_for_new_kernels():
        assert codecache._precompile_header("before any kernel") == "header.h"
        assert codecache.write(there, "main.cpp", extra="") == ("key", str(there))
        assert codecache._precompile_header("of one that is there", "flags") == ""
        codecache.write(missing, "main.cpp")
        assert codecache._precompile_header("of a new one", "flags") == "header.h"
    assert compiled == ["before any kernel", "of a new one"]
    assert codecache._precompile_header is precompile


def test_kernels_are_awaited_at_the_end_and_only_in_this_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    awaited: list[str] = []
    original = lambda compilation, scope: awaited.append(scope["name"])  # noqa: E731
    monkeypatch.setattr(AsyncCompile, "wait", original)
    compilation = AsyncCompile()
    with cpp_compiler.kernels_awaited_last():
        compilation.wait({"name": "forward"})
        other = threading.Thread(target=compilation.wait, args=({"name": "another's"},))
        other.start()
        other.join()
        compilation.wait({"name": "backward"})
        assert awaited == ["another's"]
    assert awaited == ["another's", "forward", "backward"]
    assert AsyncCompile.wait is original


def test_nothing_is_awaited_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    awaited: list[Any] = []
    original = lambda compilation, scope: awaited.append(scope)  # noqa: E731
    monkeypatch.setattr(AsyncCompile, "wait", original)

    def fail() -> None:
        with cpp_compiler.kernels_awaited_last():
            AsyncCompile().wait({})
            raise ValueError("lowering")

    with pytest.raises(ValueError, match="lowering"):
        fail()
    assert awaited == []
    assert AsyncCompile.wait is original


@pytest.mark.long
def test_ctrl_c_leaves_no_half_of_inductor_behind() -> None:
    """Else no block would be compiled in the process any more."""
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True, check=False
    )
    assert done.stdout == "interrupted\ncompiled\n", done.stderr


_INTERRUPTED = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs it behind
import torch
from fusewright.compiler.codegen.cpp_compiler import prepare

class Interrupt:
    def find_spec(self, name, *_):
        if name == "torch._inductor.kernel.conv":  # Inductor's lowerings are being registered
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

sys.meta_path.insert(0, Interrupt())
model = torch.nn.Linear(2, 2)
try:
    prepare(model)
except KeyboardInterrupt:
    print("interrupted", flush=True)
prepare(model)
compiled = torch.compile(lambda x: (x @ x).sin())
assert torch.allclose(compiled(torch.ones(4, 4)), torch.full((4, 4), 4.0).sin())
print("compiled")
"""
