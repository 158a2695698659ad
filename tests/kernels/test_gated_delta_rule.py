"""The delta rule: chunk borders, heads, strides and dtypes, and decays of any strength."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusewright.kernels.native import delta_rule as native
from fusewright.kernels.op import starts_of
from fusewright.kernels.processor import this_machine
from fusewright.kernels.scan.gated_delta_rule import CHUNK, KDA, OP
from fusewright.kernels.tolerance import exceeded

from .native import libraries
from .util import assert_parity_of_draws, saved_tensors

OPS = {op.name: op for op in (OP, KDA)}
each_op = pytest.mark.parametrize("name", OPS)


def _inputs(
    name: str, length: int, dtype: torch.dtype = torch.float64, batch: int = 2, groups: int = 2,
    each: int = 2, features: int = 6, values: int = 5, decay: float = 1.0, strided: bool = False,
) -> list[Tensor]:  # fmt: skip
    heads = groups * each
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    tensors = [
        torch.randn(batch, length, groups, features),
        torch.randn(batch, length, groups, features),
        torch.randn(batch, length, heads, values),
        -decay * torch.rand(batch, length, heads, *([features] if name == "kda" else [])) ** 4,
        torch.rand(batch, length, heads),
    ]
    if strided:  # as a convolution over time leaves them
        tensors[:3] = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in tensors[:3]]
    kinds = dtype, dtype, dtype, wide, dtype
    return [t.to(k).requires_grad_() for t, k in zip(tensors, kinds, strict=True)]


def _loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Any:
    """The definition, step by step, of normed queries and keys."""
    each = v.shape[2] // k.shape[2]
    q, k = ((t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt()) for t in (q, k))
    q, k = ((t.repeat_interleave(each, 2)) for t in (q / q.shape[-1] ** 0.5, k))
    outs = []
    for t in range(v.shape[1]):
        state = state * (
            g[:, t].exp()[..., None] if g.ndim == 4 else g[:, t].exp()[..., None, None]
        )
        known = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        change = beta[:, t, :, None] * (v[:, t] - known)
        state = state + k[:, t, :, :, None] * change[:, :, None]
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outs, 1), state


@each_op
@settings(deadline=None, max_examples=12)
@given(
    length=st.sampled_from((1, 2, 63, 64, 65, 128, 150)), groups=st.integers(1, 3),
    each=st.integers(1, 3), features=st.integers(1, 9), values=st.integers(1, 7),
    decay=st.sampled_from((0.0, 0.1, 2.0, 300.0)), strided=st.booleans(),
)  # fmt: skip
def test_it_is_the_loop_over_time(
    name: str, length: int, groups: int, each: int, features: int, values: int, decay: float,
    strided: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    sizes = {"groups": groups, "each": each, "features": features, "values": values}
    inputs = _inputs(name, length, decay=decay, strided=strided, **sizes)
    state = torch.randn(2, groups * each, features, values, dtype=torch.float64).requires_grad_()
    ours = OPS[name].call(*inputs, state, True)
    loop = _loop(*inputs, state)
    upstream = [torch.randn_like(t) for t in loop]
    grads = [torch.autograd.grad(outs, (*inputs, state), upstream) for outs in (ours, loop)]
    for a, b in zip((*ours, *grads[0]), (*loop, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_over_several_chunks_it_is_as_exact_as_one_chunk(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = _inputs(name, 2 * CHUNK + 9, dtype, features=16, values=16, strided=True)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    op, upstream = OPS[name], torch.randn(inputs[2].shape)

    def run(function: Any, tensors: list[Tensor]) -> list[Tensor]:
        out = function(*tensors, None, True)[0]
        return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]

    every = [run(op.call, inputs), run(op.reference, inputs), run(op.reference, wide)]
    problems = [exceeded(a[None], b[None], c[None]) for a, b, c in zip(*every, strict=True)]
    assert problems == [None] * 6


FORMS = {
    "C++": None,
    "C++ with AVX2": "-march=x86-64-v3",
    "C++ with AVX-512": "-march=x86-64-v4",
    "PyTorch": "",
}


@pytest.mark.long("C++ with AVX2", "C++ with AVX-512")
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_as_exact(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes, steps or features as neighbours, a state or segments, normed or not."""
    flags = FORMS[form]
    if flags == "":
        libraries.use(monkeypatch, None)
    else:
        libraries.require()
    if flags:
        vectors = ("AVX2", "AVX512") if flags.endswith("3") else ("AVX512",)
        if this_machine().vectors not in vectors:
            pytest.skip(f"this CPU has no {vectors[0]}")
        libraries.use(monkeypatch, libraries.compiled(tmp_path, flags, name="delta_rule"))
    torch.manual_seed(0)
    for length, dtype, strided, l2norm, from_state in (
        (3, torch.float32, False, True, True), (137, torch.float32, True, False, True),
        (64, torch.bfloat16, False, True, False), (130, torch.bfloat16, True, True, False),
    ):  # fmt: skip
        segments = None if from_state else starts_of(torch.rand(2, length) < 0.1)

        def draw(
            length: int = length, dtype: Any = dtype, strided: bool = strided,
            l2norm: bool = l2norm, from_state: bool = from_state,
        ) -> list[Tensor]:  # fmt: skip
            inputs = _inputs("gated_delta_rule", length, dtype, 2, 2, 2, 37, 19, 1.0, strided)
            if not l2norm:
                inputs[1] = (inputs[1].detach() / 37).requires_grad_()
            return [*inputs, *([torch.randn(2, 4, 37, 19).requires_grad_()] if from_state else [])]

        def run(function: Any, options: Any = (l2norm, segments)) -> Any:
            return lambda *t: function(*t[:5], t[5] if len(t) > 5 else None, *options)

        assert native.takes(*draw()[:4]) == (flags != "")
        assert_parity_of_draws(run(OP.call), run(OP.reference), draw)


@each_op
def test_decays_of_any_strength_are_finite(name: str) -> None:
    """Also where what is left after a few steps is no number any more."""
    inputs = _inputs(name, 70, torch.float32, decay=500.0)
    with torch.no_grad():
        inputs[3][:, 5:9] = -90.0
        inputs[3][:, 20] = -1e4
    out, state = OPS[name].call(*inputs, None, True)
    grads = torch.autograd.grad(out.sum() + state.sum(), inputs)
    assert all(bool(t.isfinite().all()) for t in (out, state, *grads))


@each_op
def test_what_is_kept_is_the_inputs_and_a_state_for_each_chunk(name: str) -> None:
    inputs = _inputs(name, 3 * CHUNK)
    with saved_tensors() as kept:
        OPS[name].call(*inputs, None, True)
    states = 3 * 2 * 4 * 6 * 5
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in inputs) + states


@each_op
def test_under_autocast_sums_are_in_fp32(name: str) -> None:
    inputs = _inputs(name, 70, torch.float32)
    outs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = OPS[name].call(*inputs, None, True)[0]
        outs.append((out, *torch.autograd.grad(out.sum(), inputs)))
    assert all(map(torch.equal, *outs))


@each_op
def test_no_steps_leave_the_state_as_it_was(name: str) -> None:
    inputs = _inputs(name, 0)
    state = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    out, final = OPS[name].call(*inputs, state, True)
    assert out.shape == (2, 0, 4, 5)
    assert torch.equal(final, state)
    last = torch.autograd.grad(final.sum(), state)[0]
    assert torch.equal(last, torch.ones_like(state))


def test_what_it_does_not_take() -> None:
    q, k, v, g, beta = _inputs("gated_delta_rule", 7)
    state, segments = torch.zeros(2, 4, 6, 5), starts_of(torch.zeros(2, 7, dtype=torch.bool))
    assert OP.unsupported(q, k, v, g, beta, state, True) == []
    assert "given state" in OP.unsupported(q, k, v, g, beta, state, True, segments)[0]
    assert "does not fit" in KDA.unsupported(q, k, v, g, beta)[0]
    assert "multiple" in OP.unsupported(q, k, v[:, :, :3], g, beta)[0]
    assert "not floating" in OP.unsupported(q, k, v, g, beta.int())[0]
    with pytest.raises(ValueError, match="does not fit"):
        OP.call(q, F.pad(k, (0, 1)), v, g, beta)
