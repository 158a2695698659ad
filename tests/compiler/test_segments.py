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
