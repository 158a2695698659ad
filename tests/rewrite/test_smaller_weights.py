"""Large weights are verified by small ones, wherever nothing else depends on their sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fusewright.passes.linear_cross_entropy import LinearCrossEntropy
from fusewright.rewrite import smaller_weights
from fusewright.rewrite.engine import Fuel, apply
from fusewright.rewrite.findings import Finding
from fusewright.rewrite.op_table import TABLE
from fusewright.rewrite.rule import Emit, Match, Rule
from fusewright.rewrite.smaller_weights import LARGE, _chosen, _chosen_in_ratio, _small
from fusewright.rewrite.verify import Verifier

from ..capturing import capture
from ..kernels.util import Watch
from .faults import of_any_size

VOCABULARY, HIDDEN = 50_000, 64


@contextmanager
def measured() -> Iterator[list[int]]:
    """The bytes of each tensor that is made meanwhile, but of fake ones."""
    sizes: list[int] = []

    def note(op: Any, args: Any, outs: list[Tensor]) -> None:
        real = (t for t in outs if not isinstance(t, FakeTensor) and not t.is_meta)
        sizes.extend(t.untyped_storage().nbytes() for t in real)

    with Watch(note):
        yield sizes


def _loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, w).float()
    return F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))


def _head(trained: bool) -> fx.GraphModule:
    x = of_any_size(torch.randn(2, 6, HIDDEN, dtype=torch.bfloat16), 1).requires_grad_()
    w = torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16) / 8
    labels = of_any_size(torch.randint(0, VOCABULARY, (2, 6)), 1)
    return capture(_loss, x, w.requires_grad_(trained), labels)


def _judged(graph: fx.GraphModule, change: Callable[..., Any] | None = None) -> Finding:
    right = TABLE["linear_cross_entropy"]
    op = (lambda *a: change(right, *a)) if change else right
    table = {**TABLE, "linear_cross_entropy": op}
    return apply(graph, [LinearCrossEntropy()], table, Verifier(), Fuel())[0]


@pytest.mark.parametrize("trained", [False, True])
def test_a_large_head_takes_no_memory(trained: bool) -> None:
    graph = _head(trained)
    with measured() as sizes:
        finding = _judged(graph)
    assert finding.status == "rewritten", finding.reason
    # in fp64 the weight alone would be 26 MB, and 35 rows of logits 14 MB
    assert 0 < max(sizes) < 2 << 20


def test_a_wrong_loss_of_a_large_head_is_refused_without_memory() -> None:
    """Not after another look by a head that is drawn in its real size."""

    def fault(op: Any, x: Tensor, w: Tensor, *rest: Any) -> Tensor:
        return op(x, w, *rest) * 1.01

    graph = _head(False)
    with measured() as sizes:
        assert "output 0: rms error" in _judged(graph, fault).reason
    assert 0 < max(sizes) < 2 << 20


def test_sizes_are_aligned_as_the_real_ones_and_those_of_nothing_else() -> None:
    assert [_small(n, set()) for n in (49152, 32003, 32004, 151936)] == [896, 1023, 1020, 896]
    assert _small(49152, {896}) == 1152
    for size in (49152, 32003, 32004):
        small = _small(size, set())
        step = min(size & -size, 128)
        assert small % step == 0
        assert small // step % 2 == 1


def test_the_largest_size_goes_first_and_small_weights_stay() -> None:
    assert _chosen([(576, 1536), (1024, 1024)], set()) == {}
    assert _chosen([(49152, 576)], {49152, 576}) == {49152: 896}
    assert _chosen([(1024, 14336), (14336,)], {1024, 14336}) == {14336: 896}
    both = _chosen([(14336, 4096), (4096, 4096)], {4096, 14336})
    assert both == {14336: 896, 4096: 1152}
    assert _chosen([(8, 2048, 1024)], {8, 2048, 1024}) == {
        2048: 896,
    }


def test_halves_and_thirds_keep_their_ratio() -> None:
    assert _chosen_in_ratio([(28672, 512)], {28672, 14336, 512}) == {28672: 768, 14336: 384}
    assert _chosen_in_ratio([(2304, 768)], {2304, 768}) == {2304: 1152, 768: 384}
    assert _chosen_in_ratio([(5760, 2880)], {5760, 2880, 448}) == {5760: 1152, 2880: 576}
    assert _chosen_in_ratio([(3000, 1000)], {3000, 1000}) == {3000: 1512, 1000: 504}
    assert _chosen_in_ratio([(49152, 576)], {49152, 576}) == {49152: 896}  # of nothing a half
    assert _chosen_in_ratio([(1024, 1024)], {1024, 512}) == {}
    assert _chosen_in_ratio([(2047, 1024)], {2047, 1024, 512}) == {2047: 1023}


class Heads(Rule):
    """A projection cut into heads, by an op that does just this."""

    name = op = "heads"

    def patterns(self, p: Any, x: Any, w: Any) -> Any:
        """A linear and a reshape to a shape that the code writes down."""
        yield p.reshape(p.linear(x, w), p.anything)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """The same, by a function."""
        return ops.call(_heads, m.x, m.w)


def _heads(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w).view(*x.shape[:-1], 40, 128)


def test_real_sizes_where_something_else_depends_on_them() -> None:
    x, w = of_any_size(torch.randn(2, 6, 256), 1), torch.randn(5120, 256)
    graph = capture(lambda x, w: F.linear(x, w).view(*x.shape[:-1], 40, 128), x, w)
    with measured() as sizes:
        finding = apply(graph, [Heads()], TABLE, Verifier(), Fuel())[0]
    assert finding.status == "rewritten", finding.reason
    assert max(sizes) >= w.numel() * 4
    assert w.numel() > LARGE


class Turned(Rule):
    """A projection whose result lies in memory in another order."""

    name = op = "turned"

    def patterns(self, p: Any, x: Any, w: Any) -> Any:
        """A linear."""
        yield p.linear(x, w)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """The same values."""
        return ops.call(lambda x, w: F.linear(x, w).mT.contiguous().mT, m.x, m.w)


def test_what_reads_the_result_is_not_lost_with_the_sizes() -> None:
    def judged(fn: Callable[..., Any]) -> str:
        x, w = of_any_size(torch.randn(2, 6, 256), 1), torch.randn(5120, 256)
        return apply(capture(fn, x, w), [Turned()], TABLE, Verifier(), Fuel())[0].reason

    assert judged(lambda x, w: F.linear(x, w) + 1) == ""
    assert "has strides" in judged(lambda x, w: F.linear(x, w).view(-1))


class Half(Rule):
    """A gate cut off a wide projection, by an op that is right at some sizes only."""

    name = op = "half"

    def __init__(self, wrong: tuple[int, ...] = ()) -> None:
        self.wrong, self.met = wrong, []

    def patterns(self, p: Any, x: Any, w: Any, v: Any) -> Any:
        """Two linears, the second on one half or on all of the first one's result."""
        wide = p.linear(x, w)
        yield p.linear(p.either(p.slice(wide, -1, p.anything, p.anything), wide), v)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """The same, by a function that notes the sizes that it meets."""

        def op(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
            self.met.append((w.shape[0], v.shape[1]))
            y = F.linear(F.linear(x, w)[..., : v.shape[1]], v)
            return y * 2 if w.shape[0] in self.wrong else y

        return ops.call(op, m.x, m.w, m.v)


def _halves(rule: Rule, wide: int, half: int) -> Finding:
    x, w, v = of_any_size(torch.randn(2, 6, 256), 1), torch.randn(wide, 256), torch.randn(3, half)

    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        y = F.linear(x, w)
        return F.linear(y.chunk(2, -1)[0] if half < wide else y, v)

    return apply(capture(fn, x, w, v), [rule], TABLE, Verifier(), Fuel())[0]


def test_a_half_of_a_large_size_is_verified_by_the_half_of_a_small_one() -> None:
    rule = Half()
    assert _halves(rule, 16384, 8192).status == "rewritten"
    assert set(rule.met) == {(768, 384)}


def test_what_a_small_size_refuses_is_judged_by_the_real_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And by no other small one, at which it may happen to be right."""
    monkeypatch.setattr(smaller_weights, "_TOO_LARGE", 1 << 24)
    rule = Half(wrong=(896, 8192))
    assert "error" in _halves(rule, 8192, 8192).reason
    assert {w for w, _ in rule.met} == {896, 8192}


def test_what_is_too_large_to_be_drawn_is_judged_by_a_small_size_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(smaller_weights, "_TOO_LARGE", 8192)
    rule = Half(wrong=(896, 8192))
    assert "error" in _halves(rule, 8192, 8192).reason
    assert {w for w, _ in rule.met} == {896}
