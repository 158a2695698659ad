"""What makes the verdict on a rewrite another rank's, too."""

from __future__ import annotations

import operator
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fusewright.compiler.ranks import verdicts as module
from fusewright.compiler.ranks.verdicts import portable_name, site_key
from fusewright.rewrite.engine import Candidate, Fuel, Verdict, apply
from fusewright.rewrite.op_table import TABLE

from ...rewrite.faults import FORMULAS, given, graph_of


def candidates(op: str, *inputs: Any) -> list[Candidate]:
    """What the rules find in the formula of an op."""
    from ...capturing import capture

    found: list[Candidate] = []

    def keep(candidate: Candidate) -> Verdict:
        found.append(candidate)
        return Verdict("no")

    graph = capture(FORMULAS[op][0], *inputs) if inputs else graph_of(op)
    apply(graph, FORMULAS[op][1], TABLE, keep, Fuel())
    return found


@pytest.mark.parametrize("op", sorted(FORMULAS))
def test_every_formula_has_a_key_of_its_own(op: str) -> None:
    keys = [site_key(c, False) for c in candidates(op)]
    assert keys
    assert all(keys), "a name that only this process knows"
    assert keys == [site_key(c, False) for c in candidates(op)]


def test_what_the_key_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(candidates: list[Candidate], traced: bool = False) -> str | None:
        return site_key(candidates[0], traced)

    glu = candidates("glu")
    keys = [
        key(glu),
        key(glu, traced=True),
        key(candidates("glu", *given("glu", torch.bfloat16))),
        key(candidates("glu", *(t.detach() for t in given("glu")))),
        key(candidates("rms_norm")),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        keys.append(key(glu))
    monkeypatch.setattr(module, "environment", lambda: ("torch 1.0",))
    keys.append(key(glu))
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_another_triton_makes_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles what was verified, and PyTorch's version does not say which it is."""
    found = set()
    for version in ("3.6.0", "3.9.0", ""):
        monkeypatch.setattr(module, "triton_version", lambda version=version: version)
        found.add(module.environment.__wrapped__())
    assert len(found) == 3


def _same_name() -> Any:
    def inner(x: Any) -> Any:
        return x

    return inner


@pytest.mark.parametrize(
    "target", [torch.rsqrt, F.silu, operator.mul, torch.Tensor.add, torch.ops.aten.mm.default]
)
def test_names_that_any_process_can_import(target: Any) -> None:
    assert " at 0x" not in portable_name(target)


def test_a_function_that_others_cannot_import_is_not_taken_for_its_namesake() -> None:
    one, two = _same_name(), _same_name()
    assert portable_name(one) != portable_name(two)
    assert " at 0x" in portable_name(one)
    assert portable_name("view") == "view"


def test_a_formula_with_such_a_function_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    glu = candidates("glu")[0]
    monkeypatch.setattr(module, "portable_name", lambda target: f"<function f at 0x{id(glu):x}>")
    assert site_key(glu, False) is None


def test_devices_are_numbered_as_they_are_met() -> None:
    def text(first: int, second: int) -> str:
        devices = [torch.device("cuda", i) for i in (first, second, first)]
        return module._DEVICE.sub(module._numbered(), repr((str(devices), f"cuda:{second}")))

    assert text(0, 1) == text(3, 2) != text(1, 1)
    assert not re.search(r"index", text(0, 1))


def test_kernels_that_another_rank_lacks_make_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    (candidate, *_) = candidates("glu")
    monkeypatch.setattr(module.native, "has_started", lambda: False)
    keys = {site_key(candidate, False)}
    monkeypatch.setattr(module.native, "has_started", lambda: True)
    for problem in (None, "no C++ compiler was found"):
        monkeypatch.setattr(module.native, "problem", lambda problem=problem: problem)
        keys.add(site_key(candidate, False))
    assert len(keys) == 3
