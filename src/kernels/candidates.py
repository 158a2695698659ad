"""What is raced on a CPU: which products, and whose attention, are the fastest on this processor.

``processor.py`` has what the project measured on its own machines; here the user's machine says it,
once, before the first graph of a model is made for it. All choices are facts about the processor:
they become its record, from which every op reads its form.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import matmul
from .attention.attention import attention
from .choice import Choice, Contender, Question, adopt, choose, is_fixed
from .processor import (
    Processor,
    assume,
    is_of_this_machine,
    measured,
    processor,
    this_machine,
)
from .raced_op import CONTESTS, machine

RACED = torch.float32, torch.bfloat16, torch.float16
"""The dtypes that processors differ in."""

ROWS, FEATURES = 256, 768
"""Of the products: as large as those of a small model, and milliseconds long."""

RANK = 16
"""Of the thin products."""

HEADS, POSITIONS, WIDTH = 4, 256, 64
"""Of the attention."""


def measure(dtypes: Iterable[torch.dtype]) -> None:
    """Race what depends on ``dtypes``, and let ops choose by it.

    Nothing is measured where another processor is assumed.
    """
    if is_fixed() or not is_of_this_machine():
        return
    for dtype in RACED:
        if dtype in dtypes and dtype not in processor().raced:
            measured(_learnt(processor(), dtype))


def resume(records: Iterable[dict[str, Any]]) -> None:
    """Choose as a run did that is continued, whose ``choice.records`` these are."""
    adopt(records)
    for op in CONTESTS.values():
        op.forget()
    if is_of_this_machine():
        measured(this_machine())


def _learnt(known: Processor, dtype: torch.dtype) -> Processor:
    """The record of this machine's processor after the races of ``dtype``."""
    known = replace(known, raced=(*known.raced, dtype))
    if dtype is torch.float32:
        first = _asked(thin_products(known.thin_factors_first())).candidate == "thin first"
        return replace(known, thin_first=first)
    widened = _asked(products(dtype, dtype in known.slow_products)).candidate == "through fp32"
    slow = [t for t in known.slow_products if t is not dtype] + [dtype] * widened
    known = replace(known, slow_products=tuple(slow))
    if dtype is torch.bfloat16:
        own = _asked(attention_of(known, dtype)).candidate == "own"
        known = replace(known, own_attention=own)
    return known


def _asked(question: Question) -> Choice:
    return choose(question, machine(torch.device("cpu")))


# --- products -------------------------------------------------------------------------------------


def products(dtype: torch.dtype, through_fp32: bool) -> Question:
    """Are products in ``dtype`` faster as they are, or as products of fp32, casts included?

    ``through_fp32``: what is taken where nothing is measured. A product and both of its gradients.
    """

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        sizes = (ROWS, FEATURES), (FEATURES, FEATURES), (ROWS, FEATURES)
        return tuple(torch.randn(size, generator=generator).to(dtype) for size in sizes)

    def run(widens: bool, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
        slow = (dtype,) if widens else ()
        with assume(replace(processor(), slow_products=slow)):
            return [
                matmul.linear(x, weight),
                matmul.mm(grad, weight),
                matmul.mm(grad.t(), x),
            ]

    return Question(
        f"products in {_short(dtype)}",
        (
            Contender("through fp32", functools.partial(run, True)),
            Contender("direct", functools.partial(run, False)),
        ),
        inputs,
        "through fp32" if through_fp32 else "direct",
    )


def thin_products(thin_first: bool) -> Question:
    """Is thin times wide faster than wide times thin, in float32, for the gradients of adapters?

    ``thin_first``: what is taken where nothing is measured.
    """

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(torch.randn(ROWS, n, generator=generator) for n in (FEATURES, RANK))

    return Question(
        "thin products in float32",
        (
            Contender("thin first", lambda wide, thin: torch.mm(thin.t(), wide)),
            Contender("wide first", lambda wide, thin: torch.mm(wide.t(), thin).t()),
        ),
        inputs,
        "thin first" if thin_first else "wide first",
    )


# --- attention ------------------------------------------------------------------------------------


def attention_of(known: Processor, dtype: torch.dtype) -> Question:
    """Is our causal attention faster than PyTorch's in ``dtype``, forward and backward?

    ``known``: the record with which ours runs.
    """

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = 1, HEADS, POSITIONS, WIDTH
        drawn = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
        return tuple(t.requires_grad_(i < 3) for i, t in enumerate(drawn))

    def gradients(out: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
        *wanted, grad = tensors
        return [out.detach(), *torch.autograd.grad(out, wanted, grad)]

    def own(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Sequence[Tensor]:
        with assume(known):
            return gradients(attention(q, k, v, None, True), q, k, v, grad)

    def plain(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Sequence[Tensor]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return gradients(out, q, k, v, grad)

    fixed = "PyTorch's" if _by_record(known) else "own"
    candidates = Contender("own", own), Contender("PyTorch's", plain)
    return Question(f"attention in {_short(dtype)}", candidates, inputs, fixed)


def _by_record(known: Processor) -> str:
    """Why PyTorch's attention would be taken with this record; empty: it would not."""
    from .attention.unsupported import why_not_bfloat16

    with assume(known):
        return why_not_bfloat16()


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
