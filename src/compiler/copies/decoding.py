"""Generation with a cache: the original code runs, and its attention of one position is an op.

A call that passes a cache bypasses its graph: a cache grows with each call, and each kind of cache
does so in its own way. What such a step takes longest for is PyTorch's attention. So, for that call
only, the modules whose forwards lead to ``scaled_dot_product_attention`` run copies of these
forwards that lead to ``decode_attention`` where it can take the inputs. It is verified like a
rewrite, the first time that inputs of a kind come, on these inputs.
"""

from __future__ import annotations

import copy
import threading
import types
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.attention.attention import attention_reference
from ...kernels.attention.decode_attention import OP, decode_attention, why_useless
from ...kernels.tolerance import errors, exceeded
from ...report import Figures
from ...rewrite.findings import Finding
from ..options import Verify
from .forward_copies import FunctionCopies, using_copies

_NAME = "scaled_dot_product_attention"
_ORIGINAL = F.scaled_dot_product_attention


class Decoding:
    """Attention of one session's model in calls that pass a cache; ``findings`` by region."""

    def __init__(self, enabled: bool = True, verify: Verify = "first") -> None:
        """Make one; with ``verify="always"``, each kind of input is verified in each region."""
        self.findings: weakref.WeakKeyDictionary[nn.Module, Finding] = weakref.WeakKeyDictionary()
        self._enabled, self._verify = enabled, verify
        self._copies = FunctionCopies(self._replacement, live=True)
        functional = _Namespace(F, {_NAME: self._attention})
        layers = _Namespace(nn, {"functional": functional})
        top = _Namespace(torch, {"nn": layers})
        self._namespaces = {F: functional, nn: layers, torch: top}
        self._modules: weakref.WeakKeyDictionary[nn.Module, list[nn.Module]] = (
            weakref.WeakKeyDictionary()
        )
        # the regions where the op is of no use, each with the ``_precision`` that this was seen in
        self._useless: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self._verdicts: dict[Any, Finding] = {}
        self._region: nn.Module | None = None
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, region: nn.Module) -> Iterator[None]:
        """While the original forward of ``region`` runs with a cache."""
        # another thread that generates with the same model meanwhile runs it as it was
        plain = not self._enabled or torch.is_grad_enabled() or _is_watched()
        plain = plain or self._useless.get(region) == _precision(region)
        if plain or not self._lock.acquire(blocking=False):
            yield
            return
        try:
            copies = [(m, self._copies.of_forward(m)) for m in self._modules_of(region)]
            self._region = region
            with using_copies([(m, copy_) for m, copy_ in copies if copy_ is not None], _Bound):
                yield
        finally:
            self._region = None
            self._lock.release()

    def _modules_of(self, region: nn.Module) -> list[nn.Module]:
        """Those below ``region`` whose forwards have copies."""
        modules = self._modules.get(region)
        if modules is None:
            modules = self._modules[region] = [m for m, _ in self._copies.below(region)]
        return modules

    def _replacement(self, value: Any, names: set[str]) -> Any:
        """The replacement of a global in code that leads to attention, or None."""
        if value is _ORIGINAL:
            return self._attention
        if isinstance(value, types.ModuleType):
            return self._namespaces.get(value) if _NAME in names else None
        if isinstance(value, types.FunctionType):
            return self._copies.of(value) if _NAME in value.__code__.co_names else None
        if isinstance(value, Mapping) and hasattr(value, "get_interface"):
            return _Interfaces(value, self._copies)
        return None

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """``scaled_dot_product_attention``, by the op where it can take the inputs."""
        inputs = _arguments(*args, **kwargs) if set(kwargs) <= _KEYWORDS else None
        if inputs is None or OP.unsupported(*inputs):
            if inputs is not None and self._region is not None and why_useless(inputs[0]):
                self._useless[self._region] = _precision(self._region)
            return _ORIGINAL(*args, **kwargs)
        q, k, v, scale, mask = inputs
        key = (
            q.dtype, q.shape[1:], k.shape[1], v.shape[1], v.shape[3], scale, mask is None,
            mask is not None and (mask.dtype, mask.shape[1]),
            id(self._region) if self._verify == "always" else None,
        )  # fmt: skip
        finding = self._verdicts.get(key)
        if finding is None:
            finding = self._verdicts[key] = self._verified(*inputs)
        if self._region is not None:
            self.findings.setdefault(self._region, finding)
        if finding.status != "rewritten":
            return _ORIGINAL(*args, **kwargs)
        return decode_attention(*inputs)

    def _verified(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None
    ) -> Finding:
        finding = Finding(OP.name, OP.name, "rewritten", "", "one position over a cache")
        if self._verify == "off":
            return finding
        q, (k, v) = q[:1], (t[:1, :, -_KEYS:] for t in (k, v))
        mask = mask if mask is None else mask[:1, ..., -_KEYS:]
        wide = mask if mask is None or mask.dtype is torch.bool else mask.double()
        exact = attention_reference(q.double(), k.double(), v.double(), scale, False, wide)
        ours = decode_attention(q, k, v, scale, mask)
        problem = exceeded(ours, OP.reference(q, k, v, scale, mask), exact)
        if problem is not None:
            finding.status, finding.reason = "refused", problem
        finding.figures = Figures(error=errors(ours, exact).rms)
        return finding


_KEYS = 2048
"""How many keys of the first sample it is verified on: a long cache is not copied to fp64."""

_KEYWORDS = frozenset(
    ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
)


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, float | None, Tensor | None] | None:  # fmt: skip
    """The op's arguments; None where it cannot take the place of a call of PyTorch's function."""
    if dropout_p or is_causal or torch.is_grad_enabled():
        return None
    if torch._C._are_functorch_transforms_active():
        return None
    if not type(query) is type(key) is type(value) is Tensor or query.dim() != 4:
        return None
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return None
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is not query.dtype:
        return None
    return query, key, value, scale, attn_mask


def _precision(region: nn.Module) -> tuple[Any, ...]:
    """What says where and in which dtype a region computes."""
    weight = next(region.parameters(), None)
    place = None if weight is None else (weight.device, weight.dtype)
    casts = torch.is_autocast_enabled("cpu")
    return place, torch.get_autocast_dtype("cpu") if casts else None


def _is_watched() -> bool:
    """Whether somebody has put another attention in its place, or sees all calls of functions."""
    return F.scaled_dot_product_attention is not _ORIGINAL or bool(
        torch._C._len_torch_function_stack()
    )


class _Bound:
    """A copy of a forward, bound to its module for one call."""

    # a copy of the module that is made meanwhile, or a pickle, has the forward of its class

    def __init__(self, function: Any, module: nn.Module) -> None:
        self.__func__, self.__self__ = function, module
        self._own = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        return types.MethodType(self.__func__, self.__self__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        return type(self.__self__).forward.__get__(copy.deepcopy(self.__self__, memo))

    def __reduce__(self) -> Any:
        return getattr, (self.__self__, "forward")


class _Namespace(types.ModuleType):
    """A module in which some names are replaced."""

    def __init__(self, module: types.ModuleType, others: Mapping[str, Any]) -> None:
        super().__init__(module.__name__, module.__doc__)
        self.__dict__.update(others, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_module"], name, value)


class _Interfaces:
    """A table of attention functions as libraries have it, which gives out copies of them."""

    def __init__(self, table: Any, copies: FunctionCopies) -> None:
        self.__table, self.__copies = table, copies

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__table, name)

    def __getitem__(self, name: str) -> Any:
        return self.__copied(self.__table[name])

    def __setitem__(self, name: str, function: Any) -> None:
        self.__table[name] = function

    def __contains__(self, name: object) -> bool:
        return name in self.__table

    def __iter__(self) -> Iterator[str]:
        return iter(self.__table)

    def __len__(self) -> int:
        return len(self.__table)

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """The entry of a name, or what is given for one that has none."""
        return self.__copied(self.__table.get(*args, **kwargs))

    def get_interface(self, *args: Any, **kwargs: Any) -> Any:
        """The same, for the name that a configuration holds."""
        return self.__copied(self.__table.get_interface(*args, **kwargs))

    def __copied(self, function: Any) -> Any:
        return self.__copies.of(function) or function
