"""Running a graph: as it is, and in fp64 whatever dtypes it asks for.

The fp64 results are the truth that verification measures by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ..graph.canon import canonical
from ..graph.opaque.autograd_functions import applied, is_captured, is_wrapped
from ..graph.opaque.functions import is_leaf
from ..graph.opaque.quantized import product
from ..kernels.linear.linear import quant_linear_reference
from ..kernels.linear.quantized import VALUES, Quantized, is_record


class Wide(TorchFunctionMode):
    """Makes casts to a floating-point dtype casts to fp64, in code that is no graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        wide = {k: _in_fp64(v) for k, v in (kwargs or {}).items()}
        return func(*(_in_fp64(a) for a in args), **wide)


class Plain(fx.Interpreter):
    """Runs a graph as it is, without making code of it for the few times that it runs."""

    def __init__(self, graph: fx.Graph, bodies: Mapping[str, Any]) -> None:
        holder = torch.nn.Module()
        for name, body in bodies.items():
            setattr(holder, name, body)
        super().__init__(holder, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False
        graph.owning_module = holder  # type: ignore[assignment]  # where a body is looked up

    def outputs(self, *args: Any) -> Any:
        """Run the graph; no intermediate value is kept."""
        try:
            return self.run(*args)
        finally:
            self.env, self.args_iter = {}, iter(())

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call ``target``; what an autograd function saves is freed in backward."""
        return super().call_function(applied if is_captured(target) else target, args, kwargs)


class Exact(Plain):
    """Runs a graph in fp64 whatever dtypes its nodes ask for."""

    def __init__(self, graph: fx.Graph, bodies: Mapping[str, Any]) -> None:
        super().__init__(graph, bodies)
        self._canon = {n: canonical(n) for n in graph.nodes}
        # what the reference of a stored weight computes by itself, in the weight's dtypes
        inner = {n for c in self._canon.values() if c and c.name == _STORED for n in c.via}
        self._skipped = {
            n for n in inner if not is_wrapped(n) and all(
                u in inner or ((c := self._canon[u]) and c.name == _STORED) for u in n.users
            )
        }  # fmt: skip

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n``; its casts are to fp64, and quantized products run as their reference does."""
        if n in self._skipped:
            return None
        if is_leaf(n.target):
            with Wide():
                return super().run_node(n)
        if n.op == "call_method" and n.target in ("float", "half", "bfloat16"):
            return self.fetch_args_kwargs_from_env(n)[0][0].double()
        canon = self._canon[n]
        if canon is not None and canon.name == _STORED:
            x, bias, *weight = fx.node.map_arg(canon.args, lambda a: self.env[a])
            return quant_linear_reference(x, Quantized(*weight), bias)
        if is_wrapped(n) and any(product(u) for u in n.users):
            return None  # run at its user
        if canon is not None and canon.name == "grouped_mm":  # torch's takes no fp64
            return _grouped_mm(*fx.node.map_arg(canon.args[:3], lambda a: self.env[a]))
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """The arguments of ``n``, with fp64 for every other floating-point dtype."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(_in_fp64(a) for a in args), {k: _in_fp64(v) for k, v in kwargs.items()}


def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each group of rows of ``x`` (S, K) times its own matrix of ``weight`` (E, K, N)."""
    groups = torch.tensor_split(x, ends[:-1].long().cpu())
    return torch.cat([rows @ matrix for rows, matrix in zip(groups, weight, strict=True)])


def packed(interior: Sequence[fx.Node]) -> set[Any]:
    """The inputs that hold packed weights: bytes, whatever dtype they are stored under."""
    weights = [weight for n in interior for weight in _quantized(n.args)]
    for n in interior:
        canon = canonical(n)
        if canon is not None and canon.name == _STORED:
            weights.append(Quantized(*canon.args[2:]))
    # a formula is run as it is, in the dtypes of its inputs
    return {t for w in weights for t in (w.tensors[:1] if w.kind in VALUES else w.tensors)}


def _quantized(argument: Any) -> Iterator[Quantized]:
    if not isinstance(argument, (tuple, list)):
        return
    if is_record(argument):
        yield Quantized(*argument)
    for inner in argument:
        yield from _quantized(inner)


_STORED = "quantized_linear"


def _in_fp64(argument: Any) -> Any:
    """``argument`` with fp64 for each floating-point dtype in it, however deep."""
    return fx.node.map_aggregate(argument, _wide_dtype)


def _wide_dtype(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def double(x: Any) -> Any:
    """``x`` in fp64 where it is a floating-point tensor."""
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
