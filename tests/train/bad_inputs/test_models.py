"""Models and tokenizers: files that are missing, damaged, or of two different models."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from ..conftest import make_model
from .box import Bad, Box, Make, check

WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


def damaged(change: Callable[[Path], Any], **keys: Any) -> Make:
    """Training a copy of the model with one change."""

    def make(box: Box) -> list[str]:
        folder = box.model()
        change(folder)
        return box.recipe(base_model=str(folder), **keys)

    return make


def only(name: str, size: int) -> Make:
    """A file that ends too early."""
    return damaged(lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]))


def holds(name: str, content: str | bytes) -> Make:
    """A file with another content."""
    data = content.encode() if isinstance(content, str) else content
    return damaged(lambda folder: (folder / name).write_bytes(data))


def without(*names: str) -> Make:
    return damaged(lambda folder: [(folder / name).unlink() for name in names])


def config(**changes: Any) -> Make:
    """Another configuration; None leaves a value out."""

    return damaged(lambda folder: set_config(folder, **changes))


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def sharded(change: Callable[[Path], Any]) -> Make:
    """The same weights in several files, one of them or their index changed."""

    def split(folder: Path) -> None:
        LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
        (folder / WEIGHTS).unlink(missing_ok=True)
        change(folder)

    return damaged(split)


class Harmful:
    """What a pickle can hold: it leaves a mark if it is run."""

    def __reduce__(self) -> Any:
        return (open, ("harm-was-done", "w"))


def pickled(write: Callable[[Path], Any]) -> Make:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        write(folder / "pytorch_model.bin")

    return damaged(change)


def half_a_pickle(path: Path) -> None:
    torch.save(make_model().state_dict(), path)
    path.write_bytes(path.read_bytes()[:9000])


def header(change: Callable[[dict[str, Any]], Any]) -> Make:
    """A file of weights as long as before, whose header says something else."""

    def rewrite(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        tensors = json.loads(data[8:end])
        change(tensors)
        new = json.dumps(tensors).encode()
        (folder / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + data[end:])

    return damaged(rewrite)


def moved(tensors: dict[str, Any]) -> None:
    """One tensor begins in the middle of the one before."""
    where = tensors["model.layers.1.mlp.up_proj.weight"]["data_offsets"]
    where[:] = [at - 4 for at in where]


def pickled_of(form: bool, **sizes: int) -> Make:
    """The weights of another model in a pickle, of today's form or the old one."""

    def write(path: Path) -> None:
        tensors = make_model(**sizes).state_dict()
        torch.save(tensors, path, _use_new_zipfile_serialization=form)

    return pickled(write)


INDEX = f"{WEIGHTS}.index.json"
CASES = {
    "no configuration": Bad(without("config.json"), "base_model", "it has neither a config.json"),
    "a broken configuration": Bad(
        holds("config.json", "{oops"), "config.json is not valid JSON", "copy its folder, again"
    ),
    "a list for a configuration": Bad(
        holds("config.json", "[]"), "config.json is damaged", "copy its folder, again"
    ),
    "no type": Bad(
        config(model_type=None), "config.json has no model_type", "that came with the weights"
    ),
    "an unknown type": Bad(
        config(model_type="lama"), "config.json has the model_type 'lama'", "did you mean llama?"
    ),
    "code that is needed": Bad(
        config(model_type="own", auto_map={"AutoModelForCausalLM": "m.M"}),
        "base_model: needs Python code that comes with it", "--trust-remote-code",
    ),
    "no language model": Bad(
        config(model_type="vit"), "is not a causal language model", "that generates text"
    ),
    "text for a size": Bad(
        config(hidden_size="big"), "base_model", "Field 'hidden_size' expected int, got str"
    ),
    "no weights": Bad(without(WEIGHTS), "has a config.json and no weights", "copy its folder, ag"),
    "empty weights": Bad(holds(WEIGHTS, b""), f"{WEIGHTS} is empty", "download the model"),
    "weights that end too early": Bad(
        only(WEIGHTS, 60_000), f"{WEIGHTS} is damaged: it should have", "and has 60,000; download"
    ),
    "weights that end at once": Bad(only(WEIGHTS, 50), WEIGHTS, "only a part of it; download"),
    "garbage for weights": Bad(
        holds(WEIGHTS, b"\xff" * 999), WEIGHTS, "does not start like a safetensors file"
    ),
    "tensors in the wrong places": Bad(
        header(moved), f"{WEIGHTS} is damaged: its header is not valid (invalid offset for tensor",
        "download the model, or copy its folder, again",
    ),
    "a tensor of no dtype": Bad(
        header(lambda tensors: tensors["lm_head.weight"].update(dtype="F33")),
        f"{WEIGHTS} is damaged: its header is not valid", "download the model",
    ),
    "a pointer for weights": Bad(holds(WEIGHTS, POINTER), WEIGHTS, "run git lfs pull"),
    "a part that is missing": Bad(
        sharded(lambda folder: sorted(folder.glob("model-*"))[1].unlink()),
        "model-00002-of-", "is not there; download the model",
    ),
    "a part that is damaged": Bad(
        sharded(lambda folder: sorted(folder.glob("model-*"))[2].write_bytes(b"")),
        "model-00003-of-", "is empty; download the model",
    ),
    "a broken index": Bad(
        sharded(lambda folder: (folder / INDEX).write_text("{oops")), INDEX, "not valid JSON"
    ),
    "an index of nothing": Bad(
        sharded(lambda folder: (folder / INDEX).write_text("{}")), INDEX, "it has no weight_map"
    ),
    "other sizes": Bad(
        config(intermediate_size=128),
        "model.layers.0.mlp.down_proj.weight is (32, 64) in the file and (32, 128) acc",
        "both must come from the same model",
    ),
    "other sizes in a pickle": Bad(
        pickled_of(True, intermediate_size=128),
        "model.layers.0.mlp.down_proj.weight is (32, 128) in the file and (32, 64) acc",
        "both must come from the same model",
    ),
    "other sizes in a pickle of old": Bad(
        pickled_of(False, num_hidden_layers=1),
        "no weights for model.layers.1.input_layernorm.weight", "must come from the same model",
    ),
    "other sizes in parts": Bad(
        sharded(lambda folder: set_config(folder, intermediate_size=128)),
        "model.layers.0.mlp.down_proj.weight is (32, 64) in the file and (32, 128) acc",
        "both must come from the same model",
    ),
    "a layer too many": Bad(
        config(num_hidden_layers=3),
        "no weights for model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight",
        "config.json and weights must come from",
    ),
    "pickled code": Bad(
        pickled(lambda path: torch.save({"x": Harmful()}, path)),
        "pytorch_model.bin contains more than tensors (io.open)", "use a copy of the model",
    ),
    "pickled code of old": Bad(
        pickled(lambda path: path.write_bytes(pickle.dumps({"x": Harmful()}, protocol=2))),
        "its file of weights contains more than tensors", "copy of the model in safet",
    ),
    "half a pickle": Bad(
        pickled(half_a_pickle), "pytorch_model.bin is damaged: its end is missing", "download the"
    ),
    "no tokenizer": Bad(
        without("tokenizer.json", "tokenizer_config.json"),
        "has no tokenizer (no tokenizer.json)", "set tokenizer_config to the model that it",
    ),
    "a broken tokenizer": Bad(
        holds("tokenizer.json", "{oops"), "tokenizer.json is not valid JSON", "download the model"
    ),
    "an empty tokenizer": Bad(
        holds("tokenizer.json", "{}"), "tokenizer.json is damaged", "contains no tokenizer"
    ),
    "a broken tokenizer_config": Bad(
        holds("tokenizer_config.json", "[]"), "tokenizer_config.json is damaged", "download the mo"
    ),
    "another tokenizer's place": Bad(
        lambda box: box.recipe(tokenizer_config="./nowhere"), "tokenizer_config", "there is no ./no"
    ),
    "no class of this name": Bad(
        lambda box: box.recipe(tokenizer_type="LamaTokenizer"), "tokenizer_type", "leave the key"
    ),
    "a template that is no Jinja": Bad(
        holds("chat_template.jinja", "{% for %}"), "chat_template: line 1 of it", "not valid Jinja"
    ),
    "no template": Bad(
        without("chat_template.jinja"), "has no chat template", "name one with chat_template"
    ),
    "values that it has not": Bad(
        lambda box: box.recipe(overrides_of_model_config={"rms_eps": 1}),
        "overrides_of_model_config", "LlamaConfig has no attribute rms_eps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_refused(name: str, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    message = check(CASES[name], box, monkeypatch)
    assert "weights_only" not in message
    assert not Path("harm-was-done").exists()


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_says_it_too(name: str, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = CASES[name]
    check(bad._replace(make=lambda box: [*bad.make(box), "--dry-run"]), box, monkeypatch)


@pytest.mark.parametrize("name", ["tensors in the wrong places", "other sizes"])
def test_generating_says_the_same(name: str, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = CASES[name]

    def make(box: Box) -> list[str]:
        bad.make(box)
        return ["generate", "base", "hi"]

    check(bad._replace(make=make), box, monkeypatch)


@pytest.mark.parametrize("name", ["code that is needed", "other sizes"])
def test_verifying_says_it_first(name: str, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = CASES[name]
    check(bad._replace(make=lambda box: ["verify", *bad.make(box)[1:]]), box, monkeypatch)
