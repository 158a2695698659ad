"""Cross entropy by hand, of nothing that engines exchange."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def trained_tokens(logits: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """What is predicted at each token (rows, tokens), and where that is trained.

    None: the batch does not say what is trained.
    """
    labels = batch.get("shift_labels")
    if not isinstance(labels, Tensor):
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            return None
        labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    if logits.shape[:-1] != labels.shape:
        return None
    labels = labels.to(logits.device)
    return labels, labels != -100


def token_losses(
    logits: Tensor, batch: Mapping[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor] | None:
    """Negative log likelihoods (rows, tokens) in ``dtype``, else 0; and where tokens are trained.

    A token's loss stands where it is predicted from. None: the batch does not say what is trained.
    """
    found = trained_tokens(logits, batch)
    if found is None:
        return None
    labels, trained = found
    rows = logits[trained].to(dtype)
    wanted = rows.gather(1, labels[trained].unsqueeze(1)).squeeze(1)
    losses = torch.zeros(labels.shape, dtype=dtype, device=logits.device)
    losses[trained] = rows.logsumexp(1) - wanted
    return losses, trained


def causal_lm(
    logits: Tensor, labels: Any, vocab_size: int, num_items_in_batch: Any = None, **kwargs: Any
) -> Tensor:
    """The loss of causal language models in transformers, by the kernel that they call.

    In float32 it has an error of its own, which grows with the vocabulary, and is eager mode's.
    """
    shift = kwargs.get("shift_labels")
    found = trained_tokens(logits, {"labels": labels} if shift is None else {"shift_labels": shift})
    if found is None:
        raise ValueError(f"labels {tuple(labels.shape)} for logits {tuple(logits.shape)}")
    wanted, mask = found
    kept = logits[mask] if logits.dtype == torch.float64 else logits[mask].float()
    # not by F.cross_entropy, which engines exchange
    total: Tensor = torch.ops.aten.cross_entropy_loss(kept, wanted[mask], None, _SUM)
    return total / (mask.sum() if num_items_in_batch is None else num_items_in_batch)


_SUM = 2
"""The number of that reduction in PyTorch's operators."""
