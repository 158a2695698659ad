"""Locks that are held by a thread when the process is forked."""

from __future__ import annotations

import os
import threading

import pytest

from fusewright.compiler.codegen import cpp_compiler
from fusewright.kernels import choice
from fusewright.kernels.fork_lock import ForkLock
from fusewright.kernels.native import library

LOCKS = {
    "a new one": ForkLock(),
    "choices": choice._choosing,
    "Inductor's compiler": cpp_compiler._preparing,
    "libraries": library._lock,
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("name", LOCKS)
def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not(name: str) -> None:
    lock, held, end = LOCKS[name], threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            end.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(5)
    try:
        assert not lock.acquire(timeout=0.01)  # here the thread has it
        child = os.fork()
        if not child:
            os._exit(0 if lock.acquire(timeout=5) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        end.set()
        thread.join()
