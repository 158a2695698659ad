"""Packed samples have the losses and gradients of single ones, in twenty architectures.

In fp64, where a leak cannot hide among roundings. ``test_packed.py`` holds three families to the
error budget in the dtype that they are trained in.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright import optimize
from fusewright.train.data import IGNORED, Packs, Sample, collate, leaks, pack
from tests.models.architectures import LAST_ID, build

QUICK = ("deepseek_v3", "gemma2", "gpt_oss", "llama")

ARCHITECTURES = {
    "cohere2": "sliding windows, and layers without positions",
    "deepseek_v3": "latent attention (MLA): values narrower than keys",
    "exaone4": "sliding windows, norms after the parts",
    "gemma2": "softcaps, sliding windows",
    "gemma3_text": "sliding windows, normed queries and keys",
    "glm4": "grouped heads, part of a head rotated",
    "gpt2": "learnt positions",
    "gpt_neox": "one weight for queries, keys and values",
    "gpt_oss": "attention sinks, sliding windows, experts",
    "granite": "multipliers",
    "llama": "grouped heads",
    "mistral": "sliding windows",
    "mixtral": "experts",
    "olmo2": "norms after the parts",
    "phi3": "one weight for queries, keys and values, part of a head rotated",
    "qwen2": "biases",
    "qwen3": "normed queries and keys",
    "smollm3": "layers without positions",
    "stablelm": "part of a head rotated",
    "starcoder2": "sliding windows, layer norms",
}
"""The name of an architecture, and what of it may go wrong."""

REFUSED = ("bloom", "mpt")
"""ALiBi: their masks know nothing of packs, and the trainer refuses to pack for them."""

LENGTH = 32
SIZES = (13, 15, 5, 21, 2, 9)


def _sample(length: int) -> Sample:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, LAST_ID, (length,), generator=generator).tolist()
    prompt = max(1, length // 3)
    return Sample(ids, [IGNORED] * prompt + ids[prompt:])


SAMPLES = [_sample(n) for n in SIZES]
PACKED = list(Packs(SAMPLES, pack(SIZES, LENGTH)))


def _made(name: str) -> Any:
    model: Any = build(name).double()
    model.config.use_cache = False
    return model


def _step(model: Any, packing: bool) -> dict[str, Tensor]:
    """The mean loss of the trained tokens, and its gradients."""
    batches = [[p] for p in PACKED] if packing else [[[s]] for s in SAMPLES]
    total, loss = sum(s.trained for s in SAMPLES), torch.zeros((), dtype=torch.float64)
    for rows in batches:
        part = model(**collate(rows, 0, packing, LENGTH)).loss
        part = part * sum(s.trained for row in rows for s in row) / total
        part.backward()
        loss += part.detach()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss, **grads}


def _cases() -> list[Any]:
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in ARCHITECTURES
    ]


@pytest.mark.parametrize("name", _cases())
def test_gradients_of_packed_samples(name: str) -> None:
    single = _made(name)
    packed, ours = copy.deepcopy(single), optimize(copy.deepcopy(single), codegen="eager")
    assert max(map(len, PACKED)) > 2
    assert not leaks(packed, LAST_ID, torch.device("cpu"))
    expected = _step(single, False)
    assert len(expected) > 10
    for model in (packed, ours):
        found = _step(model, True)
        assert found.keys() == expected.keys()
        for part, value in expected.items():
            off = (found[part] - value).norm()
            assert off <= 1e-10 * value.norm() + 1e-13, f"{part}: {off:.1e} of {value.norm():.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_cannot_pack_are_known(name: str) -> None:
    assert leaks(_made(name), LAST_ID, torch.device("cpu"))
