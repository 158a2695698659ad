"""The graphs of an optimized model as Python, for people to read: before the rules and after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from .graph_log import representative
from .install import active


@dataclass(frozen=True)
class Listing:
    """One captured graph, as captured and as it runs, and the paths of the modules that run it."""

    kind: str
    modules: tuple[str, ...]
    class_name: str
    before: str
    after: str

    def for_module(self, path: str) -> Listing:
        """The same graph, for one of its modules."""
        return replace(self, modules=(path,))


def keep_code(model: nn.Module) -> None:
    """Keep the code of every graph of an optimized model that is captured from now on."""
    for module in model.modules():
        record = active(module)
        if record is not None:
            record.session.log.keep_code()


def listings(model: nn.Module) -> list[Listing]:
    """One listing for each kind of graph that ran since ``keep_code``, in the model's order.

    Modules of one class in whose graphs the rules found the same are one kind: equal layers, but
    not the layers of a hybrid model that do different things.
    """
    by_key: dict[object, Listing] = {}
    for path, module in model.named_modules():
        record = active(module)
        graph = record and representative(record.session.log.graphs.get(module, []))
        if record is None or not graph or not graph.before:
            continue
        findings = tuple((f.rule, f.status, f.home, f.reason) for f in graph.findings)
        key = (record.kind, type(module), findings)
        listing = by_key.get(key)
        if listing is None:
            name = type(module).__name__
            by_key[key] = Listing(record.kind, (path,), name, graph.before, graph.after)
        else:
            by_key[key] = replace(listing, modules=(*listing.modules, path))
    return list(by_key.values())


def find_listing(model: nn.Module, found: Iterable[Listing], wanted: str) -> Listing | None:
    """The listing of the module at ``wanted``, a path or the end of one, or of its region."""
    # ``""`` is the model
    owners = {path: listing for listing in found for path in listing.modules}
    for name, _ in model.named_modules():
        if name == wanted or (wanted and name.endswith(f".{wanted}")):
            path = name
            while path and path not in owners:
                path = path.rpartition(".")[0]
            if path in owners:
                return owners[path].for_module(path)
    return None
