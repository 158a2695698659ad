"""The micro-batches of one optimizer step as they really came, and how much a token of each weighs.

The gradient of a step should be that of one large batch: the sum of the cross entropies of all its
trained tokens, of all processes, over their number. So each micro-batch's part of it should be the
gradient of its own sum times the same factor. That factor is measured: the part is noted as it
arrives at some of the trained tensors, and the micro-batch is run once more with the random numbers
that it had. Where gradients are sharded, the factor is that of the losses.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..memory.random_state import RandomState
from ..sharding import has_peers, has_shards, in_zero3, reshard
from .by_hand import token_losses
from .findings import AuditFinding
from .movement import sampled
from .state import unchanged

Average = Literal["tokens", "batches"]

IGNORED = -100
"""The label of a token that is not trained."""

_PROBES = 16
"""Trained tensors whose gradients are noted: the last ones, and as many in the middle."""

_NOTED = 16384
"""Elements of each that are noted."""

_TOLERANCE = 0.1
"""A weight may be off by that: a wrong one is off by the number of batches or of processes."""

_ALIKE = 0.98
"""The least cosine at which a noted gradient is that of the micro-batch's own loss."""

_SCALER = 1024
"""From this on, a power of two is what a gradient scaler multiplies losses by."""


@dataclass
class MicroBatch:
    """One call of the model with gradients, and what came back through it.

    Attributes:
        arguments: of the model's forward, by name; dropped of batches that nobody will run again.
        tokens: how many of them are trained.
        value: the loss that the model returned, or the sum of the tokens' losses.
        weights: what flowed back into that value, by each backward pass.
        gradients: what arrived at the probes.
    """

    arguments: dict[str, Any] | None
    tokens: int
    random: RandomState
    python_random: Any
    autocast: tuple[str, torch.dtype] | None
    value: Tensor | None = None
    summed: bool = False
    weights: list[Tensor] = field(default_factory=list)
    uneven: bool = False
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def replayed(self) -> dict[str, Any]:
        """The arguments, with which a model that divides by a number of tokens has its own."""
        arguments = dict(self.arguments or {})
        number = arguments.get("num_items_in_batch")
        if isinstance(number, Tensor):
            arguments["num_items_in_batch"] = torch.full_like(number, max(self.tokens, 1))
        elif number is not None:
            arguments["num_items_in_batch"] = type(number)(max(self.tokens, 1))
        return arguments


class MicroBatches:
    """Watches the calls of ``model`` from now to ``close``, by hooks that change nothing.

    Args:
        model: what the loop calls; DDP and compiled modules are looked through.
        average: whether a step is the mean over its tokens, or over its batches.
        objective: why the loss is not meant to be the cross entropy of the labels; empty: it is.
        loss_of: computes the mean loss of a batch from its arguments, where the loop does so
            outside of the model; it then calls ``begin`` and ``returned``, and no hooks do.
    """

    def __init__(
        self,
        model: nn.Module,
        average: Average = "tokens",
        objective: str = "",
        loss_of: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        self.model, self.average, self.objective = model, average, objective
        self.loss_of = loss_of
        self.batches: list[MicroBatch] = []
        self.drew_random: bool | None = None
        self.expected_loss: float | None = None
        """The loss of the step by hand, once ``findings`` has run; None: it is not known."""
        self.is_assumed = False
        """Whether ``findings`` has taken the model's word for what its loss is divided by."""
        self._cleared = self.left_over = False
        self._arrived: set[int] = set()
        self._stepped = False
        self.paused = False
        """Whether calls of the model and gradients are an audit's own."""
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._sharded = has_shards(model)
        config = getattr(model, "config", None)
        self._shifts = not getattr(config, "is_encoder_decoder", False)
        trained = [p for p in model.parameters() if p.requires_grad]
        middle = max(0, len(trained) // 2 - _PROBES // 2)
        last = trained[-_PROBES:]
        seen = set(map(id, last))
        probes = last + [p for p in trained[middle:][:_PROBES] if id(p) not in seen]
        self._probes = [] if self._sharded else probes
        self._handles: list[Any] = []
        if loss_of is None:
            self._handles = [
                model.register_forward_pre_hook(self._before, with_kwargs=True),
                model.register_forward_hook(self._after, with_kwargs=True),
            ]
        self._calls = len(self._handles)
        self._handles += [p.register_hook(self._arrival(i, p)) for i, p in enumerate(self._probes)]

    def stepped(self) -> None:
        """The optimizer's step is made; from now, only what is left of its gradients matters."""
        self._stepped = True
        self.batches.clear()
        for handle in self._handles[: self._calls]:
            handle.remove()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --- hooks -----------------------------------------------------------------------------------

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(kwargs)
        if args:
            with contextlib.suppress(TypeError):  # the forward itself will say so
                arguments |= inspect.signature(model.forward).bind_partial(*args).arguments
        self.begin(arguments)

    def begin(self, arguments: dict[str, Any]) -> None:
        """A micro-batch is about to be run; ``arguments`` with its labels."""
        if self.paused or not torch.is_grad_enabled():
            return  # a reference, a validation or a generation
        kind = self._device.type
        on = torch.is_autocast_enabled(kind)
        self.batches.append(
            MicroBatch(
                arguments,
                _trained_tokens(arguments, self._shifts),
                RandomState.now(self._device),
                random.getstate(),
                (kind, torch.get_autocast_dtype(kind)) if on else None,
            )
        )
        self._forget()

    def _forget(self) -> None:
        """Keep the arguments of the batches that may be run again: of the least and most tokens."""
        kept = set(map(id, (self.batches[0], *self._extremes())))
        for batch in self.batches:
            if id(batch) not in kept:
                batch.arguments = None
                batch.gradients.clear()

    def _extremes(self) -> list[MicroBatch]:
        """Two batches, whose weights differ the most if means are averaged; or the only one."""
        ordered = sorted(self.batches, key=lambda b: b.tokens)
        return [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered

    def _after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self.returned(output)

    def returned(self, output: Any) -> None:
        """What the model returned for the micro-batch that was begun last, or its loss."""
        if self.paused or not torch.is_grad_enabled() or not self.batches:
            return
        batch = self.batches[-1]
        if self.drew_random is None:
            now = RandomState.now(self._device)
            before = batch.random.gpu
            gpu = now.gpu is not None and before is not None and not torch.equal(now.gpu, before)
            self.drew_random = gpu or not torch.equal(now.host, batch.random.host)
        value, batch.summed = _loss_in(output)
        if value is None or not value.requires_grad:
            return
        if batch.summed:
            mask = _get(output, "label_mask")

            def note(gradient: Tensor) -> None:
                chosen = -(gradient if mask is None else gradient[mask]).detach().float()
                if chosen.numel():
                    batch.weights.append(chosen.mean())
                    batch.uneven |= bool((chosen - chosen[0]).abs().max() > 1e-3 * chosen[0].abs())

            value.register_hook(note)
            batch.value = -value.detach().float().sum()
        else:
            value.register_hook(lambda gradient: batch.weights.append(gradient.detach().float()))
            batch.value = value.detach().float()

    def _arrival(self, index: int, parameter: Tensor) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            if self.paused:
                return
            there = parameter.grad is not None and bool(parameter.grad.any())
            if self._stepped:
                self.left_over |= there and index in self._arrived
                self._arrived.discard(index)  # what arrives later is of the same step
                return
            if not self.batches:
                return
            batch = self.batches[-1]
            if index not in batch.gradients:
                self._cleared |= index in self._arrived and not there
            part = sampled(gradient, _NOTED)
            if part is not None:
                earlier = batch.gradients.get(index)
                batch.gradients[index] = part if earlier is None else earlier + part
                if part.any():
                    self._arrived.add(index)

        return note

    # --- judging ---------------------------------------------------------------------------------

    def findings(self, inner: nn.Module) -> list[AuditFinding]:
        """The answers to ``accumulation-scale`` and ``loss-scale``, before the optimizer's step.

        Runs up to two micro-batches once more, by ``inner``, the model without its wrappers; the
        only one of a process is not (``is_assumed``). With several processes, a collective: all of
        them must call this at the same step.
        """
        why = self._why_not()
        tokens = sum(batch.tokens for batch in self.batches)
        if has_peers():
            why, tokens = _of_all_processes(why, tokens, len(self.batches), self._device)
        if self._cleared:
            return [
                AuditFinding(
                    "accumulation-scale", "fail",
                    f"gradients were cleared between the {len(self.batches)} batches of a step: "
                    "only the last one counts",
                    advice="call optimizer.zero_grad() after optimizer.step(), not for each batch",
                ),
                AuditFinding("loss-scale", "skipped", "the gradients of a step are not complete"),
            ]  # fmt: skip
        if why:
            return [AuditFinding(name, "skipped", why) for name in _NAMES]
        chosen = self._extremes()
        sums, weights = [], []
        failure = ""
        self.is_assumed = len(self.batches) == 1 and not has_peers() and not self._sharded
        for batch in chosen:
            total = weight = math.nan
            try:
                total, weight = (
                    self._assume(batch) if self.is_assumed else self._measure(batch, inner)
                )
            except Exception as error:  # such as too little memory: the run must go on
                failure = f"a batch could not be run again: {type(error).__name__}: {error}"
            sums.append(total)
            weights.append(weight)
        processes = dist.get_world_size() if has_peers() else 1
        step = StepShape(len(self.batches), tokens, processes, self.average)
        loss = self._loss_of_step(chosen, sums, step)
        if failure:
            return [AuditFinding(name, "skipped", failure) for name in _NAMES]
        found = judge([(b.tokens, w) for b, w in zip(chosen, weights, strict=True)], step)
        # what is wrong in the gradients is wrong in the logged loss, too
        right = step.average == "tokens" and all(f.verdict == "pass" for f in found)
        self.expected_loss = loss if right else None
        return found

    def _why_not(self) -> str:
        """Why the weights of tokens cannot be measured; empty: they can."""
        batches = self.batches
        if self.objective:
            return self.objective
        if not batches:
            return "the model was not called in this step, or parts of it were called instead"
        if any(not batch.tokens and not _has_labels(batch) for batch in batches):
            return "the model is not given labels, one for each token"
        if any(batch.value is None for batch in batches):
            return "the model returns no loss: it is computed outside of it"
        if not all(batch.weights for batch in batches):
            return "the loss that is trained is not the one that the model returns"
        if any(len(batch.weights) > 1 for batch in batches):
            return "a batch has several backward passes"
        if any(batch.uneven for batch in batches):
            return "the objective weighs tokens differently, so it is not plain cross entropy"
        if not any(batch.tokens for batch in batches):
            return "no token of this step is trained"
        if any(map(in_zero3, self.model.parameters())):
            return "ZeRO-3 shards the model"
        return ""

    def _assume(self, batch: MicroBatch) -> tuple[float, float]:
        """As ``_measure``, if the loss is divided by what the model is given, or by the tokens.

        An audit of a part of the batch tells whether it does.
        """
        weight, value = float(batch.weights[0]), batch.value
        assert value is not None
        if batch.summed:
            return float(value), weight
        number = (batch.arguments or {}).get("num_items_in_batch")
        divisor = float(number) if number is not None else batch.tokens
        return float(value) * divisor, weight / divisor

    def _measure(self, batch: MicroBatch, inner: nn.Module) -> tuple[float, float]:
        """Run a batch again: the sum of its tokens' losses, and the weight of a token's loss."""
        if not batch.tokens and not self._sharded:  # which needs all processes
            return 0.0, math.nan
        probes = [i for i in batch.gradients if self._probes[i].requires_grad]
        # those at the end are reached by a short backward pass
        probes = [i for i in probes if i < _PROBES and batch.gradients[i].any()] or probes
        weight = float(batch.weights[0])
        with self._as_before(batch, inner), torch.set_grad_enabled(bool(probes)):
            run = self.loss_of or (lambda arguments: inner(**arguments))
            arguments = batch.replayed()
            output = run(arguments)
            value, summed = _loss_in(output)
            if value is None:
                return math.nan, math.nan
            loss = -value.sum() if summed else value * batch.tokens
            by_hand = self._by_hand(output, arguments)
            loss = loss if by_hand is None else by_hand
            again = _gradients(loss, [self._probes[i] for i in probes])
        total = float(loss.detach())
        if _get(output, "aux_loss") is not None:  # a router's, which is none of the tokens'
            weight = math.nan
        elif not batch.summed:  # of a loss that the model has divided by a number
            weight *= float(batch.value) / total if batch.value is not None and total else math.nan
        dot = own = noted = 0.0
        for i, gradient in zip(probes, again, strict=False):
            part = None if gradient is None else sampled(gradient, _NOTED)
            if part is not None:
                r, d = part.double(), batch.gradients[i].double()
                dot, own, noted = (
                    dot + float(r.mul(d).sum()), own + float(r.square().sum()),
                    noted + float(d.square().sum()),
                )  # fmt: skip
        if own and noted and abs(dot) / math.sqrt(own * noted) > _ALIKE:
            weight = dot / own
        return total, weight

    def _by_hand(self, output: Any, arguments: dict[str, Any]) -> Tensor | None:
        """The sum of the tokens' cross entropies; None where no logits were made for the loss."""
        logits = _get(output, "logits")
        if type(logits) is not Tensor or logits.dim() != 3 or not self._shifts:
            return None
        found = token_losses(logits.float(), arguments, torch.float32)
        return None if found is None else found[0].sum()

    @contextlib.contextmanager
    def _as_before(self, batch: MicroBatch, inner: nn.Module) -> Iterator[None]:
        """The random numbers and the autocast of a batch; afterwards all is as it was."""
        cast: AbstractContextManager[Any] = contextlib.nullcontext()
        if batch.autocast is not None:
            cast = torch.autocast(batch.autocast[0], batch.autocast[1])
        with unchanged(inner), cast:
            batch.random.restore()
            random.setstate(batch.python_random)
            self.paused = True
            try:
                yield
            finally:
                self.paused = False
                if self._sharded:
                    reshard(inner)

    def _loss_of_step(
        self, chosen: list[MicroBatch], sums: list[float], step: StepShape
    ) -> float | None:
        """The mean loss over the trained tokens of the step, of all processes; None: unknown."""
        total: float | None = 0.0
        if all(batch.summed for batch in self.batches):
            total = sum(float(b.value) for b in self.batches if b.value is not None)
        else:
            known = [(float(b.value), b.tokens, s) for b, s in zip(chosen, sums, strict=True)
                     if b.value is not None and b.tokens and float(b.value)]  # fmt: skip
            factor = _common_ratio([(value, s) for value, _, s in known])
            each = _common_ratio([(value * n, s) for value, n, s in known])
            if factor is not None:
                total = factor * sum(float(b.value) for b in self.batches if b.value is not None)
            elif each is not None:
                total = each * sum(
                    float(b.value) * b.tokens for b in self.batches if b.value is not None
                )
            else:
                total = None
        if has_peers():
            both = torch.tensor([math.nan if total is None else total], dtype=torch.float64,
                                device=self._device)  # fmt: skip
            dist.all_reduce(both)
            total = None if math.isnan(float(both)) else float(both)
        return None if total is None else total / step.tokens


def _gradients(loss: Tensor, probes: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of ``probes``; none where checkpoints of the model do not let them be asked."""
    if not probes:
        return ()
    try:
        return torch.autograd.grad(loss, probes, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        return ()


def _common_ratio(pairs: list[tuple[float, float]]) -> float | None:
    ratios = [total / value for value, total in pairs]
    if not ratios or max(ratios) - min(ratios) > 1e-2 * abs(ratios[0]):
        return None
    return ratios[0]


def _get(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, dict) else getattr(output, name, None)


def _loss_in(output: Any) -> tuple[Tensor | None, bool]:
    """The loss of an output, or, as True says, log-probabilities of tokens (TRL's fused head)."""
    if isinstance(output, Tensor):
        return output, False
    rows = _get(output, "log_probs")
    if isinstance(rows, Tensor):
        return rows, True
    loss = _get(output, "loss")
    if loss is None and isinstance(output, tuple) and output:
        loss = output[0]
    scalar = isinstance(loss, Tensor) and loss.numel() == 1
    return (loss if scalar else None), False


def _has_labels(batch: MicroBatch) -> bool:
    return isinstance((batch.arguments or {}).get("labels"), Tensor) or batch.arguments is None


def _trained_tokens(arguments: dict[str, Any], shifts: bool) -> int:
    """Tokens whose loss is trained: with a label, and if the model ``shifts`` it, one before it."""
    shifted, labels = arguments.get("shift_labels"), arguments.get("labels")
    if isinstance(shifted, Tensor):
        return int((shifted != IGNORED).sum())
    inputs = arguments.get("input_ids", arguments.get("inputs_embeds"))
    if not isinstance(labels, Tensor) or labels.ndim < 2:
        return 0
    if not shifts:
        return int((labels != IGNORED).sum())
    if isinstance(inputs, Tensor) and labels.shape[:2] != inputs.shape[:2]:
        return 0
    return int((labels[..., 1:] != IGNORED).sum())


def _of_all_processes(why: str, tokens: int, batches: int, device: torch.device) -> tuple[str, int]:
    """Agree on whether to measure, and count the tokens of all; a collective."""
    mine = torch.tensor([bool(why), tokens, batches, batches**2], device=device)
    dist.all_reduce(mine)
    stopped, total, number, squares = mine.tolist()
    processes = dist.get_world_size()
    if stopped:
        return why or "another process cannot tell", total
    if squares * processes != number**2:
        return "the processes have different numbers of batches", total
    return "", total


# --- the verdict ---------------------------------------------------------------------------------

_NAMES = "accumulation-scale", "loss-scale"


@dataclass(frozen=True)
class StepShape:
    """What a step consists of: batches of each process, trained tokens of all, and processes."""

    batches: int
    tokens: int
    processes: int = 1
    average: Average = "tokens"


def judge(measured: list[tuple[int, float]], step: StepShape) -> list[AuditFinding]:
    """The answers for some micro-batches, each with its tokens and the weight of one of them.

    The gradients of several processes are averaged, so each may be their number times larger.
    """
    known = [(n, w) for n, w in measured if n and math.isfinite(w)]
    if not known:
        return [AuditFinding(name, "skipped", "no weight could be measured") for name in _NAMES]
    # 1 for each batch, if the step is the mean over its tokens, or over its batches
    by_token = [w * step.tokens / step.processes for _, w in known]
    by_batch = [w * n * step.batches for n, w in known]
    wanted, other = (by_token, by_batch) if step.average == "tokens" else (by_batch, by_token)
    figures = {
        "batches": step.batches, "tokens": step.tokens, "processes": step.processes,
        "factors": [round(f, 4) for f in wanted],
    }  # fmt: skip
    if all(map(_is_one, wanted)):
        what = f"the mean over its {step.tokens} trained tokens"
        if step.average == "batches":
            what = f"the mean over its {step.batches * step.processes} batches"
        text = f"the gradient of a step is {what}"
        if step.batches == 1:
            text += "; a step has one batch"
        return [AuditFinding(name, "pass", text, figures=figures) for name in _NAMES]
    factor = wanted[0]
    if not math.isclose(min(wanted), max(wanted), rel_tol=_TOLERANCE):
        return _uneven(wanted, other, known, step, figures)
    if _is_scaler(factor, step):
        why = f"the loss is multiplied by {factor:.0f} while gradients are made, as by a scaler"
        return [AuditFinding(name, "skipped", why, figures=figures) for name in _NAMES]
    return _scaled(factor, step, figures)


def _scaled(factor: float, step: StepShape, figures: dict[str, Any]) -> list[AuditFinding]:
    text = f"the gradient of a step is {_times(factor)} that of one large batch"
    whose, advice = "loss-scale", ""
    if step.batches > 1 and _near(factor, step.batches):
        whose, text = "accumulation-scale", f"{text}: its {step.batches} batches are summed"
        advice = f"divide the loss of each batch by {step.batches}, or by the tokens of all of them"
    elif step.batches > 1 and _near(factor, 1 / step.batches):
        whose, text = "accumulation-scale", f"{text}: it is divided by {step.batches} twice"
        advice = "let either the loss or the trainer divide, not both"
    elif step.processes > 1 and _near(factor, 1 / step.processes):
        text += f": it is divided by the {step.processes} processes twice"
        advice = "multiply a loss over the tokens of all processes by their number"
    elif step.processes > 1 and _near(factor, step.processes):
        text += f": each of {step.processes} processes divides by its own tokens, and nobody by all"
    rest = next(name for name in _NAMES if name != whose)
    return [
        AuditFinding(whose, "fail", text, advice=advice, figures=figures),
        AuditFinding(rest, "skipped", f"see {whose}"),
    ]


def _uneven(
    wanted: list[float],
    other: list[float],
    known: list[tuple[int, float]],
    step: StepShape,
    figures: dict[str, Any],
) -> list[AuditFinding]:
    most, least = max(wanted), min(wanted)
    (few, _), (many, _) = min(known), max(known)
    text = f"a token weighs {most / least:.2f} times more in one batch of a step than in another"
    advice = ""
    if math.isclose(min(other), max(other), rel_tol=_TOLERANCE):
        how = "averaged" if _is_one(other[0]) else f"added up ({_times(other[0])} their mean)"
        if step.average == "tokens":
            text += f": the means of batches of {few} to {many} trained tokens are {how}"
            advice = "divide by the tokens of all batches (num_items_in_batch)"
        else:
            text = f"batches of {few} to {many} trained tokens are not weighed alike"
            advice = "average over the batches"
    return [
        AuditFinding("accumulation-scale", "fail", text, advice=advice, figures=figures),
        AuditFinding("loss-scale", "skipped", "see accumulation-scale"),
    ]


def judge_logged(logged: float, expected: float | None) -> AuditFinding | None:
    """A finding if what is logged as the loss of a step is not its loss by hand; else None."""
    if (
        expected is None
        or not math.isfinite(logged)
        or math.isclose(logged, expected, rel_tol=0.05, abs_tol=1e-3)
    ):
        return None
    factor = logged / expected if expected else math.inf
    return AuditFinding(
        "loss-scale", "fail",
        f"{logged:.4g} is logged as the loss of a step whose loss by hand is {expected:.4g}, "
        f"{_times(factor)} that", (), "the curve is wrong, the gradients are not: look at what "
        "sums up the logged losses", {"logged": logged, "by_hand": expected},
    )  # fmt: skip


def _is_one(factor: float) -> bool:
    return _near(factor, 1.0)


def _near(factor: float, other: float) -> bool:
    return math.isclose(factor, other, rel_tol=_TOLERANCE)


def _times(factor: float) -> str:
    return f"{factor:.3g} times"


def _is_scaler(factor: float, step: StepShape) -> bool:
    power = math.log2(factor) if factor > 0 else 0.0
    is_power = abs(power - round(power)) < 0.02
    return factor >= _SCALER and is_power and not _near(factor, step.batches)
