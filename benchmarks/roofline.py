"""How long a training step of an 8B model would take on an H100, by a model of the card.

    python benchmarks/roofline.py [--write docs/kernels.md]

Nothing here is measured on a GPU. Decoder layers of Llama 3.1 8B with LoRA on all linears run one
step of 2,048 tokens on the CPU, where ops choose as they do on a GPU (``layer_budget.py``). Each
kernel that a GPU would launch takes the longest of its times: for the bytes of the tensors that it
is given and returns, for its floating-point operations, and, of Triton's, for the issue of its
instructions (``issue.py``). The step is 32 times what a second layer adds, and once what the model
has besides: embedding, head and loss.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

import issue
from fusewright.kernels.cost import _formula
from kernel_code import put
from launches import bytes_of
from layer_budget import SETUPS, Counts, adapted_llama, step
from shapes import MODELS

TOKENS = 2048
_LAYERS = 32
_BYTES = 0.85 * 3.0e12
"""Bytes per second that kernels reach: 85% of what an H100 copies."""
_FLOPS = {torch.float32: 15e12}
_FLOPS_16 = 700e12
"""Floating-point operations per second of products, by the dtype of their factors."""
_ATTENTION = {"forward": 350e12, "backward": 250e12}
_BESIDES = 3e-3
"""Seconds of a step for the optimizer and the gaps between kernels."""


@dataclass(frozen=True)
class Time:
    """What a step takes.

    Attributes:
        seconds: by the model of the card.
        bytes: that kernels read and write.
        launches: how many kernels.
    """

    seconds: float = 0.0
    bytes: int = 0
    launches: int = 0

    def plus(self, other: Time, times: int = 1) -> Time:
        """The sum of this and ``times`` times another."""
        return Time(
            self.seconds + times * other.seconds,
            self.bytes + times * other.bytes,
            self.launches + times * other.launches,
        )


class Times(Counts):
    """Adds up the times of operators; Triton's kernels have theirs from the launches.

    Attributes:
        total: of all so far.
        flops: of products so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = Time()
        self.flops = 0

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute it, but for products, which would take long here: only their shapes matter."""
        if _formula(func._overloadpacket) is None:
            return super().run(func, args, kwargs)
        if "out" in kwargs:
            return kwargs["out"]
        if func._schema.is_mutable:
            return args[0]
        with _disable_current_modes():
            shapes = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
            made = func(*shapes[0], **shapes[1])
            return tree_map_only(Tensor, lambda t: torch.zeros_like(t, device="cpu"), made)

    def note(self, name: str, func: Any, given: Any, out: Any) -> None:
        """Add one operator."""
        super().note(name, func, given, out)
        size = bytes_of(tree_leaves((given, out)))
        seconds = max(size / _BYTES, self._of_products(func, given, out))
        self.total = self.total.plus(Time(seconds, size, 1))

    def made_of(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Add the products that an op of ours makes in kernels of its own."""
        before = self.flops
        out = super().made_of(func, args, kwargs)
        formula = _formula(func._overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
        inside = max(flops - (self.flops - before), 0)
        self.flops += inside
        self.total = self.total.plus(Time(inside / _FLOPS_16))
        return out

    def _of_products(self, func: Any, given: Any, out: Any) -> float:
        formula = _formula(func._overloadpacket)
        if formula is None:
            return 0.0
        args, kwargs = given
        flops, name = int(formula(*args, **kwargs, out_val=out)), func._schema.name
        if "attention" in name:
            seen = flops / 2 if func.namespace == "aten" else flops  # causal: PyTorch counts all
            return seen / _ATTENTION["backward" if "backward" in name else "forward"]
        self.flops += flops
        dtype = next(t.dtype for t in tree_leaves(args) if isinstance(t, Tensor))
        return flops / _FLOPS.get(dtype, _FLOPS_16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Add up, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, help="put the table into this file")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-8b")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step")
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=SETUPS)
    parser.add_argument("--optimized", action="store_true", help="not as transformers runs it")
    options = parser.parse_args(arguments)
    engines = (True,) if options.optimized else (False, True)
    lines = []
    for line in table(options.model, options.tokens, options.setups, engines):
        print(line, flush=True)  # a row takes minutes
        lines.append(line)
    if options.write:
        put(options.write, "roofline", "\n".join(lines))
    return 0


def table(model: str, tokens: int, setups: Sequence[str], engines: Sequence[bool]) -> Iterator[str]:
    """Markdown: what a step takes in each set-up."""
    yield "| | launches / layer | GB / layer | ms / layer | besides, ms | step, ms |"
    yield "|---|---|---|---|---|---|"
    for setup in setups:
        for optimized in engines:
            layer, rest = parts(model, setup, optimized, tokens)
            whole = _BESIDES + rest.plus(layer, MODELS[model].layers).seconds
            yield (
                f"| {setup}{', optimized' if optimized else ''} | {layer.launches} "
                f"| {layer.bytes / 1e9:.1f} | {layer.seconds * 1e3:.2f} "
                f"| {rest.seconds * 1e3:.1f} | {whole * 1e3:.0f} |"
            )


def parts(model: str, setup: str, optimized: bool, tokens: int) -> tuple[Time, Time]:
    """What a layer takes, and what the model has besides its layers."""
    one, two = (_of_a_model(model, setup, optimized, tokens, layers) for layers in (1, 2))
    layer = two.plus(one, -1)
    return layer, one.plus(layer, -1)


def _of_a_model(model: str, setup: str, optimized: bool, tokens: int, layers: int) -> Time:
    config = replace(MODELS[model], layers=layers).llama_config()
    made = adapted_llama(config, setup.startswith("qlora"))
    times = Times()
    ids = torch.arange(tokens)[None]
    launches = step(made, ids, times, optimized, autocast="autocast" in setup)
    for one in launches:
        seconds = max(one.bytes / _BYTES, issue.seconds(one))
        times.total = times.total.plus(Time(seconds, one.bytes, 1))
    return times.total


if __name__ == "__main__":
    sys.exit(main())
