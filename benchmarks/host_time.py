"""Microseconds of the host in one call of each op, and of a Llama's block, without a GPU.

    python benchmarks/host_time.py [--against CHECKOUT] [--only CASE,...] [--write docs/kernels.md]

Ops choose as they do on a GPU, on tiny CPU tensors, and Triton's launches do nothing: what is left
is Python, PyTorch's dispatcher and autograd, and the arithmetic of tiny tensors. To tell these
apart, the ATen operators of a case are recorded, and called again one by one: ``operators`` is
that, ``ours`` is the rest of forward and backward. Time is the thread's own, so that other
processes count less; the median of all samples is taken. With ``--against``, the same cases run in
another checkout of this repository, in turn, and a cell says what it was there and what it is here.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = {"block": False, "block, autocast": True}
"""Case -> whether the block runs under autocast."""
_EAGER = "eager "
_NO_KERNELS = (
    "attention", "decode_attention", "dora", "dora_row_norms", "linear_divergence", "moe_experts",
)  # fmt: skip
_CALLS, _SAMPLES = 10, 15


@dataclass(frozen=True)
class Call:
    """One case.

    Attributes:
        forward: makes the outputs.
        backward: takes them, and makes gradients; None where nothing wants one.
        clear: forgets the gradients.
    """

    forward: Callable[[], list[Any]]
    backward: Callable[[list[Any]], None] | None
    clear: Callable[[], None] = lambda: None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    parser.add_argument("--only", type=lambda t: t.split(","), default=[], help="cases")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", type=Path, help="put the table into this file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return _work(options.only)
    found = _in_turn([*filter(None, [options.against]), ROOT], options.only, options.rounds)
    text = "\n".join(table(found))
    print(text)
    if options.write:
        from kernel_code import put

        put(options.write, "host", text)
    if options.json:
        from environment import describe

        options.json.write_text(json.dumps(describe() | {"us": found}, indent=1) + "\n")
    return 0


def table(found: Sequence[dict[str, dict[str, float]]]) -> Iterator[str]:
    """Markdown.

    Args:
        found: case -> what it took in each checkout, the older one first.
    """
    heads = ("forward", "backward", "operators", "ours")
    yield f"| case | {' | '.join(heads)} |"
    yield f"|---|{'---|' * len(heads)}"
    for case in found[-1]:
        cells = [" → ".join(f"{side[case][h]:.0f}" for side in found) for h in heads]
        yield f"| {case} | {' | '.join(cells)} |"


def _in_turn(
    checkouts: Sequence[Path], only: Sequence[str], rounds: int
) -> list[dict[str, dict[str, float]]]:
    """The medians of each checkout, whose processes work in turn."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_worker(path, only)) for path in checkouts]
        samples: list[dict[str, dict[str, list[float]]]] = [{} for _ in workers]
        for _ in range(rounds):
            for worker, own in zip(workers, samples, strict=True):
                for case, values in _ask(worker).items():
                    for name, value in values.items():
                        own.setdefault(case, {}).setdefault(name, []).append(value)
    return [
        {case: {k: statistics.median(v) for k, v in values.items()} for case, values in own.items()}
        for own in samples
    ]


@contextlib.contextmanager
def _worker(checkout: Path, only: Sequence[str]) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "fusewright").symlink_to(checkout.resolve() / "src")
        path = os.pathsep.join([folder, str(ROOT / "benchmarks")])
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        with subprocess.Popen(
            [*command, *(("--only", ",".join(only)) if only else ())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        ) as process:
            try:
                yield process
            finally:
                process.communicate("")


def _ask(worker: Any) -> dict[str, dict[str, float]]:
    worker.stdin.write("\n")
    worker.stdin.flush()
    for line in worker.stdout:  # libraries print, too
        if line.startswith("{"):
            made: dict[str, dict[str, float]] = json.loads(line)
            return made
    raise RuntimeError("a worker has ended")


# -- in a worker -----------------------------------------------------------------------------------


def _work(only: Sequence[str]) -> int:
    """Measure all cases for each line that comes in."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with _launching_nothing():
        calls = dict(_cases(only))
        floors = {case: _recorded(call) for case, call in calls.items()}
        gc.collect()
        gc.freeze()
        gc.disable()
        for _ in sys.stdin:
            print(json.dumps({c: _measure(call, floors[c]) for c, call in calls.items()}))
            sys.stdout.flush()
            gc.collect()
    return 0


@contextlib.contextmanager
def _launching_nothing() -> Iterator[None]:
    """Let ops on CPU tensors do as they do on a GPU, up to the launch of a kernel."""
    from triton.runtime.jit import JITFunction

    from fusewright.kernels import launch
    from layer_budget import gpu_forms

    own = JITFunction.run, launch._INTERPRETING
    JITFunction.run, launch._INTERPRETING = (lambda *_, **__: None), True
    try:
        with gpu_forms():
            yield
    finally:
        JITFunction.run, launch._INTERPRETING = own


def _cases(only: Sequence[str]) -> Iterator[tuple[str, Call]]:
    import torch
    from torch.utils._pytree import tree_leaves

    from fusewright.rewrite.op_table import OPS
    from op_cases import CASES, Maker
    from shapes import MODELS, OpShape

    maker = Maker(OpShape(1, 32, MODELS["tiny-llama"]), torch.bfloat16, "cpu", False, torch.float32)
    for case, autocast in BLOCKS.items():
        for name in (case, _EAGER + case):
            if not only or name in only:
                yield name, _block(autocast, not name.startswith(_EAGER))
    for op in CASES:
        if op in _NO_KERNELS or (only and op not in only):
            continue
        run, case = next(o for o in OPS if o.name == op).call, maker.make(op)

        def forward(run: Any = run, case: Any = case) -> list[Any]:
            outs = [t for t in tree_leaves(run(*case.args)) if isinstance(t, torch.Tensor)]
            return [t for t in outs if t.requires_grad]

        leaves = case.leaves()
        upstream = [torch.ones_like(t) for t in forward()]

        def backward(outs: Any, leaves: Any = leaves, upstream: Any = upstream) -> None:
            torch.autograd.grad(outs, leaves, upstream, allow_unused=True)

        yield op, Call(forward, backward if upstream else None)


def _block(autocast: bool, optimized: bool) -> Call:
    """The blocks of a Llama in turn, with adapters on all linears."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from fusewright import optimize
    from fusewright.passes import PIPELINE

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=176, num_hidden_layers=_CALLS,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(plain, lora).train()
    if optimized:  # attention stays PyTorch's, as on a GPU
        rules = [rule for rule in PIPELINE if rule.name != "attention"]
        optimize(model, codegen="eager", verify="off", memory="speed", passes=rules)
    blocks, given = list(plain.model.layers), []
    hook = blocks[1].register_forward_pre_hook(lambda _, *a: given.append(a), with_kwargs=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, ids = torch.optim.SGD(trained), torch.arange(32)[None]
    lowered = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    for _ in range(3):  # the first captures; an optimizer's step ends what is watched in one
        with lowered:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    hook.remove()
    (x, *args), kwargs = given[-1]
    x = x.detach().requires_grad_()
    upstream, turns = torch.ones_like(x), itertools.cycle(blocks)

    def forward() -> list[Any]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = next(turns)(x, *args, **kwargs)
        return [out[0] if isinstance(out, tuple) else out]

    def backward(outs: list[Any]) -> None:
        outs[0].backward(upstream)

    def clear() -> None:
        for t in (x, *trained):
            t.grad = None

    return Call(forward, backward, clear)


def _recorded(call: Call) -> list[list[Callable[[], Any]]]:
    """The ATen operators of forward and of backward, to be called again."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from fusewright.kernels import launch

    class Record(TorchDispatchMode):
        @classmethod
        def ignore_compile_internals(cls) -> bool:
            return True

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func in launch.RUNS:
                with self:
                    return launch.RUNS[func](*args, **kwargs)
            found.append((func, args, kwargs))
            return func(*args, **kwargs)

    sides: list[list[Callable[[], Any]]] = []
    outs: list[Any] = []
    for way in ("forward", "backward"):
        found: list[Any] = []
        call.forward()
        with Record():
            if way == "forward":
                outs = call.forward()
            elif call.backward is not None:
                call.backward(outs)
        sides.append([lambda f=f, a=a, k=k: f(*a, **k) for f, a, k in found])
    return sides


def _measure(call: Call, floors: list[list[Callable[[], Any]]]) -> dict[str, float]:
    """Medians, in microseconds."""
    import torch

    clock = time.thread_time_ns
    times: dict[str, list[int]] = {"forward": [], "backward": [], "f": [], "b": []}
    for _ in range(_SAMPLES):
        began = clock()
        made = [call.forward() for _ in range(_CALLS)]
        times["forward"].append(clock() - began)
        if call.backward is not None:
            began = clock()
            for outs in made:
                call.backward(outs)
            times["backward"].append(clock() - began)
        del made
        call.clear()
        with torch.no_grad():
            for name, floor in zip("fb", floors, strict=True):
                began = clock()
                for _ in range(_CALLS):
                    for operator in floor:
                        operator()
                times[name].append(clock() - began)
    us = {k: statistics.median(v) / _CALLS / 1e3 if v else 0.0 for k, v in times.items()}
    operators = us["f"] + us["b"]
    return {
        "forward": us["forward"],
        "backward": us["backward"],
        "operators": operators,
        "ours": us["forward"] + us["backward"] - operators,
    }


if __name__ == "__main__":
    sys.exit(main())
