"""Scans, convolutions and attention that run over each segment of a row apart.

A row of a batch may hold several samples, its *segments*. ``segments`` (B, L), int32, contains for
each position the one where its segment begins: position j belongs to that of i >= j if and only if
``j >= segments[i]``. These are the forms that the rules rewrite to ops, and that run where none
does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from ...errors import OptimizeError
from ...kernels.attention.segment_attention import segment_attention_reference


def run_apart(
    function: Callable[..., Any],
    segments: Tensor,
    arguments: Mapping[str, Any],
    sequences: Mapping[str, int],
    time: int,
) -> Any:
    """Call ``function`` for each segment, and join the results where the segments are.

    ``sequences`` names those of the arguments that are sequences, with their dimension of time;
    ``time`` is that of the result, or of the first of several, of which the others must be None.
    """
    rows, is_tuple, others = [], False, 0
    for row, first in enumerate(segments.tolist()):
        begins = [i for i, begin in enumerate(first) if i == begin]
        parts = []
        for start, stop in zip(begins, [*begins[1:], len(first)], strict=True):
            own = {
                name: arguments[name][row : row + 1].narrow(dim, start, stop - start)
                for name, dim in sequences.items()
            }
            results = function(**{**arguments, **own})
            is_tuple = isinstance(results, tuple)
            part, *rest = results if is_tuple else (results,)
            if any(t is not None for t in rest):
                raise NotImplementedError("a state after several segments is asked for")
            others = len(rest)
            parts.append(part)
        rows.append(torch.cat(parts, time))
    out = torch.cat(rows)
    return (out, *[None] * others) if is_tuple else out


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]  # 2026-12-03: no types
def attend_apart(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, scale: float) -> Tensor:
    """PyTorch's attention for each segment of one row, whose ``boundaries`` are given."""
    if isinstance(q, FakeTensor):  # whose boundaries have no values
        whole = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
        return whole.transpose(1, 2).contiguous().transpose(1, 2)
    return segment_attention_reference(q, k, v, boundaries, scale)


class Unread:
    """A value that may be passed on, but raises when anything reads it.

    Attributes:
        seen: whether something has tried to, and got an error.
    """

    def __init__(self) -> None:
        object.__setattr__(self, "seen", False)

    def __getattribute__(self, name: str) -> NoReturn:
        object.__setattr__(self, "seen", True)
        raise OptimizeError("a keyword that a function was expected to ignore is read")

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise cls().function  # looked at: reading any attribute raises

    def __bool__(self) -> NoReturn:
        raise self.truth  # looked at: reading any attribute raises

    def __eq__(self, other: object) -> NoReturn:
        raise self.equality  # looked at: reading any attribute raises

    def __hash__(self) -> NoReturn:
        raise self.hash  # looked at: reading any attribute raises

    def __repr__(self) -> NoReturn:
        raise self.text  # looked at: reading any attribute raises

    def __getitem__(self, index: object) -> NoReturn:
        raise self.items  # looked at: reading any attribute raises
