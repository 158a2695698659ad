"""Whole blocks against their original code: what is slower as we run it runs as it was.

A rewrite is proven right, and mostly it is faster. But a small block takes longer to launch than to
compute, and our calls cost the host more than eager mode's. So at the first training call of a
*bucket* (what the block is made of and what of it is trained, the dtype, casts, tokens up to a
power of two) both forms are called, forward and backward, with copies of the arguments, and timed.
The original code must be faster by ``TIMING.margin``: it keeps more for backward. It needs no
check: it defines what is right.

A race leaves nothing behind in the model: gradients go nowhere, buffers, numbers in modules and
random states are put back. And a race changes no later step: what it says is a choice as all others
(``kernels/choice.py``), kept for the machine, shared by ranks, resumed with a run.

Where memory was asked for, ours stays, whatever it takes: in checkpoints, under a plan that keeps
less than the fastest does, and where original blocks would keep more than ``SHARE`` of the free
memory. Not raced either are rows of several samples in blocks that are told where these begin,
blocks of sharded parameters, and the head with its loss, whose logits are not made. Norms and
projectors outside blocks are raced as blocks are.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map_only

from ..kernels import raced_op
from ..kernels.choice import (
    BUSY,
    Choice,
    Contender,
    Question,
    Timing,
    are_blocks_raced,
    choices,
    choose,
)
from ..kernels.saved_tensors import saved_by_hook
from ..memory.apply_plan import inside_checkpoint
from ..memory.budget import gigabytes
from ..memory.planner import Planner
from ..memory.random_state import BufferState
from ..rewrite.conditions import settings_around
from ..sharding import collectives_of, gathers, is_sharded
from .ranks.verdicts import environment, versions
from .sharing import structure
from .watch import Watch

OURS, EAGER = "ours", "eager"
"""The names of both forms among the candidates."""

TIMING = Timing(rounds=10, least=2, seconds=0.5, margin=0.05, with_host=True)

SHARE = 0.1
"""Of the free memory: so much may all blocks keep for backward if they run as they were."""


_PENDING = (
    "the first training step races each kind of block with the model's own code, and blocks that "
    "lose run as they were: explain the model again after it"
)


class Unraced(Exception):
    """Blocks that are not raced, and why."""


@dataclass(eq=False)
class BlockRaces:
    """The races of one session, and what they have said.

    ``about`` is what a choice depends on besides the block: rules, codegen, memory. Without a
    ``planner`` there are none.
    """

    planner: Planner | None = None
    about: tuple[Any, ...] = ()
    is_on: bool = field(default_factory=are_blocks_raced)
    # what was chosen for this session's blocks, by question
    choices: dict[str, Choice] = field(default_factory=dict)
    has_trained: bool = False  # whether a block was called with gradients where races are on
    # by the key of a bucket: why its calls run the original code; empty: they run ours
    _reasons: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _makes: weakref.WeakKeyDictionary[Watch, str] = field(default_factory=weakref.WeakKeyDictionary)
    _winners: set[str] = field(default_factory=set)
    _form: str | None = None  # which of both forms a race calls now

    def reason(
        self, module: nn.Module, is_block: bool, watch: Watch, args: tuple[Any, ...],
        kwargs: dict[str, Any], x: Tensor | None, sizes: tuple[int, int] | None,
        run: Callable[..., Any], failure: Callable[[nn.Module], str | None],
    ) -> str | None:  # fmt: skip
        """Why this call of a module, a block or one outside, runs the original code, or None.

        It is empty in a race, which calls ``run`` for either form. ``x`` is the first input, with
        ``sizes`` of batch and sequence; ``failure`` says of a module why it cannot be captured.
        """
        if self._form is not None:
            return "" if self._form == EAGER else None
        planner = self.planner
        if planner is None or not self._may_choose():
            return None
        self.has_trained |= torch.is_grad_enabled()
        if x is None or sizes is None or inside_checkpoint():
            return None
        make = self._makes.get(watch)
        if make is None:
            make = self._makes[watch] = _make(module)
        kind, tokens = x.device.type, 1 << max(0, prod(sizes) - 1).bit_length()
        key = (
            make, watch.trained(module), module.training, tokens, x.dtype, x.shape[-1],
            torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), x.device,
        )  # fmt: skip
        reason = self._reasons.get(key)
        # without gradients a block runs as it does with them
        if reason is None and torch.is_grad_enabled() and _may_race(module, args, kwargs, x):
            if is_block:
                planner.begin(module, prod(sizes))  # once: it costs as much as a fifth of a call
            as_later = is_block and _answers_for_others(module, planner.blocks)
            copies = _Copies(args, kwargs, x, as_later)
            race = _Race(self, planner, module, run, failure, copies)
            try:
                chosen = choose(race.question(key), _machine(x.device, module))
            finally:
                race.state.restore()
            self.choices[chosen.question] = chosen
            reason = self._reasons[key] = _as_reason(chosen, tokens)
        if not reason:
            self._winners.add(make)
        return reason or None

    def _may_choose(self) -> bool:
        planner = self.planner
        return self.is_on and planner is not None and planner.budget.mode in ("speed", "auto")

    def pending(self) -> str:
        """What a first training step may still change; empty where nothing will be raced."""
        return _PENDING if self._may_choose() and not self.has_trained else ""

    @property
    def is_racing(self) -> bool:
        """Whether the calls at hand are a race's, which begin no step."""
        return self._form is not None

    def has_lost(self, watch: Watch) -> bool:
        """Whether no call of a block, of which one runs as it was, has run its graph."""
        return self._form is None and self._makes.get(watch) not in self._winners

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Run ours, whatever was chosen, and race nothing: the calls are not the user's."""
        before, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = before

    @contextlib.contextmanager
    def calling(self, form: str) -> Iterator[None]:
        """While a race calls one of both forms."""
        self._form = form
        try:
            yield
        finally:
            self._form = None


@dataclass(eq=False)
class _Race:
    """One block, which is called with copies of the arguments that it was called with."""

    races: BlockRaces
    planner: Planner
    module: nn.Module
    run: Callable[..., Any]
    failure: Callable[[nn.Module], str | None]
    copies: _Copies

    def __post_init__(self) -> None:
        self.state = _State(self.module)
        # the race itself is made without the casts of the call at hand
        devices = dict.fromkeys(("cpu", self.copies.first.device.type))
        self._casts = [
            (d, torch.get_autocast_dtype(d), True, torch.is_autocast_cache_enabled())
            for d in devices
            if torch.is_autocast_enabled(d)
        ]

    def question(self, key: tuple[Any, ...]) -> Question:
        """Which of both forms is faster in the bucket of ``key``?"""
        make, trained, training, tokens, dtype, features, casts, to, device = key
        blocks = len(self.planner.blocks)
        about = make, trained, training, settings_around(), blocks, self.races.about
        digest = hashlib.sha256(repr(about).encode()).hexdigest()[:8]
        precision = f"{dtype} under autocast to {to}" if casts else str(dtype)
        name = (
            f"{type(self.module).__name__} of {features:,} for {tokens:,} tokens in "
            f"{precision.replace('torch.', '')} (settings {digest})"
        )
        forms = [Contender(form, functools.partial(self.step, form)) for form in (OURS, EAGER)]
        return Question(name, tuple(forms), self._called, OURS, device, None, timing=TIMING)

    def step(self, form: str) -> list[Tensor]:
        """The gradients of one call in one of both forms."""
        with self.races.calling(form):
            with contextlib.ExitStack() as casts:
                for cast in self._casts:
                    casts.enter_context(torch.autocast(*cast))
                    # a step casts each weight once: no call is to find the casts of another one
                    torch.clear_autocast_cache()
                    casts.callback(torch.clear_autocast_cache)
                args, kwargs = self.copies.of_a_call()
                results = self.run(self.module, *args, **kwargs)
            outputs = [t for t in tree_leaves(results) if isinstance(t, Tensor) and t.requires_grad]
            wanted = [*self.copies.leaves(), *self.module.parameters()]
            with _unheard(self.module.parameters()):
                found = torch.autograd.grad(
                    outputs,
                    [t for t in wanted if t.requires_grad],
                    self.copies.gradients(outputs),
                    allow_unused=True,
                )
        return [g for g in found if g is not None]

    def _called(self, _: torch.Generator) -> tuple[Any, ...]:
        """Call both forms once: ours is captured and compiled, and the memory of both is known."""
        self._require_memory()
        if self.state.has_changed():  # not at the first call alone: each may need its own graph
            then = _State(self.module)
            self.step(EAGER)
            if then.has_changed():
                raise Unraced("it changes attributes of its modules in each call")
        self.step(OURS)
        if (why := self.failure(self.module)) is not None:
            raise Unraced(why)
        if not self.planner.is_fastest(self.module):
            raise Unraced("the plan for memory has it keep less than is fastest")
        return ()

    def _require_memory(self) -> None:
        """Raise if original blocks would keep too much of the memory that is free."""
        held = (*self.module.parameters(), *self.module.buffers(), *self.copies.tensors())
        own = {t.untyped_storage()._cdata for t in held}
        saved: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return saved_by_hook(t)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.step(EAGER)
        meter = self.planner.meter
        kept, capacity = sum(saved.values()) * len(self.planner.blocks), meter.capacity()
        if capacity is not None and kept > SHARE * (capacity - meter.used()):
            raise Unraced(
                f"the original blocks would keep {gigabytes(kept)} for backward, of "
                f"{gigabytes(capacity - meter.used())} that are free"
            )


class _Copies:
    """The arguments of a call, for calls that change nothing of them.

    ``as_later``: the first input ``x`` needs a gradient, as it does in all blocks but the first
    that is trained. That one answers for all, and costs eager code less.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, as_later: bool
    ) -> None:
        copied: dict[int, Tensor] = {}

        def copy(t: Tensor) -> Tensor:
            if id(t) not in copied:
                needed = t.requires_grad or (t is x and as_later and x.is_floating_point())
                copied[id(t)] = t.detach().clone().requires_grad_(needed)
            return copied[id(t)]

        self._given = tree_map_only(Tensor, copy, (args, kwargs))
        self.first = copied[id(x)]
        self._gradients: list[Tensor] = []

    def tensors(self) -> list[Tensor]:
        return [t for t in tree_leaves(self._given) if isinstance(t, Tensor)]

    def leaves(self) -> list[Tensor]:
        """Those that need a gradient, each once."""
        return list({id(t): t for t in self.tensors() if t.requires_grad}.values())

    def of_a_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that are no leaves, as within a model: the block may write to them."""
        made: dict[int, Tensor] = {}

        def copy(t: Tensor) -> Tensor:
            if t is not self.first and not t.requires_grad:
                return t
            return made.setdefault(id(t), t.clone())

        args, kwargs = tree_map_only(Tensor, copy, self._given)
        return args, kwargs

    def gradients(self, outputs: list[Tensor]) -> list[Tensor]:
        """Those that come in, in all calls the same."""
        if not self._gradients:
            self._gradients = [torch.randn_like(t) for t in outputs]
        return self._gradients


def _answers_for_others(module: nn.Module, blocks: Iterable[nn.Module]) -> bool:
    """Whether what is said of one block is said of others, too: alike, and as much trained."""

    def alike(block: nn.Module) -> list[tuple[str, torch.Size, bool]]:
        return [(n, p.shape, p.requires_grad) for n, p in block.named_parameters()]

    own = alike(module)
    return any(type(b) is type(module) and alike(b) == own for b in blocks if b is not module)


def _may_race(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> bool:
    """Whether a call can be made again on copies, and nobody sees it."""
    if torch._C._len_torch_dispatch_stack() or not raced_op.may_wait(x.device):
        return False
    plain = (Tensor, Parameter, type(None), bool, int, float, str)
    if any(type(v) not in plain for v in tree_leaves((args, kwargs))):
        return False
    parameters = list(module.parameters())
    if any(map(is_sharded, parameters)):
        return False
    if not x.requires_grad and not any(p.requires_grad for p in parameters):
        return False
    return not gathers(module) and collectives_of(module) is None


@contextlib.contextmanager
def _unheard(parameters: Iterable[Parameter]) -> Iterator[None]:
    """Keep gradients from the hooks of parameters: they are not of the caller's step."""
    # blocks without a race for their hooks would run ours in the step that an audit hears, and the
    # first step of a resumed run is such a step, which in the run itself was a later one
    held = [(hooks, dict(hooks)) for p in parameters if (hooks := p._backward_hooks)]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in held:
            hooks.update(kept)


class _State:
    """What calls of a block may change in it, and of Python's random numbers."""

    # PyTorch's random numbers are put back by the race
    def __init__(self, module: nn.Module) -> None:
        self._random, self._buffers = random.getstate(), BufferState(module)
        self._attributes = [
            (vars(m), {n: v for n, v in vars(m).items() if isinstance(v, _VALUES)})
            for m in module.modules()
        ]

    def has_changed(self) -> bool:
        """Whether a module has other values as attributes now."""
        return any(
            now.get(n) is not v for now, before in self._attributes for n, v in before.items()
        )

    def restore(self) -> None:
        """Put all of it back."""
        random.setstate(self._random)
        self._buffers.restore()
        for now, before in self._attributes:
            now.update(before)


_VALUES = (bool, int, float, str, tuple, Tensor, type(None))


def _make(module: nn.Module) -> str:
    """What a block is made of, in words that are the same in all processes."""
    parts = [
        (path, str(kind), [v for v in values if v[0] not in _PASSING])
        for path, kind, *values in structure(module)
    ]
    sizes = [(n, tuple(p.shape), str(p.dtype)) for n, p in module.named_parameters()]
    sizes += [(n, tuple(b.shape), str(b.dtype)) for n, b in module.named_buffers()]
    return hashlib.sha256(repr((parts, sizes)).encode()).hexdigest()


_PASSING = ("training", "_is_hf_initialized")
"""Attributes of modules that say nothing of what they are."""


def _machine(device: torch.device, module: nn.Module) -> str:
    """What a choice depends on besides the question; ours and the model's code among it."""
    code = versions({type(m) for m in module.modules()})
    return "\0".join((raced_op.machine(device), *environment(), str(code)))


def raced_ops(device: torch.device) -> list[Choice]:
    """What this process has chosen for ops on ``device``: whose calls asked is not known."""
    return choices(raced_op.machine(device))


def _as_reason(chosen: Choice, tokens: int) -> str:
    """Why calls run the original code; empty: they do not."""
    if chosen.candidate != EAGER or OURS in chosen.refused:
        return ""
    best = chosen.microseconds
    said = [f"{form} {best[form]:,.0f} us" for form in (EAGER, OURS) if form in best]
    said = ["in processor time", *said] if chosen.source == BUSY else said
    times = ", ".join([*said, "forward and backward"])
    return f"it is faster so: {times} for up to {tokens:,} tokens"
