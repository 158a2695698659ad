"""The graphs of an optimized model as Python, for people to read: before the rules and after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from .graph_log import representative
from .install import active


@dataclass(frozen=True)
class Listing:
    """One captured graph and the modules that it stands for.

    Attributes:
        kind: ``"block"``, ``"norm"`` or ``"head"``.
        modules: paths, as in ``named_modules()``; one after ``for_module``.
        class_name: of the modules.
        before: the graph as it was captured, as Python.
        after: the graph as it runs.
    """

    kind: str
    modules: tuple[str, ...]
    class_name: str
    before: str
    after: str

    def for_module(self, path: str) -> Listing:
        """The same graph, for one of its modules."""
        return replace(self, modules=(path,))


def keep_code(model: nn.Module) -> None:
    """Have the code of every graph kept that is captured from now on.

    Args:
        model: an optimized model.
    """
    for module in model.modules():
        record = active(module)
        if record is not None:
            record.session.log.keep_code()


def listings(model: nn.Module) -> list[Listing]:
    """One listing for each kind of graph in ``model``, in the model's order.

    Modules of one class in whose graphs the rules found the same are one kind: equal layers, but
    not the layers of a hybrid model that do different things.

    Args:
        model: an optimized model that has run since ``keep_code``.
    """
    found: dict[object, Listing] = {}
    for path, module in model.named_modules():
        record = active(module)
        graph = record and representative(record.session.log.graphs.get(module, []))
        if record is None or not graph or not graph.before:
            continue
        findings = tuple((f.rule, f.status, f.home, f.reason) for f in graph.findings)
        key = (record.kind, type(module), findings)
        known = found.get(key)
        if known is None:
            name = type(module).__name__
            found[key] = Listing(record.kind, (path,), name, graph.before, graph.after)
        else:
            found[key] = replace(known, modules=(*known.modules, path))
    return list(found.values())


def find_listing(model: nn.Module, found: Iterable[Listing], wanted: str) -> Listing | None:
    """The listing of the module ``wanted``, or of the region that it lies in.

    Args:
        model: an optimized model.
        found: its listings.
        wanted: a path, whole or its end: ``model.layers.0.mlp``, ``layers.0``; ``""`` is the model.
    """
    owners = {path: listing for listing in found for path in listing.modules}
    for name, _ in model.named_modules():
        if name == wanted or (wanted and name.endswith(f".{wanted}")):
            path = name
            while path and path not in owners:
                path = path.rpartition(".")[0]
            if path in owners:
                return owners[path].for_module(path)
    return None
