"""What a run leaves behind, and the check that it can be used."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError

_RESULTS = (
    "run.json", "loss.png", "report.html", "adapter_model.safetensors", "adapter_config.json",
    "model.safetensors", "model.safetensors.index.json", "README.md",
)  # fmt: skip


_PROBE = 64
"""Tokens that the saved adapter is tried on."""


def _results(folder: Path) -> Iterator[Path]:
    """The files and folders of an earlier run."""
    yield from (folder / name for name in _RESULTS if (folder / name).exists())
    yield from sorted(folder.glob("checkpoint-*"))
    yield from sorted(folder.glob("model-*-of-*.safetensors"))


def check_output(folder: Path, overwrite: bool) -> None:
    """See that results may go into ``folder``; changes nothing.

    Raises:
        RecipeError: it is a file, or holds a run that is not to be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"output_dir: {folder} is not a folder")
    _require_writable(folder)
    found = next(_results(folder), None)
    if found is not None and not overwrite:
        raise RecipeError(
            f"output_dir: {folder} already holds a run ({found.name}); choose another folder, or "
            "say --overwrite (overwrite_output_dir: true)"
        )


def _require_writable(folder: Path) -> None:
    """Try to make ``folder`` and a file in it; what was made is removed again."""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise RecipeError(f"output_dir: {folder} cannot be written to: {reason}") from None
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def clear_output(folder: Path) -> None:
    """Make ``folder``, and remove the results of an earlier run from it (nothing else)."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in list(_results(folder)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the adapter (or the whole model, if it has none) and the tokenizer."""
    if hasattr(model, "peft_config"):
        # "auto" would ask the hub whether the vocabulary grew
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class AdapterCheck:
    """How the saved adapter compares, on plain PEFT over the plain base model.

    Attributes:
        exact: its logits equal those of the trained adapter there, bit for bit.
        optimized_difference: largest difference from the optimized model's logits, over their
            largest size; what rounding in another order makes.
    """

    exact: bool
    optimized_difference: float


@torch.no_grad()
def check_adapter(
    model: Any, optimized: bool, folder: Path, batch: dict[str, Tensor]
) -> tuple[Any, AdapterCheck]:
    """Load the saved adapter as anybody would, and compare.

    Args:
        model: the trained PEFT model; restored, and stripped of its adapters.
        optimized: whether it is optimized.
        folder: where the adapter is.
        batch: a batch; its labels are not used.

    Returns:
        The plain base model with the adapter from ``folder``, and the comparison.
    """
    from peft import PeftModel

    inputs = {k: v[:, :_PROBE].to(model.device) for k, v in batch.items() if k != "labels"}
    model.eval()
    before = trained = model(**inputs).logits
    if optimized:
        from ..pipeline import restore

        restore(model)
        trained = model(**inputs).logits
    plain = PeftModel.from_pretrained(model.unload(), folder).eval()
    saved = plain(**inputs).logits
    difference = (before.float() - saved.float()).abs().max() / saved.float().abs().max()
    return plain, AdapterCheck(torch.equal(trained, saved), float(difference))


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str, max_tokens: int) -> str:
    """Let the model answer a question, greedily; its mode is kept."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    ).to(model.device)  # fmt: skip
    training = model.training
    model.eval()
    try:
        out = model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, use_cache=True,
            pad_token_id=pad_token(tokenizer),
        )  # fmt: skip
    finally:
        model.train(training)
    text: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def pad_token(tokenizer: Any) -> int:
    """The id that fills up batches: the tokenizer's, or one that surely exists."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def plot(history: Sequence[dict[str, float]], path: Path) -> None:
    """Draw training and validation loss over the steps as a PNG.

    Args:
        history: entries with ``step`` and ``loss`` or ``eval_loss``.
        path: the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, style, name in (("loss", "-", "training"), ("eval_loss", "o--", "validation")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per trained token")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.savefig(path)
