"""Towers that call attention for each picture: one graph, whatever the number of pictures."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusewright import explain, optimize
from fusewright.compiler.install import active
from fusewright.passes import PIPELINE

from ..models import architectures

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WIDTH, HEADS = 16, 2
_Attend = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def sdpa(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As transformers calls PyTorch's."""
    length = q.shape[2]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, scale=0.3)
    out = out.reshape(out.shape[0], -1, length, v.shape[-1])
    return out.transpose(1, 2).contiguous()


def causal(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def masked(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def written_out(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.matmul(q, k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2)


def of_the_mean(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q - q.mean(2, keepdim=True), k, v).transpose(1, 2)


def centred(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return out - out.mean(1, keepdim=True)


def _rotate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class Attention(nn.Module):
    def __init__(self, attend: _Attend) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attend = attend

    def forward(self, x: Tensor, bounds: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (t[:, None] for t in tables)
        q, k, v = self.qkv(x).reshape(len(x), 3, HEADS, -1).permute(1, 0, 2, 3).unbind(0)
        q, k = (t * cos + _rotate(t) * sin for t in (q, k))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        lengths = bounds[1:] - bounds[:-1]
        splits = [torch.split(t, lengths.tolist(), dim=2) for t in (q, k, v)]
        outs = [self.attend(self, *piece) for piece in zip(*splits, strict=True)]
        return self.proj(torch.cat(outs, dim=1).reshape(len(x), -1))


class Block(nn.Module):
    def __init__(self, attend: _Attend) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(attend)

    def forward(self, x: Tensor, bounds: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return x + self.attention(self.norm(x), bounds=bounds, tables=tables)


class Tower(nn.Module):
    def __init__(self, attend: _Attend = sdpa, block: type[nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block(attend) for _ in range(2))
        self.checkpoints = False

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        angles = torch.arange(len(x))[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        angles = torch.cat((angles, angles), -1)
        tables = angles.cos(), angles.sin()
        for block in self.blocks:
            if self.checkpoints:
                x = checkpoint(block, x, bounds, tables, use_reentrant=False)
            else:
                x = block(x, bounds, tables=tables)
        return x


PICTURES = ([6, 4], [9], [4, 4, 4, 3], [1, 2, 5])


def _assert_equal(ours: Tower, eager: Tower, pictures: Any = PICTURES) -> None:
    generator = torch.Generator().manual_seed(1)
    for lengths in pictures:
        x = torch.randn(sum(lengths), WIDTH, generator=generator).requires_grad_()
        results = []
        for model in (ours, eager):
            model.zero_grad()
            x.grad = None
            out = model(x, lengths)
            out.sin().sum().backward()
            results.append([out, x.grad, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(*results)


def _graphs(model: Tower) -> int:
    record = active(model.blocks[0])
    assert record is not None
    return sum(f.graphs for f in record.session.log.functions._common.values())


@pytest.mark.long("True")
@pytest.mark.parametrize("checkpoints", [False, True])
def test_any_number_of_pictures_is_one_graph(checkpoints: bool) -> None:
    eager = Tower()
    eager.checkpoints = checkpoints
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager)
    report = explain(ours)
    assert report.by_rule() == {"layer_norm": 2, "rope": 2, "attention": 2}
    assert not report.bypasses
    assert _graphs(ours) == 1


@pytest.mark.long
def test_inductor_takes_the_op() -> None:
    eager = Tower()
    ours = optimize(copy.deepcopy(eager), codegen="inductor")
    _assert_equal(ours, eager)
    assert explain(ours).by_rule()["attention"] == 2


def test_without_the_rule_the_calls_are_those_of_the_code() -> None:
    eager, rules = Tower(), [r for r in PIPELINE if r.name != "attention"]
    ours = optimize(copy.deepcopy(eager), passes=rules, codegen="eager")
    _assert_equal(ours, eager)
    assert explain(ours).by_rule() == {"layer_norm": 2, "rope": 2}
    assert _graphs(ours) == 1


def test_in_bfloat16_as_autocast_casts_it() -> None:
    eager = Tower()
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    x = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = ours(x, [6, 4]), eager(x, [6, 4])
        mine.sum().backward()
    assert mine.dtype is theirs.dtype
    torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0.02)
    assert explain(ours).by_rule()["attention"] == 2


@pytest.mark.long("masked", "of_the_mean", "written_out")
@pytest.mark.parametrize("attend", [causal, masked, written_out, of_the_mean, centred])
def test_what_is_no_attention_within_segments_runs_as_it_was(attend: _Attend) -> None:
    """Other code for a piece knows its length, or mixes its positions."""
    eager = Tower(attend)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager)
    report = explain(ours)
    assert "attention" not in report.by_rule()
    assert report.by_rule()["layer_norm"] == 2, "parts of the block are captured all the same"
    if attend is not written_out:  # of which there is a graph for each number of pictures
        assert any("could not be captured" in b.reason for b in report.bypasses)


class OfLengths(Block):
    """Reads the boundaries for something else besides."""

    def forward(self, x: Tensor, bounds: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(x, bounds, tables) * bounds.shape[0]


class OfTheLast(Block):
    def forward(self, x: Tensor, bounds: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(x, bounds[:-1], tables)


@pytest.mark.parametrize("block", [OfLengths, OfTheLast])
def test_boundaries_that_are_read_otherwise(block: type[nn.Module]) -> None:
    eager = Tower(causal, block)  # which has no trouble with a segment of no positions
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager, PICTURES if block is OfLengths else ([6, 4, 0], [9, 0]))
    assert explain(ours).by_rule()["layer_norm"] == 2


def test_segments_that_do_not_add_up_are_eagers_error() -> None:
    ours = optimize(Tower(), codegen="eager")
    _ = ours(torch.randn(10, WIDTH), [6, 4])
    for model in (ours, Tower()):
        with pytest.raises(RuntimeError):
            model(torch.randn(11, WIDTH), [6, 4])


def test_evaluation_and_frozen_towers() -> None:
    eager = Tower().requires_grad_(False)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    x = torch.randn(10, WIDTH)
    torch.testing.assert_close(ours(x, [6, 4]), eager(x, [6, 4]))
    with torch.no_grad():
        torch.testing.assert_close(ours(x, [3, 7]), eager(x, [3, 7]))


class Heads(Attention):
    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).reshape(len(x), 3, HEADS, -1).permute(1, 2, 0, 3)[None].unbind(1)

    def out(self, x: Tensor, out: Tensor) -> Tensor:
        rows = out.transpose(1, 2).reshape(out.shape[2], -1)
        return self.proj(F.pad(rows, (0, 0, 0, len(x) - len(rows))))


def _attend(rows: Any) -> list[Tensor]:
    return [F.scaled_dot_product_attention(*each) for each in zip(*rows, strict=True)]


class InALoop(Heads):
    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        rows = [torch.split(t, lengths, dim=2) for t in self.heads(x)]
        outs, others = [], []
        for q, k, v in zip(*rows, strict=True):
            out, other = F.scaled_dot_product_attention(q, k, v), None
            outs.append(out)
            others.append(other)
        return self.out(x, torch.cat(outs, 2)), others


class ByName(Heads):
    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        q, k, v = self.heads(x)
        qs = torch.split(q, lengths, 2)
        ks = torch.split(k, lengths, 2)
        vs = torch.split(v, lengths, 2)
        outs = [F.scaled_dot_product_attention(*each) for each in zip(qs, ks, vs, strict=True)]
        return self.out(x, torch.cat(outs, 2)), None


class Reversed(Heads):
    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        rows = [torch.split(t, lengths, dim=2) for t in self.heads(x)]
        outs = [F.scaled_dot_product_attention(*each) for each in zip(*rows, strict=True)]
        return self.out(x, torch.cat(outs[::-1], 2)), None


class Crossed(Heads):
    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        q, k, v = (torch.split(t, lengths, dim=2) for t in self.heads(x))
        each = zip(q, k[::-1], v[::-1], strict=True)
        return self.out(x, torch.cat([F.scaled_dot_product_attention(*e) for e in each], 2)), None


class FirstForAll(Heads):
    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        qs, ks, vs = (torch.split(t, lengths, dim=2) for t in self.heads(x))
        outs = [F.scaled_dot_product_attention(q, ks[0], vs[0]) for q in qs]
        return self.out(x, torch.cat(outs, 2)), None


class LastOnly(Heads):
    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        q, k, v = (torch.split(t, lengths, dim=2)[-1] for t in self.heads(x))
        return self.out(x, torch.cat([F.scaled_dot_product_attention(q, k, v)], 2)), None


class FirstOnly(Heads):
    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        rows = [torch.split(t, lengths, dim=2) for t in self.heads(x)]
        outs = [F.scaled_dot_product_attention(*each) for each in zip(*rows, strict=True)]
        return self.out(x, torch.cat(outs[:1], 2)), None


class FirstThree(Heads):
    """As many as are traced."""

    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        rows = [torch.split(t, lengths, dim=2) for t in self.heads(x)]
        outs = [F.scaled_dot_product_attention(*each) for each in zip(*rows, strict=True)]
        return self.out(x, torch.cat(outs[:3], 2)), None


class OfTheCount(Heads):
    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        rows = [torch.split(t, lengths, dim=2) for t in self.heads(x)]
        outs = [F.scaled_dot_product_attention(*each) for each in zip(*rows, strict=True)]
        if len(outs) > 3:
            outs = [out * 2 for out in outs]
        return self.out(x, torch.cat(outs, 2)), None


class Elsewhere(Heads):
    """Another function may do anything with a list."""

    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        outs = _attend([torch.split(t, lengths, dim=2) for t in self.heads(x)])
        return self.out(x, torch.cat(outs, 2)), None


class Numbered(Heads):
    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        rows = [torch.split(t, lengths, dim=2) for t in self.heads(x)]
        outs = [
            F.scaled_dot_product_attention(*each, scale=0.5 if i > 2 else 0.1)
            for i, each in enumerate(zip(*rows, strict=True))
        ]
        return self.out(x, torch.cat(outs, 2)), None


class NumberedInALoop(Heads):
    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        rows = [torch.split(t, lengths, dim=2) for t in self.heads(x)]
        outs = []
        i = 0
        for q, k, v in zip(*rows, strict=True):
            i = i + 1
            outs.append(F.scaled_dot_product_attention(q, k, v, scale=0.5 if i > 3 else 0.1))
        return self.out(x, torch.cat(outs, 2)), None


class OfTheOneBefore(Heads):
    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        rows = [torch.split(t, lengths, dim=2) for t in self.heads(x)]
        outs, before = [], 0
        for q, k, v in zip(*rows, strict=True):
            out = F.scaled_dot_product_attention(q, k, v) + before
            outs.append(out)
            before = out.mean()
        return self.out(x, torch.cat(outs, 2)), None


class WithState(Heads):
    """What only the graph shows."""

    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        rows = [torch.split(t, lengths, dim=2) for t in self.heads(x)]
        seen: list[Tensor] = []
        outs = [self.keys_of_first(seen, *each) for each in zip(*rows, strict=True)]
        return self.out(x, torch.cat(outs, 2)), None

    def keys_of_first(self, seen: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen += [k, v]
        return F.scaled_dot_product_attention(q, seen[0], seen[1])


class OfTheLength(Heads):
    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        rows = [torch.split(t, lengths, dim=2) for t in self.heads(x)]
        outs = [
            F.scaled_dot_product_attention(q, k, v, scale=q.shape[2] ** -0.5)
            for q, k, v in zip(*rows, strict=True)
        ]
        return self.out(x, torch.cat(outs, 2)), None


class OfAShortOne(Heads):
    def forward(self, x: Tensor, bounds: Tensor, **_: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        rows = [torch.split(t, lengths, dim=2) for t in self.heads(x)]
        outs = [
            F.scaled_dot_product_attention(q, k, v, scale=0.1 if q.shape[2] > 4 else 0.7)
            for q, k, v in zip(*rows, strict=True)
        ]
        return self.out(x, torch.cat(outs, 2)), None


class First(nn.Module):
    """A block of the first result of its attention."""

    def __init__(self, attention: type[Heads]) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), attention(sdpa)

    def forward(self, x: Tensor, bounds: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        out, _ = self.attention(self.norm(x), bounds=bounds)
        return x + out


class Both(First):
    def forward(self, x: Tensor, bounds: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        out, others = self.attention(self.norm(x), bounds=bounds)
        return x + out * len(others)


def _towers(attention: Any, block: Any, pictures: Any) -> Tower:
    eager = Tower(attention, block)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager, pictures)
    return ours


@pytest.mark.parametrize("attention", [InALoop, ByName])
def test_pieces_that_are_joined_in_their_order(attention: type[Heads]) -> None:
    ours = _towers(attention, First, ([6, 4, 5, 3], [9], [4, 0, 4, 4, 4, 3]))
    assert explain(ours).by_rule() == {"layer_norm": 2, "attention": 2}
    assert _graphs(ours) == 1


@pytest.mark.long(
    *["Crossed-First", "FirstForAll-First", "LastOnly-First", "FirstOnly-First"],
    *["NumberedInALoop-First", "Elsewhere-First", "InALoop-Both", "OfTheLength-First"],
)
@pytest.mark.parametrize(
    ("attention", "block"),
    [
        *[(InALoop, Both), (Reversed, First), (Crossed, First), (FirstForAll, First)],
        *[(LastOnly, First), (FirstOnly, First), (FirstThree, First), (OfTheCount, First)],
        *[(Elsewhere, First), (Numbered, First), (NumberedInALoop, First)],
        *[(OfTheOneBefore, First), (WithState, First), (OfTheLength, First), (OfAShortOne, First)],
    ],
)
def test_other_uses_of_pieces_are_as_they_were(attention: type[Heads], block: type[First]) -> None:
    pictures = [[4, 4, 4, 4], [9]] if attention is Crossed else [[6, 4, 5, 3], [9]]
    ours = _towers(attention, block, pictures)
    assert "attention" not in explain(ours).by_rule()


@pytest.mark.parametrize("pictures", [[[9], [4, 5]], [[3, 4], [5, 4]]])
def test_one_that_is_longer_than_all_that_are_traced(pictures: list[list[int]]) -> None:
    _ = _towers(OfAShortOne, First, pictures)


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm4v", "paddleocr_vl"])
def test_towers_of_families(name: str) -> None:
    eager = architectures.build(name, "multimodal")
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    inputs, results = architectures.step_inputs(eager, "multimodal"), []
    for model in (ours, eager):
        architectures.loss_of(model, inputs).backward()
        results.append([p.grad for p in model.parameters()])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert explain(ours).by_rule()["attention"] == 2
