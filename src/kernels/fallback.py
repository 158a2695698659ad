"""Where a kernel cannot be compiled or launched, the op's plain form computes the call.

Which kernels that happens to is known only once they run: a tile may need more shared memory than
the card has, the compiler may not know a type or a card, the driver may be missing. Verification
runs kernels before they are installed, and refuses a rewrite whose kernel fails (``no_fallback``).
What fails later, with other sizes or in backward, must not end a training run: the call is computed
in plain PyTorch, a warning says so once, and the kernel is not tried again in this process.

Only errors of compiling and launching are caught. Those that a running kernel leaves behind (a
failed assertion, an illegal access) and running out of memory are raised, as in eager code, and so
is everything while a CUDA graph is captured.
"""

from __future__ import annotations

import functools
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from ..errors import first_line

FAILED: dict[str, str] = {}
"""Library op -> why its kernel could not be compiled or launched; it runs its plain form since.

All kernels in C++ count as one (``native/library.py``).
"""


class LaunchError(RuntimeError):
    """A kernel that cannot be compiled or launched, where no plain form may take its place."""


_no_fallback = 0


@contextmanager
def no_fallback() -> Iterator[None]:
    """Raise ``LaunchError`` where a kernel fails, or has failed before: for checks and benchmarks.

    This holds for all threads: the backward pass of a GPU runs in another one.
    """
    global _no_fallback
    _no_fallback += 1
    try:
        yield
    finally:
        _no_fallback -= 1


def with_plain_form(
    name: str, run: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """``run``, or ``plain`` from the first call on whose kernel cannot be compiled or launched.

    ``name`` is that of the library op; ``plain`` has the same signature and results, and no kernel.
    """

    @functools.wraps(run)
    def guarded(*args: Any) -> Any:
        result = attempt(name, run, args)
        return plain(*args) if result is UNABLE else result

    return guarded


UNABLE = object()
"""What ``attempt`` returns in place of a result."""


def attempt(
    name: str, run: Callable[..., Any], args: Sequence[Any],
    is_failure: Callable[[Exception], bool] | None = None, instead: str | None = "plain PyTorch",
) -> Any:  # fmt: skip
    """``run(*args)``; ``UNABLE`` if that fails as ``is_failure`` has it, or has done so before.

    By default those are failures to compile or to launch. ``instead`` is what runs from now on,
    None if it is another kernel: then this is no end of the matter for ``no_fallback``, either.
    """
    if name in FAILED:
        if _no_fallback and instead is not None:
            raise LaunchError(_message(name, FAILED[name]))
        return UNABLE
    try:
        return run(*args)
    except Exception as error:
        if not (is_failure or is_launch_failure)(error) or is_capturing():
            raise
        reason = _described(error)
        if _no_fallback and instead is not None:
            raise LaunchError(_message(name, reason)) from error
        if not _no_fallback:
            _give_up(name, reason, instead or "another form")
    # the error is gone here, and with it what its frames held of the GPU's memory
    return UNABLE


def is_strict() -> bool:
    """Whether no plain form may take the place of a kernel."""
    return _no_fallback > 0


def _give_up(name: str, reason: str, instead: str) -> None:
    if FAILED.setdefault(name, reason) is reason:
        text = f"{_message(name, reason)}. It runs in {instead} from now on."
        warnings.warn(text, stacklevel=4)


def _message(name: str, reason: str) -> str:
    return f"the kernel of {name} could not be compiled or launched: {reason}"


def is_capturing() -> bool:
    """Whether a CUDA graph is captured, which would record the plain form."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# ------------------------------------------------------------------------------- kinds of errors

_LAUNCHING = (
    "invalid device function",
    "invalid configuration argument",
    "invalid argument",
    "no kernel image is available",
    "no binary for gpu",
    "kernel image is invalid",
    "too many resources requested for launch",
    "too many blocks in cooperative launch",
    "ptx jit compil",
    "unsupported toolchain",
    "named symbol not found",
    "driver version is insufficient",
    "driver combination",
)
"""CUDA's and HIP's messages of failed loads and launches; others may be of an earlier kernel."""


def is_launch_failure(error: Exception) -> bool:
    """Whether ``error`` says that a kernel cannot be compiled or launched, and nothing else."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return False
    text = str(error)
    if is_of_device(error):
        return any(part in text.lower() for part in _LAUNCHING)
    modules = set(_modules(error.__traceback__))
    kinds = {kind.__name__ for kind in type(error).__mro__}  # Triton is not imported for this
    if "InterpreterError" in kinds or "triton.runtime.interpreter" in modules:
        return False  # a kernel that ran, and is wrong
    if "TritonError" in kinds or isinstance(error, (subprocess.CalledProcessError, ImportError)):
        return True
    in_triton = any(m.partition(".")[0] == "triton" for m in modules)
    return in_triton or _NO_DRIVER in text


_NO_DRIVER = "active drivers"


def is_of_device(error: Exception) -> bool:
    """Whether ``error`` is what the driver says, of this call or of an earlier one."""
    text = str(error)
    said = text.startswith("Triton Error [") or "CUDA error" in text or "HIP error" in text
    return said or isinstance(error, torch.AcceleratorError)


def _modules(frame: TracebackType | None) -> Iterator[str]:
    while frame is not None:
        yield str(frame.tb_frame.f_globals.get("__name__"))
        frame = frame.tb_next


def _described(error: BaseException) -> str:
    """The class and the first line of what the compiler, or the launch, has to say."""
    while isinstance(error.__cause__, type(error)):  # an error in a function that a kernel calls
        error = error.__cause__
    message = getattr(error, "error_message", None)  # the message of others begins with the source
    line = str(message).strip().splitlines()[0] if message else first_line(error)
    return f"{type(error).__name__}: {line}"
