"""Graphs as text: for people, golden files and dumps."""

from __future__ import annotations

import keyword
import pathlib
import re
from typing import Any

from torch import fx

from . import facts


def text(module: fx.GraphModule) -> str:
    """The graph as one line per node, with dtypes and shapes; nested graphs follow."""
    # stable: names are numbers in graph order, and inputs keep only their last name
    parts = []
    for inner in facts.nested(module):
        names: dict[fx.Node, str] = {}
        lines = []
        for node in inner.graph.nodes:
            names[node] = f"%{len(names)}"
            lines.append(_line(node, names))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.op == "placeholder":
        return f"{names[node]} = input {_input_name(str(node.target))}: {facts.shape_text(node)}"
    args = ", ".join(
        [_show(a, names) for a in node.args]
        + [f"{k}={_show(v, names)}" for k, v in node.kwargs.items()]
    )
    if node.op == "output":
        return f"return {_show(node.args[0], names)}"
    if node.op == "get_attr":
        return f"{names[node]} = self.{node.target}"
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    name = f".{name}" if node.op == "call_method" else name
    mark = " *" if "fusewright_rule" in node.meta else ""
    kind = f": {facts.shape_text(node)}" if facts.tensor(node) is not None else ""
    return f"{names[node]} = {name}({args}){kind}{mark}"


def _input_name(name: str) -> str:
    """The readable end of Dynamo's ``L_self_modules_mlp_modules_up_proj_parameters_weight_``."""
    for noise in ("L_self_modules_", "L_self_", "L_args_", "L_kwargs_", "L_"):
        if name.startswith(noise):
            name = name[len(noise) :]
            break
    return name.replace("_modules_", ".").replace("_parameters_", ".").strip("_")


def _show(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names.get(value, value.name)
    if hasattr(value, "_fields"):
        return f"{type(value).__name__}({_fields(value, names)})"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_show(v, names) for v in value)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if isinstance(value, slice):
        bounds = (value.start, value.stop)
        return ":".join("" if b is None else _show(b, names) for b in bounds)
    return "..." if value is Ellipsis else str(value)


def _fields(record: Any, names: dict[fx.Node, str]) -> str:
    """The fields of a named tuple, without those that have their defaults."""
    usual, parts = record._field_defaults, []
    for name, value in zip(record._fields, record, strict=True):
        if name not in usual:
            parts.append(_show(value, names))
        elif value != usual[name]:
            parts.append(f"{name}={_show(value, names)}")
    return ", ".join(parts)


def source(module: fx.GraphModule, frame: int, kind: str, stage: str) -> str:
    """The graph as runnable Python, with a line above it that says which one it is."""
    code = module.print_readable(print_output=False, include_stride=False)
    return f"# graph {frame}, {kind} region, {stage}\n{_tidy(code)}\n"


_ALIAS = re.compile(r"^ +(l_\w+) = (L_\w+)\n", re.MULTILINE)
_RELEASE = re.compile(r"; ( \w+ =)+ None$", re.MULTILINE)


def _tidy(code: str) -> str:
    """Readable names for the inputs, and no lines that only rename or release."""
    code = _RELEASE.sub("", code)
    words = set(re.findall(r"\w+", code))
    names: dict[str, str] = {}
    for short, name in _ALIAS.findall(code):
        plain = _input_name(name).replace(".", "_")
        if not plain.isidentifier() or keyword.iskeyword(plain) or plain in words:
            plain = short
        words.add(plain)
        names[short] = names[name] = plain
    code = _ALIAS.sub("", code)
    return re.sub(r"\b[lL]_\w+", lambda m: names.get(m[0], m[0]), code)


def dump(folder: str, code: str, frame: int, kind: str, stage: str) -> None:
    """Write the ``source`` of a graph below ``folder``."""
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{frame:03d}-{kind}-{stage}.py").write_text(code)
