"""The end of one process of several."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fusewright.train.processes import ending

from ...load import stretched

CODE = """
import atexit, sys, threading, time
from fusewright.train.processes.ending import end_rank

class Last:
    def __del__(self):
        print("taken down")

last = Last()
atexit.register(lambda: print("at exit"))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("begun", end=" ")
end_rank({code})
"""


@pytest.mark.parametrize(("code", "exit_code"), [(0, 0), (None, 0), (130, 130), ("'no'", 1)])
def test_all_is_done_but_taking_modules_down(code: object, exit_code: int) -> None:
    command = [sys.executable, "-c", CODE.format(code=code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == "begun thread\nat exit\n"
    assert done.stderr == ("no\n" if exit_code == 1 else "")


def test_idle_threads_of_a_pool_end() -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from fusewright.train.processes.ending import end_rank\n"
        "pool = ThreadPoolExecutor(2)\n"
        "pool.submit(print, 'worked').result()\n"
        "end_rank(0)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=stretched(60)
    )
    assert (done.returncode, done.stdout) == (0, "worked\n"), done.stderr


@pytest.mark.parametrize(("size", "ended"), [("2", [3]), ("1", []), (None, [])])
def test_only_one_of_several_ends_so(
    size: str | None, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed  # noqa: F401

    seen: list[object] = []
    monkeypatch.setattr(ending, "end_rank", seen.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(SystemExit), ending.ending_as_rank():
        raise SystemExit(3)
    assert seen == ended


@pytest.mark.parametrize("module", ["fusewright.cli.main", "fusewright.train.proof.worker"])
def test_what_can_be_a_rank_ends_so(module: str) -> None:
    """A process that has written all it had to must not be aborted by threads of C++ code."""
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    text = Path(found.origin).read_text(encoding="utf-8")
    assert "with ending_as_rank():" in text
