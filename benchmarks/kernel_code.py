"""The machine code of every Triton kernel as it is launched, for cards that need not be there.

    python benchmarks/kernel_code.py [--write docs/kernels.md] [--only OP,...] [--cards sm_90,...]

Each op runs forward and backward on fake tensors of the sizes of Llama, Qwen3 and Gemma layers; the
launches that it makes are compiled as the JIT would compile them (with the same divisibility, unit
strides and constants) and their machine code is read. The exit status is 1 if one of them keeps
registers in memory or wants more shared memory than the card has.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from launches import Launch, launches_of
from machine_code import CARDS, Card, Code, compiled, read
from op_cases import CASES, Maker
from shapes import MODELS, OpShape

SIZES = ("llama-1b", "llama-8b", "qwen3-8b", "gemma-2-9b", "gpt2-vocabulary")
"""Of layers and heads; the last has an odd number of classes."""

FEW = OpShape(1, 8, MODELS["llama-8b"])
"""As few tokens as dequantization is inside the product for."""

MARK = "<!-- {} -->"


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched for some sizes.

    Attributes:
        launch: the first such launch.
        ops: which ops make it.
        sizes: at which sizes.
        code: by card.
    """

    launch: Launch
    ops: tuple[str, ...]
    sizes: tuple[str, ...]
    code: dict[str, Code]

    @property
    def name(self) -> str:
        """Of the kernel, with its direction where it has two."""
        return self.launch.full_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the tables, and say what is wrong."""
    options = _parse(arguments)
    began = time.time()
    cards = [c for c in CARDS if not options.cards or c.name in options.cards]
    found = variants(cards, options.only)
    text = "\n".join(tables(found, cards))
    print(text)
    if options.write:
        put(options.write, "kernels", f"{_made_by()}\n\n{text}")
    wrong = list(problems(found, cards))
    for line in wrong:
        print(line, file=sys.stderr)
    print(
        f"{len(found)} variants for {len(cards)} cards in {time.time() - began:.0f} s",
        file=sys.stderr,
    )
    return 1 if wrong else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, help="put the tables into this file")
    parser.add_argument("--only", type=lambda t: t.split(","), default=[], help="ops")
    parser.add_argument("--cards", type=lambda t: t.split(","), default=[])
    return parser.parse_args(arguments)


def variants(cards: Sequence[Card], only: Sequence[str] = ()) -> list[Variant]:
    """Every launch; those that run the same code on each card are one."""
    made: dict[tuple[str, ...], Variant] = {}
    for op, size, makers in _cases(only):
        for maker in makers:
            each = zip(*(launches_of(op, maker, card.gpu) for card in cards), strict=True)
            for launches in each:
                pairs = zip(launches, cards, strict=True)
                code = {card.name: _code(launch, card) for launch, card in pairs}
                key = tuple(c.key for c in code.values())
                known = made.get(key) or Variant(launches[0], (), (), code)
                made[key] = replace(
                    known,
                    ops=tuple(dict.fromkeys((*known.ops, op))),
                    sizes=tuple(dict.fromkeys((*known.sizes, size))),
                )
    return sorted(made.values(), key=lambda v: (v.name, v.sizes))


_READ: dict[str, Code] = {}


def _code(launch: Launch, card: Card) -> Code:
    made = compiled(launch, card)
    if made.hash not in _READ:
        _READ[made.hash] = read(made, card)
    return _READ[made.hash]


def _cases(only: Sequence[str]) -> Iterator[tuple[str, str, list[Maker]]]:
    """(op, size, what makes its calls): frozen weights with adapters in fp32, and trained ones."""
    for size in (*SIZES, "few tokens"):
        shape = FEW if size == "few tokens" else OpShape(1, 2048, MODELS[size])
        for op in only or CASES:
            if op in _NO_KERNELS or (size == "few tokens" and "quant" not in op):
                continue
            yield (
                op,
                size,
                [
                    Maker(shape, torch.bfloat16, "cpu", trained, adapters)
                    for trained, adapters in ((False, torch.float32), (True, torch.bfloat16))
                ],
            )


_NO_KERNELS = (
    "attention",  # on a GPU only where there is a mask
    "decode_attention",
    "dora",
    "dora_row_norms",
    "moe_experts",
    "segment_attention",
)
"""Of PyTorch's own operators, or made of two others."""


def problems(found: Iterable[Variant], cards: Sequence[Card]) -> Iterator[str]:
    """What must not be, a line each."""
    for v in found:
        for card in cards:
            code = v.code[card.name]
            where = f"{v.name} ({', '.join(v.sizes)}) on {card.name}"
            if code.spills:
                yield f"{where}: {code.spills} instructions move registers to or from memory"
            if code.shared > card.shared:
                yield f"{where}: {code.shared} bytes of shared memory, of {card.shared}"


def tables(found: Sequence[Variant], cards: Sequence[Card]) -> Iterator[str]:
    """Markdown: one line for each variant, with what each card makes of it."""
    names = [card.name for card in cards]
    yield f"| kernel | sizes | warps | {' | '.join(names)} |"
    yield "|" + "---|" * (3 + len(cards))
    for v in found:
        warps = next(iter(v.code.values())).warps
        cells = (_cell(v.code[name]) for name in names)
        yield f"| `{v.name}` | {', '.join(v.sizes)} | {warps} | {' | '.join(cells)} |"


def _made_by() -> str:
    return f"Triton {triton.__version__}, {time.strftime('%Y-%m-%d')}."


def _cell(code: Code) -> str:
    """Registers, spills if there are any, shared memory, occupancy, widths, tensor cores."""
    parts = [f"{code.registers}"]
    if code.spills:
        parts.append(f"**{code.spills} spills**")
    if code.shared >= 1024:
        parts.append(f"{code.shared / 1024:.0f} KB")
    parts.append(f"{code.occupancy:.0%}")
    parts.append("/".join(str(width) for width, _ in code.widths))
    if code.tensor_cores:
        parts.append(f"{code.tensor_cores} MMA")
    return ", ".join(parts)


def put(file: Path, name: str, text: str) -> None:
    """Put a text between the marks of that name in a page."""
    begin, end = (MARK.format(f"{name}:{which}") for which in ("start", "end"))
    page = file.read_text(encoding="utf-8")
    page = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)
    file.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
