"""One training step of a model on fake tensors: what its blocks keep, and what they compute."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from ....compiler.options import Codegen
from ....compiler.pipeline import explain, optimize, planner_of, restore
from ....errors import ModelError, first_line
from ....kernels.cost import Living
from ....memory.choice import Scaled, Usages
from ....memory.levels import Level
from ....memory.usage import Usage
from ...model.load import quiet
from ...recipe.recipe import Recipe
from .blueprint import Blueprint, kind_of
from .images import ImageUsage, KnownNumbers, RowImages, run_towers


@dataclass(frozen=True)
class Step:
    """The usage of a step with one micro batch.

    Attributes:
        rewrites: how many formulas of the blueprint's blocks and head are rewritten, by rule.
        tokens: of the micro batch that was counted.
        uncaptured: paths of the blocks that run as they are, each with the reason.
        images: what its images take beside the blocks; None: it has none.
    """

    usages: Mapping[str, Usages]
    rewrites: Mapping[str, int]
    tokens: int
    uncaptured: Mapping[str, str] = field(default_factory=dict)
    images: ImageUsage | None = None


def take(
    blueprint: Blueprint, recipe: Recipe, codegen: Codegen, sequences: int = 1,
    images: RowImages | None = None,
) -> Step:  # fmt: skip
    """Run one step of the blueprint, whose tensors become fake ones, with ``recipe``'s micro batch.

    Blocks that are captured are counted as graphs, at each level of what they may keep. Others, and
    all of them with ``optimize: false``, are counted as they run in eager mode, and so are towers.
    Each row of a micro batch represents ``sequences`` rows. Raises a ModelError if the model cannot
    run on tensors without contents.
    """
    model, (rows, length) = (
        blueprint.model,
        (recipe.micro_batch_size * sequences, recipe.sequence_len),
    )
    known: dict[Any, Usages] = {}
    rewrites: Mapping[str, int] = {}
    reasons: dict[str, str] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), quiet():
        _make_fake(model)
        ids = torch.zeros(rows, length, dtype=torch.long)
        if recipe.optimize:
            optimize(model, codegen=codegen, memory="auto")
            _run(model, ids)
            planner, report = planner_of(model), explain(model)
            known = {kind_of(b): u for b, u in (planner.usages() if planner else ())}
            rewrites, reasons = report.by_rule(), _reasons(report)
            restore(model)
        uncounted = {p: b for p, b in blueprint.blocks.items() if kind_of(b) not in known}
        if uncounted:
            known |= _counted(model, uncounted, ids, blueprint.of_towers)
        usages = {path: known[kind_of(block)] for path, block in blueprint.blocks.items()}
        why = {
            path: reasons.get(path, "it was not captured")
            for path in uncounted
            if recipe.optimize and usages[path] is not _IDLE
        }
        seen = None
        if images is not None:
            of_towers, seen = _seen(blueprint, images, images.times(recipe, sequences))
            usages |= of_towers
    return Step(usages, rewrites, rows * length, why, seen)


def _run(model: nn.Module, ids: Tensor) -> None:
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    except Exception as error:  # a model's own code raises anything
        raise ModelError(
            f"the model cannot be planned without its weights: {type(error).__name__}: {error}"
        ) from error


def _reasons(report: Any) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for bypass in report.bypasses:
        reasons.setdefault(bypass.module, bypass.reason)
    return reasons


# --- in eager mode --------------------------------------------------------------------------------


def _counted(
    model: nn.Module, blocks: Mapping[str, nn.Module], ids: Tensor, towers: Collection[str]
) -> dict[Any, Usages]:
    """The usages of blocks in eager mode, by their kinds; under a fake mode.

    Text calls none of ``towers``, paths of blocks.
    """
    calls: dict[int, tuple[Any, Any]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(id(module), (args, kwargs))

    handles = [b.register_forward_pre_hook(note, with_kwargs=True) for b in blocks.values()]
    try:
        _run(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    usages: dict[Any, Usages] = {}
    for path, block in blocks.items():
        is_frozen = not any(p.requires_grad for p in block.parameters())
        if id(block) not in calls and (is_frozen or path in towers):
            usages.setdefault(kind_of(block), _IDLE)
            continue
        if id(block) not in calls:
            raise ModelError(f"{path} is a block that no training step calls: it cannot be planned")
        if kind_of(block) not in usages:
            usages[kind_of(block)] = _usages(block, *calls[id(block)])
    return usages


def _seen(
    blueprint: Blueprint, images: RowImages, times: float
) -> tuple[dict[str, Usages], ImageUsage]:
    """The usages of trained towers' blocks, and what towers take beside them; under a fake mode.

    Of a frozen tower nothing is kept: what it holds while it runs is one figure for all of it.
    """
    calls: dict[int, tuple[Any, Any]] = {}
    usages: dict[str, Usages] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(id(module), (args, kwargs))

    blocks = {path: blueprint.blocks[path] for path in sorted(blueprint.of_towers)}
    handles = [b.register_forward_pre_hook(note, with_kwargs=True) for b in blocks.values()]
    try:
        run = run_towers(blueprint.model, blocks, images.features)
        kept, flops = run.held if run.trains else 0, run.flops
        for path, block in blocks.items():
            if id(block) not in calls:
                continue
            with KnownNumbers():
                one = _usages(block, *calls[id(block)])
            whole, lean = one["all"], one["input"]
            if run.trains:
                usages[path] = Scaled(one, times)
                kept, flops = kept - whole.saved, flops - (lean.flops - whole.flops)
            else:
                flops += (blueprint.times[path] - 1) * (lean.flops - whole.flops)
    except Exception as error:  # a model's own code raises anything
        why = f"{type(error).__name__}: {first_line(error)}"
        return {}, ImageUsage(
            images.rows, images.images, images.tokens, images.longest, 0, 0, 0, why
        )
    finally:
        for handle in handles:
            handle.remove()
    kept, most, flops = (round(times * n) for n in (max(kept, 0), run.most, flops))
    return usages, ImageUsage(
        images.rows, images.images, images.tokens, images.longest, kept, most, flops
    )


_IDLE: Usages = {"all": Usage(0, 0, 0, 0, 0), "input": Usage(0, 0, 0, 0, 0)}
"""The usages of a block that no step calls."""


def _usages(block: nn.Module, args: Any, kwargs: Any) -> dict[Level, Usage]:
    """Of one call: where it keeps what eager mode keeps, and where it keeps its inputs."""
    values = [t.detach() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    inputs = sum(t.nbytes for t in values if t.is_floating_point())
    args, kwargs = torch.utils._pytree.tree_map(_leaf, (args, kwargs))
    living = Living()
    living.exclude(tree_iter((args, kwargs)))
    living.exclude(block.parameters())
    with living:
        outputs = [t for t in tree_iter(block(*args, **kwargs)) if isinstance(t, Tensor)]
        forward, saved, flops = living.most, living.bytes, living.flops
        living.most = 0
        roots = [t for t in outputs if t.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
    gradients = sum(p.grad.nbytes for p in block.parameters() if p.grad is not None)
    block.zero_grad()
    whole = Usage(saved, forward, living.most, gradients, living.flops)
    lean = Usage(inputs, forward, living.most, gradients, living.flops + flops)
    levels: dict[Level, Usage] = {"all": whole, "input": lean}
    return levels


def _leaf(value: Any) -> Any:
    """A tensor that is a leaf with its own gradient, as a block's input has one."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_()


def _make_fake(model: nn.Module) -> None:
    """Replace tensors of the meta device by fake tensors of the CPU; under a fake mode."""
    fakes: dict[int, Tensor] = {}

    def fake(t: Tensor) -> Tensor:
        if id(t) not in fakes:
            empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
            is_parameter = isinstance(t, nn.Parameter)
            fakes[id(t)] = nn.Parameter(empty, t.requires_grad) if is_parameter else empty
        return fakes[id(t)]

    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            tensors: dict[str, Any] = registry
            tensors.update({k: fake(t) for k, t in tensors.items() if t is not None})
