"""ReLoRA (Lialin et al. 2023): adapters that are merged into the base, and begin anew.

The weights of the base are those of its files plus all that was merged, rounded once; each adapter
is kept. So what is saved is one adapter for the base as it is in its files: the sum of all, whose
rank is the sum of their ranks. A checkpoint has nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ...errors import RecipeError
from ...optim import blockwise
from ..recipe.recipe import Recipe

_ATTRIBUTE = "_fusewright_relora"

_FULL = 0.999
"""The fraction that a reset clears: all but a few, as the paper's code does."""

_NOT_ADDED = (
    "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_parameters", "lora_bias",
    "layer_replication",
)  # fmt: skip
"""What an adapter's configuration has where the sum of several is none of its kind."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def relora_of(model: Any) -> Relora | None:
    """The adapters that a model's base has taken in; None: it is not trained so."""
    relora: Relora | None = getattr(model, _ATTRIBUTE, None)
    return relora


class Relora(TrainerCallback):
    """Merges the adapter of ``model`` after every ``jagged_restart_steps``, and begins a new one.

    The optimizer's moments of the adapter are pruned then. New adapters, and what random pruning
    takes, depend on the seed and the number of the restart alone.

    Raises:
        RecipeError: something else than linear layers is adapted.
    """

    def __init__(self, model: Any, recipe: Recipe, say: Callable[[str], None]) -> None:
        self.model, self.recipe, self.say = model, recipe, say
        config = model.peft_config[model.active_adapter]
        if other := [name for name in _NOT_ADDED if getattr(config, name, None)]:
            raise RecipeError(
                f"relora: adapters with {other[0]}, as that of lora_model_dir, do not add up to one"
            )
        self.every = recipe.jagged_restart_steps or 1
        self.name = model.active_adapter
        self.layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
        self.merged = 0
        self._past: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.layers}
        self._base: dict[str, list[Tensor]] = {}
        for name, layer in self.layers.items():
            if self.name not in layer.lora_A or len(layer.weight.shape) != 2:
                kind = type(layer.get_base_layer()).__name__
                raise RecipeError(f"relora: merges adapters of linear layers: {name} is a {kind}")
        setattr(model, _ATTRIBUTE, self)

    # --- during training -------------------------------------------------------------------------

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Restart, where this is due and has not happened yet: a run may resume there."""
        if self.merged < state.global_step // self.every:
            self.restart(getattr(optimizer, "optimizer", optimizer))
            self.say(f"  relora: adapter {self.merged} is merged, and another one begins")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As ``finish``."""
        self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Give the base its own weights again, and the model the sum of all adapters."""
        if self.merged:
            for name in self.layers:
                self._restore(name)
            self._become_whole()
        delattr(self.model, _ATTRIBUTE)

    @torch.no_grad()
    def restart(self, optimizer: Any) -> None:
        """Merge the adapter, begin another one, and prune the optimizer's moments."""
        for name, (a, b) in self._factors().items():
            self._past[name].append((a.detach().cpu().clone(), b.detach().cpu().clone()))
            self._merge(name)
        self.merged += 1
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(list(devices)):
            torch.manual_seed(self.recipe.seed + 1_000_003 * self.merged)
            for layer in self.layers.values():
                layer.reset_lora_parameters(self.name, True)
            for a, b in self._factors().values():
                for factor in (a, b):
                    self._prune(optimizer, factor)

    def _factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        return {
            name: (layer.lora_A[self.name].weight, layer.lora_B[self.name].weight)
            for name, layer in self.layers.items()
        }

    def _prune(self, optimizer: Any, parameter: nn.Parameter) -> None:
        state = optimizer.state.get(parameter) if optimizer is not None else None
        if not state:
            return
        for key in _MOMENTS:
            if key in state:
                state[key].copy_(self._pruned(state[key]))
        if "state1" in state:  # bitsandbytes'
            values = blockwise.values_of(state, parameter.shape)
            kept = {k: self._pruned(v) if k != "step" else v for k, v in values.items()}
            qmaps = {"dynamic": state.get("qmap1"), "udynamic": state.get("qmap2")}
            blockwise.restore(state, kept, qmaps)

    def _pruned(self, values: Tensor) -> Tensor:
        method = self.recipe.relora_prune_method or "magnitude"
        ratio = self.recipe.relora_prune_ratio
        if ratio is None:
            ratio = _FULL if method == "reset" else 0.9
        if method == "magnitude":
            sizes = values.abs().flatten().float()
            count = round(ratio * sizes.numel())
            return (
                values * (sizes > sizes.kthvalue(count).values).view_as(values) if count else values
            )
        return values * (torch.rand(values.shape, device=values.device) > ratio)

    # --- the base --------------------------------------------------------------------------------

    def _merge(self, name: str) -> None:
        """Let a layer of the base have its own weight, and the sum of the past adapters."""
        layer = self.layers[name]
        base = layer.get_base_layer()
        self._restore(name)
        weight = dense(base)
        firsts, seconds = zip(*self._past[name], strict=True)
        a, b = torch.cat(firsts, 0), torch.cat(seconds, 1)
        delta = b.to(weight.device).float() @ a.to(weight.device).float() * layer.scaling[self.name]
        delta = delta.T if layer.fan_in_fan_out else delta
        _write(base, (weight.float() + delta).to(weight.dtype))

    def _restore(self, name: str) -> None:
        tensors = _tensors(self.layers[name].get_base_layer())
        if name not in self._base:
            self._base[name] = [tensor.detach().cpu().clone() for tensor in tensors]
        for tensor, stored in zip(tensors, self._base[name], strict=True):
            tensor.data.copy_(stored)

    # --- the sum of all adapters -----------------------------------------------------------------

    def _whole_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        whole = {}
        for name, (a, b) in self._factors().items():
            past = [(one.to(a), other.to(b)) for one, other in self._past[name]]
            firsts, seconds = zip(*past, (a.detach(), b.detach()), strict=True)
            whole[name] = torch.cat(firsts, 0), torch.cat(seconds, 1)
        return whole

    def _become_whole(self) -> None:
        config = self.model.peft_config[self.name]
        many = self.merged + 1
        for name, (a, b) in self._whole_factors().items():
            layer = self.layers[name]
            layer.lora_A[self.name].weight = nn.Parameter(a)
            layer.lora_B[self.name].weight = nn.Parameter(b)
            layer.lora_A[self.name].out_features = layer.lora_B[self.name].in_features = a.shape[0]
            layer.r[self.name] *= many
            layer.lora_alpha[self.name] *= many
        config.r, config.lora_alpha = config.r * many, config.lora_alpha * many

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Let the model have the sum of all adapters, for a checkpoint; its base stays merged."""
        config = self.model.peft_config[self.name]
        before, sizes = self._factors(), (config.r, config.lora_alpha)
        attributes = {n: (dict(m.r), dict(m.lora_alpha)) for n, m in self.layers.items()}
        self._become_whole()
        try:
            yield
        finally:
            config.r, config.lora_alpha = sizes
            for name, (a, b) in before.items():
                layer = self.layers[name]
                layer.lora_A[self.name].weight, layer.lora_B[self.name].weight = a, b
                layer.lora_A[self.name].out_features = a.shape[0]
                layer.lora_B[self.name].in_features = a.shape[0]
                layer.r.update(attributes[name][0])
                layer.lora_alpha.update(attributes[name][1])

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take the adapters of a checkpoint: the last one is the one that is trained.

        ``weights`` are by the names of the parameters; what is no adapter is loaded, too.
        """
        names = {id(p): n for n, p in self.model.named_parameters()}
        rest = dict(weights)
        for name, (a, b) in self._factors().items():
            stored_a, stored_b = rest.pop(names[id(a)]), rest.pop(names[id(b)])
            rank = a.shape[0]
            pairs = list(zip(stored_a.split(rank, 0), stored_b.split(rank, 1), strict=True))
            a.copy_(pairs[-1][0])
            b.copy_(pairs[-1][1])
            self._past[name] = pairs[:-1]
            self.merged = len(pairs) - 1
            if self.merged:
                self._merge(name)
            else:
                self._restore(name)
        self.model.load_state_dict(rest, strict=False)


def _tensors(base: Any) -> list[Tensor]:
    """What a layer's weight is made of: itself, and its scales, if it is quantized."""
    weight = base.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        nested = [state.offset, state.state2.absmax] if state.nested else []
        return [weight, state.absmax, *nested]
    scales = getattr(weight, "SCB", None)
    if scales is None:  # which the first forward hands on
        scales = getattr(getattr(base, "state", None), "SCB", None)
    return [weight] if scales is None else [weight, scales]


def dense(base: Any) -> Tensor:
    """The weight of a linear layer, unpacked where it is bitsandbytes'."""
    weight, *scales = _tensors(base)
    if not scales:
        return weight.detach()
    functional: Any = importlib.import_module("bitsandbytes.functional")
    state = getattr(weight, "quant_state", None)
    if state is None:
        return functional.int8_vectorwise_dequant(weight.data, scales[0])  # type: ignore[no-any-return]  # 2026-11-30: not typed
    return functional.dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]  # 2026-11-30: as above


def _write(base: Any, weight: Tensor) -> None:
    """Set a layer's weight in place, quantized as it was."""
    tensors = _tensors(base)
    if len(tensors) == 1:
        base.weight.data.copy_(weight)
        return
    functional: Any = importlib.import_module("bitsandbytes.functional")
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        packed, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        new = [packed, scales]
    else:
        packed, fresh = functional.quantize_4bit(
            weight, blocksize=state.blocksize, compress_statistics=state.nested,
            quant_type=state.quant_type, quant_storage=base.weight.quant_storage,
        )  # fmt: skip
        new = [packed, fresh.absmax]
        new += [fresh.offset, fresh.state2.absmax] if state.nested else []
    for tensor, value in zip(tensors, new, strict=True):
        tensor.data.copy_(value.view_as(tensor.data))
