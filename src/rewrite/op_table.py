"""The ops that rewrites may call, by name, and how the matcher reads them afterwards."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

from .. import kernels
from ..graph.canon import register
from ..graph.opaque.segments import attend_apart
from ..graph.opaque.stacks import updated_stack
from ..graph.operations import Spec
from ..kernels.attention.first_keys import sample_mask
from ..kernels.moe.moe_experts import inverse_permutation
from ..kernels.op import Op


def _records() -> Iterator[Op]:
    for folder in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        if not folder.ispkg:
            continue
        package = importlib.import_module(folder.name)
        for file in pkgutil.iter_modules(package.__path__, f"{folder.name}."):
            if file.name.endswith("_triton"):  # imports Triton
                continue
            values = vars(importlib.import_module(file.name)).values()
            yield from (value for value in values if isinstance(value, Op))


OPS: tuple[Op, ...] = tuple({op.name: op for op in _records()}.values())

TABLE: dict[str, Callable[..., Any]] = {op.name: op.call for op in OPS}
"""Op name -> the function that a graph node calls."""

OF_CALL: dict[Any, Op] = {op.call: op for op in OPS}
"""That function -> the op."""

for _op in OPS:
    register(_op.call, _op.name, Spec.of(_op.call))
register(inverse_permutation, "inverse_permutation", Spec.of(inverse_permutation))
register(updated_stack, "updated_stack", Spec.of(updated_stack))
register(attend_apart, "split_attention", Spec.of(attend_apart))
register(sample_mask, "sample_mask", Spec.of(sample_mask))
