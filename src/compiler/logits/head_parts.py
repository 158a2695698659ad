"""What logits are made of: the rows, the head and the numbers in a chain of graph nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ...graph import facts
from ...passes.linear_cross_entropy import HEAD
from ...rewrite.matcher import Trace


class Operands(NamedTuple):
    """The operands of ``linear_logprob``, with rows already chosen.

    ``x``: (N, H), ``weight``: (V, H), ``bias``: (V,). ``scale``, a number or one that is learnt,
    multiplies the logits before the soft cap; ``temperature`` divides them after it.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Any
    softcap: float | None
    temperature: float


@dataclass(frozen=True)
class HeadParts:
    """Which inputs of the logits are what, by place, and the constants between them.

    ``factor`` is the place of a scale that is learnt; ``scale`` and ``softcap`` are constants.
    """

    x: int
    weight: int
    bias: int | None
    factor: int | None
    scale: float
    softcap: float | None

    def of(self, inputs: Sequence[Any], index: Tensor | None, factor: float) -> Operands:
        """The operands for rows ``index`` (None: all); a ``factor`` above 0 comes afterwards."""
        x = inputs[self.x]
        x = x.reshape(-1, x.shape[-1])
        if index is not None:
            x = x.index_select(0, index.reshape(-1))
        bias = None if self.bias is None else inputs[self.bias]
        scale = self.scale if self.factor is None else inputs[self.factor].reshape(())
        return Operands(x, inputs[self.weight], bias, scale, self.softcap, 1.0 / factor)

    def is_plain(self, inputs: Sequence[Any]) -> bool:
        """Whether rows and head are ordinary tensors that are whole on this process."""
        places = (self.x, self.weight, self.bias, self.factor)
        return all(type(inputs[i]) in (Tensor, nn.Parameter) for i in places if i is not None)


def head_parts(logits: fx.Node, inputs: Sequence[fx.Node]) -> HeadParts | None:
    """The parts of the head that makes ``logits``; None where they are another formula."""
    places = {node: i for i, node in enumerate(inputs)}
    for m in HEAD.find(logits, Trace()):
        factor = m.get("factor")
        operands = [m.x, m.w, *(n for n in (m.bias, factor) if n is not None)]
        if not all(isinstance(n, fx.Node) and n in places for n in operands):
            continue
        if factor is not None and (
            m.bias is not None or getattr(facts.tensor(factor), "numel", lambda: 0)() != 1
        ):
            continue
        cap, scale = m.get("cap"), float(m.get("scale", 1.0))
        if factor is not None and scale != 1.0:
            continue
        if cap is not None and (not isinstance(cap, (int, float)) or cap <= 0):
            continue
        if facts.ndim(m.w) != 2 or facts.dtype(logits) not in _DTYPES:
            continue
        return HeadParts(
            places[m.x], places[m.w],
            None if m.bias is None else places[m.bias],
            None if factor is None else places[factor],
            1.0 / scale if m.get("divided") is not None else scale,
            None if cap is None else float(cap),
        )  # fmt: skip
    return None


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def as_leaf(x: Any) -> Any:
    """A tensor without its history, whose gradient is wanted where the one of ``x`` is."""
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
