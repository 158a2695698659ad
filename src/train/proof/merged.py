"""Whether the model that ``fusewright merge`` makes is the adapter on its base.

Merging adds the update to the weights and rounds the sum, so its logits are others by about what
rounding each weight once does. That is measured: the merged model's weights are all changed by one
unit of rounding, up or down at random. A merged model passes if its logits are no further from the
adapter's than 1.5 times the change of that.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from ...compiler.pipeline import restore
from ...errors import FusewrightError, ModelError, first_line
from ...kernels.tolerance import FACTOR, unit
from ..checkpoint import save_model
from ..data import Sample
from ..data.images.features import Featurizer
from ..inference.load_run import load_model_of, with_adapter
from ..inference.run_folder import RunFolder, open_run
from ..inference.run_recipe import recipe_for
from ..merge import MergeOptions, merge
from ..model.load import load_config, load_model
from ..recipe.recipe import Recipe

_TOKENS = 256
"""Up to this number of tokens are compared: all of their logits are kept."""
_ADAPTER, _MERGED = "adapter", "merged"


@dataclass(frozen=True)
class Merged:
    """The comparison of a merged model.

    Attributes:
        dtype: of the merged weights.
        tokens: that were compared.
        loss_trained: of the adapter on the base that it was trained on, which may be quantized.
        loss_adapter: of the adapter on the base that it is merged into.
        loss_merged: of the merged model.
        off: of the merged model's logits from the adapter's, relative to their size.
        allowed: how far they may be.
        merge_seconds: of merging and comparing.
    """

    dtype: str
    tokens: int
    loss_trained: float
    loss_adapter: float
    loss_merged: float
    off: float
    allowed: float
    merge_seconds: float

    @property
    def passed(self) -> bool:
        """Whether the merged model is the adapter on its base, but for rounding."""
        return self.off <= self.allowed


def keep_adapter(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    folder: Path,
    featurizer: Featurizer | None = None,
) -> float:
    """Save the trained adapter into ``folder``, for ``compare_merged``; returns its loss.

    The model has done its work: it is left plain and in evaluation mode.
    """
    save_model.save(restore(model), tokenizer, folder / _ADAPTER)
    _, loss = _scores(model.eval(), samples, featurizer)
    return loss


def compare_merged(
    recipe: Recipe,
    samples: Sequence[Sample],
    loss_trained: float,
    folder: Path,
    featurizer: Featurizer | None = None,
) -> dict[str, Any]:
    """Merge the adapter in ``folder``, and compare.

    Returns the figures of ``Merged``; or ``skipped``, why it cannot be merged here; or ``failed``,
    why it should have been. ``recipe`` is that of the way which trained the adapter.
    """
    try:
        return asdict(_compare(recipe, samples, loss_trained, folder, featurizer))
    except (FusewrightError, MemoryError) as error:
        return {"skipped": str(error) or "there was not enough memory"}
    except Exception as error:  # to be said in the table: merging should not end like that
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        shutil.rmtree(folder / _MERGED, ignore_errors=True)  # as large as the base


def _compare(
    recipe: Recipe,
    samples: Sequence[Sample],
    loss_trained: float,
    folder: Path,
    featurizer: Featurizer | None,
) -> Merged:
    start = time.monotonic()
    keys = recipe.model_dump(mode="json")
    adapter = folder / _ADAPTER
    run = RunFolder(adapter, True, recipe.base_model, adapter, keys, {}, recipe.consent)
    if getattr(load_config(recipe), "quantization_config", None) is not None:
        raise ModelError(
            "the base's files are quantized: merging rounds into their format, which export judges"
        )
    adapted, loss_adapter = _scores(_on_full_base(run), samples, featurizer)
    merge(run, MergeOptions(folder / _MERGED), Console(quiet=True))
    model = load_model_of(open_run(folder / _MERGED, consent=recipe.consent))
    merged, loss_merged = _scores(model, samples, featurizer)
    _change_by_one_unit(model)
    changed, _ = _scores(model, samples, featurizer)
    size = float(adapted.norm()) or 1.0
    return Merged(
        str(model.dtype).removeprefix("torch."), len(adapted), loss_trained, loss_adapter,
        loss_merged, float((merged - adapted).norm()) / size,
        FACTOR * float((changed - merged).norm()) / size, time.monotonic() - start,
    )  # fmt: skip


def _on_full_base(run: RunFolder) -> Any:
    """The adapter on the weights that it is merged into: not quantized ones."""
    recipe = recipe_for(run).model_copy(update={"load_in_4bit": False, "load_in_8bit": False})
    model = with_adapter(load_model(recipe), run.folder, recipe.peft_autocast_adapter_dtype)
    return model.eval()


@torch.no_grad()
def _scores(
    model: Any, samples: Sequence[Sample], featurizer: Featurizer | None
) -> tuple[Tensor, float]:
    """The logits of the first tokens, (T, V) in fp32 on the CPU; and their loss per token."""
    rows, total, trained, left = [], 0.0, 0, _TOKENS
    device = next(model.parameters()).device
    for sample in samples:
        end = None if sample.extra else left  # which may not part an image from its placeholders
        ids, labels = (torch.tensor(t[:end]) for t in (sample.input_ids, sample.labels))
        batch = {"input_ids": ids[None]}
        if featurizer is not None:
            batch |= featurizer.features([[sample]], batch)
        there = {name: value.to(device) for name, value in batch.items()}
        logits = model(**there, use_cache=False).logits[0].float().cpu()
        total += float(F.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
        trained += int((labels[1:] >= 0).sum())
        rows.append(logits)
        left -= len(ids)
        if left <= 1:
            break
    return torch.cat(rows), total / max(1, trained)


@torch.no_grad()
def _change_by_one_unit(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1 and p.is_floating_point():
            up = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8).to(p.device)
            p.mul_(1 + unit(p.dtype) * (2 * up - 1).to(p.dtype))
