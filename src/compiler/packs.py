"""What lets samples that share a row see each other, on the model at hand.

``leaks`` names it. ``ByRowsOnTrial`` finds modules that let samples see each other, and that do so
no more when they run over each of them apart, as rows of a batch: a shift of tokens, a recurrence
that is written out in a forward. Both look at what modules do with two packs that differ in their
first sample alone, and at no name and no code.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.opaque.segments import Unread
from ..memory.random_state import BufferState
from .bypass import is_container
from .regions import Region, input_embeddings
from .segments import ByRows, Slot, is_below

SHORT, LONG = (9, 7), (67, 9)
"""Tokens of the two samples of a pack that is tried: more than a convolution is wide, and more than
a chunk of a scan has."""


def leaks(model: Any, vocab_size: int, device: torch.device, sizes: tuple[int, int] = SHORT) -> str:
    """What lets a sample in a pack see another, by its name; empty where nothing does.

    Two packs differ only in their first sample; the logits of the second must be the same but for
    roundings (how many rows a product has decides how its sums are made, and experts get other
    rows), and the gradient of each sample's logits with respect to the embeddings of the other one
    must be zero: masked scores contribute exact zeros. What is named is the innermost module whose
    inputs agree and whose outputs do not. Where the model looks no token up in its table, the
    gradients cannot be tried.
    """
    batch, first = _two_packs(vocab_size, device, sizes), sizes[0]
    with _trying(model):
        if leak := _value_leak(model, batch, first)[0]:
            return leak
        one = {name: t[:1] for name, t in batch.items()}
        return "its backward pass" if _gradient_leaks(model, one, first) else ""


def leaks_between(model: Any, batch: dict[str, Tensor], alone: dict[str, Tensor]) -> str:
    """The same of two given packs, of two samples each, whose second one is ``alone``.

    They are as a model is called with, and may have features of images. The second sample must also
    have the logits that it has by itself, but for roundings. Gradients are not tried.
    """
    first = batch["input_ids"].shape[1] - alone["input_ids"].shape[1]
    with _trying(model):
        leak, packed = _value_leak(model, batch, first)
        if leak:
            return leak
        with torch.no_grad():
            same = _are_near(packed, model(**alone).logits[0])
    return "" if same else type(model).__name__


@torch.no_grad()
def _value_leak(model: Any, batch: dict[str, Tensor], first: int) -> tuple[str, Tensor]:
    """What lets the second sample see the first one, or ''; and the second one's logits."""
    mine, other = model(**batch).logits[:, first:]
    if torch.equal(mine, other):
        return "", mine
    length = batch["input_ids"].shape[1]
    modules = _leaking_modules(lambda: model(**batch), model, length, first)
    if modules:
        return _name(model, modules[0]), mine
    return "" if _are_near(mine, other) else type(model).__name__, mine


def _two_packs(vocab_size: int, device: torch.device, sizes: tuple[int, int]) -> dict[str, Tensor]:
    """Two packs of two samples each, of which the second is the same."""
    generator, first = torch.Generator().manual_seed(0), sizes[0]
    ids = torch.randint(vocab_size, (2, sum(sizes)), generator=generator)
    ids[1, first:] = ids[0, first:]
    ids[1, :first] = (ids[0, :first] + 1) % vocab_size
    positions = torch.cat([torch.arange(n) for n in sizes]).expand(2, -1)
    return {"input_ids": ids.to(device), "position_ids": positions.to(device)}


@contextmanager
def _trying(model: nn.Module) -> Iterator[None]:
    """As in training, but for dropout, which draws other numbers for each row; then as it was.

    Evaluation is another thing: layers merge adapters for it, scale their weights, or pack them in
    a way that has no gradients (4-bit ones on some CPUs).
    """
    flags, buffers = [(m, m.training) for m in model.modules()], BufferState(model)
    states = random.getstate(), np.random.get_state()
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(gpus):
        try:
            for m, _ in flags:  # not by ``train``, which may do more
                m.training = not _drops(m)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for m, flag in flags:
                m.training = flag
            buffers.restore()


def _drops(module: nn.Module) -> bool:
    """Whether a module has a rate of dropout, or a child that may tell it one."""
    modules = (module, *module.children())
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in modules):
        return True
    rates = (v for n, v in vars(module).items() if "drop" in n and isinstance(v, float))
    return any(rate > 0 for rate in rates)


def _name(model: nn.Module, module: nn.Module) -> str:
    path = next(path for path, m in model.named_modules() if m is module)
    return f"{path} ({type(module).__name__})"


def _gradient_leaks(model: Any, batch: dict[str, Tensor], length: int) -> bool:
    """Whether the logits of a sample have a gradient in the embeddings of the other one."""
    table = input_embeddings(model)
    if table is None:
        return False
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        first, second = slice(0, length), slice(length, None)
        grads = [_gradients(model, batch, table, own) for own in (second, first)]
    finally:
        for p in trained:
            p.requires_grad_(True)
    others = zip(grads, (first, second), strict=True)
    return any(bool((g[:, other] != 0).any()) for each, other in others for g in each)


def _gradients(model: Any, batch: dict[str, Tensor], table: Any, own: slice) -> list[Tensor]:
    """The gradients of one sample's logits with respect to what ``table`` returns at each call."""
    embedded = []

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = table.register_forward_hook(hook)
    try:
        with torch.enable_grad():
            logits = model(**batch).logits
    finally:
        handle.remove()
    if not logits.requires_grad:
        return []
    upstream = torch.linspace(-1, 1, logits.shape[-1], device=logits.device).to(logits.dtype)
    # by ``backward``: reentrant checkpoints do not go with ``autograd.grad``
    (logits[:, own] * upstream).sum().backward()
    # of whole rows: a model may look up single tokens, too
    rows = batch["input_ids"].shape
    return [t.grad for t in embedded if t.grad is not None and t.shape[:2] == rows]


# --- which modules ------------------------------------------------------------------------------


def _leaking_modules(
    call: Callable[[], Any], model: nn.Module, length: int, first: int
) -> list[nn.Module]:
    """The modules whose inputs agree in the second sample, and whose outputs differ, by their end.

    ``call`` calls the model with two packs. Outputs must differ by more than roundings.
    """
    modules: list[nn.Module] = []

    def second_samples(values: Any) -> Iterator[tuple[Tensor, Tensor]]:
        if type(values) is Unread:
            return
        if isinstance(values, dict):
            values = tuple(values.values())
        if isinstance(values, (tuple, list)):
            for value in values:
                yield from second_samples(value)
        elif isinstance(values, Tensor) and values.is_floating_point() and values.dim() > 1:
            time = next((d for d in range(1, values.dim()) if values.shape[d] == length), None)
            if time is not None and values.shape[0] == 2:
                rows = values.narrow(time, first, length - first)
                yield rows[0], rows[1]

    def differ(values: Any) -> bool:
        return not all(torch.equal(a, b) for a, b in second_samples(values))

    def agreeing(values: Any) -> Any:
        """A copy, as far as it is known how to make one, in which the second samples agree."""
        if type(values) in (tuple, list):
            return type(values)(map(agreeing, values))
        if not isinstance(values, Tensor):
            return values
        copy = values.clone()
        for a, b in second_samples(copy):
            b.copy_(a)
        return copy

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if differ((args, kwargs)) or not differ(output):
            return None
        if any(_differ_much(a, b) for a, b in second_samples(output)):
            modules.append(module)
        return agreeing(output)  # so that what comes after is looked at in the same call

    with _hooked(model, hook), torch.no_grad():
        call()
    return modules


@contextmanager
def _hooked(model: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """With a hook on all modules inside; blocks of an optimized model then run as they were."""
    handles: list[Any] = []
    try:
        handles += (
            m.register_forward_hook(hook, with_kwargs=True)
            for m in model.modules()
            if m is not model
        )
        yield
    finally:
        for handle in handles:
            handle.remove()


def _differ_much(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by more than the roundings of one module, in another order."""
    limit = max(64 * torch.finfo(torch.float32).eps, 4 * torch.finfo(a.dtype).eps)
    return bool((a - b).abs().max() > limit * a.abs().max())


# --- modules that run over samples as rows ------------------------------------------------------

_TRIED = 11, 8
"""Tokens of two samples, of which the shorter one gets some rest of a row; 19 is hardly a size."""


class ByRowsOnTrial(ByRows):
    """Finds modules that are to be run by rows, in a model that is installed with it.

    One that cannot be, or still lets samples see each other, gives way to the module around it.
    ``problem`` says why samples may see each other all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self._failed: set[tuple[str, type[nn.Module]]] = set()

    def run(
        self, place: str, module: nn.Module, slot: Slot, function: Any, args: Any, kwargs: Any
    ) -> Any:
        """As it is run later; a module that is called otherwise, or raises, has failed."""
        try:
            return super().run(place, module, slot, function, args, kwargs)
        except Exception:  # whatever it does not like
            self._failed.add((place, type(module)))
            return function(*args, **kwargs)

    def find(self, model: nn.Module, regions: Iterable[Region]) -> None:
        """Set ``places``: none where the model cannot be called with tokens alone."""
        table = input_embeddings(model)
        weight = None if table is None else next(table.parameters(), None)
        if weight is None:
            return
        batch = _two_packs(len(weight), weight.device, _TRIED)
        blocks = [r.path for r in regions if r.kind == "block"]
        with _trying(model):
            try:
                leaking = self._find(model, blocks, batch)
                # where some still see each other, no sample is as by itself, and it is said why
                if leaking:
                    self.problem = f"samples that share a row see each other in {leaking}"
                elif self.places and not _are_right(model, batch):
                    places = ", ".join(sorted(place for place, _ in self.places))
                    self.places.clear()
                    self.problem = (
                        f"run over samples apart, {places} would give other values than for each "
                        "sample by itself: samples that share a row see each other there"
                    )
            except Exception as error:  # it wants other inputs: what is trained decides (``leaks``)
                self.places.clear()
                self.problem = (
                    "whether samples that share a row see each other could not be tried: "
                    f"{type(error).__name__}: {error}"
                )

    def _find(self, model: nn.Module, blocks: list[str], batch: dict[str, Tensor]) -> str:
        """Find what helps; returns what lets samples see each other all the same, or ''."""
        modules = dict(model.named_modules())
        paths = {m: path for path, m in modules.items()}
        while True:
            leaking = _leaking_modules(lambda: _call(model, batch), model, sum(_TRIED), _TRIED[0])
            chains = [list(_places(modules, blocks, paths[m])) for m in leaking]
            # a module around one that still lets samples see each other has not helped, either
            self._failed |= {place for chain in chains for place in chain} & self.places
            self.places -= self._failed
            candidates = {next((p for p in c if p not in self._failed), None) for c in chains}
            new = candidates - self.places - {None}
            if not new:
                return _name(model, leaking[0]) if leaking else ""
            self.places |= {p for p in new if p is not None}


def _places(
    modules: dict[str, nn.Module], blocks: list[str], path: str
) -> Iterator[tuple[str, type[nn.Module]]]:
    """Place and class of the module at ``path`` in its block, and of those around it there."""
    outer = max((b for b in blocks if b == path or is_below(path, b)), key=len, default=None)
    while outer is not None:
        if not is_container(modules[path]):
            yield path[len(outer) + 1 :], type(modules[path])
        if path == outer:
            return
        path = path.rpartition(".")[0]


def _are_near(values: Tensor, others: Tensor) -> bool:
    """Whether two outputs of a model are the same but for what it makes of roundings."""
    error = (values - others).norm(dim=-1) / others.norm(dim=-1)
    # the median: a rounding may send a single token to another expert
    return bool(error.median() <= torch.finfo(others.dtype).eps ** 0.5)


@torch.no_grad()
def _are_right(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether two samples in a row are as each by itself, but for roundings."""
    packed, begin = _first_output(model, {n: t[:1] for n, t in batch.items()}), 0
    for size in _TRIED:
        own = slice(begin, begin + size)
        alone = _first_output(model, {n: t[:1, own] for n, t in batch.items()})
        if not _are_near(packed[:, own], alone):
            return False
        begin += size
    return True


def _first_output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits, or the hidden states of a model without."""
    with _hooked(model, lambda *_: None):
        outputs = _call(model, batch)
    first: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
    return first


def _call(model: Any, batch: dict[str, Tensor]) -> Any:
    torch.manual_seed(0)  # in a fork: what is drawn in training is the same in each call
    try:
        return model(**batch, use_cache=False)
    except TypeError:  # a model without a cache has no such argument
        return model(**batch)
