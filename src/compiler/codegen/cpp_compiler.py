"""Inductor's C++ compiler on the CPU: set up beside the capture, and waited for at the end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ...kernels.native import library as native


def prepare(module: nn.Module) -> threading.Thread | None:
    """Start what Inductor must have before its first kernel for the CPU, in the background.

    It finds the vector instructions, and compiles the headers that all kernels include: several
    seconds, which pass beside the capture instead of after it.

    Args:
        module: a captured module; its device decides.

    Returns:
        The thread to wait for before Inductor is called, or None if there is nothing to prepare.
    """
    if any(p.device.type != "cpu" for p in module.parameters()):
        return None
    # imported here: two threads that import PyTorch's packages, which are cyclic, can fail
    from torch._inductor import async_compile, codecache, compile_fx, cpu_vec_isa  # noqa: F401

    thread = threading.Thread(target=_prepare, daemon=True)
    thread.start()
    return thread


_one_at_a_time = threading.Lock()


def _prepare() -> None:
    with _one_at_a_time, contextlib.suppress(Exception):  # it fails again in use, with its message
        if not _headers_prove_instructions():
            _find_vector_instructions()
            _compile_headers()


def _compile_headers() -> None:
    from torch._inductor import codecache

    compile_: Any = getattr(codecache, "_worker_compile_cpp", None)

    def compile_after_kernels(*args: Any, **kwargs: Any) -> Any:
        """The kernels are needed first; beside both compilers, two cores have none to capture."""
        if native.has_started():
            native.library()
        return compile_(*args, **kwargs)

    with _replaced(codecache, "_worker_compile_cpp", compile_ and compile_after_kernels):
        # a kernel's headers are compiled before its compilation is asked for, which it is not
        codecache.CppPythonBindingsCodeCache.load_async("// nothing", device_type="cpu")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any] | None) -> Iterator[None]:
    """While it lasts, ``owner.name`` is ``function`` in this thread; None replaces nothing."""
    if function is None:
        yield
        return
    original, this_thread = getattr(owner, name), threading.get_ident()

    def chosen(*args: Any, **kwargs: Any) -> Any:
        run = function if threading.get_ident() == this_thread else original
        return run(*args, **kwargs)

    setattr(owner, name, chosen)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _headers_prove_instructions() -> bool:
    """Compile the headers for the vector instructions that the CPU has.

    They use these, with the same options, as the programs do by which Inductor finds out, in four
    seconds, whether the compiler takes them. So these are tried only if the headers are refused.

    Returns:
        Whether the headers were compiled.
    """
    from torch._inductor import config, cpu_vec_isa

    headers = getattr(config, "cpp_cache_precompile_headers", False)
    if not headers or config.cpp.vec_isa_ok is not None or not cpu_vec_isa.x86_isa_checker():
        return False
    with (
        config.patch({"cpp.vec_isa_ok": True}),
        _replaced(cpu_vec_isa.VecISA, "check_build", lambda isa, code: True),
    ):
        cpu_vec_isa.pick_vec_isa()
    try:
        _compile_headers()
    except Exception:
        _forget_vector_instructions()
        return False
    return True


def _forget_vector_instructions() -> None:
    from torch._inductor import cpu_vec_isa

    kinds = (type(isa).__bool__ for isa in cpu_vec_isa.supported_vec_isa_list)
    for cached in (cpu_vec_isa.pick_vec_isa, cpu_vec_isa.valid_vec_isa_list, *kinds):
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def _find_vector_instructions() -> None:
    """Let Inductor try a program with the best vector instructions that the CPU has.

    It would try one with each kind that the CPU has, two seconds of the C++ compiler for each, and
    then take the best. Those that come after one that works are taken to work.
    """
    from torch._inductor import config, cpu_vec_isa

    known = cpu_vec_isa.x86_isa_checker()
    kinds = cpu_vec_isa.supported_vec_isa_list if known else ()
    found = any(isa for isa in kinds if all(flag in known for flag in str(isa).split()))
    with config.patch({"cpp.vec_isa_ok": True}) if found else contextlib.nullcontext():
        cpu_vec_isa.pick_vec_isa()


@contextlib.contextmanager
def kernels_awaited_last() -> Iterator[None]:
    """While a graph is compiled, let no part of it wait for its C++ kernels; wait at the end.

    Inductor waits for those of forward before it begins with backward. The kernels are compiled by
    processes of their own. TorchDynamo, whose lock is held here, compiles in one thread at a time.
    """
    from torch._inductor.async_compile import AsyncCompile

    wait = AsyncCompile.wait
    postponed: list[tuple[Any, dict[str, Any]]] = []

    def postpone(compilation: Any, scope: dict[str, Any]) -> None:
        postponed.append((compilation, scope))

    with _replaced(AsyncCompile, "wait", postpone):
        yield
    for compilation, scope in postponed:
        wait(compilation, scope)
