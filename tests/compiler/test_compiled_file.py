"""What a first step makes, in one file: whole, checked before use, enough for another process."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as _functorch
from torch import fx

import fusewright
from fusewright.compiler import compiled_file
from fusewright.compiler.codegen import cpp_compiler
from fusewright.compiler.codegen.inductor import _as_in_every_process
from fusewright.compiler.compiled_file import load_compiled, save_compiled
from fusewright.errors import FusewrightError
from fusewright.kernels import choice
from fusewright.kernels.native import build, library
from fusewright.kernels.processor import KINDS, assume

VERDICTS = {"verdict-0a.json": '{"key": "a"}', "verdict-1b.json": "{}"}
CHOICES = {"choice-2c.json": '{"question": "q"}'}
LIBRARY = os.urandom(3000)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Empty folders of caches for loading, and a process that has made something to save."""
    monkeypatch.setattr(compiled_file.verdicts, "used", lambda: dict(VERDICTS))
    monkeypatch.setattr(choice, "files", lambda: dict(CHOICES))
    monkeypatch.setattr(library, "kept_files", lambda: dict.fromkeys(build.SOURCES, LIBRARY))
    monkeypatch.setattr(compiled_file, "_inductor_kernels", lambda: {"ab/cabc.main.so": b"kernel"})
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    places = {"kernels": tmp_path / "kernels", "inductor": tmp_path / "inductor"}
    places["kernels"].mkdir()
    monkeypatch.setattr(build, "kept_folder", lambda: places["kernels"])
    monkeypatch.setattr(compiled_file, "_inductor_folder", lambda: str(places["inductor"]))
    return places


@pytest.fixture
def file(folders: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "run.compiled"
    assert str(save_compiled(path)) == (
        "0 compiled graphs, 3 libraries of C++ kernels, 2 verified rewrites, 1 raced choices"
    )
    return path


def _placed(folders: dict[str, Path]) -> dict[str, bytes]:
    files = (p for place in folders.values() for p in place.rglob("*") if p.is_file())
    return {p.name: p.read_bytes() for p in files}


def test_all_parts_are_placed_as_they_were(file: Path, folders: dict[str, Path]) -> None:
    load_compiled(file)
    texts = {name: text.encode() for name, text in (VERDICTS | CHOICES).items()}
    kernels = {
        **{build.carried_name(name): LIBRARY for name in build.SOURCES},
        "cabc.main.so": b"kernel",
        cpp_compiler.proof().name: b"",
    }
    assert _placed(folders) == texts | kernels
    assert [p for p in file.parent.iterdir() if p.name.startswith(".")] == []


def test_a_file_that_cannot_be_finished_leaves_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def full(path: Path, content: bytes) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    listed = set(tmp_path.iterdir())
    with pytest.raises(FusewrightError, match="cannot be written: No space left"):
        save_compiled(file)
    assert set(tmp_path.iterdir()) == listed
    assert file.read_bytes() == before


def test_what_is_there_already_is_left_alone(file: Path, folders: dict[str, Path]) -> None:
    mine = folders["kernels"] / "verdict-0a.json"
    mine.write_text("mine")
    load_compiled(file)
    load_compiled(file)
    assert mine.read_text() == "mine"


def test_carried_kernels_need_no_compiler(
    file: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    with pytest.raises(RuntimeError):
        build.built()
    load_compiled(file)
    assert build.built().read_bytes() == LIBRARY


# --- what is refused ------------------------------------------------------------------------------


def _flip(at: float) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        i = int(at * (len(content) - 1))
        return content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1 :]

    return flip


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "no zip": lambda content: b"hello" * 100,
    "cut": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "no archive of ours": lambda content: _archive({"a.txt": b"a"}),
    "another format": lambda content: _archive({"manifest.json": b'{"format": "other"}'}),
    "a manifest that is a list": lambda content: _archive({"manifest.json": b"[]"}),
    **{f"byte at {at}": _flip(at) for at in (0.1, 0.25, 0.5)},
}


def _archive(parts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _forged(parts: dict[str, bytes], **changed: Any) -> bytes:
    """A file whose hashes are right, with other parts or another manifest."""
    manifest = {
        "format": compiled_file._FORMAT,
        "made on": compiled_file._machine(),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()},
        **changed,
    }
    return _archive({"manifest.json": json.dumps(manifest).encode(), **parts})


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_whole(
    damage: Callable[[bytes], bytes], file: Path, folders: dict[str, Path]
) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        FusewrightError, match=r"run.compiled (is damaged|was written by another)"
    ) as e:
        load_compiled(file)
    assert e.value.exit_code == 2
    assert _placed(folders) == {}


@pytest.mark.parametrize(
    "name", ["../../evil.so", "kernels/../evil.so", "/evil.so", "kernels/evil.py", "inductor/x.so"]
)
def test_nothing_is_written_outside_of_the_caches(
    name: str, file: Path, folders: dict[str, Path]
) -> None:
    file.write_bytes(_forged({"kernels/verdict-0a.json": b"{}", name: b"evil"}))
    with pytest.raises(FusewrightError, match="has a part that it cannot have"):
        load_compiled(file)
    assert _placed(folders) == {}


class _Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled_of_a_file_for_another_machine(
    file: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    evil = pickle.dumps(_Evil(tmp_path / "ran"))
    for there in ({**compiled_file._machine(), "PyTorch": "1.0"}, {}):
        file.write_bytes(_forged({"torch": evil}, **{"made on": there}))
        with pytest.raises(FusewrightError, match=r"made for another machine: .*PyTorch is"):
            load_compiled(file)
    file.write_bytes(_flip(0.4)(_forged({"torch": evil})))
    with pytest.raises(FusewrightError):
        load_compiled(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("what", sorted(compiled_file._machine()))
def test_what_differs_is_said(
    what: str, file: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = compiled_file._machine()
    monkeypatch.setattr(compiled_file, "_machine", lambda: {**here, what: here[what] + " zz_new"})
    with pytest.raises(FusewrightError) as refusal:
        load_compiled(file)
    said = str(refusal.value)
    assert "was made for another machine: " in said
    assert ("only here zz_new" if what == "instructions" else f"{what} is {here[what]}") in said
    assert _placed(folders) == {}


def test_files_that_are_not_there_or_cannot_be_written(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(FusewrightError, match=r"no\.compiled: there is no such file"):
        load_compiled(tmp_path / "no.compiled")
    with pytest.raises(FusewrightError, match="cannot be read: Is a directory"):
        load_compiled(tmp_path)
    with pytest.raises(FusewrightError, match=r"a\.compiled cannot be written: No such file"):
        save_compiled(tmp_path / "no folder" / "a.compiled")


def test_a_cache_that_cannot_be_written_is_an_error(
    file: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Path:
        raise PermissionError("others may write to /tmp/x")

    monkeypatch.setattr(build, "kept_folder", refuse)
    with pytest.raises(FusewrightError, match="cannot be put into the cache: others may write"):
        load_compiled(file)


# --- the key of AOTAutograd's cache ---------------------------------------------------------------


def test_a_graph_has_the_key_that_it_has_in_other_processes() -> None:
    inner = fx.symbolic_trace(torch.nn.Linear(2, 2))
    inner.meta.update(backend_id="of this process", _checkpoint_context_fn=len)
    graph = fx.Graph()
    graph.output(graph.get_attr("body"))
    outer = fx.GraphModule({"body": inner}, graph)
    environments = []
    for kind in ("avx2", "amx", "avx2"):
        with assume(KINDS[kind]), _as_in_every_process(outer):
            assert inner.meta == {"_checkpoint_context_fn": len}
            environments.append(str(vars(outer)["environment"]))
    assert inner.meta == {"backend_id": "of this process", "_checkpoint_context_fn": len}
    assert environments[0] == environments[2] != environments[1]
    assert compiled_file.verdicts.environment()[0] in environments[0]
    body = fx.Graph()
    body.call_function(_flip, (0.5,))  # of a module without a version
    before = _functorch.enable_autograd_cache
    for function, looks in ((_flip, False), (torch.neg, before)):
        next(iter(body.nodes)).target = function
        with _as_in_every_process(fx.GraphModule({"body": fx.GraphModule({}, body)}, graph)):
            assert _functorch.enable_autograd_cache is looks
    assert _functorch.enable_autograd_cache is before


# --- two processes --------------------------------------------------------------------------------

_STEP = """
import hashlib, json, subprocess, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
import fusewright
from fusewright.kernels import choice
from fusewright.rewrite import verify

codegen, load, save = sys.argv[1:]
choice._switches = lambda: 0  # what is raced on a busy machine is not kept
judged, commands = [], []
judge, popen = verify._judge, subprocess.Popen.__init__
verify._judge = lambda *a: judged.append(0) or judge(*a)
def run(self, words, *args, **kwargs):
    commands.append(words if isinstance(words, str) else " ".join(map(str, words)))
    popen(self, words, *args, **kwargs)
subprocess.Popen.__init__ = run
if load:
    fusewright.load_compiled(load)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1,
)
model = LlamaForCausalLM(config).bfloat16()
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
fusewright.optimize(model, codegen=codegen)
ids = torch.arange(48).reshape(2, 24)
loss = model(input_ids=ids, labels=ids).loss
loss.backward(retain_graph=True)
values = hashlib.sha256(loss.detach().numpy().tobytes())
first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
for gradient in first.values():
    values.update(gradient.contiguous().view(torch.uint8).numpy().tobytes())
loss.backward()  # a second time, which compiled code must allow as eager mode does
assert all(torch.equal(p.grad, 2 * first[n]) for n, p in model.named_parameters() if n in first)
sites = str(fusewright.explain(model).sites)
from torch._dynamo.utils import counters
print(json.dumps({
    "values": values.hexdigest(), "judged": len(judged),
    "commands": [c for c in commands if not c.endswith("--version")],
    "sources": sorted({c.source for c in choice.choices()}),
    "misses": counters["inductor"]["fxgraph_cache_miss"],
    "aot": counters["aot_autograd"]["autograd_cache_hit"],
    "sites": sites,
}))
if save:
    fusewright.save_compiled(save)
"""


def _step(cache: Path, codegen: str, load: str, save: str) -> dict[str, Any]:
    environ = {
        **os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1",
        "FUSEWRIGHT_VERDICTS": "kept", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    words = [sys.executable, "-c", _STEP, codegen, load, save]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.long("inductor")
@pytest.mark.parametrize("codegen", [pytest.param("eager", marks=pytest.mark.slow), "inductor"])
def test_the_first_step_of_another_process_makes_nothing(codegen: str, tmp_path: Path) -> None:
    if build.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    file = str(tmp_path / "run.compiled")
    cold = _step(tmp_path / "one", codegen, "", file)
    assert cold["judged"] > 5
    assert cold["commands"], "the kernels of this package"
    assert cold["sources"] == ["raced"]
    loaded = _step(tmp_path / "two", codegen, file, "")
    assert loaded["judged"] == 0
    assert loaded["commands"] == []
    assert loaded["sources"] == ["kept"]
    assert loaded["misses"] == 0
    assert loaded["values"] == cold["values"]
    assert loaded["sites"] == cold["sites"]
    if codegen == "inductor":
        assert cold["misses"] == 2
        assert loaded["aot"] == 1


def test_the_names_are_public() -> None:
    assert fusewright.save_compiled is save_compiled
    assert fusewright.load_compiled is load_compiled
