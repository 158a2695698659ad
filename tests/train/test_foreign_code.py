"""Foreign code: what a recipe, a folder or a dataset brings is run on the caller's word alone.

Each way is tried with code that leaves a mark; the mark must not be there afterwards. That the mark
does appear where the caller has given the word shows that the trap works.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from fusewright.cli.main import app
from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.consent import Consent
from fusewright.train.inference.evaluate import evaluate
from fusewright.train.inference.run_folder import open_run
from fusewright.train.recipe.load import load_recipe
from fusewright.train.user_functions import load_function

from .commands import fusewright, refused
from .conftest import make_adapter, small_recipe

SWITCH = "--trust-remote-code"


@pytest.fixture(autouse=True)
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Transformers copies remote code into a folder of modules: one that goes with the test."""
    dynamic: Any = importlib.import_module("transformers.dynamic_module_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
        for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-was-run"


def bring_code(folder: Path, mark: Path, model_type: str | None = None) -> None:
    """Make a model of ``folder`` one that needs code of its own."""
    (folder / "foreign.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nraise SystemExit('run')\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model",
    }  # fmt: skip
    config["model_type"] = model_type or config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))


def recipe_file(folder: Path, **keys: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


# --- code of the model ----------------------------------------------------------------------------


@pytest.fixture
def foreign(base: Path, tmp_path: Path, mark: Path) -> Path:
    folder = tmp_path / "foreign"
    shutil.copytree(base, folder)
    bring_code(folder, mark, "foreign")
    return folder


def test_the_recipes_word_does_not_run_a_models_code(
    foreign: Path, rows: Path, tmp_path: Path, mark: Path
) -> None:
    keys = {**small_recipe(foreign, rows, tmp_path / "out"), "trust_remote_code": True}
    path = recipe_file(tmp_path, **keys)
    assert SWITCH in refused("train", path)
    assert SWITCH in refused("explain", foreign)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    assert fusewright("train", path, SWITCH).exit_code != 0
    assert mark.exists()


def test_a_mapping_is_no_word_either(foreign: Path, rows: Path, tmp_path: Path, mark: Path) -> None:
    keys = {**small_recipe(foreign, rows, tmp_path / "out"), "trust_remote_code": True}
    with pytest.raises(RecipeError, match=SWITCH):
        train(keys, console=Console(quiet=True))
    assert not mark.exists()


@pytest.mark.parametrize("arguments", [("generate", "hello"), ("chat",), ("merge",), ("eval",)])
def test_the_folders_word_does_not_run_a_models_code(
    arguments: tuple[str, ...], base: Path, rows: Path, tmp_path: Path, mark: Path
) -> None:
    """Whether or not transformers has a class of its own for the model."""
    folder = make_adapter(tmp_path)
    recipe = {**small_recipe(tmp_path / "base", rows, folder), "trust_remote_code": True}
    (folder / "run.json").write_text(json.dumps({"recipe": recipe}))
    name, *rest = arguments
    for model_type in ("llama", "foreign"):
        bring_code(tmp_path / "base", mark, model_type)
        assert SWITCH in refused(name, folder, *rest, stdin="hello\n")
        assert not mark.exists()
    fusewright(name, folder, *rest, SWITCH, stdin="hello\n")
    assert mark.exists()


def test_a_native_model_needs_no_word(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Most recipes that ask for remote code are of models that transformers has by now."""
    said = Console(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    result = train({**recipe, "trust_remote_code": True}, console=said)
    assert result.status == "finished"
    assert (
        "trust_remote_code: without effect, because --trust-remote-code is not"
        in said.export_text()
    )
    assert result.recipe["trust_remote_code"] is False  # what was in force
    assert result.recipe["base_model"] == recipe["base_model"]


def test_a_tokenizer_of_its_own_is_not_run(tmp_path: Path, mark: Path) -> None:
    adapter = make_adapter(tmp_path)
    (adapter / "foreign.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    config = {"auto_map": {"AutoTokenizer": ["foreign.Tokenizer", None]}, "model_type": "foreign"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(config))
    assert SWITCH in refused("generate", adapter, "hello")
    assert not mark.exists()
    fusewright("generate", adapter, "hello", SWITCH)
    assert mark.exists()


@pytest.mark.parametrize(
    "keys",
    [
        {"overrides_of_model_kwargs": {"trust_remote_code": True}},
        {"overrides_of_model_kwargs": {"allow_all_kernels": True}},
        {"overrides_of_model_kwargs": {"weights_only": False}},
        {"overrides_of_model_kwargs": {"attn_implementation": "some-one/kernel"}},
        {"overrides_of_model_config": {"_attn_implementation": {"": "some-one/kernel"}}},
    ],
    ids=lambda keys: json.dumps(keys),
)
def test_keys_that_reach_the_same_by_another_way(
    keys: dict[str, Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=SWITCH):
        load_recipe({**recipe, **keys})
    assert load_recipe({**recipe, **keys}, consent=Consent(trust_remote_code=True))
    adapter = make_adapter(tmp_path)  # and in a folder, which is not read as a recipe is
    whole = {**recipe, **keys, "base_model": str(tmp_path / "base")}
    (adapter / "run.json").write_text(json.dumps({"recipe": whole}))
    assert SWITCH in refused("generate", adapter, "hello")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("tokenizer_type", "RagRetriever"),
        ("tokenizer_type", "AutoModel"),
        ("model_type", "AutoTokenizer"),
        ("cls_model_config", "pipeline"),
    ],
)
def test_a_class_is_of_the_kind_that_the_key_is_about(
    key: str, name: str, recipe: dict[str, Any]
) -> None:
    asked = {**recipe, key: name}
    if key == "cls_model_config":
        asked["overrides_of_model_config"] = {"rope_theta": 1.0}
    with pytest.raises(RecipeError, match=f"{key}: {name} is not a suitable class"):
        train(asked, console=Console(quiet=True))


# --- builders -------------------------------------------------------------------------------------


def builder(folder: Path, mark: Path, rows: Path) -> Path:
    path = folder / "make.py"
    path.write_text(
        "import pathlib, shutil, sys\n"
        f"pathlib.Path({str(mark)!r}).touch()\nshutil.copy({str(rows)!r}, sys.argv[1])\n"
    )
    return path


def test_a_recipes_builder_runs_on_the_callers_word(
    base: Path, rows: Path, tmp_path: Path, mark: Path
) -> None:
    made = tmp_path / "made.jsonl"
    keys = small_recipe(base, rows, tmp_path / "out")
    keys["datasets"] = [{"path": str(made), "builder": str(builder(tmp_path, mark, rows))}]
    path = recipe_file(tmp_path, **keys)
    for arguments in (("train", path), ("train", path, "--dry-run"), ("preprocess", path)):
        said = refused(*arguments)
        assert "--allow-builders" in said
        assert "datasets.0.builder" in said
        assert "line " in said
    with pytest.raises(RecipeError, match="--allow-builders"):
        train(keys, console=Console(quiet=True))
    assert not mark.exists()
    assert not made.exists()
    result = fusewright("preprocess", path, "--allow-builders", "--limit", "20")
    assert result.exit_code == 0, result.output
    assert mark.exists()
    mark.unlink()
    later = made.stat().st_mtime + 9  # as new as its builder: nothing has to be run
    os.utime(made, (later, later))
    assert load_recipe(path)


@pytest.mark.long
def test_a_folders_builder_runs_on_the_callers_word(
    run_folder: Path, tmp_path: Path, mark: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    about = json.loads((folder / "run.json").read_text())
    rows = Path(about["recipe"]["datasets"][0]["path"])
    about["recipe"]["datasets"] = [
        {"path": str(tmp_path / "made.jsonl"), "builder": str(builder(tmp_path, mark, rows))}
    ]
    (folder / "run.json").write_text(json.dumps(about))
    assert "--allow-builders" in refused("eval", folder)
    assert not mark.exists()
    opened = open_run(folder, consent=Consent(allow_builders=True))
    evaluate(opened, console=Console(quiet=True))
    assert mark.exists()


def test_the_quickstart_needs_no_word(tmp_path: Path) -> None:
    examples = Path(__file__).resolve().parents[2] / "examples"
    for path in examples.rglob("*.yaml"):
        said = yaml.safe_load(path.read_text())
        assert not said.get("trust_remote_code"), path
        assert not any(d.get("builder") for d in said.get("datasets", [])), path


@pytest.mark.parametrize("name", ["pandas", "iceberg"])
def test_a_reader_of_pickles_is_no_dataset(
    name: str, recipe: dict[str, Any], tmp_path: Path, mark: Path
) -> None:
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(Trap(mark)))
    rows = {"path": name, "data_files": str(tmp_path / "rows.pkl"), "type": "completion"}
    with pytest.raises(Exception, match="can run code"):
        train({**recipe, "datasets": [rows]}, console=Console(quiet=True))
    assert not mark.exists()


# --- pickles, YAML, Jinja -------------------------------------------------------------------------


class Trap:
    """What leaves the mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def test_the_trap_works(tmp_path: Path, mark: Path) -> None:
    torch.save({"state": Trap(mark)}, tmp_path / "trap.pt")
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoints_pickles_are_not_run(
    name: str, recipe: dict[str, Any], tmp_path: Path, mark: Path
) -> None:
    quiet = Console(quiet=True)
    train({**recipe, "save_steps": 2}, console=quiet)
    point = Path(recipe["output_dir"]) / "checkpoint-2"
    torch.save({"state": Trap(mark)}, point / name)
    again = {**recipe, "save_steps": 2, "resume_from_checkpoint": str(point)}
    again["output_dir"] = str(tmp_path / "again")
    with pytest.raises(RecipeError, match=name):
        train(again, console=quiet)
    assert not mark.exists()


def test_pickled_weights_are_not_run(tmp_path: Path, rows: Path, mark: Path) -> None:
    adapter = make_adapter(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.lm_head.weight": Trap(mark)}, adapter / "adapter_model.bin")
    refused("generate", adapter, "hello")
    folder = tmp_path / "base"
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"lm_head.weight": Trap(mark)}, folder / "pytorch_model.bin")
    refused("train", recipe_file(tmp_path, **small_recipe(folder, rows, tmp_path / "out")))
    assert not mark.exists()


def test_yaml_makes_no_objects(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base_model: !!python/object/apply:os.mkdir [{mark}]\n")
    assert "not valid YAML" in refused("train", path)
    path.write_text("base_model: a/b\ndatasets: [{path: a/b}]\n")
    refused("train", path, "--lora_r", f"!!python/object/apply:os.mkdir [{mark}]")
    assert not mark.exists()


ESCAPE = "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}"


def test_a_template_stays_in_its_sandbox(
    recipe: dict[str, Any], tmp_path: Path, mark: Path
) -> None:
    template = ESCAPE.replace("MARK", str(mark))
    with pytest.raises(Exception, match="chat template refuses this conversation"):
        train({**recipe, "chat_template_jinja": template}, console=Console(quiet=True))
    adapter = make_adapter(tmp_path)
    (adapter / "chat_template.jinja").write_text(template)
    shutil.copy(tmp_path / "base" / "tokenizer.json", adapter)
    shutil.copy(tmp_path / "base" / "tokenizer_config.json", adapter)
    assert "the chat template refuses" in refused("generate", adapter, "hello")
    assert not mark.exists()


def test_plugins_are_not_imported(recipe: dict[str, Any], tmp_path: Path, mark: Path) -> None:
    (tmp_path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    with pytest.raises(RecipeError, match="plugins are not loaded"):
        load_recipe({**recipe, "plugins": ["evil.Plugin"]})
    assert not mark.exists()


@pytest.mark.parametrize(
    "command_", ["train", "preprocess", "explain", "eval", "generate", "chat", "merge"]
)
def test_the_switches_have_one_name(command_: str) -> None:
    said = CliRunner().invoke(app, [command_, "--help"], env={"COLUMNS": "300"}).output
    assert SWITCH in said
    for switch in ("--allow-builders", "--allow-code"):
        assert (switch in said) == (command_ in ("train", "preprocess", "eval"))


# --- functions that a recipe names ----------------------------------------------------------------


def test_functions_of_a_recipe_run_with_the_callers_word_alone(
    base: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    keys = {
        **small_recipe(base, rows, tmp_path / "out"), "rl": "grpo", "sample_packing": False,
        "trl": {"reward_funcs": ["mine.judge"]},
        "datasets": [{"path": str(rows), "type": "mine.change"}],
    }  # fmt: skip
    path = recipe_file(tmp_path, **keys)
    for command_line in (("train", path), ("preprocess", path), ("train", path, "--dry-run")):
        result = fusewright(*command_line)
        assert result.exit_code == 2, result.output + repr(result.exception)
        assert "Traceback" not in result.output
        said = result.stderr
        assert "trl.reward_funcs.0: " in said
        assert "mine.py:judge is Python code" in said
        assert "mine.py:change is Python code" in said
        assert "pass --allow-code" in said
    shown = fusewright("plan", path, "--gpus", "1xH100")
    assert "Traceback" not in shown.output
    assert "Python code" not in shown.output
    load_recipe(keys, consent=Consent(allow_code=True))
    assert not mark.exists()  # nor by a check, whatever the caller allows
    line = path.read_text().splitlines().index("  - mine.judge") + 1
    for switches in ([], ["--dry-run"]):
        ended = fusewright("train", path, "--allow-code", *switches)
        said = ended.stderr
        assert ended.exit_code == 2
        assert f"line {line}: trl.reward_funcs.0: mine.py has no function 'judge'" in said
        assert "datasets.0.type: mine.py has no function 'change'" in said
        assert mark.exists()
    said = refused("preprocess", path, "--allow-code")
    assert "recipe.yaml, line 7: datasets.0.type: mine.py has no function 'change'" in said
    assert "trl" not in said
    mark.unlink()
    recipe = load_recipe({**keys, "rl": None, "trl": None, "datasets": [{"path": str(rows)}]})
    with pytest.raises(RecipeError, match="pass --allow-code"):
        load_function("mine.judge", "key", recipe.consent)
    with pytest.raises(RecipeError, match="mine has no function 'judge'"):
        load_function("mine.judge", "key", Consent(allow_code=True))
    assert mark.exists()
    del sys.modules["mine"]


def test_every_word_has_a_switch() -> None:
    assert Consent(True, True, True).switches() == [SWITCH, "--allow-builders", "--allow-code"]
    assert Consent(allow_code=True).switches() == ["--allow-code"]
