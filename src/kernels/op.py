"""What an op is: the record that every file in this folder ends with.

An op file has one fixed order, so that a reader who knows one knows them all:

1. **reference**: plain PyTorch. It *defines* the op, rounding included: given bf16 it rounds where
   the recognised model code rounds, given fp64 it runs in fp64.
2. **cpu**: ``_forward`` and ``_backward``, made of ATen calls only. They run as they are on the
   CPU (and on any device without a Triton kernel), and Inductor can trace and fuse them.
3. **triton**: opaque library ops (see ``launch.library_op``) that call the twin file
   ``OP_triton.py`` beside it, which alone imports Triton.
4. **autograd**: one ``torch.autograd.Function`` for all implementations. It computes only the
   gradients in ``ctx.needs_input_grad``, never writes into a saved tensor, and its forward never
   returns an input. Its backward is decorated with what takes its place where it is differentiated
   itself (``second_order.py``).
5. **OP**: the record.

The public function (``rms_norm(...)``) is what graph nodes call. It is plain Python over
``Function.apply``: AOTAutograd traces through it, so an op costs nothing when a block goes through
Inductor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cost import Cost, cost


@dataclass(frozen=True)
class Op:
    """One op: what it means, how it is called, what it cannot take.

    Attributes:
        name: the op's name, also the rule name in reports.
        reference: plain PyTorch definition, same signature as ``call``.
        call: the differentiable function; a graph node's target.
        unsupported: same signature as ``call`` -> the reasons, a clause each, why the fast
            implementation for these tensors' device cannot take them. Empty when it can. The
            engine asks it before every rewrite, with fake tensors: it must not read values.
        kept_outputs: places of the outputs that it keeps for backward itself: nothing may write
            into them. Any input may be kept.
    """

    name: str
    reference: Callable[..., Any]
    call: Callable[..., Any]
    unsupported: Callable[..., list[str]]
    kept_outputs: tuple[int, ...] = ()

    def cost(self, *args: Any, **kwargs: Any) -> Cost:
        """What one call with these arguments moves, computes and keeps; nothing is computed.

        Args:
            args: those of ``call``; tensors may be fake or on the ``meta`` device.
            kwargs: likewise.
        """
        return cost(self.call, *args, **kwargs)
