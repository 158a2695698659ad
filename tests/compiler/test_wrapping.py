"""What others do to a model beside ``optimize``: hooks, copies, wrappers, modes, writes."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusewright import optimize, restore
from fusewright.compiler.install import installed
from fusewright.compiler.logits.lazy_logits import LazyLogits
from fusewright.kernels.tolerance import exceeded
from tests.explained import explain

from ..models.zoo import FAMILIES, build

LLAMA = FAMILIES[0]
IDS = torch.randint(3, 200, (2, 13), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _loss(model: nn.Module, **inputs: Any) -> Tensor:
    return model(**{"input_ids": IDS, "labels": IDS, **inputs}).loss


class Block(nn.Module):
    """A decoder block with whatever ``formula`` computes from two projections."""

    def __init__(self, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(24, 24, bias=False) for _ in range(3))
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.formula(self.gate(x), self.up(x)))


class Stack(nn.Module):
    def __init__(self, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(formula) for _ in range(2))
        self.reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True) if self.reentrant else layer(x)
        return x


def written_before(g: Tensor, u: Tensor) -> Tensor:
    g.add_(1)
    return F.silu(g) * u


def written_between(g: Tensor, u: Tensor) -> Tensor:
    a = F.silu(g)
    u.view(-1, 24)[:, :4].zero_()
    return a * u


def without_gradients(g: Tensor, u: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.silu(g) * u
    return y + g


def switched_between(g: Tensor, u: Tensor) -> Tensor:
    with torch.no_grad():
        a = F.silu(g)
    return a * u


@pytest.mark.parametrize(
    ("formula", "rewritten"),
    [
        (written_before, 2),
        (written_between, 0),
        (without_gradients, 2),
        (switched_between, 0),
    ],
)
def test_a_formula_keeps_its_place_among_writes_and_modes(formula, rewritten) -> None:
    x = torch.randn(2, 5, 24, requires_grad=True)
    eager, ours = Stack(formula), optimize(Stack(formula), codegen="eager")
    expected, actual = eager(x), ours(x)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    wanted = [x, *eager.parameters()]
    theirs = torch.autograd.grad(expected, wanted, upstream, allow_unused=True)
    mine = torch.autograd.grad(actual, [x, *ours.parameters()], upstream, allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert explain(ours).by_rule().get("glu", 0) == rewritten


def test_autocast_switched_off_inside_a_block_stays_off() -> None:
    def plain_precision(g: Tensor, u: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.silu(g.float()) * u.float()

    x = torch.randn(2, 5, 24)
    eager, ours = Stack(plain_precision), optimize(Stack(plain_precision), codegen="eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), eager(x))


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_reentrant_checkpoints_drop_the_same_values_twice(codegen) -> None:
    def dropping(g: Tensor, u: Tensor) -> Tensor:
        return F.dropout(F.silu(g) * u, 0.5)

    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    model = optimize(Stack(dropping).double(), codegen=codegen)
    model.reentrant = True

    def value() -> Tensor:
        torch.manual_seed(5)
        return model(x).square().sum()

    value().backward()  # both graphs exist from here on
    x.grad = None
    value().backward()
    grad = x.grad.clone()
    step = torch.randn_like(x) * 1e-6
    with torch.no_grad():
        x += step
        above = value()
        x -= 2 * step
        below = value()
    torch.testing.assert_close(above - below, 2 * (grad * step).sum(), rtol=1e-4, atol=0)


def test_a_block_that_writes_into_its_frozen_input_runs_as_it_was() -> None:
    class Writing(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.add_(1))

    def stack() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.ModuleList(Writing(lambda g, u: F.silu(g) * u) for _ in range(2)))

    def run(model: nn.Module) -> Tensor:
        x = torch.ones(2, 5, 24)
        for layer in model[0]:
            x = layer(x)
        return x

    ours = optimize(stack(), codegen="inductor")
    torch.testing.assert_close(run(ours), run(stack()))


@pytest.mark.long("shift_labels")
@pytest.mark.long("attention_mask", "position_ids")
@pytest.mark.parametrize("extra", ["attention_mask", "position_ids", "shift_labels"])
def test_the_arguments_of_a_head_may_change_from_call_to_call(extra) -> None:
    extras = {
        "attention_mask": torch.ones_like(IDS),
        "position_ids": torch.arange(13).expand(2, -1),
        "shift_labels": IDS.roll(-1, 1),
    }
    for model in (ours := optimize(build(LLAMA, lora=False)), optimize(build(LLAMA, lora=False))):
        _loss(model, labels=IDS.clone(), num_items_in_batch=torch.tensor(7))
    eager = build(LLAMA, lora=False)
    inputs = {extra: extras[extra]}
    torch.testing.assert_close(_loss(ours, **inputs), _loss(eager, **inputs))
    assert not [b for b in explain(ours).bypasses if "captured" in b.reason]


def test_hooks_on_the_output_head_are_called() -> None:
    ours, eager = optimize(build(LLAMA, lora=False)), build(LLAMA, lora=False)
    _loss(ours)
    for model in (ours, eager):
        model.lm_head.register_forward_hook(lambda m, i, o: o * 2)
    torch.testing.assert_close(_loss(ours), _loss(eager))
    assert any("hook" in b.reason and "lm_head" in b.reason for b in explain(ours).bypasses)


def test_a_call_for_inner_outputs_leaves_the_model_optimized() -> None:
    model = optimize(build(LLAMA, lora=False))
    model(input_ids=IDS, labels=IDS, output_hidden_states=True)
    model(input_ids=IDS, labels=IDS, output_attentions=True)
    _loss(model)
    assert explain(model).by_rule()["glu"] == 2


def test_an_unpickled_model_is_optimized_and_copied_like_any_other() -> None:
    plain = pickle.loads(pickle.dumps(optimize(build(LLAMA, lora=False))))
    ours = optimize(plain)
    expected = _loss(ours).detach()
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    torch.testing.assert_close(_loss(other), torch.tensor(float(other.config.vocab_size)).log())
    torch.testing.assert_close(_loss(ours).detach(), expected)
    restore(other)
    torch.testing.assert_close(_loss(other), torch.tensor(float(other.config.vocab_size)).log())
    # both layers share one graph: one for the blocks, one for the norm, one for the head
    assert explain(ours).graphs == 3


@pytest.mark.long
def test_what_accelerate_wrapped_is_explained_and_restored() -> None:
    for state in (accelerate.state.AcceleratorState, accelerate.state.PartialState):
        state._reset_state()  # another test of this process may have set one up
    model = optimize(build(LLAMA, lora=False))
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    _loss(prepared)
    assert explain(model).by_rule()["linear_cross_entropy"] == 1
    restore(model)
    assert type(prepared(input_ids=IDS, labels=IDS).logits) is Tensor
    assert not explain(model).sites
    _loss(optimize(model))
    assert explain(model).by_rule()["linear_cross_entropy"] == 1


@pytest.mark.parametrize("copied", [False, True])
def test_a_forward_that_was_replaced_by_a_function_is_restored(copied: bool) -> None:
    def nodes(loss: Tensor) -> list[str]:
        found, left = [], [loss.grad_fn]
        while left:
            node: Any = left.pop()
            found.append(node.name())
            left += [n for n, _ in node.next_functions if n is not None]
        return sorted(found)

    model, plain = (Stack(lambda gate, up: F.silu(gate) * up) for _ in range(2))
    optimize(model, codegen="eager")
    x, block = torch.randn(2, 24), model.layers[0]
    own = block.forward
    block.forward = lambda x: own(x)  # which nothing can look into
    if copied:
        model.layers[0] = copy.copy(block)
    model(x)
    assert nodes(model.layers[0](x)) != nodes(plain.layers[0](x))
    restore(model)
    assert nodes(model.layers[0](x)) == nodes(plain.layers[0](x))
    assert torch.equal(model(x), plain(x))


def test_lazy_logits_are_those_of_the_forward_pass_under_autocast() -> None:
    """As if they were always computed; what they come from, as eager's within the budget."""
    eager, wide = build(LLAMA, lora=False), build(LLAMA, lora=False).double()
    lazy, always = (optimize(build(LLAMA, lora=False), logits=w) for w in ("lazy", "always"))
    with torch.autocast("cpu", torch.bfloat16):
        made = [m(input_ids=IDS, labels=IDS).logits for m in (lazy, always, eager)]
    mine, _, theirs = made
    assert isinstance(mine, LazyLogits)
    assert (mine.dtype, mine.requires_grad) == (theirs.dtype, theirs.requires_grad)
    values, at_once, expected = (t.detach() for t in made)
    assert values.dtype is theirs.dtype
    torch.testing.assert_close(values, at_once, rtol=0, atol=0)
    exact = wide(input_ids=IDS).logits.detach()
    assert exceeded(values, expected, exact) is None


@pytest.mark.long
def test_packed_positions_without_a_mask_mean_what_they_mean_to_eager() -> None:
    positions = torch.tensor([[*range(5), *range(8)]])
    inputs = {"input_ids": IDS[:1], "labels": IDS[:1], "position_ids": positions}
    for cache in (True, False):
        ours = optimize(build(LLAMA, lora=False), codegen="eager")
        eager = build(LLAMA, lora=False)
        ours.config.use_cache = eager.config.use_cache = cache
        torch.testing.assert_close(_loss(ours, **inputs), _loss(eager, **inputs))


def test_replicas_for_data_parallel_run_their_own_weights() -> None:
    layer = optimize(build(LLAMA, lora=False)).model.layers[0]
    replica = layer._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica
    assert installed(replica) is None
    assert installed(layer) is not None


@pytest.mark.long
def test_a_forward_that_a_trainer_puts_in_the_place_of_ours() -> None:
    """As TRL does for its own head: ``__wrapped__`` is the class's forward, not ours."""
    model = optimize(build(LLAMA, lora=False))
    ours = model.forward

    @functools.wraps(type(model).forward)
    def fused(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    model.forward = types.MethodType(fused, model)
    assert isinstance(model(input_ids=IDS, labels=IDS).logits, LazyLogits)
    report = explain(model)
    assert report.by_rule()["linear_cross_entropy"] == 1
    assert any("fused was put in the place of its forward" in b.reason for b in report.bypasses)
    other = copy.deepcopy(model)
    restore(model)
    assert type(model(input_ids=IDS, labels=IDS).logits) is Tensor
    assert not explain(model).sites
    _loss(optimize(model))
    assert explain(model).by_rule()["rms_norm"] == 5
    restore(other)
    assert type(other(input_ids=IDS, labels=IDS).logits) is Tensor
    assert not explain(other).sites


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")])
def test_the_head_of_trl(outputs: tuple[str, ...]) -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    models = [optimize(build(LLAMA, lora=False)), build(LLAMA, lora=False)]
    losses = []
    for model in models:
        utils.add_fused_lm_head(model, outputs=outputs)
        model.train()  # as trainers do before each step
        losses.append(model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs.sum())
    torch.testing.assert_close(*losses)
    report = explain(models[0])
    assert report.by_rule()["glu"] == 2
    assert "linear_cross_entropy" not in report.by_rule()
    assert "trainer's fused head 1x" in report.logits
    assert not any("was put in" in b.reason for b in report.bypasses)
    restore(models[0])
    assert type(models[0](input_ids=IDS, labels=IDS).logits) is Tensor


@pytest.mark.long
def test_inside_a_compilation_of_others_nothing_is_reported_as_rewritten(tmp_path) -> None:
    model = optimize(build(LLAMA, lora=False))
    arguments = tf.TrainingArguments(
        str(tmp_path), torch_compile=True, torch_compile_backend="eager", max_steps=2, use_cpu=True,
        per_device_train_batch_size=2, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tf.Trainer(model, arguments, train_dataset=rows).train()
    report = explain(model)
    assert not report.sites
    assert any("torch.compile was put around" in b.reason for b in report.bypasses)
    _loss(model)
    assert explain(model).by_rule()["glu"] == 2


def test_a_step_with_weights_that_accelerate_keeps_elsewhere() -> None:
    results = []
    for model in (optimize(build(LLAMA, lora=False)), build(LLAMA, lora=False)):
        accelerate.cpu_offload(model, execution_device="cpu")
        _loss(model).backward()
        results.append(_loss(model).detach())
    torch.testing.assert_close(*results)
