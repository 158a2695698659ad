"""The cases of ``host_time.py``: ops and a Llama's block, as on a GPU but for the launches."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusewright.kernels import launch
from fusewright.rewrite.op_table import OPS
from layer_budget import gpu_forms
from op_cases import CASES, Maker, op_of
from shapes import ModelShape, OpShape
from stub_driver import stub_driver

_BLOCK = ("block", "block under autocast")
_ENGINES = {"eager ": None, "": "eager", "inductor ": "inductor"}
"""Before the name of a block -> what runs the leftover operators; None: no rule runs."""
_NO_KERNELS = (
    "attention", "decode_attention", "dora", "dora_row_norms", "moe_experts",
    "segment_attention",
)  # fmt: skip
_TOKENS, _WIDTH = 24, 256
"""The least that is neither a case of few tokens nor of few features, which run otherwise."""
_BLOCKS = 10


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


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Let ops on CPU tensors do as they do on a GPU, up to the driver's launch of a kernel."""
    with stub_driver() as stub, gpu_forms():
        stub.launch = lambda *_: None
        yield


def cases(only: Sequence[str]) -> Iterator[tuple[str, Call]]:
    """The cases of these names, or all of them."""
    shape = OpShape(1, _TOKENS, ModelShape(1, _WIDTH, 4, 2, _WIDTH, 512, _WIDTH // 4))
    maker = Maker(shape, torch.bfloat16, "cpu", False, torch.float32)
    for case in _BLOCK:
        for before, codegen in _ENGINES.items():
            if not only or before + case in only:
                yield before + case, _block("autocast" in case, codegen)
    for op in CASES:
        if op in _NO_KERNELS or (only and op not in only):
            continue
        run, case = next(o for o in OPS if o.name == op_of(op)).call, maker.make(op)

        def forward(run: Any = run, case: Any = case) -> list[Any]:
            outs = [t for t in tree_leaves(run(*case.args)) if isinstance(t, torch.Tensor)]
            return [t for t in outs if t.requires_grad]

        leaves = case.leaves()
        upstream = [torch.ones_like(t) for t in forward()]

        def backward(outs: Any, leaves: Any = leaves, upstream: Any = upstream) -> None:
            torch.autograd.grad(outs, leaves, upstream, allow_unused=True)

        yield op, Call(forward, backward if upstream else None)


def _block(autocast: bool, codegen: str | None) -> Call:
    """The blocks of a Llama in turn, with adapters on all linears."""
    import transformers
    from peft import LoraConfig, get_peft_model

    from fusewright import optimize
    from fusewright.kernels import choice
    from fusewright.passes import PIPELINE

    if hasattr(choice, "are_blocks_raced"):  # as in no earlier version
        os.environ["FUSEWRIGHT_CHOICES"] = "ops"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=_WIDTH, intermediate_size=_WIDTH, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=_BLOCKS,
    )  # fmt: skip
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(plain, lora).train()
    if codegen is not None:  # attention stays PyTorch's, as on a GPU
        rules = [rule for rule in PIPELINE if rule.name != "attention"]
        optimize(model, codegen=codegen, verify="off", memory="speed", passes=rules)
    blocks, given = list(plain.model.layers), []
    hook = blocks[1].register_forward_pre_hook(lambda _, *a: given.append(a), with_kwargs=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, ids = torch.optim.SGD(trained), torch.arange(_TOKENS)[None]
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


def operators(call: Call) -> list[list[Callable[[], Any]]]:
    """The ATen operators of forward and of backward, to be called again."""

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
