"""The examples of all ops, as functions of their tensors: for tests on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from fusewright.kernels.op import Example, ExampleSizes, Maker, Op
from fusewright.rewrite.op_table import OPS

from .util import Watch

ODD = ExampleSizes(2, 13, 123, 35, 4, 2, 14, 123, 3, 5, 4)
"""That fill no tile, no vector and no group; large enough for the statistics of an error."""


@dataclass(frozen=True)
class Call:
    """A call of an op as functions of its tensors alone, several outputs in a tuple."""

    op: Op
    leaves: list[Any]
    spec: Any

    @property
    def tensors(self) -> list[Tensor]:
        return [v for v in self.leaves if isinstance(v, Tensor)]

    def ours(self, *tensors: Tensor) -> Any:
        return self._run(self.op.call, tensors)

    def reference(self, *tensors: Tensor) -> Any:
        return self._run(self.op.reference, tensors)

    def unsupported(self) -> list[str]:
        return self.op.unsupported(*tree_unflatten(self.leaves, self.spec))

    def _run(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        given, exact = iter(tensors), any(t.dtype is torch.float64 for t in tensors)

        def leaf(v: Any) -> Any:
            if isinstance(v, Tensor):
                return next(given)
            return torch.float64 if exact and isinstance(v, torch.dtype) else v

        out = function(*tree_unflatten([leaf(v) for v in self.leaves], self.spec))
        return tuple(out) if isinstance(out, list) else out


@dataclass(frozen=True)
class Case:
    """An op and how one of its examples is made."""

    op: Op
    example: Example
    sizes: ExampleSizes = ODD
    dtype: torch.dtype = torch.float64
    train: bool = True
    strided: bool = False
    adapters: torch.dtype | None = None
    device: str = "cpu"

    def call(self, seed: int = 0) -> Call:
        generator = torch.Generator().manual_seed(seed)
        options = self.sizes, self.train, self.adapters, generator, self.strided
        maker = Maker(self.dtype, self.device, *options)
        return Call(self.op, *tree_flatten(self.example(maker)))


def library_calls(call: Call) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The library ops that forward and backward of ``call`` run, each with arguments."""
    calls: dict[Any, Any] = {}

    def note(op: Any, args: Any, outs: list[Tensor]) -> None:
        if op.namespace == "fusewright":
            calls.setdefault(op, args)

    with Watch(note):
        live = [o for o in tree_leaves(call.ours(*call.tensors)) if o.requires_grad]
        if live:
            torch.autograd.backward(live, [torch.randn_like(o) for o in live])
    for op, args in calls.items():
        yield op, tuple(tree_map_only(Tensor, lambda t: t.detach().clone(), args))


CASES = {name: Case(op, example) for op in OPS for name, example in op.examples().items()}


def sized(batch: int, seq: int, hidden: int) -> ExampleSizes:
    """So many tokens of so many features; all else is odd."""
    return ExampleSizes(batch, seq, hidden, 129, 6, 2, 48, 1231, 16, 16, 8)


_WITHOUT_KERNELS = (
    "attention", "dora", "gated_delta_rule", "kda", "segment_attention",
    "selective_scan", "short_conv", "ssd",
)  # fmt: skip
_WITHOUT = (
    # PyTorch's products of matrices
    "qkv_block-plain",
    "quant_linear-int8",
)
LAUNCHING = {n: case for n, case in CASES.items() if not n.startswith(_WITHOUT_KERNELS)} | {
    f"{name}-fp32-adapter": replace(CASES[name], adapters=torch.float32)
    for name in ("lora_linear", "lora_linear-quantized")
}
"""Calls that launch a Triton kernel on a GPU: those of examples, and adapters in fp32."""
for _name in _WITHOUT:
    del LAUNCHING[_name]
