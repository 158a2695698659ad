"""Calls of the delta rule become ops, whatever they also pass; other functions stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright.graph.opaque import functions
from fusewright.graph.opaque.functions import leaf
from fusewright.kernels.scan.gated_delta_rule import OP

from ..capturing import capture, rewrite, rewritten


@pytest.fixture(autouse=True)
def _functions_of_tests_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of libraries."""
    monkeypatch.setattr(functions, "LIBRARIES", (*functions.LIBRARIES, "tests"))


def rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, **more: Any,
) -> Any:  # fmt: skip
    """The convention, by the op's own reference."""
    made = OP.reference(query, key, value, g, beta, initial_state, use_qk_l2norm_in_kernel)
    return made[0], made[1] if output_final_state else None


def _wrong(query: Any, key: Any, value: Any, g: Any, beta: Any, initial_state: Any = None,
           output_final_state: bool = False, **more: Any) -> Any:  # fmt: skip
    """The convention, with another scale."""
    options = {"initial_state": initial_state, "output_final_state": output_final_state}
    out, state = rule(query, key, value, g, beta, **options)
    return 1.01 * out, state


def _noting(query: Any, key: Any, value: Any, g: Any, beta: Any, initial_state: Any = None,
            output_final_state: bool = False, **more: Any) -> Any:  # fmt: skip
    """Looks at the keyword ``scale``."""
    options = {"initial_state": initial_state, "output_final_state": output_final_state}
    out, state = rule(query, key, value, g, beta, **options)
    return out * more.get("scale", 1.0), state


def _inputs(per_feature: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 9, 2, 6), (2, 9, 2, 6), (2, 9, 4, 5), (2, 9, 4), (2, 9, 4))
    q, k, v, g, beta = (torch.rand(s) for s in shapes)
    g = g[..., None].expand(-1, -1, -1, 6) if per_feature else g
    return [t.detach().requires_grad_() for t in (q, k / 3, v, -g, beta)]


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"use_qk_l2norm_in_kernel": True, "chunk_size": 16}, {"output_final_state": True},
    {"note": 3},
], ids=str)  # fmt: skip
def test_a_call_is_one_node_and_becomes_the_op(options: dict[str, Any], per_feature: bool) -> None:
    call, inputs = leaf(rule), _inputs(per_feature)

    def fn(*t: Tensor) -> Any:
        out, state = call(*t, **options)
        return out if state is None else (out, state)

    graph = capture(fn, *inputs)
    assert [n.name for n in graph.graph.nodes if "rule" in n.name] == ["delta_rule_call"]
    expected = fn(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert rewritten(rewrite(graph)) == ["kda" if per_feature else "gated_delta_rule"]
    for ours, theirs in zip(graph(*inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_call_from_a_state_becomes_the_op() -> None:
    call, state = leaf(rule), torch.randn(2, 4, 6, 5).requires_grad_()
    inputs = [*_inputs(), state]
    graph = capture(lambda *t: call(*t[:5], initial_state=t[5])[0], *inputs)
    assert rewritten(rewrite(graph)) == ["gated_delta_rule"]
    torch.testing.assert_close(graph(*inputs)[0], rule(*inputs[:5], initial_state=state)[0])


@pytest.mark.parametrize(
    ("function", "options", "reason"),
    [(_noting, {"scale": 1.0}, "the call also passes scale"), (_wrong, {}, "exceeds")],
)
def test_other_functions_stay(function: Any, options: dict[str, Any], reason: str) -> None:
    call = leaf(function)
    findings = rewrite(capture(lambda *t: call(*t, **options)[0], *_inputs()))
    assert [(f.rule, f.status) for f in findings] == [("gated_delta_rule", "refused")]
    assert reason in findings[0].reason
