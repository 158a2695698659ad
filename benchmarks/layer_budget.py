"""How many kernels a decoder layer's training step launches on a GPU, counted without one.

    python benchmarks/layer_budget.py [--write docs/kernels.md]

A small Llama with LoRA on all linears runs forward and backward on the CPU, where ops choose as
they do on a GPU and Triton's launches are noted in place of being made. Every other operator that
computes is a launch, too: views and allocations are not. What two layers launch more than one is
the layer's. Attention counts as one launch in each direction.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright import optimize
from fusewright.kernels import launch
from fusewright.kernels.linear import products, projections
from kernel_code import put
from launches import Launch, as_on_a_gpu
from machine_code import CARDS

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
    options = parser.parse_args(arguments)
    text = "\n".join(table())
    print(text)
    if options.write:
        put(options.write, "layer", text)
    return 0


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
    one, two = (_of_a_model(setup, optimized, layers) for layers in (1, 2))
    two.subtract(one)
    return +two


def _of_a_model(setup: str, optimized: bool, layers: int) -> Counter[str]:
    model = adapted_llama(small_llama(layers), setup.startswith("qlora"))
    ids = torch.arange(64).reshape(2, 32)
    counts = Counts()
    launches = step(model, ids, counts, optimized, autocast="autocast" in setup)
    return counts.found + Counter(f"triton:{one.name}" for one in launches)


def step(
    model: Any, ids: torch.Tensor, counts: Counts, optimized: bool, autocast: bool
) -> list[Launch]:
    """Run the second step of a model as on an H100.

    Args:
        model: on the CPU.
        ids: (B, T), its tokens and labels.
        counts: is entered for the step.
        optimized: whether to optimize the model.
        autocast: whether the step is under autocast to bfloat16.

    Returns:
        The launches of Triton kernels.
    """
    if optimized:  # kernels that are not launched give anything: there is nothing to verify
        optimize(model, codegen="eager", verify="off")
    with as_on_a_gpu(CARDS[2].gpu) as launches, gpu_forms(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mode in (type(counts)(), counts):  # the first captures
            launches.clear()
            for p in model.parameters():
                p.grad = None
            with mode:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
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


def adapted_llama(config: Any, quantized: bool) -> Any:
    """A Llama in bfloat16 with adapters in fp32, PEFT's default, over 4-bit weights or plain."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if quantized:
        _quantize(model)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def _quantize(model: Any) -> None:
    """NF4 with double quantization in place of every linear but the head."""
    import bitsandbytes.nn as bnb

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear and name != "lm_head":
                made = bnb.Linear4bit(
                    layer.in_features, layer.out_features, False, torch.bfloat16,
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
