"""What could be rewritten in a model, found without the rules: by what its modules and calls do.

The rules read captured graphs. This detector watches one eager step of the plain model instead:

* **norm**: a module whose output stays when its input is scaled, and that is no constant; outside
  such modules, each call of ``rsqrt``, ``x ** -0.5``, ``F.layer_norm``, ``F.rms_norm`` or
  ``F.normalize``.
* **rope**: each tensor that a function of the model's source called ``...rotary...``,
  ``...rope...`` or ``...rotate...`` gives back in the shape of one of its arguments.
* **glu**: a product of two tensors of one shape, one of them an activation of another source than
  the other, in a module that itself neither attends, convolves nor scans: a gated MLP.
* **lora**: a module with an active PEFT adapter that was called.
* **loss**: a call of ``F.cross_entropy``.

A candidate belongs to the innermost module that was running, and to a place in its source: a module
that runs several times in a step, or a line that a loop repeats, counts once.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusewright.graph.opaque.functions import convention
from fusewright.graph.opaque.hub_kernels import behind

KINDS: dict[str, tuple[str, ...]] = {
    "norm": ("rms_norm", "layer_norm"),
    "rope": ("rope", "qk_norm_rope"),
    "glu": ("glu", "mlp_block", "moe_experts"),
    "lora": ("lora_linear",),
    "loss": ("linear_cross_entropy",),
}
"""Kind of candidate -> the rules that may take it."""

_ROTARY = re.compile(r"rotary|rope|rotate")
_NORMS = {torch.rsqrt, Tensor.rsqrt, F.layer_norm, F.rms_norm, torch.rms_norm, F.normalize}
_ACTIVATIONS = {
    F.silu, F.gelu, F.relu, torch.relu, Tensor.relu, F.sigmoid, torch.sigmoid, Tensor.sigmoid,
    torch.tanh, Tensor.tanh, F.tanh, torch.erf, Tensor.erf, F.softplus, F.leaky_relu, F.elu,
}  # fmt: skip
_ELEMENTWISE = _ACTIVATIONS | {
    torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, Tensor.sub, Tensor.__sub__,
    Tensor.__rsub__, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.div, Tensor.div,
    Tensor.__truediv__, torch.pow, Tensor.pow, Tensor.__pow__, Tensor.__neg__, torch.neg,
    torch.square, Tensor.square, torch.exp, Tensor.exp, torch.clamp, Tensor.clamp, Tensor.to,
    Tensor.float, Tensor.type_as, Tensor.contiguous, F.dropout,
}  # fmt: skip
_POWERS = {Tensor.pow, torch.pow, Tensor.__pow__}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_MIXING = {
    F.scaled_dot_product_attention, F.softmax, torch.softmax, Tensor.softmax, F.conv1d,
}  # fmt: skip


class _Call:
    """One running module call."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.found: dict[tuple[str, Any], int] = {}
        self.mixes = False

    def add(self, kind: str, place: Any = None, number: int = 1) -> None:
        key = (kind, place)
        self.found[key] = max(number, self.found.get(key, 0))


def _is_in_a_leaf() -> bool:
    """Whether what runs is inside of a function that is captured whole: its norms are its own."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "forward":
        function = behind(frame.f_globals.get(frame.f_code.co_name))
        if isinstance(function, FunctionType) and convention(function) is not None:
            return True
        frame = frame.f_back
    return False


class Detector(TorchFunctionMode):
    """Watches what is called while ``watching`` a model.

    Attributes:
        found: (kind, module path) -> the number of candidates in one call of the module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], int] = {}
        self._calls = [_Call("")]
        self._in_norm = 0
        self._rotary: list[FrameType] = []
        self._origin: dict[int, tuple[Any, bool]] = {}
        self._kept: list[Any] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch the calls of ``model`` made inside; its hooks are taken off again."""
        handles = []
        norms = {m for m in model.modules() if is_norm(m)}
        for path, module in model.named_modules():
            before, after = self._hooks(path, module in norms, _is_adapted(module))
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
        previous = sys.getprofile()
        sys.setprofile(self._profile)
        try:
            with self:
                yield
        finally:
            sys.setprofile(previous)
            for handle in handles:
                handle.remove()
            self._close(self._calls[0])
            self._kept.clear()

    def _hooks(self, path: str, norm: bool, adapted: bool) -> tuple[Any, Any]:
        def before(module: nn.Module, args: Any) -> None:
            self._calls.append(_Call(path))
            self._in_norm += norm
            if norm and self._in_norm == 1:
                self._calls[-1].add("norm")
            if adapted:
                self._calls[-1].add("lora")

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._in_norm -= norm
            self._close(self._calls.pop())

        return before, after

    def _close(self, call: _Call) -> None:
        counts: Counter[str] = Counter()
        for (kind, _), number in call.found.items():
            counts[kind] += number
        for kind, count in counts.items():
            if kind == "glu" and call.mixes:
                continue
            key = (kind, call.path)
            self.found[key] = max(self.found.get(key, 0), count)

    # what PyTorch functions do

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        now = self._calls[-1]
        if func in _MIXING:
            now.mixes = True
        if func is F.cross_entropy:
            now.add("loss", _place(sys._getframe(1)))
        inverse_root = func in _POWERS and isinstance(args[1], float) and args[1] == -0.5
        if not self._in_norm and (func in _NORMS or inverse_root) and not _is_in_a_leaf():
            now.add("norm", _place(sys._getframe(1)))
        if func in _ELEMENTWISE and isinstance(out, Tensor):
            tensors = [a for a in args if isinstance(a, Tensor)]
            if func in _PRODUCTS and len(tensors) == 2 and self._gates(*tensors):
                now.add("glu", _place(sys._getframe(1)))
            self._follow(func, tensors, out)
        return out

    def _follow(self, func: Any, tensors: list[Tensor], out: Tensor) -> None:
        """Remember what ``out`` was computed from element by element, and whether activated."""
        known = [self._origin.get(id(t), (id(t), False)) for t in tensors]
        self._kept += [*tensors, out]  # while they live, no other tensor has their id
        origins = {origin for origin, _ in known}
        if len(origins) == 1:
            active = func in _ACTIVATIONS or any(a for _, a in known)
            self._origin[id(out)] = (origins.pop(), active)

    def _gates(self, a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or a.dim() < 2 or a.shape[-1] == 1:
            return False
        (one, first), (other, second) = (self._origin.get(id(t), (id(t), False)) for t in (a, b))
        return one != other and (first or second)

    # what the model's own functions do

    def _profile(self, frame: FrameType, event: str, value: Any) -> None:
        if event == "call" and _ROTARY.search(frame.f_code.co_name):
            if "modeling" in frame.f_code.co_filename:
                self._rotary.append(frame)
        elif event == "return" and self._rotary and self._rotary[-1] is frame:
            self._rotary.pop()
            if not self._rotary:
                self._calls[-1].add("rope", _place(frame.f_back), _rotated(frame, value))


def _place(frame: FrameType | None) -> tuple[Any, ...]:
    """The lines that led from the running module's forward to here, without PyTorch's own."""
    lines = []
    while frame is not None and frame.f_code.co_name != "_call_impl":
        if "/torch/" not in frame.f_code.co_filename:
            lines.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(lines)


def _rotated(frame: FrameType, value: Any) -> int:
    given = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    shapes = [v.shape for n in given if isinstance(v := frame.f_locals.get(n), Tensor)]
    results = value if isinstance(value, (tuple, list)) else (value,)
    return sum(
        isinstance(r, Tensor) and r.is_floating_point() and r.dim() > 2 and r.shape in shapes
        for r in results
    )


def is_norm(module: nn.Module) -> bool:
    """Whether the output of ``module`` stays when its input is scaled, and is no constant."""
    vectors = list(module.parameters())
    if (
        any(p.dim() > 2 for p in vectors)
        or len(vectors) > 2
        or any(True for _ in module.children())
    ):
        return False
    width = next((p.shape for p in vectors if p.dim()), torch.Size((16,)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, *width), generator=generator)
    try:
        with torch.no_grad():
            small, large = module.forward(x), module.forward(x * 16)
    except Exception:  # takes other arguments: then its calls are seen as calls
        return False
    if not isinstance(small, Tensor) or small.shape != x.shape:
        return False
    moves = float((small - small.mean()).abs().max()) > 0
    return moves and torch.allclose(small, large, rtol=1e-3, atol=1e-3)


def _is_adapted(module: nn.Module) -> bool:
    """An adapted linear; what adapts a bare parameter (stacked experts) calls none."""
    adapters = getattr(module, "lora_A", None)
    of_parameter = hasattr(module, "parameter_name")
    return isinstance(adapters, nn.ModuleDict) and len(adapters) > 0 and not of_parameter


def covered(
    found: dict[tuple[str, str], int], sites: Counter[tuple[str, str]]
) -> tuple[dict[str, tuple[int, int]], list[tuple[str, str, int]]]:
    """How many candidates were rewritten.

    Args:
        found: as in ``Detector.found``.
        sites: (rule, module path) -> formulas rewritten there.

    Returns:
        kind -> (rewritten, all); and (kind, path, number) of those that were not.
    """
    counts: dict[str, tuple[int, int]] = {}
    left: list[tuple[str, str, int]] = []
    for kind, rules in KINDS.items():
        free: Counter[str] = Counter()
        for (rule, path), number in sites.items():
            if rule in rules:
                free[path] += number
        want = Counter({path: n for (k, path), n in found.items() if k == kind})
        total = want.total()
        for near in (_equal, _related):
            for path in list(want):
                for site in [s for s in free if near(path, s)]:
                    taken = min(want[path], free[site])
                    want[path] -= taken
                    free[site] -= taken
        counts[kind] = (total - want.total(), total)
        left += [(kind, path, n) for path, n in want.items() if n]
    return counts, left


def _equal(path: str, site: str) -> bool:
    return path == site


def _related(path: str, site: str) -> bool:
    """One holds the other; the whole model holds everything and says nothing."""
    outer, inner = sorted((path, site), key=len)
    return outer != "" and inner.startswith(f"{outer}.")
