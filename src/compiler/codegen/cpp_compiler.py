"""Inductor's C++ compiler on the CPU: set up during the capture, and waited for at the end."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...kernels.fork_lock import ForkLock
from ...kernels.native import build
from ...kernels.native import library as native


def prepare(module: nn.Module) -> threading.Thread | None:
    """Start what Inductor must have before its first kernel for the CPU, in the background.

    Returns the thread to wait for before Inductor is called, or None if there is none.
    """
    # It finds the vector instructions, and compiles the headers that all kernels include: several
    # seconds, which pass during the capture instead of after it.
    _import_inductor()
    if any(p.device.type != "cpu" for p in module.parameters()):
        return None
    # imported here: two threads that import PyTorch's packages, which are cyclic, can fail
    from torch._inductor import async_compile, codecache, compile_fx, cpu_vec_isa  # noqa: F401

    # a new thread has Inductor's settings, but not what was set for this one
    thread = threading.Thread(target=contextvars.copy_context().run, args=(_prepare,), daemon=True)
    thread.start()
    return thread


_importing = ForkLock()
_imports: list[threading.Thread] = []
"""The thread that imports Inductor, once there is one: signals go to the main thread alone."""


def _import_inductor() -> None:
    """Import Inductor, to its end also if Ctrl-C comes meanwhile.

    Half of it could not be imported again in this process: its lowerings are registered in tables
    of other modules, which refuse them the second time (torch 2.13).
    """

    def load() -> None:
        with contextlib.suppress(Exception):  # it fails again in use, with its message
            from torch._inductor import compile_fx  # noqa: F401

    with _importing:
        if "torch._inductor.compile_fx" not in sys.modules and not _imports:
            _imports.append(threading.Thread(target=load, daemon=True))
            _imports[0].start()
    for thread in _imports:
        thread.join()


_preparing = ForkLock()
"""Held while functions of PyTorch are replaced: two threads would put each other's back."""


def _prepare() -> None:
    with _preparing, contextlib.suppress(Exception):  # it fails again in use, with its message
        if is_proven() and _take_vector_instructions():
            return
        if not _headers_prove_instructions():
            _find_vector_instructions()
            _compile_headers()


def _compile_headers() -> None:
    from torch._inductor import codecache

    def after_kernels(compile_: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wait for our own kernels, which are needed earlier."""
        # Two compilers leave two cores no time to capture. The headers are needed seconds later,
        # so that with more cores nothing is lost.
        if native.has_started():
            native.library()
        return compile_(*args, **kwargs)

    with _replaced(codecache, "_worker_compile_cpp", after_kernels):
        # a kernel's headers are compiled before its compilation is asked for, which it is not
        codecache.CppPythonBindingsCodeCache.load_async("// nothing", device_type="cpu")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, a call of ``owner.name`` in this thread is ``function(original, ...)``."""
    # only one thread may be in here for a name; what a version of PyTorch lacks is not replaced
    original, this_thread = getattr(owner, name, None), threading.get_ident()
    if original is None:
        yield
        return

    def chosen(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == this_thread:
            return function(original, *args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, chosen)
    try:
        yield
    finally:
        setattr(owner, name, original)


def proof() -> Path:
    """The file that is there once the compiler was seen to know the CPU's vector instructions.

    Raises OSError or RuntimeError where no such file can be kept.
    """
    name = build.compiler_name(torch.__version__, torch.version.git_version or "")
    return build.kept_folder() / f"instructions-{name}"


def is_proven() -> bool:
    """Whether no header need be compiled before the first kernel is."""
    from torch._inductor import config

    if not getattr(config, "cpp_cache_precompile_headers", False):
        return False
    with contextlib.suppress(OSError, RuntimeError):
        return proof().exists()
    return False


def _headers_prove_instructions() -> bool:
    """Compile the headers for the CPU's vector instructions; whether that succeeded."""
    # They have the options of the programs by which Inductor finds out, in four seconds, whether
    # the compiler knows these instructions. So the programs are compiled only if the headers are
    # refused. An assembler that is older than its compiler shows at the first kernel: the block
    # then runs as it was, with the reason.
    from torch._inductor import config

    if not getattr(config, "cpp_cache_precompile_headers", False):
        return False
    if not _take_vector_instructions():
        return False
    try:
        _compile_headers()
    except Exception:
        _forget_vector_instructions()
        return False
    with contextlib.suppress(OSError, RuntimeError):
        proof().touch(mode=0o600)
    return True


def _take_vector_instructions() -> bool:
    """Let Inductor use all vector instructions of the CPU; whether that was left open."""
    from torch._inductor import config, cpu_vec_isa

    if config.cpp.vec_isa_ok is not None or not cpu_vec_isa.x86_isa_checker():
        return False
    with (
        config.patch({"cpp.vec_isa_ok": True}),
        _replaced(cpu_vec_isa.VecISA, "check_build", lambda check, isa, code: True),
    ):
        cpu_vec_isa.pick_vec_isa()
    return True


def _forget_vector_instructions() -> None:
    from torch._inductor import cpu_vec_isa

    cached = [cpu_vec_isa.pick_vec_isa, cpu_vec_isa.valid_vec_isa_list]
    for isa in cpu_vec_isa.supported_vec_isa_list:
        cached.append(type(isa).__bool__)
        for extension in ("avx512_bf16", "amx_fp16"):
            vars(isa).pop(f"_is_{extension}_supported", None)
            cached.append(getattr(isa, f"is_{extension}_supported", None))
    for function in cached:
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _find_vector_instructions() -> None:
    """Let Inductor try a program with the best vector instructions that the CPU has."""
    # It would try one with each kind that the CPU has, two seconds of the C++ compiler for each,
    # and then take the best. Those that come after one that works are taken to work.
    from torch._inductor import config, cpu_vec_isa

    flags = cpu_vec_isa.x86_isa_checker()
    kinds = cpu_vec_isa.supported_vec_isa_list if flags else ()
    is_supported = any(isa for isa in kinds if all(flag in flags for flag in str(isa).split()))
    with config.patch({"cpp.vec_isa_ok": True}) if is_supported else contextlib.nullcontext():
        cpu_vec_isa.pick_vec_isa()


def _forget_compile_threads() -> None:
    """In a fork: let Inductor start its threads again; those of its pool were not forked."""
    module: Any = sys.modules.get("torch._inductor.async_compile")
    pool: Any = getattr(getattr(module, "AsyncCompile", None), "pool", None)
    if hasattr(pool, "cache_clear"):
        pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_compile_threads)


@contextlib.contextmanager
def kernels_awaited_last() -> Iterator[None]:
    """While a graph is compiled, let no part of it wait for its C++ kernels; wait at the end."""
    # Inductor waits for those of forward before it begins with backward. Other processes compile
    # the kernels. TorchDynamo, whose lock is held here, compiles in one thread at a time.
    from torch._inductor.async_compile import AsyncCompile

    postponed: list[Callable[[], None]] = []

    def postpone(wait: Callable[..., None], *args: Any) -> None:
        postponed.append(functools.partial(wait, *args))

    with _replaced(AsyncCompile, "wait", postpone):
        yield
    for wait in postponed:
        wait()


@contextlib.contextmanager
def headers_for_new_kernels() -> Iterator[None]:
    """While a graph is compiled or read, compile no headers for kernels that are there."""
    # Inductor has its headers compiled, for ten seconds of the C++ compiler, before it looks
    # whether there is anything to compile.
    from torch._inductor import codecache

    source = ""

    def note(write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal source
        written = write(*args, **kwargs)
        source = written[1]
        return written

    def precompile(compile_: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if source and Path(source).with_suffix(".so").exists():
            return ""
        return compile_(*args, **kwargs)

    with (
        _replaced(codecache, "write", note),
        _replaced(codecache, "_precompile_header", precompile),
    ):
        yield
