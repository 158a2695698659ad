"""All launched kernels in the interpreter: addresses, races, uninitialized memory.

    TRITON_INTERPRET=1 python -m tests.kernels.interpreted.sanitizer [DTYPE ...]

Without a dtype: a few ops, and what is planted must be found. With them: every call that launches a
kernel, so that a new op is checked by being registered; it prints each with its seconds.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fusewright import kernels
from fusewright.kernels.op import ExampleSizes
from tests.kernels.calls import LAUNCHING, sized
from tests.kernels.interpreted import run
from tests.kernels.interpreted._sanitizer import Sanitizer, entry_kernels

SAMPLE = ("rms_norm", "add_rms_norm-outer-offset", "glu", "quant_linear", "rope", "layer_norm")


def results(name: str, sizes: ExampleSizes, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of the call of that name, always with the same numbers."""
    call = replace(LAUNCHING[name], sizes=sizes, dtype=dtype).call()
    outputs = tree_leaves(call.ours(*call.tensors))
    live = [o for o in outputs if o.requires_grad]
    wanted = [t for t in call.tensors if t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in live]
    gradients = torch.autograd.grad(live, wanted, upstream, allow_unused=True) if live else ()
    return [t.detach() for t in (*outputs, *gradients) if t is not None]


def changed(
    sanitizer: Sanitizer, names: Sequence[str], sizes: ExampleSizes, dtype: torch.dtype
) -> list[str]:
    """Which of these calls have other results when they are watched.

    Then programs have other orders, and memory that nobody has written is NaN: the results must be
    the same bits.
    """
    found = []
    for name in names:
        start = time.perf_counter()
        expected = results(name, sizes, dtype)
        torch.use_deterministic_algorithms(True)  # which fills uninitialized memory
        assert torch.utils.deterministic.fill_uninitialized_memory
        try:
            with sanitizer.on():
                watched = results(name, sizes, dtype)
        finally:
            torch.use_deterministic_algorithms(False)
        for a, b in zip(expected, watched, strict=True):
            if not torch.equal(a, b):
                found.append(f"{name} in {dtype}: depends on an order, or on uninitialized memory")
        if len(names) > len(SAMPLE):
            print(f"{name} {dtype} {time.perf_counter() - start:.1f} s", flush=True)
    return found


def check_a_sample() -> None:
    sanitizer = Sanitizer()
    assert changed(sanitizer, SAMPLE, sized(2, 5, 64), torch.bfloat16) == []
    assert list(sanitizer.problems) == []
    assert len(sanitizer.launched) >= len(SAMPLE)


@triton.jit
def copy_kernel(x, y, size, stride, BLOCK: tl.constexpr, LIMIT: tl.constexpr):
    """Copies blocks; reads or writes out of bounds, or what is another program's, when asked to."""
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < size + LIMIT), at < size)


@triton.jit
def sum_kernel(x, y):
    """A sum over programs, whose order is not fixed."""
    tl.atomic_add(y, tl.load(x + tl.program_id(0)))


@triton.jit
def last_one_missing_kernel(x, y, size, BLOCK: tl.constexpr):
    """Leaves the last number of its output as it was."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < size), at < size - 1)


def _copied(**planted: Any) -> list[str]:
    given = {"stride": 8, "LIMIT": 0, "size": 20, "view": slice(20), "onto": False} | planted
    memory = torch.arange(64.0)
    x = memory[given["view"]]
    y = memory[2:22] if given["onto"] else torch.zeros(20)
    sanitizer = Sanitizer()
    with sanitizer.on():
        copy_kernel[(3,)](x, y, given["size"], given["stride"], 8, given["LIMIT"])
    return list(sanitizer.problems)


def check_what_is_planted_is_found() -> None:
    name = "sanitizer.copy_kernel"
    assert _copied() == []
    # also where the address is in the storage of a view
    assert _copied(LIMIT=1) == [f"{name}: reads outside of its tensors"]
    beyond = _copied(size=21, view=slice(21))
    assert beyond == [f"{name}: writes outside of its tensors"]
    assert f"{name}: two programs write the same byte" in _copied(stride=7)
    assert f"{name}: a program reads what another one writes" in _copied(onto=True)
    x, y = torch.ones(4), torch.zeros(1)
    sanitizer = Sanitizer()
    with sanitizer.on():
        sum_kernel[(4,)](x, y)
    (found,) = sanitizer.problems
    assert "atomic" in found


def check_uninitialized_memory_is_seen() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        y = torch.empty(20)
    finally:
        torch.use_deterministic_algorithms(False)
    last_one_missing_kernel[(3,)](torch.ones(20), y, 20, 8)
    assert y[:19].eq(1).all()
    assert y[19].isnan()


def main(dtypes: Sequence[str]) -> None:
    """Check every call with rows that fill no tile, and with so few that other kernels run."""
    sanitizer, found = Sanitizer(), []
    for dtype in (getattr(torch, name) for name in dtypes):
        for sizes in (sized(1, 3, 128), sized(2, 19, 64)):
            found += changed(sanitizer, list(LAUNCHING), sizes, dtype)
    names = (m.name for m in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."))
    modules = [importlib.import_module(name) for name in names if name.endswith("_triton")]
    # every kernel has a form for bf16, and some have no other
    missing = entry_kernels(modules) - set(sanitizer.launched) if "bfloat16" in dtypes else set()
    found += [*sanitizer.problems, *(f"{name} was not launched" for name in sorted(missing))]
    print(*found, sep="\n")
    print(f"{len(sanitizer.launched)} kernels, {sum(sanitizer.launched.values())} launches")
    print(f"{len(found)} problems")
    sys.exit(bool(found))


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1:])
    else:
        run(check_a_sample, check_what_is_planted_is_found, check_uninitialized_memory_is_seen)
