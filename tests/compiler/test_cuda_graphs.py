"""CUDA graphs of compiled blocks: the same values and random numbers, whatever else goes on.

The graphs are those of ``recorded_graphs.py``, which spoil each other's memory.
"""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils.checkpoint import checkpoint

from fusewright import explain, optimize, restore
from fusewright.compiler.codegen import cuda_graphs
from fusewright.compiler.codegen.cuda_graphs import BlockGraphs, CudaGraphs, why_unfit
from fusewright.compiler.codegen.inductor import inductor
from fusewright.compiler.install import installed
from fusewright.memory.choice import PlanInputs, peak
from fusewright.memory.usage import Usage

from ..models.zoo import FAMILIES, build
from .recorded_graphs import Cuda, Interpreted, RecordedGraph, another_stream, interpret, stand_in

WIDTH = 6
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def codes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Interpreted]]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    stand_in(monkeypatch)
    with functorch_config.patch(enable_autograd_cache=False):  # which has what Inductor compiles
        yield interpret(monkeypatch)
    torch._dynamo.reset()


def block(x: Tensor, a: Tensor, b: Tensor, mask: Tensor, p: float = 0.25) -> Tensor:
    h = F.dropout(F.gelu(x @ a), p, training=True)
    return x + (h * mask) @ b


class Stack(nn.Module):
    """Blocks that share one compiled function, by graphs or not."""

    def __init__(self, owner: CudaGraphs | None, layers: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList(
            0.3 * torch.randn(WIDTH, WIDTH, generator=generator) for _ in range(2 * layers)
        )
        self.run = _compiled(block, owner)
        self.around: Callable[..., Any] = lambda run, *args: run(*args)

    def forward(self, x: Tensor, mask: Tensor) -> list[Tensor]:
        states = [x]
        for i in range(0, len(self.weights), 2):
            a, b = self.weights[i], self.weights[i + 1]
            states.append(self.around(self.run, states[-1], a, b, mask))
        return states


def _compiled(function: Callable[..., Any], owner: CudaGraphs | None) -> Callable[..., Any]:
    def backend(graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        held = [i for i, t in enumerate(examples) if isinstance(t, nn.Parameter)]
        graphs = None if owner is None else owner.of_block(held, examples)
        return inductor(graph, examples, graphs=graphs)

    return torch.compile(function, backend=backend, dynamic=False)


def pair(**choices: Any) -> tuple[Stack, Stack, CudaGraphs]:
    """One that runs by graphs, and the same without."""
    owner = CudaGraphs(**{"mode": "on", "blocks": lambda: 3, **choices})
    return Stack(owner), Stack(None), owner


def inputs(step: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(2, rows, WIDTH, generator=generator).requires_grad_()
    return x, (torch.rand(rows, 1, generator=generator) < 0.8).float()


def both(
    stacks: Sequence[Stack], step: Callable[[Stack], list[Tensor]], times: int = 7
) -> list[list[list[Tensor]]]:
    """What ``step`` gives of each stack, with the same random numbers; asserts that it is equal."""
    every: list[list[list[Tensor]]] = [[], []]
    for i in range(times):
        after = []
        for stack, given in zip(stacks, every, strict=True):
            torch.manual_seed(i)
            given.append(step(stack))
            after.append(torch.get_rng_state())
        for found, expected in zip(every[0][-1], every[1][-1], strict=True):
            assert torch.equal(found, expected), f"call {i}"
        assert torch.equal(*after), f"random numbers after call {i}"
    return every


def trained(stack: Stack, number: int = 0, rows: int = 4) -> list[Tensor]:
    """A step of SGD: states, gradients and new weights."""
    x, mask = inputs(number, rows)
    states = stack(x, mask)
    states[-1].square().mean().backward()
    grads = [p.grad for p in stack.weights]
    with torch.no_grad():
        for p in stack.weights:
            p -= 0.01 * p.grad
            p.grad = None
    return [*states, x.grad, *grads, *(p.detach().clone() for p in stack.weights)]


# --- values -------------------------------------------------------------------------------------


def test_steps_with_graphs_are_those_without(codes: list[Interpreted]) -> None:
    ours, plain, owner = pair()
    numbers = iter(range(100))
    steps = both([ours, plain], lambda s: trained(s, next(numbers) // 2), 9)
    # each layer's in its third call
    assert [line.partition(" (")[0] for line in owner.describe()] == [
        "CUDA graphs of a block's backward: 3 captured",
        "CUDA graphs of a block's forward: 3 captured",
    ]
    assert RecordedGraph.replays >= 3 * 2 * 6
    # what was given long ago is as it was
    for found, expected in zip(steps[0][3], steps[1][3], strict=True):
        assert torch.equal(found, expected)
    before = [code.calls for code in codes]
    trained(ours)
    assert [code.calls for code in codes] == before  # nothing but replays


@pytest.mark.long("order1")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_micro_batches_in_flight_do_not_meet(order: tuple[int, int]) -> None:
    ours, plain, _ = pair()

    def step(stack: Stack) -> list[Tensor]:
        batches = [inputs(i) for i in range(2)]
        losses = [stack(x, mask)[-1].square().sum() for x, mask in batches]
        for i in order:
            losses[i].backward(retain_graph=True)
        losses[0].backward()  # once more
        grads = [p.grad for p in stack.weights]
        for p in stack.weights:
            p.grad = None
        return [*losses, *grads, *(x.grad for x, _ in batches)]

    both([ours, plain], step)
    assert RecordedGraph.replays > 30


@pytest.mark.long("True")
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_are_computed_again(reentrant: bool) -> None:
    ours, plain, _ = pair()
    for stack in (ours, plain):
        stack.around = lambda run, *args: checkpoint(run, *args, use_reentrant=reentrant)
    both([ours, plain], trained)
    assert RecordedGraph.replays > 30


@pytest.mark.long
def test_hooks_on_saved_tensors_have_them() -> None:
    ours, plain, _ = pair()

    def step(stack: Stack) -> list[Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            return trained(stack)

    both([ours, plain], step)
    assert RecordedGraph.replays > 30


@pytest.mark.long
def test_arguments_of_any_layout() -> None:
    ours, plain, _ = pair()

    def step(stack: Stack) -> list[Tensor]:
        x, _ = inputs(0)
        wide = torch.randn(2, 4, 2 * WIDTH, requires_grad=True)
        strided = wide[..., ::2]  # with gaps
        expanded = torch.rand(1, 1).expand(4, WIDTH)
        swapped = torch.randn(4, 2, WIDTH).transpose(0, 1)
        results = [stack(t, expanded)[-1] for t in (x, strided, swapped)]
        total = torch.stack([r.square().sum() for r in results]).sum()
        return [*results, *torch.autograd.grad(total, [x, wide])]

    both([ours, plain], step)
    assert RecordedGraph.replays > 30


def test_a_caller_may_write_into_results() -> None:
    ours, plain, _ = pair()

    def step(stack: Stack) -> list[Tensor]:
        with torch.no_grad():
            x, mask = inputs(0)
            first = stack(x, mask)[-1]
            first.mul_(2)
            return [first, stack(first, mask)[-1]]

    both([ours, plain], step)
    assert RecordedGraph.replays > 10


# --- when they are captured again, and when not ---------------------------------------------------


def test_weights_that_move_once_are_captured_again() -> None:
    ours, plain, owner = pair()
    both([ours, plain], trained)
    for stack in (ours, plain):
        for p in stack.weights:
            p.data = p.data.clone()
    before = RecordedGraph.replays
    both([ours, plain], trained)
    assert RecordedGraph.replays > before + 20
    assert all("3 captured" in line for line in owner.describe())  # those before are gone


def test_weights_that_always_move_have_none() -> None:
    ours, plain, owner = pair()
    alive = []

    def step(stack: Stack) -> list[Tensor]:
        for p in stack.weights:
            alive.append(p.data)  # else the same memory may come again
            p.data = p.data.clone()
        return trained(stack)

    both([ours, plain], step)
    assert RecordedGraph.replays == 0
    assert set(owner.describe()) == {
        f"CUDA graphs of a block's {name}: calls run without, the addresses of weights change"
        for name in ("forward", "backward")
    }


def test_shapes_that_vary_have_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "SHAPES", 2)
    monkeypatch.setattr(cuda_graphs, "_SEEN", 3)
    owner = CudaGraphs("on")
    code = Interpreted(fx.symbolic_trace(lambda x: (x * 2,)))
    BlockGraphs(owner, []).around_code(code, "", False)
    for rows in (1, 2, 3, 4, 5) * 5:
        x = torch.randn(rows, 3)
        assert torch.equal(code([x])[0], 2 * x)
    reasons = "\n".join(owner.describe())
    assert "more than 2 shapes" in reasons
    assert "more than 3 shapes" in reasons
    assert reasons.count("1 captured") == 1  # the lines of both shapes are alike
    assert RecordedGraph.replays >= 4


def test_a_capture_or_a_mode_around_runs_the_code(codes: list[Interpreted]) -> None:
    ours, plain, _ = pair()
    both([ours, plain], trained)
    replays = RecordedGraph.replays
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        trained(ours)
    assert counter.get_total_flops() > 0
    Cuda.capturing = True
    trained(ours)
    assert RecordedGraph.replays == replays


def test_released_graphs_are_captured_when_they_are_needed() -> None:
    ours, plain, owner = pair()
    both([ours, plain], trained)
    graphs = [
        weakref.ref(graph)
        for graphed in owner._graphed
        for shape in graphed._shapes.values()
        for graph in shape.graphs.values()
    ]
    assert len(graphs) == 6
    owner.release()
    gc.collect()
    assert {graph() for graph in graphs} == {None}
    assert owner.describe() == []
    both([ours, plain], trained)
    assert len(owner.describe()) == 2


def test_weights_are_not_kept() -> None:
    owner = CudaGraphs("on")
    code = Interpreted(fx.symbolic_trace(lambda x, w: (x * w, w)))
    BlockGraphs(owner, [1]).around_code(code, "", False)
    weight = nn.Parameter(torch.randn(3))
    for _ in range(4):
        result = code([torch.randn(2, 3), weight])
    assert result[1] is weight
    RecordedGraph.replays, last = 0, weakref.ref(weight)
    graph = next(iter(next(iter(owner._graphed))._shapes.values())).graphs.popitem()[1]
    graph._graph.operations.clear()  # a real one holds no tensors
    del weight, result
    gc.collect()
    assert last() is None


# --- what is not captured, or not used ------------------------------------------------------------


def _code(run: Callable[[list[Any]], Any], **choices: Any) -> tuple[Interpreted, CudaGraphs]:
    owner = CudaGraphs(**{"mode": "on", **choices})
    code = Interpreted(fx.symbolic_trace(lambda x: (x,)))
    code.current_callable = run
    BlockGraphs(owner, []).around_code(code, "", False)
    return code, owner


def _calls(code: Interpreted, times: int, *weights: Tensor) -> list[Any]:
    results = []
    for i in range(times):
        torch.manual_seed(i)
        results.append(code([torch.full((3,), float(i + 1)), *weights]))
    return results


def test_what_reads_values_on_the_host_is_refused_before_the_capture() -> None:
    def run(args: list[Any]) -> Any:
        if Cuda.debug == "error":  # as PyTorch says it
            raise RuntimeError("called a synchronizing CUDA operation")
        return (args[0] * args[0].sum().item(),)

    code, owner = _code(run)
    results = _calls(code, 5)
    assert [r[0][0].item() for r in results] == [3 * i * i for i in range(1, 6)]
    assert owner.describe() == [
        "CUDA graphs of a block's forward: calls run without, it reads values on the host"
    ]
    assert Cuda.debug == 0


def test_after_a_capture_that_fails_there_are_none() -> None:
    def run(args: list[Any]) -> Any:
        if Cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return (args[0] + torch.rand(3),)

    code, owner = _code(run)
    results = _calls(code, 5)
    for i, (found,) in enumerate(results):
        torch.manual_seed(i)
        assert torch.equal(found, i + 1 + torch.rand(3))
    assert owner.describe() == [
        "CUDA graphs: off, one could not be captured (RuntimeError: operation not permitted when "
        "stream is capturing)"
    ]
    assert RecordedGraph.replays == 0
    assert owner.of_block([], [torch.ones(1)]) is None


def test_without_memory_there_is_no_graph() -> None:
    def run(args: list[Any]) -> Any:
        if Cuda.capturing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (args[0] + 1,)

    code, owner = _code(run)
    assert [r[0][0].item() for r in _calls(code, 5)] == [2, 3, 4, 5, 6]
    assert "there is no memory for them" in owner.describe()[0]


def test_what_a_capture_would_take_along_from_a_call_is_noticed() -> None:
    kept: dict[int, Tensor] = {}

    def run(args: list[Any]) -> Any:
        if not Cuda.capturing:
            kept[0] = args[0] * 2
        return (args[0] + kept[0],)

    code, owner = _code(run)
    with pytest.warns(UserWarning, match="gives other values than its code"):
        results = _calls(code, 6)
    assert [r[0][0].item() for r in results] == [3, 6, 9, 12, 15, 18]
    assert "a replay is off by" in owner.describe()[0]


def test_what_is_kept_of_weights_is_noticed_later() -> None:
    weight = nn.Parameter(torch.ones(3))
    kept: list[Tensor] = []

    def run(args: list[Any]) -> Any:
        if not kept or kept[0] is not weight.grad:  # made once a step
            kept[:] = [weight.grad]
            run.doubled = args[1].detach() * 2  # type: ignore[attr-defined]
        return (args[0] * run.doubled,)  # type: ignore[attr-defined]

    code, owner = _code(run)
    weight.grad = torch.ones(3)
    _calls(code, 3, weight)
    with torch.no_grad():
        weight += 1
    weight.grad = torch.ones(3)
    with pytest.warns(UserWarning, match="gives other values than its code"):
        results = _calls(code, 3, weight)
    assert results[-1][0][0].item() == 3 * 4
    assert "a replay is off by" in owner.describe()[0]


@pytest.mark.parametrize(("error", "is_used"), [(1e-3, True), (1e-1, False)])
def test_code_that_is_not_deterministic_allows_what_it_differs_by(
    error: float, is_used: bool
) -> None:
    calls = itertools.count()

    def run(args: list[Any]) -> Any:
        off = error if Cuda.capturing else 1e-3 * (next(calls) % 3)
        return (args[0] * (1 + off),)

    code, owner = _code(run)
    _calls(code, 6)
    assert ("captured" in owner.describe()[0]) == is_used


def test_graphs_that_write_or_talk_are_unfit() -> None:
    def writes(x: Tensor, y: Tensor) -> Any:
        return (torch.ops.aten.copy_.default(x, y),)

    assert why_unfit(fx.symbolic_trace(writes)) == "it writes into what it is given"
    assert why_unfit(fx.symbolic_trace(lambda x: (torch.ops.aten.nonzero.default(x),))) == (
        "aten.nonzero.default reads values on the host"
    )
    talks = fx.symbolic_trace(lambda x: (torch.ops._c10d_functional.wait_tensor.default(x),))
    assert why_unfit(talks) == "it talks to other processes"
    elsewhere = fx.symbolic_trace(lambda x: (x + 1,))
    next(iter(elsewhere.graph.nodes)).meta["val"] = torch.empty(2, device="meta")
    assert why_unfit(elsewhere) == "a part of it runs on the META"
    assert why_unfit(fx.symbolic_trace(lambda x: (x + 1,))) == ""


# --- where they are faster, and in which order ----------------------------------------------------


@pytest.mark.parametrize(("graph", "is_used"), [(200, True), (990, False), (2000, False)])
def test_only_faster_ones_are_used(graph: int, is_used: bool) -> None:
    time = 0.0

    def run(args: list[Any]) -> Any:
        nonlocal time
        time += 1e-3
        return (args[0] + 1,)

    def clock() -> float:
        return time + RecordedGraph.replays * 1e-6 * graph

    code, owner = _code(run, mode="auto", clock=clock)
    assert [r[0][0].item() for r in _calls(code, 6)] == [2, 3, 4, 5, 6, 7]
    times = f"({graph:,} us a call, 1,000 us without)"
    head = "CUDA graphs of a block's forward"
    if is_used:
        assert owner.describe() == [f"{head}: 1 captured {times}"]
    else:
        assert owner.describe() == [f"{head}: calls run without, they would be no faster {times}"]


def test_a_race_draws_no_numbers() -> None:
    ours, plain, _ = pair(mode="auto", clock=iter(range(10**6)).__next__)
    both([ours, plain], trained)


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_generators_among_the_arguments_go_on_as_without(mode: str) -> None:
    def run(args: list[Any]) -> Any:
        return (args[0] + torch.rand(3, generator=args[1]) + torch.rand(3),)

    code, owner = _code(run, mode=mode, clock=iter(range(10**6)).__next__)
    ours, plain = (torch.Generator().manual_seed(0) for _ in range(2))
    for i in range(8):
        x = torch.full((3,), float(i))
        torch.manual_seed(i)
        (found,) = code([x, ours])
        torch.manual_seed(i)
        assert torch.equal(found, run([x, plain])[0])
    # in a race that nobody wins, it is the code
    assert ("1 captured" in owner.describe()[0]) == (mode == "on")


def test_streams_take_turns() -> None:
    code, _ = _code(lambda args: (args[0] + 1,))
    _calls(code, 4)
    first = Cuda.now
    with another_stream() as stream:
        _calls(code, 2)
        assert stream.waited[-1] is first
        count = len(stream.waited)
        _calls(code, 1)
        assert len(stream.waited) == count
    _calls(code, 1)
    assert first.waited[-1] is stream


def test_the_memory_of_graphs_is_that_of_one_block() -> None:
    """Layers share buffers: nothing but addresses is kept for each."""
    ours, plain, owner = pair()
    both([ours, plain], trained)
    (memory,) = owner._memories.values()
    sizes = [len(buffers) for buffers in memory._buffers.values()]
    # forward: x and the mask; backward: x, the mask, what was saved, and a gradient
    assert sum(sizes) <= 8


# --- in models ------------------------------------------------------------------------------------


def _fewest_launches(code: Interpreted) -> int:
    """Of what Inductor makes of a graph: products and our ops, which it fuses with nothing."""
    products = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
    targets = [n.target for n in code.graph.graph.nodes if isinstance(n.target, OpOverload)]
    ours = [t for t in targets if t.namespace == "fusewright" or t.overloadpacket in products]
    return len(ours)


@pytest.mark.long
def test_a_model_trains_by_graphs_as_without(codes: list[Interpreted]) -> None:
    plain = build(FAMILIES[0], lora=True)
    ours = copy.deepcopy(plain)
    models = [
        optimize(model, codegen="inductor", verify="off", cuda_graphs=mode)
        for model, mode in ((ours, "on"), (plain, "off"))
    ]
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-3, foreach=True) for model in models]
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        batches = [torch.randint(3, 200, (2, 13), generator=generator) for _ in range(2)]
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            for ids in batches:  # gradients are accumulated
                out = model(input_ids=ids, labels=ids, output_hidden_states=True)
                out.loss.backward()
            losses.append(out)
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(losses[0].loss, losses[1].loss), step
        for found, expected in zip(*(out.hidden_states for out in losses), strict=True):
            assert torch.equal(found, expected)
    assert all(map(torch.equal, *(list(model.parameters()) for model in models)))
    lines = [f"CUDA graphs of a block's {name}: 2 captured" for name in ("backward", "forward")]
    assert list(explain(ours).cuda_graphs) == lines
    assert lines[1] in str(explain(ours))
    assert explain(plain).cuda_graphs == ()
    owner = _owner(ours)
    for graphed in owner._graphed:
        (code,) = [c for c in codes if c.current_callable is graphed]
        for shape in graphed._shapes.values():
            for graph in shape.graphs.values():
                launches = len(graph._buffers) + 1 + len(graph._sources)
                print(graphed._name, launches, _fewest_launches(code))
                assert 4 * launches <= _fewest_launches(code)
    state = ours.state_dict()
    restore(ours)
    assert owner.describe() == []
    assert all(torch.equal(ours.state_dict()[name], t) for name, t in state.items())
    ids = batches[0]
    assert torch.isfinite(ours(input_ids=ids, labels=ids).loss)
    assert RecordedGraph.replays > 30


def _owner(model: nn.Module) -> CudaGraphs:
    records = filter(None, map(installed, model.modules()))
    return next(records).session.choices.graphs


def test_asked_for_where_there_are_none_is_said() -> None:
    model = build(FAMILIES[0], lora=False)
    optimize(model, codegen="eager", cuda_graphs="on", verify="off")
    assert _owner(model).describe() == ["CUDA graphs: off, blocks run in eager code"]
    with pytest.raises(ValueError, match="cuda_graphs='yes' is not one of 'auto', 'on', 'off'"):
        optimize(model, cuda_graphs="yes")  # type: ignore[arg-type]


def test_a_plan_counts_their_memory() -> None:
    usage = Usage(saved=100, forward=150, backward=180, gradients=0, flops=1)
    setting = PlanInputs(0, 0, 0, None, ("all",))
    without = peak(["all"] * 2, [{"all": usage}] * 2, setting)
    pooled = peak(["all"] * 2, [{"all": usage}] * 2, replace(setting, pooled=True))
    assert pooled - without == 280  # what a block needs, and what it saves once more
    owner = CudaGraphs("auto")
    assert owner.may_serve(torch.device("cpu"), "inductor")
    assert not owner.may_serve(torch.device("meta"), "inductor")
    assert not CudaGraphs("off").may_serve(torch.device("cpu"), "inductor")


class _Repeated:
    """A graph of compiled code, whose kernels nothing sees: calls it again, on the same memory."""

    def __init__(self, run: Callable[[], Sequence[Any]]) -> None:
        self._run = run
        self.results = list(run())

    def replay(self) -> None:
        RecordedGraph.replays += 1
        for old, new in zip(self.results, self._run(), strict=True):
            if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)


@pytest.mark.slow
def test_what_inductor_compiles_runs_by_graphs(
    codes: list[Interpreted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the stand-ins
    stand_in(monkeypatch)

    def capture(
        memory: Any, run: Callable[[], Sequence[Any]], generators: Any
    ) -> tuple[Any, Sequence[Any]]:
        graph = _Repeated(run)
        return graph, graph.results

    monkeypatch.setattr(cuda_graphs._Memory, "capture", capture)
    ours, plain, owner = pair()
    both([ours, plain], trained)
    assert [line[-10:] for line in owner.describe()] == ["3 captured"] * 2
    assert RecordedGraph.replays >= 3 * 2 * 4
    assert not codes
