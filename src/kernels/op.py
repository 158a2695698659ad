"""The record of an op, with which every op file ends.

An op file has one fixed order, so that a reader who knows one knows them all:

1. **reference**: plain PyTorch. It *defines* the op, rounding included: given bf16 it rounds where
   the recognised model code rounds, given fp64 it runs in fp64.
2. **cpu**: ``_forward`` and ``_backward``, made of ATen calls only. They run as they are on the
   CPU (and on any device without a Triton kernel), and Inductor can trace and fuse them.
3. **triton**: opaque library ops (see ``launch.library_op``) that call the twin file
   ``OP_triton.py``, which alone imports Triton.
4. **autograd**: one ``torch.autograd.Function`` for all implementations. It computes only the
   gradients in ``ctx.needs_input_grad``, never writes into a saved tensor, and its forward never
   returns an input. Its backward is decorated with what takes its place where it is differentiated
   itself (``second_order.py``).
5. **OP**: the record, with a typical call (``example``). Conformance tests, benchmarks, ``doctor``
   and the tests of kernels call every op as its record says: a new op is known to all of them.

The public function (``rms_norm(...)``) is what graph nodes call. It is plain Python over
``Function.apply``: AOTAutograd traces through it, so an op costs nothing when a block goes through
Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .cost import Cost, cost
from .launch import has_triton


@dataclass(frozen=True)
class ExampleSizes:
    """Sizes of examples: ``batch * seq`` tokens through one decoder layer."""

    batch: int = 2
    seq: int = 64
    hidden: int = 256
    inner: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 1000
    rank: int = 16
    states: int = 16
    experts: int = 4


class Maker:
    """Makes the arguments of examples, of one dtype on one device, under whichever mode is active.

    ``train`` says whether weights require gradients; activations and adapters always do.
    ``adapters`` is the dtype of adapters, by default that of all else. ``generator`` draws the
    values; without one, all are zero. With ``strided``, activations and weights have gaps between
    their elements.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device | str = "cpu",
        sizes: ExampleSizes | None = None,
        train: bool = True, adapters: torch.dtype | None = None,
        generator: torch.Generator | None = None, strided: bool = False,
    ) -> None:  # fmt: skip
        self.dtype, self.device, self.sizes = dtype, torch.device(device), sizes or ExampleSizes()
        self.train, self.adapters = train, adapters or dtype
        self.generator, self.strided = generator, strided
        self.wide = torch.promote_types(dtype, torch.float32)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed numbers."""
        if self.generator is None:
            return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)
        of = self.generator.device
        drawn = torch.randn(shape, dtype=torch.float32, generator=self.generator, device=of)
        return drawn.to(self.device, dtype or self.dtype)

    def integers(self, below: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers from 0: labels, codes, the experts of tokens."""
        if self.generator is None:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        of = self.generator.device
        drawn = torch.randint(below, shape, generator=self.generator, device=of)
        return drawn.to(self.device, dtype)

    def x(self, *features: int) -> Tensor:
        """An activation (batch, seq, *features)."""
        drawn = self.normal(self.sizes.batch, self.sizes.seq, *features)
        return self._laid_out(drawn).requires_grad_()

    def heads(self, count: int, width: int | None = None) -> Tensor:
        """Heads (batch, count, seq, width), strided as a projection leaves them."""
        s = self.sizes
        return (
            self.normal(s.batch, s.seq, count, width or s.head_dim).transpose(1, 2).requires_grad_()
        )

    def transposed(self, features: int) -> Tensor:
        """An activation (batch, features, seq), as a projection leaves it."""
        return self.x(features).detach().transpose(1, 2).requires_grad_()

    def weight(
        self, *shape: int, dtype: torch.dtype | None = None, mean: float = 1.0
    ) -> nn.Parameter:
        """A matrix scaled so that a product keeps its size, or a vector about ``mean``."""
        drawn = self.normal(*shape, dtype=self.wide)
        drawn = drawn / shape[-1] ** 0.5 if len(shape) > 1 else mean + drawn / 10
        return nn.Parameter(self._laid_out(drawn.to(dtype or self.dtype)), self.train)

    def adapter(self, *shape: int) -> nn.Parameter:
        """A matrix of an adapter, which is always trained."""
        parameter = self.weight(*shape, dtype=self.adapters)
        parameter.requires_grad_()
        return parameter

    def decays(self, *shape: int) -> nn.Parameter:
        """The decays of a scan: negative, in fp32 at least."""
        drawn = -0.5 - self.normal(*shape, dtype=self.wide).abs()
        return nn.Parameter(drawn, self.train)

    def segments(self) -> Tensor:
        """Where the segment of each position begins: some of one, and some of many positions."""
        begins = self.integers(3, self.sizes.batch, self.sizes.seq) == 0
        begins[:, self.sizes.seq // 4 : self.sizes.seq // 2] = False
        return starts_of(begins)

    def labels(self) -> Tensor:
        """A class for each token, also the last one; -100 for every other, as for a prompt."""
        drawn = self.integers(self.sizes.vocabulary, self.sizes.batch, self.sizes.seq)
        drawn[:1, :1] = self.sizes.vocabulary - 1
        drawn[:, 1::2] = -100
        return drawn

    def _laid_out(self, t: Tensor) -> Tensor:
        return torch.stack((t, t), -1)[..., 0] if self.strided else t


def sample_starts(positions: Tensor) -> Tensor:
    """Of each token (B, L) the index where its sample begins, int32, from positions in the samples.

    A sample begins wherever they do not count on by one, as for transformers' masks: at each 0, and
    where one that is cut off begins with another number.
    """
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return starts_of(begins)


def starts_of(begins: Tensor) -> Tensor:
    """Of each position (B, L) the one where its segment begins, int32, from where some begin."""
    places = torch.arange(begins.shape[1], dtype=torch.int32, device=begins.device)
    return torch.where(begins, places, 0).cummax(1).values


Example = Callable[[Maker], tuple[Any, ...]]


@dataclass(frozen=True)
class Op:
    """One op: its meaning, how it is called, what it cannot take.

    ``unsupported`` returns the reasons, a clause each, why the fast implementation for these
    tensors' device cannot take them; none when it can. The engine asks it before every rewrite,
    with fake tensors: it must not read values.
    """

    name: str  # also the rule name in reports
    reference: Callable[..., Any]  # plain PyTorch definition, same signature as ``call``
    call: Callable[..., Any]  # the differentiable function; a graph node's target
    unsupported: Callable[..., list[str]]  # same signature as ``call``
    # places of outputs saved for backward: nothing may write into them; any input may be saved
    saved_outputs: tuple[int, ...] = ()
    rule: str | None = ""  # whose rewrites call it, where its name is another; None where none does
    # whether it does most of the work of its block: a compiler has little to gain around it
    dominates: bool = False
    # the arguments of a typical call; every op in this package has one
    example: Example | None = None
    # arguments of calls that run other code than the example
    variants: Mapping[str, Example] = field(default_factory=dict)

    def examples(self) -> dict[str, Example]:
        """The example by the op's name, and the variants, each after a dash."""
        first = {} if self.example is None else {self.name: self.example}
        return first | {f"{self.name}-{name}": make for name, make in self.variants.items()}

    def cost(self, *args: Any, **kwargs: Any) -> Cost:
        """Cost of a call of ``call``; nothing is computed, and tensors may be fake or ``meta``."""
        return cost(self.call, *args, **kwargs)


# -- reasons that several ops give -----------------------------------------------------------------
def not_floating(name: str, t: Tensor) -> list[str]:
    """The dtype of the tensor that messages call ``name``, where it is no floating-point one."""
    return [] if t.is_floating_point() else [f"{name} is {t.dtype}, not floating-point"]


def not_16_bits(t: Tensor) -> list[str]:
    """As ``not_floating``; dtypes narrower than 16 bits are declined, too."""
    if t.is_floating_point() and t.dtype.itemsize >= 2:
        return []
    return [f"dtype {t.dtype} is not a floating-point dtype of 16 bits or more"]


def away_from(x: Tensor, name: str, t: Tensor) -> list[str]:
    """Both devices, where ``t`` is not on that of ``x``."""
    return [] if t.device == x.device else [f"{name} is on {t.device} and x on {x.device}"]


def on_several_devices(
    *operands: Any, message: str = "the operands are on several devices"
) -> list[str]:
    """``message``, where the tensors among ``operands`` are not all on one device."""
    return [message] if len({t.device for t in operands if isinstance(t, Tensor)}) > 1 else []


def kept_on_gpu(t: Tensor) -> list[str]:
    """The reason why scans are not rewritten on a GPU."""
    # fla, mamba-ssm and causal-conv1d, where they are installed
    return ["on a GPU, the kernels that transformers calls run"] if t.is_cuda else []


def loses_precision(dtype: torch.dtype | None, product: torch.dtype, name: str) -> list[str]:
    """Where a result in ``dtype`` would be rounded more than that of ``name``."""
    if dtype is None or torch.promote_types(dtype, product) is dtype:
        return []
    return [f"the result would be {dtype}, narrower than {name}'s {product}"]


def misshapen(
    like: str, x: Tensor, expected: Sequence[tuple[Tensor | None, tuple[int, ...]]]
) -> list[str]:
    """The shapes that differ from those ``expected`` for ``x``, which messages call ``like``."""
    wrong = (t for t, shape in expected if t is not None and tuple(t.shape) != shape)
    return [f"{tuple(t.shape)} does not fit {like} {tuple(x.shape)}" for t in wrong]


def no_kernel_of_rows(limit: int, x: Tensor, *parameters: Tensor | None) -> list[str]:
    """Why no Triton kernel that holds whole rows of up to ``limit`` features takes these."""
    if not x.is_cuda:
        return []
    reasons = [] if has_triton() else ["Triton is not installed"]
    if x.ndim and x.shape[-1] > limit:
        reasons.append(f"a row has {x.shape[-1]} features and the kernel holds {limit}")
    if any(t is not None and t.dtype is torch.float64 for t in (x, *parameters)):
        reasons.append("fp64 runs in plain PyTorch")
    return reasons
