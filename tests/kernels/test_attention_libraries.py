"""Attention by FlashAttention and cuDNN is that of the op, forward by one and backward by another.

Their kernels are for GPUs: stand-ins take their place in PyTorch's dispatcher.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from fusewright.kernels import choice, raced_op
from fusewright.kernels.attention import attention_libraries as libraries
from fusewright.kernels.attention import attention_plain, unsupported
from fusewright.kernels.attention.attention import attention, attention_reference
from fusewright.kernels.attention.attention_libraries import CUDNN, FLASH, VARLEN, samples_of
from fusewright.kernels.attention.first_keys import first_keys, sample_mask
from fusewright.kernels.attention.unsupported import attention_unsupported
from fusewright.kernels.choice import Choice, Question
from fusewright.kernels.launch import Gpu
from fusewright.kernels.raced_op import OWN, PLAIN

from .clocks import own_choices
from .failing_launches import ERRORS, as_on_a_gpu
from .stand_ins import StandIns, stand_ins
from .util import assert_parity, needs_triton

pytestmark = needs_triton

FORWARD, BACKWARD = "attention_triton_forward", "attention_triton_backward"


@pytest.fixture
def forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIns]:
    """A CPU that the op takes for a GPU, on which no Triton kernel can be launched."""
    for name in (FORWARD, BACKWARD):
        op = raced_op.CONTESTS[name]
        monkeypatch.setattr(op, "contest", replace(op.contest, devices=("cpu",)))
        monkeypatch.setattr(op, "_orders", {})
    monkeypatch.setattr(libraries, "LONG", 1)
    with own_choices(tmp_path), as_on_a_gpu(ERRORS["driver"]), stand_ins() as these:
        yield these


def _chosen(monkeypatch: pytest.MonkeyPatch, forward: str, backward: str) -> None:
    def choose(asked: Question, machine: str) -> Choice:
        name = forward if asked.name.startswith(FORWARD) else backward
        return Choice(asked.name, name, refused={OWN: "no driver"})

    monkeypatch.setattr(raced_op, "choose", choose)


def _heads(
    batch: int, heads: int, groups: int, time: int, dim: int, dtype: torch.dtype
) -> list[Tensor]:
    return [
        torch.randn(batch, time, n, dim).to(dtype).transpose(1, 2).requires_grad_()
        for n in (heads, groups, groups)
    ]


def _packs(*rows: tuple[int, ...]) -> Tensor:
    """The mask of rows of samples of such lengths."""
    samples = torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in rows])
    same = samples[:, :, None] == samples[:, None]
    return (same & torch.ones(same.shape[1:], dtype=torch.bool).tril())[:, None]


def _in_windows(mask: Tensor, window: int) -> Tensor:
    order = torch.arange(mask.shape[-1])
    return mask & (order > order[:, None] - window)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


FIRST = first_keys(torch.tensor([[0] * 7 + [7] + [8] * 15, [0] * 20 + [20] * 3]).int(), 6)

CASES: dict[str, tuple[str, bool, Tensor | None, int | None]] = {
    "dense": (FLASH, True, None, None),
    "not causal": (FLASH, False, None, None),
    "window": (FLASH, True, None, 5),
    "cudnn": (CUDNN, True, None, None),
    "cudnn, not causal": (CUDNN, False, None, None),
    "packs": (VARLEN, False, _packs((7, 1, 15), (20, 3)), None),
    "packs in windows": (VARLEN, False, _in_windows(_packs((7, 1, 15), (20, 3)), 6), None),
    "one pack for all": (VARLEN, False, _packs((7, 1, 15)), None),
    "first keys": (VARLEN, False, FIRST, None),
}


@pytest.mark.parametrize("pair", ["both", "forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_each_form_is_the_reference(
    name: str, dtype: torch.dtype, pair: str, forms: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, causal, mask, window = CASES[name]
    if mask is not None and mask.dtype is torch.bool and dtype is torch.float16:
        mask = _additive(mask, dtype)
    _chosen(monkeypatch, *(kind if pair in (p, "both") else PLAIN for p in ("forward", "backward")))

    def options(q: Tensor) -> tuple[Any, ...]:
        is_bias = mask is not None and mask.is_floating_point()
        fitting = mask.to(q.dtype) if is_bias else mask
        return 0.3, causal, fitting, window

    assert_parity(
        lambda *qkv: attention(*qkv, *options(qkv[0])),
        lambda *qkv: attention_reference(*qkv, *options(qkv[0])),
        *_heads(2, 6, 2, 23, 16, dtype),
    )
    ran = {call.endswith("backward") for call, _ in forms.calls}
    assert ran == {"both": {False, True}, "forward": {False}, "backward": {True}}[pair]
    if kind == VARLEN:
        assert {count for _, count in forms.calls} == {6 if name == "one pack for all" else 5}


@pytest.mark.parametrize("window", [None, 1, 6])
def test_first_keys_are_of_the_same_samples(window: int | None) -> None:
    rows = (7, 1, 15), (20, 3)
    starts = torch.stack(
        [torch.tensor([sum(row[:i]) for i, n in enumerate(row) for _ in range(n)]) for row in rows]
    )
    first = first_keys(starts.int(), window)
    mask = _packs(*rows) if window is None else _in_windows(_packs(*rows), window)
    assert torch.equal(sample_mask(first), mask)
    ours, theirs = samples_of(first, 2), samples_of(mask, 2)
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours.ends, theirs.ends)
    assert (ours.longest, ours.window) == (theirs.longest, theirs.window)


def test_what_wins_the_race_is_the_reference(forms: StandIns) -> None:
    """Through the real race: ours cannot be launched, and what is right and fastest runs."""
    heads = _heads(1, 4, 2, 32, 16, torch.bfloat16)
    options: tuple[Any, ...] = 0.25, True, None, 7
    assert_parity(
        lambda *qkv: attention(*qkv, *options),
        lambda *qkv: attention_reference(*qkv, *options),
        *heads,
    )
    said = [str(each) for each in choice.choices()]
    assert [text.split(" of ")[0] for text in said] == [FORWARD, BACKWARD]
    for text in said:
        assert "own refused: 0 active drivers" in text
        assert "cuDNN refused: it takes no window" in text
        assert "FlashAttention refused" not in text
        assert "FlashAttention of samples refused: all samples have rows of their own" in text


def test_a_form_that_keeps_another_sum_is_refused(
    forms: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In base 2: outputs are right, and the gradients that follow would not be."""
    before = libraries.stats_of
    monkeypatch.setattr(libraries, "stats_of", lambda sums: before(sums / 0.6931))
    attention(*_heads(1, 2, 2, 16, 16, torch.bfloat16), None, True)
    (said,) = map(str, choice.choices())
    assert "FlashAttention refused: not as exact as eager" in said
    assert "cuDNN refused: not as exact as eager" in said
    assert f": {PLAIN} (raced" in said


def test_the_statistics_are_the_logarithms_of_sums() -> None:
    q, k, v = _heads(2, 4, 2, 9, 8, torch.float32)
    _, stats = attention_plain.forward(q, k, v, 0.4, True, None, None, None, None, None)
    scores = (q * 0.4) @ k.repeat_interleave(2, 1).mT
    scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    sums = scores.logsumexp(-1)
    assert torch.allclose(libraries.sums_of(stats), sums, atol=1e-6)
    assert torch.allclose(libraries.sums_of(libraries.stats_of(sums)), sums, atol=1e-6)


def test_second_derivatives_through_a_library_s_form(
    forms: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    _chosen(monkeypatch, FLASH, FLASH)
    q, k, v = _heads(1, 2, 1, 12, 8, torch.bfloat16)

    def penalty(function: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = function(*tensors, 0.5, True)
        grads = torch.autograd.grad(out.float().square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in grads), tensors)  # type: ignore[arg-type]

    ours = penalty(attention, q, k, v)
    wide = (t.detach().double().requires_grad_() for t in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):  # the only one that has them
        exact = penalty(attention_reference, *wide)
    assert forms.calls[0] == ("flash", 0)
    for a, b in zip(ours, exact, strict=True):
        assert (a.double() - b).norm() < 0.05 * b.norm()


def test_our_call_is_that_of_varlen_attn(forms: StandIns) -> None:
    """PyTorch's function for packs, by its public signature, gives what our form does."""
    q, k, v = (t.detach() for t in _heads(2, 4, 4, 23, 16, torch.bfloat16))
    mask = _packs((7, 1, 15), (20, 3))
    samples = samples_of(mask, 2)
    assert samples is not None
    assert samples.ends.tolist() == [0, 7, 8, 23, 43, 46]
    assert (samples.longest, samples.window) == (20, None)
    out, _ = libraries.varlen_forward(q, k, v, 0.25, False, mask, None, None, None, None)
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    theirs = varlen_attn(
        *rows, samples.ends, samples.ends, samples.longest, samples.longest, scale=0.25,
        window_size=(-1, 0),
    )  # fmt: skip
    assert isinstance(theirs, Tensor)
    assert torch.equal(out.transpose(1, 2).flatten(0, 1), theirs)
    assert forms.calls == [("flash", 5)] * 2


# --- masks ----------------------------------------------------------------------------------------


def test_only_masks_of_causal_samples_are_taken_for_such() -> None:
    pack = _packs((5, 4))
    holes, early = pack.clone(), pack.clone()
    holes[..., 7, 6] = False
    early[..., 5, 4] = True
    nothing = pack.clone()
    nothing[..., 2, :] = False
    for mask in (holes, early, nothing, torch.ones_like(pack), pack.flip(-1)):
        assert samples_of(mask, 1) is None
    bands = pack.clone()  # of two windows
    bands[..., 4, :2] = bands[..., 8, 5] = False
    assert samples_of(bands, 1) is None
    biased = _additive(pack, torch.bfloat16)
    assert samples_of(biased, 1) is not None
    biased[..., 3, 1] = -2
    assert samples_of(biased, 1) is None


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 6, 9, 12])
def test_windows_are_read_from_masks(window: int) -> None:
    for rows in (((9,), (9,)), ((5, 4), (2, 7)), ((1, 8), (4, 5))):
        samples = samples_of(_in_windows(_packs(*rows), window), 2)
        assert samples is not None
        longest = max(map(max, rows))
        if window == 1:  # samples of one position each, or one: the same
            assert samples.window == 1 or samples.longest == 1
            continue
        ends = torch.tensor([0, *rows[0], *rows[1]]).cumsum(0)
        assert samples.ends.tolist() == ends.tolist()
        assert samples.window == (window if window < longest else None)


def test_a_mask_is_read_once_and_again_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    read, before = [], libraries._read
    monkeypatch.setattr(
        libraries, "_read", lambda mask, batch: read.append(mask) or before(mask, batch)
    )
    monkeypatch.setattr(libraries, "_AT_ONCE", 20)  # several parts
    mask = _packs((5, 4))
    for layer in range(3):
        samples = samples_of(mask.expand(-1, -1, -1, 9), 1)
        assert samples is not None
        assert samples.ends.tolist() == [0, 5, 9], layer
    assert len(read) == 1
    band = _in_windows(mask, 3)
    for _ in range(3):  # layers of two kinds
        for each, window in ((mask, None), (band, 3)):
            samples = samples_of(each, 1)
            assert samples is not None
            assert samples.window == window
    assert len(read) == 2
    mask.copy_(_packs((2, 7)))
    samples = samples_of(mask, 1)
    assert samples is not None
    assert samples.ends.tolist() == [0, 2, 9]
    monkeypatch.setattr(libraries, "may_wait", lambda device: False)
    assert samples_of(mask, 1) is None
    assert len(read) == 3


def test_another_flash_attention_is_another_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the place of PyTorch's under the same name, and nobody has checked or timed it."""
    heads = _heads(1, 2, 2, 9, 8, torch.bfloat16)
    kinds = {libraries._kind(*heads, 0.3, True, None, None, None, None, None)}
    for name in ("FA3", "FA4"):
        monkeypatch.setattr(
            torch.nn.attention, "current_flash_attention_impl", lambda name=name: name
        )
        kinds.add(libraries._kind(*heads, 0.3, True, None, None, None, None, None))
    assert kinds == {"", "FA3", "FA4"}


def test_another_mask_of_the_same_shape_is_computed_by_another_form(
    forms: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    _chosen(monkeypatch, VARLEN, VARLEN)
    heads = _heads(1, 2, 2, 9, 8, torch.bfloat16)
    pack = _packs((5, 4))
    holes = pack.clone()
    holes[..., 7, 6] = False
    for mask, count in ((pack, 1), (holes, 1), (_packs((2, 7)), 2)):
        out = attention(*heads, None, False, mask)
        assert torch.allclose(
            out.float(), attention_reference(*heads, None, False, mask).float(), atol=0.02
        )
        assert len(forms.calls) == count


# --- who takes what -------------------------------------------------------------------------------


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def reasons(q: Tensor, *options: Any, v: Tensor | None = None, name: str = FLASH) -> str:
        causal, mask, window, sinks, softcap = options
        args = q, q, q if v is None else v, 1.0, causal, mask, None, window, sinks, softcap
        by_name = {c.name: c for c in libraries.FORWARD.contenders}
        return by_name[name].unavailable(*args)

    low, wide = torch.zeros(1, 2, 4, 16, dtype=torch.bfloat16), torch.zeros(1, 2, 4, 16)
    dense = True, None, None, None, None
    assert reasons(low, *dense) == reasons(low, *dense, name=CUDNN) == ""
    assert "16 bits" in reasons(wide, *dense)
    assert "of 12 and 12" in reasons(low[..., :12], *dense)
    assert "of 16 and 8" in reasons(low, *dense, v=low[..., :8])
    assert "softcap" in reasons(low, True, None, None, None, 3.0)
    assert "sinks" in reasons(low, True, None, None, torch.zeros(2), None)
    assert "mask" in reasons(low, False, _packs((4,)), None, None, None)
    assert "window" in reasons(low, True, None, 2, None, None, name=CUDNN)
    assert "shorter than 4,096" in reasons(low, False, _packs((4,)), *[None] * 3, name=VARLEN)
    monkeypatch.setattr(libraries, "LONG", 4)
    assert "more than samples" in reasons(
        low, False, torch.ones(1, 1, 4, 4, dtype=torch.bool), None, None, None, name=VARLEN
    )
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in reasons(low, *dense, name=CUDNN)
    finally:
        torch.use_deterministic_algorithms(False)


def test_dense_attention_is_raced_where_cudnn_has_kernels_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FakeTensorMode():
        q, odd, wide = (
            torch.empty(1, 4, 64, n, dtype=dtype, device="cuda")
            for n, dtype in ((64, torch.bfloat16), (60, torch.bfloat16), (64, torch.float32))
        )

    def reason(q: Tensor, *options: Any) -> str:
        return "; ".join(attention_unsupported(q, q, q, 1.0, True, *options))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(unsupported, "use_triton", lambda *tensors: True)
    as_fast = "without a mask, PyTorch's own flash attention is as fast"
    for generation, hip, expected in (
        (8, False, as_fast), (9, False, ""), (10, False, ""), (12, False, as_fast),
        (9, True, as_fast),
    ):  # fmt: skip
        gpu = Gpu(generation, 100 << 10, hip)
        monkeypatch.setattr(unsupported, "gpu_of", lambda q, gpu=gpu: gpu)
        assert reason(q) == expected
        assert reason(q, None, 3) == ""
        assert reason(odd) == reason(wide) == as_fast
    monkeypatch.setattr(unsupported, "gpu_of", lambda q: Gpu(9, 200 << 10))
    monkeypatch.setenv(choice.VARIABLE, "fixed")
    assert reason(q) == as_fast


def test_without_a_race_dense_attention_is_pytorch_s_and_the_rest_ours() -> None:
    q = torch.zeros(1, 2, 4, 16, dtype=torch.bfloat16)
    for causal, (mask, window) in itertools.product(
        (True, False), ((None, None), (None, 3), (_packs((4,)), None))
    ):
        first = libraries.FORWARD.first(q, q, q, 1.0, causal, mask, None, window, None, None)
        assert first == (FLASH if mask is None and window is None else OWN)
