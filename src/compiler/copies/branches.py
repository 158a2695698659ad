"""Branches on values of tensors: captured as they are mostly taken, and checked at each call.

``if self.training and torch.rand(1) > p`` (a dropout of whole modules) and ``if t.isinf().any():
raise`` depend on values, which TorchDynamo does not have. Where a capture has stopped at one in a
method of a submodule, the submodule runs a copy of that method while the block is captured: to the
tracer its condition is a constant, and in the graph a node that compares (``held_branch``). Where
the values say otherwise, the original code runs, from the same random numbers.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import itertools
import textwrap
import types
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ...graph.opaque.branches import Place, held_branch
from .forward_copies import frozen, function_of
from .parameter_adapters import With

_SHARE = 10
"""One that goes another way in more than one call in so many is held so, and then not at all."""
_HOLD, _FACTORY = "__fusewright_hold", "__fusewright_factory"


class Branches:
    """The branches in one session's modules that are held, and which way."""

    def __init__(self) -> None:
        """Hold none yet."""
        self._lines: dict[types.FunctionType, set[int]] = {}
        self._calls = 0
        self._others: Counter[Place] = Counter()  # how often another way was taken than held
        self._changes: Counter[Place] = Counter()
        self._copies: dict[types.FunctionType, types.FunctionType | None] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def stopped(self, error: Exception, classes: Iterable[type]) -> bool:
        """Whether ``error`` ended a capture at a branch that is held from now on.

        ``classes`` are those of the modules below the region.
        """
        stack = getattr(error, "real_stack", None)
        if not stack or "Data-dependent branching" not in str(error):
            return False
        file, line = stack[-1].filename, stack[-1].lineno
        every = (f for c in classes for f in _methods(c).values())
        function = next((f for f in every if _has(f, file, line)), None)
        if function is None or line in self._lines.get(function, ()):
            return False
        self._lines.setdefault(function, set()).add(line)
        self._copies.clear()
        return self._copy(function) is not None

    def count_call(self) -> None:
        """A region is called."""
        self._calls += 1

    def changed(self, place: Place) -> bool:
        """The branch at ``place`` has gone another way; whether it is held another way now."""
        self._others[place] += 1
        if self._others[place] <= 1 + self._calls // _SHARE:
            return False
        self._calls, self._others[place] = 0, 0
        self._changes[place] += 1
        self._copies.clear()
        return True

    def finish(self, module: nn.Module, copy: Any) -> Any:
        """What a submodule runs for its forward, of which there may be a copy; None: what it is."""
        if not self._lines:
            return copy
        forward = function_of(module)
        held = {n: self._copy(f) for n, f in _methods(type(module)).items() if f in self._lines}
        methods = tuple((n, f) for n, f in held.items() if f is not None)
        if forward in self._lines and copy is None:
            copy, methods = self._copy(forward), tuple(m for m in methods if m[0] != "forward")
        return _calling(copy or forward, methods) if methods else copy

    def _copy(self, function: types.FunctionType) -> types.FunctionType | None:
        if function not in self._copies:
            self._copies[function] = self._held(function)
        return self._copies[function]

    def _held(self, function: types.FunctionType) -> types.FunctionType | None:
        """A copy of ``function`` whose branches are held; None if there are none."""
        code = function.__code__
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):  # its source is not there
            return None
        ast.increment_lineno(tree, code.co_firstlineno - 1)
        (definition,) = tree.body
        if not isinstance(definition, ast.FunctionDef) or _has_private_names(tree):
            return None
        conditions = [n for n in ast.walk(definition) if isinstance(n, (ast.If, ast.IfExp))]
        lines, count = self._lines[function], 0
        for node in conditions:
            span = range(node.test.lineno, (node.test.end_lineno or 0) + 1)
            if any(line in span for line in lines):
                raises = isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise)
                node.test, added = self._with_calls(node.test, not raises, code.co_filename)
                count += added
        if not count:
            return None
        definition.decorator_list = []
        names = [ast.arg(n, lineno=1, col_offset=0) for n in code.co_freevars]
        factory: Any = ast.parse(f"def {_FACTORY}(): pass").body[0]
        factory.args.args, factory.body = names, [definition]
        tree.body = [factory]
        flags = code.co_flags & __future__.annotations.compiler_flag
        compiled = compile(
            ast.fix_missing_locations(tree), code.co_filename, "exec", flags, dont_inherit=True
        )
        inner = _inner(_inner(compiled, _FACTORY), function.__name__)
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        scope = frozen(function.__globals__, {_HOLD: _hold})
        # by its code TorchDynamo tells this copy from an earlier one
        inner = inner.replace(co_name=f"{code.co_name}_held_{next(_serial)}")
        copy = types.FunctionType(
            inner, scope, function.__name__, function.__defaults__,
            tuple(cells[n] for n in inner.co_freevars),
        )  # fmt: skip
        copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, function.__module__
        return copy

    def _with_calls(self, test: Any, expected: bool, file: str) -> tuple[Any, int]:
        """A condition whose parts go through ``_hold``, and how many do."""
        if isinstance(test, ast.BoolOp):
            parts = [self._with_calls(v, expected, file) for v in test.values]
            test.values = [part for part, _ in parts]
            return test, sum(count for _, count in parts)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test.operand, count = self._with_calls(test.operand, not expected, file)
            return test, count
        place: Any = file, test.lineno, test.col_offset
        changes = self._changes[place]
        if changes > 1:
            return test, 0
        constants = [ast.Constant(expected is (changes == 0)), ast.Constant(place)]
        call = ast.Call(ast.Name(_HOLD, ast.Load()), [test, *constants], [])
        return ast.copy_location(call, test), 1


_serial = itertools.count(1)


def _hold(value: Any, taken: bool, place: Place) -> Any:
    # what a copy calls, and TorchDynamo follows: for a condition that is no tensor, itself
    if not isinstance(value, Tensor):
        return value
    held_branch(value, taken, place)
    return taken


def _methods(kind: type) -> dict[str, types.FunctionType]:
    """The functions that instances of a class have as methods, by name."""
    found = {n: v for base in reversed(kind.__mro__) for n, v in base.__dict__.items()}
    return {n: v for n, v in found.items() if isinstance(v, types.FunctionType)}


def _has(function: types.FunctionType, file: str, line: int) -> bool:
    code = function.__code__
    return code.co_filename == file and any(line == number for *_, number in code.co_lines())


def _has_private_names(tree: ast.AST) -> bool:
    """Whether the class of the code is part of a name in it."""
    names = (getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(tree))
    return any(n.startswith("__") and not n.endswith("__") for n in names)


def _inner(code: types.CodeType, name: str) -> types.CodeType:
    return next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)


@functools.cache
def _calling(forward: Any, methods: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """``forward``, which sees other methods of its module."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = {name: functools.partial(function, self) for name, function in methods}
        return forward(With(self, own), *args, **kwargs)

    return run
