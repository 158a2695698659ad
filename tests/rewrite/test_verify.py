"""Verification: what it samples, and what it lets through."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fusewright import optimize
from fusewright.passes.glu import GLU
from fusewright.rewrite import verify
from fusewright.rewrite.engine import Fuel, Verdict, apply
from fusewright.rewrite.op_table import TABLE
from fusewright.rewrite.rule import Emit, Match
from fusewright.rewrite.sample_inputs import REGIMES
from fusewright.rewrite.verify import Verifier

from ..capturing import capture, rewrite, rewritten
from ..models.zoo import FAMILIES, build


def test_small_sizes_fit_every_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    # falling back to the real sizes runs the loss in fp64 over the whole batch: gigabytes
    failures: list[str] = []
    check = verify._check

    def watched(site: object, *rest: object) -> object:
        try:
            return check(site, *rest)
        except Exception as error:
            failures.append(f"{site.candidate.rule.name}: {error}")
            raise

    monkeypatch.setattr(verify, "_check", watched)
    torch._dynamo.reset()
    model = optimize(build(FAMILIES[0], lora=True), codegen="eager")
    ids = torch.randint(0, 200, (4, 96))
    model(input_ids=ids, labels=ids).loss.backward()
    assert failures == []


@pytest.mark.parametrize(
    ("enough", "counts", "norm"),
    [(2, [1, 16], "rms"), (2, [1, 16], "peak"), (17, [1, 16, 64], "peak")],
)
def test_what_one_draw_finds_too_large_is_judged_by_several(
    monkeypatch: pytest.MonkeyPatch, enough: int, counts: list[int], norm: str
) -> None:
    seen: list[int] = []
    check = verify._check

    def unlucky(site: object, draws: list[list[object]], regime: object) -> object:
        seen.append(len(draws))
        verdict = check(site, draws, regime)
        return Verdict(f"output 0: {norm} error 2 exceeds 1") if len(draws) < enough else verdict

    monkeypatch.setattr(verify, "_check", unlucky)
    gate, up = (torch.randn(2, 5, 8, requires_grad=True) for _ in range(2))
    findings = rewrite(capture(lambda g, u: torch.relu(g) * u, gate, up))
    assert seen == counts * (1 + len(REGIMES))
    assert rewritten(findings) == ["glu"]


def test_what_several_draws_find_too_large_in_all_elements_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def worse(site: object, draws: list[list[object]], regime: object) -> Verdict:
        seen.append(len(draws))
        return Verdict("output 0: rms error 2 exceeds 1")

    monkeypatch.setattr(verify, "_check", worse)
    gate, up = (torch.randn(2, 5, 8, requires_grad=True) for _ in range(2))
    findings = rewrite(capture(lambda g, u: torch.relu(g) * u, gate, up))
    assert (seen, [f.status for f in findings]) == ([1, 16], ["refused"])


class Doubled(GLU):
    """A rewrite that is wrong by little: within no budget, however often it is tried."""

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        return ops.call(torch.mul, super().rewrite(m, ops), 1 + 1e-5)


def test_a_rewrite_that_is_worse_is_refused_by_several_draws() -> None:
    gate, up = (torch.randn(2, 5, 8, requires_grad=True) for _ in range(2))
    findings = rewrite(capture(lambda g, u: torch.relu(g) * u, gate, up), [Doubled()])
    assert [f.status for f in findings] == ["refused"]
    assert "exceeds" in findings[0].reason


def test_the_verdict_on_equal_sizes_is_not_that_on_different_ones() -> None:
    def graph(*shape: int) -> fx.GraphModule:
        graphs: list[fx.GraphModule] = []
        torch._dynamo.reset()
        # sizes that are met as one number are one symbol
        made = torch.compile(
            lambda g, u: torch.relu(g) * u, dynamic=True,
            backend=lambda module, _: graphs.append(module) or module.forward,
        )  # fmt: skip
        made(torch.randn(shape), torch.randn(shape))
        return graphs[0]

    verifier = Verifier()
    for shape in ((4, 6, 8), (6, 6, 8)):
        apply(graph(*shape), [GLU()], TABLE, verifier, Fuel())
    assert len(verifier.verdicts) == 2
    with torch.no_grad():
        apply(graph(4, 6, 8), [GLU()], TABLE, verifier, Fuel())
    assert len(verifier.verdicts) == 3
    apply(graph(4, 6, 8), [GLU()], TABLE, verifier, Fuel())
    assert len(verifier.verdicts) == 3
