"""Losses other than the model's: of models with remote code, and those that weigh tokens.

DFT and EAFT are the cross entropy of a token times a weight without a gradient. The output head and
the loss are computed in tiles of rows, forward and backward, so that the logits of a batch never
exist as a whole. What a model does with the head's result (a scale, a softcap) is its own code,
applied to each tile.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from ...errors import RecipeError
from ..recipe.recipe import Recipe

Weigh = Callable[[Tensor, Tensor], Tensor]
"""From logits ``(N, V)`` and the cross entropy of each row ``(N,)`` to the weights ``(N,)``."""

_IGNORED = -100
"""The label of a token that is not trained."""

_TILE = 2**25
"""Logits of a tile, at most: 128 MiB in float32."""


def by_probability(logits: Tensor, losses: Tensor) -> Tensor:
    """DFT (Wu et al. 2025): the probability that the model gives to the token."""
    return torch.exp(-losses)


def by_entropy(logits: Tensor, losses: Tensor, alpha: float = 1.0, k: int = 20) -> Tensor:
    """EAFT: the entropy of the ``k`` most probable tokens, to the power of ``alpha``."""
    top = torch.topk(logits, min(k, logits.shape[-1]), dim=-1).values
    probabilities = torch.softmax(top, dim=-1)
    entropy = -(probabilities * torch.log(probabilities + 1e-10)).sum(-1)
    return torch.pow(entropy, alpha)


def weigher(recipe: Recipe) -> Weigh | None:
    """The weighting of tokens by the recipe; None: all the same."""
    if recipe.use_dft:
        return by_probability
    if not recipe.use_eaft:
        return None
    alpha = 1.0 if recipe.eaft_alpha is None else recipe.eaft_alpha
    k = recipe.eaft_k or 20
    return lambda logits, losses: by_entropy(logits, losses, alpha, k)


def causal_loss(
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Any = None,
    smoother: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The loss over the trained tokens of all processes, for a model that cannot count them.

    Args:
        outputs: of the model, with ``logits`` (B, T, V).
        labels: (B, T), -100 where nothing is trained.
        num_items_in_batch: trained tokens of the step, of all processes.
        smoother: transformers' ``LabelSmoother``; None: labels are not smoothed.
    """
    if smoother is not None:
        return smoother(outputs, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)
    logits = outputs["logits"]
    loss: Tensor = ForCausalLMLoss(
        logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch
    )
    return loss


class TokenLoss:
    """Makes a causal LM compute a weighted loss in training, in place of its cross entropy.

    It does so inside the model's forward, where DDP looks for what a step uses. All processes have
    as many tiles: their number is that of the largest batch of the recipe.
    """

    def __init__(self, recipe: Recipe, weigh: Weigh) -> None:
        self.rows = recipe.micro_batch_size * recipe.sequence_len
        self.weigh = weigh
        self._used = False

    @contextlib.contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Compute the loss of ``model`` this way while the block runs, backward included.

        Raises a RecipeError if the model's code computes the loss otherwise.
        """
        causal = causal_lm(model)
        head: Any = causal.get_output_embeddings()
        forward = vars(head).get("forward") if head is not None else None
        before = vars(causal).get("_loss_function")
        self._used = False
        causal.loss_function = self._loss
        if head is not None:
            head.forward = _Deferred(head)
        try:
            yield
        finally:
            if head is not None:
                _put_back(head, "forward", forward)
            _put_back(causal, "_loss_function", before)
        if not self._used:
            raise RecipeError(
                f"use_dft, use_eaft: the code of {type(causal).__name__} computes its own loss, "
                "which tokens cannot be weighed in: leave the key out"
            )

    @torch._dynamo.disable  # type: ignore[untyped-decorator]  # 2026-11-27: torch has no types there
    def _loss(
        self, logits: Tensor, labels: Tensor, *args: Any, num_items_in_batch: Any = None,
        shift_labels: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """As transformers' ``ForCausalLMLoss``: the sum over trained tokens by their number."""
        self._used = True
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
        number = (shift_labels != _IGNORED).sum()
        vocabulary = logits.shape[-1]
        tiles = max(1, math.ceil(self.rows * vocabulary / _TILE))
        total = _weighted_sum(logits, shift_labels, self.weigh, tiles)
        count = num_items_in_batch if num_items_in_batch is not None else number.clamp(min=1)
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def causal_lm(model: Any) -> Any:
    """The causal LM inside wrappers: of adapters, of processes, of compiled models."""
    inner = model
    while (wrapped := getattr(inner, "module", None)) is not None:
        inner = wrapped
    return inner.get_base_model() if hasattr(inner, "peft_config") else inner


def _put_back(owner: Any, name: str, value: Any) -> None:
    if value is None:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = value


def _weighted_sum(logits: Tensor, labels: Tensor, weigh: Weigh, tiles: int) -> Tensor:
    """The weighted cross entropies of all rows with a label, added up tile by tile."""
    if isinstance(logits, _Pending):
        source, finish = logits.rows, logits.finish
    else:  # of a head that is no module
        source, finish = logits, _unchanged
    flat_labels = labels.reshape(-1).to(source.device)
    mask = flat_labels != _IGNORED
    source, flat_labels = source.reshape(-1, source.shape[-1])[mask], flat_labels[mask]

    def tile(rows: Tensor, targets: Tensor) -> Tensor:
        values = finish(rows[None])[0].float()
        losses = F.cross_entropy(values, targets, reduction="none")
        with torch.no_grad():
            weights = weigh(values, losses)
        return (losses * weights).sum()

    total = source.new_zeros((), dtype=torch.float32)
    parts = zip(source.tensor_split(tiles), flat_labels.tensor_split(tiles), strict=True)
    for rows, targets in parts:
        total = total + checkpoint(tile, rows, targets, use_reentrant=False)
    return total


def _unchanged(rows: Tensor) -> Tensor:
    return rows


class _Deferred:
    """The ``forward`` of an output head that is deferred until the logits are read."""

    def __init__(self, head: nn.Module) -> None:
        self.head, self.forward, self._real = head, head.forward, False

    @torch._dynamo.disable  # type: ignore[untyped-decorator]  # 2026-11-27: torch has no types there
    def __call__(self, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._real or args or kwargs or not torch.is_grad_enabled() or rows.ndim != 3:
            return self.forward(rows, *args, **kwargs)
        return _Pending.of(rows, self.call)

    def call(self, rows: Tensor) -> Tensor:
        """The head's result, computed under the hooks that gather its weights."""
        self._real = True
        try:
            result: Tensor = self.head(rows)
            return result
        finally:
            self._real = False


_POINTWISE = {
    "mul", "__mul__", "__rmul__", "__imul__", "div", "true_divide", "__truediv__", "__itruediv__",
    "add", "__add__", "__radd__", "sub", "__sub__", "neg", "tanh", "clamp", "float", "to",
    "type_as", "contiguous", "clone",
}  # fmt: skip
"""Pointwise functions of torch that models apply to logits before the loss."""

_ABOUT = {"__get__", "size", "dim", "numel", "is_floating_point", "is_contiguous"}
"""Attributes and methods that need no values."""


class _Pending(torch.Tensor):
    """Logits that are not computed: rows (B, T, D), the head, and the functions of its result."""

    rows: Tensor
    finish: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, rows: Tensor, finish: Callable[[Tensor], Tensor]) -> _Pending:
        """The logits of ``rows``; ``finish`` computes those of any part of them."""
        devices = [rows.device] if rows.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            like = finish(rows.detach()[:1, :1])
        pending: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # 2026-11-27
            cls, (*rows.shape[:2], like.shape[-1]), dtype=like.dtype, device=rows.device
        )
        pending.rows, pending.finish = rows, finish
        return pending  # type: ignore[no-any-return]  # 2026-11-27: torch has no type for it

    def then(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> _Pending:
        """The logits after a function that works on each row by itself."""
        before = self.finish
        return self.of(self.rows, lambda rows: func(before(rows), *args, **kwargs))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ABOUT:
            return super().__torch_function__(  # type: ignore[no-untyped-call]  # 2026-11-27
                func, types, args, kwargs
            )
        first, *rest = args or (None,)
        if isinstance(first, _Pending):
            if name in _POINTWISE and all(map(_of_features, [*rest, *kwargs.values()])):
                return first.then(func, *rest, **kwargs)
            if name == "__getitem__" and _all_rows(rest[0]):
                return first.then(func, *rest)
            if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
                raise _unsupported(f"changes logits in place ({name})")
        real, kwargs_of_rows = tree_map_only(_Pending, lambda x: x.finish(x.rows), (args, kwargs))
        return func(*real, **kwargs_of_rows)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # 2026-11-27: torch has it for instances
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise _unsupported(f"calls {func} with logits where Python does not see it")


def _unsupported(what: str) -> RecipeError:
    return RecipeError(
        f"use_dft, use_eaft: the code of this model {what}, and so its logits cannot be computed "
        "in tiles: leave the key out"
    )


def _of_features(value: Any) -> bool:
    """Whether an argument is the same for all rows."""
    return not isinstance(value, Tensor) or (value.ndim < 2 and not isinstance(value, _Pending))


def _all_rows(index: Any) -> bool:
    """Whether an index takes all rows, and only chooses among the vocabulary."""
    parts = index if isinstance(index, tuple) else (index,)
    if parts[0] is Ellipsis:
        return len(parts) == 2 and isinstance(parts[1], slice)
    return len(parts) == 3 and all(p == slice(None) for p in parts[:2])
