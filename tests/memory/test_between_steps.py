"""What is left of a step when it has ended: nothing that eager mode does not leave as well."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright import optimize
from fusewright.compiler.logits.fingerprints import fingerprint

from ..models.zoo import FAMILIES, build


def _tensors() -> dict[int, Tensor]:
    """All real tensors of more than a number that Python can see, by their identity."""
    gc.collect()
    tensors = (t for t in gc.get_objects() if issubclass(type(t), Tensor))
    return {
        id(t): t
        for t in tensors
        if type(t).__name__ != "FakeTensor" and t.device.type != "meta" and t.numel() > 1
    }


def _left(optimized: bool, **options: Any) -> Counter[tuple[int, ...]]:
    """The shapes of the tensors that are there after three steps, and were not before them."""
    torch._dynamo.reset()
    before = _tensors()
    model: Any = build(FAMILIES[0], **options)
    if optimized:
        model = optimize(model, codegen="eager", memory="auto")
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ids = torch.arange(48).view(2, 24)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Counter(tuple(t.shape) for i, t in _tensors().items() if i not in before)


@pytest.mark.long("True")
@pytest.mark.parametrize("lora", [False, True])
def test_no_more_is_left_than_in_eager_mode(lora: bool) -> None:
    fingerprint([torch.ones(1)])  # its factors stay, once for a device
    eager, ours = (_left(optimized, lora=lora) for optimized in (False, True))
    assert ours - eager == Counter()
    assert eager.total() > 20
