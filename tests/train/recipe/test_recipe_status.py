"""What each key does of a recipe, and what a dry run shows of it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusewright.errors import RecipeError
from fusewright.train.dry_run import resolved_yaml, show
from fusewright.train.recipe.load import check, load_recipe
from fusewright.train.recipe.status import entries, messages, refusals
from fusewright.train.terminal import Terminal

from ...load import stretched
from ..commands import complaint, fusewright, snapshot

BASE: dict[str, Any] = {"base_model": "a/b", "datasets": [{"path": "a/b"}]}


def status(**keys: Any) -> dict[str, tuple[str, str]]:
    checked = check({**BASE, **keys})
    return {e.key: (e.status, e.note) for e in entries(checked.values)}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lora_dropout", 0.0, "honoured"),
        ("wandb_project", None, "honoured"),
        ("fsdp", None, "honoured"),
        ("context_parallel_size", 1, "honoured"),
        ("expert_parallel_size", 2, "subsumed"),
        ("reward_model", False, "honoured"),
        ("reward_model", True, "honoured"),
        ("deepspeed", "zero2.json", "honoured"),
        ("tensor_parallel_size", 2, "honoured"),
        ("auto_find_batch_size", False, "honoured"),
        ("auto_find_batch_size", True, "not yet available"),
        ("liger_rope", True, "subsumed"),
        ("flash_attention", True, "subsumed"),
        ("save_safetensors", False, "not applicable"),
        ("is_llama_derived_model", True, "not applicable"),
        ("gradient_checkpointing", True, "honoured"),
        ("gradient_checkpointing", "unsloth", "subsumed"),
        ("optimizer", "lion_8bit", "honoured"),
        ("optimizer", "dion", "not yet available"),
        ("lr_scheduler", "rex", "not yet available"),
        ("plugins", ["axolotl.integrations.liger.LigerPlugin"], "subsumed"),
        ("plugins", ["axolotl.integrations.liger.LigerPlugin", "a.B"], "not yet available"),
        ("plugins", ["axolotl.integrations.swanlab.SwanLabPlugin"], "subsumed"),
        ("plugins", ["axolotl.integrations.mora.MoraPlugin"], "not yet available"),
        ("liger_rms_norm_gated", True, "subsumed"),
        ("use_scattermoe", True, "subsumed"),
        ("dsv4_fp4_grouped_mode", "nvfp4", "subsumed"),
        ("selective_checkpointing", True, "subsumed"),
        ("selective_checkpointing", {"save": ["attention"], "offload": True}, "subsumed"),
        ("torch_compile_options", {"max_autotune": True}, "subsumed"),
        ("nonexpert_quantization", "none", "not applicable"),
        ("nonexpert_quantization", "nf4", "not yet available"),
        ("quantization", {"weight_dtype": "int4"}, "not applicable"),
        ("ebft", {"stride": 4}, "not applicable"),
        ("optimizer", "sinkgd", "not yet available"),
        ("nf4_backend", "torchao", "not yet available"),
        ("balance_labels", True, "not yet available"),
        ("swanlab_project", "tests", "honoured"),
        ("eval_on_start", True, "not applicable"),
        ("evals_per_epoch", 4, "not applicable"),
        ("lora_r", 4, "not applicable"),
        ("loss_watchdog_patience", 3, "not applicable"),
        ("image_build", {"context": ".", "tag": "a/b"}, "not yet available"),
        ("docker_auth", {"auth_method": "REGISTRY_SECRET"}, "not yet available"),
        ("volumes", [{"source": "disk", "mount": "/data"}], "not yet available"),
        ("image_registry", {"provider": "aws_ecr", "secret": "name"}, "not yet available"),
        ("preset", "8gpu", "not yet available"),
        ("dry_run", False, "honoured"),
    ],
)
def test_one_of_four(key: str, value: Any, expected: str) -> None:
    found, note = status(**{key: value})[key]
    assert found == expected
    if expected != "honoured":
        assert note


def test_keys_of_trl_have_one_each() -> None:
    trl: dict[str, Any] = {"num_generations": 4, "use_liger_loss": True, "async_prefetch": True}
    unread = status(trl=trl)
    assert {unread[f"trl.{key}"][0] for key in trl} == {"not applicable"}
    trl["reward_funcs"] = ["format"]
    found = status(trl=trl, rl="grpo")
    assert found["trl.num_generations"][0] == "honoured"
    assert found["trl.use_liger_loss"][0] == "subsumed"
    assert found["trl.async_prefetch"][0] == "not yet available"
    trl["async_prefetch"] = False
    assert status(trl=trl, rl="grpo")["trl.async_prefetch"][0] == "honoured"


def test_keys_inside_others_have_one_too() -> None:
    dataset = {"path": "a/b", "trust_remote_code": True, "type": {"format": "{instruction}"}}
    qat = {"weight_dtype": "int4"}
    found = status(datasets=[dataset], special_tokens={"pad_token": "x"}, qat=qat)
    assert found["datasets.0.path"][0] == "honoured"
    assert found["datasets.0.trust_remote_code"][0] == "not applicable"
    assert found["datasets.0.type.format"][0] == "honoured"
    assert found["special_tokens.pad_token"][0] == "honoured"
    assert found["qat.weight_dtype"][0] == "honoured"


def test_a_misspelt_key_of_a_group_that_nothing_reads_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"quantization\.wieght_dtype: .* mean weight_dtype"):
        load_recipe({**BASE, "quantization": {"wieght_dtype": "int4"}})


def test_the_same_key_counts_with_what_it_needs() -> None:
    assert status(adapter="lora", lora_target_linear=True, lora_r=4)["lora_r"][0] == "honoured"
    assert status(val_set_size=4, evals_per_epoch=4)["evals_per_epoch"][0] == "honoured"
    watched = status(loss_watchdog_threshold=5, loss_watchdog_patience=3)
    assert watched["loss_watchdog_patience"][0] == "honoured"


@pytest.mark.parametrize(
    ("keys", "idle", "reader"),
    [
        (
            {"adapter": "lora", "lora_model_dir": "a/b", "lora_target_linear": True},
            {"lora_r": 4}, {"lora_model_dir": None},
        ),
        ({"streaming": True, "max_steps": 3}, {"group_by_length": True}, {"streaming": None}),
        ({"streaming": True, "max_steps": 3}, {"dataset_prepared_path": "p"}, {"streaming": None}),
        ({"sequence_len": 64, "val_set_size": 2}, {"eval_sequence_len": 65}, {"sequence_len": 65}),
        ({"sequence_len": 64, "val_set_size": 2, "sample_packing": True,
          "eval_sample_packing": False}, {"eval_sequence_len": 65}, {"eval_sample_packing": None}),
        ({}, {"optim_target_modules": ["q"]}, {"optimizer": "galore_adamw"}),
        ({"lr_scheduler": "linear"}, {"lr_quadratic_warmup": True}, {"lr_scheduler": "cosine"}),
        ({}, {"lr_div_factor": 5}, {"lr_scheduler": "one_cycle"}),
        ({"cosine_min_lr_ratio": 0.1}, {"lr_scheduler_kwargs": {"num_cycles": 1}},
         {"cosine_min_lr_ratio": None}),
        ({"loraplus_lr_ratio": 4, "adapter": "lora", "lora_target_linear": True},
         {"embedding_lr": 1e-4}, {"loraplus_lr_ratio": None}),
        ({"adapter": "lora", "lora_target_linear": True},
         {"loraplus_lr_embedding": 1e-4}, {"loraplus_lr_ratio": 4}),
    ],
)  # fmt: skip
def test_a_key_that_another_leaves_without_a_reader_says_so(
    keys: dict[str, Any], idle: dict[str, Any], reader: dict[str, Any]
) -> None:
    (key,) = idle
    said, note = status(**keys, **idle)[key]
    assert said == "not applicable"
    assert note
    assert status(**{**keys, **idle, **reader})[key][0] == "honoured"


def test_only_what_changes_the_run_is_refused() -> None:
    keys = {"rl": "ebft", "liger_rope": True, "fsdp": None, "reward_model": False}
    checked = check({**BASE, **keys})
    assert [loc for loc, _ in refusals(checked.values)] == [("rl",)]
    with pytest.raises(RecipeError, match="rl: ebft is not yet available"):
        load_recipe({**BASE, **keys})


def test_a_batch_size_that_is_not_found_says_what_to_do_instead() -> None:
    assert load_recipe({**BASE, "auto_find_batch_size": False}).auto_find_batch_size is False
    with pytest.raises(RecipeError, match="auto_find_batch_size: true is not yet") as refused:
        load_recipe({**BASE, "auto_find_batch_size": True})
    assert "memory: auto" in str(refused.value)
    assert "gradient_accumulation_steps" in str(refused.value)


def test_training_says_what_was_not_asked_for() -> None:
    keys = {"liger_rope": True, "world_size": 2, "liger_rms_norm": False, "debug": None}
    lines = messages(load_recipe({**BASE, **keys}))
    assert lines == [
        "fusewright does this itself: liger_rope (train --dry-run says why)",
        "without effect here: world_size (train --dry-run says why)",
    ]
    assert messages(load_recipe(BASE)) == []


RECIPE = """\
base_model: some/model
datasets:
  - path: rows.jsonl
    field_messages: turns
model_config:
  rope_theta: 1e6
liger_rope: true
wandb_project:
learning_rate: 1e-4
rl: ebft
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_a_dry_run_shows_each_key_with_its_line(file: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    words = ("--lora-r", "4", "--no-sample_packing", "--verbose")
    result = fusewright("train", str(file), "--dry-run", *words)
    assert result.exit_code == 2, result.output
    assert snapshot(tmp_path) == before
    table = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "base_model 1 honoured some/model" in table
    assert "datasets.0.field_messages 4 honoured turns" in table
    assert "overrides_of_model_config 5 honoured {rope_theta: 1000000.0}" in table
    assert "wandb_project 8 unset" in table
    assert "keys: 7 honoured, 1 subsumed, 1 not applicable, 1 not yet available, 1 unset" in table
    assert "sample_packing set honoured false" in table
    assert any(line.startswith("liger_rope 7 subsumed true fusewright's rewrite") for line in table)
    assert any(line.startswith("rl 10 not yet available ebft it samples") for line in table)
    assert any(line.startswith("lora_r set not applicable 4 adapter is unset") for line in table)
    assert complaint(result) == (
        f"fusewright: train would refuse this: {file}, line 10: rl: ebft is not yet available: "
        "it samples and embeds with Axolotl's own trainer; use rl: grpo with a reward function\n"
    )


def test_a_dry_run_begins_with_its_verdict(file: Path) -> None:
    begin = f"{file}: train would REFUSE this, for the reasons at the end"
    refused = fusewright("train", str(file), "--dry-run").stdout.splitlines()
    assert refused[0] == begin
    taken = fusewright("train", str(file), "--dry-run", "--rl", "null").stdout.splitlines()
    assert taken[0] == f"{file}: train would take this"
    assert taken[1].startswith("  NOT CHECKED: some/model is not on this machine")
    assert len(taken) < 15
    text = "\n".join(taken)
    assert [word for word in ("liger_rope", "wandb_project") if word not in text] == []
    assert [word for word in ("base_model", "learning_rate") if word in text] == []
    assert taken[-1].startswith("--verbose: ")


def test_what_a_dry_run_resolves_is_the_same_recipe(file: Path, tmp_path: Path) -> None:
    result = fusewright("train", str(file), "--dry-run", "--rl", "null", "--verbose")
    text = result.stdout.partition("# the recipe with its defaults")[2].partition("\n")[2]
    again = tmp_path / "again.yaml"
    again.write_text(text, encoding="utf-8")
    first, second = load_recipe(file, {"rl": None, "verbose": True}), load_recipe(again)
    assert first.model_dump() == second.model_dump()
    assert yaml.safe_load(text)["learning_rate"] == 1e-4
    assert yaml.safe_load(resolved_yaml(first)) == yaml.safe_load(resolved_yaml(second))


@pytest.mark.parametrize("width", [60, 200])
def test_a_dry_run_breaks_no_word(file: Path, tmp_path: Path, width: int) -> None:
    long = f"{tmp_path}/{'a_long_folder_name/' * 4}out"
    console = Terminal(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    show(check(file, {"rl": None, "output_dir": long, "verbose": True}), console)
    text = console.file.getvalue().partition("# the recipe")[0]
    assert {long, "rewrite", "output_dir", "honoured"} <= set(text.split())


def test_a_dry_run_in_a_pipe_is_not_wrapped(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    long = "a long title " * 12
    show(check(file, {"rl": None, "hub_revision": long.strip(), "verbose": True}), Terminal())
    table = capsys.readouterr().out.partition("# the recipe")[0]
    assert long.strip() in table


def test_a_dry_run_prints_no_secret_and_tells_what_is_not_installed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusewright.train import requirements as packages

    find = packages.importlib.util.find_spec
    monkeypatch.setattr(
        packages.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest),
    )
    qlora = ("--load_in_4bit", "--adapter", "qlora", "--lora_target_linear")
    given = ("--comet_api_key", "s3cr3t", "--verbose", *qlora)
    result = fusewright("train", str(file), "--dry-run", *given)
    assert result.exit_code == 2
    assert "s3cr3t" not in result.output
    assert "comet_api_key" in result.stdout.partition("# the recipe")[0]
    assert "comet_api_key" not in result.stdout.partition("# the recipe")[2]
    refused = complaint(result).splitlines()
    assert refused[0].startswith("fusewright: train would refuse this: ")
    assert "rl: ebft is not yet available" in refused[0]
    assert "load_in_4bit: true needs the package bitsandbytes" in refused[1]


def test_a_dry_run_lists_mistakes_as_training_does(file: Path) -> None:
    result = fusewright("train", str(file), "--dry-run", "--lora_rank", "4")
    assert result.exit_code == 2
    assert "lora_rank: is not a key of a recipe" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["schema"], ["train", "RECIPE", "--dry-run", "--rl=null"], ["train", "--help"]],
)
def test_looking_loads_nothing(file: Path, arguments: list[str]) -> None:
    words = [str(file) if word == "RECIPE" else word for word in arguments]
    code = (
        "import sys\nfrom fusewright.cli.main import app\n"
        f"try:\n    app({words!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = ('torch', 'transformers', 'datasets', 'peft')\n"
        "print('loaded', [m for m in heavy if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=stretched(120),
    ).stdout
    assert out.splitlines()[-1] == "loaded []"
