"""How many bytes an optimizer keeps for a parameter."""

from __future__ import annotations

from .tensors import Weight

_ONE = ("lion", "rmsprop", "adagrad")
_NONE = ("sgd", "lomo", "adalomo")

_SMALL = 4096
"""Numbers below which bitsandbytes keeps states in 32 bits."""


def state_bytes(optimizer: str, weight: Weight, part: float = 1.0) -> int:
    """The bytes of the optimizer's states for (a part of) one parameter.

    Two moments for AdamW and its kin, one for Lion, RMSprop and Adagrad, sums of rows and columns
    for Adafactor (Shazeer & Stern 2018), none for SGD. Those of PyTorch and transformers have the
    dtype of the parameter, those of bitsandbytes 32 or 8 bits. GaLore and APOLLO are taken for
    AdamW: what their projections save is left out. ``part`` is the fraction of the parameter that
    the process has.
    """
    numbers = weight.numbers * part
    if optimizer.startswith(_NONE):
        return 0
    if "adafactor" in optimizer:
        columns = weight.numbers // max(weight.rows, 1)
        return round(4 * (weight.rows * part + columns if weight.is_matrix else numbers))
    size: float = weight.itemsize
    if "8bit" in optimizer:
        size = 4.0 if weight.numbers < _SMALL else 1.0 + 4 / 256  # and a scale for each block
    elif "4bit" in optimizer:
        size = 4.0 if weight.numbers < _SMALL else 0.5 + 4 / 128
    elif "32bit" in optimizer or optimizer.endswith("bnb"):
        size = 4.0
    return round(_states(optimizer) * size * numbers)


def _states(optimizer: str) -> int:
    if "ademamix" in optimizer:
        return 3
    if optimizer.startswith(_ONE) or optimizer.startswith("paged_lion"):
        return 1
    return 2
