"""Where the C++ kernels come from: compiled once, kept where nobody else writes, or absent."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusewright.compiler.codegen.choice import choose
from fusewright.kernels import fallback
from fusewright.kernels.native import attention, build, delta_rule, library, low_rank


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to keep libraries in."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fusewright" / "kernels"


def _compiler(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A C++ compiler that is this script; it runs, as long as it is only asked who it is."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


_MAKES = 'echo once >> "$0.calls"; while [ "$1" != -o ]; do shift; done; echo library > "$2"'


def test_each_library_is_compiled_when_it_is_needed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What few models need costs the others no compiler's time."""
    _compiler(tmp_path, _MAKES, monkeypatch)
    monkeypatch.setattr(library, "_loading", {})
    monkeypatch.setattr(library, "FAILED", {})
    bf16 = torch.zeros(1, 8, 2, 16, dtype=torch.bfloat16)
    library.start_for([bf16])
    assert not attention.takes(bf16, bf16, bf16, None)  # what this compiler makes is no library
    assert [p.name.split("-")[0] for p in cache.iterdir()] == ["kernels"]
    assert not delta_rule.takes(bf16, bf16, bf16, bf16[..., 0])
    assert {p.name.split("-")[0] for p in cache.iterdir()} == {"kernels", "delta_rule"}


def test_it_is_compiled_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _compiler(tmp_path, _MAKES, monkeypatch)
    path = build.built()
    assert build.built() == path
    assert (tmp_path / "compiler.calls").read_text() == "once\n"
    assert [p for p in cache.iterdir()] == [path]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("what", ["instruction_set", "source"])
def test_another_processor_or_source_has_another_library(
    what: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compiler(tmp_path, _MAKES, monkeypatch)
    path = build.built()
    monkeypatch.setattr(build, what, lambda *_: "other")
    assert build.built() != path


def test_where_others_may_write_nothing_is_kept_or_loaded(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compiler(tmp_path, _MAKES, monkeypatch)
    planted = build.built()
    cache.chmod(0o777)
    with pytest.raises(PermissionError, match=f"others may write to {cache}"):
        build.kept_folder()
    path = build.built()
    assert path.parent != planted.parent
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_where_others_may_write_above_it_nothing_is_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compiler(tmp_path, _MAKES, monkeypatch)
    kept = build.built()
    for above in (cache.parent, cache.parents[1]):
        before = stat.S_IMODE(above.stat().st_mode)
        assert before == 0o700
        above.chmod(0o777)
        assert build.built() != kept
        above.chmod(0o1777)  # as /tmp: what is in it only its owner can replace
        assert build.built() == kept
        above.chmod(before)


def test_the_folder_is_not_where_pytorch_says_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torchinductor_me"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert build.folder() == tmp_path / "mine" / "fusewright" / "kernels"


def test_another_version_of_the_compiler_has_another_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compiler(tmp_path, _MAKES, monkeypatch)
    path = build.built()
    _compiler(tmp_path, _MAKES + " # newer", monkeypatch)
    assert build.built() != path


def test_a_process_that_is_forked_while_they_are_compiled_compiles_them_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unfinished, done = (mock.Mock(library=None, problem=p) for p in (None, "none"))
    for loading, left in ((unfinished, None), (done, done)):
        monkeypatch.setattr(library, "_loading", {"kernels": loading})
        library._forget_unfinished()
        assert library._loading.get("kernels") is left


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    assert os.access(build.folder(), os.W_OK)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'kernels.cpp:1: error: no such thing' >&2; exit 1", "error: no such thing"),
        ("exit 3", "ends with 3"),
        ("sleep 60", "took longer than 1 seconds"),
        (_MAKES, "kernels-"),  # what it makes is no library
    ],
)
@pytest.mark.usefixtures("cache")
def test_a_compiler_that_fails(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SECONDS", 1)
    monkeypatch.setattr(library, "SECONDS", 1)
    monkeypatch.setattr(fallback, "FAILED", failed := {})
    monkeypatch.setattr(library, "FAILED", failed)
    _compiler(tmp_path, script, monkeypatch)
    loading = library.Loading()
    loading.thread.join()
    assert loading.library is None
    assert loading.problem is not None
    assert says in loading.problem
    assert {"kernels in C++": loading.problem} == fallback.FAILED


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "FAILED", failed := {})
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    loading = library.Loading()
    loading.thread.join()
    assert loading.problem is not None
    assert loading.problem.startswith("no C++ compiler was found: install g++")
    assert failed == {"kernels in C++": loading.problem}


@pytest.mark.parametrize("named", ["/bin/false", "/nowhere/g++", "ccache g++", ""])
def test_a_compiler_that_does_not_run(
    named: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor takes no other one then, and neither do the kernels; blocks run in eager code."""
    monkeypatch.setenv("CXX", named)
    says = f"the C++ compiler that the variable CXX names, {named!r}, does not run"
    assert build.find_compiler() is None
    with pytest.raises(RuntimeError, match=re.escape(says)):
        build.built()
    blocks = [torch.nn.Linear(4000, 4000, device="meta")]
    assert choose("auto", blocks, "cpu") == ("eager", says)
    assert choose("inductor", blocks, "cpu") == ("eager", f"inductor was requested, but {says}")
    assert choose("eager", blocks, "cpu") == ("eager", "as requested")


def test_fake_tensors_have_no_memory_to_be_given() -> None:
    real = torch.zeros(4, 4, dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(real)
    assert library.are_real(real)
    assert not library.are_real(real, fake)
    assert not low_rank.takes(fake, mode.from_tensor(torch.zeros(4, 2)))
    heads = mode.from_tensor(real.new_zeros(1, 1, 4, 16))
    assert not attention.takes(heads, heads, heads, None)


@pytest.mark.parametrize("name", build.SOURCES)
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_no_warnings(compiler: str, name: str, tmp_path: Path) -> None:
    source = tmp_path / "kernels.cpp"
    source.write_text(build.source(name))
    command = [
        compiler,
        *build.FLAGS,
        *build.NATIVE,
        "-Wall",
        "-Wextra",
        "-Werror",
        str(source),
        "-o",
    ]
    try:
        done = subprocess.run([*command, str(tmp_path / "made")], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"{compiler} is not installed")
    assert done.returncode == 0, done.stderr
