"""Which callables of a model are captured, by structure alone.

Four kinds of region:

* **block**: an element of a repeated ``ModuleList``: a decoder layer, whatever its class is called.
* **norm**: a leaf outside the blocks with nothing but vectors as parameters, or with an epsilon:
  the final norm.
* **projector**: a module outside the blocks that is made of some linears and what is between them:
  what leads from an encoder of pictures to the language model, or pools.
* **head**: the causal LM's own forward with the backbone left outside: head, shift and loss.

A block or projector that cannot be captured as a whole gives way to its ``parts``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..sharding import divided_by
from .bypass import is_container

_LOSS_ARGUMENT = "labels"
"""The one name that models share: what Trainer, and everybody, passes for a loss."""


@dataclass(frozen=True)
class Region:
    """One module whose forward is captured."""

    path: str  # as in ``named_modules()``
    module: nn.Module
    kind: str  # ``"block"``, ``"norm"``, ``"projector"``, ``"head"`` or ``"backbone"``
    # for a head, the paths, name by name, to the submodules that stay outside
    outside: tuple[tuple[str, ...], ...] = ()
    # for a head, these submodules; then those inside that hold all blocks of one, which the head
    # may call in its place. Empty where the head calls the blocks itself.
    backbone: tuple[nn.Module, ...] = ()
    in_head: bool = False  # for a block, whether a head that is captured calls it


def find(model: nn.Module) -> list[Region]:
    """The regions of ``model``, in its own order; none when it has no repeated blocks."""
    blocks = dict(_unwrapped(path, block) for path, block in _blocks(model))
    if not blocks:
        return []
    inside, blocks_in = tuple(f"{path}." for path in blocks), set(blocks.values())
    regions = []
    head = _head(model, list(blocks.values()))
    outside = _outside(head) if head else []
    in_head = set(head.module.modules()).difference(*(m.modules() for m in outside)) if head else ()
    called = {m for o in outside if is_container(o) for m in o.modules()}
    tables = {*map(_output_embeddings, model.modules()), input_embeddings(model)}
    around = {m for m in model.modules() if not (tables | blocks_in).isdisjoint(m.modules())}
    for path, module in model.named_modules():
        if path in blocks:
            regions.append(Region(path, module, "block", in_head=module in called))
        elif path.startswith(inside) or module in in_head:
            continue
        elif _is_norm(module):
            regions.append(Region(path, module, "norm"))
        elif module not in around and _is_projector(module):
            regions.append(Region(path, module, "projector"))
            inside += (f"{path}.",)
    if head is not None:
        regions.append(head)
    return regions + _makers_of_caches(model, blocks, head)


def _makers_of_caches(
    model: nn.Module, blocks: dict[str, nn.Module], head: Region | None
) -> list[Region]:
    """What is around blocks and may make a cache for them, besides the head and its backbone."""
    known = (head.module, *head.backbone) if head is not None else ()
    around = {path[:i] for path in blocks for i, c in enumerate(path) if c == "."} | {""}
    return [
        Region(path, module, "backbone")
        for path, module in model.named_modules()
        if path in around
        and not (module in known or is_container(module) or takes_labels(module))
        and has_cache_switch(module)
    ]


def has_cache_switch(module: nn.Module) -> bool:
    """Whether a module's forward takes ``use_cache``, and need not be told."""
    switch = inspect.signature(module.forward).parameters.get("use_cache")
    return switch is not None and switch.default is None


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The elements of the outermost repeated lists of modules."""
    stacks: list[str] = []
    for path, module in model.named_modules():
        if any(path == t or path.startswith(f"{t}.") for t in stacks):
            continue
        if isinstance(module, nn.ModuleList) and _is_stack(elements := _elements(module)):
            stacks.append(path)
            paths = {block: name for name, block in reversed(elements.items())}  # each once
            for name, block in elements.items():
                if paths[block] == name:
                    yield f"{path}.{name}" if path else name, block
        elif _is_hinted(module) and not any(_is_hinted(m) for m in list(module.modules())[1:]):
            stacks.append(path)
            yield path, module


_WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What PyTorch's wrappers of a single module call it: FSDP1's, and those of checkpoints."""


def _unwrapped(path: str, block: nn.Module) -> tuple[str, nn.Module]:
    """The block inside the wrappers that it has, with its path."""
    # what they do (gather, checkpoint, offload) runs around its graph: in one, FSDP1's and the
    # offload's code cannot be captured
    while name := next((n for n in _WRAPPED if n in block._modules), None):
        path, block = f"{path}.{name}", block.get_submodule(name)
    return path, block


def _elements(modules: nn.ModuleList) -> dict[str, nn.Module]:
    """What a list of modules holds, by path, one module twice too; a list in it is a part of it."""
    elements: dict[str, nn.Module] = {}
    for name, module in modules._modules.items():
        if module is None:
            continue
        if isinstance(module, nn.ModuleList):
            elements |= {f"{name}.{n}": m for n, m in _elements(module).items()}
        else:
            elements[name] = module
    return elements


def _is_stack(elements: dict[str, nn.Module]) -> bool:
    """At least two composite modules of one class (or of few: hybrids alternate)."""
    inner = [_unwrapped("", m)[1] for m in elements.values()]
    if len(inner) < 2:
        return len(inner) == 1 and _is_hinted(inner[0])
    kinds = {type(m) for m in inner}
    composite = all(any(True for _ in m.children()) for m in inner)
    return composite and (len(kinds) < len(inner) or all(_is_hinted(m) for m in inner))


def _is_hinted(module: nn.Module) -> bool:
    """Transformers marks its decoder layers by a base class; a hint, not a requirement."""
    return any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)


def _is_norm(module: nn.Module) -> bool:
    """A leaf with nothing but vectors, or with no parameter but an epsilon."""
    parameters = list(module.parameters(recurse=False))
    if any(True for _ in module.children()):
        return False
    if not parameters:
        attributes = vars(module)
        has_eps = any("eps" in name and isinstance(v, float) for name, v in attributes.items())
        return has_eps or "normalized_shape" in attributes
    return all(p.dim() == 1 for p in parameters)


_MOST_LINEARS = 16
"""What has more is no projector, but a network whose layers are in no list."""


def _is_projector(module: nn.Module) -> bool:
    """A composite module with linears in it, but not many."""
    if is_container(module) or not any(True for _ in module.children()):
        return False
    return 0 < sum(isinstance(m, nn.Linear) for m in module.modules()) <= _MOST_LINEARS


def parts(block: nn.Module) -> list[Region]:
    """The regions inside a block that cannot be captured as one graph."""
    # its children, and the elements of its lists: composite ones as blocks, norms as norms; lone
    # projections are none
    regions = []
    for name, child in block.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            regions += parts(child)
        elif any(True for _ in child.children()):
            regions.append(Region(name, child, "block"))
        elif _is_norm(child):
            regions.append(Region(name, child, "norm"))
    return regions


def undivided_parts(block: nn.Module) -> list[Region]:
    """The ``parts`` of a block; one with a module that an engine divides gives way to its parts."""
    regions = []
    for part in parts(block):
        if not any(map(divided_by, part.module.modules())):
            regions.append(part)
        elif divided_by(part.module) is None:
            regions += undivided_parts(part.module)
    return regions


def _head(model: nn.Module, blocks: list[nn.Module]) -> Region | None:
    """The outermost module that owns both blocks and the projection of their results to logits."""
    # A model may not say where its projection is, or have no module for it (a tied head is one
    # matmul): then it is the innermost module that owns all blocks and takes labels.
    inner = None
    for path, module in model.named_modules():
        holders = [c for c in module.children() if _blocks_in(c, blocks)]
        head = _output_embeddings(module)
        if not holders or module in blocks:
            continue
        if head is not None and head not in {m for c in holders for m in c.modules()}:
            region = _region_of_head(path, module, blocks)
            # one that calls the blocks of several stacks itself is more than a head
            return region if region.backbone or len(region.outside) == 1 else None
        if takes_labels(module) and len(_blocks_in(module, blocks)) == len(blocks):
            inner = _region_of_head(path, module, blocks)
    return inner


def _region_of_head(path: str, module: nn.Module, blocks: list[nn.Module]) -> Region:
    """The head region of ``module``, which owns blocks."""
    paths = list(_paths_outside(module, blocks))
    outside = [module.get_submodule(".".join(names)) for names in paths]
    backbone = [m for o in outside if not is_container(o) for m in _chain(o, blocks)]
    return Region(path, module, "head", tuple(paths), tuple(dict.fromkeys(backbone)))


def _paths_outside(module: nn.Module, blocks: list[nn.Module]) -> Iterator[tuple[str, ...]]:
    """The paths to what is called with blocks in it, or else to the lists of blocks."""
    for name, child in module.named_children():
        if _unwrapped("", child)[1] in blocks or not _blocks_in(child, blocks):
            continue
        inner = list(_paths_outside(child, blocks)) if is_container(child) else []
        yield from ((name, *rest) for rest in inner or [()])


def _outside(head: Region) -> list[nn.Module]:
    return [head.module.get_submodule(".".join(names)) for names in head.outside]


def _chain(module: nn.Module, blocks: list[nn.Module]) -> tuple[nn.Module, ...]:
    """``module``, and what is inside it around all of its blocks."""
    chain, inside = [module], _blocks_in(module, blocks)
    while inner := [c for c in chain[-1].children() if _blocks_in(c, blocks) == inside]:
        if isinstance(inner[0], nn.ModuleList) or inner[0] in blocks:
            break
        chain.append(inner[0])
    return tuple(chain)


def _blocks_in(module: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    members = set(module.modules())
    return [b for b in blocks if b in members]


def _output_embeddings(module: nn.Module) -> nn.Module | None:
    getter = getattr(module, "get_output_embeddings", None)
    try:
        head = getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        return None
    return head if isinstance(head, nn.Module) else None


def takes_labels(module: nn.Module) -> bool:
    """Whether ``module`` computes a loss itself, when it is given labels."""
    return _LOSS_ARGUMENT in inspect.signature(module.forward).parameters


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The table of tokens: as the model says, else the largest embedding that it has."""
    try:
        table = getattr(model, "get_input_embeddings", lambda: None)()
    except (NotImplementedError, AttributeError):
        table = None
    if isinstance(table, nn.Module):
        return table
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(tables, key=lambda m: m.num_embeddings, default=None)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first input of a call, if it is a tensor, or else the first tensor given by its name."""
    x = args[0] if args else None
    if isinstance(x, Tensor):
        return x
    return next((v for v in kwargs.values() if isinstance(v, Tensor)), None)


def leading_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(batch, sequence) of the first 3-dimensional floating-point argument.

    Where there is none, the first argument may be one row: (1, sequence) of a matrix.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
            return value.shape[0], value.shape[1]
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    is_row = first is not None and first.dim() == 2 and first.is_floating_point()
    return (1, first.shape[0]) if first is not None and is_row else None


def mark_dynamic(values: Any, sizes: tuple[int, int]) -> None:
    """Tell Dynamo which dimensions of the arguments are batch and sequence."""
    # the marks are weak: where the code needs a number, the dimension becomes one
    batch, sequence = sizes
    for value in values:
        if isinstance(value, (tuple, list)):
            mark_dynamic(value, sizes)
        elif isinstance(value, Tensor) and value.dim() == 1 and not value.is_floating_point():
            torch._dynamo.maybe_mark_dynamic(value, 0)  # boundaries of segments, as of images
        elif isinstance(value, Tensor):
            has_features = value.dim() == 3 or (value.dim() == 2 and value.is_floating_point())
            for d, size in enumerate(value.shape):
                features = has_features and d == value.dim() - 1
                if (d == 0 and size == batch) or (size == sequence and not features):
                    torch._dynamo.maybe_mark_dynamic(value, d)


def unmark(values: Iterable[Any]) -> None:
    """Take away the marks that a tensor has had from another region, which has made or taken it."""
    for value in values:
        if isinstance(value, Tensor) and vars(value).pop("_dynamo_weak_dynamic_indices", None):
            others = any(name.startswith("_dynamo_") for name in vars(value))
            if not others:
                vars(value).pop("_has_dynamo_dim_marking", None)
