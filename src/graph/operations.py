"""The operations that have a canonical view; a spelling is in ``FUNCTIONS`` or ``METHODS``."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Spec:
    """The arguments of one canonical operation.

    ``defaults`` are those of the trailing parameters; ``commutative`` says that the first two may
    be swapped; ``aliases`` are other names, as methods and functions differ.
    """

    params: tuple[str, ...]
    defaults: tuple[Any, ...] = ()
    commutative: bool = False
    aliases: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Spec:
        """The arguments that ``function`` declares, each of which may be given by name."""
        declared = inspect.signature(function).parameters.values()
        defaults = tuple(p.default for p in declared if p.default is not p.empty)
        return cls(tuple(p.name for p in declared), defaults)

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
    **dict.fromkeys(
        ("neg", "rsqrt", "sqrt", "reciprocal", "tanh", "sigmoid", "exp", "abs", "sin", "cos"),
        _UNARY,
    ),
    "add": _BINARY,
    "sub": Spec(("x", "y", "alpha"), (1,), False, (*_X, ("other", "y"))),
    "mul": Spec(("x", "y"), (), True, (*_X, ("other", "y"))),
    "div": Spec(("x", "y", "rounding_mode"), (None,), False, (*_X, ("other", "y"))),
    "pow": Spec(("x", "y"), (), False, (*_X, ("exponent", "y"))),
    "softmax": Spec(("x", "dim", "dtype"), (None,), aliases=_X),
    "max": Spec(("x", "dim", "keepdim"), (None, False), aliases=_X),
    "logsumexp": Spec(("x", "dim", "keepdim"), (False,), aliases=_X),
    "mean": _REDUCE,
    "sum": _REDUCE,
    "variance": Spec(("x", "dim", "correction", "keepdim"), (None, 1, False), aliases=_X),
    "var_mean": Spec(("x", "dim", "correction", "keepdim"), (None, 1, False), aliases=_X),
    "relu": Spec(("x", "inplace"), (False,), aliases=_X),
    "silu": Spec(("x", "inplace"), (False,), aliases=_X),
    "gelu": Spec(("x", "approximate"), ("none",), aliases=_X),
    "linear": Spec(("x", "weight", "bias"), (None,), aliases=_X),
    "addmm": Spec(
        ("bias", "x", "y", "beta", "alpha"),
        (1, 1),
        aliases=(("input", "bias"), ("mat1", "x"), ("mat2", "y")),
    ),
    "matmul": Spec(("x", "y"), aliases=(*_X, ("other", "y"))),
    "cat": Spec(("tensors", "dim"), (0,), aliases=(("axis", "dim"),)),
    "stack": Spec(("tensors", "dim"), (0,)),
    "view_as_complex": _UNARY,
    "view_as_real": _UNARY,
    "transpose": Spec(("x", "dim0", "dim1"), aliases=_X),
    "unsqueeze": Spec(("x", "dim"), aliases=_X),
    "contiguous": _UNARY,
    "clone": Spec(("x", "memory_format"), (None,), aliases=_X),
    "dropout": Spec(("x", "p", "training", "inplace"), (0.5, True, False), aliases=_X),
    "torch_rms_norm": Spec(
        ("x", "shape", "weight", "eps"), (None, None), aliases=(*_X, ("normalized_shape", "shape"))
    ),
    "torch_layer_norm": Spec(
        ("x", "shape", "weight", "bias", "eps", "cudnn_enable"),
        (None, None, 1e-5, True),
        aliases=(*_X, ("normalized_shape", "shape")),
    ),
    "detach": _UNARY,
    "eye": Spec(("n", "m", "dtype", "device", "layout", "requires_grad"), (None,) * 5),
    "linalg_norm": Spec(
        ("x", "ord", "dim", "keepdim", "dtype"), (None, None, False, None), aliases=(("A", "x"),)
    ),
    "sort": Spec(("x", "dim", "descending", "stable"), (-1, False, None), aliases=_X),
    "floordiv": Spec(("x", "y"), aliases=(*_X, ("other", "y"))),
    "ge": Spec(("x", "y"), aliases=(*_X, ("other", "y"))),
    "clamp": Spec(("x", "min", "max"), (None, None), aliases=_X),
    "masked_fill": Spec(("x", "mask", "value"), aliases=_X),
    "histc": Spec(("x", "bins", "min", "max"), (100, 0, 0), aliases=_X),
    "cumsum": Spec(("x", "dim", "dtype"), (None,), aliases=_X),
    "grouped_mm": Spec(
        ("x", "weight", "offs", "bias", "out_dtype"),
        (None, None, None),
        aliases=(("input", "x"), ("mat_a", "x"), ("mat_b", "weight")),
    ),
    "cross_entropy": Spec(
        (
            "x",
            "target",
            "weight",
            "size_average",
            "ignore_index",
            "reduce",
            "reduction",
            "label_smoothing",
        ),
        (None, None, -100, None, "mean", 0.0),
        aliases=_X,
    ),
    "sdpa": Spec(
        ("q", "k", "v", "mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
        (None, 0.0, False, None, False),
        aliases=(("query", "q"), ("key", "k"), ("value", "v"), ("attn_mask", "mask")),
    ),
    # the ones below are made by the functions of this file, not by `bind`
    "cast": Spec(("x", "dtype")),
    "slice": Spec(("x", "dim", "start", "stop")),
    "stride": Spec(("x", "dim", "start", "step")),
    "reshape": Spec(("x", "shape")),
    "expand": Spec(("x", "shape")),
    "item": Spec(("x", "index")),
    "index": Spec(("x", "rows")),
}

FUNCTIONS: dict[Any, str] = {
    operator.add: "add", torch.add: "add", operator.sub: "sub", torch.sub: "sub",
    operator.mul: "mul", torch.mul: "mul", torch.multiply: "mul",
    operator.truediv: "div", torch.div: "div", torch.divide: "div", torch.true_divide: "div",
    operator.neg: "neg", torch.neg: "neg", torch.negative: "neg",
    operator.pow: "pow", torch.pow: "pow",
    torch.rsqrt: "rsqrt", torch.sqrt: "sqrt", torch.reciprocal: "reciprocal",
    torch.tanh: "tanh", F.tanh: "tanh",
    torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", torch.exp: "exp", torch.abs: "abs",
    torch.sin: "sin", torch.cos: "cos",
    torch.softmax: "softmax", torch.max: "max", torch.logsumexp: "logsumexp",
    torch.mean: "mean", torch.sum: "sum", F.relu: "relu", torch.relu: "relu",
    F.silu: "silu", F.gelu: "gelu", torch._C._nn.gelu: "gelu",
    F.linear: "linear", torch._C._nn.linear: "linear",
    torch.addmm: "addmm", torch.matmul: "matmul", operator.matmul: "matmul",
    torch.cat: "cat", torch.concat: "cat", torch.stack: "stack",
    torch.view_as_complex: "view_as_complex", torch.view_as_real: "view_as_real",
    torch.transpose: "transpose",
    torch.unsqueeze: "unsqueeze", F.dropout: "dropout",
    F.rms_norm: "torch_rms_norm", torch.rms_norm: "torch_rms_norm",
    F.layer_norm: "torch_layer_norm", torch.layer_norm: "torch_layer_norm",
    F.cross_entropy: "cross_entropy", F.scaled_dot_product_attention: "sdpa",
    torch.sort: "sort", operator.floordiv: "floordiv", torch.floor_divide: "floordiv",
    operator.ge: "ge", torch.ge: "ge", torch.clamp: "clamp", torch.masked_fill: "masked_fill",
    torch.histc: "histc", torch.cumsum: "cumsum", torch._grouped_mm: "grouped_mm",
    torch.clone: "clone", torch.detach: "detach", torch.eye: "eye",
    torch.linalg.norm: "linalg_norm",
}  # fmt: skip

METHODS: dict[str, str] = {
    name: name
    for name in (
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "pow",
        "rsqrt",
        "sqrt",
        "reciprocal",
        "tanh",
        "sigmoid",
        "exp",
        "abs",
        "sin",
        "cos",
        "mean",
        "sum",
        "softmax",
        "max",
        "logsumexp",
        "relu",
        "matmul",
        "transpose",
        "unsqueeze",
        "contiguous",
        "clone",
        "detach",
        "ge",
        "clamp",
        "masked_fill",
        "sort",
        "histc",
        "cumsum",
    )
} | {"multiply": "mul", "divide": "div", "true_divide": "div", "__add__": "add", "__mul__": "mul"}

LIBRARY_OPS = {"transformers.grouped_mm_fallback": "grouped_mm"}
"""Operators of other libraries, by the name under ``torch.ops``."""

CASTS = {
    "float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16,
    "double": torch.float64,
}  # fmt: skip

if hasattr(F, "grouped_mm"):
    FUNCTIONS[F.grouped_mm] = "grouped_mm"
