"""Modules of a few linears outside the blocks: projectors, mergers and pooling heads."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewright import optimize, restore
from fusewright.compiler.regions import find
from tests.explained import explain

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WIDTH, VOCABULARY = 16, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.up(self.norm(x)))


class Projector(nn.Module):
    """Norms patches, folds two into one, and gates."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = (nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).reshape(x.shape[0], -1, 2 * WIDTH)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Uncapturable(Projector):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if float(x.detach().sum()) > 1e9 else 1.0)


class Head(nn.Module):
    """A projection to the vocabulary with something before it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.decoder = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(F.gelu(self.dense(x)))


class Words(nn.Module):
    """A table of words and what is done to them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale(self.table(ids))


class Model(nn.Module):
    """A tower, a projector and a language model."""

    def __init__(self, projector: type[nn.Module] = Projector) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.ModuleList(Block() for _ in range(2))
        self.projector, self.embed = projector(), Words()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.pool = nn.ModuleDict({"by": Projector()})
        self.head = Head()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head.decoder

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        for block in self.tower:
            pixels = block(pixels)
        x = torch.cat((self.projector(pixels), self.embed(ids)), 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).logsumexp(-1).mean() + self.pool["by"](x).mean()


def _step(model: nn.Module, patches: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(patches)
    pixels = torch.randn(3, patches, WIDTH, generator=generator)
    ids = torch.randint(0, VOCABULARY, (3, 4), generator=generator)
    model.zero_grad()
    loss = model(ids, pixels)
    loss.backward()
    return [loss, *(p.grad for p in model.parameters())]


def _assert_equal(ours: nn.Module, eager: nn.Module) -> None:
    for patches in (8, 12, 8, 4):
        torch.testing.assert_close(_step(ours, patches), _step(eager, patches))


def _projectors(model: nn.Module) -> list[str]:
    return [r.path for r in find(model) if r.kind == "projector"]


def test_projectors_are_regions_and_heads_and_tables_of_words_are_none() -> None:
    assert _projectors(Model()) == ["projector", "pool.by"]
    assert all(r.path not in ("projector.norm", "pool.by.norm") for r in find(Model()))


def test_a_large_module_is_no_projector_but_what_it_holds() -> None:
    model = Model()
    model.projector = nn.Sequential(*(Projector() for _ in range(6)))
    assert _projectors(model) == [*(f"projector.{i}" for i in range(6)), "pool.by"]


def test_their_formulas_are_rewritten() -> None:
    eager = Model()
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager)
    report = explain(ours)
    sites = {(s.module, s.rule) for s in report.sites if s.status == "rewritten"}
    assert {("projector.norm", "layer_norm"), ("projector", "mlp_block")} <= sites
    assert {("pool.by.norm", "layer_norm"), ("pool.by", "mlp_block")} <= sites
    assert not report.bypasses
    restore(ours)
    torch.testing.assert_close(_step(ours, 8), _step(eager, 8), rtol=0, atol=0)


def test_their_adapters() -> None:
    config = peft.LoraConfig(r=2, target_modules=["gate", "up", "down"], init_lora_weights=False)
    eager: Any = peft.get_peft_model(Model(), config)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager)
    rules = [s.rule for s in explain(ours).sites if ".projector" in s.module]
    assert rules.count("lora_linear") == 3


def test_one_that_cannot_be_captured_runs_as_it_was_and_its_norm_is() -> None:
    eager = Model(Uncapturable)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager)
    report = explain(ours)
    reasons = {b.module: b.reason for b in report.bypasses}
    assert list(reasons) == ["projector"]
    assert "could not be captured" in reasons["projector"]
    assert ("projector.norm", "layer_norm") in {(s.module, s.rule) for s in report.sites}


def test_evaluation_and_hooks_inside() -> None:
    eager, calls = Model(), []
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    with torch.no_grad():
        ids, pixels = torch.ones(1, 2, dtype=torch.long), torch.randn(1, 4, WIDTH)
        torch.testing.assert_close(ours(ids, pixels), eager(ids, pixels))
    ours.projector.gate.register_forward_hook(lambda *args: calls.append(1))
    _assert_equal(ours, eager)
    assert len(calls) == 4


class Nested(nn.Module):
    """Blocks in stages, in a list of lists."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        stages = (nn.ModuleList(Block() for _ in range(n)) for n in (1, 2))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return x


def test_the_blocks_of_stages_are_blocks() -> None:
    eager = Nested()
    assert [r.path for r in find(eager)] == ["stages.0.0", "stages.1.0", "stages.1.1"]
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    x = torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(ours(x), eager(x))
    assert explain(ours).by_rule() == {"layer_norm": 3}


class Shuffle(Projector):
    """Folds the positions of a square into features, by numbers that it works out, and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * WIDTH)
        self.gate, self.up = (nn.Linear(4 * WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, patches, _ = x.shape
        side = int(patches**0.5)
        x = x.reshape(batch, side, side, -1)
        x = x.reshape(batch, side, int(side * 0.5), int(x.shape[-1] / 0.5)).permute(0, 2, 1, 3)
        x = self.norm(x.reshape(batch, int(side * 0.5), int(side * 0.5), -1))
        return self.down(F.silu(self.gate(x)) * self.up(x)).flatten(1, 2)


class EarlyFeatures(Model):
    """Its projector reads what the last block of the tower reads, too."""

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        pixels = self.tower[0](pixels)
        late = self.tower[1](pixels)
        x = torch.cat((self.projector(pixels), self.embed(ids), late), 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).logsumexp(-1).mean() + self.pool["by"](x[:, :4]).mean()


def test_one_whose_input_a_block_has_marked_as_of_any_length_is_rewritten() -> None:
    eager = EarlyFeatures(Shuffle)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    for _ in range(2):
        torch.testing.assert_close(_step(ours, 16), _step(eager, 16))
    sites = {(s.module, s.rule) for s in explain(ours).sites if s.status == "rewritten"}
    assert {("projector.norm", "layer_norm"), ("projector", "mlp_block")} <= sites
