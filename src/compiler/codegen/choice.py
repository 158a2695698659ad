"""What runs the graphs of a model's blocks: eager PyTorch, or Inductor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...kernels.launch import has_triton
from ...kernels.native.build import missing_compiler
from ...upstream import changed

_MIN_PARAMETERS = 10_000_000
"""Parameters in the blocks above which Inductor's seconds of compilation are soon earned back."""


def choose(
    codegen: str, blocks: Sequence[nn.Module], elsewhere: str | None = None
) -> tuple[str, str]:
    """``"eager"`` or ``"inductor"`` for the leftovers of the blocks' graphs, and the reason.

    ``elsewhere`` is the type of the device that will run them, where they are not on it: the CPU of
    this machine, or a GPU of another one, which is taken to have Triton.
    """
    if codegen == "eager":
        return codegen, "as requested"
    if (reason := changed("Inductor")) is not None:
        return "eager", f"blocks are not compiled: {reason}"
    if codegen == "auto" and not blocks:
        return "eager", "the model has no repeated blocks"
    size = sum(p.numel() for b in blocks for p in b.parameters())
    if codegen == "auto" and size < _MIN_PARAMETERS:
        return "eager", f"the blocks have only {size / 1e6:.1f} M parameters"
    place = elsewhere or next((p.device.type for b in blocks for p in b.parameters()), "cpu")
    missing = "" if elsewhere == "cuda" else _missing_compiler(place)
    if codegen == "auto":
        return ("eager", missing) if missing else ("inductor", "one compilation serves all blocks")
    if missing and place != "meta":
        return "eager", f"inductor was requested, but {missing}"
    return codegen, "as requested"


def _missing_compiler(device: str) -> str:
    if device == "cpu":
        return missing_compiler()
    return "" if has_triton() else "Triton is not installed"
