"""A step on fake tensors: what it counts is what a real one takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3_5Config, Qwen3NextConfig

from fusewright import optimize
from fusewright.kernels.cost import Living
from fusewright.kernels.processor import KINDS
from fusewright.train.plan import plan
from fusewright.train.plan.count.blueprint import draw
from fusewright.train.plan.count.layout import ProcessLayout
from fusewright.train.plan.count.step import take
from fusewright.train.plan.estimate import estimate
from fusewright.train.plan.speed import step_flops
from tests.explained import explain

from .conftest import LORA, SIZES, MakeRecipe, make_job

ONE = ProcessLayout("one process")


def _closed(tokens: int, length: int, trained_linears: bool, adapters: int) -> float:
    """FLOPs of a Llama's step: 2 for each weight and product, and attention's two products.

    Backward has one product for inputs and one for trained weights; attention's has five products
    where forward has two (Dao et al., "FlashAttention", 2022).
    """
    h, i, v, n = (SIZES[k] for k in ("hidden_size", "intermediate_size", "vocab_size",
                                     "num_hidden_layers"))  # fmt: skip
    kv = h * SIZES["num_key_value_heads"] // SIZES["num_attention_heads"]
    linears = n * (2 * h * h + 2 * h * kv + 3 * h * i) + h * v
    products = 6 if trained_linears else 4
    attention = n * tokens * (4 + 10) * length * h
    return products * linears * tokens + 6 * adapters * tokens + attention


@pytest.mark.parametrize("method", ["full", "lora"])
def test_flops_are_those_of_the_closed_formula(method: str, recipe: MakeRecipe) -> None:
    made = recipe(**(LORA if method == "lora" else {}))
    job = make_job(made)
    adapters = sum(
        u.times * w.numbers for u in job.units for w in u.weights if w.trains and method == "lora"
    )
    memory = estimate(job, ONE, None, level="all")
    expected = _closed(256, 128, method == "full", adapters)
    assert step_flops(job, memory, ONE) == pytest.approx(expected, rel=0.01)


def test_flops_of_the_unoptimized_step_are_those_that_pytorch_counts(recipe: MakeRecipe) -> None:
    made = recipe(optimize=False, attn_implementation="eager")
    job = make_job(made)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SIZES), attn_implementation="eager", dtype=torch.bfloat16
    )
    ids = torch.randint(512, (2, 128))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    memory = estimate(job, ONE, None, level="all")
    assert step_flops(job, memory, ONE) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_one_block_of_each_kind_stands_for_all(recipe: MakeRecipe) -> None:
    made = draw(recipe(**LORA), torch.bfloat16)
    assert sum(made.times.values()) == made.depth == 4
    assert len(made.blocks) == 2


@pytest.mark.long
def test_layers_of_several_kinds_keep_their_masks(recipe: MakeRecipe, tmp_path: Path) -> None:
    """Of linear attention and attention, whose masks have other dtypes and dimensions."""
    linear = {f"linear_{name}": 4 for name in ("num_key_heads", "num_value_heads")}
    linear |= {f"linear_{name}_head_dim": 8 for name in ("key", "value")}
    config = Qwen3NextConfig(**SIZES | {"architectures": ["Qwen3NextForCausalLM"]}, **linear,
                             head_dim=16, num_experts=4, num_experts_per_tok=2,
                             moe_intermediate_size=32)  # fmt: skip
    assert config.layer_types[0] == config.layer_types[1] == "linear_attention"
    config.save_pretrained(tmp_path / "hybrid")
    job = make_job(recipe(base_model=str(tmp_path / "hybrid"), **LORA))
    assert sorted(job.blueprint.times.values()) == [1, 3]
    assert job.blueprint.config.layer_types == config.layer_types
    assert job.step.rewrites["moe_experts"] == 2


def test_a_tower_of_equal_depth_leaves_the_names_of_layers(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    text = {**SIZES, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
              "out_hidden_size": 64, "patch_size": 8}  # fmt: skip
    architectures = ["Qwen3_5ForConditionalGeneration"]
    config = Qwen3_5Config(text_config=text, vision_config=vision, architectures=architectures)
    config.save_pretrained(tmp_path / "seeing")
    model = draw(recipe(base_model=str(tmp_path / "seeing")), torch.bfloat16).model
    decoder = model.model.language_model
    assert decoder.config.layer_types == ["linear_attention", "full_attention"]
    assert len(decoder.layers) == len(model.model.visual.blocks) == 2


def test_every_block_is_kept_where_adapters_name_some(recipe: MakeRecipe) -> None:
    made = draw(recipe(**LORA, peft_layers_to_transform=[1]), torch.bfloat16)
    assert list(made.times.values()) == [1] * 4
    trained = [any(p.requires_grad for p in b.parameters()) for b in made.blocks.values()]
    assert trained == [False, True, False, False]


@pytest.mark.long
def test_the_same_formulas_are_rewritten_as_in_a_real_model(recipe: MakeRecipe) -> None:
    made = recipe()
    step = take(draw(made, torch.bfloat16), made, "eager")
    shallow = {**SIZES, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shallow), dtype=torch.bfloat16)
    optimize(model.train(), codegen="eager")
    assert dict(step.rewrites) == explain(model).by_rule()


@pytest.mark.long("all-avx2", "all-avx512", "input-avx512", "all-amx")
@pytest.mark.parametrize(
    ("level", "kind"), [*(("all", kind) for kind in KINDS), ("input", "avx512")]
)
def test_what_blocks_keep_is_what_a_real_step_keeps(
    level: Any, kind: str, recipe: MakeRecipe, choose_for: Callable[[str], None]
) -> None:
    """Between forward and backward: the storages that came into being, weights not counted.

    Where PyTorch's attention stays, blocks keep repeated keys, and a mask in the dtype of the
    model: that of a batch with padding, as nearly every batch has.
    """
    choose_for(kind)
    job = make_job(recipe(sequence_len=512))
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16).train()
    optimize(model, codegen="eager", memory="speed" if level == "all" else "min")
    ids, mask = torch.randint(512, (2, 512)), torch.ones(2, 512, dtype=torch.long)
    mask[0, -1] = 0  # of full rows alone the model makes no mask
    batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    model(**batch, labels=ids).loss.backward()  # captures
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t if t.grad_fn is None else t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.model(**batch)
    memory = estimate(job, ONE, None, level=level)
    hidden = 2 * 512 * SIZES["hidden_size"] * 2
    # the first block's input, and what the final norm and rotary embeddings keep, are not blocks'
    assert memory.activations == pytest.approx(sum(kept.values()), abs=6 * hidden)


@pytest.mark.long
def test_a_plan_for_a_card_does_not_depend_on_the_cpu_that_makes_it(
    recipe: MakeRecipe, choose_for: Callable[[str], None]
) -> None:
    steps = []
    for kind in ("avx2", "avx512"):
        choose_for(kind)
        steps.append(plan.make_job(recipe(), torch.bfloat16, on_cpu=False).step)
    first, second = ([u.get("all") for u in step.usages.values()] for step in steps)
    assert first == second
    assert steps[0].rewrites == steps[1].rewrites


@pytest.mark.long
def test_a_larger_batch_is_the_same_multiple_wherever_it_is_counted_from(
    recipe: MakeRecipe,
) -> None:
    """Never too low; too high by no more than a temporary of a weight's size, which is scaled."""
    small, large = make_job(recipe(micro_batch_size=1)), make_job(recipe(micro_batch_size=64))
    weight = max(w.bytes for u in small.units if u.name for w in u.weights)
    for level in ("all", "input"):
        counted = estimate(large, ONE, None, level=level).peak
        assert 0 <= estimate(small, ONE, None, 64, level).peak - counted <= 63 * weight


def test_the_gradient_of_a_depthwise_convolution_is_that_of_its_groups() -> None:
    x = torch.randn(1, 64, 32, requires_grad=True)
    conv = torch.nn.Conv1d(64, 64, 4, groups=64, bias=False)
    with Living() as living:
        y = conv(x)
        forward = living.flops
        y.sum().backward()
    assert forward == 2 * 64 * 4 * y.shape[-1]
    assert living.flops == 3 * forward
