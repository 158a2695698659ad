"""``fusewright merge``: adapter and base as one model.

A base in safetensors is read and written file by file: no more than one file of the result is in
memory. Any other (GGUF, quantized, an adapter that is not LoRA) is loaded as a whole.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ModelError, RecipeError, first_line
from ..memory.budget import gigabytes
from .data.chat.stops import write_stops
from .inference.load_run import grow, load_tokenizer, with_adapter
from .inference.run_folder import RunFolder
from .inference.run_recipe import recipe_for, recipe_with
from .model.base_files import BaseFiles, base_files, copy_processor, save_with_base
from .model.files import adapter_weights, in_shards
from .model.from_pretrained import meta_model, pretrained
from .model.load import load_config, load_model, quiet
from .model.multimodal import (
    NotLoaded,
    freeze,
    is_in,
    is_multimodal,
    left_out,
    names_in_model,
    towers,
    use_cache,
)
from .model.precision import dtype_for_training
from .model.quantize import dequantize_linears
from .model.stored import is_stored
from .model.tokenizer import ChatPrompt, set_padding
from .output_files import (
    let_others_read,
    require_file_size,
    require_new,
    write_generation_settings,
)
from .terminal import Terminal, announce, say

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip
"""Names of dtypes that may be asked for."""


@dataclass(frozen=True)
class MergeOptions:
    """The options of the command.

    Attributes:
        dtype: of the weights; None: what the run was trained in, or as the base is stored.
        max_shard_size: largest file, such as ``"5GB"``.
        dequantize: merge into the dequantized weights of a quantized base (or QLoRA).
    """

    output: Path | None = None
    dtype: str | None = None
    max_shard_size: str = "5GB"
    dequantize: bool = False


def merge(
    run: RunFolder, request: MergeOptions | None = None, console: Console | None = None
) -> Path:
    """Write the adapter of ``run`` and its base as one model; or the shards of a whole model.

    Returns the new folder, with weights, configuration and tokenizer.

    Raises:
        ModelError: there is no adapter, it cannot be merged, or the disk is full.
        RecipeError: the folder is there already, a setting is wrong, or the base is missing.
    """
    request = request or MergeOptions()
    console = console or Terminal(highlight=False)
    if not run.adapter and not in_shards(run.folder):
        raise ModelError(
            f"{run.folder} holds a whole model: there is nothing to merge, use it as it is"
        )
    output = (request.output or run.folder / "merged").expanduser()
    dtype = _dtype(run, request.dtype)
    require_file_size(request.max_shard_size)
    with new_folder(output) as folder, quiet():
        recipe = recipe_for(run)
        config = load_config(recipe)  # as the run had it, with what its recipe overrides
        try:
            files = _files(run, config, request)
            adapted = Adapted(meta_model(recipe, config), run.folder, files)
            layers = Layers(adapted, files, dtype, all_of_it=request.dtype is not None)
            say(console, f"merging into {run.base_model}, file by file")
            write_shards(folder, layers.plan, layers.tensor, request.max_shard_size)
            set_padding(config, recipe)
            _write_config(config, layers, dtype, folder)
            _write_generation_config(run, config, folder)
        except UnmergeableError as reason:
            say(console, f"merging in memory: {reason}")
            announce(f"loading {run.base_model}")
            model = merged_in_memory(run, dtype, request.dequantize)
            _save(model, run, folder, request, dtype, packed=_is_quantized(config))
        tokenizer = load_tokenizer(run)
        tokenizer.save_pretrained(folder)
        write_stops(folder, tokenizer, ChatPrompt.of(run.recipe).variables)
        if is_multimodal(config):
            _copy_processor(run, folder, console)
        _copy_code(run, folder)
    size = sum(f.stat().st_size for f in output.glob("*.safetensors"))
    say(console, f"the merged model, {size / 1e6:,.0f} MB, is in {output}")
    return output


class Layers:
    """The merged tensors, made one module at a time.

    Args:
        dtype: of the language model in the result; None: as each is stored.
        all_of_it: whether ``dtype`` is also that of what is not trained, such as towers.

    Attributes:
        plan: shape and dtype of each tensor of the result, by its name there.
        untied: whether tensors that the base has once are now two.

    Raises:
        UnmergeableError: the files do not have the tensors that the adapter changes.
    """

    def __init__(
        self, adapted: Adapted, files: BaseFiles, dtype: torch.dtype | None, all_of_it: bool = False
    ) -> None:
        self.adapted, self.files, self.dtype = adapted, files, dtype
        self._all = all_of_it
        self._key = adapted.keys(files)
        self._merged: dict[str, Tensor] = {}
        groups = {tuple(group) for group in adapted.tied.values()}
        self.untied = False
        for group in groups:
            source = next((self._key[name] for name in group if name in self._key), None)
            if source is not None and any(adapted.changes(name) for name in group):
                self.untied = True
                self._key |= {name: self._key.get(name, source) for name in group}
        self._check()
        self._names = {adapted.stored.get(name, name): name for name in self._key}
        self.plan = {stored: self._planned(name) for stored, name in self._names.items()}

    def tensor(self, stored: str) -> Tensor:
        """The tensor ``stored`` of the result, in float32 where it was merged."""
        name = self._names[stored]
        if name not in self.adapted.names or not self.adapted.changes(name):
            return self.files.read(self._key[name])
        if name not in self._merged:
            path = name.rpartition(".")[0]
            names = [n for n in self._key if n.rpartition(".")[0] == path]
            tensors = {n.rpartition(".")[2]: self.files.read(self._key[n]) for n in names}
            merged = self.adapted.merge(path, tensors)
            self._merged |= {n: merged[n.rpartition(".")[2]] for n in names}
        return self._merged.pop(name)

    def _planned(self, name: str) -> tuple[Shape, torch.dtype]:
        key = self._key[name]
        dtype = self.files.dtypes[key]
        trained = name in self.adapted.names and not is_in(name, self.adapted.towers)
        if self.dtype is not None and dtype.is_floating_point and (trained or self._all):
            dtype = self.dtype
        is_changed = name in self.adapted.names and self.adapted.changes(name)
        return (self.adapted.names[name] if is_changed else self.files.shapes[key]), dtype

    def _check(self) -> None:
        for name, shape in self.adapted.names.items():
            changed = self.adapted.changes(name)
            if name not in self._key:
                if changed:
                    raise UnmergeableError(f"the base's files have no {name}")
            elif self.files.shapes[self._key[name]] != shape and not self.adapted.replaces(name):
                raise UnmergeableError(f"{name} has another size in the base's files")


def _save(
    model: Any, run: RunFolder, folder: Path, request: MergeOptions, dtype: torch.dtype | None,
    packed: bool,
) -> None:  # fmt: skip
    """Write a merged model; what was not trained comes from the base's files, unless packed."""
    base = run.base_model if run.adapter else run.recipe.get("base_model")
    files = None
    if base and not packed and not _is_quantized(model.config):
        files = base_files(base, run.recipe.get("revision_of_model"))
    if files is None and any(isinstance(m, NotLoaded) for m in model.modules()):
        raise ModelError(
            f"{base}: its towers were not loaded (language_model_only), and it has no safetensors "
            "files to take them from; merge into a copy that has: --base-model BASE"
        )
    save_with_base(
        model, folder, files, dtype=None if request.dtype is None else dtype,
        max_shard_size=request.max_shard_size,
    )  # fmt: skip


def _files(run: RunFolder, config: Any, request: MergeOptions) -> BaseFiles:
    if not run.adapter:
        raise UnmergeableError("the model is in shards")
    if _is_quantized(config):
        raise UnmergeableError("the base is quantized")
    if request.dequantize and any(run.recipe.get(f"load_in_{n}bit") for n in (4, 8)):
        raise UnmergeableError("the base is quantized as in training, and dequantized")
    files = base_files(run.base_model, run.recipe.get("revision_of_model"))
    if files is None:
        raise UnmergeableError("the base is not in safetensors files")
    return files


def _dtype(run: RunFolder, name: str | None) -> torch.dtype | None:
    if name is None:
        if not run.recipe:
            return None
        name = recipe_with(run, {}).precision()
        name = (run.facts.get("dtype") or name) if name == "auto" else name
        return dtype_for_training("auto") if name == "auto" else DTYPES[name]
    if name not in DTYPES:
        raise RecipeError(f"dtype: must be float32, bfloat16 or float16, not {name!r}")
    return DTYPES[name]


def _write_config(config: Any, layers: Layers, dtype: torch.dtype | None, folder: Path) -> None:
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        if dtype is not None:
            part.dtype = dtype
        if layers.untied:
            part.tie_word_embeddings = False
    config.save_pretrained(folder)


def _write_generation_config(run: RunFolder, config: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    try:
        settings = pretrained(GenerationConfig, run.base_model, kind="other")
    except RecipeError:  # the base has none, and then transformers makes them so
        settings = GenerationConfig.from_model_config(config)
    write_generation_settings(settings, folder)


def _copy_processor(run: RunFolder, folder: Path, console: Console) -> None:
    if not copy_processor(run.base_model, run.recipe.get("revision_of_model"), folder):
        say(
            console,
            f"{run.base_model} has no processor (preprocessor_config.json): copy one into the "
            "merged model to use it with more than text",
        )


def _copy_code(run: RunFolder, folder: Path) -> None:
    """Copy the code of the base that its configuration names, from a local folder."""
    source = Path(run.base_model)
    if run.consent.trust_remote_code and source.is_dir():
        for path in source.glob("*.py"):
            shutil.copy(path, folder)


# --- merging in memory by PEFT: for bases and adapters that cannot be taken in pieces ------------


def merged_in_memory(run: RunFolder, dtype: torch.dtype | None, dequantize: bool) -> Any:
    """Load the base, put the adapter on it, and merge into a plain model.

    A whole model in shards is only loaded. ``dtype`` is by default that of training. ``dequantize``
    makes quantized weights full before the adapter is added to them; they are then those that the
    adapter was trained on, rounding included. A base that is stored packed has no others. Raises a
    ModelError if PEFT cannot merge this kind of adapter, or into this kind of base.
    """
    model, recipe = base_in_memory(run, dtype, dequantize), recipe_for(run)
    if run.adapter:
        merged = _merged(model, run, recipe.peft_autocast_adapter_dtype)
    else:
        merged = model
        freeze(merged, left_out(merged, recipe))  # as in training: the base's files have them
    forget_conversions(merged)
    return merged if dtype is None or _is_quantized(merged.config) else merged.to(dtype)


def base_in_memory(run: RunFolder, dtype: torch.dtype | None, dequantize: bool) -> Any:
    """Load the weights that ``merged_in_memory`` merges into: plain ones, unless packed on disk."""
    loaded = torch.float32 if dtype is torch.float16 else dtype  # which a CPU cannot compute in
    if dtype is torch.bfloat16 and run.adapter and _is_stored_wider(run):
        loaded = torch.float32  # else base and sum would be rounded, one after the other
    recipe = recipe_for(run, loaded)
    if not dequantize:  # the full weights, although training saw quantized ones
        recipe = recipe.model_copy(update={"load_in_4bit": False, "load_in_8bit": False})
    model = load_model(recipe)
    if dequantize or any(map(is_stored, model.modules())):
        dequantize_linears(model, loaded or model.dtype)
    if loaded is not None and not _is_quantized(model.config):
        model = model.to(loaded)  # quantized files are loaded in the dtype that they name
    use_cache(model.config, True)  # load_model has switched it off
    return model


def _is_stored_wider(run: RunFolder) -> bool:
    """Whether the base's weights may have more digits than bfloat16."""
    files = base_files(run.base_model, run.recipe.get("revision_of_model"))
    return files is None or torch.float32 in files.dtypes.values()  # None: a GGUF file, such as


def forget_conversions(model: Any) -> None:
    """Let a model be saved under the names that it has: those of quantized files are not reversed.

    PEFT still needs them to put an adapter on the model.
    """
    if "_weight_conversions" in vars(model):
        del model._weight_conversions


def _merged(model: Any, run: RunFolder, autocast: bool) -> Any:
    model = with_adapter(model, run.folder, autocast)
    _untie(model)
    base = model.get_base_model()
    adapted = [place for place in towers(base) if _changes(base, place)]
    try:
        merged = model.merge_and_unload()
        for name, parameter in merged.named_parameters():  # the base's files have another one
            if is_in(name, adapted) and parameter.is_floating_point():
                parameter.requires_grad_(True)
        return merged
    except Exception as error:  # PEFT raises anything; some kinds have no such method
        kind = type(model.base_model).__name__
        raise ModelError(f"{run.folder}: a {kind} cannot be merged: {first_line(error)}") from error


def _changes(model: Any, place: str) -> bool:
    """Whether an adapter changes or replaces something in a part of a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    return any(isinstance(m, kinds) and is_in(name, [place]) for name, m in model.named_modules())


def _is_quantized(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _untie(model: Any) -> None:
    """Give embeddings and head separate weights if only one of them is adapted.

    Otherwise merging into the one would change the other, which the adapter has left alone.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    ends: Any = (base.get_input_embeddings(), base.get_output_embeddings())
    layers: list[Any] = [
        end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends
    ]
    if layers[1] is None or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    if getattr(layers[0], "weight", None) is getattr(layers[1], "weight", None):
        layers[1].weight = nn.Parameter(layers[1].weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False


# --- merging tensor by tensor --------------------------------------------------------------------


_ADAPTER = "default"


class UnmergeableError(Exception):
    """The adapter cannot be merged layer by layer; the message says why."""


class Adapted:
    """A base model without weights, and an adapter with its weights.

    PEFT builds the adapted model: its configuration, its names of layers and its own ``merge``
    decide everything. The base's tensors are loaded one layer at a time.

    Args:
        base: the base model, on the meta device. Its vocabulary grows with the adapter's.
        files: with the base's tensors.

    Attributes:
        names: of the base's tensors, each with its shape.
        tied: for each name of a tensor that has several, all of them.
        towers: paths of what is outside of the language model.
        stored: the names in the result of tensors that the base's files call otherwise.

    Raises:
        UnmergeableError: the adapter is not one that can be merged layer by layer.
    """

    def __init__(self, base: Any, folder: Path, files: BaseFiles) -> None:
        from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict

        config = PeftConfig.from_pretrained(str(folder))
        _require_plain(config, LoraConfig)
        config.inference_mode = True
        with torch.device("meta"):
            base.tie_weights()
        weights = adapter_weights(str(folder))
        grow(base, weights)
        pairs = list(base.named_parameters(remove_duplicate=False))
        self.names = {name: tuple(p.shape) for name, p in pairs}
        self.tied, self.towers = _tied(pairs), towers(base)
        self.stored: dict[str, str] = {}
        self._prefix = f"{base.base_model_prefix}."
        self._renamed = names_in_model(base, files.shapes, renamed_only=True)
        with torch.device("meta"):
            self.model = PeftModel(base, config, low_cpu_mem_usage=True)
        # the adapter goes to the base's device, which must not be meta
        self._hollow = _hollowed(self.model, [p for _, p in pairs])
        set_peft_model_state_dict(self.model, weights, low_cpu_mem_usage=True)
        self._require_loaded()
        self.base: Any = self.model.get_base_model()

    def keys(self, files: BaseFiles) -> dict[str, str]:
        """The key in the base's files of each tensor, by the model's names; others keep theirs."""
        keys = {}
        for key in files.shapes:
            candidates = (key, self._prefix + key, key.removeprefix(self._prefix))
            name = next((name for name in candidates if name in self.names), None)
            if name is None:
                renamed = self._renamed.get(key, key)
                name = renamed if renamed in self.names else key
                self.stored[name] = key
            elif self.towers:
                self.stored[name] = key
            keys[name] = key
        return keys

    def changes(self, name: str) -> bool:
        """Whether the adapter changes or replaces the base's tensor ``name``."""
        module, _ = self._owner(name)
        return _is_lora(module) or self.replaces(name)

    def replaces(self, name: str) -> bool:
        """Whether the adapter replaces ``name`` by another tensor."""
        module, last = self._owner(name)
        layer = module.get_base_layer() if _is_lora(module) else module
        return id(layer._parameters[last]) not in self._hollow

    def merge(self, path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one module after merging, float32 where they were merged.

        ``tensors`` are all of the module's in the base, by their last name (``weight``).
        """
        module = self._module(path)
        if not _is_lora(module):
            return {name: self._value(module, name, t) for name, t in tensors.items()}
        layer = module.get_base_layer()
        hollow = {name: layer._parameters[name] for name in tensors}
        for name, tensor in tensors.items():
            value = self._value(layer, name, tensor).detach().to(torch.float32, copy=True)
            layer._parameters[name] = nn.Parameter(value, requires_grad=False)
        try:
            module.merge(adapter_names=[_ADAPTER])
            return {name: layer._parameters[name].data for name in tensors}
        finally:
            layer._parameters.update(hollow)
            module.merged_adapters.clear()

    def _owner(self, name: str) -> tuple[Any, str]:
        path, _, last = name.rpartition(".")
        return self._module(path), last

    def _value(self, module: Any, name: str, tensor: Tensor) -> Tensor:
        parameter = module._parameters[name]
        return tensor if id(parameter) in self._hollow else parameter.data

    def _module(self, path: str) -> Any:
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


def _require_plain(config: Any, kind: Any) -> None:
    """Raise an UnmergeableError unless the adapter is LoRA that begins as the plain base."""
    if type(config) is not kind:
        raise UnmergeableError(f"the adapter is {getattr(config, 'peft_type', config)}, not LoRA")
    start = config.init_lora_weights
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
    hollow: dict[int, nn.Parameter] = {}
    for source in base:
        empty = torch.zeros(()).expand(source.shape)
        hollow[id(source)] = nn.Parameter(empty, requires_grad=False)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in hollow:
                module._parameters[name] = hollow[id(parameter)]
    return {id(parameter): parameter for parameter in hollow.values()}


def _is_lora(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _replacement(module: Any) -> Any:
    """The trained copy of a module in ``modules_to_save``, or the module."""
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[_ADAPTER]
    return module


# --- writing a model's folder --------------------------------------------------------------------


Shape = tuple[int, ...]


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that becomes ``output`` on success, and is removed otherwise.

    It is a sibling of ``output``; what a killed process left there is removed first. Raises a
    RecipeError if ``output`` is there already, or cannot be made.
    """
    require_new(output)
    unfinished = output.with_name(f".{output.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise RecipeError(f"{output} cannot be written to: {error.strerror}") from None
    try:
        yield unfinished
        unfinished.replace(output)
    except OSError as error:
        raise ModelError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_shards(
    folder: Path,
    plan: Mapping[str, tuple[Shape, torch.dtype]],
    tensor: Callable[[str], Tensor],
    max_shard_size: str,
) -> int:
    """Write tensors into files of limited size, such as ``"5GB"``, and return their bytes.

    ``plan`` has shape and dtype of every tensor in the order of the files; ``tensor`` is called
    once for each, in order. No more than one file's tensors are in memory.

    Raises a ModelError if the disk has no room for them.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in plan.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    total = int(split.metadata["total_size"])
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ModelError(
            f"the model takes {gigabytes(total)}, and {folder.parent} has {gigabytes(free)} left"
        )
    for file, names in split.filename_to_tensors.items():
        announce(f"writing {file}")
        _write(folder / file, {name: plan[name][1] for name in names}, tensor)
    let_others_read(folder)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return total


def _write(file: Path, dtypes: Mapping[str, torch.dtype], tensor: Callable[[str], Tensor]) -> None:
    """Make the tensors of one file and write it; they are freed before the next file's."""
    tensors = {name: tensor(name).to(dtype).contiguous() for name, dtype in dtypes.items()}
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except Exception as error:  # safetensors raises its own class
        raise ModelError(f"{file} cannot be written: {first_line(error)}") from error
