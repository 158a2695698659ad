"""Whole runs on rows with images: their values, what they save, and how they resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from fusewright.errors import DataError, RecipeError
from fusewright.train import train
from fusewright.train.inference.evaluate import evaluate
from fusewright.train.inference.load_run import load_run
from fusewright.train.inference.run_folder import open_run
from fusewright.train.merge import MergeOptions, merge
from fusewright.train.processes.world import World
from fusewright.train.recipe.load import load_recipe
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.trainer.batches import errors_as_raised
from fusewright.train.trainer.build import _image_workers, _require_whole
from fusewright.train.trainer.engine import FineTuner
from tests.tools.twins import rows as twins

from ..results import assert_same, curves, stop_at, weights
from .training import Rows, checkpoint, small, write_rows

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "qwen2.5-vl" / "lora.yaml"
QUIET = Console(quiet=True)
TOWERS = {"freeze_mm_modules": False}
THREE = ("qwen2_5_vl", "gemma3", "llava")
PACKED = {"optimize": True, "codegen": "eager", "sample_packing": True, "sequence_len": 160}
FULL = {"adapter": None, "lora_target_linear": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), 24)


def plain_model(family: str, folder: Path | None = None) -> Any:
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        folder or checkpoint(family), dtype=torch.float32
    )
    model.config.use_cache = False
    return model


def changed(family: str, folder: Path) -> set[str]:
    """The tensors of a saved model that are not the base's; it has all of these."""
    base = load_file(checkpoint(family) / "model.safetensors")
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    assert found.keys() == base.keys()
    return {name for name, t in found.items() if not torch.equal(t, base[name])}


def is_of_tower(name: str) -> bool:
    return any(part in name for part in ("visual", "vision", "projector", "connector"))


# --- values --------------------------------------------------------------------------------------


def batches_of(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What the model is called with in training, from now on."""
    found: list[dict[str, Tensor]] = []

    def noted(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        kept = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
        found.append(kept)
        return original(trainer, model, inputs, *args, **kwargs)

    original = FineTuner.training_step
    monkeypatch.setattr(FineTuner, "training_step", noted)
    return found


@pytest.mark.parametrize(
    ("family", "optimize"),
    [
        *((family, False) for family in THREE),
        pytest.param("qwen2_5_vl", True, marks=pytest.mark.long),
        *(pytest.param(family, True, marks=pytest.mark.slow) for family in THREE[1:]),
    ],
)
def test_ten_steps_as_plain_peft(
    family: str, optimize: bool, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = small(
        family, written, tmp_path / "out", max_steps=10, optimize=optimize, codegen="eager",
        optimizer="adamw_torch", learning_rate=2e-3, lr_scheduler="constant", warmup_steps=0,
        weight_decay=0.0,
    )  # fmt: skip
    batches = batches_of(monkeypatch)
    result = train(keys, console=QUIET)
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert any("pixel_values" in batch for batch in batches)

    model = plain_model(family)
    transformers.set_seed(42)
    names = {name.rpartition(".")[2] for name in weights(tmp_path / "out") if "lora_A" in name}
    assert names == {"weight"}
    targets = sorted(
        {
            name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            for name in weights(tmp_path / "out")
            if "lora_A" in name
        }
    )
    assert not any(map(is_of_tower, targets))  # frozen by default
    peft: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=targets))
    peft.train()
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    expected = []
    for batch in batches:
        loss = peft(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=2e-5)


def test_the_example_in_small(tmp_path: Path) -> None:
    """On rows as its dataset has them: images in a column of a table."""
    (dataset,) = load_recipe(EXAMPLE).datasets
    rows = twins.write_rows(twins.rows_of({"path": dataset.path})[:4], tmp_path / "rows")
    result = train(
        EXAMPLE, console=QUIET, base_model=str(checkpoint("qwen2_5_vl")), max_steps=1, bf16=False,
        datasets=[{"path": str(rows), "type": "chat_template"}],
        gradient_accumulation_steps=1, sequence_len=256, val_set_size=0, evals_per_epoch=None,
        sample_packing=False, optimize=False, audit=False, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    assert (result.status, result.problems) == ("finished", [])
    assert not any(map(is_of_tower, weights(tmp_path / "out")))


# --- towers --------------------------------------------------------------------------------------


LINEAR = {"lora_target_linear": True}
EXPRESSION = {
    "lora_target_linear": False, "lora_target_modules": r".*(visual|mlp)\..*(up_proj|gate_proj)",
}  # fmt: skip
# of a new Gemma 3, what projects images is zeros, so that its tower gets no gradients
OTHERS = (
    "qwen3_vl", "qwen3_5", "gemma4", "mistral3", "llava", "internvl", "smolvlm", "idefics3",
    "glm4v",
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen2_5_vl", LINEAR),
        ("qwen2_5_vl", EXPRESSION),
        *(pytest.param(family, LINEAR, marks=pytest.mark.slow) for family in OTHERS),
    ],
)
def test_adapters_of_towers(
    family: str, keys: dict[str, Any], written: Path, tmp_path: Path
) -> None:
    """They are saved, load in plain PEFT with the same logits, and are merged."""
    asked = small(family, written, tmp_path / "out", **TOWERS, **keys)
    result = train(asked, console=QUIET)
    assert result.adapter_check is not None
    assert result.adapter_check["exact"]
    saved = weights(tmp_path / "out")
    assert any(is_of_tower(n) and "lora_B" in n and bool(t.any()) for n, t in saved.items())
    rows = Rows.of(asked)
    plain = PeftModel.from_pretrained(plain_model(family), str(tmp_path / "out")).eval()
    ours, _ = load_run(tmp_path / "out")
    batch = rows.batch(plain, [[s] for s in rows.samples[:3]], packing=False)
    expected = plain(**batch).logits
    assert torch.equal(ours(**batch).logits, expected)
    merge(open_run(tmp_path / "out"), MergeOptions(output=tmp_path / "merged"), QUIET)
    merged = plain_model(family, tmp_path / "merged").eval()
    torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    assert any(map(is_of_tower, changed(family, tmp_path / "merged")))


def test_whole_towers(written: Path, tmp_path: Path) -> None:
    """Full training; parameters by name; and modules that an adapter saves whole."""
    full = small("llava", written, tmp_path / "full", **FULL)
    train(full, console=QUIET)
    assert changed("llava", tmp_path / "full")
    assert not any(map(is_of_tower, changed("llava", tmp_path / "full")))
    train({**full, **TOWERS, "output_dir": str(tmp_path / "towers")}, console=QUIET)
    assert any("vision_tower" in n for n in changed("llava", tmp_path / "towers"))
    projector = {"unfrozen_parameters": [r".*multi_modal_projector"]}
    train({**full, **TOWERS, **projector, "output_dir": str(tmp_path / "part")}, console=QUIET)
    assert changed("llava", tmp_path / "part")
    assert all("multi_modal_projector" in n for n in changed("llava", tmp_path / "part"))
    with pytest.raises(RecipeError, match="unfrozen_parameters"):
        train({**full, **projector, "output_dir": str(tmp_path / "none")}, console=QUIET)


def test_saved_modules_of_a_projector(written: Path, tmp_path: Path) -> None:
    asked = small(
        "llava", written, tmp_path / "out", **TOWERS, lora_modules_to_save=["multi_modal_projector"]
    )
    result = train(asked, console=QUIET)
    assert result.adapter_check is not None
    assert result.adapter_check["exact"]
    assert any("multi_modal_projector" in n and "lora" not in n for n in weights(tmp_path / "out"))
    rows = Rows.of(asked)
    ours, _ = load_run(tmp_path / "out")
    batch = rows.batch(ours, [[s] for s in rows.samples[:2]], packing=False)
    merge(open_run(tmp_path / "out"), MergeOptions(output=tmp_path / "merged"), QUIET)
    merged = plain_model("llava", tmp_path / "merged").eval()
    torch.testing.assert_close(merged(**batch).logits, ours(**batch).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "keys",
    [
        {"gradient_checkpointing": True},
        pytest.param(
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"optimize": True, "codegen": "eager", "memory": "min"}, marks=pytest.mark.long
        ),
    ],
    ids=["checkpointing", "reentrant", "memory"],
)
def test_what_is_recomputed_is_the_same(
    keys: dict[str, Any], written: Path, tmp_path: Path
) -> None:
    asked = small("qwen2_5_vl", written, tmp_path / "plain", **TOWERS)
    plain = train(asked, console=QUIET)
    other = train({**asked, **keys, "output_dir": str(tmp_path / "other")}, console=QUIET)
    losses, others = ([e["loss"] for e in r.history if "loss" in e] for r in (plain, other))
    assert others == pytest.approx(losses, rel=1e-5)
    assert any(is_of_tower(n) for n in weights(tmp_path / "other"))


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.slow), "llava"]
)
def test_bf16(family: str, written: Path, tmp_path: Path) -> None:
    """Features are in fp32, and models have them in their own dtype."""
    keys = {**TOWERS, "bf16": True, "max_steps": 2, "optimize": family == "llava"}
    result = train(small(family, written, tmp_path / "out", **keys, codegen="eager"), console=QUIET)
    assert result.dtype == "bfloat16"
    assert result.adapter_check is not None
    assert result.adapter_check["exact"]


# --- resuming, loading, validation ---------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        TOWERS,
        pytest.param(PACKED, marks=pytest.mark.slow),
        pytest.param({**PACKED, **TOWERS, "audit": True}, marks=pytest.mark.long),
    ],
    ids=["towers", "packs", "packs and towers"],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    keys: dict[str, Any], written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = small(
        "qwen2_5_vl", written, tmp_path / "out", max_steps=6, lora_dropout=0.1, val_set_size=4,
        eval_steps=2, micro_batch_size=1, **keys,
    )  # fmt: skip
    whole = train(asked, console=QUIET, output_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        stop_at(patched, 3, "on_step_end")
        assert train(asked, console=QUIET).status == "interrupted"
    resumed = train(asked, console=QUIET, resume_from_checkpoint=True)
    assert (resumed.status, resumed.resumed_from) == ("finished", 3)
    assert_same(tmp_path / "whole", tmp_path / "out")
    assert curves(resumed) == curves(whole)
    assert resumed.val_loss_after == whole.val_loss_after
    path = evaluate(open_run(tmp_path / "out"), console=QUIET)
    found = json.loads(path.read_text(encoding="utf-8"))["results"]["validation"]["loss"]
    assert found == pytest.approx(whole.val_loss_after, rel=1e-4)


def test_workers_make_the_same_batches(written: Path, tmp_path: Path) -> None:
    asked = small("qwen2_5_vl", written, tmp_path / "none")
    none = train(asked, console=QUIET)
    keys = {"dataloader_num_workers": 2, "output_dir": str(tmp_path / "two")}
    two = train({**asked, **keys}, console=QUIET)
    assert curves(two) == curves(none)
    assert_same(tmp_path / "none", tmp_path / "two")


def test_workers_where_nobody_says_how_many(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would wait for images; a stream would have other batches."""
    keys = small("llava", written, tmp_path / "out")

    def workers(cores: int = 16, **more: Any) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        return _image_workers(Recipe.model_validate({**keys, **more}), World())

    assert workers() == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (workers(), workers(3), workers(1)) == (4, 2, 0)
    assert workers(dataloader_num_workers=0) == 0
    assert workers(dataloader_num_workers=7) == 7
    assert workers(streaming=True) == 0


def test_a_workers_error_is_one_line() -> None:
    def refuse(rows: list[int]) -> None:
        raise DataError(f"rows.jsonl, line {rows[0]}: a.png: has changed")

    loader = torch.utils.data.DataLoader([7], collate_fn=refuse, num_workers=1)  # type: ignore[arg-type]  # 2026-12-01: a list is a dataset
    with pytest.raises(DataError) as caught, errors_as_raised():
        next(iter(loader))
    assert str(caught.value) == "rows.jsonl, line 7: a.png: has changed"


def test_a_stream_has_images(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = batches_of(monkeypatch)
    keys = {"streaming": True, "shuffle_merged_datasets": False}
    train(small("llava", written, tmp_path / "out", **keys), console=QUIET)
    assert sum("pixel_values" in batch for batch in batches) == len(batches)
    token = plain_model("llava").config.image_token_id
    for batch in batches:  # 16 features for each
        images = len(batch["pixel_values"])
        assert int((batch["input_ids"] == token).sum()) == 16 * images


@pytest.mark.parametrize("key", ["context_parallel_size", "tensor_parallel_size"])
def test_what_processes_cannot_share(key: str, written: Path, tmp_path: Path) -> None:
    asked = Rows.of(small("llava", written, tmp_path / "out")).recipe
    _require_whole(asked.strategy())
    with pytest.raises(RecipeError, match=f"{key}: not with images") as caught:
        _require_whole(asked.model_copy(update={key: 2}).strategy())
    assert "\n" not in str(caught.value)
