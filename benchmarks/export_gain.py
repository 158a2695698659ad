"""How much of an adapter's gain survives an export in few bits, with and without ``export_format``.

    python benchmarks/export_gain.py --formats int4-g32,nvfp4 --seeds 0,1,2 --steps 30 --json FILE

Trains the recipe's adapter on its rows, once for each seed without and once for each format with
``export_format``, and measures the mean loss on held-out rows of the base, of the adapter, and of
the model as the export writes it and it is read back: merged, each weight rounded bit for bit as by
the library that owns it. ``kept`` is (base - exported) / (base - adapter), ``kept of plain`` is
the same with the adapter that was trained without rounding below the line.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusewright.train.data.prepare import prepare
from fusewright.train.model import rounding
from fusewright.train.model.adapters import add_adapter
from fusewright.train.model.load import load_model, quiet
from fusewright.train.model.merge_aware import exported_layers, round_in_training, roundtrip
from fusewright.train.model.tokenizer import load_tokenizer, pad_token
from fusewright.train.recipe.export_formats import format_named
from fusewright.train.recipe.load import load_recipe
from fusewright.train.report.environment import machine, versions
from fusewright.train.trainer.batches import training_batch, training_sequences

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    args = _arguments()
    recipe = load_recipe(
        args.recipe,
        {"sequence_len": args.seq, "micro_batch_size": 1, "sample_packing": False,
         "optimize": False, "val_set_size": args.rows, "sample_prompt": None},
    )  # fmt: skip
    with quiet():
        tokenizer = load_tokenizer(recipe)
        prepared = prepare(recipe, tokenizer, None)
        base = load_model(recipe)
    batches = [training_batch([p], recipe, pad_token(tokenizer))
               for p in training_sequences(prepared, recipe)]  # fmt: skip
    held_out = [training_batch([[sample]], recipe, pad_token(tokenizer))
                for samples in prepared.validation.values() for sample in samples]  # fmt: skip
    rows: list[dict[str, Any]] = []
    facts = {
        "machine": machine(), "versions": versions(), "arguments": vars(args),
        "date": datetime.date.today().isoformat(), "base": loss_of(base, held_out),
    }  # fmt: skip
    formats = args.formats.split(",")
    for seed in map(int, args.seeds.split(",")):
        plain = None
        for trained_for in (None, *formats):
            model, ms = train(base, recipe, trained_for, seed, batches, args)
            loss = loss_of(unrounded(model), held_out)
            plain = loss if trained_for is None else plain
            for name in formats if trained_for is None else [trained_for]:
                result = loss_of(exported(model, recipe, name), held_out)
                gain = facts["base"] - result
                rows.append({
                    "seed": seed, "format": name, "export_format": trained_for or "",
                    "adapter": loss, "exported": result, "kept": gain / (facts["base"] - loss),
                    "kept of plain": gain / (facts["base"] - plain), "step ms": ms,
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
                if args.json:
                    Path(args.json).write_text(json.dumps({**facts, "rows": rows}, indent=1))
    for name in formats:  # what the format costs the base itself
        facts[f"base in {name}"] = loss_of(exported(base, recipe, name), held_out)
        print(name, facts[f"base in {name}"], flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({**facts, "rows": rows}, indent=1))


def train(
    base: Any, recipe: Any, format: str | None, seed: int, batches: list[Any], args: Any
) -> tuple[Any, float]:
    """An adapter on a copy of ``base``, and the median milliseconds of a step."""
    recipe = recipe.model_copy(update={"export_format": format, "seed": seed})
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    paths = exported_layers(model, recipe)
    model = add_adapter(model, recipe)
    round_in_training(model, recipe, paths, print)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed))
    times = []
    for step in range(args.steps):
        start = time.process_time()
        rate = min(1.0, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        for i in range(args.batch):
            row = batches[int(order[(step * args.batch + i) % len(order)])]
            (model(**_inputs(row)).loss / args.batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1e3 * (time.process_time() - start))  # of this process, whatever else runs
    return model, sorted(times)[len(times) // 2]


@torch.no_grad()
def loss_of(model: Any, batches: list[Any]) -> float:
    """The mean loss of the trained tokens of all batches."""
    model.eval()
    total = count = 0.0
    for batch in batches:
        trained = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**_inputs(batch)).loss) * trained
        count += trained
    return total / count


def unrounded(model: Any) -> Any:
    """The model with its adapter merged, as plain PEFT merges it."""
    merged = copy.deepcopy(model)
    for module in merged.modules():
        if hasattr(module, "rounding"):
            module.rounding.enabled = False
    return merged.merge_and_unload()


@torch.no_grad()
def exported(model: Any, recipe: Any, name: str) -> Any:
    """The merged model with each weight that the export rounds written, and read back."""
    merged = unrounded(model) if hasattr(model, "peft_config") else copy.deepcopy(model)
    format = format_named(name)
    layers = rounding.rounded_layers(merged, format)
    shapes = {path: tuple(layer.weight.shape) for path, layer in layers.items()}
    groups = rounding.sharing(shapes) if rounding.shares_scale(format) else {}
    largest = {p: max(layers[n].weight.abs().max() for n in names) for p, names in groups.items()}
    for path, layer in layers.items():
        weight = roundtrip(format, layer.weight, largest.get(path))
        layer.weight.copy_(weight)
    return merged


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if isinstance(value, Tensor)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=str(ROOT / "examples" / "quickstart.yaml"))
    parser.add_argument("--formats", default="int4-g32,nvfp4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=1, help="rows in a step")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16, help="held-out rows")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
