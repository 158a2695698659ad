from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fusewright.kernels.linear import projections
from fusewright.kernels.linear import quantized as quantized_module
from fusewright.kernels.linear.linear import (
    LORA_LINEAR,
    QKV_BLOCK,
    QUANT_LINEAR,
    quant_linear,
    quant_linear_reference,
)
from fusewright.kernels.linear.projections import Linear
from fusewright.kernels.linear.quantized import (
    FORMATS,
    FourBits,
    Quantized,
    WeightFormat,
    dequantize,
    dequantize_reference,
    example_of_quantized,
    scales,
)
from fusewright.kernels.op import Maker
from fusewright.kernels.tolerance import exceeded

from .by_parts import LORA
from .quantized_weights import packed_as, random_weight
from .util import assert_parity, saved_tensors

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
KINDS = [("nf4", 64, True), ("nf4", 128, False), ("fp4", 64, False), ("fp4", 32, True)]


def _bitsandbytes(w: Tensor, kind: str, blocksize: int, nested: bool) -> tuple[Quantized, ...]:
    """A weight as bitsandbytes quantizes it, and its own state."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    packed, state = bnb.functional.quantize_4bit(
        w, blocksize=blocksize, quant_type=kind, compress_statistics=nested
    )
    size = (w.shape[0], w.shape[1])
    if not nested:
        return Quantized(FourBits(packed, state.absmax), size, blocksize, kind), state
    inner = (state.absmax, state.state2.code, state.offset)
    return Quantized(FourBits(packed, state.state2.absmax, *inner), size, blocksize, kind), state


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("kind", "blocksize", "nested"), KINDS)
@pytest.mark.parametrize("shape", [(24, 128), (33, 70), (5, 7), (16, 96)], ids=str)
def test_the_weight_is_that_of_bitsandbytes_bit_for_bit(shape, kind, blocksize, nested, dtype):
    w, state = _bitsandbytes(torch.randn(shape).to(dtype), kind, blocksize, nested)
    theirs = pytest.importorskip("bitsandbytes").functional.dequantize_4bit(w.tensors[0], state)
    assert torch.equal(dequantize(w, dtype), theirs)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("kind", "blocksize", "nested"), [*KINDS, ("nf4", 4096, True)])
@pytest.mark.parametrize("shape", [(24, 128), (160, 1024), (5, 7)], ids=str)
def test_plain_pytorch_gives_the_same_weight(shape, kind, blocksize, nested, dtype):
    """Rows of whole blocks, or odd ones: for others bitsandbytes' CPU kernel errs (0.50)."""
    w, state = _bitsandbytes(torch.randn(shape).to(dtype), kind, blocksize, nested)
    theirs = pytest.importorskip("bitsandbytes").functional.dequantize_4bit(w.tensors[0], state)
    assert torch.equal(dequantize_reference(w, dtype), theirs)


def test_the_reference_undoes_quantization_in_any_shape():
    for shape in ((64, 96), (48, 32), (9, 70)):
        w = torch.randn(shape)
        packed, _ = _bitsandbytes(w, "nf4", 64, True)
        assert (dequantize_reference(packed, F32) - w).norm() < 0.12 * w.norm()


def test_storage_in_another_dtype_holds_the_same_bytes():
    w = random_weight((8, 64), nested=True)
    for dtype in (BF16, F32):
        stored = packed_as(w, w.tensors[0].view(-1).view(dtype).view(-1, 1))
        assert torch.equal(dequantize_reference(stored, F32), dequantize_reference(w, F32))
    assert scales(w).shape == (8,)
    assert w.nbytes() == 8 * 32 + 8 + 4 * (1 + 256 + 1)


def _over(op: Callable[..., Tensor], w: Quantized, **kwargs: object) -> Callable[..., Tensor]:
    """``op`` with the weight put in its place, and a scale after five operands."""

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        if len(rest) < 3:
            return op(x, w, *rest)
        return op(x, w, *rest[:3], 1.7, *rest[3:], **kwargs)

    return call


def _inputs(shape, w: Quantized, dtype, adapter=None, own=None, lora_bias=False) -> list[Tensor]:
    """x, bias and, with an adapter, A, B, its own input and its bias."""
    out, into = w.shape
    made = [torch.randn(*shape, into).to(dtype), torch.randn(out).to(dtype)]
    if adapter is not None:
        made += [torch.randn(4, into) * into**-0.5, torch.randn(out, 4) * 0.3]
        made[2:] = [t.to(adapter) for t in made[2:]]
        made += [torch.randn(*shape, into).to(own)] if own else []
        made += [torch.randn(out).to(adapter)] if lora_bias else []
    return [t.requires_grad_() for t in made]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("kind", "blocksize", "nested"), [*KINDS, ("int8", 0, False)])
@pytest.mark.parametrize(
    ("rows", "size"), [((3, 17), (40, 128)), ((9,), (33, 70)), ((0, 2), (7, 64))]
)
def test_parity(rows, size, kind, blocksize, nested, dtype):
    torch.manual_seed(0)
    w = random_weight(size, kind, blocksize, nested)
    x, bias = _inputs(rows, w, dtype)
    if 0 in rows:
        assert quant_linear(x, w, bias).shape == (*rows, size[0])
        return
    for inputs in ((x, bias), (x,)):
        assert_parity(_over(quant_linear, w), _over(quant_linear_reference, w), *inputs)


@pytest.mark.parametrize(
    ("dtype", "adapter"), [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)], ids=str
)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_parity_with_an_adapter(dtype, adapter, own, lora_bias, wide):
    torch.manual_seed(0)
    w = random_weight((31, 64), nested=True)
    inputs = _inputs((2, 33), w, dtype, adapter, F32 if wide else adapter, lora_bias)
    if not own:
        del inputs[4]

    def over(op):
        def call(x, bias, a, b, *rest):
            rest = list(rest)
            z = rest.pop(0) if own else None
            return op(x, w, bias, a, b, 2.0, z, *(rest or [None]), F32 if wide else None)

        return call

    assert_parity(over(LORA.call), over(LORA.reference), *inputs)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("kind", "blocksize", "nested"), KINDS[:3])
def test_like_the_layer_of_bitsandbytes(dtype, kind, blocksize, nested):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    w, state = _bitsandbytes(torch.randn(40, 128).to(dtype), kind, blocksize, nested)
    x, bias = _inputs((2, 9), w, dtype)
    upstream = torch.randn(2, 9, 40).to(dtype)
    theirs = bnb.matmul_4bit(x, w.tensors[0], bias=bias, quant_state=state)
    mine = quant_linear(x, w, bias)
    grads = [torch.autograd.grad(y, (x, bias), upstream) for y in (mine, theirs)]
    wide = [t.detach().double().requires_grad_() for t in (x, bias)]
    exact = quant_linear_reference(wide[0], w, wide[1])
    grads.append(torch.autograd.grad(exact, wide, upstream.double()))
    for triple in ((mine, theirs, exact), *zip(*grads, strict=True)):
        assert exceeded(*triple) is None


def test_nothing_of_the_size_of_the_weight_is_kept():
    w = random_weight((96, 128), nested=True)
    x, bias, a, b = _inputs((4, 8), w, BF16, F32)
    with saved_tensors() as kept:
        quant_linear(x, w, bias)
        LORA.call(x, w, bias, a, b, 2.0)
    floats = [t for t in kept if t.is_floating_point()]
    assert max(t.numel() for t in floats) == x.numel() < 96 * 128


def test_only_wanted_gradients_are_computed(monkeypatch):
    w = random_weight((12, 64))
    x, bias, a, b = _inputs((6,), w, F32, F32)
    calls: list[bool] = []
    products = projections.quantized_products
    monkeypatch.setattr(
        projections,
        "quantized_products",
        lambda *args, **kw: calls.append(True) or products(*args, **kw),
    )
    x.requires_grad_(False)
    out = LORA.call(x, w, bias, a, b, 2.0)
    torch.autograd.grad(out, (a, b, bias), torch.ones_like(out))
    assert len(calls) == 1  # no dX, no second copy of the weight


def test_strided_inputs_and_gradients():
    w = random_weight((12, 64))
    x = torch.randn(64, 6, 3).permute(2, 1, 0).requires_grad_()
    mine, theirs = quant_linear(x, w), quant_linear_reference(x, w)
    for make in (lambda y: y.sum(), lambda y: y.transpose(0, 1)[1].mean()):
        grads = [torch.autograd.grad(make(y), x, retain_graph=True)[0] for y in (mine, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_autocast_casts_the_adapter_and_not_the_base():
    w = random_weight((12, 64))
    x, _, a, b = _inputs((6,), w, BF16, F32)
    with torch.autocast("cpu", BF16):
        assert quant_linear(x.float(), w).dtype is F32
        mine = LORA.call(x, w, None, a, b, 2.0)
    exact = LORA.reference(x.double(), w, None, a.double(), b.double(), 2.0)
    with torch.autocast("cpu", BF16):
        theirs = LORA.reference(x, w, None, a, b, 2.0)
    assert exceeded(mine, theirs, exact) is None
    assert [g.dtype for g in torch.autograd.grad(mine.sum(), (a, b))] == [F32, F32]


def test_autocast_leaves_the_bias_of_every_quantized_layer() -> None:
    """It has more digits than bf16, and would lose them."""
    w = random_weight((12, 64))
    x, bias, a, b = _inputs((6,), w, F32, F32)
    layers = [Linear(w, bias + 1e-4, a, b, 2.0) for _ in range(2)]
    with torch.autocast("cpu", BF16):
        one, two = QKV_BLOCK.call(x, layers)
        without = QKV_BLOCK.call(x, [layer._replace(bias=None) for layer in layers])
    for result, bare in zip((one, two), without, strict=True):
        # the rounding of fp32 sums, as the difference cancels them; bf16's is a hundred times that
        torch.testing.assert_close(result - bare, (bias + 1e-4).expand_as(bare), rtol=0, atol=1e-5)


@pytest.mark.long
def test_inductor_traces_the_ops_and_keeps_no_copy():
    w = random_weight((96, 64), nested=True)
    x, _, a, b = _inputs((3, 5), w, BF16, F32)

    @torch.compile(fullgraph=True, dynamic=True, backend="inductor")
    def compiled(x: Tensor) -> Tensor:
        y = LORA.call(x, w, None, a, b, 2.0)
        return torch.sin(y)

    with saved_tensors() as kept:
        y = compiled(x)
    eager = torch.sin(LORA.call(x, w, None, a, b, 2.0))
    upstream = torch.randn_like(y)
    assert not any(t.is_floating_point() and t.numel() == 96 * 64 for t in kept)
    pairs = zip(
        (y, *torch.autograd.grad(y, (x, a, b), upstream)),
        (eager, *torch.autograd.grad(eager, (x, a, b), upstream)),
        strict=True,
    )
    for mine, theirs in pairs:
        assert (mine - theirs).norm() / theirs.norm() < torch.finfo(BF16).eps


def _rows_of_fp8(m: Maker, out: int, into: int, kind: str) -> Quantized:
    packed = m.normal(out, into, dtype=F32).to(torch.float8_e4m3fn)
    scales_of_rows = into**-0.5 * (1 + m.normal(out, dtype=F32).abs())
    return Quantized((packed, scales_of_rows), (out, into), into, kind)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_format_is_one_record(dtype, monkeypatch):
    """Products, gradients and reasons of all ops follow from what it says."""
    record = WeightFormat(
        lambda w, dtype: w.tensors[0].to(dtype) * w.tensors[1].to(dtype)[:, None],
        lambda w: [] if w.tensors[0].itemsize == 1 else ["not of 8 bits"],
        _rows_of_fp8,
    )
    monkeypatch.setitem(FORMATS, "fp8", record)
    m = Maker(dtype, generator=torch.Generator().manual_seed(0))
    first, second = (example_of_quantized(m, out, 64, "fp8") for out in (31, 8))
    inputs = _inputs((2, 33), first, dtype, dtype)

    def over(*calls):
        def run(x, bias, a, b):
            adapted = Linear(first, bias, a, b, 2.0)
            one, plain, several = calls
            return one(x, adapted), plain(x, second), *several(x, [adapted, Linear(second)])

        return run

    ops = LORA_LINEAR, QUANT_LINEAR, QKV_BLOCK
    ours, theirs = over(*(op.call for op in ops)), over(*(op.reference for op in ops))
    assert_parity(ours, theirs, *inputs)
    assert QUANT_LINEAR.unsupported(inputs[0], first) == []
    wide = packed_as(first, first.tensors[0].float())
    assert QUANT_LINEAR.unsupported(inputs[0], wide) == ["not of 8 bits"]


def test_reasons():
    w = random_weight((12, 64), nested=True)
    x, bias, a, b = _inputs((6,), w, BF16, F32)
    reasons = QUANT_LINEAR.unsupported
    assert reasons(x, w, bias) == []
    assert "features" in reasons(x[:, :32], w)[0]
    assert "the bias is" in reasons(x, w, bias.float())[0]
    assert "too few" in reasons(x, packed_as(w, w.tensors[0][:5]))[0]
    assert "too few" in reasons(x, packed_as(w, w.tensors[0].flatten()[:-1]))[0]
    assert "of kind int3" in reasons(x, w._replace(kind="int3"))[0]
    assert "not complete" in reasons(x, w._replace(tensors=(*w.tensors[:4], None)))[0]
    assert "several devices" in reasons(x.to("meta"), w)[0]
    assert LORA.unsupported(x, w, bias, a, b, 2.0) == []
    assert "do not chain" in LORA.unsupported(x, w, bias, a[:, :8], b, 2.0)[0]
    assert "narrower" in LORA.unsupported(x.float(), w, None, a, b, 2.0, dtype=BF16)[0]


def test_a_run_on_fake_tensors_leaves_none_behind() -> None:
    """As counting and planning make them: what is kept of a first call must be real."""
    kind = ("nf4", torch.bfloat16, torch.device("cpu"))
    with FakeTensorMode():
        fake = quantized_module.table(*kind)
    assert isinstance(fake, FakeTensor)
    assert type(quantized_module.table(*kind)) is Tensor
    assert quantized_module.table(*kind) is quantized_module.table(*kind)


def test_a_weight_that_a_kernel_would_make_is_traced() -> None:
    """Where there is no kernel, nothing but a trace for another device runs this."""
    w = random_weight((6, 10))
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = torch.ops.fusewright.dequantize_4bit(*w.tensors, *w.shape, w.blocksize, w.kind, BF16)
    assert isinstance(made, FakeTensor)
    assert (made.shape, made.dtype, made.device.type) == ((6, 10), BF16, "cpu")
    assert made.is_contiguous()
