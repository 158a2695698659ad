"""How many kernels a decoder layer's training step launches on a GPU, counted without one.

    python benchmarks/layer_budget.py [--t4] [--write docs/kernels.md]

A small Llama with LoRA on all linears runs forward and backward on the CPU, where ops choose as
they do on a GPU and Triton's launches are noted in place of being made. Every other operator that
computes is a launch, too: views and allocations are not. What two layers launch more than one is
the layer's. Attention counts as one launch in each direction.

With ``--t4``, in place of the H100, a T4 in fp16: the table lists what is launched there, and
Triton's kernels are compiled for it. The exit status is 1 if one of them multiplies tiles or spills
registers.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright import optimize
from fusewright.kernels import launch
from fusewright.kernels.linear import products, projections
from kernel_code import put
from launches import Launch, as_on_a_gpu
from machine_code import H100, T4, Card, compiled, read

SETUPS = ("lora", "lora, autocast", "qlora", "qlora, autocast")
_FREE = {
    "alias", "detach", "empty", "empty_like", "empty_strided", "is_same_size", "lift_fresh",
    "new_empty", "new_empty_strided", "_reshape_alias", "resize_", "set_", "_unsafe_view",
    "promote_types", "device",
}  # fmt: skip
_ATTENTION = "attention"


class Counts(TorchDispatchMode):
    """Counts the operators that would launch a kernel, also those that ops of ours are made of.

    Where every shape is known, whoever wants more than the number overrides ``note``.

    Attributes:
        found: operator -> how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Captured graphs run under it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operator, or run what it is made of."""
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        launches = launch.LAUNCHES.get(func)
        own = func in launch.RUNS and (launches is None or launches(*args))
        if own and _ATTENTION not in name:
            return self.made_of(func, args, kwargs)
        out = self.run(func, args, kwargs)
        returns = func._schema.returns
        is_view = bool(returns) and all(
            r.alias_info is not None and not r.alias_info.is_write for r in returns
        )
        if not is_view and name not in _FREE:
            self.note("attention" if _ATTENTION in name else name, func, (args, kwargs), out)
        return out

    def made_of(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run what an op of ours is made of, and count that."""
        with self:
            return launch.RUNS[func](*args, **kwargs)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute an operator."""
        return func(*args, **kwargs)

    def note(self, name: str, func: Any, given: Any, out: Any) -> None:
        """Count one launch.

        Args:
            name: of the operator.
            func: the operator.
            given: what it was called with, positionally and by name.
            out: what it returned.
        """
        self.found[name] += 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, help="put the table into this file")
    parser.add_argument("--t4", action="store_true", help="what is launched on a T4")
    options = parser.parse_args(arguments)
    found = on_a_t4() if options.t4 else []
    text = "\n".join(t4_table(found) if options.t4 else table())
    print(text)
    if options.write:
        put(options.write, "t4" if options.t4 else "layer", text)
    return int(any(kernel.spills or kernel.multiplies for kernel in found))


def table() -> Iterator[str]:
    """Markdown: the launches of a layer in each set-up."""
    yield "| | eager | optimized | of these: products | casts | Triton kernels |"
    yield "|---|---|---|---|---|---|"
    for setup in SETUPS:
        eager, ours = (of_a_layer(setup, optimized) for optimized in (False, True))
        products = sum(ours[name] for name in ("mm", "addmm", "addmm_", "baddbmm"))
        copies = ours["_to_copy"] + ours["_foreach_copy_"]
        own = sum(n for name, n in ours.items() if name.startswith("triton:"))
        yield (
            f"| {setup} | {sum(eager.values())} | {sum(ours.values())} | {products} | {copies} "
            f"| {own} |"
        )


def of_a_layer(setup: str, optimized: bool) -> Counter[str]:
    """Launches by operator, forward and backward."""
    one, two = (_of_a_model(setup, optimized, layers)[0] for layers in (1, 2))
    two.subtract(one)
    return +two


def _of_a_model(
    setup: str, optimized: bool, layers: int, card: Card = H100, dtype: torch.dtype = torch.bfloat16
) -> tuple[Counter[str], list[Launch]]:
    model = adapted_llama(small_llama(layers), setup.startswith("qlora"), dtype)
    ids = torch.arange(64).reshape(2, 32)
    counts = Counts()
    launches = step(model, ids, counts, optimized, "autocast" in setup, card, dtype)
    return counts.found + Counter(f"triton:{one.name}" for one in launches), launches


@dataclass(frozen=True)
class T4Kernel:
    """A Triton kernel of a model of one layer and its head, as a T4 runs it.

    Attributes:
        name: of the kernel.
        setups: which launch it.
        seconds: that all its variants took to compile, or to come out of Triton's cache.
        spills: instructions that move registers to or from memory.
        multiplies: whether its source multiplies tiles.
    """

    name: str
    setups: tuple[str, ...]
    seconds: float
    spills: int
    multiplies: bool


def on_a_t4() -> list[T4Kernel]:
    """Compile what LoRA and QLoRA in fp16 launch on a T4, forward and backward."""
    made: dict[str, T4Kernel] = {}
    for setup in SETUPS:
        _, launches = _of_a_model(setup, True, 1, T4, torch.float16)
        for one in launches:
            known = made.get(one.full_name) or T4Kernel(one.full_name, (), 0.0, 0, False)
            setups = tuple(dict.fromkeys((*known.setups, setup)))
            seconds, spills, multiplies = known.seconds, known.spills, one.multiplies
            if not multiplies:  # else it could take an hour
                began = time.perf_counter()
                spills += read(compiled(one, T4), T4).spills
                seconds += time.perf_counter() - began
            made[one.full_name] = T4Kernel(one.full_name, setups, seconds, spills, multiplies)
    return sorted(made.values(), key=lambda k: k.name)


def t4_table(found: Sequence[T4Kernel]) -> Iterator[str]:
    """Markdown: the kernels of a T4."""
    yield "| Triton kernel | in | seconds to compile |"
    yield "|---|---|---|"
    for k in found:
        yield f"| `{k.name}` | {'; '.join(k.setups)} | {k.seconds:.1f} |"


def step(
    model: Any, ids: torch.Tensor, counts: Counts, optimized: bool, autocast: bool,
    card: Card = H100, dtype: torch.dtype = torch.bfloat16,
) -> list[Launch]:  # fmt: skip
    """Run the second step of a model as on a GPU.

    Args:
        model: on the CPU.
        ids: (B, T), its tokens and labels.
        counts: is entered for the step.
        optimized: whether to optimize the model.
        autocast: whether the step is under autocast.
        card: the GPU.
        dtype: of autocast.

    Returns:
        The launches of Triton kernels.
    """
    if optimized:  # kernels that are not launched give anything: there is nothing to verify
        optimize(model, codegen="eager", verify="off")
    with as_on_a_gpu(card.gpu) as launches, gpu_forms(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mode in (type(counts)(), counts):  # the first captures
            launches.clear()
            for p in model.parameters():
                p.grad = None
            with mode:
                with torch.autocast("cpu", dtype, enabled=autocast):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
    return list(launches)


@contextlib.contextmanager
def gpu_forms() -> Iterator[None]:
    """Let products and casts have the form that they have on a GPU."""
    own = products.on_cpu, projections.on_cpu, projections.one_by_one
    products.on_cpu = projections.on_cpu = projections.one_by_one = lambda _: False
    try:
        yield
    finally:
        products.on_cpu, projections.on_cpu, projections.one_by_one = own


def small_llama(layers: int) -> Any:
    """The config of a small Llama."""
    import transformers

    return transformers.LlamaConfig(
        vocab_size=128, hidden_size=512, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip


def adapted_llama(config: Any, quantized: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A Llama in 16 bits with adapters in fp32, PEFT's default, over 4-bit weights or plain.

    All rows of its own weights are the same, which takes no time to draw: nothing that is counted
    depends on them.
    """
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device="cpu").tie_weights()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.copy_(torch.randn(tensor.shape[-1]))
    if quantized:
        _quantize(model, dtype)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def _quantize(model: Any, dtype: torch.dtype) -> None:
    """NF4 with double quantization in place of every linear but the head."""
    import bitsandbytes.nn as bnb

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear and name != "lm_head":
                made = bnb.Linear4bit(
                    layer.in_features, layer.out_features, False, dtype,
                    compress_statistics=True, quant_type="nf4",
                )  # fmt: skip
                made.weight = bnb.Params4bit(
                    layer.weight.data, requires_grad=False, compress_statistics=True,
                    quant_type="nf4", module=made,
                )  # fmt: skip
                setattr(parent, name, made.to("cpu"))
    model.is_loaded_in_4bit = True  # PEFT asks for it


if __name__ == "__main__":
    sys.exit(main())
