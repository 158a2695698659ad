"""Every family, plain and with LoRA: same results, expected rewrites, nothing else touched."""

from __future__ import annotations

import copy
import io
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusewright import optimize, restore
from fusewright.kernels.tolerance import FACTOR, errors, unit
from tests.explained import explain

from .tiny import token_ids
from .zoo import FAMILIES, Family, build

CASES = [(family, lora) for family in FAMILIES for lora in (False, True)]


@dataclass
class Pair:
    """An optimized model, its untouched copy, and what it was."""

    family: Family
    lora: bool
    ours: nn.Module
    eager: nn.Module
    exact: nn.Module


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0].name}{'-lora' * c[1]}")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    family, lora = request.param
    model = build(family, lora)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    yield Pair(family, lora, optimize(model, codegen="eager"), eager, exact)
    torch._dynamo.reset()


def _step(model: nn.Module, *batches: Tensor, **more: object) -> tuple[Tensor, dict[str, Tensor]]:
    """The last loss, and the gradients accumulated over ``batches``; a few labels are ignored."""
    model.zero_grad()
    for ids in batches:
        labels = ids.clone()
        labels[:, :3] = -100
        loss = model(input_ids=ids, labels=labels, **more).loss
        loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


class _InDouble(TorchFunctionMode):
    """Makes model code that casts to fp32 (norms, softmax, the loss) stay in fp64: the oracle."""

    def __enter__(self) -> Any:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # of what it makes without naming a dtype
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*args)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def widen(x: Any) -> Any:
            return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x

        if func is Tensor.float:
            func = Tensor.double
        args = tuple(widen(a) for a in args)
        return func(*args, **{k: widen(v) for k, v in (kwargs or {}).items()})


def _exact_step(model: nn.Module, *batches: Tensor, **more: object) -> Any:
    with _InDouble():
        return _step(model, *batches, **more)


def _assert_equal_steps(pair: Pair, batches: list[tuple[Tensor, ...]], **more: object) -> None:
    """Hold loss and gradients to the budget: the error of each, over several batches and weights.

    The rounding error that a whole model accumulates is one draw for given weights, and varies by
    a factor of two in both directions; its root mean square over a few draws does not.
    """
    ours, eager, unit_of = defaultdict(list), defaultdict(list), {}
    units = {unit(p.dtype) for p in pair.ours.parameters()}
    for draw, steps in enumerate(batches):
        with _other_weights(pair, draw):
            (loss, grads), (eager_loss, eager_grads), (exact_loss, exact_grads) = (
                _seeded(draw, step, model, *steps, **more)
                for step, model in (
                    (_step, pair.ours),
                    (_step, pair.eager),
                    (_exact_step, pair.exact),
                )
            )
        assert grads.keys() == eager_grads.keys()
        for name, mine, theirs, exact in (
            ("loss", loss, eager_loss, exact_loss),
            *((n, g, eager_grads[n], exact_grads[n]) for n, g in grads.items()),
        ):
            assert mine.dtype == theirs.dtype
            ours[name].append(errors(mine, exact).rms)
            eager[name].append(errors(theirs, exact).rms)
            # a gradient in fp32 is made of the model's values, and these may be rounded to bf16
            unit_of[name] = unit(mine.dtype) if name == "loss" else max(units)
    for name in ours:
        mine, theirs = _rms(ours[name]), _rms(eager[name])
        assert mine <= FACTOR * theirs + unit_of[name], f"{name}: {mine:.2e}, eager {theirs:.2e}"


def _seeded(seed: int, step: Any, *args: Any, **more: object) -> Any:
    """``step`` with the random numbers of ``seed``: the same dropout for all three models."""
    torch.manual_seed(seed)
    return step(*args, **more)


@contextmanager
def _other_weights(pair: Pair, draw: int) -> Iterator[None]:
    """All three models with the same slightly different weights, for a while."""
    generator = torch.Generator().manual_seed(draw)
    # by name: PEFT registers those that it adapts anew at each call, and so changes their order
    named = [dict(m.named_parameters()) for m in (pair.ours, pair.eager, pair.exact)]
    models = [[parameters[name] for name in named[0]] for parameters in named]
    before = [[p.detach().clone() for p in ps] for ps in models]
    with torch.no_grad():
        for mine, theirs, exact in zip(*models, strict=True):
            mine.mul_(1 + 0.1 * torch.randn(mine.shape, generator=generator))
            theirs.copy_(mine)
            exact.copy_(mine)
    yield
    with torch.no_grad():
        for parameters, values in zip(models, before, strict=True):
            for p, v in zip(parameters, values, strict=True):
                p.copy_(v)


def _rms(values: list[float]) -> float:
    return (sum(v * v for v in values) / len(values)) ** 0.5


def _batches(
    batch: int, length: int, seed: int = 0, accumulate: int = 1, draws: int = 6
) -> list[tuple[Tensor, ...]]:
    return [
        tuple(token_ids(batch, length, seed + 10 * i + j) for j in range(accumulate))
        for i in range(draws)
    ]


@pytest.mark.long(
    "gemma2-lora",
    "olmo2-lora",
    "gemma-lora",
    "qwen3-lora",
    "falcon-lora",
    "qwen2-lora",
    "mistral-lora",
)
def test_every_formula_is_rewritten(pair: Pair) -> None:
    report = explain(pair.ours)
    assert report.by_rule() == (pair.family.lora if pair.lora else pair.family.plain)
    assert not [s for s in report.sites if s.status == "refused"], str(report)
    assert not [b for b in report.bypasses if "could not be captured" in b.reason], str(report)


def test_explaining_leaves_no_trace(pair: Pair) -> None:
    pair.ours.zero_grad()
    state = torch.get_rng_state()
    explain(pair.ours)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in pair.ours.parameters())


def test_loss_and_gradients_equal_eager(pair: Pair) -> None:
    _assert_equal_steps(pair, _batches(2, 13))


def test_a_second_shape_recompiles_at_most_once(pair: Pair) -> None:
    _step(pair.ours, token_ids(2, 13))
    before = explain(pair.ours).graphs
    _assert_equal_steps(pair, _batches(3, 24, seed=1))
    assert explain(pair.ours).graphs <= before


def test_accumulated_gradients_equal_eager(pair: Pair) -> None:
    _assert_equal_steps(pair, _batches(2, 13, seed=2, accumulate=2))


def test_logits_are_lazy_and_right(pair: Pair) -> None:
    ids = token_ids(2, 13, seed=4)
    ours, eager = (m(input_ids=ids, labels=ids).logits for m in (pair.ours, pair.eager))
    assert type(ours).__name__ == "LazyLogits"
    assert ours.shape == eager.shape
    torch.testing.assert_close(ours + 0, eager)


def test_generation_is_the_same(pair: Pair) -> None:
    ids = token_ids(1, 5)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    was_training = pair.ours.training
    ours, eager = (m.eval().generate(input_ids=ids, **kwargs) for m in (pair.ours, pair.eager))
    for m in (pair.ours, pair.eager):
        m.train(was_training)
    assert torch.equal(ours, eager)


def test_a_deep_copy_is_optimized_and_independent(pair: Pair) -> None:
    twin = copy.deepcopy(pair.ours)
    ids = token_ids(2, 13, seed=5)
    loss, grads = _step(twin, ids)
    eager_loss, _ = _step(pair.eager, ids)
    torch.testing.assert_close(loss, eager_loss)
    assert grads
    pair.ours.zero_grad()
    _step(twin, ids)
    assert all(p.grad is None for p in pair.ours.parameters()), "the copy used the original"
    assert restore(twin) is twin
    assert "forward" in {k for m in pair.ours.modules() for k in m.__dict__}


def test_pickling_gives_a_plain_model(pair: Pair) -> None:
    buffer = io.BytesIO()
    torch.save(pair.ours, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    ids = token_ids(2, 7)
    loss, _ = _step(loaded, ids)
    eager_loss, _ = _step(pair.eager, ids)
    assert torch.equal(loss, eager_loss)


def test_saved_and_reloaded_weights_are_the_same(pair: Pair, tmp_path: object) -> None:
    pair.ours.save_pretrained(tmp_path)
    if pair.lora:
        from peft import PeftModel

        again = PeftModel.from_pretrained(build(pair.family, lora=False), tmp_path)
    else:
        again = type(pair.eager).from_pretrained(tmp_path)
    mine, theirs = pair.ours.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_gradient_checkpointing(pair: Pair) -> None:
    models = (pair.ours, pair.eager)  # the oracle's numbers do not depend on it
    for m in models:
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        _assert_equal_steps(pair, _batches(2, 13, seed=6))
        assert not [s for s in explain(pair.ours).sites if s.status == "refused"]
    finally:
        for m in models:
            m.gradient_checkpointing_disable()


def test_restore_is_exact(pair: Pair) -> None:
    before = {k: v.clone() for k, v in pair.ours.state_dict().items()}
    names = [n for n, _ in pair.ours.named_parameters()]
    assert names == [n for n, _ in pair.eager.named_parameters()]
    assert restore(pair.ours) is pair.ours
    assert all("forward" not in m.__dict__ for m in pair.ours.modules())
    assert all(torch.equal(v, before[k]) for k, v in pair.ours.state_dict().items())
    ids = token_ids(2, 13, seed=7)
    loss, grads = _step(pair.ours, ids)
    eager_loss, eager_grads = _step(pair.eager, ids)
    assert torch.equal(loss, eager_loss)
    assert all(torch.equal(g, eager_grads[n]) for n, g in grads.items())
