"""Names of other libraries that are not public are known; without one, models run as they were."""

from __future__ import annotations

import ast
import contextlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from torch import nn

from fusewright import FusewrightError, OptimizeError, optimize, upstream
from fusewright.cli.main import _ended
from fusewright.compiler.bypass import find_hooks
from fusewright.sharding import gathering_of, gathers
from fusewright.train.model import merge_aware
from fusewright.train.recipe.export_formats import FORMATS
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.requirements import require_known_names
from fusewright.upstream import PARTS, changed, names_of
from tests.explained import explain
from tests.models.zoo import FAMILIES, build

from .load import stretched

SRC = Path(upstream.__file__).parent
IDS = torch.arange(24).reshape(2, 12)


def llama() -> Any:
    return build(FAMILIES[0], lora=False)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    changed.cache_clear()
    yield
    changed.cache_clear()


def remove(monkeypatch: pytest.MonkeyPatch, part: str, place: str, name: str) -> None:
    """Remove a name, as a new version of the library would."""
    owner = upstream._found(place)
    others = [other for where, other in names_of(part) if where == place and other != name]
    left = {one: None for other in others for one in other.split("|")}
    if hasattr(owner, "_config"):  # a module of settings, which never forgets that one was removed
        monkeypatch.setitem(sys.modules, place, SimpleNamespace(**left))
        return
    for one in name.split("|"):
        with contextlib.suppress(AttributeError, TypeError):
            monkeypatch.delattr(owner, one)
    if upstream._has(owner, name):  # inherited, set by a method or made when it is asked for
        module, _, kind = place.rpartition(".")
        monkeypatch.setattr(upstream._found(module), kind, type(kind, (), left))


def removed(part: str, place: str, name: str) -> str:
    """The reason without one name."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        remove(monkeypatch, part, place, name)
        changed.cache_clear()
        reason = changed(part)
    changed.cache_clear()
    return reason or ""


def test_every_name_is_there() -> None:
    assert {part: reason for part in PARTS if (reason := changed(part)) is not None} == {}


@pytest.mark.parametrize("part", [p for p in PARTS if p != "DeepSpeed"])
def test_a_removed_name_is_missed(part: str) -> None:
    for place, name in names_of(part):
        reason = removed(part, place, name)
        assert f"has no {place}.{name}," in reason, (place, name)
        assert 'pip install "fusewright[tested]"' in reason
    assert changed(part) is None


def _used() -> Iterator[tuple[str, str, Path]]:
    """The private names of PyTorch that the source imports, or reads from ``torch``."""
    for path in sorted(SRC.rglob("*.py")):
        inner: set[ast.AST] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                module = node.module or ""
                names = [a.name for a in node.names]
                if _private(module) or any(map(_private, names)):
                    yield from ((module, name, path) for name in names)
            elif isinstance(node, ast.Attribute) and node not in inner:
                names = []
                part: ast.AST = node
                while isinstance(part, ast.Attribute):
                    inner.add(part)
                    names.append(part.attr)
                    part = part.value
                place = ".".join(["torch", *names[:0:-1]])
                is_torch = isinstance(part, ast.Name) and part.id == "torch"
                if is_torch and _private(f"{place}.{names[0]}"):
                    yield place, names[0], path


def _private(dotted: str) -> bool:
    return any(p[:1] == "_" and p[:2] != "__" for p in dotted.split("."))


def test_every_private_name_of_pytorch_is_known() -> None:
    known = {
        f"{p}.{n}" for part in PARTS for p, names in PARTS[part].items() for n in names.split()
    }
    known |= {place for part in PARTS.values() for place in part}
    unknown = {
        f"{place}.{name}": str(path.relative_to(SRC))
        for place, name, path in _used()
        if place.startswith("torch")
        # a part of what is known, such as a setting or an overload; or a module that holds some
        and not any(f"{place}.{name}.".startswith(f"{k}.") or k.startswith(f"{place}.{name}.")
                    for k in known)
    }  # fmt: skip
    assert unknown == {}


def test_every_known_name_is_used() -> None:
    texts = [p.read_text(encoding="utf-8") for p in SRC.rglob("*.py") if p.name != "upstream.py"]
    text = "\n".join(texts)
    idle = {n for part in PARTS for _, name in names_of(part) for n in name.split("|")
            if n not in text}  # fmt: skip
    assert idle == set()


# --- what happens without one ---------------------------------------------------------------------


def _blocks(model: nn.Module) -> list[bool]:
    return ["forward" in vars(m) for m in model.modules()]


def test_without_the_compilers_names_a_model_runs_as_it_was() -> None:
    model = llama().train()
    expected = model(input_ids=IDS, labels=IDS).loss
    for place, name in names_of("the compiler"):
        if place in ("torch.Tensor", "torch.nn.Module"):  # without which nothing else would work
            continue
        with pytest.MonkeyPatch.context() as monkeypatch:
            remove(monkeypatch, "the compiler", place, name)
            changed.cache_clear()
            with pytest.warns(UserWarning, match="runs as it was: torch"):
                assert optimize(model) is model
            report = str(explain(model))
        version = metadata.version("torch")
        assert f"runs as it was: the model: torch {version} has no {place}." in report
        assert not any(_blocks(model)), name
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, expected, rtol=0, atol=0)


def test_strict_raises_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._dynamo.optimize")
    with pytest.raises(OptimizeError, match=r"has no torch\._dynamo\.optimize"):
        optimize(llama(), strict=True)


def test_dynamos_callback_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import eval_frame

    kind = eval_frame._TorchDynamoContext
    monkeypatch.setattr(eval_frame, kind.__name__, type(kind.__name__, (), {}))
    assert "_TorchDynamoContext.callback" in str(changed("the compiler"))


def test_without_inductors_names_blocks_run_in_eager_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().train()
    expected = model(input_ids=IDS, labels=IDS).loss
    monkeypatch.delattr("torch._inductor.compile_fx.compile_fx_inner")
    optimize(model, codegen="inductor")
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, expected)
    report = explain(model)
    assert report.by_rule()["rms_norm"]
    assert "blocks are not compiled: torch" in str(report)
    assert "torch._inductor.compile_fx.compile_fx_inner" in str(report)


def _sharded_by(module: str) -> nn.Module:
    """A layer with a hook that seems to be an engine's."""

    def hook(*args: Any) -> None:
        return None

    hook.__module__ = module
    layer = nn.Linear(2, 2)
    layer.register_forward_pre_hook(hook)
    return layer


def test_without_fsdps_names_a_sharded_part_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    block = nn.Sequential(_sharded_by("torch.distributed.fsdp._fully_shard._fsdp_state"))
    assert gathers(block[0])
    assert find_hooks(block, block.named_children()).others is None
    monkeypatch.delattr("torch.distributed.fsdp.FSDPModule._get_fsdp_state")
    changed.cache_clear()
    assert not gathers(block[0])
    hooks = find_hooks(block, block.named_children())
    assert hooks.others == "0"
    assert "FSDPModule._get_fsdp_state" in (hooks.unreadable or "")
    assert gathering_of(block, block[0].weight) is None


def test_without_deepspeeds_names_a_sharded_part_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "deepspeed.runtime.zero.partition_parameters"
    for n in range(4):
        name = ".".join(place.split(".")[: n + 1])
        module = type(sys)(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)

    class Init:
        def convert(self, p: Any) -> None:
            p.ds_id, p.ds_shape, p.ds_status, p.ds_process_group = 0, (), 1, None
            p.all_gather = p.partition = len

    monkeypatch.setattr(sys.modules[place], "Init", Init, raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    layer = _sharded_by("deepspeed.runtime.zero.parameter_offload")
    assert gathers(layer)
    Init.convert = lambda self, p: setattr(p, "zero_id", 0)  # type: ignore[method-assign]
    changed.cache_clear()
    assert not gathers(layer)
    assert "deepspeed 9.9 has no" in str(changed("DeepSpeed"))


def test_without_its_names_training_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.model_construct()
    monkeypatch.delattr("transformers.Trainer._save_rng_state")
    with pytest.raises(FusewrightError, match=r"has no transformers\.Trainer\._save_rng_state"):
        require_known_names(recipe)


def test_ademamix_needs_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = pytest.importorskip("bitsandbytes.optim.ademamix").AdEMAMix
    monkeypatch.delattr(owner, "_get_state_double_buffer")
    require_known_names(Recipe.model_construct(optimizer="adamw_torch"))
    for name in ("ademamix", "paged_ademamix_8bit"):
        with pytest.raises(FusewrightError, match="_get_state_double_buffer"):
            require_known_names(Recipe.model_construct(optimizer=name))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_without_its_names_compressed_tensors_rounds(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    weight = torch.randn(32, 64)
    expected = merge_aware.roundtrip(FORMATS[name], weight)
    place = "compressed_tensors.compressors.NVFP4PackedCompressor"
    monkeypatch.setitem(PARTS, "stored scales", {place: "_of_another_version"})
    monkeypatch.setattr(merge_aware, "_scales", None)
    changed.cache_clear()
    assert torch.equal(merge_aware.roundtrip(FORMATS[name], weight), expected)


def test_a_tool_without_its_name_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr("torch._foreach_norm")
    with pytest.raises(typer.Exit) as ended, _ended():
        torch._foreach_norm([])
    assert ended.value.exit_code == 2
    assert (
        f"torch {metadata.version('torch')} has no torch._foreach_norm," in capsys.readouterr().err
    )


_WITHOUT = """
import torch._dynamo.exc, warnings
del torch._dynamo.exc.FailOnRecompileLimitHit
from fusewright import explain, optimize, restore
model = torch.nn.Linear(2, 2)
with warnings.catch_warnings(record=True) as said:
    assert optimize(model, memory="min") is model and restore(model) is model
assert "runs as it was" in str(said[0].message), said
print(explain(model))
"""


def test_a_name_that_is_imported_may_be_gone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT],
        capture_output=True,
        text=True,
        check=False,
        timeout=stretched(300),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if "runs as it was: the model: torch" in line], done.stdout
    assert done.stdout.count("has no torch._dynamo.exc.FailOnRecompileLimitHit") == 1
