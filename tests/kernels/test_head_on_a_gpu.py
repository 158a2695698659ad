"""The head op on a GPU, without one: copies to the host, tiles, memory."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusewright.kernels import label_counts
from fusewright.kernels.launch import Gpu, has_triton, interpreting
from fusewright.kernels.loss import head_op

ROOT = Path(__file__).parents[2]
BF16, F32 = torch.bfloat16, torch.float32
VOCABULARY, HIDDEN = 128256, 4096


# -- labels on the host ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    label_counts.send(None)


def _labels() -> Tensor:
    return torch.tensor([[5, 1, -100, 2], [-100, -100, 3, -100]])


def test_labels_that_count_once_shifted() -> None:
    label_counts.send(_labels())
    assert label_counts.expected(8, -100) == 3  # padded after the shift
    assert label_counts.expected(6, -100) == 3
    assert label_counts.expected(6, 2) == 5
    assert label_counts.expected(7, -100) == 0  # others than those
    label_counts.send(None)
    assert label_counts.expected(8, -100) == 0


def test_only_plain_tensors_are_sent() -> None:
    with FakeTensorMode():
        fake = torch.zeros(2, 4, dtype=torch.int64)
    for labels in (fake, torch.tensor(3), [1, 2]):
        label_counts.send(labels)
        assert label_counts.expected(8, -100) == 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to the device, where every tensor counts as one of a GPU's."""
    told: list[str] = []

    class Event:
        def record(self) -> None:
            told.append("record")

        def synchronize(self) -> None:
            told.append("wait")

    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        told.append("pinned" if pin_memory else "pageable")
        return own(*size, **options)

    own = torch.empty
    monkeypatch.setattr(label_counts, "_is_on_gpu", lambda labels: True)
    monkeypatch.setattr(label_counts, "_is_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", empty)
    return told


def test_a_gpus_labels_are_queued_and_waited_for_at_the_loss(cuda: list[str]) -> None:
    label_counts.send(_labels())
    assert cuda == ["pinned", "record"]  # the forward does not wait
    assert label_counts.expected(8, -100) == 3
    assert cuda == ["pinned", "record", "wait"]


def test_nothing_is_copied_into_a_captured_graph(
    cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    label_counts.send(_labels())
    monkeypatch.setattr(label_counts, "_is_capturing", lambda: True)
    assert label_counts.expected(8, -100) == 0  # a replay has other labels
    label_counts.send(_labels())
    assert cuda == ["pinned", "record"]


# -- memory ----------------------------------------------------------------------------------------


class _Made(TorchDispatchMode):
    """The sizes in bytes of what is allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.dtype, int]] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for t in filter(_is_tensor, tree_leaves(result)):
            if id(t.untyped_storage()) not in given:
                self.found.append((t.dtype, t.nbytes))
        return result


def _is_tensor(t: Any) -> bool:
    return isinstance(t, Tensor)


def test_a_trained_heads_gradient_is_scaled_without_copies() -> None:
    """Of 1 GB in bf16: before, an fp32 copy and an fp32 product were made of it, 4.2 GB."""
    with FakeTensorMode(), _Made() as made:
        head = torch.empty(VOCABULARY, HIDDEN, dtype=BF16, device="cuda")
        loss_grad, count = (torch.empty((), device="cuda") for _ in range(2))
        made.found.clear()
        found = (None, head, None, count)
        like = [None, (head.shape, head.dtype), None]
        _, scaled, _ = head_op.scaled(found, loss_grad, like, [False, True, False], 1.0)
    assert scaled is not None
    assert scaled.dtype is BF16
    large = [bytes_ for _, bytes_ in made.found if bytes_ > 1 << 20]
    assert large == [head.nbytes]


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
def test_a_gradient_is_scaled_with_one_rounding(dtype: torch.dtype) -> None:
    t, factor = torch.randn(50, 30).to(dtype), torch.tensor(1 / 3)
    found = head_op._scaled_on_a_gpu(t, factor, dtype)
    assert torch.equal(found, (t.float() * factor).to(dtype))
    wide = head_op._scaled_on_a_gpu(t.float(), factor, dtype)  # of fp16 heads the sum is fp32
    assert wide.dtype is dtype
    assert torch.equal(wide, found)


# -- tiles -----------------------------------------------------------------------------------------


@pytest.fixture
def benchmark_modules() -> Iterator[Any]:
    if not has_triton():
        pytest.skip("Triton is not installed")
    if interpreting():
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("launches")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def _step(modules: Any, rows: int, guess: int, monkeypatch: Any) -> tuple[list[Any], _Made]:
    """The launches of a loss of an 8B model's head, and what it allocates, on fake tensors."""
    from fusewright.kernels.loss import head_triton as kernels

    monkeypatch.setattr(kernels, "expected", lambda *given: guess)
    with FakeTensorMode(), modules.as_on_a_gpu(Gpu(9, 227 << 10, multiprocessors=132)) as found:
        x = torch.empty(rows, HIDDEN, dtype=BF16)
        weight = torch.empty(VOCABULARY, HIDDEN, dtype=BF16)
        labels = torch.empty(rows, dtype=torch.int64)
        with _Made() as made:
            kernels.compute(
                x, weight, None, None, None, labels, None, ["logprob"], ["logprob"], [-1.0], [], 0,
                -100, 1.0, 0.0, 1.0, [True, True, False, False, False, False],
            )  # fmt: skip
    return [one.name for one in found], made


def test_the_library_multiplies_the_rows_that_count(
    benchmark_modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded = _step(benchmark_modules, 2048, 0, monkeypatch)[0]
    assert bounded.count("matmul") == 3 * bounded.count("rows")  # logits, dx and dW
    assert bounded.count("rows") == 4
    names, made = _step(benchmark_modules, 2048, 2040, monkeypatch)
    assert names == ["rows", "matmul"] * 2  # dW alone, which is added up in fp32
    tiles = [size for dtype, size in made.found if size % (2 * VOCABULARY) == 0 and dtype is BF16]
    assert max(size for size in tiles if size < 1 << 29) > 200 << 20
    names, _ = _step(benchmark_modules, 2048, 600, monkeypatch)
    assert names[:2] == ["rows", "matmul"]
    assert names[2:].count("rows") == 3  # the others, in case that there are some that count


def test_one_tile_makes_the_heads_gradient_in_its_own_dtype(
    benchmark_modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = VOCABULARY * HIDDEN
    names, made = _step(benchmark_modules, 600, 600, monkeypatch)
    assert names == ["rows"]
    large = [made_of for made_of in made.found if made_of[1] >= head]
    assert large == [(BF16, 2 * head)]
    _, several = _step(benchmark_modules, 2048, 2048, monkeypatch)
    large = [made_of for made_of in several.found if made_of[1] >= head]
    assert large == [(F32, 4 * head), (BF16, 2 * head)]
