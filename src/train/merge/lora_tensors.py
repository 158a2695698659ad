"""What an adapter changes, tensor by tensor.

PEFT builds the adapted model, without weights: its configuration, its names of layers and its own
``merge`` decide everything. The base's tensors come and go, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.load_run import grow
from ..model.shard_files import adapter_weights

_ADAPTER = "default"


class UnmergeableError(Exception):
    """The adapter cannot be merged layer by layer; the message says why."""


class Adapted:
    """A base model without weights, and an adapter with its own.

    Args:
        base: the base model, on the meta device. Its vocabulary grows with the adapter's.
        folder: of the adapter.

    Attributes:
        names: of the base's tensors, each with its shape.
        tied: for each name of a tensor that has several, all of them.

    Raises:
        UnmergeableError: the adapter is not one that can be merged layer by layer.
    """

    def __init__(self, base: Any, folder: Path) -> None:
        from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict

        asked = PeftConfig.from_pretrained(str(folder))
        _require_plain(asked, LoraConfig)
        asked.inference_mode = True
        with torch.device("meta"):
            base.tie_weights()
        weights = adapter_weights(str(folder))
        grow(base, weights)
        pairs = list(base.named_parameters(remove_duplicate=False))
        self.names = {name: tuple(p.shape) for name, p in pairs}
        self.tied = _tied(pairs)
        self.prefix: str = base.base_model_prefix
        with torch.device("meta"):
            self.model = PeftModel(base, asked, low_cpu_mem_usage=True)
        # the adapter goes where the base is, which must not be nowhere
        self._hollow = _hollowed(self.model, [p for _, p in pairs])
        set_peft_model_state_dict(self.model, weights, low_cpu_mem_usage=True)
        self._require_loaded()
        self.base: Any = self.model.get_base_model()

    def changes(self, name: str) -> bool:
        """Whether the adapter changes or replaces the base's tensor ``name``."""
        module, _ = self._owner(name)
        return _is_lora(module) or self.replaces(name)

    def replaces(self, name: str) -> bool:
        """Whether the adapter brings a tensor of its own in the place of ``name``."""
        module, own = self._owner(name)
        layer = module.get_base_layer() if _is_lora(module) else module
        return id(layer._parameters[own]) not in self._hollow

    def merge(self, path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one module as they are with the adapter.

        Args:
            path: of the module, in the base model.
            tensors: all of its own tensors in the base, by their last name (``weight``).

        Returns:
            The same names; what was merged is float32.
        """
        module = self._module(path)
        if not _is_lora(module):
            return {name: self._own(module, name, t) for name, t in tensors.items()}
        layer = module.get_base_layer()
        hollow = {name: layer._parameters[name] for name in tensors}
        for name, tensor in tensors.items():
            value = self._own(layer, name, tensor).detach().to(torch.float32, copy=True)
            layer._parameters[name] = nn.Parameter(value, requires_grad=False)
        try:
            module.merge(adapter_names=[_ADAPTER])
            return {name: layer._parameters[name].data for name in tensors}
        finally:
            layer._parameters.update(hollow)
            module.merged_adapters.clear()

    def _owner(self, name: str) -> tuple[Any, str]:
        path, _, own = name.rpartition(".")
        return self._module(path), own

    def _own(self, module: Any, name: str, tensor: Tensor) -> Tensor:
        """The adapter's replacement of a tensor, or the tensor."""
        parameter = module._parameters[name]
        return tensor if id(parameter) in self._hollow else parameter.data

    def _module(self, path: str) -> Any:
        """The module that stands at ``path`` now: adapted, replaced, or as it was."""
        module: Any = self.base
        for part in path.split(".") if path else []:
            module = _replacement(getattr(module, part))
        return module

    def _require_loaded(self) -> None:
        from peft.tuners.lora import layer as lora
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        simple = (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d)
        for name, module in self.model.named_modules():
            other = isinstance(module, AuxiliaryTrainingWrapper)
            if (isinstance(module, BaseTunerLayer) and not isinstance(module, simple)) or (
                other and not isinstance(module, ModulesToSaveWrapper)
            ):
                raise UnmergeableError(f"{name} is a {type(module).__name__}")
            for variant in getattr(module, "lora_variant", {}).values():
                kind = getattr(variant, "__name__", type(variant).__name__)
                if not kind.startswith("Dora"):
                    raise UnmergeableError(f"{name} has a {kind}")
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:
                raise UnmergeableError(f"the adapter's file lacks {name}")


def _require_plain(asked: Any, kind: Any) -> None:
    """See that the adapter is LoRA that begins as the plain base."""
    if type(asked) is not kind:
        raise UnmergeableError(f"the adapter is {getattr(asked, 'peft_type', asked)}, not LoRA")
    start = asked.init_lora_weights
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        raise UnmergeableError(f"init_lora_weights: {start} changes the base")


def _tied(pairs: Iterable[tuple[str, nn.Parameter]]) -> dict[str, list[str]]:
    """All names of each parameter that has more than one, by name."""
    groups: dict[int, list[str]] = {}
    for name, parameter in pairs:
        groups.setdefault(id(parameter), []).append(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}


def _hollowed(model: nn.Module, base: Iterable[nn.Parameter]) -> dict[int, nn.Parameter]:
    """Give the parameters of ``base`` a device and no memory; returns the new ones, by id."""
    made: dict[int, nn.Parameter] = {}
    for given in base:
        empty = torch.zeros(()).expand(given.shape)
        made[id(given)] = nn.Parameter(empty, requires_grad=False)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in made:
                module._parameters[name] = made[id(parameter)]
    return {id(parameter): parameter for parameter in made.values()}


def _is_lora(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _replacement(module: Any) -> Any:
    """The trained copy of a module in ``modules_to_save``, or the module."""
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[_ADAPTER]
    return module
