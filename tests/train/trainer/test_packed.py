"""Packed rows train as single rows do: the same losses and gradients, within the error budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from fusewright import optimize
from fusewright.compiler.packs import unpackable
from fusewright.kernels.tolerance import FACTOR, errors, unit
from fusewright.train.data import IGNORED, Pack, Packs, Sample, collate, pack
from tests.models.zoo import FAMILIES, build

ARCHITECTURES = ("llama", pytest.param("qwen3", marks=pytest.mark.slow), "gemma2")
"""Plain; with normed queries; with softcaps, and a window that is shorter than the samples."""

LENGTH = 64
SIZES = (17, 30, 5, 41, 2, 23, 9, 58, 12, 33)


def sample(length: int, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 211, (length,), generator=generator).tolist()
    prompt = max(1, length // 3)
    return Sample(ids, [IGNORED] * prompt + ids[prompt:])


SAMPLES = [sample(n, n) for n in SIZES]
PACKED = list(Packs(SAMPLES, pack(SIZES, LENGTH)))
SINGLE = [[s] for s in SAMPLES]


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    family = next(f for f in FAMILIES if f.name == request.param)
    made: Any = build(family, lora=False)
    made.config.use_cache = False
    return made


@pytest.fixture(params=["eager", "optimized"])
def prepared(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    if request.param == "eager":
        return lambda model: model
    return lambda model: optimize(model, codegen="eager")


def losses(model: Any, packs: Sequence[Pack], packing: bool) -> list[Tensor]:
    """The loss of each of ``SAMPLES``, each pack being run once for every sample in it."""
    found: dict[int, Tensor] = {}
    for one in packs:
        for chosen in one:
            only = [
                s if s is chosen else Sample(s.input_ids, [IGNORED] * len(s.labels)) for s in one
            ]
            batch = collate([only], 0, packing, LENGTH)
            found[id(chosen)] = model(**batch).loss
    return [found[id(s)] for s in SAMPLES]


def gradients(model: Any) -> dict[str, Tensor]:
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def measured(model: Any, packs: Sequence[Pack], packing: bool) -> dict[str, Tensor]:
    """Every sample's loss, and the gradients of their mean by token."""
    each = losses(model, packs, packing)
    weights = [s.trained for s in SAMPLES]
    total: Any = sum(x * w for x, w in zip(each, weights, strict=True)) / sum(weights)
    total.backward()
    return {"loss": torch.stack(each).detach(), **gradients(model)}


DRAWS = 8
"""Weights that a budget is judged by: the error of a whole model at one is a matter of luck, its
root mean square over several is not."""

Measure = Callable[[Any], dict[str, Tensor]]
"""The gradients of a model, and ``loss`` or losses."""


def judge(model: Any, prepared: Callable[[Any], Any], ours: Measure, theirs: Measure) -> None:
    """Hold ``ours`` of the prepared model to the budget of ``theirs`` of the plain one."""
    exact, single = copy.deepcopy(model).double(), copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    assert not unpackable(model, optimized=False)
    packed = prepared(model)
    found: dict[str, list[tuple[Tensor, ...]]] = {}
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        with torch.no_grad():
            models = (packed, single, exact)
            for first, *same in zip(start, *(m.parameters() for m in models), strict=True):
                changed = first * (1 + 0.1 * torch.randn(first.shape, generator=generator))
                for p in same:
                    p.copy_(changed)
        results = (ours(packed), theirs(single), theirs(exact))
        assert results[0].keys() == results[1].keys()
        for name in results[0]:
            found.setdefault(name, []).append(tuple(values[name] for values in results))
    for name, draws in found.items():
        mine, eager = (
            sum(errors(results[i], results[2]).rms ** 2 for results in draws) ** 0.5 / DRAWS**0.5
            for i in (0, 1)
        )
        limit = FACTOR * eager + unit(torch.float32)
        assert mine <= limit, f"{name}: {mine:.2e}, eager {eager:.2e}"


@pytest.mark.long("gemma2-optimized", "llama-optimized")
def test_losses_and_gradients_of_packed_samples(model: Any, prepared: Callable[[Any], Any]) -> None:
    assert max(map(len, PACKED)) > 2
    judge(
        model, prepared, lambda m: measured(m, PACKED, True), lambda m: measured(m, SINGLE, False)
    )


@pytest.mark.long("llama-optimized")
@pytest.mark.long("gemma2-optimized")
def test_a_batch_of_packs_is_the_mean_of_its_samples(
    model: Any, prepared: Callable[[Any], Any]
) -> None:
    """As it is trained: all packs in one batch, and all labels at once."""

    def run(model: Any, packs: Sequence[Pack], packing: bool) -> dict[str, Tensor]:
        loss = model(**collate(packs, 0, packing, LENGTH)).loss
        loss.backward()
        return {"loss": loss.detach(), **gradients(model)}

    judge(model, prepared, lambda m: run(m, PACKED, True), lambda m: run(m, SINGLE, False))


class KeptGradients(TrainerCallback):
    """What the optimizer gets."""

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.long("llama-optimized-packed", "llama-eager-padded", "llama-eager-packed")
@pytest.mark.long(
    "gemma2-eager-packed", "gemma2-eager-padded", "gemma2-optimized-packed",
    "gemma2-optimized-padded", "llama-optimized-padded",
)  # fmt: skip
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_eight_batches_of_one_are_one_of_eight(
    model: Any, prepared: Callable[[Any], Any], packing: bool, tmp_path: Path
) -> None:
    """The gradients that the trainer hands to its optimizer."""
    several = PACKED * 2 if packing else SINGLE
    packs = several[:8]
    assert len(packs) == 8
    assert len({sum(s.trained for s in p) for p in packs}) > 3  # a mean of means would differ

    def step(model: Any, micro: int) -> dict[str, Tensor]:
        args = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=micro, max_steps=1,
            gradient_accumulation_steps=8 // micro, optim="sgd", learning_rate=0.0,
            max_grad_norm=0.0, save_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, use_cpu=True, label_names=["labels"],
        )  # fmt: skip
        collator = partial(collate, pad_id=0, packing=packing, length=LENGTH)
        kept = KeptGradients()
        Trainer(model, args, train_dataset=packs, data_collator=collator, callbacks=[kept]).train()
        return kept.found

    judge(model, prepared, lambda m: step(m, 1), lambda m: step(m, 8))
