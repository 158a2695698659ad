"""One spelling per operation: the canonical view of a node.

``x * y``, ``torch.mul(x, y)``, ``x.mul(y)`` and ``torch.mul(input=x, other=y)`` are the same
operation. ``canonical(node)`` gives each the same ``Canon("mul", (x, y))`` with every argument in
its place and every default filled in, so that patterns never see spelling. The graph itself is not
changed.
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


@dataclass(frozen=True)
class Canon:
    """A node, canonically.

    Attributes:
        name: the operation.
        args: all its arguments in order, defaults filled in; fx nodes or constants.
        via: further nodes that the view looks through; they belong to the operation.
    """

    name: str
    args: tuple[Any, ...]
    via: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Spec:
    """The arguments of one canonical operation.

    Attributes:
        params: names in order.
        defaults: values of the trailing parameters that may be left out.
        commutative: whether the first two arguments may be swapped.
        aliases: other names of parameters, as methods and functions differ.
    """

    params: tuple[str, ...]
    defaults: tuple[Any, ...] = ()
    commutative: bool = False
    aliases: tuple[tuple[str, str], ...] = ()

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """All arguments in order, or None when they do not fit."""
        if len(args) > len(self.params):
            return None
        names = dict(self.aliases)
        bound = dict(zip(self.params, args, strict=False))
        for key, val in kwargs.items():
            name = names.get(key, key)
            if name not in self.params or name in bound:
                return None
            bound[name] = val
        first_default = len(self.params) - len(self.defaults)
        for i, name in enumerate(self.params):
            if name not in bound:
                if i < first_default:
                    return None
                bound[name] = self.defaults[i - first_default]
        return tuple(bound[name] for name in self.params)


_X = (("input", "x"), ("self", "x"))
_UNARY = Spec(("x",), aliases=_X)
_BINARY = Spec(("x", "y", "alpha"), (1,), True, (*_X, ("other", "y")))
_REDUCE = Spec(("x", "dim", "keepdim", "dtype"), (None, False, None), aliases=_X)

SPECS: dict[str, Spec] = {
    **{
        name: _UNARY
        for name in ("neg", "rsqrt", "sqrt", "tanh", "sigmoid", "exp", "abs", "sin", "cos")
    },
    "add": _BINARY,
    "sub": Spec(("x", "y", "alpha"), (1,), False, (*_X, ("other", "y"))),
    "mul": Spec(("x", "y"), (), True, (*_X, ("other", "y"))),
    "div": Spec(("x", "y", "rounding_mode"), (None,), False, (*_X, ("other", "y"))),
    "pow": Spec(("x", "y"), (), False, (*_X, ("exponent", "y"))),
    "mean": _REDUCE,
    "sum": _REDUCE,
    "relu": Spec(("x", "inplace"), (False,), aliases=_X),
    "silu": Spec(("x", "inplace"), (False,), aliases=_X),
    "gelu": Spec(("x", "approximate"), ("none",), aliases=_X),
    "linear": Spec(("x", "weight", "bias"), (None,), aliases=_X),
    "matmul": Spec(("x", "y"), aliases=(*_X, ("other", "y"))),
    "cat": Spec(("tensors", "dim"), (0,), aliases=(("axis", "dim"),)),
    "transpose": Spec(("x", "dim0", "dim1"), aliases=_X),
    "unsqueeze": Spec(("x", "dim"), aliases=_X),
    "contiguous": _UNARY,
    "dropout": Spec(("x", "p", "training", "inplace"), (0.5, True, False), aliases=_X),
    "torch_rms_norm": Spec(("x", "shape", "weight", "eps"), (None, None),
                     aliases=(*_X, ("normalized_shape", "shape"))),
    "cross_entropy": Spec(
        ("x", "target", "weight", "size_average", "ignore_index", "reduce", "reduction",
         "label_smoothing"),
        (None, None, -100, None, "mean", 0.0), aliases=_X,
    ),
    "sdpa": Spec(
        ("q", "k", "v", "mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
        (None, 0.0, False, None, False),
        aliases=(("query", "q"), ("key", "k"), ("value", "v"), ("attn_mask", "mask")),
    ),
    # the ones below are made by the functions of this file, not by `bind`
    "cast": Spec(("x", "dtype")),
    "slice": Spec(("x", "dim", "start", "stop")),
    "reshape": Spec(("x", "shape")),
    "expand": Spec(("x", "shape")),
    "item": Spec(("x", "index")),
}

_FUNCTIONS: dict[Any, str] = {
    operator.add: "add", torch.add: "add", operator.sub: "sub", torch.sub: "sub",
    operator.mul: "mul", torch.mul: "mul", torch.multiply: "mul",
    operator.truediv: "div", torch.div: "div", torch.divide: "div", torch.true_divide: "div",
    operator.neg: "neg", torch.neg: "neg", torch.negative: "neg",
    operator.pow: "pow", torch.pow: "pow",
    torch.rsqrt: "rsqrt", torch.sqrt: "sqrt", torch.tanh: "tanh", F.tanh: "tanh",
    torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", torch.exp: "exp", torch.abs: "abs",
    torch.sin: "sin", torch.cos: "cos",
    torch.mean: "mean", torch.sum: "sum", F.relu: "relu", torch.relu: "relu",
    F.silu: "silu", F.gelu: "gelu", torch._C._nn.gelu: "gelu",
    F.linear: "linear", torch._C._nn.linear: "linear",
    torch.matmul: "matmul", operator.matmul: "matmul",
    torch.cat: "cat", torch.concat: "cat", torch.transpose: "transpose",
    torch.unsqueeze: "unsqueeze", F.dropout: "dropout",
    F.rms_norm: "torch_rms_norm", torch.rms_norm: "torch_rms_norm",
    F.cross_entropy: "cross_entropy", F.scaled_dot_product_attention: "sdpa",
}  # fmt: skip

_METHODS: dict[str, str] = {
    name: name
    for name in (
        "add", "sub", "mul", "div", "neg", "pow", "rsqrt", "sqrt", "tanh", "sigmoid", "exp",
        "abs", "sin", "cos", "mean", "sum", "relu", "matmul", "transpose", "unsqueeze",
        "contiguous",
    )
} | {"multiply": "mul", "divide": "div", "true_divide": "div", "__add__": "add", "__mul__": "mul"}

_CASTS = {
    "float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16,
    "double": torch.float64,
}  # fmt: skip

_OPS: dict[Any, tuple[str, Spec]] = {}


def register(function: Callable[..., Any], name: str, spec: Spec) -> None:
    """Give one of this package's ops (a graph node's target) its canonical name."""
    _OPS[function] = (name, spec)
    SPECS[name] = spec


def canonical(node: Any) -> Canon | None:
    """The canonical view of ``node``, or None when it is no operation that we know."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    if target in _OPS:
        name, spec = _OPS[target]
        return _made(name, spec.bind(args, kwargs))
    special = _SPECIAL.get(target)
    if special is not None:
        return special(node, args, kwargs)
    table: dict[Any, str] = _FUNCTIONS if node.op == "call_function" else _METHODS
    found = table.get(target)
    if found is None:
        return None
    canon = _made(found, SPECS[found].bind(args, kwargs))
    return _tidy(node, canon) if canon else None


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
    if canon.name == "transpose":
        x, a, b = canon.args
        lo, hi = sorted((_from_end(x, a), _from_end(x, b)))
        return Canon("transpose", (x, lo, hi))
    if canon.name == "matmul":
        return _as_linear(canon)
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


def _square(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canon | None:
    return Canon("pow", (args[0], 2))


def _reshape(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canon | None:
    t = facts.tensor(node)
    return None if t is None or facts.tensor(args[0]) is None else Canon(
        "reshape", (args[0], tuple(t.shape))
    )


def _expand(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canon | None:
    t = facts.tensor(node)
    return None if t is None else Canon("expand", (args[0], tuple(t.shape)))


def _getitem(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canon | None:
    """Indexing: a part of a chunk or split, or a slice of one dimension."""
    source, index = args
    rank = facts.ndim(source)
    if rank is None:
        return _part(source, index) or Canon("item", (source, index))
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
    full = facts.size(source, dim)
    if full is None or s.step not in (None, 1):
        return None
    if any(isinstance(b, fx.Node) or type(b) not in (int, type(None)) for b in (s.start, s.stop)):
        return None
    start, stop, _ = s.indices(full)
    return Canon("slice", (source, dim - rank, start, stop))


def _new_axis(node: fx.Node, source: Any, index: tuple[Any, ...]) -> Canon | None:
    """``x[:, :, None, :]`` is ``x.unsqueeze(2)``."""
    at = [d for d, i in enumerate(index) if i is None]
    others = [i for i in index if i is not None]
    rank = facts.ndim(node)
    if len(at) != 1 or rank is None or Ellipsis in index or any(i != slice(None) for i in others):
        return None
    return Canon("unsqueeze", (source, at[0] - rank))


def _part(source: Any, index: Any) -> Canon | None:
    """``x.chunk(2, -1)[i]`` and ``x.split(n, -1)[i]`` are slices of ``x``."""
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return None
    name = source.target if isinstance(source.target, str) else getattr(
        source.target, "__name__", ""
    )
    if name not in ("chunk", "split", "split_with_sizes"):
        return None
    x = source.args[0]
    dim = source.kwargs.get("dim", source.args[2] if len(source.args) > 2 else 0)
    parts, rank = facts.value(source), facts.ndim(x)
    if not isinstance(dim, int) or rank is None or not isinstance(parts, (tuple, list)):
        return None
    dim = dim - rank if dim >= 0 else dim
    widths = [p.shape[dim] for p in parts]
    if any(type(w) is not int for w in widths) or not 0 <= index < len(widths):
        return None
    start = sum(widths[:index])
    return Canon("slice", (x, dim, start, start + widths[index]), (source,))


_SPECIAL: dict[Any, Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Canon | None]] = {
    **dict.fromkeys(("to", "type_as", "type", *_CASTS), _cast),
    **dict.fromkeys(("square", torch.square), _square),
    **dict.fromkeys(("view", "reshape", "flatten", torch.reshape, torch.flatten), _reshape),
    **dict.fromkeys(("expand", "expand_as"), _expand),
    **dict.fromkeys(("t", torch.t), _t),
    operator.getitem: _getitem,
    getattr: _attribute,
}
