"""Training in float16 with scaled losses, as on a T4: steps, skipped ones, checkpoints.

accelerate scales losses on GPUs alone; here it does on the CPU, with PyTorch's scaler for CPUs.
"""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file

from fusewright import optimize
from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.checkpoint.files import checkpoints
from fusewright.train.model import precision
from fusewright.train.trainer.watchdog import NonFiniteGuard, NonFiniteStepError

from ..conftest import make_model, make_tokenizer

Scale = Callable[..., None]
QUIET = Console(quiet=True)
_STEPS = 10


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Scale:
    """Let this CPU train in float16 with PyTorch's scaler for CPUs; takes the scaler's arguments.

    All else is accelerate's and Trainer's: autocast, scaling, clipping, steps that are skipped.
    """
    arguments: dict[str, Any] = {}
    plain = accelerate.Accelerator.__init__

    def with_scaler(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self.state.mixed_precision == "fp16":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", **arguments)

    monkeypatch.setattr(accelerate.Accelerator, "__init__", with_scaler)
    monkeypatch.setattr(precision, "scales_losses", lambda: True)
    return arguments.update


class _Recorder(transformers.Trainer):
    """Trainer's own loop, with what each step had before its update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scales: list[float] = []
        self.norms: list[float] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.batches: list[torch.Tensor] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.batches.append(inputs["input_ids"])
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm)
        self.scales.append(self.accelerator.scaler.get_scale())
        self.norms.append(float(norm))
        trained = {k: p for k, p in model.named_parameters() if p.grad is not None}
        clipped = max(float(norm), 1.0)
        self.gradients.append({k: p.grad * clipped for k, p in trained.items()})
        self.weights.append({k: p.detach().clone() for k, p in trained.items()})
        return norm


def _model(adapters: bool) -> Any:
    """In float16 with adapters in float32, or in float32."""
    model: Any = make_model()
    if adapters:
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model.half(), lora)
    return model


def _error(trainer: _Recorder, adapters: bool, steps: Sequence[int]) -> float:
    """How far the gradients of some steps are from those in float64 at the same weights."""
    model, error, size = _model(adapters).double(), 0.0, 0.0
    for step in steps:
        model.load_state_dict(trainer.weights[step], strict=False)
        model.zero_grad()
        for ids in trainer.batches[2 * step : 2 * step + 2]:
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        for name, gradient in trainer.gradients[step].items():
            exact = model.get_parameter(name).grad
            error += float((gradient - exact).norm() ** 2)
            size += float(exact.norm() ** 2)
    return math.sqrt(error / size)


def _run(folder: Path, adapters: bool, optimized: bool) -> tuple[_Recorder, list[float]]:
    """Ten steps of two batches each under autocast to float16."""
    model = _model(adapters)
    if optimized:
        optimize(model, codegen="eager")
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 262, (_STEPS * 4, 24), generator=draw)
    arguments = transformers.TrainingArguments(
        str(folder), fp16=True, use_cpu=True, max_steps=_STEPS, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=1e-3, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, optim="adamw_torch",
    )  # fmt: skip
    rows: Any = [{"input_ids": row, "labels": row} for row in ids]
    trainer = _Recorder(model, arguments, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer, [e["loss"] for e in trainer.state.log_history if "loss" in e]


@pytest.mark.long("False")
@pytest.mark.parametrize("adapters", [True, False])
def test_ten_steps_are_those_of_trainer_without_rewrites(
    adapters: bool, scale: Scale, tmp_path: Path
) -> None:
    """The same steps are skipped at the same scales; gradients are as exact as eager's."""
    # by far too large at first, and again when it has grown: 2**20 is the first to overflow
    scale(init_scale=2.0**26, backoff_factor=2.0**-10, growth_factor=2.0**10, growth_interval=5)
    eager, losses = _run(tmp_path, adapters, optimized=False)
    ours, our_losses = _run(tmp_path, adapters, optimized=True)
    skipped = [not math.isfinite(norm) for norm in eager.norms]
    assert [i for i, is_skipped in enumerate(skipped) if is_skipped] == [0, 6]
    assert [not math.isfinite(norm) for norm in ours.norms] == skipped
    assert ours.scales == eager.scales
    rounding = torch.finfo(torch.float16).eps
    assert our_losses == pytest.approx(losses, rel=rounding)
    finite = [i for i in range(_STEPS) if not skipped[i]]
    own, error = (_error(trainer, adapters, finite) for trainer in (eager, ours))
    assert error <= 1.5 * own + rounding


def _half(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**recipe, "bf16": None, "fp16": True, "optimize": True, "codegen": "eager", **changes}


def _scaler_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "scaler.pt", weights_only=True)
    return found


@pytest.mark.long
def test_a_run_and_going_on(recipe: dict[str, Any], scale: Scale, tmp_path: Path) -> None:
    """A run that begins again at a checkpoint has the scaler, and all else, of one that went on."""
    scale(init_scale=2.0**26, backoff_factor=2.0**-10, growth_interval=4)
    long = _half(recipe, max_steps=8, save_steps=4, eval_steps=4)
    whole = train(long, console=QUIET, output_dir=str(tmp_path / "whole"))
    assert whole.status == "finished"
    assert whole.exit_code == 0  # plain PEFT gives the same logits
    assert whole.val_loss_after < whole.val_loss_before  # type: ignore[operator]
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["dtype"] == "float16"
    middle, end = checkpoints(tmp_path / "whole")
    assert _scaler_of(middle)["_growth_tracker"] > 0  # else it could be forgotten
    again = train(long, console=QUIET, resume_from_checkpoint=str(middle))
    assert again.resumed_from == 4
    assert _scaler_of(checkpoints(tmp_path / "out")[-1]) == _scaler_of(end)
    losses, resumed = ([e["loss"] for e in r.history if "loss" in e] for r in (whole, again))
    assert resumed == losses


@pytest.mark.usefixtures("scale")
def test_gradients_in_float16_are_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="would be trained in float16"):
        train(_half(recipe, peft_autocast_adapter_dtype=False), console=QUIET)


@pytest.mark.long
@pytest.mark.usefixtures("scale")
def test_a_whole_module_is_trained_in_float32(recipe: dict[str, Any], tmp_path: Path) -> None:
    saved = ["lm_head", "embed_tokens"]
    keys = {"sample_prompt": "What is 3?", "sample_max_tokens": 2, "optimize": False}
    result = train(_half(recipe, lora_modules_to_save=saved, **keys), console=QUIET)
    assert result.exit_code == 0  # plain PEFT gives the same logits
    assert set(result.sample or {}) == {"question", "before", "after"}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_a_model_beyond_float16_ends_the_run(
    recipe: dict[str, Any], scale: Scale, tmp_path: Path
) -> None:
    """Without an end, every step would be skipped and a run would train nothing."""
    scale(init_scale=2.0)
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e7).clamp_(-6e4, 6e4)
        model.model.layers[0].mlp.up_proj.weight.mul_(1e5)
    model.save_pretrained(tmp_path / "large")
    make_tokenizer().save_pretrained(tmp_path / "large")
    keys = {"sample_packing": False, "val_set_size": 0, "optimize": False}
    result = train(_half(recipe, base_model=str(tmp_path / "large"), **keys), console=QUIET)
    assert result.status == "nan"
    assert "step 3: the loss is" in str(result.reason)
    assert "leaves the range of float16" in str(result.reason)


def test_skipped_steps_are_forgotten() -> None:
    """What a step has read is not kept until the end of the run."""
    guard, scaler = NonFiniteGuard(), torch.amp.GradScaler("cpu", init_scale=0.5)
    batch = {"input_ids": torch.ones(1, dtype=torch.int64)}
    seen = weakref.ref(batch["input_ids"])
    guard.add(1, batch, torch.tensor(1.0))
    assert guard.judge_scaled(torch.tensor(torch.inf), scaler, logged=False) == torch.inf
    del batch
    gc.collect()
    assert seen() is None
    guard.add(2, {}, torch.tensor(1.0))
    assert guard.judge_scaled(torch.tensor(2.0), scaler, logged=True) == 2.0
    guard.add(3, {}, torch.tensor(1.0))
    scaler.scale(torch.ones(1))  # which makes the scale
    with pytest.raises(NonFiniteStepError, match=r"step 3: the gradient norm is inf.*scale of 0.5"):
        guard.judge_scaled(torch.tensor(torch.inf), scaler, logged=True)
