"""Training calls that say nothing about the cache that models make by default run without it."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from dataclasses import fields
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from fusewright import optimize
from fusewright.compiler.bypass import CACHE_ARGUMENTS
from fusewright.compiler.regions import find
from tests.explained import explain

from ..models.architectures import shrink
from ..models.tiny import Stack, assert_equal_losses, pair
from ..models.zoo import FAMILIES, build
from ..versions import transformers_before
from .test_flat_models import Block

IDS = torch.randint(3, 200, (2, 13), generator=torch.Generator().manual_seed(0))
CACHE = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in CACHE_ARGUMENTS)
"""What transformers calls a cache: past_key_values in 5.17, and later cache."""
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _pair() -> tuple[nn.Module, nn.Module]:
    """Captured, and not rewritten: what is asked is who gets a cache."""
    ours, eager = (build(FAMILIES[0], lora=False) for _ in range(2))
    return optimize(ours, passes=()), eager


def _kinds(outputs: Any) -> list[str]:
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return ["Tensor" if isinstance(v, Tensor) else type(v).__name__ for v in values]


@pytest.mark.parametrize("labels", [None, IDS])
@pytest.mark.parametrize("training", [True, False])
def test_the_outputs_have_the_structure_of_eager_mode(
    labels: Tensor | None, training: bool
) -> None:
    ours, eager = (m.train(training) for m in _pair())
    for return_dict in (True, False, True):
        inputs = {
            "input_ids": IDS, "labels": labels, "return_dict": return_dict,
            "output_hidden_states": True,
        }  # fmt: skip
        mine, theirs = ours(**inputs), eager(**inputs)
        assert _kinds(mine) == _kinds(theirs)
        assert "DynamicCache" in _kinds(theirs)
        if return_dict:
            assert list(mine) == list(theirs)


USES: dict[str, Any] = {
    "length": lambda c: c.get_seq_length(),
    "len": len,
    "keys": lambda c: c.layers[1].keys.sum().item(),
    "copy": lambda c: copy.deepcopy(c).layers[0].values.tolist(),
    "pickle": lambda c: pickle.loads(pickle.dumps(c)).layers[0].values.tolist(),
    "write": lambda c: setattr(c, "name", 3),
    "crop": lambda c: c.crop(-3) or c.layers[0].keys.shape,
}


def test_a_cache_that_was_not_made_raises_an_error_when_it_is_used() -> None:
    ours, eager = _pair()
    for inputs in ({}, {"labels": IDS}):
        outputs = ours(IDS, **inputs)
        cache = outputs[CACHE]
        assert outputs.to_tuple()[-1] is getattr(outputs, CACHE) is cache
        assert isinstance(cache, tf.DynamicCache)
        assert cache
        assert not hasattr(cache, "dtype")  # which wrappers for mixed precision ask
        for use in USES.values():
            with pytest.raises(RuntimeError, match="pass use_cache=True"):
                use(cache)
        with pytest.raises(RuntimeError, match="pass use_cache=True"):
            ours(IDS, **{CACHE: cache})
    mine, theirs = (m(IDS, use_cache=True)[CACHE] for m in (ours, eager))
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys)


def test_each_module_is_called_once() -> None:
    ours, _ = _pair()
    calls: Counter[str] = Counter()
    for name, module in ours.named_modules():
        if name in ("", "model.layers.1"):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    ours(IDS, labels=IDS).loss.backward()
    ours(IDS).logits.sum().backward()
    assert set(calls.values()) == {2}


def test_the_switch_in_the_configuration_may_be_thrown_at_any_time() -> None:
    ours, eager = _pair()
    for on in (False, True, False):
        ours.config.use_cache = eager.config.use_cache = on
        mine = _kinds(ours(input_ids=IDS, labels=IDS))
        assert mine == ["Tensor", "Tensor", *["DynamicCache"] * on]
        assert _kinds(ours(input_ids=IDS)) == _kinds(eager(input_ids=IDS))
    assert _kinds(ours(input_ids=IDS, labels=IDS, use_cache=True))[-1] == "DynamicCache"


@pytest.mark.long("one attention twice-True", "one index twice-True", "one module twice-True")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "how", ["one module twice", "one attention twice", "one index twice", "one index below"]
)
def test_layers_that_share_a_place_in_the_cache_keep_it(how: str, late: bool) -> None:
    models = _pair()
    if late:  # after a step in which none did
        models[0](input_ids=IDS, labels=IDS)
    for model in models:
        layers = model.model.layers
        if how == "one module twice":
            layers[1] = layers[0]
        elif how == "one attention twice":
            layers[1].self_attn = layers[0].self_attn
        else:
            layers[1].self_attn.layer_idx = 0
        if how == "one index below":
            for layer in layers:
                layer.self_attn = Below(layer.self_attn)
    ours = optimize(models[0], passes=())
    eager = models[1]
    plain = eager(input_ids=IDS, labels=IDS, use_cache=False).loss
    for _ in range(2):
        mine, theirs = (m(input_ids=IDS, labels=IDS).loss for m in (ours, eager))
        torch.testing.assert_close(mine, theirs)
    assert not torch.isclose(plain, theirs)  # the second layer reads what the first one wrote
    assert any("cache" in b.reason for b in explain(ours).bypasses)


class Below(nn.Module):
    """Another level of modules."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Custom(nn.Module):
    """A model with a cache of its own, whose outputs depend on whether there is one."""

    def __init__(self, with_config: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lm_head = nn.Embedding(211, 16), nn.Linear(16, 211, bias=False)
        self.body = Stack(Block("tensor") for _ in range(2))
        if with_config:
            self.config = tf.LlamaConfig(use_cache=True)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def run(self, input_ids: Tensor, labels: Tensor | None, use_cache: bool) -> Any:
        x = self.body(self.embed(input_ids))
        logits = self.lm_head(x)
        found = (logits, x) if use_cache else (logits,)
        if labels is None:
            return found
        loss = nn.functional.cross_entropy(logits.view(-1, 211), labels.view(-1))
        return (loss, *found)


class Defaulting(Custom):
    def forward(self, input_ids: Tensor, labels: Any = None, use_cache: bool = True) -> Any:
        return self.run(input_ids, labels, use_cache)


class Asking(Custom):
    def forward(self, input_ids: Tensor, labels: Any = None, use_cache: Any = None) -> Any:
        return self.run(
            input_ids, labels, self.config.use_cache if use_cache is None else use_cache
        )


class Recording(Custom):
    def forward(
        self, input_ids: Tensor, labels: Any = None, use_cache: Any = None
    ) -> CausalLMOutputWithPast:
        cache = self.config.use_cache if use_cache is None else use_cache
        loss, logits, *rest = self.run(input_ids, labels, cache)
        return CausalLMOutputWithPast(loss, logits, past_key_values=rest[0] if rest else None)


@pytest.mark.parametrize("kind", [Defaulting, Asking])
@pytest.mark.parametrize("labels", [None, IDS])
def test_a_model_that_returns_tuples_keeps_all_of_them(kind: type[Custom], labels) -> None:
    eager = kind(with_config=True)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    for _ in range(2):
        mine, theirs = (m(IDS, labels) for m in (ours, eager))
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a + 0, b)


def test_a_model_that_says_what_it_returns_makes_no_cache() -> None:
    ours = optimize(Recording(with_config=True), codegen="eager")
    with pytest.raises(RuntimeError, match="pass use_cache=True"):
        ours(IDS, IDS).past_key_values.get_seq_length()
    ours.config.use_cache = False
    assert ours(IDS, IDS).past_key_values is None
    ours.config.use_cache = True
    assert ours.eval()(IDS, IDS).past_key_values is not None


# --- training calls that do not say whether they want a cache -------------------------------------

T = dict(
    vocab_size=211, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def _llama(**more: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**T, **more))


def _llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(**TOWER, image_size=16, patch_size=8)
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**T), vision_config=vision, image_token_index=210
    )
    config.use_cache = False  # Trainer sets this one, and not the decoder's
    return tf.LlavaForConditionalGeneration(config)


class Embedder(nn.Module):
    """Like SentenceTransformers' module around a model: the mean of the last states."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tf.LlamaModel(tf.LlamaConfig(**T))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.model(**features).last_hidden_state.mean(1)


class ManyHeads(nn.Module):
    """Heads for several tokens: they call the backbone, or ask the model for its last states."""

    def __init__(self, calls_backbone: bool) -> None:
        super().__init__()
        self.lm, self.calls_backbone = _llama(), calls_backbone
        self.heads = nn.ModuleList(nn.Linear(32, 211) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        if self.calls_backbone:
            x = self.lm.model(ids).last_hidden_state
            losses = [self.lm.lm_head(x)]
        else:
            outputs = self.lm(ids, output_hidden_states=True)
            x, losses = outputs.hidden_states[-1], [outputs.logits]
        losses += [head(x) for head in self.heads]
        each = [nn.functional.cross_entropy(z.flatten(0, 1), ids.flatten()) for z in losses]
        return torch.stack(each).sum()


def _seq2seq(kind: str) -> nn.Module:
    if kind == "t5":
        config = tf.T5Config(
            vocab_size=211, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, dropout_rate=0.0,
        )  # fmt: skip
        return tf.T5ForConditionalGeneration(config)
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("ffn_dim", 48), ("attention_heads", 4))
    }
    model = tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=211, d_model=32, max_position_embeddings=64, dropout=0.0, **sides)
    )
    nn.init.normal_(model.final_logits_bias)
    return model


STEPS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "embeddings": (
        lambda: tf.LlamaModel(tf.LlamaConfig(**T)),
        lambda m: m(IDS).last_hidden_state.exp().mean(),
        {"rms_norm": 5, "rope": 2, "glu": 2},
    ),
    "an embedding module": (
        Embedder,
        lambda m: m({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}).exp().mean(),
        {"rms_norm": 5, "rope": 2, "glu": 2},
    ),
    "logits": (
        _llama,
        lambda m: m(IDS, output_hidden_states=True).logits.float().exp().mean(),
        {"rms_norm": 5, "rope": 2, "glu": 2},
    ),
    "positions alone": (
        _llama,
        lambda m: m(IDS, labels=IDS, position_ids=torch.arange(13).expand(2, -1)).loss,
        {"rms_norm": 5, "rope": 2, "glu": 2, "linear_cross_entropy": 1},
    ),
    "heads on the backbone": (
        lambda: ManyHeads(True), lambda m: m(IDS), {"rms_norm": 5, "rope": 2, "glu": 2}
    ),
    "heads on hidden states": (
        lambda: ManyHeads(False), lambda m: m(IDS), {"rms_norm": 5, "rope": 2, "glu": 2}
    ),
    "a decoder of parts": (
        _llava,
        lambda m: m(IDS, labels=IDS).loss,
        {"rms_norm": 5, "rope": 2, "glu": 2, "linear_cross_entropy": 1},
    ),
    "t5": (
        lambda: _seq2seq("t5"),
        lambda m: m(IDS, labels=IDS).loss,
        {"rms_norm": 12, "glu": 4, "linear_cross_entropy": 1},
    ),
    "bart": (
        lambda: _seq2seq("bart"),
        lambda m: m(IDS, labels=IDS).loss,
        {"layer_norm": 12, "linear_cross_entropy": 1},
    ),
}  # fmt: skip
SHORT = ("a decoder of parts",)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in SHORT else [pytest.mark.long]) for k in STEPS]
)
def test_blocks_are_rewritten_in_training_calls_that_ask_for_no_cache(kind: str) -> None:
    make, step, rules = STEPS[kind]
    ours, eager = pair(make)
    for _ in range(2):
        assert_equal_losses(ours, eager, step)
    report = explain(ours)
    assert report.by_rule().items() >= rules.items()
    assert not [b for b in report.bypasses if "a cache" in b.reason or "its cache" in b.reason]


DEEP = (
    "cosmos3_omni", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "internvl", "llava",
    "minimax_m3_vl", "qianfan_ocr", "qwen3_vl", "qwen3_vl_moe", "qwen4_exp",
    "moss_transcribe_diarize", "vibevoice_asr",
)  # fmt: skip
"""Names whose decoder alone takes ``use_cache``: neither the head nor its backbone does."""


@pytest.mark.long(*DEEP)
@pytest.mark.parametrize("name", DEEP)
def test_the_decoder_of_a_multimodal_model_defers_its_cache(name: str) -> None:
    if name not in CONFIG_MAPPING and transformers_before("5.24"):
        pytest.skip("this version of transformers has no such model")
    of = CONFIG_MAPPING[name]
    kinds = (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    with torch.device("meta"):
        model = next(kind[of] for kind in kinds if of in kind)(shrink(of()))
    regions = {r.path: r.module for r in find(model) if r.kind == "backbone"}
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    assert decoder is None or decoder in regions.values()
    assert list(regions) == ["model.language_model"]


@pytest.mark.long("t5")
@pytest.mark.parametrize("kind", ["embeddings", "t5"])
def test_explain_takes_a_step_of_its_own(kind: str) -> None:
    report = explain(pair(STEPS[kind][0])[0])
    assert report.by_rule().items() >= STEPS[kind][2].items()
    assert not [b for b in report.bypasses if "tiny step" in b.reason]


@pytest.mark.parametrize("path", ["layers.0", "layers.1.self_attn"])
def test_a_hook_on_a_block_or_in_it_gets_the_cache(path: str) -> None:
    lengths: list[list[int]] = []
    for model in pair(lambda: tf.LlamaModel(tf.LlamaConfig(**T)), passes=()):
        lengths.append([])

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            lengths[-1].append(kwargs[CACHE].get_seq_length(0))

        model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
        model(IDS)
    assert set(lengths[0]) == set(lengths[1]) == {13}


def test_a_hook_on_the_backbone_gets_the_cache() -> None:
    lengths = []
    for model in _pair():
        model.model.register_forward_hook(lambda m, args, out: lengths.append(len(out[CACHE])))
        model(input_ids=IDS, labels=IDS)
    assert lengths[0] == lengths[1] > 0


@pytest.mark.parametrize("labels", [None, IDS])
def test_samples_that_share_a_row_see_each_other_as_in_eager_mode(labels: Any) -> None:
    """With a cache, masks ignore the positions."""
    positions = torch.cat([torch.arange(5), torch.arange(8)]).expand(2, -1)
    ours, eager = pair(_llama, passes=())
    inputs = {"input_ids": IDS, "labels": labels, "position_ids": positions}
    for _ in range(2):
        assert_equal_losses(ours, eager, lambda m: m(**inputs).logits.exp().mean())
    assert any("a cache was passed" in b.reason for b in explain(ours).bypasses)


def test_checkpointed_blocks_drop_the_cache_themselves() -> None:
    ours, eager = pair(_llama)
    for model in (ours, eager):
        model.gradient_checkpointing_enable()
    assert _kinds(ours(IDS, labels=IDS)) == _kinds(eager(IDS, labels=IDS)) == ["Tensor", "Tensor"]
    assert explain(ours).by_rule()["rms_norm"] >= 4


@pytest.mark.long("True")
@pytest.mark.parametrize("training", [False, True])
def test_generation_and_evaluation_have_their_caches(training: bool) -> None:
    ours, eager = (m.train(training) for m in pair(_llama, passes=()))
    kwargs = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(IDS, **kwargs), eager.generate(IDS, **kwargs))
    with torch.no_grad():
        assert type(ours.model(IDS)[CACHE]) is tf.DynamicCache
    assert ours.eval().model(IDS)[CACHE].get_seq_length() == 13
