"""An op whose kernel cannot be compiled or launched computes the call in plain PyTorch."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright.kernels import fallback, launch
from fusewright.kernels.fallback import LaunchError, no_fallback, with_plain_form
from fusewright.kernels.launch import has_triton, interpreting

from .calls import CALLS, Draw
from .failing_launches import ERRORS, RAISED, as_on_a_gpu, clean
from .util import assert_parity, assert_parity_of_draws

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET is set: nothing is launched"),
]

CALL_OF = {
    "rms_norm_forward": "rms_norm-inner",
    "rms_norm_backward": "rms_norm-outer-offset",
    "add_rms_norm_forward": "add_rms_norm",
    "rms_norm_linear_forward": "rms_norm_linear",
    "layer_norm_forward": "layer_norm",
    "layer_norm_backward": "layer_norm-heads",
    "rope_rotate": "rope",
    "glu_forward": "glu-silu",
    "glu_backward": "glu-gelu",
    "glu_packed_backward": "glu_packed",
    "lora_rank_update": "lora_linear-fp32-adapter",
    "dequantize_4bit": "quant_lora_linear",
    "quant_linear_few": "quant_linear-nf4",
    "linear_cross_entropy_forward": "linear_cross_entropy-smooth-softcap",
    "linear_logprob_forward": "linear_logprob-all",
    "linear_logprob_backward": "linear_logprob-all",
    "moe_grouped_mm_triton": "moe_experts-bias",
    "moe_grouped_outer_triton": "moe_experts",
    "moe_combine_triton": "moe_experts",
    "selective_scan_triton_forward": "selective_scan",
    "selective_scan_triton_backward": "selective_scan",
    "lora_wide_product": "lora_linear-fp32-adapter",
    "attention_mask_table": "attention-alibi",
    "attention_triton_forward": "attention-packed",
    "attention_triton_backward": "attention-causal, left padding",
    "ssd_triton_forward": "ssd-groups",
    "ssd_triton_backward": "ssd",
}
"""Library op -> a call that launches it."""

INNER = ("dequantize_4bit", "quant_linear_few")
"""Those that are called inside of others only, where no mode sees them."""


def _launching() -> dict[str, Any]:
    return {op._schema.name.partition("::")[2]: op for op in launch.LAUNCHES}


class _Recorder(TorchDispatchMode):
    """Keeps the arguments and results of the calls of one library op."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op, self.calls = op, list[tuple[Any, Any]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is self.op:
            self.calls.append((args, made))
        return made


def test_each_op_that_launches_is_tried_below() -> None:
    ours = {name for name in _launching() if not name.startswith("test_")}
    assert ours == set(CALL_OF)


CASES = [
    pytest.param(name, dtype, id=f"{name}-{dtype}")
    for name in CALL_OF
    for dtype in (torch.float32, torch.bfloat16)
    if name != "lora_wide_product" or dtype is torch.bfloat16  # what is wide is not in fp32
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_every_op_falls_back_with_the_right_values(name: str, dtype: torch.dtype) -> None:
    shape = (1, 5, 64) if name == "quant_linear_few" else (2, 9, 51)
    make, seeds = CALLS[CALL_OF[name]], itertools.count(1)
    call = make(Draw(shape, dtype, True, "cpu"))

    def drawn() -> Sequence[Tensor]:
        return make(Draw(shape, dtype, True, "cpu", next(seeds))).inputs

    with as_on_a_gpu(ERRORS["resources"]) as run, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_parity_of_draws(call.ours, call.reference, drawn)
        launches = run.call_count
        with _Recorder(_launching()[name]) as recorder:
            assert_parity_of_draws(call.ours, call.reference, drawn)
        assert run.call_count == launches, "a kernel that has failed was tried again"
        failed = dict(fallback.FAILED)
        assert recorder.calls or name in INNER
        for args, made in recorder.calls:
            _assert_as_declared(recorder.op, args, made)
            # of autocast and autograd a kernel knows nothing
            with torch.autocast("cpu", torch.float16):
                again = recorder.op(*args)
            kept = slice(1) if name == "selective_scan_triton_forward" else slice(None)
            # of the states that the scan keeps, the last ones are not written
            for ours, theirs in zip(_list(again)[kept], _list(made)[kept], strict=True):
                assert torch.equal(ours, theirs)
    assert "OutOfResources: out of resource: shared memory" in failed[name]
    said = [str(w.message) for w in caught if "could not be compiled or launched" in str(w.message)]
    assert len(said) == len(failed)  # once each
    assert sum(f"the kernel of {name} " in text for text in said) == 1


def _list(made: Any) -> list[Tensor]:
    return list(made) if isinstance(made, (list, tuple)) else [made]


def _assert_as_declared(op: Any, args: Any, made: Any) -> None:
    """The results have the layouts and dtypes that a compiler has planned for."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args)
        declared = op(*given)
    for ours, theirs in zip(_list(made), _list(declared), strict=True):
        assert ours.dtype is theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.stride() == theirs.stride()
        assert not ours._is_view()


@pytest.mark.parametrize("kind", ERRORS)
def test_each_kind_of_failure(kind: str) -> None:
    call = CALLS["rms_norm-inner"](Draw((2, 3, 16), torch.float32, True, "cpu"))
    with as_on_a_gpu(ERRORS[kind]):
        with pytest.warns(UserWarning, match="plain PyTorch from now on"):
            assert_parity(call.ours, call.reference, *call.inputs)
        failed = dict(fallback.FAILED)
    assert set(failed) == {"rms_norm_forward", "rms_norm_backward"}
    assert all("\n" not in reason for reason in failed.values())
    expected = {"type": "CompilationError: fp8 is not supported"}.get(
        kind, type(ERRORS[kind]()).__name__
    )
    assert all(reason.startswith(expected) for reason in failed.values())


@pytest.mark.parametrize("kind", RAISED)
def test_what_a_kernel_leaves_behind_is_raised(kind: str) -> None:
    call = CALLS["rms_norm-inner"](Draw((2, 3, 16), torch.float32, True, "cpu"))
    error = RAISED[kind]()
    with as_on_a_gpu(lambda: error), pytest.raises(type(error)) as caught:
        call.ours(*call.inputs)
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
