"""False alarms: the audit of every registered causal language model, tiny and healthy.

    python -m tests.auditing.zoo [--kinds plain lora ...] [--rows FILE] [--part 1/4] [NAME ...]

adds a line of JSON to ``--rows`` for each model that is not in it yet, and prints a table: a model
that nobody has patched must pass every question that can be asked.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fusewright
from fusewright.auditing.audit import audit

from ..models import architectures
from ..models.quantized import quantize

Row = dict[str, Any]


def _lora(model: Any, **more: Any) -> Any:
    config = LoraConfig(r=4, target_modules=architectures.linears(model), **more)
    return get_peft_model(model, config)


def _experts(model: Any) -> Any:
    stacked = sorted({
        ".".join(name.split(".")[-3:])
        for name, p in model.named_parameters()
        if p.ndim == 3 and ".experts." in name
    })  # fmt: skip
    if not stacked:
        raise architectures.CannotBuild("no stacked experts")
    return _lora(model, target_parameters=stacked)


def _quantized(model: Any) -> Any:
    quantize(model)
    for p in model.parameters():
        p.requires_grad_(False)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


KINDS: dict[str, Callable[[Any], nn.Module]] = {
    "plain": lambda model: model,
    "bf16": lambda model: model.to(torch.bfloat16),
    "lora": _lora,
    "experts": _experts,
    "qlora": _quantized,
    "optimized": lambda model: fusewright.optimize(model, codegen="eager"),
}
"""What is made of a tiny model, by the kind's name."""


def measure(name: str, kind: str) -> Row:
    """Audit one model."""
    row: Row = {"name": name, "kind": kind, "not_built": "", "fails": [], "skipped": {}}
    begun = time.perf_counter()
    torch._dynamo.reset()
    try:
        plain = architectures.build(name)
        inputs = _rows_of_a_chat(architectures.step_inputs(plain), plain.config)
        inputs.pop("use_cache", None)
        plain.config.use_cache = False
        model: Any = KINDS[kind](plain)
        if kind == "bf16":
            inputs = {k: _half(v) for k, v in inputs.items()}
        if kind != "optimized":  # some take no padding, no adapters, or no 4 bits
            model(**inputs).loss.backward()
            model.zero_grad()
    except Exception as error:
        row["not_built"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return row
    try:
        found = audit(model, inputs)
    except Exception as error:  # the sweep goes on: this is a result, too
        row["fails"] = [("error", f"{type(error).__name__}: {error}"[:300], [])]
        return row
    row["fails"] = [(f.check, f.reason, f.subjects[:3]) for f in found.failed]
    row["skipped"] = {f.check: f.reason for f in found.findings if f.verdict == "skipped"}
    row["passed"] = [f.check for f in found.findings if f.verdict == "pass"]
    row["seconds"] = round(time.perf_counter() - begun, 2)
    return row


def _half(value: Any) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(torch.bfloat16) if is_float else value


def _rows_of_a_chat(inputs: dict[str, Any], config: Any) -> dict[str, Any]:
    """Mask a prompt, end the answers, and pad all rows but the first, where that is possible."""
    ids, labels = inputs["input_ids"].clone(), inputs["labels"].clone()
    if labels.shape != ids.shape:
        return inputs
    mask = torch.ones_like(ids)
    mask[1:, -5:] = 0
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int):
        ids[0, -1] = labels[0, -1] = end
        ids[1:, -6] = labels[1:, -6] = end
    labels[:, :6] = -100
    labels[mask == 0] = -100
    return {**inputs, "input_ids": ids, "labels": labels, "attention_mask": mask}


def table(rows: Iterable[Row]) -> str:
    """How many of each kind passed, and every alarm."""
    built: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    skipped: dict[str, Counter[str]] = {}
    asked: dict[str, Counter[str]] = {}
    alarms, missing = [], []
    for row in rows:
        kind = row["kind"]
        if row["not_built"]:
            missing.append(f"- `{row['name']}` ({kind}): {row['not_built']}")
            continue
        built[kind] += 1
        passed[kind] += not row["fails"]
        skipped.setdefault(kind, Counter()).update(row["skipped"].keys())
        asked.setdefault(kind, Counter()).update(row.get("passed", ()))
        alarms += [f"- `{row['name']}` ({kind}) {check}: {why}" for check, why, _ in row["fails"]]
    lines = ["| kind | audited | without an alarm | questions passed | skipped |",
             "|---|---|---|---|---|"]  # fmt: skip
    for kind, number in built.items():
        skips = ", ".join(f"{check} {n}" for check, n in skipped[kind].most_common())
        lines.append(
            f"| {kind} | {number} | {passed[kind]} | {sum(asked[kind].values())} | {skips} |"
        )
    parts = ["\n".join(lines)]
    for title, listed in (("Alarms", alarms), ("Not built", missing)):
        if listed:
            parts.append(f"## {title}\n\n" + "\n".join(listed))
    return "\n\n".join(parts)


def main() -> None:
    """Audit what is asked for."""
    os.environ.setdefault("FUSEWRIGHT_SMALL", "optimize")  # else tiny blocks keep their own code
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--rows", type=Path, default=Path("audit-rows.jsonl"))
    parser.add_argument("--part", default="1/1", help="2/4: the second quarter of the names")
    parser.add_argument("names", nargs="*", default=[])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    part, parts = map(int, options.part.split("/"))
    names = (options.names or architectures.names())[part - 1 :: parts]
    lines = options.rows.read_text().splitlines() if options.rows.exists() else []
    known = {(row["name"], row["kind"]): row for row in map(json.loads, lines)}
    for name in names:
        for kind in options.kinds:
            if (name, kind) not in known:
                known[name, kind] = row = measure(name, kind)
                with options.rows.open("a") as file:
                    print(json.dumps(row), file=file)
                said = row["not_built"] or [check for check, *_ in row["fails"]] or "pass"
                print(name, kind, said, row.get("seconds", ""), flush=True)
    print(table(row for key, row in known.items() if key[0] in names and key[1] in options.kinds))


if __name__ == "__main__":
    main()
