"""Kernels that are launched again are launched as ``JITFunction.run`` launches them."""

from __future__ import annotations

import importlib
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fusewright.kernels.launch import has_triton
from fusewright.kernels.op import ExampleSizes, Maker
from fusewright.rewrite.op_table import OPS

from .calls import Call
from .util import needs_triton

if has_triton():
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.runtime import JITFunction

    from fusewright.kernels.launcher import Kernel, _Observer, launched

    @launched
    @triton.jit(do_not_specialize=["count"])
    def toy_kernel(x, y, n, count, scale, more, SIZE: tl.constexpr, FLAG: tl.constexpr):
        tl.store(y + tl.arange(0, SIZE), tl.load(x + n + count) * scale)


ROOT = Path(__file__).parents[2]

pytestmark = needs_triton


class CompiledStub:
    """A compiled kernel of one variant."""

    def __init__(self, variant: Any, driver: Any) -> None:
        self.function = variant
        self.packed_metadata = object()
        self.metadata = mock.Mock(target=driver.target)
        self._run: Any = lambda *args: driver.noted.append(args)

    @property
    def run(self) -> Any:
        return self._run

    def launch_metadata(self, *args: Any) -> None:
        return None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in for a driver."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    with importlib.import_module("stub_driver").stub_driver() as stub:
        yield stub


def _compiling(kind: type[CompiledStub], gpu: Any) -> Callable[..., Any]:
    def compiled(self: Any, key: Any, signature: Any, device: int, *_: Any) -> Any:
        made = self.device_caches[device][0][key] = kind((device, key), gpu)
        return made

    return compiled


@pytest.fixture
def kernel(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A kernel whose variants are not compiled."""
    monkeypatch.setattr(JITFunction, "_do_compile", _compiling(CompiledStub, gpu))
    return Kernel(toy_kernel)


class Runs:
    """How often launches went through ``JITFunction.run``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, own = 0, JITFunction.run

        def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return own(kernel, *args, **kwargs)

        monkeypatch.setattr(JITFunction, "run", run)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


def _reached(launch: tuple[Any, ...]) -> tuple[Any, ...]:
    """What of a launch reaches the kernel: without hooks, which were none."""
    return (*launch[:6], *(id(a) if isinstance(a, Tensor) else a for a in launch[9:]))


def _ordinary(kernel: Any, *args: Any, grid: Any, **options: Any) -> None:
    JITFunction.run(kernel, *args, grid=grid, warmup=False, **options)


X = torch.zeros(64)
OPTIONS = {"SIZE": 16, "FLAG": True, "num_warps": 4}


def test_the_third_launch_does_not_ask_triton(kernel: Any, gpu: Any, runs: Runs) -> None:
    for _ in range(5):
        kernel[(3,)](X, X, 8, 5, 0.5, None, **OPTIONS)
    assert runs.count == 2  # one to compile, one to see how the compiled kernel is called
    assert len({_reached(launch) for launch in gpu.noted}) == 1
    assert gpu.noted[0][:4] == (3, 1, 1, 7)
    assert gpu.noted[-1][9:] == (X, X, 8, 5, 0.5, None, 16, True)


def test_new_values_and_streams_reach_the_kernel(kernel: Any, gpu: Any, runs: Runs) -> None:
    for _ in range(3):
        kernel[(3,)](X, X, 8, 5, 0.5, None, **OPTIONS)
    gpu.noted.clear()
    gpu.stream, other = 9, torch.ones(32)
    kernel[(5, 6)](other, X, 8, 77, 2.5, None, **OPTIONS)
    assert runs.count == 2
    assert gpu.noted[0][:4] == (5, 6, 1, 9)
    assert gpu.noted[0][9:] == (other, X, 8, 77, 2.5, None, 16, True)


def _random_arguments(rng: random.Random) -> tuple[tuple[Any, ...], dict[str, Any]]:
    memory = torch.zeros(256, dtype=rng.choice([torch.float32, torch.bfloat16]))

    def tensor() -> Tensor:
        return memory[rng.choice([0, 0, 16, 1, 3]) :]

    number = rng.choice([0, 1, 2, 16, 17, 32, 1 << 31, (1 << 31) + 1, -1, -16, 1 << 40])
    count = rng.choice([1, 5, 16, 100, 1 << 33])
    more = rng.choice([None, None, 1, 16, tensor(), torch.nn.Parameter(tensor()), True, 0.5])
    options = {"SIZE": rng.choice([16, 32]), "FLAG": rng.choice([True, False])}
    if rng.random() < 0.5:
        options["num_warps"] = rng.choice([4, 8])
    return (tensor(), tensor(), number, count, rng.choice([0.5, 1.0, 2]), more), options


def test_the_variant_is_always_the_one_that_triton_chooses(
    kernel: Any, gpu: Any, runs: Runs
) -> None:
    """Lost alignment or divisibility, ones, 64 bits, other types."""
    rng, own = random.Random(0), 0
    for _ in range(1000):
        args, options = _random_arguments(rng)
        for _ in range(rng.choice([1, 3])):
            before = runs.count
            kernel[(2,)](*args, **options)
            own += runs.count == before
        _ordinary(kernel, *args, grid=(2,), **options)
        ours, triton_s = gpu.noted[-2:]
        assert _reached(ours) == _reached(triton_s)
    assert own > 100
    assert len(kernel.device_caches[0][0]) > 100  # variants


def test_each_device_has_its_own_kernels(kernel: Any, gpu: Any) -> None:
    for _ in range(3):
        for device in (0, 1):
            gpu.device = device
            kernel[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)
            assert gpu.noted[-1][4][0] == device


def test_another_driver_compiles_anew(kernel: Any, gpu: Any) -> None:
    from triton.runtime import driver

    for _ in range(3):
        kernel[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)
    count = len(gpu.noted)
    other = type(gpu)()
    driver.set_active(other)  # type: ignore[arg-type]
    with mock.patch.object(JITFunction, "run") as run:
        kernel[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)
    assert run.called
    assert len(gpu.noted) == count


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_every_launch(kernel: Any, gpu: Any, runs: Runs, hook: str) -> None:
    for _ in range(3):
        kernel[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)
    chain, before = getattr(knobs.runtime, hook), runs.count
    profiler = mock.Mock()
    chain.add(profiler)
    try:
        kernel[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)
        assert runs.count == before + 1
        assert gpu.noted[-1][7:9] == (
            knobs.runtime.launch_enter_hook,
            knobs.runtime.launch_exit_hook,
        )
    finally:
        chain.remove(profiler)
    with mock.patch.object(knobs.runtime, hook, profiler):  # in place of the chain
        kernel[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)
    assert runs.count == before + 2
    kernel[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)
    assert runs.count == before + 2


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        ("runtime", "debug", True),
        ("runtime", "add_stages_inspection_hook", lambda *_: ("key", "hash")),
        ("compilation", "instrumentation_mode", "consan"),
    ],
)
def test_whoever_debugs_sees_every_launch(
    kernel: Any, runs: Runs, owner: str, name: str, value: Any
) -> None:
    for _ in range(3):
        kernel[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)
    with mock.patch.object(getattr(knobs, owner), name, value):
        kernel[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)
        kernel[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)
    assert runs.count == 4


def test_hooks_of_a_kernel_see_every_launch(kernel: Any, runs: Runs) -> None:
    for _ in range(3):
        kernel[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)
    hook = mock.Mock()
    kernel.add_pre_run_hook(hook)
    kernel[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)
    assert hook.called


@pytest.mark.parametrize("change", ["other arguments", "no _run", "AMD"])
def test_what_is_not_known_goes_through_triton(
    gpu: Any, runs: Runs, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Another version of Triton may call its compiled kernels in another way."""
    from triton.backends.compiler import GPUTarget

    class Changed(CompiledStub):
        if change == "other arguments":

            @property
            def run(self) -> Any:
                return lambda *args: self._run("new", *args)

        elif change == "no _run":

            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self._launcher = vars(self).pop("_run")

            @property
            def run(self) -> Any:
                return self._launcher

    if change == "AMD":
        gpu.target = GPUTarget("hip", "gfx942", 64)
    monkeypatch.setattr(JITFunction, "_do_compile", _compiling(Changed, gpu))
    toy = Kernel(toy_kernel)
    for i in range(6):
        toy[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)
        assert runs.count == len(gpu.noted) == i + 1


def test_kept_launches_do_not_grow_without_end(kernel: Any) -> None:
    with mock.patch("fusewright.kernels.launcher._MOST", 10):
        for n in range(2, 100):
            kernel[(2,)](X, X, n, 5, 0.5, None, **OPTIONS)
    assert len(kernel._launches) <= 10


def test_threads_launch_at_once(kernel: Any, gpu: Any) -> None:
    """The backward pass of a GPU runs in a thread of its own."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(n: int) -> None:
        for i in range(300):
            kernel[(2,)](X, X, 16 * (i % 7) + n, 5, 0.5, None, **OPTIONS)

    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(gpu.noted) == 1200
    for made in kernel.device_caches[0][0].values():
        assert not isinstance(made._run, _Observer)  # none is left behind


def test_fewer_calls_of_python(kernel: Any) -> None:
    def calls(launch: Callable[[], None]) -> int:
        count = 0

        def note(frame: Any, event: str, arg: Any) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(note)
        try:
            launch()
        finally:
            sys.setprofile(None)
        return count

    def ours() -> None:
        kernel[(2,)](X, X, 8, 5, 0.5, None, **OPTIONS)

    for _ in range(3):
        ours()
    triton_s = calls(lambda: _ordinary(kernel, X, X, 8, 5, 0.5, None, grid=(2,), **OPTIONS))
    assert calls(ours) < triton_s


def _launch_all(op: str, gpu: Any) -> None:
    record = next(o for o in OPS if o.name == op)
    sizes = ExampleSizes(1, 32, 256, 256, 4, 2, 64, 512)
    maker = Maker(
        torch.bfloat16, "cpu", sizes, adapters=torch.float32,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert record.example is not None
    call = Call(record, *tree_flatten(record.example(maker)))
    out = call.ours(*call.tensors)
    outs = [t for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
    leaves = [t for t in call.tensors if t.requires_grad]
    if outs and leaves:
        torch.autograd.grad(outs, leaves, [torch.ones_like(t) for t in outs], allow_unused=True)


FAST = ("rms_norm", "rope", "glu")
SLOW = (
    "add_rms_norm",
    "layer_norm",
    "lora_linear",
    "quant_linear",
    "linear_cross_entropy",
    "linear_logprob",
    "selective_scan",
    "ssd",
    "moe_up",
    "moe_down",
    "mlp_block",
)


@pytest.mark.parametrize("op", [*FAST, *(pytest.param(op, marks=pytest.mark.slow) for op in SLOW)])
def test_launches_of_ops_reach_the_driver_as_triton_s_do(op: str, gpu: Any, runs: Runs) -> None:
    """Compiled for an H100; the launches of a third pass are those of the first, but for memory."""
    passes = []
    for _ in range(3):
        gpu.noted.clear()
        runs.count = 0
        _launch_all(op, gpu)
        passes.append((runs.count, list(gpu.noted)))

    def described(launch: tuple[Any, ...]) -> tuple[Any, ...]:
        tensors = (
            (a.dtype, a.shape, a.stride()) if isinstance(a, Tensor) else a for a in launch[9:]
        )
        return (*launch[:6], *tensors)

    first, _, third = passes
    assert first[1]
    assert first[0] > 0
    assert third[0] == 0
    assert [described(a) for a in first[1]] == [described(a) for a in third[1]]


def test_other_lengths_compile_nothing_anew(gpu: Any) -> None:
    """How many rows there are is no address: 16 or 1 of them run the same code as others."""
    norm = importlib.import_module("fusewright.kernels.norms.rms_norm_triton")
    for rows in (5, 16, 1, 32, 77):
        norm.forward(torch.ones(rows, 128), torch.ones(128), 1e-6, 0.0, False)
    assert len(norm.forward_kernel.device_caches[0][0]) == 1
    assert len(gpu.noted) == 5


def test_every_kernel_that_is_launched_is_one() -> None:
    """A kernel without ``@launched`` would be launched in Triton's own way, unnoticed."""
    kernels = ROOT / "src" / "kernels"
    found = 0
    for file in sorted(kernels.glob("*/*_triton.py")):
        module = importlib.import_module(f"fusewright.kernels.{file.parent.name}.{file.stem}")
        for name in re.findall(r"^\s+(\w+)\[(?:\(|grid)", file.read_text(), re.MULTILINE):
            kernel = getattr(module, name, None)
            if isinstance(kernel, JITFunction):
                assert isinstance(kernel, Kernel), f"{file.stem}.{name}"
                found += 1
    assert found > 25
