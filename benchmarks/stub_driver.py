"""A stand-in for the driver of an H100: kernels are compiled for it, and their launches noted."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from fusewright.kernels import launch


class StubDriver:
    """What Triton asks of a driver; ``launch`` is called in place of each launch.

    Attributes:
        target: as Triton calls the card.
        device: the current one.
        stream: the current one.
        noted: the arguments of each launch.
    """

    def __init__(self, target: Any = None, device: int = 0) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = target or GPUTarget("cuda", 90, 32)
        self.device, self.stream = device, 7
        self.noted: list[tuple[Any, ...]] = []
        self.utils = self
        self.launch: Callable[..., None] = lambda *args: self.noted.append(args)
        self._functions = itertools.count(1)

    def get_current_target(self) -> Any:
        """The card."""
        return self.target

    def get_current_device(self) -> int:
        """The card's number."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """The stream."""
        return self.stream

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Its limits."""
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, *args: Any) -> tuple[int, ...]:
        """Module, function, registers, spills and threads of a compiled kernel."""
        function = next(self._functions)
        return function, function, 32, 0, 1024

    def unload_module(self, module: Any) -> None:
        """There is none."""

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """What launches a compiled kernel."""
        return self.launch


@contextmanager
def stub_driver() -> Iterator[StubDriver]:
    """Let ops on CPU tensors launch their kernels, and the driver note it."""
    from triton.compiler import compiler
    from triton.runtime import driver

    stub = StubDriver()
    before = driver._active
    _forget()
    driver.set_active(stub)  # type: ignore[arg-type]
    limit = mock.patch.object(compiler, "max_shared_mem", return_value=227 << 10)
    try:
        with limit, mock.patch.object(launch, "_INTERPRETING", True):
            yield stub
    finally:
        driver._active = before
        _forget()


def _forget() -> None:
    """What was compiled for a driver is launched by that one."""
    from triton.runtime import JITFunction

    modules = [m for name, m in list(sys.modules.items()) if name.startswith("fusewright.kernels")]
    for member in (member for module in modules for member in vars(module).values()):
        if isinstance(member, JITFunction):
            member.device_caches.clear()
