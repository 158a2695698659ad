"""Towers that call attention for each image: one graph, whatever the number of images."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fusewright import optimize
from fusewright.compiler.install import active
from fusewright.passes import PIPELINE
from tests.explained import explain

from ..models import architectures

generic = pytest.importorskip("transformers.utils.generic")
is_flash_attention_requested = getattr(generic, "is_flash_attention_requested", None)
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(
        is_flash_attention_requested is None, reason="an older transformers has no such branch"
    ),
]

WIDTH, HEADS = 16, 2


def _rotate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def written_out(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> Any:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
    return (scores.softmax(-1) @ v).transpose(1, 2), None


class Attention(nn.Module):
    """Attention of an image tower, as transformers writes it."""

    dropout = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.is_causal = False

    def forward(self, x: Tensor, bounds: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (t[:, None] for t in tables)
        q, k, v = self.qkv(x).reshape(len(x), 3, HEADS, -1).permute(1, 0, 2, 3).unbind(0)
        q, k = (t * cos + _rotate(t) * sin for t in (q, k))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, written_out
        )
        options = {"scaling": 0.3, "dropout": self.dropout, "is_causal": False}
        if is_flash_attention_requested(self.config):
            out, _ = interface(
                self, q, k, v, None, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, **options
            )
        else:
            lengths = bounds[1:] - bounds[:-1]
            splits = [torch.split(t, lengths.tolist(), dim=2) for t in (q, k, v)]
            outs = [interface(self, *each, None, **options)[0] for each in zip(*splits)]  # noqa: B905
            out = torch.cat(outs, dim=1)
        return self.proj(out.reshape(len(x), -1).contiguous())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()

    def forward(self, x: Tensor, bounds: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return x + self.attention(self.norm(x), bounds=bounds, tables=tables)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
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


@pytest.mark.parametrize("kind", ["dropout", "eager", "registered"])
def test_other_attention_runs_the_original_code(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = Tower()
    pictures = PICTURES
    if kind == "dropout":
        monkeypatch.setattr(Attention, "dropout", 1.0)
    elif kind == "eager":
        for block in eager.blocks:
            block.attention.config._attn_implementation = "eager"
    else:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", written_out)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager, pictures)
    report = explain(ours)
    assert "attention" not in report.by_rule()
    assert report.by_rule()["layer_norm"] == 2, "parts of the block are captured all the same"


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
