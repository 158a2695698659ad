"""The time of the steps, and how much of the machine they used.

The share of the peak ("model FLOPs utilization", Chowdhery et al., "PaLM", 2022, appendix B) counts
the operations that the model's formulas ask for, not those that were run: what gradient
checkpointing computes again does not raise it, what a fused loss leaves out does not lower it. It
is an estimate, for seeing at a glance whether a run is near what the machine can do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

GPU_PEAKS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "H20": 148, "A100": 312, "A40": 150, "A30": 165, "A10G": 70, "A10": 125, "L40S": 362,
    "L40": 181, "L4": 121, "RTX A6000": 155, "RTX 4090": 165, "RTX 3090": 71, "MI300X": 1307,
    "MI250": 362,
}  # fmt: skip
"""Dense products in bfloat16 with sums in float32, in TFLOP/s, by a part of the device's name
(longer names first): the data sheets of NVIDIA and AMD, their figures "with sparsity" halved."""


@dataclass
class ThroughputMeter:
    """Time and tokens of the steps so far.

    Attributes:
        seconds: of each step.
        tokens: of each step, without padding.
        trained: of each step, the tokens with a label.
        compiling: which steps, counted from 0, were the first of their process: the run's first
            one, and the first after each resumption.
        flops: floating-point operations of a training step per token, see ``flops_per_token``; 0
            where that is not known.
        peak: operations per second that the device can do, see ``peak_flops``; None: not known.
    """

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    compiling: list[int] = field(default_factory=lambda: [0])
    flops: float = 0.0
    peak: float | None = None
    _start: float = field(default=0.0, init=False, repr=False)

    def start_step(self) -> None:
        """Start the clock of the next step."""
        self._start = time.perf_counter()

    def end_step(self) -> None:
        """Stop the clock: the step is complete."""
        self.seconds.append(time.perf_counter() - self._start)

    def add(self, tokens: int, trained: int) -> None:
        """Count a batch of the current step."""
        if len(self.tokens) == len(self.seconds):
            self.tokens.append(0)
            self.trained.append(0)
        self.tokens[-1] += tokens
        self.trained[-1] += trained

    def rate(self, counts: Sequence[int], last: int | None = None) -> float:
        """``counts`` per second, over the ``last`` steps; without those that compile."""
        steps = self._telling(last)
        spent = sum(self.seconds[i] for i in steps)
        return sum(counts[i] for i in steps) / spent if spent else 0.0

    def median_step(self, last: int | None = None) -> float:
        """Seconds of the median step of the ``last`` ones; without those that compile."""
        return statistics.median([self.seconds[i] for i in self._telling(last)] or [0.0])

    def resumed_step(self) -> float | None:
        """Seconds of the first step after the last resumption; None where there is none."""
        last = self.compiling[-1]
        return self.seconds[last] if 0 < last < len(self.seconds) else None

    @property
    def compiles(self) -> bool:
        """Whether the next step is the first one of this process."""
        return len(self.seconds) in self.compiling

    @property
    def tells(self) -> bool:
        """Whether a step was timed that did not compile."""
        return any(i not in self.compiling for i in range(len(self.seconds)))

    def _telling(self, last: int | None) -> list[int]:
        """The ``last`` complete steps; without those that compile, if any others are left."""
        steps = range(len(self.seconds))[-last if last else None :]
        return [i for i in steps if i not in self.compiling] or list(steps)

    def utilization(self, last: int | None = None) -> float | None:
        """The share of the device's peak that was used, from 0 to 1; None where not known."""
        if not self.flops or not self.peak or not self.seconds:
            return None
        return self.rate(self.tokens, last) * self.flops / self.peak

    def entries(self, last: int) -> dict[str, float]:
        """The log's entries about the ``last`` steps: their speed, and the seconds of all steps."""
        last = max(1, last)
        result = {
            "trained_tokens_per_s": self.rate(self.trained, last), "time": sum(self.seconds),
        }  # fmt: skip
        share = self.utilization(last)
        return result if share is None else {**result, "mfu": share}

    def state_dict(self) -> dict[str, list[Any]]:
        """The complete steps, without the current one, for a checkpoint."""
        count = len(self.seconds)
        state: dict[str, list[Any]] = {
            name: getattr(self, name)[:count] for name in ("seconds", "tokens", "trained")
        }
        return {**state, "compiling": [step for step in self.compiling if step < count]}

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        """Restore ``state_dict``; the next step is the first of this process."""
        for name, values in state.items():
            setattr(self, name, list(values))
        self.compiling.append(len(self.seconds))


def flops_per_token(model: nn.Module, context: float = 0.0) -> float:
    """Estimate the floating-point operations of a training step per token.

    A matrix of N weights takes 2·N for its product in forward, 2·N for the gradient of its input,
    and 2·N for its own: so 6·N where it is trained, 4·N where it is frozen but lies on the
    gradient's way, 2·N where it comes before everything that is trained (Kaplan et al., "Scaling
    Laws for Neural Language Models", 2020, section 2.1, with the frozen cases told apart).
    Embeddings are looked up and cost nothing. Of experts only those count that a token is sent to.
    Causal attention adds 6·L·H·D·T: two products over half of T keys, and twice that in backward. T
    is ``context``, the tokens of the sample of an average token, see ``mean_context``.
    """
    total, reached = 0.0, False
    for module, name, weight in _weights(model):
        reached |= weight.requires_grad
        if isinstance(module, nn.Embedding) or weight.dim() < 2:
            continue
        size = _size(module, name, weight)
        if weight.dim() == 3 and not hasattr(module, "kernel_size"):  # experts, one after the other
            size *= _share(model, weight.shape[0])
        total += size * (6 if weight.requires_grad else 4 if reached else 2)
    return total + 6 * _attention_width(model) * context


def mean_context(lengths: Sequence[int]) -> float:
    """The length of the sample of an average token: long samples have more of the tokens."""
    tokens = sum(lengths)
    return sum(n * n for n in lengths) / tokens if tokens else 0.0


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            yield module, name, weight


def _size(module: nn.Module, name: str, weight: nn.Parameter) -> float:
    """The number of weights of a matrix; a packed one counts as unpacked."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if name == "weight" and isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return float(sizes[0] * sizes[1])
    return float(weight.numel())


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _share(model: nn.Module, experts: int) -> float:
    each = getattr(_text_config(model), "num_experts_per_tok", None)
    return min(1.0, each / experts) if isinstance(each, int) else 1.0


def _attention_width(model: nn.Module) -> float:
    """L·H·D: features of all query heads of all layers; 0 without attention."""
    width = 0.0
    for layer in layer_configs(_text_config(model)):
        heads = getattr(layer, "num_attention_heads", None)
        if not isinstance(heads, int):
            return 0.0
        size = getattr(layer, "head_dim", None) or getattr(layer, "hidden_size", 0) // heads
        width += heads * size
    return width


def layer_configs(config: Any) -> list[Any]:
    """The configuration of each layer, whose sizes may differ; none without a number of layers."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return []
    if getattr(config, "is_heterogeneous", False):  # not in older transformers
        return list(config.per_layer_config)
    return [config] * layers


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float | None:
    """The operations per second that the device can do in products of ``dtype``.

    From ``GPU_PEAKS`` for the GPUs in it, else measured: the best of some products of 1024 x 1024
    (on a GPU 8192 x 8192) matrices, which large products of a model come near to. ``seconds`` is
    how long a measurement may take, after one product to warm up. None where the device has no such
    product.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        listed = next((peak for part, peak in GPU_PEAKS.items() if part in name), None)
        if listed is not None:
            return listed * 1e12
    size = 8192 if device.type == "cuda" else 1024
    try:
        # a separate generator: the run's random numbers must not depend on this
        generator = torch.Generator(device).manual_seed(0)
        numbers = torch.rand(size, size, device=device, generator=generator).to(dtype)
        numbers @ numbers
    except RuntimeError:  # no memory for it, or no such product
        return None
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        numbers @ numbers
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best
