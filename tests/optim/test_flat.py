"""The flat optimizer: the same numbers as the plain one, and the same face."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import fusewright
from fusewright.errors import OptimizeError
from fusewright.optim.flat import FlatOptimizer

SIZES = [(16, 24), (7,), (5, 3), (1,), (16, 24), (3, 11), (40, 40)]
"""The last is above the threshold of these tests; the odd ones leave gaps in the buffer."""

Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
}


class Twins:
    """Two sets of equal parameters; the first is stepped flat, the second as PyTorch does."""

    def __init__(
        self, make: Make, dtype: torch.dtype = torch.float32, sizes: list[tuple[int, ...]] = SIZES
    ) -> None:
        values = [torch.randn(s, dtype=dtype) for s in sizes]
        self.sets = [[nn.Parameter(v.clone()) for v in values] for _ in range(2)]
        plain = [make(self.groups(s)) for s in self.sets]
        self.flat, self.plain = FlatOptimizer(plain[0], threshold=1000), plain[1]

    @staticmethod
    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.01}]

    def give_gradients(self, without: tuple[int, ...] = ()) -> None:
        for i, (a, b) in enumerate(zip(*self.sets, strict=True)):
            grad = torch.randn_like(a)
            a.grad, b.grad = (None, None) if i in without else (grad, grad.clone())

    def step(self, without: tuple[int, ...] = ()) -> None:
        self.give_gradients(without)
        self.flat.step()
        self.plain.step()

    def compare(self) -> None:
        for a, b in zip(*self.sets, strict=True):
            # CPU kernels may contract products in a vector and not in its remainder, or the
            # other way round; which elements those are depends on the tensor's size: two roundings
            # in what a step adds to a weight, each of a unit in the last place at most
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=1e-7)
        ours, theirs = self.flat.state_dict(), self.plain.state_dict()
        assert ours["param_groups"] == theirs["param_groups"]
        assert ours["state"].keys() == theirs["state"].keys()
        for key, state in theirs["state"].items():
            assert ours["state"][key].keys() == state.keys()
            for name, value in state.items():
                mine = ours["state"][key][name]
                if torch.is_tensor(value):
                    assert mine.shape == value.shape
                    assert mine.dtype == value.dtype
                    # sums of ten steps, each rounded as above: torch's default for fp32
                    torch.testing.assert_close(mine, value, rtol=1e-5, atol=1e-7)
                else:
                    assert mine == value


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_are_the_plain_ones(name: str) -> None:
    twins = Twins(OPTIMIZERS[name])
    for _ in range(10):
        twins.step()
        twins.compare()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whole_vectors_are_bit_equal(name: str, dtype: torch.dtype) -> None:
    twins = Twins(OPTIMIZERS[name], dtype, [(16, 24), (64,), (3, 128), (64, 2), (16, 24), (64, 64)])
    for number in range(10):
        twins.step(without=(2,) if number == 5 else ())
        assert all(torch.equal(a, b) for a, b in zip(*twins.sets, strict=True))


def test_parameters_keep_their_identity_and_share_one_buffer() -> None:
    params = [nn.Parameter(torch.randn(s)) for s in SIZES]
    before, values = list(params), [p.detach().clone() for p in params]
    flat = FlatOptimizer(torch.optim.AdamW(params), threshold=1000)
    shown = flat.param_groups[0]["params"]
    assert all(a is b for a, b in zip(shown, before, strict=True))
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    storages = {p.untyped_storage().data_ptr() for p in params[:-1]}
    assert len(storages) == 1
    assert params[-1].untyped_storage().data_ptr() not in storages
    assert all(p.data_ptr() % 64 == params[0].data_ptr() % 64 for p in params[:-1])
    assert flat.summary() == ("6 tensors updated as 1; on their own: 1 more than 1,000 elements")


@pytest.mark.parametrize("name", ["adamw-fused", "sgd-momentum", "adagrad", "nadam"])
def test_parameters_without_gradient_are_not_stepped(name: str) -> None:
    twins = Twins(OPTIMIZERS[name])
    for without in [(), (1, 2), (), (2, 6), (0, 1, 2, 3), (), (5,)]:
        twins.step(without)
        twins.compare()
    never = Twins(OPTIMIZERS[name])
    for _ in range(3):
        never.step(without=(1, 4))
        never.compare()


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "sgd-momentum", "rmsprop"])
def test_checkpoints_go_both_ways(name: str) -> None:
    """Both continue as they would have; saved through a file, as a trainer does."""
    one, two = Twins(OPTIMIZERS[name]), Twins(OPTIMIZERS[name])
    for twins in (one, two):
        for number in range(4):
            twins.step(without=(4,) if number == 1 else ())
    files = [io.BytesIO(), io.BytesIO()]
    torch.save(one.flat.state_dict(), files[0])
    torch.save(two.plain.state_dict(), files[1])
    for file in files:
        file.seek(0)
    one.plain.load_state_dict(torch.load(files[0]))  # flat to plain
    two.flat.load_state_dict(torch.load(files[1]))  # plain to flat
    for twins in (one, two):
        for _ in range(3):
            twins.step(without=())
            twins.compare()


def test_a_resumed_flat_optimizer_is_bit_equal() -> None:
    twins = Twins(OPTIMIZERS["adamw-fused"])
    for _ in range(3):
        twins.step()
    other = Twins(OPTIMIZERS["adamw-fused"])
    other.flat.load_state_dict(copy.deepcopy(twins.flat.state_dict()))
    for a, b in zip(other.sets[0], twins.sets[0], strict=True):
        a.data.copy_(b.data)
    for _ in range(3):
        twins.step()
        for a, b in zip(other.sets[0], twins.sets[0], strict=True):
            a.grad = b.grad
        other.flat.step()
    assert all(torch.equal(a, b) for a, b in zip(other.sets[0], twins.sets[0], strict=True))


def test_schedulers_clipping_and_closures() -> None:
    twins = Twins(OPTIMIZERS["adamw-fused"])
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.01], total_steps=10)
        for o in (twins.flat, twins.plain)
    ]
    for _ in range(8):
        twins.give_gradients()
        norms = [nn.utils.clip_grad_norm_(params, 0.5) for params in twins.sets]
        assert norms[0] == norms[1]
        assert twins.flat.step(lambda: 3.0) == 3.0
        twins.plain.step()
        for scheduler in schedulers:
            scheduler.step()
        twins.compare()
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()


def test_zero_grad_either_way_and_accumulation_over_steps() -> None:
    twins = Twins(OPTIMIZERS["adamw"])
    for to_none in (True, False, False, True):
        for params in twins.sets:
            sum((p * p).sum() for p in params).backward()
        twins.flat.step()
        twins.plain.step()
        twins.flat.zero_grad(set_to_none=to_none)
        twins.plain.zero_grad(set_to_none=to_none)
        assert all((p.grad is None) == to_none for p in twins.sets[0])
        twins.compare()


def test_the_state_can_be_written() -> None:
    twins = Twins(OPTIMIZERS["adamw"])
    twins.step()
    for optimizer, params in zip((twins.flat, twins.plain), twins.sets, strict=True):
        optimizer.state[params[0]]["exp_avg"].zero_()
        optimizer.state[params[1]]["step"] = torch.tensor(7.0)
        del optimizer.state[params[2]]
    twins.step()
    twins.compare()


@pytest.mark.parametrize("how", ["replaced", "some", "to-double", "flattened-again"])
def test_moved_parameters_are_gathered_again(how: str) -> None:
    twins = Twins(OPTIMIZERS["sgd"])
    twins.step()
    for params in twins.sets:
        for p in params[1:3] if how == "some" else params:
            p.grad = None
            p.data = p.data.double() if how == "to-double" else p.data.clone()
    if how == "flattened-again":
        twins.flat = FlatOptimizer(twins.flat.release(), threshold=1000)
    twins.step()
    twins.step()
    twins.compare()
    assert len({p.untyped_storage().data_ptr() for p in twins.sets[0]}) == 3


def test_groups_can_be_added() -> None:
    twins = Twins(OPTIMIZERS["adamw"])
    twins.step()
    new = [torch.randn(4, 4), torch.randn(3)]
    for optimizer, params in zip((twins.flat, twins.plain), twins.sets, strict=True):
        more = [nn.Parameter(v.clone()) for v in new]
        optimizer.add_param_group({"params": more, "lr": 0.5})
        params.extend(more)
    twins.step()
    twins.compare()
    assert "8 tensors updated as 3" in twins.flat.summary()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_step_on_their_own(how: str) -> None:
    twins = Twins(OPTIMIZERS["adamw"])
    twins.step()
    pair = (twins.sets[0], twins.flat)
    params, flat = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    kept = [p.detach().clone() for p in twins.sets[0]]
    twins.give_gradients()
    for p, b in zip(params, twins.sets[1], strict=True):
        p.grad = b.grad.clone()
    flat.step()
    assert all(torch.equal(p, k) for p, k in zip(twins.sets[0], kept, strict=True))
    twins.plain.step()
    twins.sets[0], twins.flat = params, flat
    twins.compare()
    assert flat.summary().startswith("6 tensors")


def test_release_gives_the_plain_optimizer_back() -> None:
    twins = Twins(OPTIMIZERS["adamw-fused"])
    twins.step()
    plain = twins.flat.release()
    assert type(plain) is torch.optim.AdamW
    assert len({p.untyped_storage().data_ptr() for p in twins.sets[0]}) == len(SIZES)
    twins.give_gradients()
    plain.step()
    twins.plain.step()
    twins.compare()


def test_a_backward_through_changed_parameters_is_an_error() -> None:
    """As with the plain optimizer: the gradient would be one of neither weight."""
    twins = Twins(OPTIMIZERS["sgd"])
    for optimizer, params in zip((twins.flat, twins.plain), twins.sets, strict=True):
        loss = sum((p * p).sum() for p in params)
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_hooks_run_once_with_the_optimizer_that_the_user_has() -> None:
    twins, seen = Twins(OPTIMIZERS["adamw"]), []
    twins.flat.register_step_pre_hook(lambda o, *_: seen.append(o))
    twins.flat.register_step_post_hook(lambda o, *_: seen.append(o))
    twins.step()
    assert len(seen) == 2
    assert all(o is twins.flat for o in seen)


@pytest.mark.parametrize("name", ["adamw-fused", "adamw"])
def test_gradient_scalers_unscale_and_skip(name: str) -> None:
    twins = Twins(OPTIMIZERS[name])
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    for infinite in (False, True, False):
        for optimizer, params, scaler in zip(
            (twins.flat, twins.plain), twins.sets, scalers, strict=True
        ):
            optimizer.zero_grad()
            loss = sum((p * p).sum() for p in params)
            scaler.scale(loss).backward()
            if infinite:
                params[1].grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        twins.compare()
    assert scalers[0].get_scale() == scalers[1].get_scale() == 4.0
    assert not hasattr(twins.flat, "grad_scale")


@pytest.mark.parametrize("keep", [True, False])
def test_the_gradient_buffer_can_be_given_back(keep: bool) -> None:
    """As on a GPU, whose allocator takes and gives memory at no cost."""
    twins = Twins(OPTIMIZERS["adamw"])
    for bucket in twins.flat._buckets:
        bucket.keep = keep
        bucket.drop()
    for _ in range(3):
        twins.step()
        twins.compare()
    for bucket in twins.flat._buckets:
        assert bool(bucket._grad.untyped_storage().nbytes()) == keep


def test_what_must_stay_on_its_own_does() -> None:
    shared = torch.randn(20)
    whole = nn.Parameter(torch.randn(6, 4))
    params = [
        nn.Parameter(shared[:10]), whole, nn.Parameter(torch.randn(4, 6).t()),
        nn.Parameter(torch.randn(3), requires_grad=False), nn.Parameter(torch.tensor(1.0)),
        nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(5, dtype=torch.float64)),
    ]  # fmt: skip
    flat = FlatOptimizer(torch.optim.SGD(params, lr=1.0))
    assert flat.summary() == (
        "2 tensors updated as 1; on their own: 1 not contiguous, 1 frozen, 1 a scalar or empty, "
        "1 shares its memory, 1 the only one of its kind"
    )
    before = shared.clone()
    for p in params:
        p.grad = torch.ones_like(p) if p.requires_grad else None
    flat.step()
    assert torch.equal(shared[:10], before[:10] - 1)


@pytest.mark.parametrize("kind", ["Adafactor", "LBFGS", "Muon", "subclass"])
def test_others_are_left_as_they_are_with_the_reason(kind: str) -> None:
    class AdamW(torch.optim.AdamW):
        pass

    cls = AdamW if kind == "subclass" else getattr(torch.optim, kind)
    plain = cls([nn.Parameter(torch.randn(4, 4))])
    with pytest.raises(OptimizeError, match="element by element"):
        FlatOptimizer(plain)
    with pytest.warns(UserWarning, match="is left as it is: .* not known to work element by"):
        assert fusewright.flatten_optimizer(plain) is plain


def test_flattening_twice_is_flattening_once() -> None:
    flat = fusewright.flatten_optimizer(torch.optim.SGD([nn.Parameter(torch.ones(2))]))
    assert isinstance(flat, fusewright.FlatOptimizer)
    assert fusewright.flatten_optimizer(flat) is flat


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdamW"])
def test_bitsandbytes_keeps_blocks_within_tensors(name: str) -> None:
    """Bit-equal: a scale belongs to one tensor, as in the plain optimizer."""
    optim = pytest.importorskip("bitsandbytes").optim
    values = [torch.randn(s) for s in [(64, 100), (4097,), (10, 10), (4100,)]]
    sets = [[nn.Parameter(v.clone()) for v in values] for _ in range(2)]
    plain = [getattr(optim, name)(s, lr=1e-2, weight_decay=0.1) for s in sets]
    flat = FlatOptimizer(plain[0])
    assert ("3 tensors" if "8bit" in name else "4 tensors") in flat.summary()
    for number in range(6):
        for i, (a, b) in enumerate(zip(*sets, strict=True)):
            a.grad = torch.randn_like(a) if (number, i) != (3, 1) else None
            b.grad = None if a.grad is None else a.grad.clone()
        flat.step()
        plain[1].step()
        if number == 4:
            flat.load_state_dict(copy.deepcopy(plain[1].state_dict()))
            plain[1].load_state_dict(copy.deepcopy(flat.state_dict()))
        for a, b in zip(*sets, strict=True):
            assert torch.equal(a, b)
