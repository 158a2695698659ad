"""How far each way is from the reference, and how far it may be.

The reference is the same model in a higher precision (fp32 for 16 bits, dequantized weights;
fp64 for fp32), trained in eager mode on the same batches. Low precision rounds, so eager mode in
the recipe's own precision is not there either: what it loses is the measure for every other way.
With d(x) for the deviation of x from the reference, relative to its size, a way passes if

    d(way) <= 1.5 * d(eager) + unit

for each of the following. ``unit`` is one unit of rounding of the recipe's precision: 7.8e-3 in
bf16, 1.2e-7 in fp32. It is the rule by which the compiler judges each rewrite, too.

- **Gradients of the first step**, before they are clipped: the weights are still the same in all
  ways, so this is rounding alone, and the sharpest check. d is the norm of the difference over the
  norm of the reference's: of all trained weights, and of each kind of weight (``q_proj.lora_A`` of
  all layers is one kind), so that an error in a small one is not lost among the others.
- **The bias of these gradients**, whatever their size, is judged by ``auditing.drift``: errors that
  all go one way.
- **The change of the weights** from the first to the last step. From the second step on the weights
  are not the same any more: Adam divides each gradient by its own size, so where one is almost
  zero, rounding decides which way that weight goes, by a whole step. That can be any few weights,
  and they would be all that a norm sees. So d leaves out the 1% of the weights that are furthest
  off in each way; a wrong gradient moves far more of them.
- **The loss of each step.** d(eager) is the largest of all its steps', because a single number can
  be near the reference's by luck. Whatever the precision, a loss is a sum in fp32 over the step's n
  trained tokens, so log2(n) / 2 units of rounding of fp32 are added to ``unit``. From the second
  step on both grow as eager's error grows from its gradients to the change of its weights.

Few weights and few tokens have few rounding errors, so that in a small model d of one step is a
matter of luck, for eager mode as for the others. Where a way fails by the first step alone, and by
no more than luck explains, it is judged by ``DRAWS`` steps that all begin with the initial weights
(``ways.draws_of``): squares of errors and of the reference are summed over them, as over draws in
the verification of a rewrite. What passes at once is not run again.

In fp32 this finds gradients that are off by one in a million. In bf16, eager mode loses so much by
itself (some percent of the gradients of a small model) that less than that cannot be seen: there,
run the recipe with ``bf16: false`` as well. Each rewrite is verified far more closely anyway.

Where the reference does not fit into memory, it is a second eager run whose sums are in another
order (other batches of the same samples). d is then the distance of two runs that both round.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from ...auditing.drift import Drift, drifts, kind_of, lean
from ...auditing.gradients import FAR
from ...kernels.tolerance import Pooled, budget, unit
from ...memory.host_heap import trim
from ...sharding import whole
from ..report.environment import memory
from ..trainer.engine import EngineMixin

LEFT_OUT = 0.01
"""The share of the weights whose change is not compared."""

ALL = "all"


@dataclass(frozen=True)
class Deviations:
    """How far one way is from the reference; each relative to the reference's size.

    Attributes:
        losses: of each step.
        gradients: of the first step, by the kind of weight, and of ``ALL``.
        change: of the weights, from the first to the last step.
        problems: why some of it could not be compared; each a clause.
        drift: the bias of the gradients, by kind and direction.
        draws: so many steps with the initial weights are counted as the first one.
    """

    losses: tuple[float, ...] = ()
    gradients: dict[str, float] = field(default_factory=dict)
    change: float = math.nan
    problems: tuple[str, ...] = ()
    drift: tuple[Drift, ...] = ()
    draws: int = 1

    @property
    def loss(self) -> float:
        """The largest of all steps; NaN if there is none, or one of them is NaN."""
        if not self.losses or any(math.isnan(d) for d in self.losses):
            return math.nan
        return max(self.losses)

    @property
    def gradient(self) -> float:
        """That of all trained weights together."""
        return self.gradients.get(ALL, math.nan)

    @property
    def bias(self) -> float:
        """How much too large all gradients are on average; NaN if that is not known."""
        return next((d.bias for d in self.drift if (d.kind, d.direction) == ("", "size")), math.nan)


def drift_of(
    folder: Path, eager: Path, reference: Path, dtype: str, tokens: int
) -> tuple[Drift, ...]:
    """The bias of the gradients in one way's folder; their steps trained ``tokens``."""
    steps = []
    for path in _gradient_files(reference):
        with contextlib.ExitStack() as stack:
            own, plain, exact = (
                stack.enter_context(safe_open(place / path.name, "pt"))
                for place in (folder, eager, reference)
            )
            names = set(own.keys()) & set(plain.keys()) & set(exact.keys())
            step = {
                name: each
                for name in sorted(names)
                if (each := lean(*(of.get_tensor(name) for of in (own, plain, exact)))) is not None
            }
        steps.append(step)
    return tuple(drifts(steps, getattr(torch, dtype), tokens))


def deviations(
    figures: dict[str, Any], folder: Path, reference: dict[str, Any], reference_folder: Path
) -> Deviations:
    """Compare one way with the reference: figures of the workers, and folders of tensors."""
    problems = list(_odd_losses(figures["losses"], reference["losses"]))
    losses = [
        _relative(abs(loss - exact), abs(exact))
        for loss, exact in zip(figures["losses"], reference["losses"], strict=False)
    ]
    gradients, missing = _gradients(folder, reference_folder)
    problems += missing
    change = _change(folder / CHANGES, reference_folder / CHANGES)
    return Deviations(tuple(losses), gradients, change, tuple(problems))


def over_draws(
    first: Deviations,
    figures: dict[str, Any],
    folder: Path,
    reference: dict[str, Any],
    reference_folder: Path,
) -> Deviations:
    """``first``, with what a single step had decided replaced by that of all steps in the folders.

    The losses are taken together as gradients are, as all are of the same weights.
    """
    problems = list(_odd_losses(figures["losses"], reference["losses"]))
    loss = Pooled()
    for own, exact in zip(figures["losses"], reference["losses"], strict=False):
        loss.add(exact**2, (own - exact) ** 2)
    gradients, missing = _gradients(folder, reference_folder)
    return replace(
        first, losses=(loss.rms, *first.losses[1:]), gradients=gradients,
        problems=(*problems, *missing), draws=len(figures["losses"]),
    )  # fmt: skip


def _odd_losses(losses: Sequence[float], exact: Sequence[float]) -> Iterator[str]:
    if len(losses) != len(exact):
        yield f"it has made {len(losses)} steps and the reference {len(exact)}"
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            yield f"the loss of step {step} is {loss}"
            return


def _relative(distance: float, size: float) -> float:
    return distance / size if size else distance


def _gradient_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(GRADIENTS.format("*")))


def _gradients(folder: Path, reference: Path) -> tuple[dict[str, float], list[str]]:
    pooled: dict[str, Pooled] = defaultdict(Pooled)
    problems: dict[str, None] = {}  # each once
    for path in _gradient_files(reference):
        with safe_open(folder / path.name, "pt") as tensors, safe_open(path, "pt") as exact:
            names, expected = set(tensors.keys()), list(exact.keys())
            for some, words in (
                (set(expected) - names, "no gradient for"),
                (names - set(expected), "a gradient, which the reference has not, for"),
            ):
                if some:
                    problems[f"it has {words} {_first(sorted(some))}"] = None
            for name in expected:
                if name not in names:
                    continue
                truth = exact.get_tensor(name).double()
                difference = tensors.get_tensor(name).double() - truth
                squares = float(truth.square().sum()), float(difference.square().sum())
                for kind in (kind_of(name), ALL):
                    pooled[kind].add(*squares)
    return {kind: each.rms for kind, each in pooled.items()}, list(problems)


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _change(path: Path, reference: Path) -> float:
    with safe_open(path, "pt") as tensors, safe_open(reference, "pt") as exact:
        names = sorted(set(exact.keys()) & set(tensors.keys()))
        pairs = [(tensors.get_tensor(name), exact.get_tensor(name)) for name in names]
    if not pairs:
        return math.nan
    distance = torch.cat([(a.double() - b.double()).abs().reshape(-1) for a, b in pairs])
    size = sum(float(b.double().square().sum()) for _, b in pairs) ** 0.5
    return _relative(float(_nearest(distance).square().sum()) ** 0.5, size)


def _nearest(distance: Tensor) -> Tensor:
    """``distance`` without its largest values; with them, if one is not finite."""
    if not bool(torch.isfinite(distance).all()):
        return distance
    count = max(1, round(distance.numel() * (1 - LEFT_OUT)))
    return distance.sort().values[:count]


@dataclass(frozen=True)
class Allowed:
    """How far a way may be from the reference; ``losses`` by step, ``gradients`` as there."""

    losses: tuple[float, ...]
    gradients: dict[str, float]
    change: float

    @classmethod
    def of(cls, eager: Deviations, dtype: str, tokens: int) -> Allowed:
        """The limits by the rule above, from the deviations of eager mode.

        ``dtype`` is that of the recipe's computation; about ``tokens`` are trained in a step.
        """
        slack = unit(getattr(torch, dtype))
        of_loss = slack + unit(torch.float32) * math.log2(max(2, tokens)) / 2
        growth = eager.change / eager.gradient if eager.gradient else 1.0
        growth = growth if growth > 1 or math.isnan(growth) else 1.0
        losses = [
            budget(eager.loss, of_loss * (growth if step else 1.0))
            for step in range(len(eager.losses))
        ]
        gradients = {kind: budget(d, slack) for kind, d in eager.gradients.items()}
        return cls(tuple(losses), gradients, budget(eager.change, slack))

    @property
    def loss(self) -> float:
        """That of the last step, which is the largest."""
        return self.losses[-1] if self.losses else math.nan

    @property
    def gradient(self) -> float:
        """That of all trained weights together."""
        return self.gradients.get(ALL, math.nan)


def may_be_luck(deviations: Deviations, limits: Allowed) -> bool:
    """Whether what exceeds the limits is of the first step alone, and not far beyond them."""
    if deviations.problems:
        return False
    near = all(
        d <= FAR * limits.gradients.get(kind, math.nan) for kind, d in deviations.gradients.items()
    )
    near = near and deviations.losses[0] <= FAR * limits.losses[0]
    rest = replace(
        deviations, gradients=dict.fromkeys(deviations.gradients, 0.0),
        losses=(0.0, *deviations.losses[1:]), drift=(),
    )  # fmt: skip
    return near and not exceeded(rest, limits)


def exceeded(deviations: Deviations, limits: Allowed) -> list[str]:
    """The clauses about what is further from the reference than it may be; none: the way passes.

    A deviation that is NaN exceeds every limit, and a limit that is NaN is exceeded by everything.
    """
    clauses = list(deviations.problems)
    draws = deviations.draws
    first = "the first step" if draws == 1 else f"{draws} steps with the initial weights"
    kinds = {
        kind: d
        for kind, d in deviations.gradients.items()
        if not d <= limits.gradients.get(kind, math.nan)
    }
    if not deviations.gradients:
        clauses.append("it has no gradients")
    elif kinds:
        worst = sorted((kind for kind in kinds if kind != ALL), key=lambda k: -_order(kinds[k]))
        shown = ", ".join(
            f"{kind} (off by {kinds[kind]:.1e}, allowed {limits.gradients.get(kind, math.nan):.1e})"
            for kind in (worst or [ALL])[:3]
        )
        more = f" and {len(worst) - 3} more kinds of weights" if len(worst) > 3 else ""
        clauses.append(f"the gradients of {first} differ in {shown}{more}")
    drifting = sorted(
        (drift for drift in deviations.drift if drift.exceeded),
        key=lambda drift: -abs(drift.bias - drift.eager) / drift.allowed,
    )
    clauses += [drift.text() for drift in drifting[:1]]
    for step, (d, limit) in enumerate(zip(deviations.losses, limits.losses, strict=False), start=1):
        if not d <= limit and not _is_reported(step, deviations.problems):
            clauses.append(f"the loss of step {step} is off by {d:.1e}, and {limit:.1e} is allowed")
            break
    if not deviations.change <= limits.change:
        clauses.append(
            f"the weights' change is off by {deviations.change:.1e}, and {limits.change:.1e} "
            "is allowed"
        )
    return clauses


def _order(deviation: float) -> float:
    return math.inf if math.isnan(deviation) else deviation


def _is_reported(step: int, problems: Sequence[str]) -> bool:
    return any(f"the loss of step {step} is" in problem for problem in problems)


# --- a trainer that records what is compared -----------------------------------------------------


GRADIENTS, CHANGES = "gradients-{}.safetensors", "changes.safetensors"
_START = "start.safetensors"

MOST = 2**26
"""Up to this number of trained weights all are compared; of more, this many, evenly chosen."""


def compared(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters of a model, by name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def stride_of(model: nn.Module, draws: int = 1) -> int:
    """One in so many trained weights is compared; an odd number, so that columns take turns."""
    number = draws * sum(p.numel() for _, p in compared(model))
    return 1 if number <= MOST else -(-number // MOST) | 1


def chosen_elements(tensor: Tensor, stride: int) -> Tensor:
    """A copy of every ``stride``-th element, in CPU memory; of shards, a collective."""
    return whole(tensor).detach().reshape(-1)[::stride].to("cpu", copy=True)


class ProofTrainer(EngineMixin, Trainer):
    """Records the loss and gradient norm of each step, and the first gradients before clipping.

    Set ``record`` before ``train``.
    """

    record: Record

    def create_optimizer(self, model: Any = None) -> Any:
        """The recipe's, or one that changes nothing."""
        if self.record.draws > 1:
            trained: Any = model or self.model
            self.optimizer = torch.optim.SGD([p for _, p in compared(trained)], lr=0.0)
        return super().create_optimizer(model)

    def on_step_begin(self) -> None:
        """Begin the sum of the step's losses."""
        super().on_step_begin()
        self.record.losses.append(0.0)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; returns the batch's share of the step's loss."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.record.losses[-1] += float(loss)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        self._keep_gradients()
        clip: Any = super()._clip_grad_norm
        return clip(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            self._keep_gradients()
        norm = super()._get_grad_norm(model, grad_norm)
        self.record.norms.append(float(norm))
        return norm

    def _keep_gradients(self) -> None:
        step = self.state.global_step
        if step < self.record.draws:
            scaler = self.accelerator.scaler
            self.record.keep_gradients(step, 1.0 if scaler is None else scaler.get_scale())

    def on_step_end(self) -> None:
        """Average the loss over all processes, and report the step."""
        super().on_step_end()
        losses, world = self.record.losses, self.world
        losses[-1] = world.sums([losses[-1]])[0] / world.batch_ranks
        if world.main:
            seconds = self.context.meter.seconds[-1]
            print(
                f"step {len(losses)} of {self.args.max_steps}: loss {losses[-1]:.4f}, "
                f"{seconds:.1f} s",
                flush=True,
            )


class Record:
    """The recorded losses and norms of one way; rank 0 (``main``) writes tensors to ``folder``.

    The model has all adapters, and is not yet optimized or wrapped.

    Attributes:
        losses: per trained token, of each step.
        norms: of each step's gradients, before they are clipped.
        draws: the gradients of so many steps are kept; if it is more than one, the weights stay.
        stride: one in so many trained weights is compared.
    """

    def __init__(self, model: nn.Module, folder: Path, main: bool, draws: int = 1) -> None:
        self.model, self.folder, self.main, self.draws = model, folder, main, draws
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.stride = stride_of(model, draws)
        self._write(_START, {name: p.data for name, p in compared(model)})

    def keep_gradients(self, step: int, scale: float) -> None:
        """Write the gradients of ``step``, over the loss's ``scale``; a collective if sharded."""
        gradients = {name: p.grad for name, p in compared(self.model) if p.grad is not None}
        self._write(GRADIENTS.format(step), gradients, scale)

    def keep_changes(self) -> None:
        """Write the difference of the weights from their initial values."""
        now = {name: chosen_elements(p.data, self.stride) for name, p in compared(self.model)}
        if self.main:
            start = load_file(self.folder / _START)
            # in fp64: the difference of two near numbers
            changes = {name: (w.double() - start[name].double()) for name, w in now.items()}
            save_file(changes, self.folder / CHANGES)
            (self.folder / _START).unlink()

    def _write(self, name: str, tensors: dict[str, Tensor], scale: float = 1.0) -> None:
        elements = {key: chosen_elements(t, self.stride) for key, t in tensors.items()}
        if scale != 1.0:
            elements = {key: t.float() / scale for key, t in elements.items()}
        if self.main:
            save_file(elements, self.folder / name)


class PeakMemory:
    """The largest memory in use since this was made.

    Loading has peaks too (a GGUF file is unpacked), so the system's high-water mark is reset. Where
    that cannot be done, the mark is the whole process's.
    """

    def __init__(self) -> None:
        gc.collect()
        trim()
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float]:
        """In MiB: ``rss_mb``, and ``cuda_mb`` on a GPU."""
        return memory()
