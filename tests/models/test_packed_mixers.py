"""Packed samples have the losses and gradients of single ones where layers are recurrent, too.

In fp32, of what is computed in it anyway; a leak is orders of magnitude larger, as the last tests
show: they let one op ignore where samples begin.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from fusewright import OptimizeError, optimize, restore
from fusewright.compiler.copies import opaque_calls
from fusewright.compiler.packs import unpackable
from fusewright.graph.opaque import functions
from tests.explained import explain

from ..versions import transformers_before
from .architectures import LAST_ID, build, shrink

TEXT = {
    "mamba": {"short_conv", "selective_scan"},
    "mamba2": {"short_conv", "selective_scan"},
    "falcon_mamba": {"short_conv", "selective_scan"},
    "jamba": {"short_conv", "selective_scan"},
    "bamba": {"short_conv", "selective_scan"},
    "granitemoehybrid": {"short_conv", "selective_scan"},
    "nemotron_h": {"short_conv", "selective_scan"},
    "zamba2": {"short_conv", "selective_scan"},
    "lfm2": {"short_conv"},
    "qwen3_next": {"short_conv", "gated_delta_rule"},
    "qwen3_5_text": {"short_conv", "gated_delta_rule"},
    "kimi_linear": {"short_conv", "kda"},
}
"""Which rules rewrite what mixes positions."""

MULTIMODAL = ("qwen3_5", "lfm2_vl", "gemma3", "qwen3_vl", "llava")
LONG = tuple(n for n in (*TEXT, *MULTIMODAL) if n != "mamba2")
AGAIN = ("jamba", "bamba", "granitemoehybrid", "nemotron_h", "zamba2", "qwen3_5_text", "qwen3_5",
         "lfm2_vl", "qwen3_vl")  # fmt: skip
"""What mixes positions as another one does that CI tries."""


FORGETS = transformers_before("5.24")
"""Whether transformers' checkpoints are around a block as we replace it, and forget its input."""


INDUCTOR_LATE = pytest.mark.xfail(
    FORGETS, strict=True,
    reason="Inductor refuses the second size, and the block runs as it was from then on: also "
    "where a checkpoint around it repeats an earlier call that was compiled",
)  # fmt: skip


def _param(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow if name.split("-")[0] in AGAIN else ())


SIZES = (9, 71, 5, 66)
"""Chunks of scans are 64 positions: samples begin in them, and go on across them."""

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _made(name: str) -> Any:
    if name in TEXT:
        model: Any = build(name)
    else:
        config = shrink(CONFIG_MAPPING[name]())
        torch.manual_seed(0)
        model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config).float().train()
    model.config.use_cache = model.config.get_text_config().use_cache = False
    _remember(model)
    return model


@torch.no_grad()
def _remember(model: Any) -> None:
    """Let chunked scans have states that outlive samples, and that count beside what skips them."""
    # as they are initialized, the sum over earlier positions is below the tolerance of gradients
    for mixer in model.modules():
        if hasattr(mixer, "in_proj") and getattr(mixer, "A_log", torch.zeros(1, 1)).dim() == 1:
            mixer.A_log.fill_(math.log(0.01))
            mixer.dt_bias.fill_(1.0)
            mixer.in_proj.weight.mul_(5)


def _batch(samples: list[Tensor], positions: bool = True) -> dict[str, Tensor]:
    labels = [torch.cat([torch.tensor([-100]), ids[1:]]) for ids in samples]
    batch = {"input_ids": torch.cat(samples)[None], "labels": torch.cat(labels)[None]}
    if positions:
        places = [torch.arange(len(ids)) for ids in samples]
        batch["position_ids"] = torch.cat(places)[None]
    return batch


def _samples(sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, LAST_ID, (n,), generator=generator) for n in sizes]


def _step(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The loss over all labels, and its gradients."""
    model.zero_grad()
    counts = [(b["labels"] != -100).sum() for b in batches]
    total = torch.zeros(())
    for batch, count in zip(batches, counts, strict=True):
        loss = model(**batch).loss * count / sum(counts)
        loss.backward()
        total += loss.detach()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": total, **grads}


def _steps_in_one(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """As ``_step``, with all forwards before the backwards."""
    model.zero_grad()
    counts = [int((b["labels"] != -100).sum()) for b in batches]
    losses = [model(**b).loss * n / sum(counts) for b, n in zip(batches, counts, strict=True)]
    for loss in reversed(losses):
        loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": torch.stack([x.detach() for x in losses]).sum(), **grads}


def _two_batches() -> list[dict[str, Tensor]]:
    """One whose samples share a row, and one of a single sample."""
    samples = _samples((9, 71, 30))
    return [_batch(samples[:2]), _batch(samples[2:], positions=False)]


def _single(model: Any, sizes: tuple[int, ...] = SIZES) -> dict[str, Tensor]:
    return _step(model, [_batch([ids], positions=False) for ids in _samples(sizes)])


def _differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    largest = max(float(v.norm()) for v in expected.values())
    return [
        f"{part}: {(found[part] - value).norm():.1e} of {value.norm():.1e}"
        for part, value in expected.items()
        if not (found[part] - value).norm() <= 2e-5 * value.norm() + 1e-7 * largest
    ]


@pytest.mark.long("mamba2")
@pytest.mark.long(*LONG)
@pytest.mark.parametrize("name", map(_param, [*TEXT, *MULTIMODAL]))
def test_gradients_of_packed_samples(name: str) -> None:
    model = _made(name)
    expected = _single(model)
    assert len(expected) > 10
    leaky = name in TEXT or name in ("qwen3_5", "lfm2_vl")
    if leaky:
        assert _differing(_step(model, [_batch(_samples())]), expected), "eager mode leaks"
    optimize(model, codegen="eager")
    assert _differing(_step(model, [_batch(_samples())]), expected) == []
    report = explain(model)
    sites = {s.rule for s in report.sites if s.status == "rewritten"}
    assert TEXT.get(name, set()) <= sites, str(report)
    # and rows with one sample run the graphs that know nothing of it
    assert _differing(_single(model), expected) == []
    restore(model)
    assert unpackable(model) == ""
    assert ("layers.0" in unpackable(model, optimized=False)) == leaky


KINDS = {c.name: c for c in (*functions.CONVENTIONS, functions.CONVOLUTION)}
FAULTS = {
    "short_conv_call": TEXT,
    "scan_call": ("mamba", "falcon_mamba", "jamba"),
    "chunk_scan_call": ("mamba2", "bamba", "granitemoehybrid", "nemotron_h", "zamba2"),
    "delta_rule_call": ("qwen3_next", "qwen3_5_text", "kimi_linear"),
}
"""What may be called without segments by mistake, and in which models."""


@contextmanager
def _ignoring(kind: str) -> Iterator[None]:
    """Let what follows a convention ignore segments."""
    original = opaque_calls.segmented_leaf

    def ignores(function: Any) -> Any:
        if functions.segmented_convention(function) is not KINDS[kind]:
            return original(function)
        call = functions.leaf(function) if functions.convention(function) else function
        return lambda segments, *args, **kwargs: call(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opaque_calls, "segmented_leaf", ignores)
        yield


FAULTY = [f"{name}-{kind}" for kind, names in FAULTS.items() for name in names]


@pytest.mark.long(*FAULTY)
@pytest.mark.parametrize("fault", map(_param, FAULTY))
def test_an_op_that_ignores_segments_is_found(fault: str) -> None:
    name, kind = fault.split("-")
    model = _made(name)
    expected = _single(model, (9, 71))
    with _ignoring(kind):
        optimize(model, codegen="eager")
        assert _differing(_step(model, [_batch(_samples((9, 71)))]), expected)


@pytest.mark.long("mamba2-inductor", "mamba-eager", "lfm2-eager", "qwen3_next-eager")
@pytest.mark.parametrize(
    ("name", "codegen"),
    [
        pytest.param("mamba2", "inductor", marks=INDUCTOR_LATE),
        ("mamba", "eager"),
        ("lfm2", "eager"),
        ("qwen3_next", "eager"),
    ],
)
def test_gradient_checkpointing_and_accumulation(name: str, codegen: str) -> None:
    """A block runs once more in backward, when rows of another step have been given."""
    model = _made(name)
    sizes = [(9, 71), (30,), (5, 66)]
    expected = _single(model, (9, 71, 30, 5, 66))
    model.gradient_checkpointing_enable()
    optimize(model, codegen=codegen)
    samples = iter(_samples((9, 71, 30, 5, 66)))
    batches = [_batch([next(samples) for _ in group]) for group in sizes]
    assert _differing(_steps_in_one(model, batches), expected) == []


def _checkpointed(blocks: Any, **options: Any) -> None:
    """Put a checkpoint around each block, as a training engine does."""
    for block in blocks:
        inner = block.forward

        def forward(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
            return checkpoint(functools.partial(inner, **kwargs), *args, **options)

        block.forward = forward


def test_a_checkpoint_around_a_block_knows_its_step() -> None:
    model = _made("mamba2")
    expected = _single(model, (9, 71, 30))
    optimize(model, codegen="eager")
    _checkpointed(model.backbone.layers, use_reentrant=False)
    assert _differing(_steps_in_one(model, _two_batches()), expected) == []


def test_a_checkpoint_that_forgets_its_input_is_refused() -> None:
    model = _made("mamba2")
    optimize(model, codegen="eager")
    _checkpointed(model.backbone.layers, use_reentrant=True)
    model.enable_input_require_grads()
    loss = model(**_batch(_samples((9, 20)))).loss
    with pytest.raises(OptimizeError, match="use_reentrant=False"):
        loss.backward()


def _as_it_was(model: Any) -> list[Any]:
    """Let each block run its original code: a hook in it bypasses what is captured."""
    return [b.mixer.in_proj.register_forward_hook(lambda *_: None) for b in model.backbone.layers]


@pytest.mark.long
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_a_block_that_runs_as_it_was_takes_segments(options: Any) -> None:
    """Also where its own checkpoint runs it again, when rows of another step have been given."""
    model = _made("mamba2")
    expected = _single(model, (9, 71, 30))
    if options is not None:
        model.gradient_checkpointing_enable(options)
        model.enable_input_require_grads()
    optimize(model, codegen="eager")
    handles = _as_it_was(model)
    batches = _two_batches()
    if options == {"use_reentrant": True} and FORGETS:
        with pytest.raises(OptimizeError, match="use_reentrant=False"):
            _steps_in_one(model, batches)
        return
    assert _differing(_steps_in_one(model, batches), expected) == []
    assert any("a hook" in b.reason for b in explain(model).bypasses)
    for handle in handles:
        handle.remove()
    assert _differing(_steps_in_one(model, batches), expected) == []


def test_a_checkpoint_inside_that_cannot_be_given_segments_is_refused() -> None:
    model = _made("mamba2")
    optimize(model, codegen="eager")
    _as_it_was(model)
    for block in model.backbone.layers:
        block.mixer.gradient_checkpointing = True
    with pytest.raises(OptimizeError, match="a checkpoint in Mamba2Mixer: do not pack"):
        model(**_batch(_samples((9, 71))))
    _step(model, [_batch(_samples((9,)))])  # rows of one sample


@pytest.mark.long
def test_packs_of_any_lengths_run_the_same_graphs() -> None:
    model = optimize(_made("mamba2"), codegen="eager")
    counts = []
    for sizes in ((9, 71), (30, 4, 4), (5, 66, 12, 1, 1), (130, 20)):
        rows = [_batch(_samples(sizes)), _batch(_samples(sizes[::-1]))]
        _step(model, [{name: torch.cat([r[name] for r in rows]) for name in rows[0]}])
        counts.append(explain(model).graphs)
    assert counts[1:] == counts[:1] * 3


@pytest.mark.long
def test_rows_with_padding_are_as_in_eager_mode() -> None:
    """With a mask, positions that start again say nothing."""
    model = _made("mamba2")
    eager = copy.deepcopy(model)
    optimize(model, codegen="eager")
    batch = _batch(_samples((9, 20)))
    mask = torch.ones_like(batch["input_ids"])
    mask[:, :9] = 0
    batch["attention_mask"] = mask
    batch["labels"][mask == 0] = -100
    assert _differing(_step(model, [batch]), _step(eager, [batch])) == []


@pytest.mark.long
@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_what_else_tells_of_samples_says_no_more(name: str) -> None:
    """A collator's keywords for libraries' kernels, which models refuse where there are none."""
    model = _made(name)
    expected = _single(model, (9, 71))
    batch = _batch(_samples((9, 71)))
    ends = torch.tensor([0, 9, 80], dtype=torch.int32)
    more = {
        "seq_idx": (batch["position_ids"] == 0).cumsum(1).int() - 1,
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 71, "max_length_k": 71,
    }  # fmt: skip
    if name == "mamba2" and transformers_before("5.25"):  # whose mixers are given no keywords
        assert _differing(_step(model, [{**batch, **more}]), expected)
    elif not transformers_before("5.24"):  # which take them without a word
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            _step(model, [{**batch, **more}])
    optimize(model, codegen="eager")
    assert _differing(_step(model, [{**batch, **more}]), expected) == []


@pytest.mark.long
def test_a_copy_and_a_second_model_take_their_own_segments() -> None:
    model = _made("mamba2")
    other = _made("mamba2")
    expected = _single(model, (9, 71)), _single(other, (5, 66, 12))
    optimize(model, codegen="eager")
    optimize(other, codegen="eager")
    copied = copy.deepcopy(model)
    for _ in range(2):
        assert _differing(_step(model, [_batch(_samples((9, 71)))]), expected[0]) == []
        assert _differing(_step(other, [_batch(_samples((5, 66, 12)))]), expected[1]) == []
        assert _differing(_step(copied, [_batch(_samples((9, 71)))]), expected[0]) == []
    with torch.no_grad():
        model.eval()
        packed = model(**_batch(_samples((9, 71)))).logits[0]
        single = [model(input_ids=ids[None]).logits[0] for ids in _samples((9, 71))]
    torch.testing.assert_close(packed, torch.cat(single), rtol=1e-4, atol=1e-5)


def test_models_that_only_attend_are_as_in_eager_mode_but_where_packs_are_asked_for() -> None:
    eager = build("opt")
    batch = _batch(_samples((9, 7)))
    apart = [_batch([s]) for s in _samples((9, 7))]
    with torch.no_grad():
        plain = eager(**batch, use_cache=False).logits
        ours = optimize(copy.deepcopy(eager), codegen="eager")
        torch.testing.assert_close(ours(**batch, use_cache=False).logits, plain)
        packs = optimize(ours, codegen="eager", packs=True)(**batch, use_cache=False).logits
        alone = torch.cat([eager(**one, use_cache=False).logits for one in apart], 1)
    torch.testing.assert_close(packs, alone)
    assert not torch.allclose(plain, alone, atol=1e-2)


@pytest.mark.long
def test_positions_of_one_sample_cost_no_rewrite_where_a_cache_is_made_by_default() -> None:
    model = build("qwen3_next")
    counts = []
    for more in ({}, {"position_ids": torch.arange(9)[None]}):
        ours = optimize(copy.deepcopy(model), codegen="eager")
        ids = _samples((9,))[0][None]
        ours(input_ids=ids, labels=ids, **more).loss.backward()
        counts.append(explain(ours).by_rule())
    assert counts[0] == counts[1]


def test_a_block_that_is_called_by_itself_goes_by_its_own_positions(tmp_path: Any) -> None:
    model = optimize(build("qwen3_next"), codegen="eager", passes=(), verify="off")
    batch = _batch(_samples((9, 7)))
    with torch.no_grad():
        states = model(**batch, use_cache=False, output_hidden_states=True).hidden_states
        x, block, one = states[0], model.model.layers[0], torch.arange(16)[None]
        turned = model.model.rotary_emb(x, one)
        packed = block(x, position_embeddings=turned, position_ids=batch["position_ids"])
        whole = block(x, position_embeddings=turned, position_ids=one)
    assert not torch.equal(packed, whole)
    torch.testing.assert_close(whole, restore(model).model.layers[0](x, position_embeddings=turned))
    torch.save(list(states), tmp_path / "states.pt")
    assert len(torch.load(tmp_path / "states.pt")) == len(states)


UNPACKABLE = {
    "rwkv": "rwkv.blocks.0.attention (RwkvSelfAttention) mixes positions",
    "minimax": "model.layers.1.self_attn (MiniMaxLightningAttention) mixes positions",
    "recurrent_gemma": "temporal_block (RecurrentGemmaRecurrentBlock) has a convolution",
    "zaya": "qkv_proj (ZayaCCAProjection) has a convolution",
    "bart": "BartForCausalLM makes its attention mask without position_ids",
    "deepseek_v32": "self_attn.indexer (DeepseekV32Indexer) mixes positions",
    "blt": "BltForCausalLM has several stacks of layers",
}
"""Mixers that take no segments, and the words of their refusals."""

if transformers_before("5.25"):
    UNPACKABLE["bert"] = "BertLMHeadModel makes its attention mask without position_ids"


@pytest.mark.parametrize("name", UNPACKABLE)
def test_mixers_that_take_no_segments_are_refused_and_named(name: str) -> None:
    model: Any = build(name)
    with _uncalled(model), pytest.raises(OptimizeError) as caught:
        optimize(model, codegen="eager", packs=True)
    message = str(caught.value)
    assert "samples that share a row would see each other" in message
    assert UNPACKABLE[name] in message
    assert "leave packs=True out" in message
    assert all("forward" not in m.__dict__ for m in model.modules())


@contextmanager
def _uncalled(model: nn.Module) -> Iterator[None]:
    """Fail if a module is called."""

    def called(module: nn.Module, args: Any) -> None:
        pytest.fail(f"{type(module).__name__} was called")

    handles = [m.register_forward_pre_hook(called) for m in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "opt", "mamba2", "qwen3_next", "nemotron_h"])
def test_models_that_pack_are_not_called_to_find_out(name: str) -> None:
    model: Any = build(name)
    with _uncalled(model):
        optimize(model, codegen="eager", packs=True)


class _Guarded(nn.Module):
    """Calls what it holds, after a look at values that no capture can follow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(-x if float(x.sum()) > 1e9 else x)


def test_a_block_in_parts_takes_segments_under_its_own_checkpoint() -> None:
    model = _made("lfm2")
    for layer in model.model.layers:
        layer.feed_forward = _Guarded(layer.feed_forward)
    expected = _single(model, (9, 71))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimize(model, codegen="eager")
    batch = [_batch(_samples((9, 71)))]
    for _ in range(2):  # at the second one its parts are captured
        assert _differing(_step(model, batch), expected) == []


def test_packs_without_a_word_about_the_cache() -> None:
    """With a cache, transformers' masks take no notice of positions."""
    model = build("llama")
    expected = _single(model, (9, 71))
    assert model.config.use_cache
    optimize(model, codegen="eager", packs=True)
    batch = _batch(_samples((9, 71)))
    assert _differing(_step(model, [batch]), expected) == []
    ids, positions = batch["input_ids"], batch["position_ids"]
    loss = model(ids, None, positions, labels=batch["labels"]).loss
    torch.testing.assert_close(loss.detach(), expected["loss"])


def _with_forwards_of_its_own(model: Any) -> Any:
    """No copy is made of a forward that an instance has, which says nothing of its code."""
    for block in model.backbone.layers:
        block.mixer.forward = functools.partial(type(block.mixer).forward, block.mixer)
    return model


def test_a_mixer_whose_instance_has_a_forward_is_refused() -> None:
    model = _with_forwards_of_its_own(_made("mamba2"))
    named = r"backbone\.layers\.0\.mixer \(Mamba2Mixer\)"
    with pytest.raises(OptimizeError, match=named):
        optimize(model, codegen="eager", packs=True)


def test_forward_mode_differentiation_is_as_of_samples_by_themselves() -> None:
    model = _made("mamba2")
    batch = _batch(_samples((9, 20)))
    x = model.get_input_embeddings()(batch["input_ids"]).detach()
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def of(x: Tensor, tangent: Tensor, **more: Any) -> Any:
        return torch.func.jvp(lambda x: model(inputs_embeds=x, **more).logits, (x,), (tangent,))

    alone = [of(x[:, rows], tangent[:, rows]) for rows in (slice(0, 9), slice(9, None))]
    leaking = of(x, tangent, position_ids=batch["position_ids"])
    optimize(model, codegen="eager")
    packed = of(x, tangent, position_ids=batch["position_ids"])
    for ours, eager, parts in zip(packed, leaking, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(parts, 1), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours, eager, rtol=1e-4, atol=1e-5)
