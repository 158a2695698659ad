"""Keep the original code of blocks that are too small to gain from a captured graph.

A call of a captured graph costs the host more than a call of the original code (guards, library
ops, autograd functions), and what it saves grows with the hidden states. So a call keeps the
original code if its hidden states have fewer elements than those from which the graph was measured
to be faster. Nothing of the model is run to find out.

``benchmarks/small_blocks.py`` measures the constants and checks the rule. On an AMD CPU with
AVX-512 bf16 (one thread, LoRA, Llama blocks of 64 to 2,048 features, 2026-12-03), the break-even
point of all widths lies between 32 and 64 thousand elements in bfloat16, and between 64 and 128
thousand in float32. On other devices than a CPU, where nothing was measured, every block runs its
graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.processor import processor

LEAST = {torch.bfloat16: 48 << 10, torch.float32: 96 << 10}
"""Elements of hidden states, tokens x features, from which a block's graph is faster, by the dtype
of its arithmetic. float16 is like bfloat16; wider dtypes are like float32."""


LEAST_LOGITS = 1 << 20
"""Elements of logits from which a head with its loss is faster in tiles (the same CPU: 64 and 256
features, 64 to 32,768 words, 64 to 1,024 tokens)."""


def _bucket(tokens: int) -> int:
    return 1 << max(0, tokens - 1).bit_length()


def why_small(x: Tensor, tokens: int) -> str | None:
    """The reason why a call with hidden states ``x`` (..., features) keeps the original code.

    ``tokens`` are all of the call. None if the call is large enough to gain.
    """
    if x.device.type != "cpu":
        return None
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    if dtype in processor().slow_products:
        return None  # eager code multiplies slowly, ours does not
    return _reason(dtype, _bucket(tokens), x.shape[-1])


@functools.cache
def _reason(dtype: torch.dtype, tokens: int, features: int) -> str | None:
    least = LEAST[torch.bfloat16 if dtype.itemsize < 4 else torch.float32]
    if tokens * features >= least:
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"it is small: up to {tokens:,} tokens x {features:,} features are less than the "
        f"{least:,} from which the optimized code is faster in {name}"
    )


@functools.cache
def _reason_of_head(tokens: int, vocabulary: int) -> str | None:
    if tokens * vocabulary >= LEAST_LOGITS:
        return None
    return (
        f"it is small: up to {tokens:,} tokens x {vocabulary:,} logits are less than the "
        f"{LEAST_LOGITS:,} from which the optimized loss is faster"
    )


@dataclass
class SmallBlocks:
    """The rule in one session; ``is_on``: whether it is applied."""

    is_on: bool = False

    def reason(self, x: Tensor | None, sizes: tuple[int, int] | None) -> str | None:
        """The reason why a call keeps the original code, or None.

        ``x`` is the first input, with ``sizes`` of batch and sequence.
        """
        if not self.is_on or x is None or sizes is None or x.dim() == 0:
            return None
        return why_small(x, prod(sizes))

    def reason_of_head(self, head: nn.Module, kwargs: dict[str, Any]) -> str | None:
        """The reason why a call of a model with a language modeling head is not captured."""
        ids, find = kwargs.get("input_ids"), getattr(head, "get_output_embeddings", None)
        linear = find() if self.is_on and callable(find) else None
        vocabulary = getattr(linear, "out_features", None)
        if not isinstance(ids, Tensor) or ids.device.type != "cpu" or vocabulary is None:
            return None
        return _reason_of_head(_bucket(ids.numel()), vocabulary)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the graphs of all blocks, however small the calls are: to explain them."""
        before, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = before
