"""The end of one process of several."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import atexit, sys, threading, time
from fusewright.cli.rank_ending import end_rank

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
