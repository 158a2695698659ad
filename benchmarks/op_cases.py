"""The example of each op, at the sizes of one decoder layer: what ``ops.py`` measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fusewright.kernels import op as records
from fusewright.rewrite.op_table import OPS
from shapes import OpShape

_VARIANTS = ("attention-packed", "attention-samples", "lora_linear-quantized")
"""What is measured beside the examples: on a GPU, our attention is for masks."""

CASES: dict[str, records.Example] = {
    name: make
    for op in OPS
    for name, make in op.examples().items()
    if name in (op.name, *_VARIANTS)
}
"""How to call each op, by the op's name; after a dash, what is special about the call."""


def op_of(case: str) -> str:
    """The name of the op that a case is of."""
    return case.partition("-")[0]


@dataclass(frozen=True)
class Case:
    """The arguments of one call.

    Attributes:
        args: positional arguments, tensors possibly inside lists.
    """

    args: tuple[Any, ...]

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [t for t in pytree.tree_leaves(self.args) if isinstance(t, Tensor)]

    def leaves(self) -> list[Tensor]:
        """Those that want a gradient."""
        return [t for t in self.tensors() if t.requires_grad]

    def parameters(self) -> list[Tensor]:
        """Weights, tables and codes: in memory anyway, they do not count as saved for backward."""
        kinds = (torch.bool, torch.int64)  # masks and labels
        return [
            t
            for t in self.tensors()
            if isinstance(t, nn.Parameter) or not (t.requires_grad or t.dtype in kinds)
        ]


class Maker:
    """Makes the cases of one shape: activations want gradients, weights if ``train_weights``.

    What is always trained, such as adapters, has the dtype ``adapters``, or that of all else.
    """

    def __init__(
        self, shape: OpShape, dtype: torch.dtype, device: str, train_weights: bool,
        adapters: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.dtype, self.device = shape, dtype, device
        self.train_weights, self.adapters = train_weights, adapters

    def make(self, op: str) -> Case:
        """The case of that name."""
        model = self.shape.model
        sizes = records.ExampleSizes(
            self.shape.batch, self.shape.seq, model.hidden, model.ffn, model.heads, model.kv_heads,
            model.head_dim, model.vocab, self.shape.rank, experts=8,
        )  # fmt: skip
        generator = torch.Generator(self.device).manual_seed(0)
        maker = records.Maker(
            self.dtype, self.device, sizes, self.train_weights, self.adapters, generator
        )
        return Case(CASES[op](maker))
