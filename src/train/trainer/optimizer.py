"""The optimizer of a recipe, its parameter groups, and layerwise sampling (LISA)."""

from __future__ import annotations

import ast
import contextlib
import functools
import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import Trainer, TrainerCallback

from ...errors import RecipeError
from ...optim import blockwise
from ...optim.buckets import why_not
from ...optim.flat import FlatOptimizer
from ...sharding import is_dtensor
from ..model.token_losses import causal_lm
from ..recipe.recipe import Recipe


def make_optimizer(trainer: Trainer, model: Any, recipe: Recipe) -> Any:
    """The optimizer of the recipe, for the trained parameters of ``model``.

    Raises:
        RecipeError: the optimizer cannot be made here.
    """
    try:
        optimizer = _build(trainer, model, recipe)
    except (ValueError, ImportError, RuntimeError, TypeError) as error:
        raise RecipeError(f"optimizer: {recipe.optimizer} cannot be used: {error}") from error
    if trainer.is_fsdp_enabled and blockwise.of_bitsandbytes(optimizer):
        optimizer = blockwise.over_shards(optimizer)
    # these replace parameters, or have only parts of some
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or divided(model)
    if hasattr(model, "peft_config") and not sharded and not why_not(optimizer):
        return FlatOptimizer(optimizer)
    return optimizer


def _build(trainer: Trainer, model: Any, recipe: Recipe) -> Optimizer:
    if recipe.optimizer == "muon":
        return _muon(trainer, model, recipe)
    if recipe.optimizer == "came_pytorch":
        return _came(trainer, model, recipe)
    rate = embedding_rate(recipe)
    several = rate is not None or recipe.lr_groups is not None
    if recipe.loraplus_lr_ratio is None and not several and not divided(model):
        return Trainer.create_optimizer(trainer, model)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    if recipe.loraplus_lr_ratio is not None:
        from peft.optimizers import create_loraplus_optimizer

        return create_loraplus_optimizer(
            model, kind, loraplus_lr_ratio=recipe.loraplus_lr_ratio,
            loraplus_lr_embedding=recipe.loraplus_lr_embedding,
            loraplus_weight_decay=recipe.weight_decay, **options,
        )  # type: ignore[no-any-return]  # fmt: skip  # 2026-11-25: PEFT has no types
    decayed = set(trainer.get_decay_parameter_names(model))
    make = _groups if several else _two_groups
    groups = make(model, decayed, recipe, rate)
    return kind(groups, **options)  # type: ignore[no-any-return]  # 2026-11-25: chosen by name


def _muon(trainer: Trainer, model: Any, recipe: Recipe) -> Optimizer:
    decayed = set(trainer.get_decay_parameter_names(model))
    embedded = {id(p) for p in _embeddings(model)}
    matrices: list[nn.Parameter] = []
    others: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 2 and id(parameter) not in embedded:
            matrices.append(parameter)
        else:
            others[name in decayed].append(parameter)
    decay = recipe.weight_decay
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    return MuonWithAdamW(
        {"params": matrices, "lr": recipe.learning_rate, "weight_decay": decay,
         "adjust_lr_fn": "match_rms_adamw", **_optim_args(recipe)},
        [{"params": parameters, "lr": recipe.learning_rate, "betas": betas,
          "eps": recipe.adam_epsilon, "weight_decay": decay if decays else 0.0}
         for decays, parameters in others.items()],
    )  # fmt: skip


def _came(trainer: Trainer, model: Any, recipe: Recipe) -> Optimizer:
    from came_pytorch import CAME

    first = recipe.adam_epsilon if "adam_epsilon" in recipe.model_fields_set else 1e-30
    second = recipe.adam_epsilon2
    third = recipe.adam_beta3
    options: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.adam_beta1, recipe.adam_beta2, 0.9999 if third is None else third),
        "eps": (first, 1e-16 if second is None else second),
        **_optim_args(recipe),
    }
    groups = _two_groups(model, set(trainer.get_decay_parameter_names(model)), recipe, None)
    return CAME([g for g in groups if g["params"]], **options)  # type: ignore[no-any-return]  # 2026-11-29: not typed


def _optim_args(recipe: Recipe) -> dict[str, Any]:
    """``optim_args`` as keyword arguments; numbers and tuples of a text are read as in Python."""
    options = recipe.optim_args or {}
    if isinstance(options, str):
        options = dict(part.strip().split("=", 1) for part in options.split(",") if part.strip())
    result = {}
    for name, value in options.items():
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value) if isinstance(value, str) else value
        result[name] = value
    return result


class MuonWithAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for matrices, and AdamW for everything else, as one optimizer.

    The groups of both, Muon's first, and the states of all parameters are those of this one.
    Matrices that FSDP2 shards are put together for the products that orthogonalize their updates.
    """

    def __init__(self, matrices: dict[str, Any], others: list[dict[str, Any]]) -> None:
        self.parts = [Muon([matrices]), AdamW(others)]
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        """Let both parts have the groups and states of this one."""
        first = len(self.parts[0].param_groups)
        for part, groups in zip(
            self.parts, (self.param_groups[:first], self.param_groups[first:]), strict=True
        ):
            part.param_groups, part.state = groups, self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Update all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` has returned."""
        super().load_state_dict(state_dict)
        self._share()


def divided(model: Any) -> bool:
    """Whether layers of a model are divided between processes, by tensor parallelism."""
    return any(map(is_dtensor, model.parameters()))


def step_one_by_one(optimizer: Any) -> list[dict[str, Any]]:
    """Update one parameter after the other, where some are divided and some whole.

    Kernels for many tensors at once do not take both kinds. Returns the former settings of each
    group, which belong into its checkpoints.
    """
    former = []
    for group in optimizer.param_groups:
        former.append({name: group[name] for name in ("fused", "foreach") if name in group})
        group.update(dict.fromkeys(former[-1], False))
    if hasattr(optimizer, "_step_supports_amp_scaling"):  # of the fused kernels
        optimizer._step_supports_amp_scaling = False
    return former


def _two_groups(
    model: Any, decayed: set[str], recipe: Recipe, rate: float | None
) -> list[dict[str, Any]]:
    """Trainer's groups, for parameters that are divided."""
    # Trainer would split its groups there, and a checkpoint has the groups of one process
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in trained if n in decayed], "weight_decay": recipe.weight_decay},
        {"params": [p for n, p in trained if n not in decayed], "weight_decay": 0.0},
    ]


def embedding_rate(recipe: Recipe) -> float | None:
    """The learning rate of embeddings and the output head, where it differs; else None."""
    if recipe.embedding_lr is not None:
        return recipe.embedding_lr
    if recipe.embedding_lr_scale is not None:
        return recipe.embedding_lr_scale * recipe.learning_rate
    return None


def _groups(
    model: Any, decayed: set[str], recipe: Recipe, rate: float | None
) -> list[dict[str, Any]]:
    """Groups with and without decay, for each learning rate."""
    embedded = {id(p) for p in _embeddings(model)} if rate is not None else set()
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = rate if id(parameter) in embedded else _group_rate(name, recipe)
            kind = name in decayed, recipe.learning_rate if lr is None else lr
            groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": recipe.weight_decay if decays else 0.0,
            "lr": lr,
        }
        for (decays, lr), parameters in groups.items()
    ]


def _group_rate(name: str, recipe: Recipe) -> float | None:
    """The learning rate of the group in ``lr_groups`` that a parameter is of, if any."""
    groups = recipe.lr_groups or ()
    return next((g.lr for g in groups if any(part in name for part in g.modules)), None)


def _embeddings(model: Any) -> Iterable[nn.Parameter]:
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            yield from module.parameters()


class LayerSampler(TrainerCallback):
    """LISA (Pan et al. 2024): a few blocks train at a time, and others after every interval.

    What is drawn depends on the seed and the number of the interval alone, so that a run which
    resumes has the same blocks. What is frozen already stays so.

    Raises:
        RecipeError: the model has no such list of blocks, or too few.
    """

    def __init__(self, recipe: Recipe, model: Any) -> None:
        where, number = recipe.lisa_layers_attribute, recipe.lisa_n_layers or 0
        try:
            blocks = list(functools.reduce(getattr, where.split("."), causal_lm(model)))  # type: ignore[arg-type]  # 2026-11-27: a path of names
        except (AttributeError, TypeError):
            raise RecipeError(
                f"lisa_layers_attribute: the model has no blocks in {where}"
            ) from None
        if number > len(blocks):
            raise RecipeError(f"lisa_n_layers: the model has only {len(blocks)} blocks")
        self.number, self.interval = number, recipe.lisa_step_interval or 1
        self.seed, self.drawn = recipe.seed, -1
        self.trained = [[p for p in block.parameters() if p.requires_grad] for block in blocks]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw blocks at the beginning of an interval, or where a run resumes within one."""
        turn = state.global_step // self.interval
        if turn != self.drawn:
            self.drawn = turn
            draw = random.Random(f"{self.seed} {turn}")
            chosen = draw.sample(range(len(self.trained)), self.number)
            self._train([i in chosen for i in range(len(self.trained))])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the model."""
        self._train([True] * len(self.trained))

    def _train(self, flags: list[bool]) -> None:
        for parameters, trains in zip(self.trained, flags, strict=True):
            for parameter in parameters:
                parameter.requires_grad_(trains)
                if not trains:
                    parameter.grad = None
