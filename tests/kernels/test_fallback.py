"""An op whose kernel cannot be compiled or launched computes the call in plain PyTorch."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusewright.kernels import fallback, launch
from fusewright.kernels.fallback import LaunchError, no_fallback, with_plain_form

from .calls import LAUNCHING, sized
from .failing_launches import ERRORS, RAISED, as_on_a_gpu, clean
from .util import Watch, assert_parity, assert_parity_of_draws, needs_triton

pytestmark = needs_triton

INNER = ("dequantize_4bit",)
"""Library ops that are called inside of others only, where no mode sees them."""
_NOT_LAUNCHED = ("lora_linear-narrow-plain",)
"""What asks where its tensors are: on a CPU, no kernel is launched."""
CASES = {
    name: replace(case, sizes=sized(2, 9, 51))
    for name, case in LAUNCHING.items()
    if name not in _NOT_LAUNCHED
}


def _launching() -> dict[str, Any]:
    return {op._schema.name.partition("::")[2]: op for op in launch.LAUNCHES}


def _noting(calls: dict[Any, tuple[Any, list[Tensor]]]) -> Watch:
    """Keeps the arguments and results of a call of each library op that launches kernels."""

    def note(op: Any, args: Any, outs: list[Tensor]) -> None:
        if op in launch.LAUNCHES:
            calls[op] = args, outs

    return Watch(note)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_every_op_falls_back_with_the_right_values(name: str, dtype: torch.dtype) -> None:
    case, seeds = replace(CASES[name], dtype=dtype), itertools.count(1)
    call = case.call()

    def drawn() -> Sequence[Tensor]:
        return case.call(next(seeds)).tensors

    with as_on_a_gpu(ERRORS["resources"]) as run, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_parity_of_draws(call.ours, call.reference, drawn)
        launches = run.call_count
        calls: dict[Any, tuple[Any, list[Tensor]]] = {}
        with _noting(calls):
            assert_parity_of_draws(call.ours, call.reference, drawn)
        assert run.call_count == launches, "a kernel that has failed was tried again"
        failed = dict(fallback.FAILED)
        for op, (args, made) in calls.items():
            _assert_as_declared(op, args, made)
            # of autocast and autograd a kernel knows nothing
            with torch.autocast("cpu", torch.float16):
                again = op(*args)
            for ours, theirs in zip(_list(again), made, strict=True):
                assert torch.equal(ours, theirs)
    assert failed
    assert all("OutOfResources: out of resource: shared memory" in why for why in failed.values())
    said = [str(w.message) for w in caught if "could not be compiled or launched" in str(w.message)]
    assert len(said) == len(failed)  # once each


def test_each_op_that_launches_is_tried_above() -> None:
    ours = {name: op for name, op in _launching().items() if not name.startswith("test_")}
    failed, calls = set[str](), dict[Any, tuple[Any, list[Tensor]]]()
    for case in CASES.values():
        for dtype in (torch.float32, torch.bfloat16):
            call = replace(case, dtype=dtype).call()
            with as_on_a_gpu(ERRORS["resources"]), warnings.catch_warnings(), _noting(calls):
                warnings.simplefilter("ignore")
                outs = _list(call.ours(*call.tensors))
                sum(o.sum() for o in outs if o.requires_grad).backward()
                failed |= set(fallback.FAILED)
    assert failed == set(ours)
    assert {name for name, op in ours.items() if op not in calls} <= set(INNER)


def _list(made: Any) -> list[Tensor]:
    return list(made) if isinstance(made, (list, tuple)) else [made]


def _assert_as_declared(op: Any, args: Any, made: list[Tensor]) -> None:
    """The results have the layouts and dtypes that a compiler has planned for."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args)
        declared = op(*given)
    for ours, theirs in zip(made, _list(declared), strict=True):
        assert ours.dtype is theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.stride() == theirs.stride()
        assert not ours._is_view()


@pytest.mark.parametrize("kind", ERRORS)
def test_each_kind_of_failure(kind: str) -> None:
    call = replace(CASES["rms_norm"], dtype=torch.float32).call()
    with as_on_a_gpu(ERRORS[kind]):
        with pytest.warns(UserWarning, match="plain PyTorch from now on"):
            assert_parity(call.ours, call.reference, *call.tensors)
        failed = dict(fallback.FAILED)
    assert set(failed) == {"rms_norm_forward", "rms_norm_backward"}
    assert all("\n" not in reason for reason in failed.values())
    expected = {"type": "CompilationError: fp8 is not supported"}.get(
        kind, type(ERRORS[kind]()).__name__
    )
    assert all(reason.startswith(expected) for reason in failed.values())


@pytest.mark.parametrize("kind", RAISED)
def test_what_a_kernel_leaves_behind_is_raised(kind: str) -> None:
    call = replace(CASES["rms_norm"], dtype=torch.float32).call()
    error = RAISED[kind]()
    with as_on_a_gpu(lambda: error), pytest.raises(type(error)) as caught:
        call.ours(*call.tensors)
    assert caught.value is error
    assert fallback.FAILED == {}


def test_an_error_inside_triton_is_one_of_compiling() -> None:
    """However it is called: compilers raise AssertionError, KeyError and others."""
    import triton

    with pytest.raises(Exception) as caught:  # noqa: PT011  2026-11-28: of no kind of its own
        triton.next_power_of_2("x")
    assert fallback.is_launch_failure(caught.value)
    assert not fallback.is_launch_failure(TypeError("raised elsewhere"))


def _broken(*args: Any) -> Any:
    raise ERRORS["driver"]()


def test_nothing_falls_back_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run = with_plain_form("captured", _broken, lambda x: x + 1)
    with clean(), pytest.raises(RuntimeError, match="active drivers"):
        run(torch.zeros(1))


def test_where_no_plain_form_may_take_the_place_of_a_kernel() -> None:
    run = with_plain_form("strict", _broken, lambda x: x + 1)
    message = (
        "the kernel of strict could not be compiled or launched: RuntimeError: 0 active drivers"
    )
    with clean():
        with no_fallback(), pytest.raises(LaunchError, match=message):
            run(torch.zeros(1))
        assert fallback.FAILED == {}
        with pytest.warns(UserWarning, match=message):
            assert run(torch.zeros(1)) == 1
        with no_fallback(), pytest.raises(LaunchError, match=message):  # a kernel that has failed
            run(torch.zeros(1))


def test_what_the_failing_launch_held_is_free_when_the_plain_form_runs() -> None:
    import weakref

    held: list[weakref.ref[Tensor]] = []

    def launcher(x: Tensor) -> Tensor:
        output = torch.empty_like(x)
        held.append(weakref.ref(output))
        raise ERRORS["driver"]()

    def plain(x: Tensor) -> Tensor:
        assert held[0]() is None
        return x + 1

    with clean(), pytest.warns(UserWarning, match="active drivers"):
        assert with_plain_form("freed", launcher, plain)(torch.zeros(1)) == 1


@pytest.fixture(autouse=True)
def _no_failure_stays() -> Iterator[None]:
    before = dict(fallback.FAILED)
    yield
    assert before == fallback.FAILED
