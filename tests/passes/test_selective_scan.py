"""Scans: a call with the convention is one node, and what the op does not do is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusewright.graph.effects import Effects
from fusewright.graph.opaque import functions
from fusewright.graph.opaque.functions import leaf
from fusewright.kernels.scan.ssd import OP as SSD

from ..capturing import capture, rewrite, rewritten


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    return_last_state: bool = False, use_something: bool = False, seq_idx: Any = None,
    **more: Any,
) -> Any:  # fmt: skip
    """The convention, computed in the most direct way."""
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    state, outs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        drive = (delta * u)[:, :, t, None] * B[:, None, :, t]
        state = torch.exp(delta[:, :, t, None] * A) * state + drive
        outs.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(outs, -1)
    y = y if D is None else y + u * D[:, None]
    y = y if z is None else y * F.silu(z)
    return (y, state) if return_last_state else y


def wrong(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None,
          delta_bias: Any = None, delta_softplus: bool = False) -> Any:  # fmt: skip
    """The convention, but no selective scan."""
    return 1.01 * scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int,
    D: Tensor | None = None, z: Any = None, dt_bias: Tensor | None = None,
    dt_softplus: bool = False, initial_states: Any = None, return_final_states: bool = False,
    **more: Any,
) -> Any:  # fmt: skip
    """The other convention."""
    y = SSD.reference(x, dt, A, B, C, D, dt_bias, dt_softplus)
    return (y, None) if return_final_states else y


_WAYS: dict[str, Any] = {
    "attribute": lambda v: v.real,
    "number": lambda v: 1.0 + v,
    "truth": lambda v: 2.0 if v else 1.0,
    "class": lambda v: 2.0 if isinstance(v, Tensor) else 1.0,
    "equality": lambda v: 2.0 if v == 0 else 1.0,
    "text": lambda v: 2.0 if str(v) == "0" else 1.0,
    "hash": lambda v: {0: 2.0}.get(v, 1.0),
    "swallowed error": lambda v: _caught(lambda: v.real),
    "presence": lambda v: 2.0,
}
"""Ways of looking at a keyword's value; or at it being there at all."""


def _caught(look: Any) -> float:
    try:
        return 1.0 + 0.0 * look()
    except Exception:
        return 1.0


def _inputs(channels: int = 48) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, channels, 9), (2, channels, 9), (channels, 6), (2, 6, 9), (2, 6, 9))
    made = [torch.randn(s) for s in shapes]
    made[2] = -made[2].abs() - 0.2
    return [t.requires_grad_() for t in made]


def _chunked_inputs() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 9, 64, 6), (2, 9, 64), (64,), (2, 9, 2, 5), (2, 9, 2, 5))
    made = [torch.randn(s) for s in shapes]
    made[2] = -made[2].abs() - 0.2
    return [t.requires_grad_() for t in made]


@pytest.mark.parametrize("softplus", [True, False])
def test_a_call_is_one_node_and_becomes_the_op(softplus: bool) -> None:
    call = leaf(scan)

    def fn(*t: Tensor) -> Any:
        skip, bias = t[2].sum(1), t[2].mean(1)
        return call(
            *t, D=skip, z=t[0], delta_bias=bias if softplus else None, delta_softplus=softplus,
            use_something=True,
        )  # fmt: skip

    graph = capture(fn, *_inputs())
    assert [n.name for n in graph.graph.nodes if "scan" in n.name] == ["scan_call"]
    assert [n.name for n in Effects(graph).leaves] == ["scan_call"]
    assert rewritten(rewrite(graph)) == ["selective_scan"]


def test_the_chunked_call_becomes_its_op() -> None:
    call = leaf(chunked)
    graph = capture(lambda *t: call(*t, 4, D=t[2], dt_softplus=True), *_chunked_inputs())
    assert rewritten(rewrite(graph)) == ["selective_scan"]
    assert any(getattr(n.target, "__name__", "") == "ssd" for n in graph.graph.nodes)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"return_last_state": True}, "last state"),
        ({"seq_idx": 3}, "seq_idx"),
    ],
    ids=str,
)
def test_what_the_op_does_not_do_is_refused(given: dict[str, Any], reason: str) -> None:
    call = leaf(scan)

    def fn(*t: Tensor) -> Tensor:
        out: Any = call(*t, delta_softplus=True, **given)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    graph = capture(fn, *_inputs())
    findings = [f for f in rewrite(graph) if f.rule == "selective_scan"]
    assert [f.status for f in findings] == ["refused"]
    assert reason in findings[0].reason
    torch.testing.assert_close(graph(*(ts := _inputs()))[0], scan(*ts, delta_softplus=True))


@pytest.mark.parametrize("way", _WAYS)
def test_a_keyword_that_a_scan_looks_at_is_refused(way: str) -> None:
    def noting(
        u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None,
        delta_bias: Any = None, delta_softplus: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        factor = _WAYS[way](more["note"]) if more.get("note") is not None else 1.0
        return factor * scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    call = leaf(noting)
    graph = capture(lambda *t: call(*t, delta_softplus=True, note=3), *_inputs())
    findings = [f for f in rewrite(graph) if f.rule == "selective_scan"]
    assert [(f.status, f.reason) for f in findings] == [("refused", "the call also passes note")]


@pytest.mark.parametrize(("made", "inputs"), [(scan, "_inputs"), (chunked, "_chunked_inputs")])
def test_a_keyword_that_nobody_looks_at_says_nothing(
    made: Any, inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "LIBRARIES", ("tests",))  # only theirs are tried
    call, given = leaf(made), globals()[inputs]()
    size, softplus = ((4,), "dt_softplus") if made is chunked else ((), "delta_softplus")

    def fn(*t: Tensor) -> Any:
        *own, items = t
        more = {"num_items_in_batch": items, "position_embeddings": (t[0], t[1]), softplus: True}
        return call(*own, *size, **more)

    graph = capture(fn, *given, torch.tensor(46))
    assert rewritten(rewrite(graph)) == ["selective_scan"]
    expected = made(*given, *size, **{softplus: True})
    torch.testing.assert_close(graph(*given, torch.tensor(46))[0], expected)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"return_final_states": True}, "last state"),
        ({"initial_states": 1}, "given state"),
        ({"z": 1}, "gate"),
    ],
    ids=str,
)
def test_what_the_chunked_op_does_not_do_is_refused(given: dict[str, Any], reason: str) -> None:
    call = leaf(chunked)

    def fn(*t: Tensor) -> Tensor:
        out: Any = call(*t, 4, **given)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    findings = [f for f in rewrite(capture(fn, *_chunked_inputs())) if f.rule == "selective_scan"]
    assert [f.status for f in findings] == ["refused"]
    assert reason in findings[0].reason


def test_another_function_with_the_convention_fails_verification() -> None:
    call = leaf(wrong)
    findings = rewrite(capture(lambda *t: call(*t, delta_softplus=True), *_inputs()))
    assert [(f.rule, f.status) for f in findings] == [("selective_scan", "refused")]
    assert "exceeds" in findings[0].reason


def test_one_state_for_all_positions_is_refused() -> None:
    call = leaf(scan)
    u, delta, a, b, c = _inputs()

    def fn(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Any:
        return call(u, delta, a, b[:, None], c[:, None])

    def four(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None,
             delta_bias: Any = None, delta_softplus: bool = False) -> Any:  # fmt: skip
        return u * delta

    call = leaf(four)
    findings = rewrite(capture(fn, u, delta, a, b, c))
    assert [(f.rule, f.status) for f in findings] == [("selective_scan", "refused")]
    assert "one vector per position" in findings[0].reason
