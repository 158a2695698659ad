"""Commands on trained models, and small models with adapters that have learnt something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner, Result

from fusewright.cli.main import app

from .conftest import make_model, make_tokenizer


def make_adapter(folder: Path, model: Any = None, dtype: Any = None, **settings: Any) -> Path:
    """Save a base and an adapter with random weights for it, as plain PEFT does; its folder."""
    base = folder / "base"
    model = model if model is not None else make_model()
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(base, max_shard_size="40KB")
    make_tokenizer().save_pretrained(base)
    model.config._name_or_path = model.name_or_path = str(base)
    chosen = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(model, LoraConfig(**chosen))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "adapter")
    return folder / "adapter"


def fusewright(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)


def refused(*arguments: str | Path) -> str:
    """The one line that a command says that must not work."""
    result = fusewright(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("fusewright: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    return result.stderr.removeprefix("fusewright: ").strip()
