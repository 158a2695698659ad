"""What choices by processor ask: what is found here, what narrows it, and what tests assume."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusewright.errors import FusewrightError
from fusewright.kernels import processor as module
from fusewright.kernels.linear import products
from fusewright.kernels.matmul import through_fp32
from fusewright.kernels.processor import KINDS, assume, processor, this_machine

from ..load import stretched


def _run(code: str, *arguments: str, **variables: str) -> str:
    """What a process says of its processor, and then by ``code``."""
    ask = "from fusewright.kernels.processor import processor; print(processor(), flush=True)"
    others = {k: v for k, v in os.environ.items() if k != "FUSEWRIGHT_PROCESSOR"}
    done = subprocess.run(
        [sys.executable, "-c", f"{ask}\n{code}", *arguments], env=others | variables,
        capture_output=True, text=True, check=False, timeout=stretched(300),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_another_processor_is_assumed_for_a_while() -> None:
    before = processor()
    with assume(KINDS["amx"]):
        with assume(KINDS["avx2"]):
            assert processor() is KINDS["avx2"]
        assert processor() is KINDS["amx"]
    with pytest.raises(ZeroDivisionError), assume(KINDS["amx"]):
        _ = 1 / 0
    assert processor() is before


@pytest.mark.parametrize("has", [False, True])
def test_products_that_are_imitated_go_through_float32(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN multiplies bfloat16 on any CPU with AVX-512, at a fifth of fp32's speed."""
    monkeypatch.setattr(module, "_is_x86", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert (torch.bfloat16 in this_machine().slow_products) is not has


@pytest.mark.parametrize("kind", KINDS)
def test_each_choice_asks_the_record(kind: str, choose_for: Callable[[str], None]) -> None:
    choose_for(kind)
    ours = KINDS[kind]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert through_fp32(torch.ones(1, dtype=dtype)) == (dtype in ours.slow_products)
    assert products._narrow_first(torch.ones(1)) == (kind in ("amx", "avx512"))


def test_instructions_by_their_names() -> None:
    assert KINDS["avx2"].instructions() == ["AVX2"]
    assert KINDS["avx512"].instructions() == ["AVX2", "AVX-512"]
    assert KINDS["amx"].instructions() == ["AVX2", "AVX-512", "AVX-512 bf16", "AMX"]


@pytest.mark.parametrize(
    ("variables", "avx512_bf16", "amx"),
    [
        ({}, True, True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True, False),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core"}, False, False),
        ({"DNNL_MAX_CPU_ISA": "AVX2"}, False, False),
        ({"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, True, True),
        ({"ONEDNN_MAX_CPU_ISA": "", "DNNL_MAX_CPU_ISA": "AVX2"}, False, False),
        ({"ONEDNN_MAX_CPU_ISA": "nonsense"}, True, True),  # which oneDNN does not heed
    ],
)
def test_what_onednn_may_not_use_is_not_there(
    variables: dict[str, str], avx512_bf16: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_is_x86", lambda: True)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ours = this_machine()
    assert (ours.avx512_bf16, ours.amx, ours.bfloat16) == (avx512_bf16, amx, avx512_bf16)


@pytest.mark.parametrize("has", [False, True])
def test_of_another_architecture_onednn_knows(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_x86", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    ours = this_machine()
    assert ours.bfloat16 is has
    assert (torch.bfloat16 in ours.slow_products) is not has


@pytest.mark.long("avx2-variables0")
@pytest.mark.long("avx512-variables1")
@pytest.mark.parametrize(
    ("kind", "variables"),
    [
        ("avx2", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
        ("avx512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    ],
)
def test_ops_on_this_processor_when_it_is_narrowed(kind: str, variables: dict[str, str]) -> None:
    """PyTorch and oneDNN, too, compute as on a lesser one."""
    if this_machine().vectors != "AVX512":
        pytest.skip(f"this CPU has no AVX512 to be narrowed, only {this_machine().vectors}")
    names = (
        "test_attention.py::test_windows", "test_attention.py::test_more_keys_than_positions",
    )  # fmt: skip
    tests = [str(Path(__file__).with_name(name)) for name in names]
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    said = _run(code, "-q", "-n", "0", "-p", "no:cacheprovider", *tests, **variables)
    assert said.splitlines()[0] == repr(KINDS[kind])


def test_a_process_can_be_told() -> None:
    assert _run("", FUSEWRIGHT_PROCESSOR="amx").strip() == repr(KINDS["amx"])
    with pytest.raises(FusewrightError, match="'486' is not one of avx2, avx512, avx512_bf16, amx"):
        module._named("486")
