"""Candidates of an op: the fastest right one runs, and a choice is made once for a machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from fusewright.kernels import choice, fallback, launch
from fusewright.kernels.choice import OWN, PLAIN, CandidateOp, Choice, Implementation, drawn
from fusewright.kernels.fallback import LaunchError, no_fallback

from ..load import stretched
from .failing_launches import clean
from .own_choices import own_choices

_NO_DRIVER = RuntimeError("0 active drivers ([]). There should only be one.")


def failing(error: Exception) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        raise error

    return run


class Trial:
    """An op that doubles; its candidates note their calls and take given microseconds."""

    def __init__(
        self, times: dict[str, float], results: dict[str, Callable[[Tensor], Any]] | None = None
    ) -> None:
        self.times, self.results, self.ran = times, results or {}, list[str]()
        self.measured: list[str] = []
        libraries = [Implementation(n, self.form(n)) for n in times if n not in (OWN, PLAIN)]
        self.op = CandidateOp(
            "doubling", self.form(OWN), self.form(PLAIN), libraries, drawn, torch.empty_like
        )

    def form(self, name: str) -> Callable[[Tensor], Any]:
        def run(x: Tensor) -> Any:
            self.ran.append(name)
            return self.results.get(name, lambda x: 2 * x)(x)

        return run

    def timed(self, device: torch.device, run: Callable[[], Any]) -> float:
        run()
        self.measured.append(self.ran[-1])
        return self.times[self.ran[-1]]

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> str:
        """The name of the candidate that computes a call once the choice is made."""
        x = torch.randn(*shape, dtype=dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choice, "timed", self.timed)
            result = self.op(x)
            self.ran.clear()
            assert torch.equal(self.op(x), result)
        assert torch.equal(result, 2 * x)
        (name,) = self.ran
        return name


TWO = {"library": 1.0, OWN: 2.0, PLAIN: 3.0}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    ops = dict(choice._OPS)
    with own_choices(tmp_path), clean():
        yield
    choice._OPS.clear()
    choice._OPS.update(ops)


def test_the_fastest_right_candidate_runs() -> None:
    trial = Trial(
        {"wrong": 0.1, "failing": 0.1, "large": 0.1, "strided": 0.1, "narrow": 0.1, "fast": 1}
        | {OWN: 2, PLAIN: 3},
        {
            "wrong": lambda x: 2.1 * x,
            "failing": failing(TypeError("an argument of another version")),
            "large": failing(torch.OutOfMemoryError("out of memory")),
            "strided": lambda x: (2 * x).t().contiguous().t(),
            "narrow": lambda x: (2 * x).half(),
        },
    )
    assert trial(6, 4) == "fast"
    (said,) = map(str, choice.choices(torch.device("cpu")))
    assert said.startswith(
        "doubling(float32[8x4]): fast (measured; fast 1 us, own 2 us, plain 3 us"
    )
    for reason in (
        "wrong refused: not as exact as eager: rms error",
        "failing refused: an argument of another version",
        "large refused: out of memory",
        "strided refused: strides (1, 6) instead of (4, 1)",
        "narrow refused: torch.float16 (6, 4), not torch.float32 (6, 4)",
    ):
        assert reason in said


@pytest.mark.parametrize(
    ("times", "chosen"),
    [((1.0, 1.02, 9.0), OWN), ((1.0, 1.04, 9.0), "library"), ((3.0, 2.0, 1.0), PLAIN)],
)
def test_ours_is_replaced_only_by_a_faster_one(times: tuple[float, ...], chosen: str) -> None:
    trial = Trial(dict(zip(("library", OWN, PLAIN), times, strict=True)))
    assert trial(4, 4) == chosen


def test_a_kernel_of_ours_that_is_wrong_here_does_not_run() -> None:
    assert Trial({OWN: 1, PLAIN: 3, "library": 5}, {OWN: lambda x: 3 * x})(4, 4) == PLAIN


@pytest.mark.parametrize("always", [False, True])
def test_one_large_error_is_judged_by_several_draws(always: bool) -> None:
    calls = 0

    def unlucky(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        out = 2 * x
        if calls == 1 or always:
            out[0, 0] += 1
        return out

    assert Trial(TWO, {"library": unlucky})(4, 4) == (OWN if always else "library")


def test_calls_of_one_bucket_share_a_choice() -> None:
    trial = Trial(TWO)
    assert [trial(n, 4) for n in (5, 6, 8)] == ["library"] * 3
    assert len(trial.measured) == 3  # once for each candidate
    trial(9, 4)
    trial(8, 4, dtype=torch.bfloat16)
    trial.op(torch.randn(4, 8).t())  # in another order
    assert len(choice.choices(torch.device("cpu"))) == 4


def test_a_choice_is_kept_for_later_processes(tmp_path: Path) -> None:
    assert Trial(TWO)(4, 4) == "library"
    (file,) = tmp_path.glob("choice-*.json")
    choice._CHOICES.clear()
    later = Trial(TWO)
    assert later(4, 4) == "library"
    assert not later.measured
    assert [c.source for c in choice.choices(torch.device("cpu"))] == ["kept"]
    for damaged in ("", "[]", json.dumps({"bucket": 1}), file.read_text()[:50]):
        file.write_text(damaged)
        choice._CHOICES.clear()
        again = Trial(TWO)
        assert again(4, 4) == "library"
        assert again.measured


def test_another_set_of_candidates_is_measured_anew() -> None:
    assert Trial(TWO)(4, 4) == "library"
    choice._CHOICES.clear()
    assert Trial({"new": 0.5, **TWO})(4, 4) == "new"


def test_a_lack_of_memory_is_not_kept(tmp_path: Path) -> None:
    assert Trial(TWO, {"library": failing(MemoryError())})(4, 4) == OWN
    assert not list(tmp_path.glob("choice-*.json"))


@pytest.mark.parametrize("failing_name", [OWN, PLAIN])
def test_ours_runs_where_it_cannot_be_compared(failing_name: str, tmp_path: Path) -> None:
    trial, calls = Trial(TWO), 0

    def once(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError("out of memory")
        return 2 * x

    trial.results[failing_name] = once
    assert trial(4, 4) == OWN
    (made,) = choice.choices(torch.device("cpu"))
    assert (made.source, made.refused.get(OWN)) == ("unmeasured", None)
    assert not list(tmp_path.glob("choice-*.json"))


@pytest.mark.parametrize("name", ["library", OWN, PLAIN])
def test_an_error_of_the_device_ends_the_call(name: str, tmp_path: Path) -> None:
    """It may come from an earlier kernel: no candidate is refused for it."""
    error = torch.AcceleratorError("CUDA error: device-side assert triggered")
    with pytest.raises(torch.AcceleratorError):
        Trial(TWO, {name: failing(error)}).op(torch.randn(4, 4))
    assert choice.choices(torch.device("cpu")) == []
    assert not list(tmp_path.glob("choice-*.json"))


def test_a_choice_that_is_kept_is_read_without_the_lock(tmp_path: Path) -> None:
    assert Trial(TWO)(4, 4) == "library"
    choice._CHOICES.clear()
    with FileLock(tmp_path / "choices.lock"):
        later = Trial(TWO)
        assert later(4, 4) == "library"
    assert not later.measured


def test_another_process_that_measures_for_too_long_is_not_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "PATIENCE", 0.1)
    with FileLock(tmp_path / "choices.lock"):
        assert Trial(TWO)(4, 4) == "library"


def test_ranks_measure_side_by_side_and_take_the_first_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_has_peers", lambda: True)
    assert Trial(TWO)(4, 4) == "library"
    (file,) = tmp_path.glob("choice-*.json")
    text = file.read_text()
    file.unlink()
    choice._CHOICES.clear()
    second = Trial({"library": 3.0, OWN: 2.0, PLAIN: 9.0})
    second_timed = second.timed

    def timed(device: torch.device, run: Callable[[], Any]) -> float:
        with FileLock(
            tmp_path / "choices.lock", timeout=stretched(1)
        ):  # the other rank is done meanwhile
            file.write_text(text)
        return second_timed(device, run)

    monkeypatch.setattr(second, "timed", timed)
    assert second(4, 4) == "library"
    assert second.measured
    assert [c.source for c in choice.choices(torch.device("cpu"))] == ["kept"]


def test_choices_with_and_without_tf32_are_apart() -> None:
    trial, matmul = Trial(TWO), torch.backends.cuda.matmul
    assert trial(4, 4) == "library"
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        assert trial(4, 4) == "library"
    finally:
        matmul.fp32_precision = before
    assert len(trial.measured) == 6
    assert [c.bucket for c in choice.choices(torch.device("cpu"))] == [
        "doubling(float32[4x4])", "doubling(float32[4x4]), tf32",
    ]  # fmt: skip


def test_without_a_folder_a_choice_is_made_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise PermissionError("others may write to it")

    monkeypatch.setattr(choice, "kept_folder", none)
    assert Trial(TWO)(4, 4) == "library"


def test_a_run_that_is_continued_chooses_as_it_did(tmp_path: Path) -> None:
    trial = Trial(TWO)
    assert trial(4, 4) == "library"
    records = json.loads(json.dumps(choice.records()))
    choice._CHOICES.clear()
    (file,) = tmp_path.glob("choice-*.json")
    file.unlink()
    other = Trial({"library": 3.0, OWN: 2.0, PLAIN: 1.0})
    assert other(4, 4) == PLAIN
    choice.adopt([*records, {"bucket": 3}, {}])
    assert other(4, 4) == "library"
    (adopted,) = choice.choices(torch.device("cpu"))
    assert adopted == Choice(adopted.bucket, "library", "resumed", TWO, {})


def test_threads_share_a_choice() -> None:
    trial, found = Trial(TWO), list[Tensor]()
    x = torch.randn(4, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "timed", trial.timed)
        threads = [threading.Thread(target=lambda: found.append(trial.op(x))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert len(trial.measured) == 3


def _process(folder: str, number: int, results: Any) -> None:
    with own_choices(Path(folder)):
        # each would choose another one
        trial = Trial({"library": 1.0 + number, OWN: 2.0 - number, PLAIN: 9.0})
        results.put((trial(4, 4), bool(trial.measured)))


def test_processes_of_a_machine_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_process, args=(str(tmp_path), n, results)) for n in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=stretched(120)) for _ in processes]
    for process in processes:
        process.join()
    assert found[0][0] == found[1][0]
    assert sorted(measured for _, measured in found) == [False, True]


def test_the_next_candidate_computes_what_the_chosen_one_fails_with() -> None:
    trial = Trial(TWO)
    assert trial(4, 4) == "library"
    trial.results["library"] = failing(RuntimeError("no kernel for 5 tokens"))
    x = torch.randn(4, 4)
    with pytest.warns(
        UserWarning, match=r"doubling by library .*: no kernel for 5 tokens.* another"
    ):
        assert torch.equal(trial.op(x), 2 * x)
    assert set(fallback.FAILED) == {"doubling by library"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trial(4, 4) == OWN
    trial.results[OWN] = failing(_NO_DRIVER)
    with pytest.warns(UserWarning, match="doubling could not be compiled"):
        assert torch.equal(trial.op(x), 2 * x)
    assert trial(4, 4) == PLAIN


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("out of memory"), torch.AcceleratorError("CUDA error: device-side")],
)
def test_memory_and_broken_gpus_are_no_fault_of_a_candidate(error: Exception) -> None:
    trial = Trial(TWO)
    assert trial(4, 4) == "library"
    trial.results["library"] = failing(error)
    with pytest.raises(type(error)):
        trial.op(torch.randn(4, 4))
    assert fallback.FAILED == {}


def test_checks_of_rewrites_measure_nothing_and_take_no_plain_form() -> None:
    trial, x = Trial(TWO), torch.randn(4, 4)
    with no_fallback():
        trial.op(x)
        assert trial.ran == [OWN]
        trial.results[OWN] = failing(_NO_DRIVER)
        trial.ran.clear()
        trial.op(x)
        assert trial.ran == [OWN, "library"]
        trial.results["library"] = failing(RuntimeError("not here"))
        with pytest.raises(LaunchError, match="no kernel of doubling"):
            trial.op(x)
    assert fallback.FAILED == {}
    assert choice.choices(torch.device("cpu")) == []


def test_on_other_devices_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "DEVICES", ("cuda",))
    trial, x = Trial(TWO), torch.randn(4, 4)
    trial.op(x)
    assert trial.ran == [OWN]
    trial.results[OWN] = failing(_NO_DRIVER)
    with pytest.warns(UserWarning, match="plain PyTorch from now on"):
        assert torch.equal(trial.op(x), 2 * x)
    trial.ran.clear()
    trial.op(x)
    assert trial.ran == [PLAIN]


@pytest.mark.parametrize("how", ["capturing", "compiling", "transform"])
def test_nothing_is_measured_where_no_call_is_real(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "capturing":
        monkeypatch.setattr(choice, "is_capturing", lambda: True)
    elif how == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    else:
        monkeypatch.setattr(torch._C, "_are_functorch_transforms_active", lambda: True)
    trial = Trial(TWO)
    trial.op(torch.randn(4, 4))
    assert trial.ran == [OWN]


def test_measuring_is_without_hooks_autocast_and_gradients() -> None:
    seen = []

    def library(x: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return 2 * x

    def refuse(t: Tensor) -> Any:
        raise AssertionError("nothing is saved")

    trial, before = Trial(TWO, {"library": library}), torch.get_rng_state()
    with (
        torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        trial.op(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    assert set(seen[:-1]) == {(False, False)}
    assert torch.equal(torch.get_rng_state(), before)


_number = iter(range(100))


def _opaque() -> tuple[Any, Trial]:
    """An op of the library, of which a library's form is the fastest."""
    trial = Trial(TWO)
    op = launch.library_op(
        f"doubling_{os.getpid()}_{next(_number)}(Tensor x) -> Tensor", "norms.rms_norm:none",
        torch.empty_like, plain=trial.form(PLAIN), libraries=trial.op.candidates[:1],
    )  # fmt: skip
    del launch.LAUNCHES[op]  # which lists the ops of the package
    return op, trial


def test_the_form_of_a_library_knows_neither_autograd_nor_autocast() -> None:
    op, trial = _opaque()
    trial.results["library"] = lambda x: torch.mm(x, 2 * torch.eye(4))
    x = torch.ones(4, 4, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "timed", trial.timed)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                result = op(x)
            assert trial.ran[-1] == "library"
            assert result.dtype is torch.float32
            assert launch.RUNS[op](x).grad_fn is None  # as ``direct`` calls it


def test_a_view_that_a_library_returns_is_none_to_autograd() -> None:
    op, trial = _opaque()
    trial.results["library"] = lambda x: (2 * x).view(-1).view(4, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "timed", trial.timed)
        for _ in range(2):
            assert not op(torch.randn(4, 4))._is_view()
    assert trial.ran[-1] == "library"


def test_candidates_are_of_ops_that_have_a_plain_form() -> None:
    names = {op._schema.name.partition("::")[2] for op in launch.RUNS}  # type: ignore[attr-defined]
    ours = {n: c for n, c in choice._OPS.items() if not n.startswith("doubling")}
    assert len(ours) >= 7
    assert set(ours) <= names
    for op in ours.values():
        assert [c.name for c in op.candidates[-2:]] == [OWN, PLAIN]


def test_draws_have_the_layout_and_the_integers_of_the_call() -> None:
    index = torch.arange(6, dtype=torch.int32)
    x = torch.zeros(8, 6).t()[:, ::2]
    wide, whole, sizes = drawn((x[:, :1].expand(6, 5), index[None].expand(3, 6), [x, None, 2]),
                               torch.Generator().manual_seed(0))  # fmt: skip
    assert wide.stride() == (1, 0)
    assert torch.equal(whole, index[None].expand(3, 6))
    assert sizes[0].stride() == x.stride()
    assert sizes[0].std() > 0.5
    assert sizes[1:] == [None, 2]
