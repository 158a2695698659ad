"""Tensor parallelism: the products of each layer divided between processes, by DTensor.

transformers' ``tp_plan`` of a model says which layer is divided how, and torch's
``parallelize_module`` does it. Linears are divided by columns or by rows, with their adapters.
Everything else is whole on each process: norms, embeddings, the output head, and experts.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from ...errors import RecipeError

_KEY = "tensor_parallel_size"

_COLUMNS = ("colwise", "colwise_rep", "colwise_gather_output")
_ROWS = ("rowwise", "rowwise_rep", "rowwise_split_input")
_WHOLE = ("colwise_rep", "colwise_gather_output", "rowwise_rep", "rowwise_split_input")
"""The styles with whole activations between them; between others, each process has its part."""
_HEADS = "replicated_with_grad_allreduce"
_LEFT = ("embedding_rowwise", "embedding_colwise", "moe_tp_experts", "replicate")
"""The styles of what can be left whole, with all that is in it, without a change elsewhere."""


class HeadwiseNorm(ParallelStyle):
    """A norm of each attention head, where a process has some of the heads.

    Its weight is whole. The gradients that it gets from the heads of all processes are added up.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        enter: Any = _heads_in  # its type says that nothing is returned
        return distribute_module(module, device_mesh, _replicated, enter, _local)


def _replicated(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for key, parameter in list(module.named_parameters(recurse=False)):
        whole = distribute_tensor(parameter, mesh, [Replicate()], src_data_rank=None)
        module.register_parameter(key, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _heads_in(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    x, *rest = inputs  # (B, T, heads, D)
    return (DTensor.from_local(x, mesh, [Shard(x.dim() - 2)], run_check=False), *rest)


def _local(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
    return output.to_local()


def divide(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the layers of a model, with its adapters, over a mesh of one dimension, in place.

    The model is whole, and the same on every process; RecipeError if it cannot be divided so.
    """
    base = base_model(model)
    require_divisible(base, mesh.size())
    on_gpu = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    for name, style in _rules(base):
        for module, parallel_style in _styles(base.get_submodule(name), name, style):
            # without src_data_rank, the parts of the first process are sent to the others
            parallel_style.src_data_rank = None
            parallelize_module(module.to(device), mesh, parallel_style)
            _free(module)


def require_divisible(model: nn.Module, size: int) -> None:
    """Check that transformers has a plan for a model, and that it divides by ``size`` processes.

    The model has no adapters; it may be on the meta device.

    Raises:
        RecipeError: it has none, or it does not, with what to do instead.
    """
    instead = f"leave {_KEY} out, and use fsdp_config"
    name = type(model).__name__
    rules = _rules(model)
    if not any(style in _COLUMNS + _ROWS for _, style in rules):
        raise RecipeError(f"{_KEY}: transformers has no plan for {name}: {instead}")
    unknown = sorted({style for _, style in rules} - {*_COLUMNS, *_ROWS, _HEADS})
    if unknown:
        raise RecipeError(f"{_KEY}: {name} has layers of the kind {unknown[0]}: {instead}")
    config = _text_config(model)
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if isinstance(heads, int) and heads % size and _divides_heads(rules):
            raise RecipeError(
                f"{_KEY}: {size} processes cannot share the {heads} heads of {name} ({key}): set a "
                f"divisor of {heads}"
            )
    for path, style in rules:
        module = model.get_submodule(path)
        if style == _HEADS:
            if any(parameter.dim() != 1 for parameter in module.parameters()):
                raise RecipeError(f"{_KEY}: {path} has a weight for each head: {instead}")
            continue
        features = "out_features" if style in _COLUMNS else "in_features"
        width = getattr(_inner(module), features, None)
        if width is None:
            raise RecipeError(f"{_KEY}: {path} is no linear layer: {instead}")
        if width % size:
            raise RecipeError(
                f"{_KEY}: {size} processes cannot share the {width} {features} of {path}: set a "
                f"divisor of {width}"
            )


def left_whole(model: nn.Module) -> list[str]:
    """The experts of a model, whose weights are stacked, and which are whole on each process."""
    stacked = {
        path.replace(".base_layer", "")
        for path, module in base_model(model).named_modules()
        if not hasattr(module, "kernel_size")  # of a convolution
        and any(p.dim() == 3 for p in module.parameters(recurse=False))
    }
    return sorted({re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in stacked})


def base_model(model: Any) -> Any:
    """The model inside PEFT's."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _plan(model: Any) -> dict[str, str]:
    """Transformers' plan without the output head, whose weights may be those of the embeddings."""
    plan = dict(getattr(model, "tp_plan", None) or {})
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = {name for name, module in model.named_modules() if module is head}
    return {name: style for name, style in plan.items() if name not in names}


def _rules(model: Any) -> list[tuple[str, str]]:
    """The divided modules with their styles; RecipeError if a parameter is of no linear layer."""
    plan = _plan(model)
    left = [_pattern(kind) for kind, style in plan.items() if style in _LEFT]
    modules = dict(model.named_modules())
    rules: list[tuple[str, str]] = []
    for kind, style in plan.items():
        if style in _LEFT:
            continue
        pattern = _pattern(kind)
        rules += [(n, style) for n in modules if pattern.fullmatch(n) and not _within(n, left)]
        for name, _ in model.named_parameters():
            if name not in modules and pattern.fullmatch(name) and not _within(name, left):
                raise RecipeError(
                    f"{_KEY}: {name} would have to be divided, and is no linear layer: leave "
                    f"{_KEY} out, and use fsdp_config"
                )
    heads = {name.rpartition(".")[0] for name, style in rules if style == "colwise"}
    # what is left whole needs no sum of gradients, and nor has a norm between whole activations
    return [(n, s) for n, s in rules if s != _HEADS or n.rpartition(".")[0] in heads]


def _pattern(kind: str) -> re.Pattern[str]:
    return re.compile(re.escape(kind).replace(r"\*", r"\d+"))


def _within(name: str, patterns: list[re.Pattern[str]]) -> bool:
    """Whether a name is that of a module that is left whole, or of a part of it."""
    parts = name.split(".")
    starts = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(pattern.fullmatch(start) for pattern in patterns for start in starts)


def _divides_heads(rules: list[tuple[str, str]]) -> bool:
    """Whether attention heads are divided between processes."""
    return any(style == "colwise" and ("attn" in n or "attention" in n) for n, style in rules)


def _inner(module: nn.Module) -> nn.Module:
    inner = getattr(module, "base_layer", module)
    return inner if isinstance(inner, nn.Module) else module


def _styles(module: nn.Module, name: str, style: str) -> list[tuple[nn.Module, ParallelStyle]]:
    """A planned module itself, or the linears of its adapter, each with its style."""
    # The first factor of an adapter reads what its layer reads, and the second writes what the
    # layer writes. So by columns the second one is divided, and by rows the first.
    if style == _HEADS:
        return [(module, HeadwiseNorm())]
    columns = style in _COLUMNS
    make = functools.partial(_column_style if columns else _row_style, style in _WHOLE)
    if not hasattr(module, "base_layer"):
        return [(module, make())]
    factors: Any = getattr(module, "lora_B" if columns else "lora_A", None)
    plain = isinstance(factors, nn.ModuleDict) and all(
        isinstance(m, nn.Linear) for m in factors.values()
    )
    if not plain or not isinstance(_inner(module), nn.Linear):
        raise RecipeError(
            f"{_KEY}: the adapter of {name} ({type(module).__name__}) cannot be divided: use "
            "adapter: lora, or fsdp_config in place of it"
        )
    return [(_inner(module), make()), *((factor, make()) for factor in factors.values())]


def _column_style(whole: bool) -> ParallelStyle:
    return ColwiseParallel(output_layouts=Replicate() if whole else None)


def _row_style(whole: bool) -> ParallelStyle:
    return RowwiseParallel(input_layouts=Replicate() if whole else None)


def _free(module: nn.Module) -> None:
    """Free the whole weights, of which the parts are views."""
    for parameter in module.parameters(recurse=False):
        if isinstance(parameter, DTensor):
            local = parameter._local_tensor
            if local.untyped_storage().size() > local.numel() * local.element_size():
                parameter._local_tensor = local.clone()
