"""What a block keeps, in the memory of the host: it leaves in forward and is fetched in backward.

A block at one of the levels ``HOSTED`` keeps its input alone. That input is copied to the host
during the block's own work, and leaves the device when the next block begins. In backward each
block has the one before it fetched while it computes. The device waits for copies by events; the
host waits for none. A place in memory is let go only after what still copies from it or into it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..graph.fakes import hint
from ..kernels.saved_tensors import saved_by_hook

LEAST = 1 << 20
"""Bytes below which a tensor stays: the copy would cost more than the place is worth."""


class SavedTensor:
    """One tensor that autograd keeps: on the device, on its way, or on the host.

    ``going`` is the copy of ``tensor`` to the host, under way. ``before`` is what the block before
    keeps, to be fetched when this is used.
    """

    def __init__(
        self,
        tensor: Tensor,
        going: Transfer,
        transport: Transport,
        before: Sequence[weakref.ref[SavedTensor]],
    ) -> None:
        self._layout, self._version, self._device = _layout(tensor), tensor._version, tensor.device
        self._here: Tensor | None = tensor
        self._going = going
        self._coming: Transfer | None = None
        self._transport, self._before = transport, before

    def holds(self, t: Tensor) -> bool:
        """Whether ``t``, which has the same storage, is what was kept, as it was."""
        return _layout(t) == self._layout and t._version == self._version

    def leave(self) -> None:
        """Let go of the device's memory; what reuses it comes after the copy."""
        # a write in between may have come before the copy had read, as ``get`` says then
        if self._here is not None and self._here._version == self._version:
            self._transport.wait(self._going, self._device)
            self._here = None

    def fetch(self) -> None:
        """Begin to bring it back, if it has left."""
        if self._here is None and self._coming is None:
            self._coming = self._transport.back(self._going.result, self._device)

    def get(self) -> Tensor:
        """The tensor on the device; the block before begins to be fetched.

        Raises:
            RuntimeError: something wrote into it while it was still there, as autograd would say.
        """
        if self._here is not None and self._here._version != self._version:
            raise RuntimeError(
                "the input of a block, needed for gradient computation, has been modified by an "
                "inplace operation after the block had run: write to a copy of it"
            )
        result = self._here
        if result is None:
            self.fetch()
            assert self._coming is not None
            self._transport.wait(self._coming, self._device)
            result, self._coming = self._coming.result, None
        for reference in self._before:
            earlier = reference()
            if earlier is not None:
                with contextlib.suppress(RuntimeError):  # no room yet: fetched when it is used
                    earlier.fetch()
        return result

    def __del__(self) -> None:
        # dropped without a backward pass: copies may still run
        for transfer in (self._going if self._here is not None else None, self._coming):
            if transfer is not None:
                self._transport.wait(transfer, self._device)


def _layout(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.storage_offset(), t.dtype


class Offload:
    """Runs blocks so that their inputs are kept on the host.

    ``note`` is told once, if it cannot be done. ``transport`` is by default what the device needs.
    Tensors of fewer bytes than ``least`` stay.
    """

    def __init__(
        self,
        note: Callable[[str], None] = lambda text: None,
        transport: Transport | None = None,
        least: int = LEAST,
    ) -> None:
        self.note, self.transport, self.least = note, transport, least
        self._last: list[weakref.ref[SavedTensor]] = []
        self._known: weakref.WeakKeyDictionary[Any, weakref.ref[SavedTensor]] = (
            weakref.WeakKeyDictionary()
        )
        self._failed = False

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, a block's graph, keeping on the host what ``carried`` says of its arguments."""

        def call(*args: Any) -> Any:
            if self._failed or not _will_save(args):
                return run(*args)
            with self._keeping([args[i] for i in carried(args, self.least)]):
                return run(*args)

        return call

    @contextlib.contextmanager
    def _keeping(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        for reference in self._last:
            previous = reference()
            if previous is not None:
                previous.leave()
        saved = self._begin(tensors)
        self._last = [weakref.ref(k) for k in saved.values()]

        def pack(t: Tensor) -> Tensor | SavedTensor:
            match = saved.get(t.untyped_storage()._cdata)
            return match if match is not None and match.holds(t) else saved_by_hook(t)

        def unpack(saved: Tensor | SavedTensor) -> Tensor:
            return saved.get() if isinstance(saved, SavedTensor) else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _begin(self, tensors: Sequence[Tensor]) -> dict[int, SavedTensor]:
        """Begin to copy ``tensors``, by the addresses of their storages; each only once."""
        by_address = {}
        try:
            for t in tensors:
                storage = t.untyped_storage()
                reference = self._known.get(storage)
                record = None if reference is None else reference()
                if record is None or not record.holds(t):
                    record = self._send(t.detach())  # shares the count of writes
                    self._known[storage] = weakref.ref(record)
                by_address[storage._cdata] = record
        except RuntimeError as error:  # the host has no memory that can be pinned
            self._failed = True
            why = str(error).strip().partition("\n")[0]
            self.note(f"block inputs stay on the device: the host cannot take them ({why})")
        return by_address

    def _send(self, t: Tensor) -> SavedTensor:
        self.transport = self.transport or transport_of(t.device)
        return SavedTensor(t, self.transport.out(t), self.transport, tuple(self._last))


def _will_save(args: Sequence[Any]) -> bool:
    """Whether autograd is going to save tensors, and nobody else has a say in how."""
    hooks: Any = torch._C._autograd  # some of its functions have no types
    allowed = hooks._saved_tensors_hooks_is_enabled()
    if not allowed or hooks._top_saved_tensors_default_hooks(True) is not None:
        return False
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)


def carried(args: Sequence[Any], least: int) -> list[int]:
    """The places of those arguments of a block's graph that flow from block to block.

    These are the largest floating-point tensors of three dimensions that are no parameters: hidden
    states. Rotary angles, masks and quantized weights, which blocks share or own, are not. Empty if
    they have fewer bytes than ``least``, or gaps or overlaps in memory. ``args`` are tensors or
    Dynamo's examples of them, and sizes.
    """
    sizes = {
        i: [hint(s) for s in a.shape]
        for i, a in enumerate(args)
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter)
        and a.dim() == 3 and a.is_floating_point()
    }  # fmt: skip
    largest = max((prod(s) * args[i].itemsize for i, s in sizes.items()), default=0)
    if largest < least:
        return []
    return [i for i, s in sizes.items() if prod(s) * args[i].itemsize == largest and _dense(
        s, [hint(d) for d in args[i].stride()])]  # fmt: skip


def _dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether each place in memory, from the first to the last, belongs to one element."""
    expected = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


# --- copies between a device and the host, while the device computes ------------------------------


@dataclass(frozen=True)
class Transfer:
    """A copy under way; ``result`` is to be read after ``Transport.wait`` only."""

    result: Tensor
    done: Any = None


class Transport(Protocol):
    """Copies tensors between a device and the host, while the device computes."""

    def out(self, t: Tensor) -> Transfer:
        """Begin to copy ``t`` to the host, in its own layout; RuntimeError: no such memory."""

    def back(self, host: Tensor, device: torch.device) -> Transfer:
        """Begin to copy ``host`` to ``device``; RuntimeError: no such memory."""

    def wait(self, transfer: Transfer, device: torch.device) -> None:
        """Let all that ``device`` is given to do from now on come after ``transfer``."""


class Copies:
    """Copies that have ended when they return: of a CPU, where they are good for tests alone."""

    def out(self, t: Tensor) -> Transfer:
        """A copy of ``t``."""
        return Transfer(torch.empty_like(t).copy_(t))

    def back(self, host: Tensor, device: torch.device) -> Transfer:
        """A copy of ``host``."""
        return Transfer(torch.empty_like(host).copy_(host))

    def wait(self, transfer: Transfer, device: torch.device) -> None:
        """Nothing is under way."""


class Streams:
    """Copies of a GPU, on a separate stream, from and to pinned memory.

    All device memory belongs to the stream that computes. So PyTorch's allocator, which reuses
    memory in the order of that stream, cannot hand it out while a copy runs that the stream has
    been told to wait for.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def out(self, t: Tensor) -> Transfer:
        """Begin to copy ``t`` into pinned memory."""
        return self._copy(torch.empty_like(t, device="cpu", pin_memory=True), t, t.device)

    def back(self, host: Tensor, device: torch.device) -> Transfer:
        """Begin to copy pinned memory to ``device``."""
        return self._copy(torch.empty_like(host, device=device), host, device)

    def wait(self, transfer: Transfer, device: torch.device) -> None:
        """Let the stream that computes wait for the copy."""
        now = torch.cuda.current_stream(device)
        now.wait_event(transfer.done)
        if transfer.result.is_cuda:  # does nothing if it is that stream's memory, as it should be
            transfer.result.record_stream(now)

    def _copy(self, target: Tensor, source: Tensor, device: torch.device) -> Transfer:
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        # after what made the source, and after whoever used the target's memory before
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return Transfer(target, stream.record_event())


def transport_of(device: torch.device) -> Transport:
    """What copies tensors of ``device``."""
    return Streams() if device.type == "cuda" else Copies()
