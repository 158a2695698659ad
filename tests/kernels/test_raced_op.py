"""Ops with contenders: the fastest right form runs each call, and nothing is raced out of place."""

from __future__ import annotations

import itertools
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fusewright.kernels import candidates, choice, fallback, launch, raced_op
from fusewright.kernels.choice import LATE, MARGIN, Choice, Contender, Question, Timing
from fusewright.kernels.fallback import LaunchError, no_fallback
from fusewright.kernels.launch import library_op
from fusewright.kernels.raced_op import OWN, PLAIN, Contest, RacedOp, drawn, our_kernels

from .clocks import Clock, own_choices, raise_error
from .failing_launches import clean

_NO_DRIVER = RuntimeError("0 active drivers ([]). There should only be one.")


class Trial:
    """An op that doubles, whose candidates take the time that is said, and note that they ran."""

    def __init__(
        self, seconds: dict[str, float], results: dict[str, Callable[[Tensor], Any]] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        self.clock, self.seconds, self.ran = Clock(), seconds, list[str]()
        self.results = results or {}
        self.races: list[str] = []
        contenders = tuple(Contender(n, self._form(n)) for n in seconds if n not in (OWN, PLAIN))
        options = {"devices": ("cpu",), **options}
        contest = Contest(contenders, lambda x: (x.shape[0], (x.shape[1],)), drawn, **options)
        self.op = RacedOp("doubling", self._form(OWN), self._form(PLAIN), contest, torch.empty_like)

    def _form(self, name: str) -> Callable[[Tensor], Any]:
        def run(x: Tensor) -> Any:
            self.clock.now += self.seconds.get(name, 0.0)
            self.ran.append(name)
            return self.results.get(name, lambda x: 2 * x)(x)

        return run

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> str:
        """The name of the form that computes a call, after the race, if there is one."""
        x = torch.randn(*shape, dtype=dtype)
        before = choice.race

        def race(question: Question) -> Choice:
            self.races.append(question.name)
            return before(question, self.clock)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choice, "race", race)
            result = self.op(x)
            self.ran.clear()
            assert torch.equal(self.op(x), result)
        assert torch.equal(result, 2 * x)
        (name,) = self.ran
        return name

    def explained(self) -> str:
        (one,) = choice.choices()
        return str(one)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    contests = dict(raced_op.CONTESTS)
    with own_choices(tmp_path), clean():
        yield
    raced_op.CONTESTS.clear()
    raced_op.CONTESTS.update(contests)


def test_the_fastest_right_form_runs() -> None:
    trial = Trial(
        {
            "wrong": 0.1, "failing": 0.1, "large": 0.1, "strided": 0.1, "narrow": 0.1, "fast": 1,
            OWN: 2, PLAIN: 3,
        },
        {
            "wrong": lambda x: 2.1 * x,
            "failing": raise_error(TypeError("an argument of another version")),
            "large": raise_error(torch.OutOfMemoryError("out of memory")),
            "strided": lambda x: (2 * x).t().contiguous().t(),
            "narrow": lambda x: (2 * x).half(),
        },
    )  # fmt: skip
    assert trial(6, 4) == "fast"
    said = trial.explained()
    assert "doubling of 4 for 8 tokens (float32): fast (raced; fast 1,000,000 us, " in said
    assert "own 2,000,000 us, plain 3,000,000 us" in said
    for reason in (
        "wrong refused: not as exact as eager: rms error",
        "failing refused: an argument of another version",
        "large refused: out of memory",
        "strided refused: strides (1, 6) instead of (4, 1)",
        "narrow refused: torch.float16 (6, 4) instead of torch.float32 (6, 4)",
    ):
        assert reason in said


def test_a_kernel_of_ours_that_is_wrong_here_does_not_run() -> None:
    trial = Trial({"library": 9, OWN: 0.1, PLAIN: 5}, {OWN: lambda x: x})
    assert trial(3, 3) == PLAIN
    assert "own refused: not as exact as eager" in trial.explained()


def test_calls_of_one_bucket_share_a_race() -> None:
    trial = Trial({"library": 1, OWN: 2, PLAIN: 3})
    for tokens in (5, 6, 8):
        assert trial(tokens, 4) == "library"
    assert len(trial.races) == 1
    trial.seconds |= {OWN: 0.5}
    assert trial(9, 4) == OWN  # more tokens
    assert trial(7, 5) == OWN  # other features
    assert trial(7, 4, dtype=torch.bfloat16) == OWN
    assert trial(7, 4) == "library"
    x = torch.randn(4, 7).t()
    trial.op(x)
    assert len(choice.choices()) == 5  # which includes one of another layout
    assert len({each.question for each in choice.choices()}) == 5


def test_a_call_of_a_known_kind_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial({"library": 1, OWN: 2, PLAIN: 3})
    assert trial(4, 4) == "library"
    monkeypatch.setattr(trial.op, "question", raise_error(AssertionError("asked again")))
    monkeypatch.setattr(raced_op, "is_fixed", raise_error(AssertionError("read again")))
    assert trial(4, 4) == "library"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(1e-3, 10), min_size=4, max_size=4), min_size=2, max_size=2))
def test_no_bucket_runs_a_slower_form(tables: list[list[float]]) -> None:
    names = ("a", "b", OWN, PLAIN)
    trial, chosen = Trial(dict.fromkeys(names, 1.0)), []
    choice._CHOICES.clear()
    for path in choice.kept_folder().glob("choice-*.json"):
        path.unlink()
    for features, times in enumerate(tables, 1):
        choice._spent.seconds = 0.0
        trial.seconds |= dict(zip(names, times, strict=True))
        chosen.append(trial(4, features))
        best = min(times)
        assert trial.seconds[chosen[-1]] <= best * (1 + MARGIN) * (1 + 1e-9)
        if trial.seconds[OWN] <= best * (1 + MARGIN) * (1 - 1e-9):
            assert chosen[-1] == OWN
    # whatever they take later, and in a later process
    again = Trial(dict.fromkeys(names, 1.0))
    assert [again(4, n) for n in range(1, len(tables) + 1)] == chosen
    choice._CHOICES.clear()
    kept = Trial(dict.fromkeys(names, 1.0))
    assert [kept(4, n) for n in range(1, len(tables) + 1)] == chosen
    assert kept.races == []


def test_a_run_that_is_continued_runs_the_same_forms() -> None:
    first = Trial({"library": 1, OWN: 2, PLAIN: 3})
    chosen = [first(n, 4) for n in (4, 8, 16)]
    saved = choice.records()
    choice._CHOICES.clear()
    for path in choice.kept_folder().glob("choice-*.json"):
        path.unlink()
    choice.adopt(saved)
    later = Trial({"library": 3, OWN: 2, PLAIN: 1})
    assert [later(n, 4) for n in (4, 8, 16)] == chosen
    assert later.races == []
    assert {each.source for each in choice.choices()} == {"resumed"}


def test_a_run_that_is_continued_in_the_same_process_runs_its_own_forms() -> None:
    trial = Trial({"library": 1, OWN: 2, PLAIN: 3})
    assert trial(4, 4) == "library"
    saved = [{**record, "candidate": OWN} for record in choice.records()]
    candidates.resume(saved)
    assert trial(4, 4) == OWN
    assert [each.source for each in choice.choices()] == ["resumed"]


def test_that_there_was_no_memory_is_found_out_anew() -> None:
    trial = Trial({OWN: 1, PLAIN: 3}, {OWN: raise_error(torch.OutOfMemoryError("CUDA error"))})
    assert trial(4, 4) == PLAIN
    assert "own refused: out of memory" in trial.explained()
    assert choice.files() == {}
    choice._CHOICES.clear()
    assert Trial({OWN: 1, PLAIN: 3})(4, 4) == OWN


def test_threads_share_a_race() -> None:
    trial, races, begun = Trial({"library": 1, OWN: 2, PLAIN: 3}), list[Choice](), threading.Event()
    before = choice.race

    def race(question: Question) -> Choice:
        begun.set()
        time.sleep(0.1)
        races.append(before(question, trial.clock))
        return races[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "race", race)
        threads = [threading.Thread(target=trial.op, args=(torch.ones(4, 4),)) for _ in range(3)]
        for thread in threads:
            thread.start()
            assert begun.wait(10)
        for thread in threads:
            thread.join()
    assert len(races) == 1


def test_the_next_form_computes_what_the_chosen_one_fails_with() -> None:
    trial = Trial({"library": 1, OWN: 2, PLAIN: 3})
    assert trial(4, 4) == "library"
    trial.results["library"] = raise_error(RuntimeError("no kernel for 5 tokens"))
    x = torch.randn(4, 4)
    with pytest.warns(
        UserWarning, match=r"doubling by library .*: no kernel for 5 tokens.* another"
    ):
        assert torch.equal(trial.op(x), 2 * x)
    assert set(fallback.FAILED) == {"doubling by library"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trial(4, 4) == OWN
    trial.results[OWN] = raise_error(_NO_DRIVER)
    with pytest.warns(UserWarning, match="doubling could not be compiled"):
        assert torch.equal(trial.op(x), 2 * x)
    assert trial(4, 4) == PLAIN


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("out of memory"), torch.AcceleratorError("CUDA error: device-side")],
)
def test_memory_and_broken_gpus_are_no_form_s_fault(error: Exception) -> None:
    trial = Trial({"library": 1, OWN: 2, PLAIN: 3})
    assert trial(4, 4) == "library"
    trial.results["library"] = raise_error(error)
    with pytest.raises(type(error)):
        trial.op(torch.randn(4, 4))
    assert fallback.FAILED == {}


def test_checks_of_rewrites_race_nothing_and_take_no_plain_form() -> None:
    trial, x = Trial({"library": 1, OWN: 2, PLAIN: 3}), torch.randn(4, 4)
    with no_fallback():
        trial.op(x)
        assert trial.ran == [OWN]
        trial.results[OWN] = raise_error(_NO_DRIVER)
        trial.ran.clear()
        trial.op(x)
        assert trial.ran == [OWN, "library"]
        trial.results["library"] = raise_error(RuntimeError("not here"))
        with pytest.raises(LaunchError, match="no kernel of doubling"):
            trial.op(x)
    assert fallback.FAILED == {}
    assert choice.choices() == []


def test_our_kernels_run_where_they_are_tested() -> None:
    trial = Trial({"library": 1, OWN: 2, PLAIN: 3}, first=lambda x: "library")
    assert trial(4, 4) == "library"
    with our_kernels():
        assert trial(4, 4) == OWN
        trial.results[OWN] = raise_error(_NO_DRIVER)
        with no_fallback(), pytest.raises(LaunchError, match="doubling could not be compiled"):
            trial.op(torch.randn(4, 4))


def test_fixed_choices_are_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "fixed")
    assert Trial({"library": 1, OWN: 2, PLAIN: 3})(4, 4) == OWN
    assert Trial({"library": 1, OWN: 2, PLAIN: 3}, first=lambda x: "library")(4, 4) == "library"
    assert choice.choices() == []


def test_on_other_devices_everything_is_as_it_was() -> None:
    trial, x = Trial({"library": 1, OWN: 2, PLAIN: 3}, devices=("cuda",)), torch.randn(4, 4)
    trial.op(x)
    assert trial.ran == [OWN]
    trial.results[OWN] = raise_error(_NO_DRIVER)
    with pytest.warns(UserWarning, match="plain PyTorch from now on"):
        assert torch.equal(trial.op(x), 2 * x)
    trial.ran.clear()
    trial.op(x)
    assert trial.ran == [PLAIN]
    with no_fallback(), pytest.raises(LaunchError, match="doubling could not be compiled"):
        trial.op(x)
    assert choice.choices() == []


def test_races_end_when_they_have_had_their_time() -> None:
    trial = Trial({"library": 1, OWN: 200, PLAIN: 9})
    assert trial(4, 4) == "library"  # 1 + 9 + 200 s a round, but for what the fixed one needs once
    assert choice._spent.seconds > choice.ALLOWANCE
    assert trial(4, 5) == OWN
    assert len(trial.races) == 1
    assert [each.source for each in choice.choices()] == ["raced", LATE]
    assert LATE in str(choice.choices()[1])
    choice._CHOICES.clear()
    choice._spent.seconds = 0.0
    assert trial.op._orders.clear() is None
    assert trial(4, 5) == "library"  # another process is not out of time


def test_what_cannot_be_drawn_is_not_raced() -> None:
    def inputs(args: tuple[Any, ...], generator: torch.Generator) -> tuple[Any, ...]:
        raise torch.OutOfMemoryError("no room for copies")

    trial = Trial({"library": 1, OWN: 2, PLAIN: 3})
    object.__setattr__(trial.op.contest, "inputs", inputs)
    assert trial(4, 4) == OWN
    assert "could not be raced: no room for copies" in trial.explained()
    assert list(choice.kept_folder().glob("choice-*.json")) == []


def test_values_that_decide_are_of_the_bucket() -> None:
    trial = Trial({"library": 1, OWN: 2, PLAIN: 3}, kind=lambda x: "large" if x[0, 0] > 1 else "")
    x = torch.zeros(4, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice.race, "__defaults__", (trial.clock,))
        trial.op(x)
        trial.seconds |= {OWN: 0.1}
        for value, name in ((2.0, OWN), (0.0, "library"), (3.0, OWN)):
            x[0, 0] = value
            trial.op(x)
            assert trial.ran[-1] == name
    assert [each.question.endswith("(float32, large)") for each in choice.choices()] == [
        False,
        True,
    ]


# --- where nothing is raced -----------------------------------------------------------------------


_COUNT = itertools.count()


def _opaque() -> tuple[Callable[..., Any], Trial]:
    """A library op of such a kind."""
    trial = Trial({"library": 1, OWN: 2, PLAIN: 3})
    name = f"test_raced_{next(_COUNT)}"
    op = library_op(
        f"{name}(Tensor x) -> Tensor", trial._form(OWN), torch.empty_like,
        plain=trial._form(PLAIN), contest=trial.op.contest,
    )  # fmt: skip
    return op, trial


def test_nothing_is_raced_where_no_call_is_real(monkeypatch: pytest.MonkeyPatch) -> None:
    op, trial = _opaque()
    x = torch.randn(4, 4)
    with FakeTensorMode() as mode:
        assert op(mode.from_tensor(x)).shape == (4, 4)
    assert op(x.to("meta")).is_meta
    traced = make_fx(op, tracing_mode="fake")(x)
    assert trial.ran == []
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    op(x)
    assert trial.ran == [OWN]
    monkeypatch.undo()
    monkeypatch.setattr(raced_op, "is_capturing", lambda: True)
    op(x)
    assert trial.ran == [OWN, OWN]
    assert choice.choices() == []
    monkeypatch.undo()
    monkeypatch.setattr(choice, "kept_folder", lambda: Path("nowhere"))
    assert torch.equal(traced(x), 2 * x)  # the first real one, of a graph that was traced
    assert len(choice.choices()) == 1


def test_nothing_waits_for_a_gpu_where_that_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a block is made ready for a CUDA graph, which may not wait either."""
    mode, capturing, gpu = [0], [False], torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[0])
    monkeypatch.setattr(raced_op, "is_capturing", lambda: capturing[0])
    assert raced_op.may_wait(gpu)
    for mode[0], capturing[0] in ((1, False), (2, False), (0, True)):
        assert not raced_op.may_wait(gpu)
    mode[0], capturing[0] = 2, False
    assert raced_op.may_wait(torch.device("cpu"))


def test_a_library_s_form_knows_neither_autograd_nor_autocast() -> None:
    op, trial = _opaque()
    trial.results["library"] = lambda x: torch.mm(x, 2 * torch.eye(4))
    x = torch.ones(4, 4, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice.race, "__defaults__", (trial.clock,))
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                result = op(x)
            assert trial.ran[-1] == "library"
            assert result.dtype is torch.float32
            run = launch.RUNS[op](x)  # as ``direct`` calls it
            assert run.grad_fn is None


def test_a_view_that_a_library_returns_is_none_to_autograd() -> None:
    op, trial = _opaque()
    trial.results["library"] = lambda x: (2 * x).view(-1).view(4, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice.race, "__defaults__", (trial.clock,))
        for _ in range(2):
            assert not op(torch.randn(4, 4))._is_view()
    assert trial.ran[-1] == "library"


def test_all_contests_are_of_ops_that_have_a_plain_form() -> None:
    names = {op._schema.name.partition("::")[2] for op in launch.RUNS}  # type: ignore[attr-defined]
    ours = {n: c for n, c in raced_op.CONTESTS.items() if n != "doubling"}
    assert len(ours) >= 8
    assert set(ours) <= names
    for op in ours.values():
        assert [c.name for c in op.candidates[-2:]] == [OWN, PLAIN]
        assert op.contest.devices == ("cuda",)


def test_draws_have_the_layout_and_the_whole_numbers_of_the_call() -> None:
    index = torch.arange(6, dtype=torch.int32)
    x = torch.zeros(8, 6).t()[:, ::2]
    wide, whole, sizes = drawn((x[:, :1].expand(6, 5), index[None].expand(3, 6), [x, None, 2]),
                               torch.Generator().manual_seed(0))  # fmt: skip
    assert wide.stride() == (1, 0)
    assert torch.equal(whole, index[None].expand(3, 6))
    assert sizes[0].stride() == x.stride()
    assert sizes[0].std() > 0.5
    assert sizes[1:] == [None, 2]


# --- the clock of a GPU ---------------------------------------------------------------------------


@pytest.mark.parametrize("with_host", [False, True])
def test_a_gpu_is_timed_by_events_with_an_empty_cache(
    with_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 0.25  # milliseconds

    class Cache:
        def zero_(self) -> None:
            log.append("flush")

    class Properties:
        L2_cache_size = 1 << 20

    def empty(size: int, **kwargs: Any) -> Cache:
        assert size == 2 << 20
        return Cache()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("idle"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(torch, "empty", empty)
    asked = Question(
        "on a GPU", (), lambda g: (), "plain", torch.device("cuda", 0),
        timing=Timing(rounds=2, with_host=with_host),
    )  # fmt: skip

    def run() -> list[Tensor]:
        log.append("run")
        return []

    form = Contender("plain", run)
    times, busy = choice._timed(asked, [form], (), {}, lambda: 0.0)
    assert busy == {}
    assert times == {"plain": [pytest.approx(250)] * 2}
    # the host gets ahead while the GPU sleeps, or starts when it has nothing to do
    before = "idle" if with_host else "sleep"
    assert log == ["flush", before, "record", "run", "record", "wait"] * 2
