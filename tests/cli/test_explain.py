"""``fusewright explain``: the report, the graphs, one clear sentence where there is no model."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from fusewright.train import explain as command
from fusewright.train.model.precision import dtype_for_training

from ..train.commands import fusewright, refused
from ..train.conftest import make_model

REMOTE = Path(__file__).parents[1] / "models" / "remote" / "oddity"
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 9,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def explained(*arguments: str) -> str:
    result = fusewright("explain", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("weightless")
    LlamaConfig(**SIZES).save_pretrained(folder)
    return str(folder)


def test_a_configuration_without_weights(weightless: str) -> None:
    said = explained(weightless, "--fp32")
    assert "RANDOM weights, 2 of 9 layers; float32 on" in said
    assert "fusewright: 16 rewrites in 4 regions" in said
    assert "# graph" not in said


@pytest.mark.long
def test_as_json(weightless: str) -> None:
    data = json.loads(explained(weightless, "--fp32", "--layers", "3", "--lora", "--json"))
    assert data["by_rule"]["lora_linear"] == 21
    assert data["by_rule"]["rope"] == 3
    assert "listings" not in data
    assert {"module", "rule", "status", "reason"} <= data["sites"][0].keys()


@pytest.mark.long
def test_own_weights(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    said = explained(str(tmp_path), "--adapter", "lora")
    dtype = str(dtype_for_training("auto")).removeprefix("torch.")
    assert f"{tmp_path}, its own weights, LoRA of rank 8 on all linears; {dtype} on" in said
    assert re.search(r"lora_linear +14 +0 +0 ", said)
    shallow = explained(str(tmp_path), "--layers", "1", "--fp32", "--json")
    assert json.loads(shallow)["by_rule"]["glu"] == 1


def test_one_graph_for_each_kind_of_region(weightless: str) -> None:
    said = explained(weightless, "--fp32", "--graph")
    headings = [line for line in said.splitlines() if line.startswith(("block:", "norm:", "head:"))]
    assert [h.split(" ─")[0] for h in headings] == [
        "head: the model (LlamaForCausalLM)",
        "block: model.layers.0 and 1 more (LlamaDecoderLayer)",
        "norm: model.norm (LlamaRMSNorm)",
    ]
    assert said.count("before the rules") == said.count("class GraphModule") / 2 == 3


@pytest.mark.long
def test_the_graph_of_one_module_is_python(weightless: str) -> None:
    graphs = json.loads(
        explained(weightless, "--fp32", "--json", "--module", "layers.1.mlp.down_proj")
    )["listings"]
    (graph,) = graphs
    assert graph["modules"] == ["model.layers.1"]
    for code in (graph["before"], graph["after"]):
        assert isinstance(ast.parse(code).body[0], ast.ClassDef)
        assert "mlp_gate_proj_weight" in code
    assert "silu" in graph["before"]
    assert "rsqrt" in graph["before"]
    assert "rms_norm_linear" in graph["after"]
    assert "rsqrt" not in graph["after"]
    said = refused("explain", weightless, "--fp32", "--module", "model.layer.0")
    assert said.startswith(
        "no graph was captured for module 'model.layer.0'; graphs exist for model.lay"
    )


@pytest.mark.long
def test_layers_of_different_kinds_have_graphs_of_their_own(tmp_path: Path) -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(**SIZES, head_dim=8, layer_types=["full_attention"] * 3
                          + ["sliding_attention"] * 6)  # fmt: skip
    config.save_pretrained(tmp_path)
    assert "4 of 9 layers" in explained(str(tmp_path), "--fp32")


@pytest.mark.long
def test_a_model_type() -> None:
    said = explained("gpt2", "--layers", "1", "--fp32")
    assert "the default configuration of gpt2, RANDOM weights, 1 of 12 layers" in said


def test_remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic: Any = importlib.import_module("transformers.dynamic_module_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = shutil.copytree(REMOTE, tmp_path / "oddity_explained")
    assert "pass --trust-remote-code if you trust it" in refused("explain", str(folder))
    said = explained(str(folder), "--trust-remote-code", "--fp32", "--graph")
    assert "block: trunk.stages.0 and 1 more (Stage)" in said
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def test_names_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused("explain", "./no/such/model").startswith("there is no ./no/such/model in ")
    assert "is not a model: it has neither a config.json nor a GGUF file" in refused(
        "explain", str(tmp_path)
    )
    (tmp_path / "recipe.yaml").touch()
    said = refused("explain", str(tmp_path / "recipe.yaml"))
    assert said.endswith("; to check a recipe: fusewright train RECIPE --dry-run")
    assert "is not installed" in refused("explain", "package:no_such_package_of_models")

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("it is nowhere to be found")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    monkeypatch.setattr("fusewright.train.model.from_pretrained.hub_problem", lambda: None)
    nowhere = "cannot be loaded: it is nowhere to be found"
    assert refused("explain", "llamma").startswith(f"llamma {nowhere}; did you mean llama?")
    assert refused("explain", "me/llamma") == f"me/llamma {nowhere}"


def test_what_cannot_be_built_is_said_in_one_sentence(
    weightless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused("explain", "t5").startswith("t5 cannot be built, ")

    class Little:
        available = 1000

    monkeypatch.setattr(command.psutil, "virtual_memory", Little)
    assert "fewer --layers" in refused("explain", weightless)


def test_nothing_stays_behind(weightless: str) -> None:
    """No variable of the environment, no file: the graphs are kept by the model's own session."""
    before, files = dict(os.environ), sorted(Path(weightless).iterdir())
    explained(weightless, "--fp32", "--graph", "--layers", "1")
    assert dict(os.environ) == before
    assert sorted(Path(weightless).iterdir()) == files
