"""Context parallelism: the processes of a group train the same sequences, each a part of them.

Each process has two parts of every sequence, one from either end. There are two ways to attend:

- torch's ring attention, through accelerate and transformers, with FSDP on GPUs. It knows the
  causal mask and no other, so that rows are not packed, and padding comes after what is trained.
- Keys and values of all parts are gathered for each layer (``Parts``), and each process attends
  with its queries, tile by tile, to what the sample of a pack has before them. For packs, CPUs,
  DDP and DeepSpeed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import RecipeError
from ...kernels.op import sample_starts
from ..recipe.strategy import Strategy
from .world import World

_KEY = "context_parallel_size"
_IGNORED = -100
_ATTENTION = F.scaled_dot_product_attention


def gathers(strategy: Strategy) -> bool:
    """Whether keys and values are gathered; else it is torch's ring, or nothing is shared."""
    rings = strategy.engine == "fsdp" and not strategy.packs and torch.cuda.is_available()
    return strategy.context > 1 and not rings


def require_causal(model: Any) -> None:
    """Raise RecipeError unless all layers are of full causal attention, which parts can share."""
    from ...compiler.regions import find

    name, config = type(model).__name__, model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds and getattr(config, "sliding_window", None):
        kinds = {"sliding_attention"}
    other = sorted(kinds - {"full_attention"})
    instead = f"leave {_KEY} out"
    if other:
        raise RecipeError(
            f"{_KEY}: {name} has layers of {other[0]}, and the parts of a sequence share "
            f"causal attention alone: {instead}"
        )
    blocks = [region.module for region in find(model) if region.kind == "block"]
    if not blocks or not all(hasattr(block, "self_attn") for block in blocks):
        raise RecipeError(
            f"{_KEY}: {name} has layers without self_attn, and the parts of a sequence share "
            f"attention alone: {instead}"
        )
    if config._attn_implementation != "sdpa":
        raise RecipeError(f"{_KEY}: {name} does not compute attention with torch's sdpa: {instead}")


def divisible(batch: Mapping[str, Tensor], size: int, pad_id: int) -> dict[str, Tensor]:
    """A batch whose sequences ``size`` processes can share, with what transformers needs.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` and ``shift_labels`` (B, T'), where T' is a
        multiple of twice ``size``. There is no mask: a causal one hides the padding, and positions
        say where the samples of a pack begin.
    """
    width = batch["input_ids"].shape[1]
    rest = -width % (2 * size)
    ids = F.pad(batch["input_ids"], (0, rest), value=pad_id)
    labels = F.pad(batch["labels"], (0, rest), value=_IGNORED)
    positions = torch.arange(width + rest).expand(len(ids), -1)
    if "position_ids" in batch:
        positions = F.pad(batch["position_ids"], (0, rest))  # each a sample of its own
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions.contiguous(),
        # the label of each token is the next one: a part of a sequence cannot see that
        "shift_labels": F.pad(labels[:, 1:], (0, 1), value=_IGNORED),
    }


# --- gathered keys and values ---------------------------------------------------------------------


class Parts:
    """The parts of the sequences that the processes of a group share, and this process's place.

    The groups are those of ranks that differ in their part alone; a collective.
    """

    def __init__(self, world: World, strategy: Strategy) -> None:
        self.size, step = strategy.context, strategy.tensor
        self.rank = world.rank // step % self.size
        whole = self.size * step
        for first in range(0, world.size, whole):
            for offset in range(step):
                ranks = [first + offset + step * part for part in range(self.size)]
                group = torch.distributed.new_group(ranks)
                if world.rank in ranks:
                    self.group = group

    def divide(
        self, inputs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Callable[[], contextlib.AbstractContextManager[None]]]:
        """This process's part of a whole batch, and a context in which attention sees the rest.

        Forward and backward of the batch both belong into the context.
        """
        positions = inputs["position_ids"]
        width = positions.shape[1]
        chunks = torch.arange(width, device=positions.device).view(2 * self.size, -1)
        ends = [[chunks[part], chunks[2 * self.size - 1 - part]] for part in range(self.size)]
        order = torch.cat([chunk for pair in ends for chunk in pair])
        mine = torch.cat(ends[self.rank])
        parts = {
            name: value.index_select(1, mine)
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == width
            else value
            for name, value in inputs.items()
        }
        attention = _Attention(self.group, positions, order.argsort(), ends[self.rank])
        return parts, functools.partial(_in_place_of_sdpa, attention)


@contextlib.contextmanager
def _in_place_of_sdpa(attention: Callable[..., Tensor]) -> Iterator[None]:
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


_TILE = 2**24
"""The most entries of the mask of a tile, as long as it has some rows."""

_ROWS = 16


class _Attention:
    """Attention of the queries of a part to the keys of all: causal, within the sample.

    ``places`` are where each token of the sequence is among the gathered ones, ``chunks`` the
    indices of the queries, in runs without gaps.
    """

    def __init__(self, group: Any, positions: Tensor, places: Tensor, chunks: list[Tensor]) -> None:
        self.group, self.places = group, places
        self.first = sample_starts(positions)  # (B, T)
        self.tiles = list(self._tiles([(int(c[0]), len(c)) for c in chunks]))
        self._masks: dict[int, Tensor] = {}

    def _tiles(self, chunks: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
        """The queries of each tile, from and to, and the first key that one of them sees."""
        earliest = self.first.min(0).values.tolist()
        for begin, length in chunks:
            at, end = begin, begin + length
            while at < end:
                rows = max(_ROWS, _TILE // (len(self.first) * (end - earliest[at])))
                until = min(end, at + rows)
                yield at, until, earliest[at]
                at = until

    def _mask(self, number: int) -> Tensor:
        """(B, 1, queries, keys) of a tile."""
        if (mask := self._masks.get(number)) is not None:
            return mask
        begin, end, low = self.tiles[number]
        queries = torch.arange(begin, end, device=self.first.device)[:, None]
        keys = torch.arange(low, end, device=self.first.device)
        mask = (keys <= queries) & (self.first[:, begin:end, None] <= keys)
        if sum(m.numel() for m in self._masks.values()) < 4 * _TILE:
            self._masks[number] = mask[:, None]
        return mask[:, None]

    @torch._dynamo.disable  # type: ignore[untyped-decorator]  # tiles differ from batch to batch
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As ``scaled_dot_product_attention``; a mask is that of the part, and is not read."""
        if attn_mask is None and not is_causal:
            raise RecipeError(f"{_KEY}: an attention of the model is not causal: leave {_KEY} out")
        key, value = self._whole(key), self._whole(value)
        outputs, at = [], 0
        for number, (begin, end, low) in enumerate(self.tiles):
            queries = query[:, :, at : at + end - begin]
            at += end - begin
            outputs.append(
                _ATTENTION(
                    queries,
                    key[:, :, low:end],
                    value[:, :, low:end],
                    self._mask(number),
                    dropout_p,
                    scale=scale,
                    enable_gqa=enable_gqa,
                )
            )
        return torch.cat(outputs, 2)

    def _whole(self, part: Tensor) -> Tensor:
        """Keys or values (B, heads, T, D) of the whole sequence, in its order."""
        from torch.distributed._functional_collectives import all_gather_tensor_autograd

        # PyTorch 2.11 gathers no tensor with gaps
        whole: Tensor = all_gather_tensor_autograd(part.contiguous(), 2, self.group)
        return whole.index_select(2, self.places)
