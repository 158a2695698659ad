"""The Triton kernels of attention under the interpreter: what they visit, layouts, contracts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusewright.kernels.attention.attention import OP, attention
from fusewright.kernels.attention.attention_tiles_triton import span
from fusewright.kernels.attention.attention_triton import CHUNK, mask_table
from fusewright.kernels.attention.first_keys import first_keys, is_first_keys, sample_mask
from fusewright.kernels.attention.sizes import GRAIN
from fusewright.kernels.op import starts_of
from tests.kernels.attention_masks import MASKS, additive, packed
from tests.kernels.interpreted import run
from tests.kernels.util import assert_parity_of_draws

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def draw(
    batch: int, heads: int, groups: int, time: int, keys: int, dim: int, value_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k and v as projections leave them; each call gives others."""
    sizes = (time, heads, dim), (keys, groups, dim), (keys, groups, value_dim)
    made = (torch.randn(batch, *size).transpose(1, 2).to(dtype) for size in sizes)
    q, k, v = (t.requires_grad_() for t in made)
    return q, k, v


def check(
    mask: Tensor | None, make: Callable[[], tuple[Tensor, ...]],
    window: int | None = None,
) -> None:  # fmt: skip
    """The error budget, forward and every gradient, against PyTorch's plainest attention."""
    q, k, _ = make()
    causal = mask is None and q.shape[2] == k.shape[2]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        is_bias = mask is not None and mask.is_floating_point()
        given = mask.to(q.dtype) if is_bias else mask
        # PyTorch's flash kernel has wrong gradients in rows where a finite mask hides every key
        with sdpa_kernel(SDPBackend.MATH):
            return OP.reference(q, k, v, None, causal, given, window)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, None, causal, mask, window)

    assert_parity_of_draws(ours, reference, make)


def check_parity() -> None:
    """Odd sizes, groups, heads wider than values, several tiles; with a mask and without one."""
    torch.manual_seed(0)
    for dtype, heads, time, keys, dims in (
        (FP32, (4, 2), 137, 137, (24, 8)),
        (FP16, (2, 2), 33, 130, (16, 16)),
        (FP32, (1, 1), 1, 1, (5, 3)),
        (FP32, (18, 1), 34, 34, (8, 8)),  # the gradients of a large group are made in parts
        (BF16, (4, 2), 66, 66, (24, 8)),
    ):
        make = functools.partial(draw, 1, *heads, time, keys, *dims, dtype)
        check(None, make)
        if time == keys:
            check(packed(1, time), make)
            check(None, make, window=20)


def check_sinks_and_softcaps() -> None:
    """Each alone and both, where some tiles are hidden; the scores reach the cap."""
    torch.manual_seed(0)
    mask = packed(1, 70)
    mask[:, :, 40:45] = False
    for dtype, options, capped in (
        (FP32, (True, None, 20), (None, 0.5)),
        (FP16, (False, mask, None), (None, 0.5)),
        (BF16, (False, additive(mask, torch.finfo(BF16).min, BF16), None), (None, 3.0)),
    ):
        for softcap in capped:

            def run(attend: Callable[..., Tensor], *given: Tensor) -> Tensor:
                q, k, v, *rest = given
                return attend(q, k, v, None, *options, *(rest or [None]), softcap)  # noqa: B023

            def make() -> tuple[Tensor, ...]:
                qkv = draw(1, 4, 2, 70, 70, 24, 8, dtype)  # noqa: B023
                return *qkv, torch.randn(4).requires_grad_()

            ours, reference = (functools.partial(run, f) for f in (attention, OP.reference))
            assert_parity_of_draws(ours, reference, make)
            if softcap is not None:
                assert_parity_of_draws(ours, reference, lambda: make()[:3])


def check_masks() -> None:
    """Every form of a mask, where some tiles are hidden and others are seen as a whole.

    In fp16, whose products are exact: in fp32 the interpreter adds up those of ``k q`` in another
    order than those of ``q k``. Where few keys are seen, backward's probabilities are off then.
    """
    make = functools.partial(draw, 2, 2, 1, 140, 140, 64, 48, FP16)
    for name, form in MASKS.items():
        mask = form(2, 2, 140)
        check(mask, make)
        if name in ("packed", "left padding", "random"):
            check(additive(mask, -torch.inf, FP16), make)
            check(additive(mask, torch.finfo(FP16).min, FP16), make)


def check_first_keys() -> None:
    """As the masks that are made of them, of which no more tiles are visited."""
    torch.manual_seed(0)
    for dtype, batch, heads, time, window in (
        (FP16, 2, (4, 2), 140, None), (FP32, 2, (2, 2), 137, 20), (FP16, 1, (18, 1), 70, 1),
    ):  # fmt: skip
        starts = starts_of(torch.rand(batch, time) < 0.04)
        first = first_keys(starts, window)
        make = functools.partial(draw, batch, *heads, time, time, 24, 8, dtype)
        check(first, make)
        qkv = make()
        found = []
        for mask in (first, sample_mask(first)):
            out = attention(*qkv, None, False, mask)
            found.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        last = mask_table(first)
        whole = sample_mask(first)
        assert torch.equal(last[:, 0, :, 0], time - 1 - whole[:, 0].flip(1).int().argmax(1).int())
        check_spans_of(first[:1], last[:1], whole[0, 0], whole[0, 0], str(window))


def check_rows_that_see_nothing() -> None:
    q, k, v = draw(1, 2, 1, 140, 140, 16, 16, FP32)
    mask = packed(1, 140)
    mask[:, :, 40:90] = False
    for given in (mask, additive(mask, -torch.inf, FP32)):
        out = attention(q, k, v, None, False, given)
        assert not out[:, :, 40:90].any()
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert not grads[0][:, :, 40:90].any()
        assert all(g.isfinite().all() for g in grads)
        check(given, functools.partial(draw, 1, 2, 1, 140, 140, 64, 48, FP32))


def check_hidden_tiles_are_not_read() -> None:
    q, k, v = draw(1, 2, 1, 512, 512, 16, 16, FP32)
    mask = packed(1, 512)  # cut at 256
    order = torch.arange(512)
    for other in (order < 256, order >= 256):
        kept = (~other)[None, None, :, None]
        bad = [torch.where(kept, t, torch.nan).detach().requires_grad_() for t in (q, k, v)]
        out = attention(*bad, None, False, mask)
        assert torch.equal(out[:, :, ~other], attention(q, k, v, None, False, mask)[:, :, ~other])
        upstream = torch.where(kept, torch.ones_like(out), torch.nan)
        for g in torch.autograd.grad(out, bad, upstream):
            assert g[:, :, ~other].isfinite().all()


@triton.jit
def spans_kernel(
    mask, table, spans, time, keys, key_blocks, row_blocks,
    MODE: tl.constexpr, BY_KEY: tl.constexpr, OWN: tl.constexpr, TILE: tl.constexpr,
    GRAIN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write down which tiles each program would visit."""
    start = tl.program_id(0) * OWN
    first, free, free_end, end = span(
        mask, table, row_blocks, key_blocks, start, time, keys, time + keys, 1, MODE, BY_KEY,
        OWN, TILE, GRAIN, CHUNK,
    )  # fmt: skip
    spans += tl.program_id(0) * 4
    tl.store(spans, first)
    tl.store(spans + 1, free)
    tl.store(spans + 2, free_end)
    tl.store(spans + 3, end)


def spans(
    mask: Tensor, table: Tensor, own: int, tile: int, by_key: bool
) -> list[list[int]]:  # fmt: skip
    """(first, free, free end, end) of each program, for a mask (1, 1, T, S) or first keys."""
    time = mask.shape[2]
    keys = time if is_first_keys(mask) else mask.shape[3]
    mode = "boolean" if mask.dtype is torch.bool else "additive"
    mode = "samples" if is_first_keys(mask) else mode
    count = -(-(keys if by_key else time) // own)
    out = torch.zeros(count, 4, dtype=torch.int32)
    spans_kernel[(count,)](
        mask, table, out, time, keys, table.shape[3] - 1, table.shape[2], MODE=mode, BY_KEY=by_key,
        OWN=own, TILE=tile, GRAIN=GRAIN, CHUNK=CHUNK,
    )  # fmt: skip
    return out.tolist()


def check_spans() -> None:
    """What is seen is visited, what is not looked at is seen as a whole, and no more is visited."""
    for time in (33, 300):
        for name, make in MASKS.items():
            mask = make(1, 1, time)[:1, :1].expand(1, 1, time, time)
            table = mask_table(mask)
            seen = mask if mask.dtype is torch.bool else mask > -torch.inf
            whole = mask if mask.dtype is torch.bool else mask == 0
            check_spans_of(mask, table, seen[0, 0], whole[0, 0], name)


def check_spans_of(mask: Tensor, table: Tensor, seen: Tensor, whole: Tensor, name: str) -> None:
    """``seen`` and ``whole`` are where a mask (1, 1, T, S) shows a key, and adds nothing to it."""
    for own, tile, by_key in ((128, 32, False), (32, 64, True), (64, 64, False)):
        some, every = (t.T if by_key else t for t in (seen, whole))
        found = spans(mask, table, own, tile, by_key)
        for i, (first, free, free_end, end) in enumerate(found):
            part = some[i * own : (i + 1) * own]
            assert first <= free <= free_end <= end, name
            assert not part[:, : first * tile].any(), name
            assert not part[:, end * tile :].any(), name
            assert every[i * own : (i + 1) * own, free * tile : free_end * tile].all(), name
            if first < end:  # both ends touch what is seen
                assert part[:, first * tile : (first + 1) * tile].any(), name
                assert part[:, (end - 1) * tile : end * tile].any(), name


def check_work_grows_with_the_squares_of_the_lengths() -> None:
    """Of a pack of 2,048 positions, and how little of its mask is read."""
    time, tile = 2048, 64
    for samples in (1, 4, 16):
        place = torch.arange(time) // (time // samples)
        order = torch.arange(time)
        mask = ((place[:, None] == place[None]) & (order[:, None] >= order[None]))[None, None]
        table = mask_table(mask)
        for by_key in (False, True):
            found = spans(mask, table, tile, tile, by_key)
            visited = sum(end - first for first, _, _, end in found)
            masked = sum(end - first - (stop - free) for first, free, stop, end in found)
            each = time // samples // tile
            assert visited == samples * each * (each + 1) // 2
            assert masked == time // tile  # the diagonal
    # samples that end anywhere
    mask = packed(1, 1000, cuts=(130, 131, 500, 777))
    visited = sum(end - first for first, _, _, end in spans(mask, mask_table(mask), 32, 32, False))
    lengths = (130, 1, 369, 277, 223)
    assert visited <= sum((n / 32 + 2) * (n / 32 + 3) / 2 for n in lengths)


def check_layouts() -> None:
    """Strides of all kinds, of masks too; an upstream gradient that is one number."""
    q, k, v = (t.detach() for t in draw(2, 4, 2, 70, 70, 16, 16, FP16))
    mask = packed(2, 70)
    expected = attention(q, k, v, None, False, mask)

    def strided(t: Tensor) -> Tensor:
        return torch.stack((t, t), -1)[..., 0]

    for layout in (
        Tensor.contiguous, strided, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)
    ):  # fmt: skip
        assert torch.equal(attention(*(layout(t) for t in (q, k, v)), None, False, mask), expected)
        assert torch.equal(attention(q, k, v, None, False, layout(mask)), expected)
    wide = torch.zeros(2, 1, 80, 93, dtype=torch.bool)
    wide[:, :, :70, :70] = mask
    assert torch.equal(attention(q, k, v, None, False, wide[:, :, :70, :70]), expected)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    grads = torch.autograd.grad(attention(q, k, v, None, False, mask).sum(), leaves)
    assert all(g.transpose(1, 2).is_contiguous() for g in (expected, *grads))


def check_only_needed_gradients() -> None:
    for needed in range(3):

        def make(needed: int = needed) -> tuple[Tensor, ...]:
            made = draw(1, 4, 2, 70, 70, 32, 32, FP32)
            return tuple(t.detach().requires_grad_(i == needed) for i, t in enumerate(made))

        check(packed(1, 70), make)


def check_second_derivatives() -> None:
    q, k, v = draw(1, 2, 1, 20, 20, 4, 4, FP32)
    mask = packed(1, 20)
    found = []
    for call in (attention, OP.reference):
        with sdpa_kernel(SDPBackend.MATH):
            out = call(q, k, v, None, False, mask)
            first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def check_library_ops_keep_their_contracts() -> None:
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.fusewright
    for heads in ((4, 2), (18, 1)):
        q, k, v = (t.detach() for t in draw(2, *heads, 40, 40, 16, 8, FP16))
        bias = torch.randn(1, heads[0], 40, 40)
        for mask in (None, packed(2, 40), packed(2, 40)[:, :, :1], bias):
            table = None
            if mask is not None:
                torch.library.opcheck(ops.attention_mask_table.default, (mask,), test_utils=tests)
                table = mask_table(mask)
            sinks = torch.randn(heads[0]) if mask is None else None
            given = 0.3, mask is None, mask, table, None, sinks, None if mask is None else 2.0
            forward = ops.attention_triton_forward.default
            torch.library.opcheck(forward, (q, k, v, *given), test_utils=tests)
            out, stats = forward(q, k, v, *given)
            for needs in ([True] * 3, [False, True, False]):
                needs = [*needs, sinks is not None]
                args = torch.randn(out.shape).to(FP16), q, k, v, out, stats, *given, needs
                backward = ops.attention_triton_backward.default
                torch.library.opcheck(backward, args, test_utils=tests)


def check_a_table_is_of_what_is_in_the_mask() -> None:
    q, k, v = (t.detach() for t in draw(1, 2, 1, 70, 70, 16, 16, FP32))
    mask = packed(1, 70)
    for change in (None, Tensor.logical_not_, lambda m: m.fill_(True), None):
        if change is not None:
            change(mask)
        check(mask, lambda: (q, k, v))
        view = mask[:, :, :, :40]
        check(view, lambda: (q, k[:, :, :40], v[:, :, :40]))
    with torch.inference_mode():
        mask = packed(1, 70)
        for _ in range(2):
            expected = OP.reference(q, k, v, None, False, mask)
            torch.testing.assert_close(attention(q, k, v, None, False, mask), expected)
            mask.fill_(True)


def check_empty_inputs() -> None:
    for batch, time, keys in ((0, 4, 4), (1, 0, 4), (1, 4, 0)):
        q, k, v = draw(batch, 2, 1, time, keys, 8, 8, FP32)
        mask = torch.ones(1, 1, time, keys, dtype=torch.bool)
        out = attention(q, k, v, None, False, mask)
        assert out.shape == q.shape
        assert not out.any()
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert not any(g.any() for g in grads)


if __name__ == "__main__":
    run(
        check_parity,
        check_sinks_and_softcaps,
        check_masks,
        check_first_keys,
        check_rows_that_see_nothing,
        check_hidden_tiles_are_not_read,
        check_spans,
        check_work_grows_with_the_squares_of_the_lengths,
        check_layouts,
        check_only_needed_gradients,
        check_second_derivatives,
        check_library_ops_keep_their_contracts,
        check_a_table_is_of_what_is_in_the_mask,
        check_empty_inputs,
    )
