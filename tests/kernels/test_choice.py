"""Races: what is wrong, fails or is slow is not chosen; what was chosen stays, everywhere."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fusewright.errors import FusewrightError
from fusewright.kernels import candidates, choice, matmul
from fusewright.kernels.choice import MARGIN, Choice, Contender, Question, choose, race
from fusewright.kernels.processor import KINDS, assume, measured, processor, this_machine
from fusewright.kernels.raced_op import Contest, RacedOp

from .clocks import Clock, own_choices, raise_error


@pytest.fixture(autouse=True)
def _own_choices(tmp_path: Path) -> Iterator[None]:
    """Choices of each test's own, in a folder of its own."""
    before = processor()
    with own_choices(tmp_path):
        yield
    measured(before)


def question(*candidates: Contender, fixed: str = "plain") -> Question:
    return Question(
        "doubling", candidates, lambda g: (torch.randn(8, generator=g).bfloat16(),), fixed
    )


def test_the_fastest_right_candidate_is_chosen() -> None:
    clock = Clock()
    found = race(
        question(
            clock.candidate("wrong", 0.1, lambda x: 2.1 * x),
            clock.candidate("other shape", 0.1, lambda x: (2 * x)[:4]),
            clock.candidate("wider", 0.1, lambda x: 2 * x.float()),
            clock.candidate("nan", 0.1, lambda x: x * torch.nan),
            clock.candidate("failing", 0.1, raise_error(RuntimeError("no kernel image"))),
            clock.candidate("large", 0.1, raise_error(torch.OutOfMemoryError("out of memory"))),
            Contender("elsewhere", raise_error(AssertionError()), lambda x: "Triton is not here"),
            clock.candidate("fast", 1.0),
            clock.candidate("plain", 2.0),
        ),
        clock,
    )
    assert found.candidate == "fast"
    assert found.microseconds == {"fast": pytest.approx(1e6), "plain": pytest.approx(2e6)}
    assert found.refused.keys() == {
        "wrong", "other shape", "wider", "nan", "failing", "large", "elsewhere"
    }  # fmt: skip
    assert found.refused["wrong"].startswith("not as exact as eager: rms error")
    assert found.refused["large"] == "out of memory"
    assert "fast 1,000,000 us, plain 2,000,000 us" in str(found)


@pytest.mark.parametrize("always", [False, True])
def test_one_large_error_is_judged_by_several_draws(always: bool) -> None:
    clock, seen = Clock(), list[Tensor]()

    def plain(x: Tensor) -> Tensor:
        return 2 * x if x.dtype is torch.float64 else 2 * x * (1 + 1e-5)

    def lucky(x: Tensor) -> Tensor:
        seen.append(x)
        result = 2 * x
        if always or torch.equal(x, seen[0]):
            largest = result.abs().argmax()
            result.view(-1)[largest] *= 1 + 2.2e-5
        return result

    found = race(
        Question(
            "doubling",
            (clock.candidate("lucky", 0.1, lucky), clock.candidate("plain", 1.0, plain)),
            lambda g: (torch.randn(4096, generator=g),),
            "plain",
        ),
        clock,
    )
    assert found.candidate == ("plain" if always else "lucky")
    assert ("peak error" in found.refused.get("lucky", "")) is always


def test_one_that_fails_later_is_not_chosen() -> None:
    clock, calls = Clock(), iter(range(100))

    def sometimes(x: Tensor) -> Tensor:
        if next(calls) > 2:
            raise RuntimeError("too late")
        return 2 * x

    found = race(
        question(clock.candidate("flaky", 0.01, sometimes), clock.candidate("plain", 0.1)), clock
    )
    assert found.candidate == "plain"
    assert found.refused == {"flaky": "too late"}


def test_nothing_is_chosen_where_the_plain_form_fails() -> None:
    clock = Clock()
    found = race(
        question(
            clock.candidate("fast", 0.1),
            clock.candidate("plain", 1.0, raise_error(RuntimeError("not implemented"))),
        ),
        clock,
    )
    assert (found.candidate, found.source) == ("plain", "fixed")


def test_nothing_is_chosen_where_the_plain_form_has_no_fp64() -> None:
    clock = Clock()

    def narrow(x: Tensor) -> Tensor:
        if x.dtype is torch.float64:
            raise NotImplementedError("not for double")
        return 2 * x

    found = race(
        question(clock.candidate("fast", 0.1), clock.candidate("plain", 1.0, narrow)), clock
    )
    assert (found.candidate, found.source) == ("plain", "fixed")


@settings(max_examples=200, deadline=None)
@given(
    times=st.lists(st.floats(1e-4, 10), min_size=1, max_size=6),
    fixed=st.integers(0, 5),
)
def test_the_choice_is_never_slower_than_another(times: list[float], fixed: int) -> None:
    clock = Clock()
    names = [f"c{i}" for i in range(len(times))]
    fixed %= len(times)
    runners = [clock.candidate(n, t) for n, t in zip(names, times, strict=True)]
    asked = question(*runners, fixed=names[fixed])
    found = race(asked, clock)
    taken = times[names.index(found.candidate)]
    assert taken <= min(times) * (1 + MARGIN) * (1 + 1e-9)
    if times[fixed] <= min(times) * (1 + MARGIN) * (1 - 1e-9):
        assert found.candidate == names[fixed]
    assert race(asked, clock).candidate == found.candidate


def test_a_race_ends_in_its_time() -> None:
    clock, calls = Clock(), []

    def count(x: Tensor) -> Tensor:
        calls.append(clock.now)
        return 2 * x

    race(question(clock.candidate("slow", 5.0, count), clock.candidate("plain", 9.0)), clock)
    assert len(calls) == 2  # it was checked, and timed once


def test_a_choice_is_kept_for_later_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced: list[str] = []
    own = choice.race

    def counting(asked: Question) -> Choice:
        raced.append(asked.name)
        return own(asked)

    monkeypatch.setattr(choice, "race", counting)
    clock = Clock()
    asked = question(clock.candidate("fast", 1.0), clock.candidate("plain", 2.0))
    first = choose(asked)
    assert choose(asked) is first
    monkeypatch.setattr(choice, "_CHOICES", {})
    kept = choose(asked)
    assert (kept.candidate, kept.source) == (first.candidate, "kept")
    assert kept.microseconds == first.microseconds
    assert raced == ["doubling"]
    monkeypatch.setattr(choice, "_CHOICES", {})
    assert choose(asked, "another machine").source == "raced"
    for damaged in ("", "{", json.dumps({"question": "doubling"}), json.dumps([1])):
        monkeypatch.setattr(choice, "_CHOICES", {})
        for path in tmp_path.glob("choice-*.json"):
            path.write_text(damaged)
        assert choose(asked).source == "raced"


def test_what_was_raced_on_a_machine_is_found_again(tmp_path: Path) -> None:
    clock = Clock()
    asked = question(clock.candidate("fast", 1.0), clock.candidate("plain", 2.0))
    choose(asked, "one")
    choice._CHOICES.clear()
    choose(asked, "other")
    (tmp_path / "choice-of-somebody.json").write_text("[]")
    (tmp_path / "choice-cut-off.json").write_text("{")
    (found,) = choice.earlier("one")
    assert (found.question, found.source) == ("doubling", "kept")
    assert found.microseconds.keys() == {"fast", "plain"}
    assert choice.earlier("a third") == []


@pytest.mark.parametrize(
    ("waits", "threads", "chosen"),
    [
        (0.5, 1, "fast"),
        (3.0, 1, "plain"),  # by the clock, the other one is faster
        (0.5, 4, "plain"),  # the processor counts the threads of a form together
    ],
)
def test_where_others_have_the_cpu_both_times_decide_and_nothing_is_kept(
    waits: float, threads: int, chosen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock, processor = Clock(), Clock()
    switches = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(choice, "_switches", lambda: next(switches))
    monkeypatch.setattr(choice.time, "process_time", processor)

    def works(name: str, seconds: float, waits: float, threads: int = 1) -> Contender:
        own = processor.candidate(name, seconds * threads)
        return clock.candidate(name, seconds + waits, own.run)

    contenders = works("fast", 1.0, waits, threads), works("plain", 2.0, 0.0)
    asked = question(*contenders)
    found = race(asked, clock)
    assert (found.candidate, found.source) == (chosen, choice.BUSY)
    assert found.microseconds == {"fast": 1e6 * threads, "plain": 2e6}
    assert choose(asked).source == choice.BUSY
    assert choice.files() == {}
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_is_not_taken_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, processor = Clock(), Clock()
    switches = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(choice, "_switches", lambda: next(switches))
    monkeypatch.setattr(choice.time, "process_time", processor)
    first = clock.candidate("first", 1.0, processor.candidate("first", 4.0).run)
    plain = clock.candidate("plain", 2.0, processor.candidate("plain", 2.0).run)
    broken = clock.candidate("own", 0.5, raise_error(RuntimeError("no kernel image")))
    found = race(question(first, broken, plain, fixed="own"), clock)
    assert (found.candidate, found.source) == ("first", choice.BUSY)


def test_what_one_rank_would_race_again_no_other_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(choice, "has_peers", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    clock = Clock()
    asked = question(clock.candidate("fast", 1.0), clock.candidate("plain", 2.0))
    raced = iter((Choice("doubling", "fast", choice.BUSY), Choice("doubling", "plain")))
    monkeypatch.setattr(choice, "race", lambda _: next(raced))
    for _ in range(2):  # ranks
        found = choose(asked)
        assert (found.candidate, found.source) == ("fast", choice.BUSY)
        assert choice.files() == {}
        choice._CHOICES.clear()


def test_a_race_is_without_hooks_on_saved_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a caller's, which count what is saved, nor ours, whose calls would be timed."""
    seen, hidden = list[Tensor](), list[object]()
    asked = question(Contender("fast", double := lambda x: 2 * x), Contender("plain", double))
    pushed = torch.autograd.graph.saved_tensors_hooks
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", lambda *a: hidden.append(a))
        assert race(asked).microseconds
    assert hidden == []

    def saves(x: Tensor) -> Tensor:
        return (x.requires_grad_() * torch.ones_like(x, requires_grad=True) * 2).detach()

    with pushed(lambda t: seen.append(t) or t, lambda t: t):
        assert race(question(Contender("fast", saves), Contender("plain", saves))).microseconds
    assert seen == []


def test_a_faster_candidate_that_was_not_chosen_is_accounted_for() -> None:
    times = {"plain": 100.0, "fast": 99.0}
    assert str(choice.Choice("doubling", "plain", microseconds=times)) == (
        "doubling: plain (raced; fast 99 us, plain 100 us, where fast is not faster by more than "
        "the margin and noise)"
    )
    assert str(choice.Choice("doubling", "fast", microseconds=times)).endswith("plain 100 us)")


def test_two_machines_in_one_process_have_their_own_choices() -> None:
    """As two GPUs of different kinds are."""
    clock = Clock()
    slow = question(clock.candidate("fast", 2.0), clock.candidate("plain", 1.0))
    assert choose(question(clock.candidate("fast", 1.0), clock.candidate("plain", 2.0)), "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice.race, "__defaults__", (clock,))
        assert choose(slow, "other").candidate == "plain"
    assert [each.source for each in choice.choices()] == ["raced", "raced"]
    assert [each.candidate for each in choice.choices("other")] == ["plain"]
    assert choice.choices("a third") == []


def test_a_race_runs_on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are of the current one, whose tensors others may be."""
    entered: list[Any] = []

    @contextlib.contextmanager
    def device(which: Any) -> Iterator[None]:
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    second = torch.device("cuda", 1)
    with choice._alone(second):
        assert entered == [second]


def test_without_a_folder_a_choice_is_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise PermissionError("others may write to it")

    monkeypatch.setattr(choice, "kept_folder", nowhere)
    clock = Clock()
    asked = question(clock.candidate("fast", 1.0), clock.candidate("plain", 2.0))
    assert choose(asked).source == "raced"


def test_a_run_that_is_continued_chooses_as_it_did() -> None:
    clock = Clock()
    asked = question(clock.candidate("fast", 0.1), clock.candidate("plain", 1.0))
    earlier: list[Any] = [
        {"question": "doubling", "candidate": "plain", "source": "raced",
         "microseconds": {"fast": 2.0, "plain": 1.0}, "refused": {}, "machine": choice._hash("A")},
        {"question": 1}, "x",
    ]  # fmt: skip
    choice.adopt(earlier)
    found = choose(asked, "A")
    assert (found.candidate, found.source) == ("plain", "resumed")
    assert choice.records()[0]["candidate"] == "plain"
    choice.adopt([{**choice.records()[0], "candidate": "of another version"}])
    assert choose(asked, "A").candidate in ("fast", "plain")


def test_what_another_machine_chose_is_not_taken_over() -> None:
    clock = Clock()
    asked = question(clock.candidate("fast", 0.1), clock.candidate("plain", 1.0))
    choose(asked, "A")
    saved = [{**record, "candidate": "fast"} for record in choice.records()]
    choice._CHOICES.clear()
    choice.adopt(saved)
    found = choose(asked, "A")
    assert (found.candidate, found.source) == ("fast", "resumed")
    assert choose(asked, "B").source == "raced"


def test_nothing_is_measured_if_choices_are_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "fixed")
    asked = question(
        Contender("fast", raise_error(AssertionError())),
        Contender("plain", raise_error(AssertionError())),
    )
    assert choose(asked) == Choice("doubling", "plain", "fixed")
    candidates.measure(candidates.RACED)
    assert processor().raced == ()
    monkeypatch.setenv(choice.VARIABLE, "fastest")
    with pytest.raises(FusewrightError, match="FUSEWRIGHT_CHOICES='fastest' is neither"):
        choose(asked)


def test_a_race_while_somebody_traces_draws_or_casts() -> None:
    clock = Clock()
    asked = question(clock.candidate("fast", 1.0), clock.candidate("plain", 2.0))
    state = torch.random.get_rng_state()
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert race(asked, clock).candidate == "fast"
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_race_inside_of_a_checkpoint_saves_nothing_in_it() -> None:
    """A choice is made once: the second run of what the checkpoint holds would save less."""

    def doubled(x: Tensor) -> Tensor:
        t = x.clone().requires_grad_()
        (t * t).sum().backward()
        return 2 * x

    clock, asked = Clock(), list[Choice]()

    def layer(x: Tensor) -> Tensor:
        if not asked:
            asked.append(race(question(clock.candidate("only", 1.0, doubled)), clock))
        return x.tanh()

    x = torch.randn(8, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert asked[0].candidate == "only"
    torch.testing.assert_close(x.grad, 1 - x.detach().tanh() ** 2)


def _rank(rank: int, folder: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = Path(folder, str(rank))
    own.mkdir()
    choice.kept_folder = lambda: own  # type: ignore[assignment]
    clock = Clock()
    # each would choose another one
    asked = question(
        clock.candidate("first", 1.0 + rank), clock.candidate("second", 2.0 - rank),
        clock.candidate("plain", 9.0),
    )  # fmt: skip
    choice.race.__defaults__ = (clock,)  # type: ignore[assignment]
    choose(asked)
    first, second, plain = asked.candidates
    contest = Contest((second,), lambda x: (len(x), x.shape[1:]), devices=("cpu",))
    op = RacedOp("doubling", first.run, plain.run, contest, torch.empty_like)
    for tokens in (3, 4, 17 + rank):  # of two buckets
        op(torch.randn(tokens, 2))
    results.put((rank, [each.candidate for each in choice.choices()]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without distributed")
def test_ranks_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, str(tmp_path), results)) for r in range(2)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join()
    assert found[0] == found[1]
    assert len(found[0]) == 3


# --- what is raced on a CPU -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_forms_of_products_are_right(dtype: torch.dtype) -> None:
    found = race(candidates.products(dtype, False))
    assert not found.refused
    assert found.microseconds.keys() == {"through fp32", "direct"}
    fastest = min(found.microseconds.values())
    assert found.microseconds[found.candidate] <= fastest * (1 + MARGIN)


@pytest.mark.parametrize(
    "asked",
    [candidates.thin_products(True), candidates.attention_of(processor(), torch.bfloat16)],
    ids=lambda asked: asked.name,
)
def test_what_is_raced_is_right_in_each_form(asked: Question) -> None:
    found = race(asked)
    assert not found.refused
    assert found.microseconds.keys() == {c.name for c in asked.candidates}


def test_the_processors_record_is_what_was_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(this_machine())
    answers = {
        "products in bfloat16": "through fp32", "attention in bfloat16": "PyTorch's",
        "products in float16": "direct", "thin products in float32": "wide first",
    }  # fmt: skip
    monkeypatch.setattr(
        candidates, "choose", lambda asked, machine: Choice(asked.name, answers[asked.name])
    )
    candidates.measure({torch.float32, torch.bfloat16})
    assert torch.bfloat16 in processor().slow_products
    assert matmul.through_fp32(torch.zeros(1, dtype=torch.bfloat16))
    assert processor().own_attention is False
    assert processor().raced == (torch.float32, torch.bfloat16)
    assert processor().thin_factors_first() is False
    candidates.measure(candidates.RACED)
    assert torch.float16 not in processor().slow_products
    candidates.resume([])
    assert processor().raced == ()
    with assume(KINDS["amx"]):
        candidates.measure(candidates.RACED)
        assert processor() is KINDS["amx"]
