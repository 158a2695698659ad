"""What every launch of a Triton kernel does first, tried without a GPU."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fusewright
from fusewright.kernels import launch
from fusewright.kernels.launch import dot_precision, library_op, on_device

_BACKENDS = (torch.backends, torch.backends.cuda.matmul)


@pytest.fixture
def _precision_restored() -> Iterator[None]:
    before = [b.fp32_precision for b in _BACKENDS]
    yield
    for backend, value in zip(_BACKENDS, before, strict=True):
        backend.fp32_precision = value


@pytest.mark.usefixtures("_precision_restored")
def test_tf32_is_read_however_it_was_set() -> None:
    assert dot_precision(torch.float32) == "ieee"
    torch.backends.fp32_precision = "tf32"  # as TrainingArguments(tf32=True) does
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        _ = torch.backends.cuda.matmul.allow_tf32
    assert dot_precision(torch.float32) == "tf32"
    assert dot_precision(torch.bfloat16) == dot_precision(torch.float16) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert dot_precision(torch.float32) == "ieee"


def test_nothing_reads_the_flag_that_raises() -> None:
    sources = Path(fusewright.__file__).parent.rglob("*.py")
    code = {path: path.read_text(encoding="utf-8") for path in sources}
    reads = re.compile(r"^[^`#\n]*matmul\.allow_tf32", re.MULTILINE)
    assert [str(path) for path, text in code.items() if reads.search(text)] == []


def test_every_launch_says_whether_a_product_and_a_sum_round_once() -> None:
    """Triton's default changes from 3.9 to 3.10."""
    launches, silent = 0, []
    for path in Path(fusewright.__file__).parent.rglob("*_triton.py"):
        text = path.read_text(encoding="utf-8")
        calls = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call))
        for call in calls:
            kernel = getattr(getattr(call.func, "value", None), "id", "")
            if not isinstance(call.func, ast.Subscript) or not kernel.endswith("_kernel"):
                continue
            launches += 1
            given = {k.arg for k in call.keywords}
            in_a_dict = None in given and '"enable_fp_fusion":' in text
            if "enable_fp_fusion" not in given and not in_a_dict:
                silent.append(f"{path.name}:{call.lineno}")
    assert launches >= 15
    assert silent == []


@pytest.mark.parametrize("nested", [False, True])
def test_kernels_launch_on_the_device_of_their_tensors(
    nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another one is current: of a loss whose head is on a card of its own."""
    current: list[torch.device] = []

    @contextlib.contextmanager
    def device(of: torch.device) -> Iterator[None]:
        current.append(of)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode():
        there, here = torch.empty(4, device="cuda:1"), torch.empty(4)
    launched = on_device(lambda *args: list(current))
    assert launched(*([1.0, [there]] if nested else [there, 2])) == [torch.device("cuda:1")]
    assert launched(here) == []
    with FakeTensorMode():
        assert launched(torch.empty(4, device="cuda:0")) == []  # the current one already


def test_every_op_that_launches_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its definition: those of one Triton kernel, and those that launch several themselves."""
    guarded: list[Any] = []
    monkeypatch.setattr(launch, "on_device", lambda f: guarded.append(f) or f)
    monkeypatch.setattr(launch, "_LIBRARY", torch.library.Library("fusewright_guarded", "DEF"))
    monkeypatch.setattr(torch.library, "register_fake", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.ops, "fusewright", torch.ops.fusewright_guarded)

    def launcher(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    run = library_op(
        "test_several(Tensor x) -> Tensor", launcher, torch.empty_like, launches=lambda x: True
    )
    library_op("none(Tensor x) -> Tensor", torch.neg, torch.empty_like)
    assert guarded == [launcher]
    assert torch.equal(run(torch.zeros(2)), torch.ones(2))
    monkeypatch.setattr(torch, "launched_here", launcher, raising=False)
    monkeypatch.setattr(launch.importlib, "import_module", lambda *args: torch)
    launch._triton("room.OP:launched_here")(torch.zeros(2))
    assert guarded == [launcher, launcher]
