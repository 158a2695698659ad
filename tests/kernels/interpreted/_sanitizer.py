"""What compute-sanitizer finds on a GPU, found in Triton's interpreter: wrong addresses and races.

Every address that a program reads or writes must lie within what a tensor argument of the launch
spans, no two programs may write the same byte, and none may read what another one writes. Programs
run in a random order. What the threads of one program do to each other is not seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from tests.kernels.aot_cases import cases_of

Access = tuple[int, np.ndarray, int]
"""A program, the addresses that it has read or written, each once, and the bytes at each."""


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses of the first byte that is the tensor's, and of the first behind it."""
    if not t.numel():
        return 0, 0
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


@dataclass
class Launch:
    """One launch: what it may access, and what its programs have."""

    kernel: str
    spans: list[tuple[int, int]]
    program: int = 0
    order: list[tuple[int, int, int]] = field(default_factory=list)
    reads: list[Access] = field(default_factory=list)
    writes: list[Access] = field(default_factory=list)

    def outside(self, addresses: np.ndarray, size: int) -> bool:
        """Whether one of the accesses of ``size`` bytes belongs to no tensor of this launch."""
        inside = np.zeros(addresses.shape, bool)
        for start, end in self.spans:
            inside |= (addresses >= start) & (addresses + size <= end)
        return not inside.all()

    def races(self) -> Iterator[str]:
        """What two programs do to the same byte."""
        if not self.writes:
            return
        addresses = np.concatenate([_bytes(a, size) for _, a, size in self.writes])
        owners = np.concatenate([np.full(a.size * size, p) for p, a, size in self.writes])
        order = np.lexsort((owners, addresses))
        addresses, owners = addresses[order], owners[order]
        same = addresses[1:] == addresses[:-1]
        if (same & (owners[1:] != owners[:-1])).any():
            yield "two programs write the same byte"
        for program, read, size in self.reads:
            touched = _bytes(read, size)
            found = np.searchsorted(addresses, touched).clip(max=addresses.size - 1)
            if ((addresses[found] == touched) & (owners[found] != program)).any():
                yield "a program reads what another one writes"
                return


def _bytes(addresses: np.ndarray, size: int) -> np.ndarray:
    return (addresses[:, None] + np.arange(size)).ravel()


class Sanitizer:
    """Launches of this process while it is ``on``, and what is wrong with them."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.launched: dict[str, int] = {}
        self.problems: dict[str, None] = {}
        self.launch: Launch | None = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch every launch."""
        builder = interpreter.InterpreterBuilder
        wrapped: dict[str, Callable[..., Callable[..., Any]]] = {
            "create_masked_load": self._load,
            "create_masked_store": self._store,
            "create_atomic_rmw": self._atomic,
            "create_atomic_cas": self._atomic,
            "set_grid_dim": self._grid,
            "set_grid_idx": self._program,
        }
        patches = [
            patch.object(builder, name, wrap(getattr(builder, name)))
            for name, wrap in wrapped.items()
        ]
        executor = interpreter.GridExecutor
        patches.append(patch.object(executor, "__call__", self._call(executor.__call__)))
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in reversed(patches):
                one.stop()

    def _note(self, problem: str) -> None:
        assert self.launch is not None
        self.problems[f"{self.launch.kernel}: {problem}"] = None

    def _call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(executor: Any, *args: Any, **kwargs: Any) -> None:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            name = _name(executor.fn)
            self.launched[name] = self.launched.get(name, 0) + 1
            self.launch = Launch(name, [_span(t) for t in tensors])
            call(executor, *args, **kwargs)
            for problem in self.launch.races():
                self._note(problem)
            self.launch = None

        return watched

    def _grid(self, set_grid: Callable[..., Any]) -> Callable[..., Any]:
        def watched(builder: Any, *grid: int) -> None:
            assert self.launch is not None
            self.launch.order = list(product(*map(range, grid)))
            self.random.shuffle(self.launch.order)
            self.launch.program = -1
            set_grid(builder, *grid)

        return watched

    def _program(self, set_program: Callable[..., Any]) -> Callable[..., Any]:
        def watched(builder: Any, *index: int) -> None:
            assert self.launch is not None
            self.launch.program += 1
            set_program(builder, *self.launch.order[self.launch.program])

        return watched

    def _load(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def watched(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            addresses, size = self._accessed(pointers, mask, "reads")
            if addresses.size:
                self._log("reads", addresses, size)
            return load(builder, pointers, mask, *rest)

        return watched

    def _store(self, store: Callable[..., Any]) -> Callable[..., Any]:
        def watched(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            addresses, size = self._accessed(pointers, mask, "writes")
            if addresses.size:
                self._log("writes", addresses, size)
            if np.unique(addresses).size < addresses.size:
                self._note("one store writes an address twice")
            return store(builder, pointers, value, mask, *rest)

        return watched

    def _atomic(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def watched(builder: Any, *given: Any) -> Any:
            self._note("an atomic operation, whose order is not fixed")
            return run(builder, *given)

        return watched

    def _accessed(self, pointers: Any, mask: Any, verb: str) -> tuple[np.ndarray, int]:
        """The addresses that are not masked out, and the bytes at each."""
        assert self.launch is not None
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        places = np.asarray(pointers.data)
        wanted = np.broadcast_to(np.asarray(mask.data).astype(bool), places.shape)
        addresses = places[wanted].ravel().astype(np.int64)
        if self.launch.outside(addresses, size):
            self._note(f"{verb} outside of its tensors")
        return addresses, size

    def _log(self, kind: str, addresses: np.ndarray, size: int) -> None:
        assert self.launch is not None
        log: list[Access] = getattr(self.launch, kind)
        log.append((self.launch.program, np.unique(addresses), size))


def entry_kernels(modules: Sequence[Any]) -> set[str]:
    """The kernels that launchers launch, as their ahead-of-time cases name them."""
    names = (module.__name__.partition(".kernels.")[2] for module in modules)
    kernels = (case.kernel for name in names for case in cases_of(name))
    return {_name(kernel.fn) for kernel in kernels}


def _name(function: Any) -> str:
    """A kernel's file, and its own name."""
    return f"{Path(function.__code__.co_filename).stem}.{function.__name__}"
