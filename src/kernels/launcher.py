"""Launching Triton's kernels again without asking anew which compiled variant to launch.

``JITFunction.run`` classifies each argument, makes a key of strings of them and reads the knobs of
Triton: 8 to 20 microseconds of Python, some forty times in each block of a Llama. Here a launch is
looked up by what decides the variant (never less than Triton itself looks at), and the compiled
kernel is called as ``run`` was seen to call it. How that is differs between versions of Triton, so
it is observed once for each compiled kernel; where it is not what this file knows, and where
anything else watches launches, every launch goes through ``run``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver


class _Launch(NamedTuple):
    """A compiled kernel, and what it is called with besides the arguments of the call."""

    run: Callable[..., Any]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]  # of the parameters after those that are passed by position
    driver: Any
    device: int


_USUAL = object()
"""For arguments that are always launched through ``JITFunction.run``."""

_MOST = 4096
"""Launches that a kernel keeps: lengths of batches may differ without end."""

_observing = threading.Lock()


def launched(function: Any) -> Any:
    """A ``@triton.jit`` function that is launched often; as it is, where it is interpreted."""
    return Kernel(function) if type(function) is JITFunction else function


class Kernel(JITFunction):  # type: ignore[misc,type-arg]  # 2026-12-01: Triton is not typed
    """A ``JITFunction`` whose ``kernel[grid](...)`` keeps the compiled kernels that it launches.

    All parameters but constexpr ones must be passed by position.
    """

    def __init__(self, function: Any) -> None:
        unspecialized = [p.name for p in function.params if p.do_not_specialize]
        super().__init__(function.fn, do_not_specialize=unspecialized)
        self._keys: dict[tuple[type, ...], Callable[..., Any]] = {}
        self._launches: dict[Any, Any] = {}  # key -> _Launch, _USUAL, or a kernel to observe
        self._observed: dict[Any, Any] = {}  # compiled kernel -> _Launch or _USUAL

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Any, *args: Any, **options: Any) -> None:
        types = tuple(map(type, args))
        key_of = self._keys.get(types)
        if key_of is None:
            key_of = self._keys[types] = _key_of(types, self.params)
        key = key_of(types, options, *args)
        known = self._launches.get(key)
        if key is None or known is _USUAL or _is_watched() or self.pre_run_hooks:
            self.run(*args, grid=grid, warmup=False, **options)
        elif type(known) is _Launch and self._is_current(known):
            x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
            known.run(
                x, y, z, known.driver.get_current_stream(known.device), known.function,
                known.metadata, None, None, None, *args, *known.constants,
            )  # fmt: skip
        elif known is None or type(known) is _Launch:
            kernel = self.run(*args, grid=grid, warmup=False, **options)
            if len(self._launches) >= _MOST:
                self._launches.clear()
            if kernel is not None:  # whoever stands in for ``run`` may launch nothing
                self._launches[key] = self._observed.get(kernel, kernel)
        else:
            self._launches[key] = self._observe(known, grid, args, options)

    @staticmethod
    def _is_current(launch: _Launch) -> bool:
        active = driver.active
        return launch.driver is active and launch.device == active.get_current_device()

    def _observe(self, kernel: Any, grid: Any, args: Any, options: Any) -> Any:
        """Launch through ``run``, and see with what ``kernel`` is called."""
        with _observing:
            own = vars(kernel).get("_run")
            if own is None:
                self.run(*args, grid=grid, warmup=False, **options)
                return _USUAL
            observer = kernel._run = _Observer(own)
            try:
                run = self.run(*args, grid=grid, warmup=False, **options)
            finally:
                kernel._run = own
        if run is not kernel:  # it was compiled again
            return run
        launch = self._observed[kernel] = self._understood(kernel, observer, grid, args)
        return launch

    def _understood(self, kernel: Any, observer: _Observer, grid: Any, args: Any) -> Any:
        """The launch, where ``kernel`` was called as this file would call it."""
        active = driver.active
        device = active.get_current_device()
        stream = active.get_current_stream(device)
        head, tail = observer.seen[:9], observer.seen[9:]
        usual = (*grid, 1, 1)[:3] if type(grid) is tuple else None
        if (
            len(head) != 9
            or head[:6] != (*(usual or ()), stream, kernel.function, kernel.packed_metadata)
            or head[7:] != (_ENTER, _EXIT)  # which call nothing: that was asked before
            or len(tail) != len(self.params)
            or any(a is not b for a, b in zip(tail, args, strict=False))
            or not all(p.is_constexpr for p in self.params[len(args) :])
            # AMD's variants depend on the memory behind a tensor, too
            or kernel.metadata.target.backend != "cuda"
        ):
            return _USUAL
        constants = tail[len(args) :]
        return _Launch(
            observer.run, kernel.function, kernel.packed_metadata, constants, active, device
        )


class _Observer:
    """Stands in for what launches a compiled kernel, for one call of this thread."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.seen: tuple[Any, ...] = ()
        self._thread = threading.get_ident()

    def __call__(self, *args: Any, **options: Any) -> Any:
        if threading.get_ident() == self._thread and not options:
            self.seen = args
        return self.run(*args, **options)


def _key_of(types: tuple[type, ...], parameters: Sequence[Any]) -> Callable[..., Any]:
    """What makes of arguments of these types a key that decides the variant; None for no key.

    It is at least as fine as Triton's own: that asks of an integer only whether it is 1, a
    multiple of 16 and how wide, and here it counts by its value, which takes less time.
    """
    parts, tensors = ["types"], []
    for i, (kind, parameter) in enumerate(zip(types, parameters, strict=False)):
        if kind is Tensor or kind is torch.nn.Parameter:
            tensors.append(i)
            parts.append(f"a{i}.dtype")
        elif kind is int and parameter.do_not_specialize:
            parts.append(f"a{i} >> 31")  # whether it takes 64 bits
        elif kind in (int, bool, str):
            parts.append(f"a{i}")
        elif kind is not type(None) and (kind is not float or parameter.is_constexpr):
            return _no_key
    if not tensors:
        return _no_key
    names = ", ".join(f"a{i}" for i in range(len(types)))
    addresses = " | ".join(f"a{i}.data_ptr()" for i in tensors)
    key = f"({', '.join(parts)}, a{tensors[0]}.get_device(), *options, *options.values())"
    # a tensor at an odd address is rare
    source = f"lambda types, options, {names}: None if ({addresses}) & 15 else {key}"
    made: Callable[..., Any] = eval(source, {})
    return made


def _no_key(*_: Any) -> None:
    return None


_ENTER, _EXIT = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
_ENTERED, _EXITED = (getattr(hook, "calls", ()) for hook in (_ENTER, _EXIT))


def _is_watched() -> bool:
    """Whether hooks, a debugger or an instrumented build want to see launches."""
    runtime = knobs.runtime
    return bool(
        _ENTERED
        or _EXITED
        or runtime.launch_enter_hook is not _ENTER
        or runtime.launch_exit_hook is not _EXIT
        or runtime.debug
        or runtime.add_stages_inspection_hook is not None
        or knobs.compilation.instrumentation_mode
    )
