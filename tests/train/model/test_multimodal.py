"""Checkpoints of a language model with towers: class, parts, adapters, files, rows, and runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BlipConfig

from fusewright.errors import DataError, RecipeError
from fusewright.train import train
from fusewright.train.checkpoint.save_model import save_whole
from fusewright.train.inference.evaluate import evaluate
from fusewright.train.inference.run_folder import open_run
from fusewright.train.merge import MergeOptions, merge
from fusewright.train.model import multimodal
from fusewright.train.model.adapters import add_adapter
from fusewright.train.model.files import in_shards
from fusewright.train.model.from_pretrained import meta_model
from fusewright.train.model.load import load_config, load_model
from fusewright.train.plan.count.blueprint import draw
from fusewright.train.plan.count.step import take
from fusewright.train.preflight import obstacles
from fusewright.train.recipe.load import check
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.report.run_facts import snippet

from ..conftest import make_tokenizer, numbers, small_recipe, write_rows
from ..processes.runs import Run, Runs
from .multimodal import CONFIGS, MTP, make_multimodal, stored

IDS = torch.tensor([[1, 7, 45, 99, 130, 2, 200, 31]])
_NAMES = r"layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj"
AXOLOTL = f"model.language_model.{_NAMES}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each type, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("multimodal")

    class Made(dict[str, Path]):
        def __missing__(self, kind: str) -> Path:
            self[kind] = make_multimodal(kind, folder / kind)
            return self[kind]

    return Made()


def recipe_of(checkpoint: Path, output: Path, **keys: Any) -> dict[str, Any]:
    rows = write_rows(output.with_name("rows.jsonl"), numbers(24))
    wanted = {**small_recipe(checkpoint, rows, output), "sample_packing": False, "max_steps": 2}
    return {k: v for k, v in {**wanted, **keys}.items() if v is not None}


def checked(checkpoint: Path, output: Path, **keys: Any) -> Recipe:
    return check(recipe_of(checkpoint, output, **keys)).recipe


def ran(checkpoint: Path, output: Path, **keys: Any) -> Path:
    result = train(recipe_of(checkpoint, output, **keys), console=Console(quiet=True))
    assert (result.status, result.problems) == ("finished", [])
    return result.output_dir


def is_of_tower(name: str) -> bool:
    return "visual" in name or "vision" in name or "projector" in name


def assert_of_base(folder: Path, base: Path) -> None:
    """All that text does not train is the base's, bit for bit, and nothing is left out."""
    before, after = stored(base), stored(folder)
    assert before.keys() == after.keys()
    rest = [name for name in before if is_of_tower(name) or name == MTP]
    assert len(rest) > 5
    for name in rest:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name]), name
    assert any(not torch.equal(before[n], after[n]) for n in before.keys() - set(rest))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


# --- the class ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_checkpoint_loads_as_the_class_that_saved_it(
    kind: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = checkpoints[kind]
    recipe = checked(folder, tmp_path / "out")
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    assert obstacles(recipe) == []
    assert type(meta_model(recipe, load_config(recipe))).__name__ == name
    model = load_model(recipe)
    assert type(model).__name__ == name
    parts = [model.config, *(getattr(model.config, part) for part in model.config.sub_configs)]
    assert not any(getattr(part, "use_cache", False) for part in parts)
    # so that a step's loss is the mean over its tokens, whatever its batches
    assert getattr(model, "accepts_loss_kwargs", True)
    loss = model(input_ids=IDS, labels=IDS, num_items_in_batch=70).loss
    torch.testing.assert_close(loss, model(input_ids=IDS, labels=IDS).loss / 10)


@pytest.mark.parametrize(
    ("content", "auto"),
    [
        ({"model_type": "llama"}, "AutoModelForCausalLM"),
        ({"model_type": "qwen3_5_text"}, "AutoModelForCausalLM"),
        ({"model_type": "qwen3_5"}, "AutoModelForMultimodalLM"),
        ({"model_type": "qwen3_5", "architectures": ["Qwen3_5ForCausalLM"]},
         "AutoModelForCausalLM"),
        ({"model_type": "gemma3"}, "AutoModelForCausalLM"),  # which has one class for both
        ({"model_type": "voxtral"}, "AutoModelForMultimodalLM"),
        ({"model_type": "t5"}, "AutoModelForCausalLM"),  # which then says that it has none
    ],
)  # fmt: skip
def test_the_class_by_configuration(content: dict[str, Any], auto: str) -> None:
    assert multimodal.auto_class(content) == auto


def test_model_type_names_another_class(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    recipe = checked(checkpoints["qwen3_5"], tmp_path / "out", model_type="Qwen3_5ForCausalLM")
    assert obstacles(recipe) == []
    assert type(load_model(recipe)).__name__ == "Qwen3_5ForCausalLM"
    assert type(meta_model(recipe, load_config(recipe))).__name__ == "Qwen3_5ForCausalLM"
    recipe = checked(
        checkpoints["llava"], tmp_path / "out", model_type="AutoModelForImageTextToText"
    )
    assert type(meta_model(recipe, load_config(recipe))).__name__ == "LlavaForConditionalGeneration"


def test_a_model_that_needs_images_is_refused_before_weights_load(tmp_path: Path) -> None:
    BlipConfig(architectures=["BlipForConditionalGeneration"]).save_pretrained(tmp_path / "blip")
    save_file({"weight": torch.zeros(1)}, tmp_path / "blip" / "model.safetensors")
    recipe = checked(tmp_path / "blip", tmp_path / "out")
    assert obstacles(recipe)[0] == (
        f"base_model: {tmp_path / 'blip'} is a BlipForConditionalGeneration, which needs "
        "pixel_values in every call: it cannot be trained on text alone; use a model that "
        "generates text from text"
    )


# --- its parts ------------------------------------------------------------------------------------


_TOWER_AND_PROJECTOR = ["model.vision_tower", "model.multi_modal_projector"]
TOWERS = {"qwen2_5_vl": ["model.visual"], "llava": _TOWER_AND_PROJECTOR,
          "gemma3": _TOWER_AND_PROJECTOR}  # fmt: skip
TARGETS: dict[str, dict[str, Any]] = {
    "all": {"lora_target_linear": True},
    "Axolotl's": {"lora_target_linear": None, "lora_target_modules": AXOLOTL},
    "as for text": {
        "lora_target_linear": None,
        "lora_target_modules": f"model.{_NAMES}",
    },
    "names": {
        "lora_target_linear": None, "lora_target_modules": ["q_proj", "k_proj"],
        "lora_exclude_modules": ["k_proj"], "lora_bias": "all", "lora_modules_to_save": ["norm"],
    },
}  # fmt: skip


@pytest.mark.parametrize("how", TARGETS)
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava", "gemma3"])
def test_adapters_are_those_of_the_language_model(
    kind: str, how: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    recipe = checked(checkpoints[kind], tmp_path / "out", **TARGETS[how])
    config = load_config(recipe)
    places = TOWERS[kind]
    assert multimodal.towers(meta_model(recipe, config)) == places
    model = add_adapter(meta_model(recipe, config), recipe)
    names = [name.removeprefix("base_model.model.") for name, p in model.named_parameters()
             if p.requires_grad]  # fmt: skip
    assert names
    assert not any(multimodal.is_in(name, places) for name in names)
    layers = {name.partition(".lora_")[0] for name in names if "lora_" in name}
    assert len(layers) == (2 if how == "names" else 14)
    assert all(name.startswith("model.language_model.layers.") for name in layers)


def test_it_is_said_which_layers_a_frozen_tower_keeps(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    keys = {"lora_target_linear": None, "lora_target_modules": r".*\.q_proj"}
    recipe = checked(checkpoints["llava"], tmp_path / "out", **keys)
    said: list[str] = []
    model = add_adapter(meta_model(recipe, load_config(recipe)), recipe, say=said.append)
    tower = [n for n, _ in model.named_modules() if "vision_tower" in n and n.endswith("q_proj")]
    first = tower[0].removeprefix("base_model.model.")
    assert said == [
        f"lora_target_modules: {len(tower)} of the layers, such as {first}, stay as they are, "
        "because freeze_mm_modules is true: false adapts them"
    ]


def test_only_layers_of_towers_are_no_targets(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "lora_target_linear": None, "lora_target_modules": "model.visual.*(qkv|proj)",
    }  # fmt: skip
    (problem,) = obstacles(checked(checkpoints["qwen3_vl"], tmp_path / "out", **keys))
    assert problem.endswith("but such as freeze_mm_modules leaves as they are: set it to false")
    keys["lora_target_modules"] = ["qkv"]
    (problem,) = obstacles(checked(checkpoints["qwen3_vl"], tmp_path / "out", **keys))
    assert problem.startswith(
        "lora_target_modules: the model has no layer qkv; it has embed_tokens"
    )


def test_without_adapters_the_language_model_is_trained(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"adapter": None, "lora_target_linear": None}
    recipe = checked(checkpoints["llava"], tmp_path / "out", **keys)
    model = add_adapter(meta_model(recipe, load_config(recipe)), recipe)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        n for n, _ in model.named_parameters() if multimodal.is_in(n, TOWERS["llava"])
    }


def test_a_tower_that_is_not_loaded(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    recipe = checked(checkpoints["qwen3_vl"], tmp_path / "out", language_model_only=True)
    whole = load_model(checked(checkpoints["qwen3_vl"], tmp_path / "out"))
    model = load_model(recipe)
    assert type(model) is type(whole)
    assert not any(is_of_tower(name) for name, _ in model.named_parameters())
    assert torch.equal(logits(model), logits(whole))
    with pytest.raises(RecipeError, match="language_model_only: the model calls a part that was"):
        model.model.visual(torch.zeros(1))


def test_towers_that_are_not_loaded_must_be_in_safetensors(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "pickled"
    model = load_model(checked(checkpoints["llava"], tmp_path / "out"))
    model.config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    recipe = checked(folder, tmp_path / "out", language_model_only=True)
    assert obstacles(recipe) == [
        "language_model_only: what is saved takes the towers from the base's safetensors files, "
        f"and {folder} has none: leave the key out, or use a copy in safetensors"
    ]


def test_a_text_model_has_no_towers(base: Path, tmp_path: Path) -> None:
    recipe = checked(base, tmp_path / "out", language_model_only=True)
    model = load_model(recipe)
    assert multimodal.towers(model) == []
    assert multimodal.pattern_of(multimodal.towers(model)) is None


# --- what is planned, and what is printed ---------------------------------------------------------


def test_a_plan_counts_towers_as_weights_only(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    recipe = checked(checkpoints["llava"], tmp_path / "out", optimize=False)
    blueprint = draw(recipe, torch.float32)
    assert blueprint.depth == 2
    step = take(blueprint, recipe, "eager")
    assert step.uncaptured == {}
    flops = {path: usages["all"].flops for path, usages in step.usages.items()}
    idle = [path for path in flops if "vision" in path]
    assert idle
    assert all((flops[path] == 0) == (path in idle) for path in flops)


def test_the_model_card_names_the_class(checkpoints: dict[str, Path]) -> None:
    text = snippet({"base_model": str(checkpoints["qwen3_5"]), "adapter": "lora"}, "out")
    assert text is not None
    assert "AutoModelForMultimodalLM.from_pretrained(" in text
    assert "PeftModel.from_pretrained(base, folder)" in text


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["images", "image", "videos", "audio"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": numbers(1)[0]["messages"]},
        {"prompt": "<image>What is it?", "completion": "A cat"},
        {"instruction": "<image>What is it?", "output": "A cat"},
        {"text": "<image> A cat"},
    ],
    ids=lambda row: next(iter(row)),
)  # fmt: skip
def test_rows_with_images_are_refused(
    row: dict[str, Any], field: str, base: Path, tmp_path: Path
) -> None:
    types = {"messages": "chat_template", "prompt": "prompt_completion", "instruction": "alpaca"}
    kind = types.get(next(iter(row)), "completion")
    rows = write_rows(tmp_path / "rows.jsonl", [{**row, field: []}, {**row, field: ["a.png"]}])
    recipe = small_recipe(base, rows, tmp_path / "out")
    recipe |= {"datasets": [{"path": str(rows), "type": kind}], "val_set_size": 0}
    with pytest.raises(DataError) as refused:
        train(recipe, console=Console(quiet=True))
    why = (
        f"the row has {field!r} besides text; sound and videos are not trained: leave such rows "
        "out, save frames of a video as images, or remove that field and what stands for it in the "
        "text"
    )
    if field.startswith("image") and kind == "chat_template":
        why = (
            "the row has an image, and the model reads text only: leave images out, or use a model "
            "that reads them"
        )
    elif field.startswith("image"):
        why = (
            f"the row has {field!r}, and this type of rows is text without places for images: set "
            "type: alpaca.chat_template for instructions, or write such rows as messages (type: "
            "chat_template)"
        )
    assert str(refused.value) == f"{rows}, line 2: {why}"


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_and_its_merged_model(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    assert_merges(checkpoints["qwen2_5_vl"], tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "loaded"),
    [  # in turn: each takes seconds
        pytest.param(kind, loaded, marks=pytest.mark.long if i % 2 == loaded else pytest.mark.slow)
        for i, kind in enumerate(CONFIGS)
        for loaded in (True, False)
    ],
)
def test_every_type_trains_and_merges(
    kind: str, loaded: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    # these let the samples of a pack see each other, and are refused
    packing = kind not in ("qwen3_5", "qwen2_5_vl")
    keys = {"language_model_only": not loaded, "sample_packing": packing}
    assert_merges(checkpoints[kind], tmp_path / "out", **keys)


def assert_merges(checkpoint: Path, output: Path, **keys: Any) -> None:
    """Train an adapter and merge it: towers as they were, logits as with the adapter."""
    out = ran(checkpoint, output, **keys)
    names = load_file(out / "adapter_model.safetensors")
    assert all("language_model" in name for name in names)
    base = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    adapted = logits(PeftModel.from_pretrained(base, out))
    merged = merge(open_run(out), console=Console(quiet=True))
    assert_of_base(merged, checkpoint)
    assert (merged / "preprocessor_config.json").is_file()
    plain, info = AutoModelForImageTextToText.from_pretrained(
        merged, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) <= {MTP}
    assert type(plain) is type(base)
    torch.testing.assert_close(logits(plain), adapted, rtol=1e-5, atol=1e-6)
    assert evaluate(open_run(out), console=Console(quiet=True)) is not None


def test_towers_keep_their_dtype_in_a_merged_model(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    base = make_multimodal("internvl", tmp_path / "base", torch.bfloat16)
    (base / "preprocessor_config.json").unlink()
    out = ran(base, tmp_path / "out", language_model_only=True)  # in float32
    said = Console(record=True, quiet=False, width=300, file=io.StringIO())
    assert_of_base(merge(open_run(out), console=said), base)
    assert f"{base} has no processor (preprocessor_config.json): copy" in said.export_text()
    asked = MergeOptions(output=tmp_path / "halves", dtype="float16")
    halves = stored(merge(open_run(out), asked, Console(quiet=True)))
    assert {t.dtype for t in halves.values()} == {torch.float16}


@pytest.mark.parametrize("only", [False, True])
def test_merged_in_memory(only: bool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    keys = {"peft_init_lora_weights": "pissa", "language_model_only": only}
    out = ran(checkpoints["mistral3"], tmp_path / "out", **keys)
    assert_of_base(merge(open_run(out), console=Console(quiet=True)), checkpoints["mistral3"])


@pytest.mark.parametrize("keys", [{}, {"language_model_only": True}], ids=["loaded", "not loaded"])
def test_a_whole_model_is_saved_with_what_text_does_not_train(
    keys: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    keys |= {"adapter": None, "lora_target_linear": None, "bf16": True}
    recipe = checked(checkpoints["llava"], tmp_path / "run", **keys)
    model = add_adapter(load_model(recipe), recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    save_whole(model, make_tokenizer(), tmp_path / "out", None, recipe)
    assert_of_base(tmp_path / "out", checkpoints["llava"])
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(model.float()), rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("only", [False, True])
def test_a_whole_model_resumes(only: bool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "adapter": None, "lora_target_linear": None, "language_model_only": only, "save_steps": 1,
    }  # fmt: skip
    whole = ran(checkpoints["gemma3"], tmp_path / "whole", **keys)
    assert_of_base(whole / "checkpoint-1", checkpoints["gemma3"])
    again = ran(
        checkpoints["gemma3"], tmp_path / "again", **keys,
        resume_from_checkpoint=str(whole / "checkpoint-1"),
    )  # fmt: skip
    first, second = stored(whole), stored(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_of_base(again, checkpoints["gemma3"])


def test_the_layers_that_a_shorter_model_lacks_stay_away(base: Path, tmp_path: Path) -> None:
    keys = {
        "adapter": None, "lora_target_linear": None,
        "overrides_of_model_config": {"num_hidden_layers": 1},
    }  # fmt: skip
    recipe = checked(base, tmp_path / "run", **keys)
    save_whole(load_model(recipe), make_tokenizer(), tmp_path / "out", None, recipe)
    assert not any("layers.1." in name for name in stored(tmp_path / "out"))


def test_what_a_text_model_does_not_load_is_saved_too(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    extra = {MTP: torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = checked(folder, tmp_path / "run", adapter=None, lora_target_linear=None)
    save_whole(load_model(recipe), make_tokenizer(), tmp_path / "out", None, recipe)
    assert stored(tmp_path / "out").keys() == {*tensors, MTP}


def assert_same_curves(run: Run, other: Run) -> None:
    for key, tolerance in (("loss", 1e-5), ("eval_loss", 1e-5), ("grad_norm", 1e-3)):
        values = [(step, pytest.approx(x, rel=tolerance)) for step, x in other.curve(key)]
        assert run.curve(key) == values, key
        assert values


SEVERAL: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": ["full_shard", "auto_wrap"]},
    "fsdp, not loaded": {"fsdp": ["full_shard", "auto_wrap"], "language_model_only": True},
    "fsdp in shards": {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
}


QUICK = [("ddp", False), ("fsdp", True)]
"""What CI runs; the others take minutes, too."""


@pytest.fixture(scope="module")
def runs(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(checkpoints["qwen3_vl"], tmp_path_factory.mktemp("several"))


@pytest.mark.parametrize(
    ("strategy", "full"),
    [
        pytest.param(
            name, full, marks=pytest.mark.long if (name, full) in QUICK else pytest.mark.slow
        )
        for name in SEVERAL
        for full in (False, True)
    ],
)
def test_two_processes_with_a_tower_that_no_step_calls(
    strategy: str, full: bool, runs: Runs, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"num_epochs": 1, "max_steps": 4, "save_steps": 2, "optimize": False}
    if full:
        keys |= {"adapter": None, "lora_target_linear": False, "learning_rate": 1e-3}
    run = runs.forked(f"{strategy}, {full}", **keys, **SEVERAL[strategy])
    one = runs.alone(2, **keys)
    assert_same_curves(run, one)
    first = run.folder / "checkpoint-2"
    out = run.folder
    if not full:
        out = merge(open_run(out), console=Console(quiet=True))
    elif in_shards(first):
        assert_of_base(merge(open_run(first), console=Console(quiet=True)), runs.base)
    assert_of_base(out, runs.base)
    resumed = runs.forked(
        f"{strategy}, {full} resumed", resume_from_checkpoint=str(first), **keys,
        **SEVERAL[strategy],
    )  # fmt: skip
    assert_same_curves(resumed, one)


def test_of_a_base_only_what_no_loaded_module_owns_is_carried() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    from fusewright.train.model.multimodal import untrained

    config = GptOssConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    attention, experts = "model.layers.0.self_attn", "model.layers.0.mlp.experts"
    stored = [
        *(f"{attention}.q_proj.{end}" for end in ("weight_scale_inv", "qweight", "g_idx")),
        *(f"{experts}.gate_up_proj_{end}" for end in ("blocks", "scales")),
        f"{experts}.0.gate_proj.weight_scale", f"{attention}.bias", "model.norm.weight",
    ]  # fmt: skip
    others = ["mtp.fc.weight", "model.layers.1.self_attn.q_proj.weight"]
    assert untrained(model, [*stored, *others]) == others
