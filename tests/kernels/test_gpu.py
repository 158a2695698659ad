"""On a real GPU: every op's Triton path against its reference, and its library ops' contracts.

Our kernels are tested: candidates are measured in one test only.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusewright.kernels import choice
from fusewright.kernels.op import Op
from fusewright.rewrite.op_table import OPS

from .calls import LAUNCHING, Call, library_calls, sized
from .util import assert_parity

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1, 64), (2, 123, 507), (2, 256, 2048))
"""(batch, seq, hidden): one token, odd sizes, and several blocks of everything."""


def make(name: str, shape: tuple[int, int, int], dtype: torch.dtype, train: bool) -> Call:
    case = replace(LAUNCHING[name], sizes=sized(*shape), dtype=dtype, train=train, device="cuda")
    call = case.call()
    assert not call.unsupported()
    return call


each_call = pytest.mark.parametrize("name", LAUNCHING)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@each_call
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("train", [False, True], ids=["frozen", "trained"])
def test_parity(name: str, dtype: torch.dtype, shape: tuple[int, int, int], train: bool) -> None:
    call = make(name, shape, dtype, train)
    assert_parity(call.ours, call.reference, *call.tensors)


@each_call
@pytest.mark.parametrize("train", [False, True], ids=["frozen", "trained"])
def test_library_ops_keep_their_contracts(name: str, train: bool) -> None:
    call = make(name, (3, 41, 252), torch.bfloat16, train)
    calls = list(library_calls(call))
    assert calls, "this op has Triton kernels, and none ran"
    for op, args in calls:
        torch.library.opcheck(op, args)


@each_call
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_whatever_takes_a_call_is_right(name: str, dtype: torch.dtype) -> None:
    """Our kernels and libraries'; one that is not fit for a call is refused for another reason."""
    for op, args in library_calls(make(name, (2, 256, 1024), dtype, train=True)):
        candidates = choice._OPS.get(op._schema.name.partition("::")[2])
        if candidates is None:
            continue
        found = candidates.measure(args)
        print(found)
        assert choice.OWN in found.microseconds, str(found)
        assert not [why for why in found.refused.values() if "exact" in why], str(found)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_doctor_says_what_launches(op: Op) -> None:
    rules = pytest.importorskip("fusewright.train.doctor.rules", reason="needs the extra `train`")
    found, _ = rules.implementation(op, torch.bfloat16, torch.device("cuda"))
    assert (found == "Triton") is (op in {case.op for case in LAUNCHING.values()})
