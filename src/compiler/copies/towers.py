"""Attention of vision towers, captured in the form that transformers has for FlashAttention.

A tower lays the patches of all images in one row. For SDPA, transformers splits the row by lengths
that it reads from a tensor of boundaries, and calls attention for each piece: a tracer follows that
for one number of images at most. For FlashAttention it passes the boundaries to one call. While a
block is captured, its attention takes that branch, with a function that does what the other one
does (``attend_apart``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...graph.opaque.segments import attend_apart

_BRANCHES = {"split", "tolist", "get_interface", "is_flash_attention_requested"}
"""Names in the code of an attention with both branches."""


def with_boundaries(value: Any, names: set[str]) -> Any:
    """Return the replacement of a global in code with these names, or None."""
    library = sys.modules.get("transformers.integrations.sdpa_attention")
    if library is None or not names >= _BRANCHES:
        return None
    if getattr(value, "__name__", "") == "is_flash_attention_requested":
        return lambda config: config._attn_implementation == _SDPA or value(config)
    if hasattr(value, "get_interface"):
        return _Interfaces(value, library.sdpa_attention_forward)
    return None


_SDPA = "sdpa"


class _Interfaces:
    """The attention functions of transformers, with one of ours for SDPA."""

    def __init__(self, known: Any, sdpa: Callable[..., Any]) -> None:
        self._known, self._sdpa = known, sdpa

    def get_interface(self, name: str, default: Any) -> Any:
        function = self._known.get_interface(name, default)
        if name != _SDPA:
            return function
        if function is not self._sdpa:
            raise NotImplementedError("another attention function is registered as sdpa")
        return _attend


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any = None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None, max_length_q: Any = None, max_length_k: Any = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if attention_mask is not None or dropout or is_causal is not False or more.get("position_bias"):
        raise NotImplementedError("attention within segments with a mask or dropout")
    if cu_seq_lens_q is None or cu_seq_lens_q is not cu_seq_lens_k:
        raise NotImplementedError("the segments of queries and keys differ")
    out = attend_apart(q, k, v, cu_seq_lens_q, scaling)
    return out.transpose(1, 2).contiguous(), None
