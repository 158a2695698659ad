"""CUDA graphs on the CPU: a capture notes the operations, and a replay repeats them in place.

As on a GPU, a captured operation computes nothing; a replay reads and writes the memory of the
capture, whatever lies there by now; and random numbers are drawn at a replay. Beyond that, before
each replay all memory that the graphs of its pool own is spoilt: what outlives another graph's
replay only by chance does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fusewright.compiler.codegen import cuda_graphs

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default}


class Pool:
    """What graphs share: the memory that their operations have made."""

    def __init__(self) -> None:
        self.storages: list[Any] = []

    def spoil(self) -> None:
        for storage in self.storages:
            storage.fill_(255)  # as floating-point numbers, not a number


class Recorder(TorchDispatchMode):
    """Notes operations, and runs them: for the shapes."""

    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        inputs = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [isinstance(t, Tensor) and _place(t) not in inputs for t in tree_leaves(result)]
        leaves = tree_leaves(result)
        self.graph.operations.append((func, args, kwargs or {}, leaves, made))
        new = (t for t, is_new in zip(leaves, made, strict=True) if is_new)
        self.graph.shared.storages += [t.untyped_storage() for t in new if t.numel()]
        return result


class RecordedGraph:
    """In the place of ``torch.cuda.CUDAGraph``."""

    replays = 0
    """Of all graphs."""

    def __init__(self) -> None:
        self.operations: list[Any] = []
        self.generators = [torch.default_generator]

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def capture_begin(self, pool: Pool, capture_error_mode: str) -> None:
        self.shared, self._random = pool, [g.get_state() for g in self.generators]
        Cuda.capturing = True
        self._recorder = Recorder(self)
        self._recorder.__enter__()

    def capture_end(self) -> None:
        self._recorder.__exit__(None, None, None)
        Cuda.capturing = False
        for generator, state in zip(self.generators, self._random, strict=True):
            generator.set_state(state)
        self.shared.spoil()

    def replay(self) -> None:
        RecordedGraph.replays += 1
        with _disable_current_modes():
            self.shared.spoil()
            for func, args, kwargs, before, made in self.operations:
                after = tree_leaves(func(*args, **kwargs))
                for old, new, is_new in zip(before, after, made, strict=True):
                    if is_new:
                        old.copy_(new)


class Stream:
    """In the place of ``torch.cuda.Stream``; all work has ended when it is given."""

    def __init__(self, device: Any = None) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)


class Cuda:
    """The rest of ``torch.cuda`` that is asked for."""

    capturing = False
    now = Stream()
    debug = 0


def _place(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _set_debug(mode: Any) -> None:
    Cuda.debug = mode


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CUDA graphs be captured of what runs on the CPU, for the rest of a test."""
    Cuda.capturing, Cuda.now, RecordedGraph.replays = False, Stream(), 0
    monkeypatch.setattr(cuda_graphs, "DEVICE", "cpu")
    for name, value in {
        "CUDAGraph": RecordedGraph,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: Cuda.now,
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: Cuda.capturing,
        "graph_pool_handle": Pool,
        "get_sync_debug_mode": lambda: Cuda.debug,
        "set_sync_debug_mode": _set_debug,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)


class Interpreted:
    """In the place of what Inductor compiles of a graph: runs it node by node."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph, self.calls = graph, 0
        self._boxed_call = True  # it takes its arguments in a list

        def run(args: list[Any]) -> Any:
            self.calls += 1
            inputs = list(args)
            args.clear()
            return graph.forward(*inputs)

        self.current_callable: Callable[[list[Any]], Any] = run

    def __call__(self, args: list[Any]) -> Any:
        return self.current_callable(args)


def interpret(monkeypatch: pytest.MonkeyPatch) -> list[Interpreted]:
    """Let Inductor compile nothing; returns the codes that it would have compiled, as they come."""
    import torch._inductor.compile_fx as inductor

    codes: list[Interpreted] = []

    def compile_fx_inner(graph: fx.GraphModule, examples: Any, **_: Any) -> Interpreted:
        codes.append(Interpreted(graph))
        return codes[-1]

    monkeypatch.setattr(inductor, "compile_fx_inner", compile_fx_inner)
    return codes


@contextlib.contextmanager
def another_stream() -> Iterator[Stream]:
    """A stream that is the current one, inside."""
    before, Cuda.now = Cuda.now, Stream()
    try:
        yield Cuda.now
    finally:
        Cuda.now = before
