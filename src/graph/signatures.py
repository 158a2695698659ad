"""What the function that a node calls takes, by its schema: each argument in its place."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import facts


@dataclass(frozen=True)
class Parameter:
    """One argument of a signature; ``written``: the operator writes into it; ``listed``: a list."""

    name: str
    keyword: bool
    written: bool = False
    listed: bool = False

    def takes(self, value: Any) -> bool:
        """Whether ``value`` may be given: no tensor in the place of a list."""
        return not self.listed or facts.tensor(value) is None


_Signature = tuple[Parameter, ...]


def bound(node: fx.Node) -> list[dict[Parameter, Any]]:
    """The arguments in their places, for each signature that they fit."""
    candidates = (
        _bind(signature, node.args, node.kwargs) for signature in _signatures(node.op, node.target)
    )
    return [binding for binding in candidates if binding is not None]


def _bind(
    signature: _Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[Parameter, Any] | None:
    places = [p for p in signature if not p.keyword]
    by_name = {p.name: p for p in signature}
    if len(args) > len(places):
        return None
    binding = dict(zip(places, args, strict=False))
    for name, value in kwargs.items():
        parameter = by_name.get(name) or by_name.get(_OTHER_NAMES.get(name, ""))
        if parameter is None or parameter in binding:
            return None
        binding[parameter] = value
    return binding if all(p.takes(value) for p, value in binding.items()) else None


_OTHER_NAMES = {"input": "self", "axis": "dim"}
"""Names of arguments in Python, and in the schema."""


@functools.cache
def _signatures(op: str, target: Any) -> tuple[_Signature, ...]:
    """What the operator, or the function of PyTorch in Python, takes; one for each overload."""
    schemas = _schemas(op, target)
    if schemas:
        return tuple(
            tuple(
                Parameter(a.name, a.kwarg_only, _is_written(a), "List" in str(a.type))
                for a in schema.arguments
            )
            for schema in schemas
        )
    if not isinstance(target, types.FunctionType):
        return ()
    kinds = inspect.Parameter
    return (
        tuple(
            Parameter(p.name, p.kind is kinds.KEYWORD_ONLY)
            for p in inspect.signature(target).parameters.values()
            if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        ),
    )


def _is_written(argument: Any) -> bool:
    info = argument.alias_info
    return info is not None and info.is_write and "Tensor" in str(argument.type)


def _schemas(op: str, target: Any) -> tuple[Any, ...]:
    return tuple(overload._schema for overload in overloads(op, target))


_COMPILED = (types.BuiltinFunctionType, types.MethodDescriptorType)


@functools.cache
def overloads(op: str, target: Any) -> tuple[Any, ...]:
    """The operators that a node with this target may end in."""
    if isinstance(target, torch._ops.OpOverload):
        return (target,)
    if not isinstance(target, torch._ops.OpOverloadPacket):
        if op == "call_function" and not isinstance(target, _COMPILED):
            return ()
        operators = packet(name_of(target)) if op == "call_method" or is_torch(target) else None
        if operators is None:
            return ()
        target = operators
    return tuple(getattr(target, name) for name in target.overloads())


def packet(name: str) -> Any:
    """All overloads of PyTorch's operator of this name, or None."""
    result = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    return result if isinstance(result, torch._ops.OpOverloadPacket) else None


@functools.cache
def defaults(target: Any) -> Mapping[str, Any]:
    """The values of arguments that are left out, by name."""
    values: dict[str, Any] = {}
    if isinstance(target, types.FunctionType):
        for p in inspect.signature(target).parameters.values():
            values[p.name] = p.default
    else:
        for schema in _schemas("call_function", target):
            values |= {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {k: v for k, v in values.items() if v is not inspect.Parameter.empty}


_PYTHON = ("_operator", "operator", "builtins", "math")


def is_builtin(target: Any) -> bool:
    """Whether a function is PyTorch's or Python's own, or an operator registered with PyTorch."""
    return is_torch(target) or module_of(target).partition(".")[0] in _PYTHON


def is_torch(target: Any) -> bool:
    """Whether a function is PyTorch's own, or an operator that is registered with it."""
    return isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) or (
        module_of(target).partition(".")[0] == "torch"
    )


def module_of(target: Any) -> str:
    """Where a function comes from; methods of PyTorch's classes bear it in what they belong to."""
    module = getattr(target, "__module__", None)
    if module is None:
        module = getattr(getattr(target, "__objclass__", None), "__module__", None)
    return str(module or getattr(type(target), "__module__", ""))


def name_of(target: Any) -> str:
    """The bare name of a function or a method."""
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))


def names_in(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in ``code`` and in what it defines."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(names_in, inner))
