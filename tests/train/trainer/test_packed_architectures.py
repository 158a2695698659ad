"""Packed samples have the losses and gradients of single ones, in twenty architectures.

In fp64, but for what models compute in fp32 all the same (norms, softmaxes, the loss). A leak is
orders of magnitude larger, as the last lines of the test show. ``test_packed.py`` holds three
families to the error budget in the dtype that they are trained in.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright import optimize
from fusewright.compiler.packs import unpackable
from fusewright.train.data import IGNORED, Packs, Sample, collate, pack
from tests.models.architectures import LAST_ID, build
from tests.versions import transformers_before

QUICK = ("deepseek_v3", "gemma2", "llama")

ARCHITECTURES = {
    "cohere2": "sliding windows, and layers without positions",
    "deepseek_v3": "latent attention (MLA): values narrower than keys",
    "exaone4": "sliding windows, norms after the parts",
    "gemma2": "softcaps, sliding windows",
    "gemma3_text": "sliding windows, normed queries and keys",
    "glm4": "grouped heads, part of a head rotated",
    "gpt2": "learnt positions",
    "gpt_neox": "one weight for queries, keys and values",
    "qwen3_moe": "experts, normed queries and keys",
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

REFUSED = (
    "bart", "deepseek_v32", "deepseek_v4",
    # whose masks are made without positions before
    *(["bert"] if transformers_before("5.25") else []),
)  # fmt: skip
"""The trainer refuses to pack for them; eager mode lets samples see each other in some more."""

LENGTH = 32
SIZES = (13, 15, 4, 21, 2, 9)
"""They fill their packs: in fp64, masks of transformers make NaN of padded positions."""


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
    model.set_experts_implementation("eager")  # the others do not take fp64
    return model


def _step(model: Any, packing: bool, positions: bool = True) -> dict[str, Tensor]:
    """The mean loss of the trained tokens, and its gradients."""
    model.zero_grad()
    batches = [[p] for p in PACKED] if packing else [[[s]] for s in SAMPLES]
    total, loss = sum(s.trained for s in SAMPLES), torch.zeros((), dtype=torch.float64)
    for rows in batches:
        batch = collate(rows, 0, packing, sum(len(s.input_ids) for s in rows[0]))
        if not positions:
            del batch["position_ids"]
        part = model(**batch).loss
        part = part * sum(s.trained for row in rows for s in row) / total
        part.backward()
        loss += part.detach()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss, **grads}


def _cases() -> list[Any]:
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in ARCHITECTURES
    ]


@pytest.mark.long("deepseek_v3")
@pytest.mark.parametrize("name", _cases())
def test_gradients_of_packed_samples(name: str) -> None:
    single = _made(name)
    packed, ours = copy.deepcopy(single), optimize(copy.deepcopy(single), codegen="eager")
    assert [sum(len(s.input_ids) for s in p) for p in PACKED] == [LENGTH, LENGTH]
    assert not unpackable(single, optimized=False)
    expected = _step(single, False)
    assert len(expected) > 10
    assert all(value.isfinite().all() for value in expected.values())
    for model in (packed, ours):
        found = _step(model, True)
        assert found.keys() == expected.keys()
        assert _differing(found, expected) == []
    seen = _differing(_step(packed, True, positions=False), expected)
    assert len(seen) > len(expected) / 2, "without positions, samples see each other"


def _differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The loss or the gradients that are off."""
    return [
        f"{part}: {(found[part] - value).norm():.1e} of {value.norm():.1e}"
        for part, value in expected.items()
        if not (found[part] - value).norm() <= 1e-5 * value.norm() + 1e-9
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_cannot_pack_are_known(name: str) -> None:
    assert unpackable(build(name))


@pytest.mark.long("afmoe", "biogpt", "bloom", "mpt")
@pytest.mark.parametrize("name", ["afmoe", "biogpt", "bloom", "gpt_oss", "mpt", "opt"])
def test_architectures_that_pack_when_they_are_optimized(name: str) -> None:
    model = _made(name)
    assert unpackable(model, optimized=False).endswith("except in an optimized model")
    expected = _step(model, False)
    assert _differing(_step(model, True), expected)
    ours = optimize(model, codegen="eager", packs=True)
    assert _differing(_step(ours, True), expected) == []
