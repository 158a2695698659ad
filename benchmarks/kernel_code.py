"""The machine code of every Triton kernel as it is launched, for cards that need not be there.

    python benchmarks/kernel_code.py [--write docs/kernels.md] [--only OP,...] [--cards sm_90,...]
    python benchmarks/kernel_code.py --matrix [--only OP,...] [--cards sm_90,...]

Each op runs forward and backward on fake tensors of the sizes of Llama, Qwen3 and Gemma layers; the
launches that it makes are compiled as the JIT would compile them (with the same divisibility, unit
strides and constants) and their machine code is read. The exit status is 1 if one of them keeps
registers in memory, wants more shared memory than the card has, has less programs than the card has
multiprocessors, or multiplies less than 32 columns at once on an H100, and is not known to.

With ``--matrix``, heads of 64 to 256 features and rows of up to 16,384, in bf16, fp16 and fp32, for
NVIDIA's cards from the T4 on. What is refused by name is not launched. It takes hours.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from fusewright.kernels.attention.unsupported import no_kernel
from launches import Launch, launches_of
from machine_code import CARDS, Card, Code, compiled, read
from op_cases import CASES, Maker
from shapes import MODELS, ModelShape, OpShape

SIZES = ("llama-1b", "llama-8b", "qwen3-8b", "gemma-2-9b", "gpt2-vocabulary")
"""Of layers and heads; the last has an odd number of classes."""

MATRIX = {
    **{
        f"heads of {d}": ModelShape(1, 4096, 16, 4, 11008, 32000, d)
        for d in (64, 96, 128, 192, 256)
    },
    "rows of 5,120": ModelShape(1, 5120, 40, 8, 13824, 152064, 128),
    "rows of 16,384": ModelShape(1, 16384, 128, 8, 53248, 128256, 128),
}
"""Shapes of the whole matrix, and ``_MATRIX_CARDS`` of it."""

_MATRIX_CARDS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
_MATRIX_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

KNOWN = {
    "attention_backward.keys": "wider tiles spill registers",
    "attention_tiles.table": "reads a mask once for all layers",
    "linear_cross_entropy_matmul.matmul": "of the rows that nobody expects to count",
    "lora_linear.wide_product": "as many columns as an adapter has ranks",
    "rms_norm_linear.matmul": "of few features, as keys and values have",
    "quant_linear.few": "made for few tokens",
    "selective_scan.backward": "time is in order, and channels share B and C",
    "selective_scan.forward": "time is in order, and channels share B and C",
    "ssd.output": "chunks and states of the model's sizes",
    "ssd.scan": "chunks and states of the model's sizes",
    "ssd_backward.backward": "chunks and states of the model's sizes",
    "ssd_backward.shared": "chunks and states of the model's sizes",
}
"""Kernel -> why it has few programs at 2,048 tokens, or narrow products."""

_LARGE = 3584
"""Features of a model whose launches are to fill a card."""

FEW = OpShape(1, 8, MODELS["llama-8b"])
"""As few tokens as dequantization is inside the product for."""

PAGE = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
"""The cards of the page."""

MARK = "<!-- {} -->"


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched for some sizes.

    Attributes:
        launch: the first such launch.
        ops: which ops make it.
        sizes: at which sizes.
        code: by card that it is launched on.
        programs: by card, of the smallest launch for many tokens of a large model.
    """

    launch: Launch
    ops: tuple[str, ...]
    sizes: tuple[str, ...]
    code: dict[str, Code]
    programs: dict[str, int]

    @property
    def name(self) -> str:
        """Of the kernel, with its direction where it has two."""
        return self.launch.full_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the tables, and say what is wrong."""
    options = _parse(arguments)
    began = time.time()
    names = options.cards or (_MATRIX_CARDS if options.matrix else PAGE)
    cards = [c for c in CARDS if c.name in names]
    shapes, dtypes = (MATRIX, _MATRIX_DTYPES) if options.matrix else (None, (torch.bfloat16,))
    found = variants(cards, options.only, shapes, dtypes)
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
    parser.add_argument("--matrix", action="store_true", help="more shapes, dtypes and cards")
    return parser.parse_args(arguments)


def variants(
    cards: Sequence[Card],
    only: Sequence[str] = (),
    shapes: Mapping[str, ModelShape] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
) -> list[Variant]:
    """Every launch; those that run the same code on each card are one."""
    made: dict[tuple[tuple[str, str], ...], Variant] = {}
    for op, size, makers in _cases(only, shapes, dtypes):
        for maker in makers:
            for launches in _aligned(op, maker, cards):
                code = {card.name: _code(launch, card) for card, launch in launches.items()}
                programs = {}
                if maker.shape.model.hidden >= _LARGE and maker.shape.seq > FEW.seq:
                    programs = {c.name: math.prod(one.grid) for c, one in launches.items()}
                key = tuple((name, c.key) for name, c in code.items())
                first = next(iter(launches.values()))
                known = made.get(key) or Variant(first, (), (), code, programs)
                made[key] = replace(
                    known,
                    ops=tuple(dict.fromkeys((*known.ops, op))),
                    sizes=tuple(dict.fromkeys((*known.sizes, size))),
                    programs=known.programs
                    | {n: min(p, known.programs.get(n, p)) for n, p in programs.items()},
                )
    return sorted(made.values(), key=lambda v: (v.name, v.sizes))


def _aligned(op: str, maker: Maker, cards: Sequence[Card]) -> list[dict[Card, Launch]]:
    """The launches of an op, each by card: some make less of them."""
    found: dict[tuple[str, int], dict[Card, Launch]] = {}
    width = maker.shape.model.head_dim
    for card in cards:
        if op.startswith("attention") and no_kernel(width, maker.dtype, card.gpu):
            continue
        counts: Counter[str] = Counter()
        for launch in launches_of(op, maker, card.gpu):
            found.setdefault((launch.full_name, counts[launch.full_name]), {})[card] = launch
            counts[launch.full_name] += 1
    return list(found.values())


_READ: dict[str, Code] = {}


def _code(launch: Launch, card: Card) -> Code:
    made = compiled(launch, card)
    if made.hash not in _READ:
        _READ[made.hash] = read(made, card)
    return _READ[made.hash]


def _cases(
    only: Sequence[str],
    shapes: Mapping[str, ModelShape] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
) -> Iterator[tuple[str, str, list[Maker]]]:
    """(op, size, what makes its calls): frozen weights with adapters in fp32, and trained ones."""
    models = {name: MODELS[name] for name in SIZES} if shapes is None else shapes
    for size in (*models, "few tokens"):
        shape = FEW if size == "few tokens" else OpShape(1, 2048, models[size])
        for op in only or CASES:
            if op in _NO_KERNELS or (size == "few tokens" and "quant" not in op):
                continue
            yield (
                op,
                size,
                [
                    Maker(shape, dtype, "cpu", trained, adapters)
                    for dtype in dtypes
                    for trained, adapters in ((False, torch.float32), (True, dtype))
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
            code = v.code.get(card.name)
            if code is None:
                continue
            where = f"{v.name} ({', '.join(v.sizes)}) on {card.name}"
            if code.spills:
                yield f"{where}: {code.spills} instructions move registers to or from memory"
            if code.shared > card.shared:
                yield f"{where}: {code.shared} bytes of shared memory, of {card.shared}"
            if v.name in KNOWN:
                continue
            if 0 < code.narrowest < 32:
                yield f"{where}: products of {code.narrowest} columns"
            programs = v.programs.get(card.name)
            if programs is not None and programs < card.multiprocessors:
                yield f"{where}: {programs} programs for {card.multiprocessors} multiprocessors"


def tables(found: Sequence[Variant], cards: Sequence[Card]) -> Iterator[str]:
    """Markdown: one line for each variant, with what each card makes of it."""
    names = [card.name for card in cards]
    yield f"| kernel | sizes | warps | {' | '.join(names)} |"
    yield "|" + "---|" * (3 + len(cards))
    for v in found:
        warps = next(iter(v.code.values())).warps
        cells = (_cell(v.code[name]) if name in v.code else "-" for name in names)
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
