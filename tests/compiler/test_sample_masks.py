"""Masks of samples that share a row: transformers' values, and never made for attention."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor
from transformers import masking_utils

from fusewright import optimize, restore
from fusewright.compiler import sample_masks
from fusewright.compiler.sample_masks import SampleMask, lazy_mask
from fusewright.kernels.attention.first_keys import first_keys, sample_mask
from fusewright.kernels.op import sample_starts
from tests.explained import explain

WINDOW, TIME = 40, 1024
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": TIME,
}  # fmt: skip
SLIDES = {"sliding_window": WINDOW}
MIXED = {**SLIDES, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}


def _model(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    return transformers.AutoModelForCausalLM.from_config(config).train()


def _batch(*lengths: int) -> dict[str, Tensor]:
    """One row of samples of such lengths, and of what is left."""
    generator, rest = torch.Generator().manual_seed(1), TIME - sum(lengths)
    ids = torch.randint(SIZES["vocab_size"], (1, TIME), generator=generator)
    positions = torch.cat([torch.arange(n) for n in (*lengths, rest)])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def _step(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def _assert_close(ours: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    for name, expected in eager.items():
        atol = 2e-5 * float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=atol, msg=name)


def _largest(run: Callable[[], Any]) -> int:
    """The bytes of the largest piece of memory that PyTorch allocates."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {}),
        pytest.param("Gemma3Text", MIXED, marks=pytest.mark.long),
        pytest.param("Mistral", SLIDES, marks=pytest.mark.long),
        pytest.param("Qwen3", {"head_dim": 16}, marks=pytest.mark.long),
        pytest.param("Gemma2", {**MIXED, "attn_implementation": "eager"}, marks=pytest.mark.long),
    ],
)
def test_steps_are_eagers_and_make_no_mask(kind: str, options: dict[str, Any]) -> None:
    """Checkpoints in blocks, too; generation and a restored model are eager's."""
    model, batch = _model(kind, **options), _batch(300, 1, 212, 300)
    prompt = {"input_ids": batch["input_ids"][:, :5], "max_new_tokens": 3, "do_sample": False}
    eager, text = _step(model, batch), model.generate(**prompt)
    assert _largest(lambda: _step(model, batch)) >= TIME * TIME  # a byte for each pair, at least
    optimize(model, codegen="eager")
    for _ in range(2):
        _assert_close(_step(model, batch), eager)
    with mock.patch.object(SampleMask, "whole", side_effect=AssertionError):
        assert _largest(lambda: _step(model, batch)) < TIME * TIME / 2
        model.gradient_checkpointing_enable()
        _assert_close(_step(model, batch), eager)
        assert _largest(lambda: _step(model, batch)) < TIME * TIME / 2
    model.gradient_checkpointing_disable()
    assert {s.status for s in explain(model).sites if s.rule == "attention"} == {"rewritten"}
    assert torch.equal(model.generate(**prompt), text)
    restore(model)
    assert all(torch.equal(eager[n], t) for n, t in _step(model, batch).items())


def test_what_else_reads_a_mask_finds_it() -> None:
    """Dropout, which no rule takes, and a hook: the original code runs, with one mask for all."""
    model, batch = _model("Llama", attention_dropout=0.25), _batch(500, 24)
    plain, seen = copy.deepcopy(model), []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        mask = kwargs["attention_mask"]
        seen.append((int(mask.sum()), mask[0, 0, 501].tolist(), mask.dtype, tuple(mask.shape)))

    expected = _step(plain, batch)
    optimize(model, codegen="eager")
    _assert_close(_step(model, batch), expected)
    reasons = [b.reason for b in explain(model).bypasses]
    assert any("reads the mask of samples" in reason for reason in reasons)
    with mock.patch.object(sample_masks, "sample_mask", wraps=sample_mask) as made:
        _assert_close(_step(model, batch), expected)
    assert made.call_count == 1  # for both layers, forward and backward
    for each in (model, plain):
        each.model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
        _assert_close(_step(each, batch), expected)
    assert seen[0] == seen[1]


# --- the masks themselves -------------------------------------------------------------------------


def _arguments(implementation: str, **options: Any) -> tuple[dict[str, Any], Tensor]:
    config = transformers.MistralConfig(**SIZES, **SLIDES, **options)
    config._attn_implementation = implementation
    positions = torch.cat([torch.arange(n) for n in (50, 1, 45)]).expand(2, -1).clone()
    positions[1] = torch.arange(96) + 7
    inputs = torch.zeros(2, 96, 4, dtype=torch.bfloat16)
    arguments = {"config": config, "inputs_embeds": inputs, "position_ids": positions}
    parameters = inspect.signature(masking_utils.create_causal_mask).parameters
    cache = "cache" if "cache" in parameters else "past_key_values"  # its older name
    return {**arguments, "attention_mask": None, cache: None}, sample_starts(positions)


@pytest.fixture
def _none_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_masks, "SHORT", 1)


@pytest.mark.usefixtures("_none_is_short")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["create_causal_mask", "create_sliding_window_causal_mask"])
def test_values_are_transformers(name: str, implementation: str) -> None:
    function = getattr(masking_utils, name)
    arguments, starts = _arguments(implementation)
    expected = function(**arguments)
    mask = lazy_mask(function, arguments, starts)
    assert mask is not None
    assert (mask.shape, mask.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(mask + 0, expected + 0)


@pytest.mark.usefixtures("_none_is_short")
def test_other_masks_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, starts = _arguments("sdpa", attention_chunk_size=20)

    def also(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key > 3

    causal = masking_utils.create_causal_mask

    @functools.wraps(causal)
    def shifted(**given: Any) -> Any:
        return causal(**given).roll(1, -1)

    assert lazy_mask(causal, {**arguments, "and_mask_function": also}, starts) is None
    assert lazy_mask(causal, {**arguments, "attention_mask": starts > -1}, starts) is None
    assert lazy_mask(masking_utils.create_chunked_causal_mask, arguments, starts) is None
    assert lazy_mask(masking_utils.create_bidirectional_mask, arguments, starts) is None
    assert lazy_mask(shifted, arguments, starts) is None
    arguments["config"]._attn_implementation = "flash_attention_2"
    assert lazy_mask(causal, arguments, starts) is None
    arguments, starts = _arguments("sdpa")
    assert lazy_mask(causal, arguments, starts) is not None
    monkeypatch.setattr(sample_masks, "SHORT", 97)
    assert lazy_mask(causal, arguments, starts) is None


@pytest.fixture
def keys() -> Tensor:
    return first_keys(torch.tensor([[0, 0, 2, 2, 2]], dtype=torch.int32))


def test_readers_find_values(keys: Tensor) -> None:
    mask, values = SampleMask(keys, torch.bool), sample_mask(keys)
    assert isinstance(mask.detach(), SampleMask)
    assert torch.equal(~mask, ~values)
    assert torch.equal(torch.cat([mask, mask]), torch.cat([values, values]))
    assert mask.to("cpu") is mask
    assert mask.first() is keys
    assert mask.whole() is mask.whole()
    assert mask.tolist() == values.tolist()
    assert repr(mask) == repr(values)
    assert torch.equal(copy.deepcopy(mask), values)
    assert (mask.numpy() == values.numpy()).all()
    assert mask.first() is None  # an array may be written to


def test_a_written_mask_is_what_was_written(keys: Tensor) -> None:
    mask = SampleMask(keys, torch.bool)
    other = mask.detach()
    mask[..., 0].fill_(True)
    written = sample_mask(keys)
    written[..., 0] = True
    for each in (mask, other):
        assert each.first() is None
        args, kwargs, places = sample_masks.with_first_keys((each,), {"mask": each})
        assert not places
        (given,), named = sample_masks.with_whole_masks(args, kwargs)
        assert torch.equal(given, written)
        assert named["mask"] is given


def test_arguments(keys: Tensor) -> None:
    """Masks in places of their own become first keys, others values; the rest is untouched."""
    mask, x = SampleMask(keys, torch.bool), torch.zeros(1)
    args, kwargs = (x, mask), {"mask": SampleMask(keys, torch.float16), "all": {"full": mask}}
    args, kwargs, places = sample_masks.with_first_keys(args, kwargs)
    assert places == ((1, torch.bool), ("mask", torch.float16))
    args, kwargs = sample_masks.with_whole_masks(args, kwargs)
    assert args[0] is x
    assert args[1] is kwargs["mask"] is keys
    assert torch.equal(kwargs["all"]["full"], sample_mask(keys))
    assert type(kwargs["all"]["full"]) is Tensor

    def forward(module: Any, x: Tensor, other: Tensor, **rest: Any) -> Any:
        return module, x, other, rest

    made = sample_masks.making_masks(forward, places)("block", *args, **kwargs)
    assert made[:2] == ("block", x)
    assert torch.equal(made[2], sample_mask(keys))
    assert torch.equal(made[3]["mask"], sample_mask(keys, torch.float16))
    assert sample_masks.with_whole_masks((x,), {"y": 1}) == ((x,), {"y": 1})
