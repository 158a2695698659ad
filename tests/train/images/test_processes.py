"""Two processes, one of which has no image in its batches, train what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from fusewright.train import train

from ..processes.ranks import values
from ..processes.runs import train_rank
from ..results import difference, weights
from .training import small, write_rows

QUIET = Console(quiet=True)
STRATEGIES: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp": {"fsdp": ["full_shard", "auto_wrap"]}}
FULL = {"adapter": None, "lora_target_linear": False}
Curve = list[tuple[float, float]]


def curve_of(history: list[dict[str, Any]]) -> Curve:
    return [(e["loss"], e["grad_norm"]) for e in history if "loss" in e]


def asked(rows: Path, output: Path, family: str = "qwen2_5_vl", **keys: Any) -> dict[str, Any]:
    """Rows in the order of the file, of which each process has every other one."""
    common = {
        "micro_batch_size": 1, "optimizer": "sgd", "learning_rate": 0.1,
        "lr_scheduler": "constant", "curriculum_sampling": True,
        "dataset_prepared_path": str(rows.parent / "prepared"),
    }  # fmt: skip
    return small(family, rows, output, **{**common, **keys})


@pytest.fixture(scope="module")
def alternating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 0 has all images."""
    return write_rows(tmp_path_factory.mktemp("rows"), 8, "1t2t")


def both(rows: Path, folder: Path, family: str, **keys: Any) -> tuple[Curve, Curve]:
    """The curves of two processes and of one, whose weights are compared."""
    histories = values(train_rank, asked(rows, folder / "two", family, **keys), limit=120.0)
    two = [curve_of(history) for history in histories]
    for key in ("fsdp",):
        keys.pop(key, None)
    alone = asked(rows, folder / "one", family, gradient_accumulation_steps=2, **keys)
    one = curve_of(train(alone, console=QUIET).history)
    assert two[0] == two[1]
    first: dict[str, Tensor] = weights(folder / "one")
    assert difference(weights(folder / "two"), first) < 2e-6
    return two[0], one


@pytest.mark.parametrize(
    ("strategy", "keys"),
    [
        pytest.param("ddp", {}, marks=pytest.mark.long),
        pytest.param("ddp", {"freeze_mm_modules": False}, marks=pytest.mark.slow),
        ("ddp", {"freeze_mm_modules": False, "gradient_checkpointing": True}),
        ("fsdp", {}),
        pytest.param("fsdp", {"freeze_mm_modules": False}, marks=pytest.mark.long),
        pytest.param("fsdp", {"freeze_mm_modules": False, **FULL}, marks=pytest.mark.slow),
        pytest.param("ddp", {"freeze_mm_modules": False, **FULL}, marks=pytest.mark.slow),
        pytest.param(
            "ddp", {"freeze_mm_modules": False, "optimize": True, "codegen": "eager"},
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_one_has_no_image(
    strategy: str, keys: dict[str, Any], alternating: Path, tmp_path: Path
) -> None:
    two, one = both(alternating, tmp_path, "qwen2_5_vl", **STRATEGIES[strategy], **keys)
    assert len(two) == 4
    assert two == [pytest.approx(step, rel=1e-4) for step in one]


@pytest.mark.slow
def test_a_step_without_images_moves_no_tower(tmp_path: Path) -> None:
    """Not by decay and momentum, either: in one process it has no gradients."""
    rows = write_rows(tmp_path, 8, "1ttt")
    keys = {"freeze_mm_modules": False, "optimizer": "adamw_torch", "weight_decay": 0.5,
            "adam_epsilon": 1e-2}  # fmt: skip
    two, one = both(rows, tmp_path, "qwen2_5_vl", **keys)
    assert two == [pytest.approx(step, rel=1e-4) for step in one]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_others(family: str, alternating: Path, tmp_path: Path) -> None:
    keys = {"freeze_mm_modules": False, **STRATEGIES["fsdp"]}
    two, one = both(alternating, tmp_path, family, **keys)
    assert two == [pytest.approx(step, rel=1e-4) for step in one]


@pytest.mark.long
def test_a_filler_has_no_placeholders(tmp_path: Path) -> None:
    """Of an odd number of rows; chats of LLaVA begin with an image."""
    rows = write_rows(tmp_path, 3, "1")
    keys = {"freeze_mm_modules": False, "max_steps": 2}
    two, one = both(rows, tmp_path, "llava", **keys)
    assert two == [pytest.approx(step, rel=1e-4) for step in one]
