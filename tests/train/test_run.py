"""Whole runs of a tiny model: the files, the figures, and what plain PEFT makes of them."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusewright.compiler.bypass import A_CACHE
from fusewright.errors import DataError, OptimizeError, RecipeError
from fusewright.optim.flat import FlatOptimizer
from fusewright.report import Bypass, Report, Site
from fusewright.train import finish, train
from fusewright.train.checkpoint import save_model as export
from fusewright.train.data import Sample
from fusewright.train.model.load import load_model
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.report.format import millions
from fusewright.train.report.result import RunLog, RunResult
from fusewright.train.report.run_facts import snippet
from fusewright.train.trainer import ready

from .conftest import make_model

QUIET = Console(quiet=True)
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("optimize", [False, True])
def test_a_run_writes_everything_and_plain_peft_reads_it(
    recipe: dict[str, Any], base: Path, tmp_path: Path, optimize: bool
) -> None:
    out = io.StringIO()
    result = train(
        recipe,
        console=Console(file=out, width=120),
        optimize=optimize,
        sample_prompt="What is 3?",
        sample_max_tokens=4,
        eval_steps=2,
        max_steps=8,
    )
    folder = tmp_path / "out"
    assert result.output_dir == folder
    assert result.status == "finished"
    assert result.steps == result.steps_planned == 8
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    modes = {path.stat().st_mode for path in folder.iterdir() if path.is_file()}
    assert len(modes) == 1  # weights are not their owner's alone to read
    run = json.loads((folder / "run.json").read_text())
    assert run["recipe"]["lora_r"] == 4
    assert run["recipe"]["weight_decay"] == 0.0  # defaults are in it too
    assert set(run["versions"]) >= {"python", "torch", "transformers", "peft", "fusewright"}
    assert run["val_loss_before"] == result.val_loss_before
    assert run["val_loss_after"] < run["val_loss_before"] - 0.05
    assert run["adapter_check"]["exact"] is True
    assert run["tokens_per_s"] > run["trained_tokens_per_s"] > 0
    assert run["peak_rss_mb"] >= run["loaded_rss_mb"] > 0
    assert run["data"]["rows"] == 40
    assert run["data"]["validation_samples"] == 8
    assert [e["step"] for e in run["history"] if "eval_loss" in e] == [0, 2, 4, 6, 8]
    assert [e["step"] for e in run["history"] if "loss" in e] == list(range(1, 9))
    assert run["history"][-1]["eval_loss"] == pytest.approx(run["val_loss_after"], rel=1e-6)
    assert run["sample"]["question"] == "What is 3?"
    assert set(run["sample"]) == {"question", "before", "after"}
    for words in (
        "validation loss before",
        "step 8/8",
        "plain PEFT gives the same logits",
        "for vLLM: vllm serve ",
    ):
        assert words in out.getvalue()

    if optimize:
        assert run["optimize"]["by_rule"]["lora_linear"] == 14
        assert run["adapter_check"]["optimized_difference"] < 1e-4
        (line,) = [line for line in out.getvalue().splitlines() if " rewrites in " in line]
        assert line.startswith("optimized: ")
        assert "lora_linear" not in out.getvalue()
    else:
        assert run["optimize"] is None
        assert run["adapter_check"]["optimized_difference"] == 0.0

    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)  # of a set, whose order is another one in each process
    adapter = load_file(folder / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2  # A and B of seven linears in two layers
    assert all(t.dtype is torch.float32 for t in adapter.values())
    base_size, added = make_model().num_parameters(), sum(t.numel() for t in adapter.values())
    sizes = f"parameters: {millions(base_size)} in the base model, {millions(added)} in the adapter"
    assert sizes in out.getvalue()
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    ids = tokenizer("What is 3?", return_tensors="pt").input_ids
    with torch.no_grad():
        adapted = plain(ids).logits
        with plain.disable_adapter():
            assert not torch.allclose(adapted, plain(ids).logits, atol=1e-3)


@pytest.mark.long
def test_the_table_of_rewrites_is_printed_when_asked_for(recipe: dict[str, Any]) -> None:
    out = io.StringIO()
    result = train(
        recipe, console=Console(file=out, width=120), optimize=True, codegen="eager", max_steps=1,
        verbose=True,
    )  # fmt: skip
    assert str(Report.from_dict(result.optimize or {})) in out.getvalue()
    assert "lora_linear" in out.getvalue()


def test_a_line_sums_up_what_was_rewritten_and_what_was_not() -> None:
    done = Site(module="a", rule="glu", op="glu", status="rewritten")
    missed = Site(module="b", rule="glu", op="glu", status="missed", reason="no spelling")
    text = finish.summary(Report(sites=(done, missed), regions=2, graphs=1))
    assert text.startswith("optimized: 1 rewrite in 2 regions (1 graph)")
    assert "1 left as before" in text
    assert "left" not in finish.summary(Report(sites=(done,)))
    lost = [Bypass(f"layers.{i}", "eager 1 us, ours 2 us", True) for i in (0, 0, 1)]
    answered = [Bypass(f"layers.{i}", A_CACHE) for i in range(2)]  # a prompt
    others = (*lost, *answered, Bypass("head", "a hook"))
    text = finish.summary(Report(sites=(done,), bypasses=others))
    assert "; 2 modules too small to gain in some calls; 1 left as before" in text


def test_a_signal_does_not_hide_why_training_ended() -> None:
    for status, after in (("finished", "interrupted"), ("nan", "nan")):
        result = RunResult(Path(), {}, status=status)
        result.interrupt(signal.SIGTERM)
        assert (result.status, result.signal, result.exit_code) == (after, 15, 143)


def test_a_checkpoint_carries_figures_and_nothing_else() -> None:
    result = RunResult(Path(), {}, val_loss_before=2.0, seconds={"data": 1.0})
    later = RunResult(Path(), {}, started="now")
    later.resume(3, {**result.carried(), "started": "then", "output_dir": "elsewhere"})
    assert (later.resumed_from, later.val_loss_before, later.started) == (3, 2.0, "then")
    assert later.output_dir == Path()


def test_a_checkpoint_knows_the_time_of_what_is_not_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each second counts once, for the innermost part."""
    now = 0.0
    monkeypatch.setattr("fusewright.train.report.result.time.perf_counter", lambda: now)
    result = RunResult(Path(), {})
    log = RunLog(result, QUIET)
    with log.timed("training"):
        now = 10.0
        with log.timed("audit"):
            now = 13.0
            assert log.carried()["seconds"] == {"training": 10.0, "audit": 3.0}
        now = 20.0
        assert log.carried()["seconds"] == {"training": 17.0, "audit": 3.0}
        now = 21.0
    assert result.seconds == {"training": 18.0, "audit": 3.0}


@pytest.mark.long
def test_optimizing_changes_no_loss(recipe: dict[str, Any], tmp_path: Path) -> None:
    curves = []
    for on in (False, True):
        result = train(recipe, console=QUIET, output_dir=str(tmp_path / f"{on}"), optimize=on)
        curves.append([e["loss"] for e in result.history if "loss" in e])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_the_same_recipe_twice_gives_the_same_adapter(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        train(recipe, console=QUIET, output_dir=str(folder), lora_dropout=0.1)
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.long("True")
@pytest.mark.parametrize("optimize", [False, True])
def test_accumulating_batches_is_the_same_as_a_larger_batch(
    recipe: dict[str, Any], tmp_path: Path, optimize: bool
) -> None:
    """An epoch of six steps, of which the last has fewer batches."""
    losses = []
    for micro, accumulate in ((4, 1), (1, 4)):
        result = train(
            recipe,
            console=QUIET,
            output_dir=str(tmp_path / f"{micro}"),
            optimize=optimize,
            micro_batch_size=micro,
            gradient_accumulation_steps=accumulate,
            max_steps=6,
        )
        assert 5 * 4 < result.data["train_sequences"] < 6 * 4
        losses.append([e["loss"] for e in result.history if "loss" in e])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("changes", [{"sample_packing": False}, {"gradient_checkpointing": True}])
def test_other_ways_to_train(recipe: dict[str, Any], changes: dict[str, Any]) -> None:
    result = train(recipe, console=QUIET, **changes)
    assert result.adapter_check is not None
    assert result.adapter_check["exact"]
    assert result.val_loss_after is not None
    assert result.val_loss_before is not None
    assert result.val_loss_after < result.val_loss_before


def test_full_training_in_bf16_by_epochs(recipe: dict[str, Any], tmp_path: Path) -> None:
    del recipe["max_steps"]
    result = train(recipe, console=QUIET, adapter=None, bf16=True, num_epochs=2, learning_rate=1e-3)
    batches = -(-result.data["train_sequences"] // 2)
    assert result.steps == 2 * batches
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype is torch.bfloat16
    assert model.config.use_cache
    assert result.adapter_check is None


def test_long_rows_and_rows_with_nothing_to_train_are_counted(recipe: dict[str, Any]) -> None:
    dropped = train(recipe, console=QUIET, sequence_len=80)
    assert dropped.data["too_long"] > 0
    assert dropped.data["train_samples"] == 32 - dropped.data["too_long"] + (
        8 - dropped.data["validation_samples"]
    )
    cut = train(
        recipe, console=QUIET, overwrite=True, sequence_len=80, excess_length_strategy="truncate"
    )
    assert cut.data["too_long"] == dropped.data["too_long"]
    assert cut.data["train_samples"] == 32
    with pytest.raises(DataError, match=r"line \d+: \d+ tokens, and sequence_len is 80"):
        train(
            recipe, console=QUIET, overwrite=True, sequence_len=80, excess_length_strategy="raise"
        )
    with pytest.raises(DataError, match="no row is left to train on"):
        train(recipe, console=QUIET, overwrite=True, sequence_len=8)


def test_checkpoints_are_saved_and_limited(recipe: dict[str, Any], tmp_path: Path) -> None:
    train(recipe, console=QUIET, save_steps=1, save_total_limit=2)
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == [
        "checkpoint-3", "checkpoint-4",
    ]  # fmt: skip
    (tmp_path / "out" / "mine.txt").write_text("keep")
    train(recipe, console=QUIET, overwrite=True)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_targets_by_name(recipe: dict[str, Any], tmp_path: Path) -> None:
    train(recipe, console=QUIET, lora_target_linear=False, lora_target_modules=["q_proj"])
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(adapter) == 4
    with pytest.raises(RecipeError, match="the model has no layer qq_proj"):
        train(recipe, console=QUIET, overwrite=True, lora_target_modules=["q_proj", "qq_proj"])
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 4  # still there


@pytest.mark.long("changes0-OptimizeError-too small for any plan")
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"memory": "0.01GB", "optimize": True}, OptimizeError, "too small for any plan"),
        ({"optimizer": "galore_adamw"}, RecipeError, "galore"),
        ({"lr_scheduler": "cosine_with_min_lr"}, RecipeError, "lr_scheduler: cosine_with_min_lr"),
        (
            {"lr_scheduler": "cosine", "lr_scheduler_kwargs": {"fast": 1}},
            RecipeError,
            "lr_scheduler: cosine .*fast",
        ),
        (
            {"lr_scheduler": "one_cycle", "lr_scheduler_kwargs": {"fast": 1}},
            RecipeError,
            "lr_scheduler: one_cycle .*fast",
        ),
    ],
)
def test_a_run_that_is_refused_late_costs_the_earlier_one_nothing(
    recipe: dict[str, Any],
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    recipe |= {"max_steps": 2, "save_steps": 2}
    train(recipe, console=QUIET)
    there = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(error, match=words):
        train(recipe, console=QUIET, overwrite=True, **changes)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == there
    assert any(p.parent.name == "checkpoint-2" for p in there)


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"peft_init_lora_weights": "pissa"}, "pissa has changed the base weights"),
        (
            {"peft_layer_replication": [[0, 2], [1, 2]]},
            "the base model has replicated layers",
        ),
        ({"bf16": True, "peft_autocast_adapter_dtype": False}, None),
    ],
)
def test_the_adapter_check_knows_what_it_can_check(
    recipe: dict[str, Any], changes: dict[str, Any], left_out: str | None
) -> None:
    out = io.StringIO()
    result = train(recipe, console=Console(file=out, width=200), max_steps=2, **changes)
    assert (result.status, result.exit_code) == ("finished", 0)
    if left_out is None:
        assert result.adapter_check is not None
        assert result.adapter_check["exact"]
    else:
        assert result.adapter_check is None
        assert f"adapter check skipped: {left_out}" in " ".join(out.getvalue().split())


def test_a_signal_while_the_result_is_saved_ends_the_run(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = export.save_whole

    def interrupted(*args: Any) -> None:
        save(*args)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("fusewright.train.checkpoint.save_model.save_whole", interrupted)
    result = train(recipe, console=QUIET, max_steps=2)
    assert (result.status, result.signal) == ("interrupted", signal.SIGINT)
    assert result.exit_code == 128 + signal.SIGINT
    assert result.val_loss_after is None
    assert result.steps == 2


def test_a_signal_between_training_and_saving_costs_nothing(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = FlatOptimizer.summary

    def interrupted(optimizer: FlatOptimizer) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return summary(optimizer)

    monkeypatch.setattr(FlatOptimizer, "summary", interrupted)
    result = train(recipe, console=QUIET, max_steps=2)
    assert (result.status, result.exit_code) == ("interrupted", 143)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_a_model_that_leaks_is_refused(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "model.x (Mixer) mixes positions"
    monkeypatch.setattr("fusewright.compiler.packs.unpackable", lambda *_, **__: reason)
    with pytest.raises(
        RecipeError,
        match=r"samples of a pack would see each other: model\.x \(Mixer\) mixes positions",
    ):
        train(recipe, console=QUIET)


def test_a_model_that_cannot_be_loaded(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(
        RecipeError, match=r"base_model: .*broken.config\.json has no model_type, so"
    ):
        train(recipe, console=QUIET, base_model=str(tmp_path / "broken"))


@pytest.mark.long
@pytest.mark.real
def test_the_quickstart_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(recipe: Recipe, *device: Any) -> Any:
        model = load_model(recipe, *device)
        model.save_pretrained(tmp_path / "plain")  # weights from a GGUF, and no mark of it left
        assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
        return model

    monkeypatch.setattr(ready, "load_model", load)
    result = train(
        EXAMPLES / "quickstart.yaml",
        console=QUIET,
        output_dir=str(tmp_path / "out"),
        val_set_size=4,
        sequence_len=128,
        micro_batch_size=1,
        max_steps=2,
        warmup_steps=0,
        codegen="eager",  # no C++ compilation in a test
        sample_max_tokens=4,
    )
    assert result.data["rows"] > 2000
    assert result.adapter_check is not None
    assert result.adapter_check["exact"]
    assert result.sample is not None
    assert result.sample["before"]
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert (tmp_path / "plain" / "model.safetensors").stat().st_size > 2e8
    printed: list[str] = []
    code = snippet(result.recipe, str(tmp_path / "out"))
    assert code is not None
    exec(code, {"print": printed.append})  # plain PEFT on the package's GGUF file
    assert printed[0].strip()


def test_a_signal_waits_for_the_last_files(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusewright.train.report import page

    write = page.write

    def signalled(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(*arguments)

    monkeypatch.setattr(page, "write", signalled)
    result = train({**recipe, "max_steps": 1}, console=QUIET)
    assert result.status == "finished"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "finished"
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"])
def test_adapters_are_stepped_as_one_and_resume_either_way(
    recipe: dict[str, Any], tmp_path: Path, optimizer: str
) -> None:
    """A run that is cut in two ends where the whole one does, whichever optimizer saved it."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer

    from fusewright.train.processes.signals import Interrupts
    from fusewright.train.trainer.build import make_trainer
    from fusewright.train.trainer.context import Context
    from tests.train.conftest import make_model, make_tokenizer

    def trained(folder: str, resume: str | None, flat: bool) -> Any:
        changes = {"optimizer": optimizer, "output_dir": str(tmp_path / folder), "save_steps": 2}
        asked = Recipe(**{**recipe, **changes, "weight_decay": 0.1, "lr_scheduler": "linear"})
        torch.manual_seed(0)
        model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear"))
        packs = [[Sample([1, 5 + i, 9, 2], [1, 5 + i, 9, 2])] for i in range(8)]
        context = Context(asked, make_tokenizer(), QUIET, Interrupts())
        trainer = make_trainer(context, model, packs)
        if not flat:
            trainer.create_optimizer = lambda model=None: Trainer.create_optimizer(trainer, model)
        trainer.train(resume_from_checkpoint=resume)
        inner = trainer.optimizer.optimizer
        assert isinstance(inner, FlatOptimizer) == (flat and optimizer != "adafactor")
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    plain, flat = trained("plain", None, False), trained("flat", None, True)
    halves = [
        trained("a", str(tmp_path / "plain" / "checkpoint-2"), True),
        trained("b", str(tmp_path / "flat" / "checkpoint-2"), False),
    ]
    for run in (flat, *halves):
        assert all(torch.equal(run[name], value) for name, value in plain.items())
