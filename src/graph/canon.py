"""One spelling per operation: the canonical view of a node.

``x * y``, ``torch.mul(x, y)``, ``x.mul(y)`` and ``torch.mul(input=x, other=y)`` are all
``Canon("mul", (x, y))``, with every argument in its place and every default filled in, so that
patterns never see spelling. The graph itself is not changed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from . import facts
from .opaque.autograd_functions import forward
from .opaque.functions import CONVENTIONS, CONVOLUTION, bind, is_leaf
from .opaque.quantized import PARAMS, product
from .operations import CASTS, FUNCTIONS, LIBRARY_OPS, METHODS, SPECS, Spec


@dataclass(frozen=True)
class Canon:
    """A node, canonically: all arguments in order, defaults filled in; fx nodes or constants.

    ``via`` are further nodes that the view looks through; they belong to the operation.
    """

    name: str
    args: tuple[Any, ...]
    via: tuple[fx.Node, ...] = ()


_OPS: dict[Any, tuple[str, Spec]] = {}

SPECS.update({c.name: Spec(c.params) for c in (*CONVENTIONS, CONVOLUTION)})
SPECS["quantized_linear"] = Spec(PARAMS)


def register(function: Callable[..., Any], name: str, spec: Spec) -> None:
    """Give ``function`` (an op, or one that is not in ``operations.py``) its canonical name."""
    _OPS[function] = (name, spec)
    SPECS[name] = spec


@facts.kept
def canonical(node: Any) -> Canon | None:
    """The canonical view of ``node``, or None when it is no operation that we know."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    if target in _OPS:
        name, spec = _OPS[target]
        return _made(name, spec.bind(args, kwargs))
    if is_leaf(target):
        leaf = bind(target, args, kwargs)
        return None if leaf is None else Canon(*leaf)
    quantized = product(node)
    if quantized is not None:
        return Canon("quantized_linear", *quantized)
    linear = _wrapped_linear(node)
    if linear is not None:
        return linear
    special = _SPECIAL.get(target)
    if special is not None:
        return special(node, *_by_position(args, kwargs))
    table: dict[Any, str] = FUNCTIONS if node.op == "call_function" else METHODS
    operation = table.get(target)
    if operation is None and isinstance(target, torch._ops.OpOverloadPacket):
        operation = LIBRARY_OPS.get(str(target))
    if operation is None:
        return None
    canon = _made(operation, SPECS[operation].bind(args, kwargs))
    return _tidy(node, canon) if canon else None


def is_cast_of(node: Any, x: Any) -> bool:
    """Whether ``node`` is ``x`` in another dtype."""
    canon = canonical(node)
    return canon is not None and canon.name == "cast" and canon.args[0] is x


def _by_position(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the first one in its place, where it was given by its name."""
    name = next((n for n in ("input", "self", "tensor") if n in kwargs), None)
    return ((kwargs.pop(name), *args), kwargs) if name else (args, kwargs)


def _made(name: str, args: tuple[Any, ...] | None) -> Canon | None:
    return None if args is None else Canon(name, args)


def _tidy(node: fx.Node, canon: Canon) -> Canon:
    """Normal forms inside an operation: dimensions count from the end, tuples for lists."""
    if canon.name in ("mean", "sum"):
        x, dim, keepdim, dtype = canon.args
        if isinstance(dim, (list, tuple)) and len(dim) == 1:
            dim = dim[0]
        return Canon(canon.name, (x, _from_end(x, dim), keepdim, dtype))
    if canon.name == "cat":
        tensors, dim = canon.args
        return Canon("cat", (tuple(tensors), _from_end(tensors[0], dim)))
    if canon.name == "stack":
        tensors, dim = canon.args
        return Canon("stack", (tuple(tensors), _from_end(node, dim)))
    if canon.name == "transpose":
        x, a, b = canon.args
        lo, hi = sorted((_from_end(x, a), _from_end(x, b)))
        return Canon("transpose", (x, lo, hi))
    if canon.name == "matmul":
        return _as_linear(canon)
    if canon.name in ("cumsum", "softmax", "max", "logsumexp"):
        x, dim, rest = canon.args
        return Canon(canon.name, (x, _from_end(x, dim), rest))
    if canon.name == "unsqueeze":
        return Canon("unsqueeze", (canon.args[0], _from_end(node, canon.args[1])))
    return canon


def _as_linear(canon: Canon) -> Canon:
    """``x @ w.T`` with a matrix ``w`` is a linear without bias (Falcon writes it so)."""
    x, y = canon.args
    inner = canonical(y)
    if inner is None or inner.name != "transpose" or facts.ndim(y) != 2:
        return canon
    return Canon("linear", (x, inner.args[0], None), (y,))


def _wrapped_linear(node: fx.Node) -> Canon | None:
    """A linear that is the whole forward of an autograd function, as DeepSpeed writes it."""
    inner = forward(node)
    if inner is None or not inner.multiplies_backward():
        return None
    linear = _matrix_product(inner.result) or _sum_with_bias(inner.result)
    outside = None if linear is None else inner.outside(linear.args, linear.via)
    return None if outside is None else Canon("linear", *outside)


def _matrix_product(node: Any) -> Canon | None:
    """``x @ w.T``, or ``addmm(bias, x, w.T)``, as a linear; None for anything else."""
    canon = canonical(node)
    if canon is not None and canon.name == "addmm" and canon.args[3:] == (1, 1):
        bias, x, columns = canon.args[:3]
        if facts.ndim(bias) != 1:
            return None
        canon = _as_linear(Canon("matmul", (x, columns)))
        return Canon("linear", (*canon.args[:2], bias), canon.via) if canon.via else None
    return canon if canon is not None and canon.name == "linear" else None


def _sum_with_bias(node: fx.Node) -> Canon | None:
    """``product + bias`` as a linear; in place, too, for the product is nobody else's."""
    canon = canonical(node)
    is_sum = canon is not None and canon.name == "add" and canon.args[2] == 1
    args: Any = canon.args if canon is not None and is_sum else node.args
    if not (is_sum or node.target is operator.iadd) or facts.ndim(args[1]) != 1:
        return None
    product, bias = args[:2]
    linear = _matrix_product(product)
    if linear is None or linear.args[2] is not None:
        return None
    return Canon("linear", (*linear.args[:2], bias), (product, *linear.via))


def _attribute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canon | None:
    """``w.T`` of a matrix."""
    is_transpose = len(args) == 2 and args[1] in ("T", "mT") and facts.ndim(node) == 2
    return Canon("transpose", (args[0], -2, -1)) if is_transpose else None


def _t(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canon | None:
    return Canon("transpose", (args[0], -2, -1)) if facts.ndim(node) == 2 else None


def _from_end(node: Any, dim: Any) -> Any:
    rank = facts.ndim(node)
    return dim - rank if isinstance(dim, int) and rank is not None and dim >= 0 else dim


def _cast(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canon | None:
    """``.to(dtype)``, ``.float()``, ``.type_as(y)`` ...: whatever only changes the dtype."""
    before, after = facts.tensor(args[0]), facts.tensor(node)
    if before is None or after is None or before.device != after.device:
        return None
    if kwargs.get("memory_format") not in (None, torch.preserve_format):
        return None
    return Canon("cast", (args[0], after.dtype))


def _softmax(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canon | None:
    """``F.softmax``, which has one parameter more than ``torch.softmax``."""
    kwargs.pop("_stacklevel", None)
    canon = _made("softmax", SPECS["softmax"].bind((*args[:2], *args[3:]), kwargs))
    return canon and _tidy(node, canon)


def _square(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canon | None:
    return Canon("pow", (args[0], 2))


def _var(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canon | None:
    """``x.var(-1, unbiased=False)``, ``torch.var(x, dim=-1, correction=0)`` and the like."""
    name = "var_mean" if node.target is torch.var_mean else "variance"
    if len(args) > 1 and isinstance(args[1], bool):  # x.var(unbiased), over everything
        args = (args[0], None, *args[1:])
    args = tuple(int(a) if i == 2 and isinstance(a, bool) else a for i, a in enumerate(args))
    if "unbiased" in kwargs:
        kwargs["correction"] = int(kwargs.pop("unbiased"))
    bound = SPECS[name].bind(args, kwargs)
    if bound is None:
        return None
    x, dim, correction, keepdim = bound
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    correction = 1 if correction is None else correction
    return Canon(name, (x, _from_end(x, dim), correction, keepdim))


def _reshape(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canon | None:
    before, after = facts.tensor(args[0]), facts.tensor(node)
    if before is None or after is None or before.dtype is not after.dtype:  # other bits, not sizes
        return None
    return Canon("reshape", (args[0], tuple(after.shape)))


def _expand(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canon | None:
    t = facts.tensor(node)
    return None if t is None else Canon("expand", (args[0], tuple(t.shape)))


def _getitem(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canon | None:
    """Indexing: a part of a chunk or split, rows by number, or a slice of one dimension."""
    source, index = args
    rank = facts.ndim(source)
    if rank is None:
        return _part(source, index) or Canon("item", (source, index))
    if isinstance(index, fx.Node) and facts.dtype(index) in (torch.int64, torch.int32):
        return Canon("index", (source, index))
    index = index if isinstance(index, tuple) else (index,)
    if any(not (i is None or i is Ellipsis or isinstance(i, slice)) for i in index):
        return None
    if None in index:
        return _new_axis(node, source, index)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (rank - len(index) + 1), *index[at + 1 :])
    cut = [(d, s) for d, s in enumerate(index) if s != slice(None)]
    cut = [(d, s) for d, s in cut if s != slice(0, None)]
    if len(cut) != 1:
        return None
    dim, s = cut[0]
    if s.step not in (None, 1):
        whole = type(s.step) is int and s.stop is None and s.start in (None, *range(s.step))
        return Canon("stride", (source, dim - rank, s.start or 0, s.step)) if whole else None
    if any(isinstance(b, fx.Node) or type(b) not in (int, type(None)) for b in (s.start, s.stop)):
        return None
    full = facts.size(source, dim)
    # of a size that is not known, the bounds stay as they are written
    start, stop = (s.start or 0, s.stop) if full is None else s.indices(full)[:2]
    return Canon("slice", (source, dim - rank, start, stop))


def _new_axis(node: fx.Node, source: Any, index: tuple[Any, ...]) -> Canon | None:
    """``x[:, :, None, :]`` is ``x.unsqueeze(2)``."""
    at = [d for d, i in enumerate(index) if i is None]
    others = [i for i in index if i is not None]
    rank = facts.ndim(node)
    if len(at) != 1 or rank is None or any(i != slice(None) for i in others):
        return None
    return Canon("unsqueeze", (source, at[0] - rank))


def _part(source: Any, index: Any) -> Canon | None:
    """``x.chunk(2, -1)[i]`` and ``x.split(n, -1)[i]`` are slices of ``x``; parts of pairs, too."""
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return None
    name = (
        source.target if isinstance(source.target, str) else getattr(source.target, "__name__", "")
    )
    if name == "unbind":
        return _of_pairs(source, index)
    if name not in ("chunk", "split", "split_with_sizes"):
        return None
    args, kwargs = _by_position(source.args, dict(source.kwargs))
    x, dim = args[0], kwargs.get("dim", args[2] if len(args) > 2 else 0)
    parts, rank = facts.value(source), facts.ndim(x)
    if not isinstance(dim, int) or rank is None or not isinstance(parts, (tuple, list)):
        return None
    dim = dim - rank if dim >= 0 else dim
    widths = [p.shape[dim] for p in parts]
    if any(type(w) is not int for w in widths) or not 0 <= index < len(widths):
        return None
    start = sum(widths[:index])
    return Canon("slice", (x, dim, start, start + widths[index]), (source,))


def _of_pairs(source: fx.Node, index: int) -> Canon | None:
    """``x.view(..., n, 2).unbind(-1)[i]`` is ``x[..., i::2]``."""
    args, kwargs = _by_position(source.args, dict(source.kwargs))
    pairs, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    view = canonical(pairs)
    if view is None or view.name != "reshape" or not isinstance(dim, int):
        return None
    x, split = facts.tensor(view.args[0]), facts.tensor(pairs)
    if x is None or split is None or x.dim() == 0 or _from_end(pairs, dim) != -1:
        return None
    sizes = (*x.shape[:-1], x.shape[-1] // 2, 2)
    if list(map(str, split.shape)) != list(map(str, sizes)) or index not in (0, 1):
        return None
    return Canon("stride", (view.args[0], -1, index, 2), (source, pairs))


_SPECIAL: dict[Any, Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Canon | None]] = {
    **dict.fromkeys(("to", "type_as", "type", *CASTS), _cast),
    **dict.fromkeys(("square", torch.square), _square),
    **dict.fromkeys(("var", torch.var, torch.var_mean), _var),
    **dict.fromkeys(
        ("view", "reshape", "reshape_as", "view_as", "flatten", torch.reshape, torch.flatten),
        _reshape,
    ),
    **dict.fromkeys(("expand", "expand_as"), _expand),
    F.softmax: _softmax,
    # attributes of a tensor, as PyTorch 2.15 captures them: ``w.T``, ``w.mT``
    **dict.fromkeys(("t", torch.t, torch.ops.aten.numpy_T, torch.ops.aten.mT), _t),
    operator.getitem: _getitem,
    getattr: _attribute,
}
