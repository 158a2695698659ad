"""Attention on the CPU: parity with PyTorch's, masks, gradients, memory, tracing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fusewright.kernels.attention import attention as attention_tiles
from fusewright.kernels.attention import flex
from fusewright.kernels.attention.attention import OP, attention, attention_reference
from fusewright.kernels.attention.first_keys import first_keys, sample_mask
from fusewright.kernels.attention.flex import attention_by_flex
from fusewright.kernels.op import starts_of

from .util import Watch, assert_parity, assert_parity_of_draws, saved_tensors

B16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _qkv(
    batch: int, heads: int, groups: int, time: int, keys: int, dim: int, value_dim: int,
    dtype: torch.dtype, size: float = 1.0, projected: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(time)

    def make(n: int, length: int, width: int, factor: float) -> Tensor:
        t = factor * torch.randn(batch, length, n, width, generator=generator)
        t = t.transpose(1, 2)
        return (t if projected else t.contiguous()).to(dtype).requires_grad_()

    return (
        make(heads, time, dim, size),
        make(groups, keys, dim, size),
        make(groups, keys, value_dim, 1.0),
    )


def _check(ours: Attend, reference: Attend, *tensors: Tensor) -> None:
    """The error budget; in fp64, where only the order of sums differs, closeness."""
    if tensors[0].dtype is not F64:
        return assert_parity(ours, reference, *tensors)
    got, want = ours(*tensors), reference(*tensors)
    upstream = torch.randn(got.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    needed = [t for t in tensors if t.requires_grad]
    for a, b in zip(
        torch.autograd.grad(got, needed, upstream),
        torch.autograd.grad(want, needed, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    return None


def _packed_mask(batch: int, time: int) -> Tensor:
    """Block-causal: two samples in a row, cut at another place in each batch element."""
    order = torch.arange(time)
    cuts = torch.arange(1, batch + 1)[:, None] * time // (batch + 1)
    sample = order[None] >= cuts
    causal = order[:, None] >= order[None]
    return (causal & (sample[:, :, None] == sample[:, None, :]))[:, None]


@settings(max_examples=30, deadline=None)
@given(
    heads=st.sampled_from(((3, 3), (6, 2), (4, 1), (9, 3))),
    time=st.sampled_from((1, 7, 64, 129, 200)),
    batch=st.integers(1, 2),
    dims=st.sampled_from(((16, 16), (24, 8), (5, 3))),
    dtype=st.sampled_from((B16, F64, torch.float16)),
    causal=st.booleans(),
    scale=st.sampled_from((None, 0.3)),
    size=st.sampled_from((1.0, 3.0)),
    projected=st.booleans(),
)
@example(  # probabilities near one: where they were rounded too early, dq was off
    heads=(3, 3), time=7, batch=1, dims=(24, 8), dtype=B16, causal=False, scale=0.3, size=3.0,
    projected=False,
)  # fmt: skip
def test_parity(
    heads: tuple[int, int], time: int, batch: int, dims: tuple[int, int], dtype: torch.dtype,
    causal: bool, scale: float | None, size: float, projected: bool,
) -> None:  # fmt: skip
    q, k, v = _qkv(batch, *heads, time, time, *dims, dtype, size, projected)
    _check(
        lambda q, k, v: attention(q, k, v, scale, causal),
        lambda q, k, v: OP.reference(q, k, v, scale, causal),
        q, k, v,
    )  # fmt: skip


@pytest.mark.parametrize("time", [507, 768])
def test_parity_over_several_tiles(time: int) -> None:
    q, k, v = _qkv(1, 6, 2, time, time, 64, 64, B16, 2.0)
    _check(
        lambda q, k, v: attention(q, k, v, None, True),
        lambda q, k, v: OP.reference(q, k, v, None, True),
        q, k, v,
    )  # fmt: skip


def test_small_budgets_cut_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tiles, "_CACHED", 128 * 4 * 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # the budget is per thread
    q, k, v = _qkv(3, 4, 2, 140, 140, 16, 16, F64)
    mask = torch.rand(3, 4, 140, 140, dtype=F64) - 0.3 > 0
    for part in (None, mask, mask[:1], mask[:, :1]):
        assert len(list(attention_tiles.tiles(q, k, part is None, part, None))) > 6
        ours = attention(q, k, v, None, part is None, part)
        torch.testing.assert_close(ours, OP.reference(q, k, v, None, part is None, part))


@settings(max_examples=20, deadline=None)
@given(
    heads=st.sampled_from(((3, 3), (6, 2), (9, 3))),
    time=st.sampled_from((1, 33, 200, 300)),
    often=st.sampled_from((0.0, 0.02, 0.5)),
    window=st.sampled_from((None, 1, 40)),
    dtype=st.sampled_from((B16, F32, F64)),
    options=st.sampled_from(((False, None), (True, 2.0))),
)
def test_first_keys_are_a_mask(
    heads: tuple[int, int], time: int, often: float, window: int | None, dtype: torch.dtype,
    options: tuple[bool, float | None],
) -> None:  # fmt: skip
    """What is computed is the same, bit for bit, as with the mask that is made of them."""
    begins = torch.rand(2, time, generator=torch.Generator().manual_seed(time)) < often
    first = first_keys(starts_of(begins), window)
    qkv = _qkv(2, *heads, time, time, 16, 16, dtype)
    sinks = torch.linspace(-1, 1, heads[0]).requires_grad_() if options[0] else None
    found = []
    for mask in (first, sample_mask(first)):
        out = attention(*qkv, 0.3, False, mask, None, sinks, options[1])
        needed = [*qkv, *([] if sinks is None else [sinks])]
        found.append((out, *torch.autograd.grad(out.square().sum(), needed)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_first_keys_that_do_not_fit() -> None:
    q, k, v = _qkv(2, 2, 1, 8, 8, 16, 16, F32)
    first = first_keys(torch.zeros(2, 8, dtype=torch.int32))
    for bad in (first[:, :, :7], first.expand(-1, 2, -1, -1), first.expand(-1, -1, -1, 8)):
        with pytest.raises(ValueError, match="first keys"):
            attention(q, k, v, None, False, bad)
    with pytest.raises(ValueError, match="first keys"):
        attention(q, k[:, :, :5], v[:, :, :5], None, False, first)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(("packed", "padded", "per head", "random", "all")),
    additive=st.sampled_from((None, "inf", "min")),
    time=st.sampled_from((1, 9, 150)),
    dtype=st.sampled_from((F64, B16)),
)
def test_masks(kind: str, additive: str | None, time: int, dtype: torch.dtype) -> None:
    q, k, v = _qkv(2, 6, 2, time, time, 16, 16, dtype)
    generator = torch.Generator().manual_seed(time)
    mask = {
        "packed": lambda: _packed_mask(2, time),
        "padded": lambda: torch.arange(time).ge(time // 3).expand(2, 1, 1, time),
        "per head": lambda: torch.rand(1, 6, time, time, generator=generator) > 0.5,
        "random": lambda: torch.rand(2, 6, time, time, generator=generator) > 0.9,  # some see none
        "all": lambda: torch.ones(1, 1, time, time, dtype=torch.bool),
    }[kind]()

    def given(dtype: torch.dtype) -> Tensor:
        if additive is None:
            return mask
        hide = -torch.inf if additive == "inf" else torch.finfo(dtype).min
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hide)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # PyTorch's flash kernel has wrong gradients in rows where a finite mask hides every key
        with sdpa_kernel(SDPBackend.MATH):
            return OP.reference(q, k, v, None, False, given(q.dtype))

    _check(lambda q, k, v: attention(q, k, v, None, False, given(q.dtype)), reference, q, k, v)


def test_hidden_keys_are_skipped() -> None:
    time = 512
    q, k, v = _qkv(1, 2, 1, time, time, 8, 8, F32)
    mask = _packed_mask(1, time)  # cut at 256
    keys = [(t.keys.start, t.keys.stop) for t in attention_tiles.tiles(q, k, False, mask, None)]
    assert keys == [(0, 128), (0, 256), (256, 384), (256, 512)]
    keys = [(t.keys.start, t.keys.stop) for t in attention_tiles.tiles(q, k, True, None, 100)]
    assert keys == [(0, 128), (29, 256), (157, 384), (285, 512)]
    poisoned = v.detach().index_fill(2, torch.arange(256, 512), torch.nan)
    assert attention(q, k, poisoned, None, False, mask)[:, :, :256].isfinite().all()


@pytest.mark.parametrize("window", [1, 5, 128, 1000])
def test_windows(window: int) -> None:
    q, k, v = _qkv(2, 4, 2, 200, 200, 16, 16, B16)
    _check(
        lambda q, k, v: attention(q, k, v, None, True, None, window),
        lambda q, k, v: OP.reference(q, k, v, None, True, None, window),
        q, k, v,
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from(((3, 3), (6, 2), (4, 1))),
    time=st.sampled_from((1, 7, 64, 129)),
    dims=st.sampled_from(((16, 16), (24, 8), (5, 3))),
    dtypes=st.sampled_from(((B16, B16), (B16, F32), (F32, F32), (torch.float16, F32), (F64, F64))),
    kind=st.sampled_from(("causal", "window", "packed", "least", "bias", "none")),
    sinks=st.booleans(),
    softcap=st.sampled_from((None, 0.5, 30.0)),
    small=st.booleans(),
    size=st.sampled_from((1.0, 3.0)),
)
def test_sinks_and_softcaps(
    heads: tuple[int, int], time: int, dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype], kind: str, sinks: bool, softcap: float | None,
    small: bool, size: float,
) -> None:  # fmt: skip
    dtype, of_sinks = dtypes
    generator = torch.Generator().manual_seed(time)
    column = [torch.randn(heads[0], generator=generator).to(of_sinks)] if sinks else []
    mask = None
    assume(sinks or softcap or kind not in ("least", "bias"))
    if kind in ("packed", "least"):
        mask = _packed_mask(2, time)
        mask[:, :, time // 2] = False  # which sees nothing
    if kind == "least":  # and that is what transformers' masks are made of
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    if kind == "bias":
        mask = torch.randn(1, heads[0], 1, time, generator=generator).to(dtype)
    options = None, kind in ("causal", "window"), mask, 5 if kind == "window" else None

    def run(attend: Callable[..., Tensor], *given: Tensor) -> Tensor:
        q, k, v, *rest = given
        return attend(q, k, v, *options, *(rest or [None]), softcap)

    def draw() -> list[Tensor]:
        q, k, v = (
            torch.randn(2, time, n, d, generator=generator).to(dtype).transpose(1, 2)
            for n, d in ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]))
        )
        return [t.detach().requires_grad_() for t in (size * q, k, v, *column)]

    ours, reference = (functools.partial(run, f) for f in (attention, OP.reference))
    with mock.patch.object(attention_tiles, "_SMALL", 256 * small):
        if dtype is F64:
            _check(ours, reference, *draw())
        else:
            assert_parity_of_draws(ours, reference, draw)


@pytest.mark.parametrize("small", [0, 256])
def test_rows_that_are_nearly_sure_of_a_key(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sinks, the gradient of a row adds up to zero, as where models subtract the maximum."""
    monkeypatch.setattr(attention_tiles, "_SMALL", small)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        (4 * torch.randn(2, n, 65, 16, generator=generator) - 20).requires_grad_()
        for n in (4, 2, 2)
    )
    with torch.no_grad():
        k[..., 0] = 1.0  # so that the gradient of this feature of q is the sum of its row
    sinks = torch.full((4,), -1e4)
    out = attention(q, k, v, 0.3, True, None, None, sinks)
    (ours,) = torch.autograd.grad(out, q, torch.randn(out.shape, generator=generator))
    assert ours[..., 0].abs().max() < 1e-7 * ours.abs().max()


def test_more_keys_than_positions() -> None:
    q, k, v = _qkv(2, 4, 2, 5, 140, 16, 8, B16)
    _check(
        lambda q, k, v: attention(q, k, v, None, False),
        lambda q, k, v: OP.reference(q, k, v, None, False),
        q, k, v,
    )  # fmt: skip


def test_layouts_are_those_of_projections() -> None:
    q, k, v = _qkv(2, 4, 2, 9, 9, 8, 8, B16, projected=False)
    out = attention(q, k, v, None, True)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(t.transpose(1, 2).is_contiguous() for t in (out, *grads))


def _elements(t: Tensor) -> int:
    return t.untyped_storage().nbytes() // t.itemsize


def test_memory_does_not_grow_with_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tiles, "_CACHED", 1)
    q, k, v = _qkv(1, 2, 1, 1024, 1024, 4, 4, F32)
    sizes: list[int] = []
    with (
        Watch(lambda op, args, outs: sizes.extend(_elements(t) for t in outs)),
        saved_tensors() as saved,
    ):
        attention(q, k, v, None, True).sum().backward()
    assert max(sizes) <= 128 * 2 * 1024  # one tile
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (q, k, v)]


@pytest.mark.parametrize("masked", [False, True])
def test_inductor_traces_it_once_for_all_lengths(masked: bool) -> None:
    def ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention(q.sin(), k, v, None, mask is None, mask).transpose(1, 2).flatten(2)

    def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return OP.reference(q.sin(), k, v, None, mask is None, mask).transpose(1, 2).flatten(2)

    graphs = []

    def backend(graph, inputs):
        from torch._inductor.compile_fx import compile_fx

        graphs.append(graph)
        return compile_fx(graph, inputs)

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    for time in (140, 30):
        q, k, v = _qkv(2, 4, 2, time, time, 16, 16, B16)
        mask = _packed_mask(2, time) if masked else None
        with functorch_config.patch(donated_buffer=False):  # backward runs twice over one graph
            assert_parity(
                lambda q, k, v, m=mask: compiled(q, k, v, m),
                lambda q, k, v, m=mask: reference(q, k, v, m),
                q, k, v,
            )  # fmt: skip
    assert len(graphs) == 1


def test_refusals(choose_for: Callable[[str], None]) -> None:
    q, k, v = (t.detach() for t in _qkv(2, 4, 2, 6, 6, 8, 8, F64))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    assert OP.unsupported(q, k, v, None, True) == []
    assert OP.unsupported(q, k, v, None, False, mask) == []
    learnt = torch.zeros(1, 4, 6, 6, requires_grad=True)
    for args, reason in (
        ((q, k, v.float(), None, True), "dtype"),
        ((q, k[:, :, :5], v[:, :, :5], None, True), "more keys"),
        ((q, k, v[:, :1], None, True), "fit"),
        ((q[:, :3], k, v, None, True), "multiple"),
        ((q, k, v, None, True, mask), "causal with a mask"),
        ((q, k, v, None, False, None, 3), "window"),
        ((q, k, v, None, False, mask.long()), "neither boolean"),
        ((q, k, v, None, False, learnt), "requires a gradient"),
        ((q, k, v, None, True, None, None, torch.zeros(2)), "not one of each head"),
        ((q, k, v, None, True, None, None, torch.zeros(4).long()), "not floating-point"),
        ((q, k, v, None, True, None, None, None, -1.0), "not positive"),
        ((q[0], k[0], v[0], None, False), "4 dimensions"),
        ((*tuple(t.to("meta") for t in (q, k, v)), None, True), "on the CPU"),
    ):
        assert any(reason in why for why in OP.unsupported(*args)), reason
        with pytest.raises(ValueError, match=reason):
            attention(*args)
    choose_for("amx")
    for dtype in (F32, torch.float16):
        assert OP.unsupported(*(t.to(dtype) for t in (q, k, v)), None, True)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("avx2", ""), ("avx512", ""), ("avx512_bf16", ""), ("amx", "AMX")],
)
def test_which_cpus_gain_in_bfloat16(
    kind: str, reason: str, choose_for: Callable[[str], None]
) -> None:
    choose_for(kind)
    q, k, v = (t.detach() for t in _qkv(1, 2, 1, 4, 4, 8, 8, B16))
    reasons = OP.unsupported(q, k, v, None, True)
    assert len(reasons) == bool(reason)
    assert all(reason in why for why in reasons)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 100, 200])
@pytest.mark.parametrize("length", [1, 128, 129, 600])
@pytest.mark.parametrize("samples", [0, 1, 3])
def test_blocks_of_first_keys_are_those_of_the_mask(
    samples: int, length: int, window: int | None
) -> None:
    """As PyTorch makes them from all pairs of positions."""
    q, mask = torch.randn(max(samples, 1), 2, length, 8), None
    if samples:
        starts = torch.randint(0, length, (samples, 4)).sort(-1).values
        rows = torch.arange(length)
        begun = (starts[:, None] <= rows[:, None]).int() * starts[:, None]
        mask = first_keys(begun.amax(-1).int())
    ours = flex._blocks(q, mask is None, mask, window)
    assert ours is not None
    batch = samples if samples > 1 else None
    theirs = create_block_mask(ours.mask_mod, batch, None, length, length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)  # masked pair by pair
    torch.testing.assert_close(
        flex_attention(q, q, q, block_mask=ours), flex_attention(q, q, q, block_mask=theirs)
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("kind", ["causal", "samples", "window", "boolean", "additive"])
def test_the_form_for_gpus_agrees_on_a_cpu(
    kind: str, has_sinks: bool, softcap: float | None
) -> None:
    """Forward: PyTorch has no backward of FlexAttention on a CPU."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 13, 16, dtype=torch.float64) for heads in (6, 2, 2))
    causal, window, mask = kind in ("causal", "window"), 5 if kind == "window" else None, None
    if kind == "samples":
        starts = torch.tensor([[0] * 4 + [4] * 9, [0] * 13], dtype=torch.int32)
        mask = first_keys(starts, 6)
    elif kind in ("boolean", "additive"):
        mask = torch.rand(2, 1, 13, 13) < 0.6
        mask |= torch.eye(13, dtype=torch.bool)
    if kind == "additive" and mask is not None:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    sinks = torch.randn(6, dtype=q.dtype) if has_sinks else None
    args = q, k, v, 0.3, causal, mask, window, sinks, softcap
    torch.testing.assert_close(attention_by_flex(*args), attention_reference(*args))
