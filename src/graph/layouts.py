"""Whether anybody can tell in what order of strides a value lies in memory."""

from __future__ import annotations

from torch import fx

from .canon import canonical
from .effects import draws, is_opaque

_VIEWS = ("view", "view_as", "unflatten", "view_as_complex", "view_as_real")
"""What may fail in another layout, but not in the contiguous one."""

_STRIDES = ("as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr")
"""What gives something else in any other layout."""

_FRESH = ("linear", "matmul", "addmm", "sdpa", "contiguous", "cat", "stack", "mean", "sum",
          "cross_entropy", "index", "grouped_mm")  # fmt: skip
"""What makes a value whose layout does not follow that of its operands."""

_COPIED = ("reshape", "flatten")
"""What copies where it cannot view."""


def layout_is_read(node: fx.Node) -> str:
    """How users of ``node`` depend on its strides: ``"exactly"``, ``"for views"``, or ``""``.

    For views the contiguous layout always works. Random numbers are drawn in the order of memory,
    so the layout says which value gets which. What nothing is known of may read or draw. Users of
    the graph's results are not looked at.
    """
    dependence = ""
    seen: set[fx.Node] = set()
    queue = list(node.users)
    while queue:
        user = queue.pop()
        if user in seen:
            continue
        seen.add(user)
        name = user.target if user.op == "call_method" else getattr(user.target, "__name__", "")
        if name in _STRIDES or draws(user) or is_opaque(user):
            return "exactly"
        if name in _VIEWS:
            dependence = "for views"
        canon = canonical(user)
        if name in _COPIED or (canon is not None and canon.name in _FRESH):
            continue
        if canon is None or canon.name not in _OURS:
            queue += list(user.users)
    return dependence


_OURS = ("rms_norm", "add_rms_norm", "layer_norm", "lora_linear", "quant_linear",
         "linear_cross_entropy", "linear_logprob")  # fmt: skip
"""Ops of this package that read any layout, and whose outputs do not follow it."""
