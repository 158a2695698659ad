"""What attention launches where tensors are on a GPU, and which inputs it takes there."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusewright.kernels import launch
from fusewright.kernels.attention import unsupported
from fusewright.kernels.attention.attention import OP, attention
from fusewright.kernels.launch import Gpu

from .util import needs_triton

pytestmark = needs_triton

HOPPER, SMALL, AMD = Gpu(9, 227 << 10), Gpu(8, 99 << 10), Gpu(9, 64 << 10, True)
B16 = torch.bfloat16


@pytest.fixture(scope="module")
def launches() -> Iterator[Any]:
    """The benchmarks' module."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("launches")
    finally:
        sys.path.remove(folder)


def _heads(count: int, time: int = 200, dim: int = 64, dtype: torch.dtype = B16) -> Tensor:
    return torch.randn(2, time, count, dim, dtype=dtype).transpose(1, 2).requires_grad_()


def _run(launches: Any, mask: Tensor | None, *qkv: Tensor, gpu: Gpu = HOPPER) -> tuple[Any, ...]:
    """The launches, the output and the gradients of those of q, k and v that want one."""
    with launches.as_on_a_gpu(gpu) as found:
        out = attention(*qkv, None, mask is None, mask)
        wanted = [t for t in qkv if t.requires_grad]
        grads = torch.autograd.grad(out, wanted, torch.empty_like(out)) if wanted else ()
    return found, out, grads


def _mask(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def test_four_launches_a_layer(launches: Any) -> None:
    with FakeTensorMode():
        qkv = _heads(4), _heads(2), _heads(2, dim=48)
        found, out, grads = _run(launches, _mask(2, 1, 200, 200), *qkv)
        assert [one.name for one in found] == ["table", "forward", "queries", "keys"]
        tensors = out, *grads
        assert all(t.transpose(1, 2).is_contiguous() for t in tensors)
        assert [t.shape[-1] for t in tensors] == [48, 64, 64, 48]
        found, _, _ = _run(launches, None, *qkv)
        assert [one.name for one in found] == ["forward", "queries", "keys"]


def test_a_mask_is_read_once_for_all_layers(launches: Any) -> None:
    with FakeTensorMode(), launches.as_on_a_gpu(HOPPER) as found:
        mask = _mask(2, 1, 200, 200)
        q, k, v = (_heads(n).detach() for n in (4, 2, 2))

        def layers() -> list[str]:
            found.clear()
            for _ in range(3):
                attention(q, k, v, None, False, mask)
                attention(q, k, v, None, False, mask.expand(2, 1, 200, 200).detach())
            return [one.name for one in found if one.name == "table"]

        assert layers() == ["table"]
        assert layers() == []
        mask.logical_not_()
        assert layers() == ["table"]
        mask.detach().fill_(True)
        assert layers() == ["table"]
        mask = mask.clone()
        assert layers() == ["table"]


def test_the_table_of_a_mask_ends_with_it(launches: Any) -> None:
    with FakeTensorMode(), launches.as_on_a_gpu(HOPPER):
        mask = _mask(1, 1, 400, 400)
        q, k, v = (_heads(n, 64).detach() for n in (4, 2, 2))
        for time in range(40, 64):  # parts of one mask
            part = mask[:, :, :64, :time]
            attention(q, k[:, :, :time], v[:, :, :time], None, False, part)
        tables = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.dtype is torch.int8]
        assert 0 < len(tables) <= 4
        kept = [weakref.ref(t) for t in tables]
        del tables, mask, part
        gc.collect()
        assert not [t for t in kept if t() is not None]


@pytest.mark.parametrize(
    ("needed", "names"),
    [((0,), ["queries"]), ((1,), ["queries", "keys"]), ((2,), ["keys"]), ((), [])],
)
def test_frozen_inputs_launch_less(
    launches: Any, needed: tuple[int, ...], names: list[str]
) -> None:
    with FakeTensorMode():
        qkv = [t.detach().requires_grad_(i in needed) for i, t in enumerate(map(_heads, (4, 2, 2)))]
        found, _, _ = _run(launches, _mask(1, 1, 200, 200), *qkv)
        assert [one.name for one in found] == ["table", "forward", *names]


def test_keys_and_values_are_not_copied(launches: Any) -> None:
    """Nor a mask that one row, or a slice of a wider one, stands for."""
    with FakeTensorMode():
        qkv = _heads(4), _heads(2), _heads(2)
        for mask in (_mask(2, 1, 1, 200), _mask(2, 1, 256, 256)[:, :, :200, :200]):
            found, _, _ = _run(launches, mask, *qkv)
            names = found[1].kernel.arg_names
            given = dict(zip(names, found[1].args, strict=False))
            assert [given[f"{t}_row"] for t in "qkv"] == [4 * 64, 2 * 64, 2 * 64]
            assert given["mask_row"] == (0 if mask.shape[2] == 1 else 256)
            assert given["mask_head"] == 0
            assert given["share"] == 2


def test_a_group_of_many_heads_is_cut(launches: Any) -> None:
    """Each program adds up eight heads; one group would otherwise be few programs."""
    with FakeTensorMode():
        qkv = _heads(40), _heads(1), _heads(1)
        found, _, grads = _run(launches, _mask(1, 1, 200, 200), *qkv)
        keys = found[-1]
        blocks = -(-200 // keys.options["N"])
        assert keys.grid == (blocks * 5 * 2,)
        assert {g.dtype for g in grads} == {B16}


@pytest.mark.parametrize("gpu", [HOPPER, SMALL, AMD], ids=lambda g: f"{g.generation}{g.hip}")
@pytest.mark.parametrize("dtype", [B16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [16, 80, 128, 256])
def test_tiles_are_multiples_of_the_table(
    launches: Any, gpu: Gpu, dtype: torch.dtype, dim: int
) -> None:
    with FakeTensorMode():
        qkv = (_heads(n, dim=dim, dtype=dtype) for n in (4, 2, 2))
        found, _, _ = _run(launches, _mask(1, 1, 200, 200), *qkv, gpu=gpu)
        for one in found[1:]:
            assert one.options["M"] % one.options["GRAIN"] == 0
            assert one.options["N"] % one.options["GRAIN"] == 0
            assert one.options["D"] >= dim


def test_what_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def reasons(mask: bool, dtype: torch.dtype = B16, dim: int = 64, **options: Any) -> list[str]:
        with FakeTensorMode():
            q, k, v = (torch.empty(2, n, 9, dim, dtype=dtype, device="cuda") for n in (4, 2, 2))
            given = torch.empty(2, 1, 9, 9, dtype=torch.bool, device="cuda") if mask else None
            return OP.unsupported(q, k, v, None, not mask, given, **options)

    for dtype in (B16, torch.float16, torch.float32):
        assert reasons(True, dtype) == []
    assert reasons(False) == ["without a mask, PyTorch's own flash attention is as fast"]
    assert reasons(False, window=5) == []
    assert "16 or 32 bits" in reasons(True, torch.float64)[0]
    assert "256 features" in reasons(True, dim=264)[0]
    assert "64 features" in reasons(True, torch.float32, dim=72)[0]
    monkeypatch.setattr(unsupported, "gpu_of", lambda _: Gpu(7, 64 << 10))
    assert "compute capability 7" in reasons(True, torch.float16)[0]
    monkeypatch.setattr(launch, "_INSTALLED", False)
    assert "with Triton" in reasons(True)[0]


def test_what_is_kept_and_computed() -> None:
    """The output and two numbers a row are kept, and a byte for 1,024 entries of the mask."""
    launch._INTERPRETING, before = True, launch._INTERPRETING
    try:
        with FakeTensorMode():
            q, k, v = _heads(4), _heads(2), _heads(2)
            mask = _mask(1, 1, 200, 200)
            found = OP.cost(q, k, v, None, False, mask)
        rows = 2 * 4 * 200
        kept = q.nbytes + k.nbytes + v.nbytes + mask.nbytes
        assert found.bytes_saved == kept + q.nbytes + 8 * rows + 7 * 8
        assert found.flops == 2 * rows * 200 * 128
    finally:
        launch._INTERPRETING = before
