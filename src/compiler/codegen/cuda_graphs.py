"""CUDA graphs of blocks: what a compiled block launches is recorded once, and launched as one.

A small block, or a short batch, is computed faster than Python can launch it. A CUDA graph launches
all of it in one call, on the memory that it was captured with. What could go wrong with that is
kept out by what is captured: the code that Inductor makes of one direction of a block. That is a
function of its arguments, and autograd, hooks, checkpoints and offloading stay around it. Then

- an argument that a module holds (a weight) is read where it lies, and the graph belongs to these
  addresses: each layer has its own graphs;
- every other argument is copied into a buffer of the graph;
- results, and what is saved for backward, are copied out of the graph into new memory.

Nothing of a graph outlives its replay. So all graphs of a device share one pool of memory, which
holds one block at a time; micro-batches may be in flight, blocks be computed again, and results
kept for as long as anyone likes. The copies take a few percent of what a block takes on the GPU: a
graph is used only where it is faster with them, and only after its replay has given what the code
itself gives for the same arguments and random numbers (see ``Graphed``).

TorchInductor's own ``cudagraph_trees`` copies less: what is saved stays in its pool. But there
results end with the next step, and a checkpoint's recomputation in backward counts as a step where
blocks are compiled one by one: a model that keeps hidden states would raise an error.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ...errors import first_line
from ...memory.oom_retry import is_out_of_memory
from ...memory.random_state import RandomState
from ...upstream import changed
from ..options import CudaGraphs as Mode

DEVICE = "cuda"

WARMUP = 2
"""Calls of the same shapes and weights before a graph is captured."""

SHAPES = 4
"""Shapes of the arguments for which one direction of a block has graphs; others run without."""

MARGIN = 0.05
"""By how much of the time without it a graph must be faster to be used (``auto``)."""

_SEEN = 64  # shapes whose calls are counted
_MOVES = 3  # addresses of weights for one shape, for each block of the model
_ROUNDS, _CALLS = 3, 5  # how often both sides of a race take turns, and the calls of a turn
_CHECKED = frozenset({1, 2, 16, 256})  # replays of a graph that are compared with the code again
_NOISE = 4.0  # errors allowed, in those of a second call of code that is not deterministic

Run = Callable[[list[Any]], Sequence[Any]]


class Unfit(Exception):
    """Code that is not captured, or a graph that is not used, and why."""


@dataclass(eq=False)
class CudaGraphs:
    """The CUDA graphs of one session.

    ``blocks`` counts the model's blocks. ``auto`` uses graphs where they are faster, ``on``
    wherever they give the same.
    """

    mode: Mode = "off"
    blocks: Callable[[], int] = lambda: 1
    clock: Callable[[], float] = time.perf_counter
    stopped: str = ""  # why there are none any more
    _graphed: weakref.WeakSet[Graphed] = field(default_factory=weakref.WeakSet)
    _memories: dict[torch.device, _Memory] = field(default_factory=dict)

    def may_serve(self, device: torch.device, codegen: str) -> bool:
        """Whether blocks on ``device`` may have some."""
        if self.mode == "off" or device.type != DEVICE:
            return False
        if codegen != "inductor":
            self.stopped = "blocks run in eager code"
        self.stopped = self.stopped or changed("CUDA graphs") or ""
        return not self.stopped

    def of_block(self, held: Sequence[int], examples: Sequence[Any]) -> BlockGraphs | None:
        """The graphs of a block that is about to be compiled, if it may have some.

        ``held`` are the places of those of its arguments that a module holds.
        """
        tensors = (e for e in examples if isinstance(e, Tensor))
        if (
            self.mode == "off"
            or self.stopped
            or next(tensors, torch.empty(0)).device.type != DEVICE
        ):
            return None
        return BlockGraphs(self, held)

    def add(self, graphed: Graphed) -> None:
        """Let ``graphed`` be reported and released with the others."""
        self._graphed.add(graphed)

    def memory(self, device: torch.device) -> _Memory:
        """What the graphs of ``device`` share."""
        if device not in self._memories:
            self._memories[device] = _Memory(device)
        return self._memories[device]

    def release(self) -> None:
        """Forget all graphs; those that are needed again are captured again."""
        for graphed in list(self._graphed):
            graphed.forget()
        self._memories.clear()

    def stop(self, reason: str) -> None:
        """Capture and replay nothing any more."""
        self.stopped = reason
        self.release()

    def describe(self) -> list[str]:
        """Lines for the report."""
        if self.stopped:
            return [f"CUDA graphs: off, {self.stopped}"]
        if self.mode == "on" and not self._graphed:
            return ["CUDA graphs: none, no block has been compiled for a GPU"]
        return sorted({line for graphed in list(self._graphed) for line in graphed.describe()})


class BlockGraphs:
    """The graphs of one compiled block: those of its forward, and of its backward."""

    def __init__(self, owner: CudaGraphs, held: Sequence[int]) -> None:
        self._owner, self._held = owner, held
        self._weights: set[int] = set()
        self._graphed: list[Graphed] = []

    def around_code(self, code: Any, unfit: str, is_backward: bool) -> None:
        """Let what was compiled of one direction run by graphs; ``unfit``: why not."""
        run = getattr(code, "current_callable", None)
        trees = torch._inductor.config.triton.cudagraphs  # the user's choice
        if run is not None and not trees:  # without: there is nothing to be launched
            name = "backward" if is_backward else "forward"
            graphed = Graphed(self._owner, run, name, self._weights, unfit)
            self._graphed.append(graphed)
            self._owner.add(graphed)
            code.current_callable = graphed

    def around_block(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, the compiled block, which tells its graphs where weights lie."""

        def call(*args: Any) -> Any:
            if not all(graphed.knows_weights for graphed in self._graphed):
                tensors = (args[i] for i in self._held)
                self._weights.update(t.data_ptr() for t in tensors if isinstance(t, Tensor))
            return run(*args)

        return call


def why_unfit(graph: fx.GraphModule) -> str:
    """Why the code of ``graph``, one direction of a block, is not captured; empty if it may be."""
    for node in graph.graph.nodes:
        devices = {
            t.device.type for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)
        }
        if devices - {DEVICE}:
            return f"a part of it runs on the {devices.pop().upper()}"
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return "it writes into what it is given"
        if getattr(node.target, "namespace", "").startswith(("_c10d", "c10d")):
            return "it talks to other processes"
        tags = {str(tag).rpartition(".")[2] for tag in getattr(node.target, "tags", ())}
        if tags & {"data_dependent_output", "dynamic_output_shape", "cudagraph_unsafe"}:
            return f"{node.target} reads values on the host"
    return ""


@dataclass(eq=False)
class _Shape:
    """The graphs for arguments of one shape, by the addresses of the weights."""

    calls: Counter[tuple[int, ...]] = field(default_factory=Counter)
    graphs: OrderedDict[tuple[int, ...], _Graph] = field(default_factory=OrderedDict)
    times: tuple[float, float] | None = None  # seconds without graph and with it
    refusal: str = ""


class Graphed:
    """Code that runs by a CUDA graph, where calls are alike: shapes, sizes, addresses of weights.

    After ``WARMUP`` such calls a graph is captured. Its replay must give what the code gives for
    the same arguments and random numbers: the same bits, or where the code itself does not repeat
    them, no larger differences. The next calls, with other arguments, and some later ones are
    compared, too, and get what the code gives. Other calls, and those where a capture or a dispatch
    mode is active, run the code.
    """

    def __init__(
        self, owner: CudaGraphs, run: Run, name: str, weights: set[int], unfit: str
    ) -> None:
        """Take the code, and the addresses of weights, which are known at the first call."""
        self._owner, self._run, self._name, self._unfit = owner, run, name, unfit
        self._weights = weights
        self._fixed: list[bool] = []
        self._shapes: dict[tuple[Any, ...], _Shape] = {}
        self._many = False

    @property
    def knows_weights(self) -> bool:
        """Whether it knows which of its arguments are weights, or need not know."""
        return bool(self._fixed or self._unfit)

    def forget(self) -> None:
        """Let all graphs go."""
        for state in self._shapes.values():
            state.graphs.clear()
            state.calls.clear()

    def describe(self) -> Iterator[str]:
        """Lines for the report."""
        head = f"CUDA graphs of a block's {self._name}"
        if self._unfit:
            yield f"{head}: none, {self._unfit}"
        reasons = Counter(s.refusal for s in self._shapes.values() if s.refusal)
        if self._many:
            reasons[f"their arguments have more than {_SEEN} shapes"] += 1
        for reason in reasons:
            yield f"{head}: calls run without, {reason}"
        for state in self._shapes.values():
            if state.graphs:
                yield f"{head}: {len(state.graphs)} captured{_timed(state.times)}"

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        """Run, by a graph or not; ``args`` is emptied, as Inductor's code does."""
        if (
            self._unfit
            or self._owner.stopped
            or torch.cuda.is_current_stream_capturing()
            or torch._C._len_torch_dispatch_stack()
        ):
            return self._run(args)
        shape, weights = self._key(args)
        state = self._shapes.get(shape)
        graph = None if state is None else state.graphs.get(weights)
        if state is None or graph is None:
            return self._without(args, shape, weights)
        graph.replays += 1
        if graph.replays in _CHECKED:
            return self._compared(args, state, graph)
        return graph.replay(args)

    def _key(self, args: list[Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        if not self._fixed:
            self._fixed = [
                isinstance(a, Tensor)
                and (isinstance(a, nn.Parameter) or a.data_ptr() in self._weights)
                for a in args
            ]
        shape: list[Any] = []
        weights: list[int] = []
        for a, is_fixed in zip(args, self._fixed, strict=True):
            if is_fixed:
                weights.append(a.data_ptr())
            elif isinstance(a, Tensor):
                shape += (a.shape, a.stride())
            else:
                shape.append(a)
        return tuple(shape), tuple(weights)

    def _without(
        self, args: list[Any], shape: tuple[Any, ...], weights: tuple[int, ...]
    ) -> Sequence[Any]:
        """A call that has no graph; it may be the one to capture it."""
        state = self._shapes.get(shape)
        if state is None:
            if len(self._shapes) == _SEEN:
                self._many = True
                return self._run(args)
            state = self._shapes[shape] = _Shape()
        if state.refusal:
            return self._run(args)
        state.calls[weights] += 1
        blocks = max(self._owner.blocks(), 1)
        if len(state.calls) > _MOVES * blocks:
            self._refuse(state, "the addresses of weights change")
        elif state.calls[weights] > WARMUP:
            if not state.graphs and sum(bool(s.graphs) for s in self._shapes.values()) == SHAPES:
                self._refuse(state, f"their arguments have more than {SHAPES} shapes")
            else:
                return self._captured(args, state, weights, blocks)
        return self._run(args)

    def _refuse(self, state: _Shape, reason: str) -> None:
        state.refusal = reason
        state.graphs.clear()
        state.calls.clear()

    def _captured(
        self, args: list[Any], state: _Shape, weights: tuple[int, ...], blocks: int
    ) -> Sequence[Any]:
        """What the code gives; from now on, a graph may give it."""
        device = next((a.device for a in args if isinstance(a, Tensor)), None)
        if device is None:
            return self._run(args)
        memory = self._owner.memory(device)
        before = _Random(device, args)
        expected = self._run(list(args))
        after = _Random(device, args)
        try:
            graph = _Graph(self._run, args, self._fixed, memory, state.times is None)
            self._require_same(graph, args, expected, before)
            if state.times is None and self._owner.mode == "auto":
                state.times = self._race(graph, args, device)
                if state.times[1] > (1 - MARGIN) * state.times[0]:
                    raise Unfit(f"they would be no faster{_timed(state.times)}")
        except Unfit as error:
            self._refuse(state, str(error))
        except Exception as error:
            if not is_out_of_memory(error):
                memory.repair()
                what = f"{type(error).__name__}: {first_line(error)}"
                self._owner.stop(f"one could not be captured ({what})")
            else:
                self._refuse(state, "there is no memory for them")
        else:
            while len(state.graphs) >= blocks:  # of weights that have moved
                state.graphs.popitem(last=False)
            state.graphs[weights] = graph
        after.restore()
        args.clear()
        return expected

    def _compared(self, args: list[Any], state: _Shape, graph: _Graph) -> Sequence[Any]:
        """What the code gives, and a check that ``graph`` gives the same."""
        before = _Random(graph.device, args)
        expected = self._run(list(args))
        after = _Random(graph.device, args)
        try:
            self._require_same(graph, args, expected, before)
        except Unfit as error:
            self._refuse(state, str(error))
            warnings.warn(
                f"a CUDA graph of a block's {self._name} gives other values than its code, perhaps "
                f"since {graph.replays} calls, and is no longer used: {error}. Please report it; "
                "optimize(model, cuda_graphs='off') does without",
                stacklevel=2,
            )
        after.restore()
        args.clear()
        return expected

    def _require_same(
        self, graph: _Graph, args: list[Any], expected: Sequence[Any], before: _Random
    ) -> None:
        before.restore()
        found = graph.replay(list(args))
        error = _error(found, expected)
        if not error:
            return
        before.restore()
        noise = _error(self._run(list(args)), expected)
        if not error <= _NOISE * noise:
            raise Unfit(
                f"a replay is off by {error:.1g}, and a second call of the code by {noise:.1g}"
            )

    def _race(self, graph: _Graph, args: list[Any], device: torch.device) -> tuple[float, float]:
        """Seconds of a call without the graph, and with it, when calls follow each other."""
        best = [float("inf")] * 2
        for _ in range(_ROUNDS):
            for side, run in enumerate((self._run, graph.replay)):
                torch.cuda.synchronize(device)
                start = self._owner.clock()
                for _ in range(_CALLS):
                    run(list(args))
                torch.cuda.synchronize(device)
                best[side] = min(best[side], (self._owner.clock() - start) / _CALLS)
        return best[0], best[1]


def _timed(times: tuple[float, float] | None) -> str:
    if times is None:
        return ""
    without, graph = (1e6 * seconds for seconds in times)
    return f" ({graph:,.0f} us a call, {without:,.0f} us without)"


def _error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest error of a result, relative to its size; 0 where all are the same."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if not isinstance(b, Tensor):
            worst = worst if a == b else math.inf
        elif (a.shape, a.stride(), a.dtype) != (b.shape, b.stride(), b.dtype):
            return math.inf
        elif not torch.equal(a, b):
            if not b.is_floating_point():
                return math.inf
            same = (a == b) | (a.isnan() & b.isnan())
            off = float((a.float() - b.float()).masked_fill(same, 0).norm())
            size = float(b.float().nan_to_num(0).norm())
            if off:  # or one is not a number, and the other is
                worst = max(worst, off / size if size and not math.isnan(off) else math.inf)
    return worst


def _generators(args: Iterable[Any]) -> list[torch.Generator]:
    # AOTAutograd gives code its own, where a checkpoint draws numbers again
    return [a for a in args if isinstance(a, torch.Generator)]


class _Random:
    """The present state of what some code draws from."""

    def __init__(self, device: torch.device, args: Iterable[Any]) -> None:
        self._state = RandomState.now(device)
        self._others = [(g, g.get_state()) for g in _generators(args)]

    def restore(self) -> None:
        self._state.restore()
        for generator, state in self._others:
            generator.set_state(state)


# --- one graph, and the memory that it shares -----------------------------------------------------


class _Memory:
    """What the graphs of one device share; one of them is in use at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self._lock = threading.RLock()
        self._last: Any = None
        self._buffers: dict[tuple[torch.dtype, int], list[Tensor]] = {}

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """While a graph is in use: from the copies of its arguments to those of its results."""
        with self._lock:
            stream = torch.cuda.current_stream(self.device)
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
            yield

    def buffer(self, dtype: torch.dtype, length: int, taken: Sequence[Tensor]) -> Tensor:
        """A buffer that is none of ``taken``; graphs share them."""
        buffers = self._buffers.setdefault((dtype, length), [])
        free = next((b for b in buffers if all(b is not t for t in taken)), None)
        if free is None:
            free = torch.empty(length, dtype=dtype, device=self.device)
            buffers.append(free)
        return free

    def capture(
        self, run: Callable[[], Sequence[Any]], generators: Iterable[torch.Generator]
    ) -> tuple[Any, Sequence[Any]]:
        """What ``run``, which draws from ``generators``, launches, as a graph; and its results."""
        from torch._inductor.cudagraph_trees import clear_cublas_manager

        graph = torch.cuda.CUDAGraph()
        for generator in generators:  # besides the device's own
            graph.register_generator_state(generator)
        torch.cuda.synchronize(self.device)
        # the workspace of cuBLAS, which others may free, is to lie in the pool
        with clear_cublas_manager(), torch.cuda.stream(self.stream):
            # other threads may do what a capture forbids, such as pinning memory
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                results = run()
            finally:
                graph.capture_end()
        torch.cuda.synchronize(self.device)
        return graph, results

    def warm_up(self, run: Callable[[], Sequence[Any]], watched: bool) -> None:
        """Load what ``run`` needs; ``watched``: Unfit where the host waits for the device in it."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        earlier = torch.cuda.get_sync_debug_mode()
        if watched:
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self.stream):
                run()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            raise Unfit("it reads values on the host") from None
        finally:
            torch.cuda.set_sync_debug_mode(earlier)
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def repair(self) -> None:
        """After a capture that failed: the generator and the allocator still wait for its end."""
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        with contextlib.suppress(Exception):
            generator = torch.cuda.default_generators[self.device.index]
            generator.graphsafe_set_state(generator.clone_state())


class _Graph:
    """One captured call of the code."""

    def __init__(
        self, run: Run, args: Sequence[Any], fixed: Sequence[bool], memory: _Memory, watched: bool
    ) -> None:
        self.device, self.replays, self._memory = memory.device, 0, memory
        inputs, buffers = list(args), dict[int, Tensor]()
        with memory.turn(), torch.inference_mode(False), torch.no_grad():
            for i, a in enumerate(args):
                if not isinstance(a, Tensor):
                    continue
                if is_traceable_wrapper_subclass(a) or a.device != self.device:
                    raise Unfit("it is given what is no plain tensor of one device")
                if not fixed[i] and a.numel():
                    # all that lies between its first and its last element
                    buffers[i] = memory.buffer(a.dtype, _length(a), list(buffers.values()))
                    inputs[i] = buffers[i].as_strided(a.shape, a.stride())
            self._buffers = _by_type(buffers)
            self._fill(args)
            memory.warm_up(lambda: run(list(inputs)), watched)
            # an op may keep what it made of a tensor that nobody has written to since
            torch.autograd.graph.increment_version(tuple(buffers.values()))
            self._graph, results = memory.capture(lambda: run(list(inputs)), _generators(args))
            self._plan(results, inputs)

    def _plan(self, results: Sequence[Any], inputs: Sequence[Any]) -> None:
        """Note how each result is made; nothing is kept of the graph's memory but addresses."""
        # numbers from 0 on are those of arguments, those below of what is made at each replay
        self._results: list[tuple[int, Any, int]] = []  # a number, a layout in it, and an offset
        self._values: dict[int, Any] = {}
        storages: dict[tuple[int, torch.dtype], tuple[int, Any]] = {}
        lengths: Counter[int] = Counter()
        for t in results:
            number = ~(len(storages) + len(self._values))
            if not isinstance(t, Tensor):
                self._values[number] = t
                self._results.append((number, None, 0))
                continue
            if t.device != self.device:
                raise Unfit("a result of it is on another device")
            place = next((i for i, a in enumerate(inputs) if _is_part(t, a)), None)
            if place is not None:
                layout: Any = (t.shape, t.stride())
                offset = int(t.storage_offset() - inputs[place].storage_offset())
                if not offset and layout == (inputs[place].shape, inputs[place].stride()):
                    layout = None  # the argument itself
                self._results.append((place, layout, offset))
                continue
            storage = t.untyped_storage()
            number, _ = storages.setdefault((storage.data_ptr(), t.dtype), (number, storage))
            start = int(t.storage_offset())
            lengths[number] = max(lengths[number], start + _length(t))
            self._results.append((number, (t.shape, t.stride()), start))
        self._used = {number for number, _, _ in self._results if number >= 0}
        self._made = {n: (lengths[n], dtype) for (_, dtype), (n, _) in storages.items()}
        self._sources = _by_type(
            {
                n: _unowned(s, *self._made[n], self.device)
                for n, s in storages.values()
                if lengths[n]
            }
        )

    def _fill(self, args: Sequence[Any]) -> None:
        for places, buffers in self._buffers:
            pairs = zip(places, buffers, strict=True)
            torch._foreach_copy_(buffers, [args[i].as_strided(b.shape, (1,)) for i, b in pairs])

    def replay(self, args: list[Any]) -> list[Any]:
        """The results for ``args``, which is emptied."""
        with self._memory.turn(), torch._C._AutoDispatchBelowAutograd():
            self._fill(args)
            memory = self._values | {i: args[i] for i in self._used}
            args.clear()
            self._graph.replay()
            for number, (length, dtype) in self._made.items():
                memory[number] = torch.empty(length, dtype=dtype, device=self.device)
            for numbers, sources in self._sources:
                torch._foreach_copy_([memory[n] for n in numbers], sources)
            # as Inductor's code: by size, strides and offset, and no view as autograd knows them
            guards: Any = torch._C._dynamo.guards  # 2026-12-01: torch does not type all of it
            view = guards._reinterpret_tensor
            return [
                memory[n] if layout is None else view(memory[n], *layout, offset)
                for n, layout, offset in self._results
            ]


def _by_type(tensors: dict[int, Tensor]) -> list[tuple[list[int], list[Tensor]]]:
    """Numbers and tensors, those of one type together: they are copied by one launch."""
    groups: dict[torch.dtype, tuple[list[int], list[Tensor]]] = {}
    for number, t in tensors.items():
        numbers, alike = groups.setdefault(t.dtype, ([], []))
        numbers.append(number)
        alike.append(t)
    return list(groups.values())


def _length(t: Tensor) -> int:
    """The elements between the first and the last one of ``t``, those of gaps included."""
    if not t.numel():
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))


def _is_part(t: Tensor, of: Any) -> bool:
    """Whether ``t`` lies within ``of``."""
    if not isinstance(of, Tensor) or t.dtype is not of.dtype or not t.numel():
        return False
    start = t.storage_offset() - of.storage_offset()
    is_same = t.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()
    return is_same and start >= 0 and start + _length(t) <= _length(of)


def _unowned(storage: Any, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The beginning of ``storage``, which may be freed: a graph's pool gives it away again."""
    size = length * dtype.itemsize
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), device, size)
    return torch.empty(0, dtype=dtype, device=device).set_(same, 0, (length,), (1,))
