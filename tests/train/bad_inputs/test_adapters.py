"""Adapters to go on from: of another base, damaged, or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from ..conftest import make_model
from .box import Bad, Box, Make, check

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all linear layers of the tiny model."""
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(make_model(), config).save_pretrained(folder)
    return folder


def changed(change: Callable[[Path], Any], **sizes: Any) -> Make:
    """Going on from a changed copy of the adapter, on a base of other sizes."""

    def make(box: Box) -> list[str]:
        folder = box.folder / "adapter"
        change(folder)
        named = {"lora_model_dir": str(folder)}
        if sizes:
            base = box.model()
            make_model(**sizes).save_pretrained(base)
            named["base_model"] = str(base)
        return box.recipe(**named)

    return make


def config(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        content = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], Any]:
    return lambda folder: save_file(change(load_file(folder / FILE)), folder / FILE)


def nothing(folder: Path) -> None:
    pass


CASES = {
    "no configuration": Bad(
        changed(lambda folder: (folder / "adapter_config.json").unlink()),
        "lora_model_dir", "adapter_config.json is not there; copy the whole folder again",
    ),
    "a broken configuration": Bad(
        changed(lambda folder: (folder / "adapter_config.json").write_text("{oops")),
        "adapter_config.json is not valid JSON", "copy the whole folder again",
    ),
    "no PEFT type": Bad(
        changed(config(peft_type=None)), "has no peft_type", "it is not of a PEFT adapter"
    ),
    "an unknown PEFT type": Bad(
        changed(config(peft_type="LARA")), "adapter_config.json says 'LARA'", "this version of",
        late=True,
    ),
    "no weights": Bad(
        changed(lambda folder: (folder / FILE).unlink()), f"has no {FILE}", "was not completed"
    ),
    "weights that end too early": Bad(
        changed(lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:9000])),
        f"{FILE} is damaged: it should have", "copy it again",
    ),
    "a wider base": Bad(
        changed(nothing, hidden_size=64),
        "self_attn.q_proj.lora_A.default.weight is [4, 32] in its file and [4, 64] here, and ",
        "set base_model to the model that it was trained on", late=True,
    ),
    "a flatter base": Bad(
        changed(nothing, num_hidden_layers=1),
        "14 of its tensors do not exist in the base model, such as "
        "base_model.model.model.layers.1.",
        "set base_model to the model that it was trained on", late=True,
    ),
    "another rank": Bad(
        changed(config(r=8)), "is [4, 32] in its file and [8, 32] here", "set base_model", late=True
    ),
    "half of its tensors": Bad(
        changed(tensors(lambda t: {k: v for k, v in t.items() if "layers.1" not in k})),
        "14 tensors are missing in it, such as base_model.model.model.layers.1.", "set base_model",
        late=True,
    ),
    "other layers": Bad(
        changed(config(target_modules=["c_attn"])), "the layers that it adapts do not exist in",
        "set base_model", late=True,
    ),
}  # fmt: skip


@pytest.fixture
def box(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    monkeypatch.chdir(tmp_path)
    made = Box(tmp_path, base)
    for path in adapter.iterdir():
        made.write(f"adapter/{path.name}", path.read_bytes())
    return made


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_is_refused(name: str, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    check(CASES[name], box, monkeypatch)


@pytest.mark.parametrize("name", ["a wider base", "half of its tensors", "no PEFT type"])
def test_generating_says_the_same(name: str, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = CASES[name]

    def make(box: Box) -> list[str]:
        bad.make(box)
        base = box.folder / "base" if (box.folder / "base").exists() else box.base
        return ["generate", "adapter", "hi", "--base_model", str(base)]

    check(bad._replace(make=make, late=False), box, monkeypatch)
