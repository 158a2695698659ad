from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fusewright.kernels.norms import layer_norm as op
from fusewright.kernels.norms.layer_norm import OP, layer_norm, reference
from tests.kernels.util import assert_parity, assert_parity_of_draws, strided_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
PARAMETERS = tuple(itertools.product((False, True), repeat=2))
"""Whether there is a weight, and a bias."""
pytestmark = pytest.mark.usefixtures("seeded")


def _bind(
    fn: Callable[..., Tensor], weight: bool = True, bias: bool = True
) -> Callable[..., Tensor]:
    def call(x: Tensor, *given: Tensor) -> Tensor:
        w, b = (given[0] if weight else None), (given[-1] if bias else None)
        return fn(x, w, b, EPS)

    return call


@settings(max_examples=80, deadline=None)
@given(
    shape=st.sampled_from([(3, 123), (2, 5, 252), (1, 2, 3, 507), (507,), (33, 96)]),
    x_dtype=st.sampled_from(DTYPES),
    w_dtype=st.sampled_from(DTYPES),
    parameters=st.sampled_from(PARAMETERS),
    by_head=st.booleans(),
    trained=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 1000),
)
def test_parity(
    shape: tuple[int, ...],
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    parameters: tuple[bool, bool],
    by_head: bool,
    trained: tuple[bool, bool],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rows = shape[-2:] if by_head and parameters[0] else shape[-1:]
    others = [torch.Size(rows) for present in parameters if present]

    def draw() -> list[Tensor]:
        x = torch.randn(shape, dtype=x_dtype, requires_grad=trained[0])
        return [x, *(torch.randn(s, dtype=w_dtype, requires_grad=trained[1]) for s in others)]

    # the weight's gradient has few elements, each the sum of few rows
    assert_parity_of_draws(_bind(layer_norm, *parameters), _bind(reference, *parameters), draw)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype) -> None:
    w = torch.randn(96, dtype=dtype)[::2]
    b = torch.randn(48, dtype=dtype, requires_grad=True)
    for x in strided_rows(dtype):
        inputs = x.requires_grad_(), w.requires_grad_(), b
        assert_parity(_bind(layer_norm), _bind(reference), *inputs)
        assert layer_norm(x, w, b, EPS).stride() == reference(x, w, b, EPS).stride()


def test_a_wide_range_of_values() -> None:
    x = (torch.randn(64, 576) + 3) * torch.logspace(-12, 4, 64).unsqueeze(1)
    for dtype, by_head in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        rows = (64, 576) if by_head else (576,)
        inputs = [torch.randn(rows, dtype=dtype, requires_grad=True) for _ in range(2)]
        x = x.to(dtype).detach().requires_grad_()
        assert_parity(_bind(layer_norm), _bind(reference), x, *inputs)


def test_on_the_cpu_it_is_what_pytorch_computes() -> None:
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((4, 123), (123,), (123,)))
    y = layer_norm(x, w, b, EPS)
    eager = torch.nn.functional.layer_norm(x, (123,), w, b, EPS)
    assert torch.equal(y, eager)
    grads = (torch.autograd.grad(o, x, torch.ones_like(o), retain_graph=True) for o in (y, eager))
    assert all(torch.equal(a, c) for a, c in zip(*grads, strict=True))


@pytest.mark.parametrize("rows", [33, 1024, 8192])
def test_gradients_of_parameters_are_summed_in_a_tree(rows: int) -> None:
    """PyTorch's kernel adds them up row after row, in fp32."""
    w, b = torch.randn(96), torch.randn(96)
    assert_parity(_bind(layer_norm), _bind(reference), torch.randn(rows, 96),
                  w.requires_grad_(), b.requires_grad_())  # fmt: skip


@pytest.mark.parametrize("shape", [(123,), (4, 123)])
def test_under_activation_checkpointing_and_autocast(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 4, 123, dtype=torch.bfloat16, requires_grad=True)
    w, b = (torch.randn(shape, requires_grad=True) for _ in range(2))
    plain = _bind(layer_norm)
    upstream = torch.randn(2, 4, 123, dtype=torch.bfloat16)
    expected = torch.autograd.grad(plain(x, w, b), (x, w, b), upstream)
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(plain, x, w, b, use_reentrant=False)
        ours = torch.autograd.grad(y, (x, w, b), upstream)
    for a, c in zip(ours, expected, strict=True):
        assert torch.equal(a, c)


def test_reasons() -> None:
    x, w = torch.randn(2, 4, 16), torch.randn(16)
    assert OP.unsupported(x, w, w, EPS) == OP.unsupported(x.bfloat16(), None, None, EPS) == []
    assert OP.unsupported(x, torch.randn(4, 16), None, EPS) == []
    assert "not one per feature" in OP.unsupported(x, w[:8], None, EPS)[0]
    assert "the bias is" in OP.unsupported(x, w, w[:8], EPS)[0]
    assert "different shapes" in OP.unsupported(x, torch.randn(4, 16), w, EPS)[0]
    assert "one vector" in OP.unsupported(x, None, torch.randn(4, 16), EPS)[0]
    assert "not floating-point" in OP.unsupported(x.long(), w, None, EPS)[0]
    assert "not floating-point" in OP.unsupported(x, w.long(), None, EPS)[0]
    assert "no features" in OP.unsupported(torch.tensor(1.0), None, None, EPS)[0]
    assert "is on meta" in OP.unsupported(x, w.to("meta"), None, EPS)[0]
    with FakeTensorMode():
        long = torch.empty(2, op.MAX_DIM + 1, device="cuda")
        assert any("features" in r for r in OP.unsupported(long, None, None, EPS))
        wide = torch.empty(2, 16, device="cuda", dtype=torch.float64)
        assert any("fp64" in r for r in OP.unsupported(wide, None, None, EPS))
