"""Attention in C++: parity with PyTorch's, masks, strides, threads, what it leaves to others."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels.attention.attention import OP, _boolean, _every_row, attention
from fusewright.kernels.native import attention as native
from fusewright.kernels.processor import this_machine
from fusewright.kernels.tolerance import exceeded

from ..util import assert_parity, assert_parity_of_draws
from . import libraries

B16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def kernels() -> None:
    libraries.require()


def _heads(
    batch: int,
    heads: int,
    time: int,
    dim: int,
    seed: int,
    size: float = 1.0,
    how: str = "projected",
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if how == "projected":
        t = torch.randn(batch, time, heads, dim, generator=generator).transpose(1, 2)
    elif how == "parts of wider rows":
        t = torch.randn(batch, time, heads, 3 * dim, generator=generator)[..., dim : 2 * dim]
        t = t.transpose(1, 2)
    elif how == "features apart":
        t = torch.randn(batch, heads, dim, time, generator=generator).transpose(2, 3)
    else:
        t = torch.randn(batch, 1, time, dim, generator=generator).expand(-1, heads, -1, -1)
    return (size * t).to(B16)


LAYOUTS = st.sampled_from(["projected", "parts of wider rows", "features apart", "one for all"])


def _mask(kind: str, batch: int, heads: int, time: int, keys: int, seed: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    if kind == "packed":
        at = torch.randint(0, 4, (batch, 1, max(time, keys)), generator=generator).cumsum(-1) // 9
        order = torch.arange(max(time, keys))
        seen = (at[..., :, None] == at[..., None, :]) & (order[:, None] >= order)
        return seen[..., :time, :keys]
    shape = {
        "of all": (1, 1, time, keys), "of heads": (1, heads, time, keys),
        "of samples": (batch, 1, 1, keys), "of each": (batch, heads, time, keys),
    }[kind]  # fmt: skip
    return torch.rand(shape, generator=generator) < 0.3


MASKS = st.sampled_from(["none", "packed", "of all", "of heads", "of samples", "of each"])


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (3, 3), (6, 2), (5, 1), (71, 1)]),
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    dims=st.sampled_from([(16, 16), (64, 64), (96, 48), (16, 112), (128, 128)]),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    mask=MASKS,
    size=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_parity(
    batch: int, heads: tuple[int, int], sizes: tuple[int, int], dims: tuple[int, int],
    layouts: tuple[str, str, str], mask: str, size: float, seed: int,
) -> None:  # fmt: skip
    (h, g), (time, keys), (dim, value_dim) = heads, sizes, dims
    q = _heads(batch, h, time, dim, seed, size, layouts[0]).requires_grad_()
    k = _heads(batch, g, keys, dim, seed + 1, size, layouts[1]).requires_grad_()
    v = _heads(batch, g, keys, value_dim, seed + 2, 1.0, layouts[2]).requires_grad_()
    seen = _mask(mask, batch, h, time, keys, seed)
    assert native.takes(q, k, v, _every_row(seen, q))
    assert_parity(
        lambda *t: attention(*t, None, False, seen),
        lambda *t: OP.reference(*t, None, False, seen),
        q, k, v,
    )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    time=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 130, 300]),
    heads=st.sampled_from([(3, 3), (9, 3), (4, 1)]),
    window=st.sampled_from([None, 1, 5, 16, 33, 100]),
    scale=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 99),
)
def test_parity_of_causal(
    time: int, heads: tuple[int, int], window: int | None, scale: float | None, seed: int
) -> None:
    q, k, v = (
        _heads(2, n, time, 32, seed + i).requires_grad_()
        for i, n in enumerate((heads[0], heads[1], heads[1]))
    )
    assert_parity(
        lambda *t: attention(*t, scale, True, window=window),
        lambda *t: OP.reference(*t, scale, True, window=window),
        q, k, v,
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    time=st.sampled_from([1, 2, 17, 64, 130]),
    heads=st.sampled_from([(3, 3), (8, 2), (5, 1)]),
    window=st.sampled_from([None, 5, 33]),
    sinks=st.sampled_from([None, B16, F32]),
    softcap=st.sampled_from([None, 0.5, 50.0]),
    mask=st.sampled_from(["causal", "none", "packed", "of samples"]),
    additive=st.booleans(),
    size=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_parity_of_sinks_and_softcaps(
    time: int, heads: tuple[int, int], window: int | None, sinks: torch.dtype | None,
    softcap: float | None, mask: str, additive: bool, size: float, seed: int,
) -> None:  # fmt: skip
    causal = mask == "causal"
    seen = None if causal else _mask(mask, 2, heads[0], time, time, seed)
    if additive and seen is not None and (sinks or (softcap and bool(seen.any(-1).all()))):
        seen = torch.zeros(seen.shape, dtype=B16).masked_fill(~seen, torch.finfo(B16).min)
    options = None, causal, seen, window if causal else None
    draws = itertools.count(seed, 4)

    def run(attend: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return attend(q, k, v, *options, *(rest or [None]), softcap)

    def draw() -> list[Tensor]:
        at = next(draws)
        made = [_heads(2, n, time, 32, at + i, size) for i, n in enumerate((*heads, heads[1]))]
        if sinks is not None:
            made.append(_heads(1, 1, 1, heads[0], at + 3).flatten().to(sinks))
        return [t.requires_grad_() for t in made]

    q, k, v, *rest = draw()
    assert native.takes(q, k, v, _boolean(seen, q, rest[0] if rest else None))
    ours, reference = (functools.partial(run, f) for f in (attention, OP.reference))
    assert_parity_of_draws(ours, reference, draw)


def test_long_rows_are_cut_into_fewer_positions() -> None:
    q, k, v = (_heads(1, n, t, 16, i) for i, (n, t) in enumerate(((2, 40), (2, 9001), (2, 9001))))
    made = native.forward(q, k, v, 0.25, False, None, None)
    eager, exact = (
        OP.reference(q.to(kind), k.to(kind), v.to(kind), 0.25, False) for kind in (B16, F64)
    )
    assert exceeded(made, eager, exact) is None


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _both(*args: Any) -> list[Tensor]:
    q, _, v = args[:3]
    grad = _heads(*q.shape[:3], v.shape[-1], 7)
    args = *args, *(None,) * (9 - len(args))
    needs = [True] * 3 + [args[7] is not None]
    return [native.forward(*args), *native.backward(grad, *args, needs)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["none", "packed"])
def test_results_do_not_depend_on_who_is_faster(kind: str) -> None:
    shape = 2, 6, 130, 64
    q, k, v = _heads(*shape, 0), _heads(2, 2, 130, 64, 1), _heads(2, 2, 130, 64, 2)
    args = q, k, v, 0.125, kind == "none", _mask(kind, 2, 6, 130, 130, 3), None
    alone: list[Tensor] = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        made = _both(*args)
        assert all(map(torch.equal, made, _both(*args))), count
        alone = alone or made
        assert torch.equal(made[0], alone[0])
        assert torch.equal(made[1], alone[1])
        for a, b in zip(made[2:], alone[2:], strict=True):  # sums in another order
            # which may be rounded to the next number of bf16
            torch.testing.assert_close(a.float(), b.float(), atol=1e-5, rtol=2**-7)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
def test_only_what_is_needed(needs: tuple[int, ...]) -> None:
    q, k, v = (_heads(1, 2, 33, 16, i) for i in range(3))
    grad = _heads(1, 2, 33, 16, 3)
    every = native.backward(grad, q, k, v, 0.25, True, *(None,) * 4, [True] * 3 + [False])
    some = native.backward(grad, q, k, v, 0.25, True, *(None,) * 4, [*map(bool, needs), False])
    assert len(some) == sum(needs)
    assert all(map(torch.equal, some, (t for t, n in zip(every, needs, strict=True) if n)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(bad: float) -> None:
    q, k, v = (_heads(1, 2, 40, 16, i) for i in range(3))
    q[0, 1, 20, 3] = bad
    made = native.forward(q, k, v, 0.25, True, None, None)
    assert made[0, 1, 20].isnan().all()
    made[0, 1, 20] = 0
    assert made.isfinite().all()


def test_what_sees_nothing_is_zero_and_has_no_gradient() -> None:
    q, k, v = (_heads(1, 2, 20, 16, i) for i in range(3))
    mask = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    assert not any(bool(t.any()) for t in _both(q, k, v, 0.25, False, mask, None))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, m: (q.float(), k.float(), v.float(), m),
        lambda q, k, v, m: (q.half(), k.half(), v.half(), m),
        lambda q, k, v, m: (q[..., :8], k[..., :8], v, m),
        lambda q, k, v, m: (q, k, v[..., :8], m),
        lambda q, k, v, m: (q, k[:, :, :0], v[:, :, :0], m),
        lambda q, k, v, m: (q, k, v, torch.zeros(1, 1, 4, 4)),
    ],
)  # fmt: skip
def test_what_it_leaves_to_others(change: Any) -> None:
    given = *(_heads(1, 2, 4, 16, i) for i in range(3)), None
    assert native.takes(*given)
    assert not native.takes(*change(*given))


@pytest.mark.parametrize("kind", [B16, F64])
def test_defaults_do_not_matter(kind: torch.dtype) -> None:
    q, k, v = (_heads(1, 2, 20, 16, i) for i in range(3))
    made = _both(q, k, v, 0.25, True, None, None)
    grad = _heads(1, 2, 20, 16, 7)
    torch.set_default_dtype(kind)
    try:
        with torch.device("meta"):
            again = [
                native.forward(q, k, v, 0.25, True, None, None),
                *native.backward(grad, q, k, v, 0.25, True, *(None,) * 4, [True] * 3 + [False]),
            ]
    finally:
        torch.set_default_dtype(F32)
    assert all(map(torch.equal, made, again))


@pytest.mark.parametrize("shape", [(3, 1, 20, 20), (1, 2, 20, 20), (2, 8, 20, 20)])
def test_masks_of_other_samples_or_heads_are_refused(shape: tuple[int, ...]) -> None:
    q, k, v = (_heads(2, 4, 20, 16, i) for i in range(3))
    with pytest.raises(ValueError, match="does not fit"):
        attention(q, k, v, None, False, torch.ones(shape, dtype=torch.bool))


@pytest.mark.usefixtures("threads")
def test_many_threads_take_no_more_memory_than_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    found = libraries.library.library()
    assert found is not None
    function = found["attention_backward"]
    monkeypatch.setattr(
        native,
        "library",
        lambda: {"attention_backward": lambda *a: asked.append(a[-1]) or function(*a)},
    )
    torch.set_num_threads(64)
    q, k, v = (_heads(1, 3, 400, 16, i) for i in range(3))
    native.backward(q, q, k, v, 0.25, True, *(None,) * 4, [True] * 3 + [False])
    assert asked == [3]


@pytest.fixture(
    scope="module",
    params=["x86-64-v3", pytest.param("x86-64", marks=pytest.mark.slow)],
)
def lesser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels for a CPU without products of 16 bits."""
    if this_machine().vectors not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    return libraries.compiled(tmp_path_factory.mktemp("lesser"), f"-march={request.param}")


def test_parity_on_a_lesser_cpu(lesser: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.use(monkeypatch, lesser)
    layouts = "projected", "features apart", "one for all"
    inner: Any = test_parity
    inner.hypothesis.inner_test(2, (6, 2), (77, 130), (96, 48), layouts, "of each", 1.0, 5)
    inner = test_parity_of_causal
    inner.hypothesis.inner_test(130, (9, 3), 33, None, 6)


def test_memory_does_not_grow_with_the_shapes_that_were_met() -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096

    def run(first: int, last: int) -> None:
        for time in range(first, last):
            _both(*(_heads(1, 2, time, 16, i) for i in range(3)), 0.25, True, None, None)

    run(1, 40)
    before = resident()
    run(40, 240)
    assert resident() - before < 32 << 20
