"""Where a run may write: not in the system's folders, not among other files, not beside a run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.checkpoint import lock
from fusewright.train.checkpoint import output_folder as output
from fusewright.train.checkpoint.lock import LockHolder, held
from fusewright.train.checkpoint.ownership import LOCK
from fusewright.train.output_files import why_not_ours_to_write
from fusewright.train.recipe.load import load_recipe

from ..commands import fusewright, refused_run, snapshot

QUIET = Console(quiet=True)


def recipe_file(folder: Path, recipe: dict[str, Any], **keys: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **keys}), encoding="utf-8")
    return str(path)


# --- the system's folders -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/etc/x", "/usr/lib/x", "/var/lib/x", "/boot", "/proc/self", "/sbin/a/b", "~"]
)
def test_the_systems_folders_are_refused(path: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    for key in ("output_dir", "dataset_prepared_path"):
        said = refused_run(tmp_path, recipe_file(tmp_path, recipe, **{key: path}))
        assert f"{key}: " in said
        assert "line " in said


def test_a_way_out_and_a_link_are_followed_first(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    up = "/".join([".."] * len(tmp_path.parts))
    (tmp_path / "innocent").symlink_to("/etc")
    for path in (f"{up}/etc/x", "innocent/x", str(tmp_path / "innocent")):
        with pytest.raises(RecipeError, match=r"output_dir: /etc\S* is in /etc"):
            load_recipe({**recipe, "output_dir": path})


def test_places_for_everybody_are_not_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("/dev/shm/run", "/var/tmp/run", "/usr/src/app/out", "/opt/ml/model", "/data/x"):
        assert why_not_ours_to_write(Path(path)) is None
    monkeypatch.setenv("HOME", "/var/lib/builder")
    assert why_not_ours_to_write(Path("/var/lib/builder/work/out")) is None
    assert why_not_ours_to_write(Path("/var/lib/builder"))
    assert why_not_ours_to_write(Path("/var/lib/other/out"))
    monkeypatch.setenv("HOME", "/")  # that of accounts without one
    assert why_not_ours_to_write(Path("/etc/out"))
    inside = Path(os.__file__).resolve().parent / "out"
    assert "Python's modules" in str(why_not_ours_to_write(inside))


# --- other people's files -------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_refused(
    overwrite: bool, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Also one with a model that nobody here has trained: it would be removed."""
    for name in ("notes.txt", "model.safetensors", "adapter_model.safetensors", "run.json"):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        (folder / name).write_text('{"my": "own"}')
        more = ["--overwrite"] if overwrite else []
        said = refused_run(tmp_path, recipe_file(tmp_path, recipe, output_dir=str(folder)), *more)
        assert f"holds {name}, which no run has written; choose a new folder" in said
        assert "with-" in said


def test_an_empty_folder_and_its_like_are_taken(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "lost+found").mkdir(parents=True)
    (folder / ".gitignore").write_text("*")
    output.require_run_folder(folder)
    (folder / "a").write_text("")
    with pytest.raises(RecipeError, match="holds a, which"):
        output.require_run_folder(folder)


def test_figures_go_with_their_run_and_rows_of_the_users_stay(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    ours = {"run": "out", "results": {}, "versions": {}, "machine": {}}
    (folder / "eval-rows-0a1b2c.json").write_text(json.dumps(ours))
    (folder / "eval_tasks.json").write_text("{}")
    rows = [{"messages": []}], {"run": "my own"}
    for i, row in enumerate(rows):
        (folder / f"eval-{i}.json").write_text(json.dumps(row))
    output.clear_output(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["eval-0.json", "eval-1.json"]


def test_the_log_of_this_process_may_be_there(recipe: dict[str, Any], tmp_path: Path) -> None:
    """``fusewright train recipe.yaml > out/log.txt``."""
    folder = tmp_path / "out"
    folder.mkdir()
    code = (
        "import pathlib, sys\nfrom fusewright.train.checkpoint.ownership import foreign_files\n"
        f"print(foreign_files(pathlib.Path({str(folder)!r})), file=sys.stderr)"
    )
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=log, stderr=subprocess.PIPE, text=True, check=True
        )
    assert done.stderr.strip() == "[]"


def test_a_link_in_a_run_is_not_written_through(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The folder of a run may come from anybody, too."""
    train({**recipe, "save_steps": 2}, console=QUIET)
    folder, precious = Path(recipe["output_dir"]), tmp_path / "precious"
    precious.write_text("mine")
    for name in ("loss.png", "eval.json.part", "eval-rows-0a1b2c.json", "run.json"):
        kept = (folder / name).rename(tmp_path / name) if (folder / name).exists() else None
        (folder / name).symlink_to(precious)
        with pytest.raises(RecipeError, match=f"{name} is a link"):
            train({**recipe, "overwrite_output_dir": True}, console=QUIET)
        if name.startswith("eval"):
            assert "is a symbolic link" in fusewright("eval", str(folder)).output
        (folder / name).unlink()
        if kept is not None:
            kept.rename(folder / name)
    assert precious.read_text() == "mine"


# --- two at once ----------------------------------------------------------------------------------

HOLD = """
import pathlib, sys, time
from fusewright.train.checkpoint.lock import held
with held(pathlib.Path(sys.argv[1]), lambda text: print(text, file=sys.stderr)):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Any:
    """Starts a process that holds the lock of a folder."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_two_runs_do_not_write_into_one_folder(
    recipe: dict[str, Any], tmp_path: Path, other: Callable[[Path], subprocess.Popen[str]]
) -> None:
    folder = Path(recipe["output_dir"])
    process = other(folder)
    path = recipe_file(tmp_path, recipe)
    said = refused_run(tmp_path, path)
    assert f"output_dir: {folder} is in use by process {process.pid} on " in said
    assert "choose another folder" in said
    process.send_signal(signal.SIGKILL)  # it cannot give the lock back
    process.wait()
    assert (folder / LOCK).exists()
    result = fusewright("train", path)
    assert result.exit_code == 0, result.output
    taken = f"output_dir: the lock of process {process.pid} on "
    assert taken in " ".join(result.stdout.split())
    assert "is taken over: that run ended" in " ".join(result.stdout.split())
    assert not list(folder.glob(".*"))
    assert "taken over" not in fusewright("train", path, "--overwrite").stdout


def test_a_killed_run_goes_on_in_its_folder(
    recipe: dict[str, Any], tmp_path: Path, other: Callable[[Path], subprocess.Popen[str]]
) -> None:
    keys = {**recipe, "save_steps": 1, "auto_resume_from_checkpoints": True}
    train({**keys, "max_steps": 2}, console=QUIET)
    folder = Path(recipe["output_dir"])
    (folder / "run.json").unlink()
    for path in folder.glob("adapter*"):
        path.unlink()
    process = other(folder)
    process.kill()
    process.wait()
    assert train({**keys, "max_steps": 2}, console=QUIET).resumed_from == 2


def test_a_lock_is_not_kept_by_what_a_killed_run_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a data loader have the file open, too, and end a little later."""
    path = tmp_path / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    LockHolder(gone.pid, LockHolder.this().host, 0.0, "then").write(handle)
    fcntl.flock(handle, fcntl.LOCK_EX)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            fcntl.flock(handle, fcntl.LOCK_UN)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    said: list[str] = []
    with held(tmp_path, said.append):
        assert len(waits) == 3
        assert "taken over" in said[0]
    monkeypatch.setattr(lock, "_ORPHANS", 0.0)
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def test_folders_made_for_nothing_are_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path / "a" / "b", print):
        raise ZeroDivisionError
    assert not snapshot(tmp_path)
    assert not (tmp_path / "a").exists()


def test_a_run_that_breaks_off_leaves_its_mark(tmp_path: Path) -> None:
    """Else its own folder would be taken for one of other people's files."""

    def broken_off() -> None:
        with held(tmp_path, print):
            (tmp_path / "tokenizer.json").write_text("{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken_off()
    output.require_run_folder(tmp_path)
    said: list[str] = []
    with held(tmp_path, said.append):
        assert len(said) == 1
    with pytest.raises(RecipeError, match="which no run has written"):
        output.require_run_folder(tmp_path)  # that one has ended well, and written nothing


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    path, this = tmp_path / LOCK, LockHolder.this()
    with held(tmp_path, print):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(RecipeError, match="is in use by process"), held(tmp_path, print):
            pass
    assert not path.exists()
    path.write_text(json.dumps({**vars(this), "begun": 0.0}))  # another process of that number
    said: list[str] = []
    with held(tmp_path, said.append):
        assert "taken over" in said[0]
    path.write_text(json.dumps({**vars(this), "host": "elsewhere"}))
    with pytest.raises(RecipeError, match=f"if you are sure it has ended, remove {path}"):
        held(tmp_path, print).__enter__()
