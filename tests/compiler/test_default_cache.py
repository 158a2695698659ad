"""The cache that models fill by default: left out in training with labels, and nowhere else."""

from __future__ import annotations

import copy
import pickle
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

from fusewright import explain, optimize
from fusewright.compiler.bypass import CACHE_ARGUMENTS
from fusewright.compiler.regions import find
from fusewright.compiler.withheld import CacheRefused, WithheldCache

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
def test_the_outputs_are_those_of_eager_but_in_training_with_labels(
    labels: Tensor | None, training: bool
) -> None:
    ours, eager = (m.train(training) for m in _pair())
    for return_dict in (True, False, True):
        inputs = {"input_ids": IDS, "labels": labels, "return_dict": return_dict}
        mine, theirs = _kinds(ours(**inputs)), _kinds(eager(**inputs))
        assert theirs[-1] == "DynamicCache"
        if training and labels is not None:
            theirs.pop()
        assert mine == theirs


def test_the_switch_in_the_configuration_may_be_thrown_at_any_time() -> None:
    ours, eager = _pair()
    for on in (False, True, False):
        ours.config.use_cache = eager.config.use_cache = on
        mine = _kinds(ours(input_ids=IDS, labels=IDS))
        assert mine == ["Tensor", "Tensor"]
        assert _kinds(ours(input_ids=IDS)) == _kinds(eager(input_ids=IDS))
    assert _kinds(ours(input_ids=IDS, labels=IDS, use_cache=True))[-1] == "DynamicCache"


@pytest.mark.long("one attention twice-True", "one index twice-True", "one module twice-True")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", ["one module twice", "one attention twice", "one index twice"])
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
    ours = optimize(models[0], passes=())
    eager = models[1]
    plain = eager(input_ids=IDS, labels=IDS, use_cache=False).loss
    for _ in range(2):
        mine, theirs = (m(input_ids=IDS, labels=IDS).loss for m in (ours, eager))
        torch.testing.assert_close(mine, theirs)
    assert not torch.isclose(plain, theirs)  # the second layer reads what the first one wrote
    assert any("cache" in b.reason for b in explain(ours).bypasses)


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
    assert ours(IDS, IDS).past_key_values is None
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


def _with_cache(read: Any) -> Any:
    def step(model: nn.Module) -> Tensor:
        outputs = model(IDS)
        cache = read(outputs)
        states = sum(t.float().exp().mean() for x in cache.layers for t in (x.keys, x.values))
        # the dropout of what comes next is that of eager mode, too
        second = model(IDS[:, :5], past_key_values=cache).logits.float().exp().mean()
        return outputs.logits.float().exp().mean() + states + second

    return step


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda o: o.past_key_values, id="attribute"),
        pytest.param(lambda o: o["past_key_values"], id="key", marks=pytest.mark.long),
        pytest.param(lambda o: o.to_tuple()[1], id="tuple", marks=pytest.mark.long),
    ],
)
def test_a_default_cache_that_is_read_is_the_one_of_eager_mode(read: Any) -> None:
    models = pair(lambda: _llama(attention_dropout=0.2), passes=())
    for _ in range(2):  # the first time it is filled late, then at once
        assert_equal_losses(*models, _with_cache(read))
    assert any("an earlier one was read" in b.reason for b in explain(models[0]).bypasses)


USES: dict[str, Any] = {
    "length": lambda c: c.get_seq_length(),
    "len": len,
    "keys": lambda c: c.layers[1].keys.sum().item(),
    "copy": lambda c: copy.deepcopy(c).layers[0].values.tolist(),
    "pickle": lambda c: pickle.loads(pickle.dumps(c)).layers[0].values.tolist(),
    "write": lambda c: setattr(c, "name", 3) or (c.name, c.get_seq_length()),
    "crop": lambda c: c.crop(-3) or c.layers[0].keys.shape,
    "state": lambda c: sorted(vars(c)),
}


def _filled() -> tf.DynamicCache:
    cache = tf.DynamicCache()
    for i in range(2):
        cache.update(torch.arange(40.0).view(1, 2, 5, 4), torch.ones(1, 2, 5, 4), i)
    return cache


@pytest.mark.parametrize("use", USES)
def test_each_use_of_a_deferred_cache_fills_it(use: str) -> None:
    withheld, fills = WithheldCache(), []
    withheld.cache = cache = tf.DynamicCache()
    withheld.defer(lambda: fills.append(1) or _filled())
    assert isinstance(cache, tf.DynamicCache)
    assert type(cache).__name__ == "DynamicCache"
    assert not hasattr(cache, "dtype")  # which wrappers for mixed precision ask
    assert not fills
    assert USES[use](cache) == USES[use](_filled())
    assert fills == [1]
    assert type(cache) is tf.DynamicCache
    assert vars(cache).keys() - {"name"} == vars(_filled()).keys()


def test_a_deferred_cache_is_printed_and_asked_for_its_truth_as_it_is() -> None:
    def too_late() -> Any:
        raise RuntimeError("too late")

    withheld = WithheldCache()
    withheld.cache = cache = tf.DynamicCache()
    withheld.defer(too_late)
    assert repr(cache) == "DynamicCache(not computed)"
    assert cache
    with pytest.raises(RuntimeError, match="too late"):
        cache.get_seq_length()


def test_an_error_of_a_hook_ends_the_call_at_once() -> None:
    ours, eager = pair(_llama, passes=(), verify="off")
    for model in (ours, eager):
        calls: list[nn.Module] = []

        def stop(module: nn.Module, args: Any, calls: list[nn.Module] = calls) -> None:
            calls.append(module)
            raise ValueError("enough")

        model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(ValueError, match="enough"):
            model(IDS)
        assert calls == [model.model.layers[1]]


class Counting(tf.LlamaModel):
    """A model with a running statistic, whose code uses the cache."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Tensor, use_cache: Any = None, **more: Any) -> Any:
        cache = tf.DynamicCache(config=self.config)
        x = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(x, position_ids=torch.arange(input_ids.shape[1])[None])
        self.calls.add_(1)
        for layer in self.layers:
            x = layer(x, position_embeddings=rotary, use_cache=True, **{CACHE: cache})
        return CausalLMOutputWithPast(logits=x * cache.get_seq_length(), **{CACHE: cache})


def test_a_call_that_is_made_again_writes_to_buffers_once() -> None:
    ours = optimize(Counting(_llama().config).train(), codegen="eager", passes=(), verify="off")
    for calls in (1, 2):
        assert ours(IDS)[CACHE].get_seq_length() == 13
        assert ours.calls == calls


def test_a_cache_that_blocks_do_not_get_refuses_to_be_used_meanwhile() -> None:
    withheld, cache = WithheldCache(), tf.DynamicCache()
    args, kwargs = withheld.withhold(nn.Linear(1, 1), (1, cache), {"cache": cache, "x": 2})
    assert (args, kwargs) == ((1, None), {"cache": None, "x": 2})
    with pytest.raises(CacheRefused):
        cache.get_seq_length()
    assert withheld.is_used
    withheld.release()
    assert cache.get_seq_length() == 0


LATE: dict[str, Any] = {
    "backward": lambda m, o: o.logits.sum().backward(),
    "a gradient": lambda m, o: torch.autograd.grad(o.logits.sum(), m.model.embed_tokens.weight),
    "a write": lambda m, o: m.model.norm.weight.detach().mul_(2.0),
    "evaluation": lambda m, o: m.eval(),
}


def test_a_default_cache_that_can_no_longer_be_computed_is_an_error() -> None:
    ours, _ = pair(_llama, passes=(), verify="off")
    ours(IDS)
    for change in LATE.values():
        model = copy.deepcopy(ours)
        outputs = model(IDS)
        change(model, outputs)
        with pytest.raises(RuntimeError, match="pass use_cache=True"):
            outputs[CACHE].get_seq_length()
    outputs = ours(IDS, use_cache=True)
    outputs.logits.sum().backward()
    assert outputs[CACHE].get_seq_length() == 13


class Reading(tf.LlamaModel):
    """A model whose code uses the cache between its blocks, or after them."""

    late = True

    def forward(self, input_ids: Tensor, use_cache: Any = None, **more: Any) -> Any:
        cache = tf.DynamicCache(config=self.config)
        x = self.embed_tokens(input_ids)
        position = torch.arange(input_ids.shape[1])[None]
        rotary = self.rotary_emb(x, position_ids=position)
        for layer in self.layers:
            x = layer(x, position_embeddings=rotary, use_cache=True, **{CACHE: cache})
            if not self.late:
                x = x * (1.0 + cache.get_seq_length(0))
        if self.late:
            x = x + cache.layers[0].keys.mean()
        return CausalLMOutputWithPast(logits=x, **{CACHE: cache})


class Hiding(Reading):
    """One that keeps the cache to itself."""

    def forward(self, input_ids: Tensor, use_cache: Any = None, **more: Any) -> Any:
        outputs = super().forward(input_ids)
        self.kept = outputs[CACHE]
        return CausalLMOutputWithPast(logits=outputs.logits)


@pytest.mark.parametrize("kind", ["between", "after", "hidden"])
def test_a_model_that_uses_its_cache_itself_gets_it(kind: str) -> None:
    ours, eager = pair(
        lambda: (Hiding if kind == "hidden" else Reading)(tf.LlamaConfig(**T)), passes=()
    )
    ours.late = eager.late = kind != "between"
    for _ in range(2):
        assert_equal_losses(ours, eager, lambda m: m(IDS).logits.exp().mean())
        assert ours(IDS).logits.requires_grad
    assert any("filled at once" in b.reason for b in explain(ours).bypasses)
    if kind == "hidden":
        assert ours.kept.get_seq_length() == eager.kept.get_seq_length() == 13


def test_a_hook_on_a_block_gets_the_cache() -> None:
    lengths: list[list[int]] = []
    for model in pair(lambda: tf.LlamaModel(tf.LlamaConfig(**T)), passes=()):
        lengths.append([])

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            lengths[-1].append(kwargs[CACHE].get_seq_length(0))

        model.layers[0].register_forward_hook(hook, with_kwargs=True)
        model(IDS)
    assert set(lengths[0]) == set(lengths[1]) == {13}


@pytest.mark.long("True")
@pytest.mark.parametrize("training", [False, True])
def test_generation_and_evaluation_have_their_caches(training: bool) -> None:
    ours, eager = (m.train(training) for m in pair(_llama, passes=()))
    kwargs = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(IDS, **kwargs), eager.generate(IDS, **kwargs))
    with torch.no_grad():
        assert type(ours.model(IDS)[CACHE]) is tf.DynamicCache
    assert ours.eval().model(IDS)[CACHE].get_seq_length() == 13
