"""``fusewright merge``: adapter and base as one model.

A base in safetensors is read and written file by file: no more than one file of the result is in
memory. Any other (GGUF, quantized, an adapter that is not LoRA) is loaded as a whole.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ...errors import ModelError, RecipeError, first_line
from ..inference.load_run import load_tokenizer
from ..inference.past_recipe import recipe_for, recipe_with
from ..inference.run_folder import RunFolder
from ..model.from_pretrained import meta_model, pretrained
from ..model.load import load_config, quiet
from ..model.precision import dtype_for_training
from ..model.shard_files import in_shards
from ..model.tokenizer import set_padding
from ..terminal import Terminal, announce, say
from .base_tensors import BaseFiles, base_files
from .in_memory import merged_in_memory
from .lora_tensors import Adapted, UnmergeableError
from .shards import Shape, new_folder, write_shards

_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        output: the new folder; None: ``merged`` in the run's.
        dtype: of the weights; None: what the run was trained in, or as the base is stored.
        max_shard_size: largest file, such as ``"5GB"``.
        dequantize: merge into the weights that a quantized base (or QLoRA) had, made full again.
    """

    output: Path | None = None
    dtype: str | None = None
    max_shard_size: str = "5GB"
    dequantize: bool = False


def merge(
    run: RunFolder, request: MergeOptions | None = None, console: Console | None = None
) -> Path:
    """Write the adapter of ``run`` and its base as one model; or the shards of a whole model.

    Args:
        run: from ``open_run``.
        request: where to and how.
        console: where to print; None for standard output.

    Returns:
        The new folder: weights, configuration, tokenizer.

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
    with new_folder(output) as folder, quiet():
        recipe = recipe_for(run)
        config = load_config(recipe)  # as the run had it, with what its recipe overrides
        try:
            files = _files(run, config, request)
            adapted = Adapted(meta_model(recipe, config), run.folder)
            layers = Layers(adapted, files, dtype)
            say(console, f"merging into {run.base_model}, file by file")
            write_shards(folder, layers.plan, layers.tensor, request.max_shard_size)
            set_padding(config, recipe)
            _write_config(config, layers, dtype, folder)
            _write_generation_config(run, folder)
        except UnmergeableError as reason:
            say(console, f"merging in memory: {reason}")
            announce(f"loading {run.base_model}")
            model = merged_in_memory(run, dtype, request.dequantize)
            try:
                model.save_pretrained(folder, max_shard_size=request.max_shard_size)
            except ValueError as error:
                raise RecipeError(f"max_shard_size: {first_line(error)}") from error
        load_tokenizer(run).save_pretrained(folder)
        _copy_code(run, folder)
    size = sum(f.stat().st_size for f in output.glob("*.safetensors"))
    say(console, f"the merged model, {size / 1e6:,.0f} MB, is in {output}")
    return output


class Layers:
    """The merged tensors, made one module at a time.

    Args:
        adapted: the adapter.
        files: the base's tensors.
        dtype: of the result; None: as each is stored.

    Attributes:
        plan: shape and dtype of each tensor of the result, by the model's own names.
        untied: whether tensors that the base has once are now two.

    Raises:
        UnmergeableError: the files do not have the tensors that the adapter changes.
    """

    def __init__(self, adapted: Adapted, files: BaseFiles, dtype: torch.dtype | None) -> None:
        self.adapted, self.files, self.dtype = adapted, files, dtype
        self._key = _keys(adapted, files)
        self._made: dict[str, Tensor] = {}
        groups = {tuple(group) for group in adapted.tied.values()}
        self.untied = False
        for group in groups:
            source = next((self._key[name] for name in group if name in self._key), None)
            if source is not None and any(adapted.changes(name) for name in group):
                self.untied = True
                self._key |= {name: self._key.get(name, source) for name in group}
        self._check()
        self.plan = {name: self._planned(name) for name in self._key}

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name`` of the result, in float32 where it was merged."""
        if name not in self.adapted.names or not self.adapted.changes(name):
            return self.files.read(self._key[name])
        if name not in self._made:
            path = name.rpartition(".")[0]
            own = [n for n in self._key if n.rpartition(".")[0] == path]
            tensors = {n.rpartition(".")[2]: self.files.read(self._key[n]) for n in own}
            merged = self.adapted.merge(path, tensors)
            self._made |= {n: merged[n.rpartition(".")[2]] for n in own}
        return self._made.pop(name)

    def _planned(self, name: str) -> tuple[Shape, torch.dtype]:
        key = self._key[name]
        stored = self.files.dtypes[key]
        asked = self.dtype if self.dtype is not None and stored.is_floating_point else stored
        known = name in self.adapted.names and self.adapted.changes(name)
        return (self.adapted.names[name] if known else self.files.shapes[key]), asked

    def _check(self) -> None:
        """See that what is changed is there, in the size that is expected."""
        for name, shape in self.adapted.names.items():
            changed = self.adapted.changes(name)
            if name not in self._key:
                if changed:
                    raise UnmergeableError(f"the base's files have no {name}")
            elif self.files.shapes[self._key[name]] != shape and not self.adapted.replaces(name):
                raise UnmergeableError(f"{name} has another size in the base's files")


def _keys(adapted: Adapted, files: BaseFiles) -> dict[str, str]:
    """The key in the files for each tensor, by the model's names; other tensors keep theirs."""
    prefix, found = f"{adapted.prefix}.", {}
    for key in files.shapes:
        candidates = (key, prefix + key, key.removeprefix(prefix))
        found[next((name for name in candidates if name in adapted.names), key)] = key
    return found


def _files(run: RunFolder, config: Any, request: MergeOptions) -> BaseFiles:
    """The base's files, if they can be merged one by one."""
    if not run.adapter:
        raise UnmergeableError("the model is in shards")
    if getattr(config, "quantization_config", None) is not None:
        raise UnmergeableError("the base is quantized")
    if request.dequantize and any(run.recipe.get(f"load_in_{n}bit") for n in (4, 8)):
        raise UnmergeableError("the base is quantized as in training, and dequantized")
    files = base_files(run.base_model, run.recipe.get("revision_of_model"))
    if files is None:
        raise UnmergeableError("the base is not in safetensors files")
    return files


def _dtype(run: RunFolder, asked: str | None) -> torch.dtype | None:
    if asked is None:
        if not run.recipe:
            return None
        asked = recipe_with(run, {}).precision()
        asked = (run.facts.get("dtype") or asked) if asked == "auto" else asked
        return dtype_for_training("auto") if asked == "auto" else _DTYPES[asked]
    if asked not in _DTYPES:
        raise RecipeError(f"dtype: must be float32, bfloat16 or float16, not {asked!r}")
    return _DTYPES[asked]


def _write_config(config: Any, layers: Layers, dtype: torch.dtype | None, folder: Path) -> None:
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        if dtype is not None:
            part.dtype = dtype
        if layers.untied:
            part.tie_word_embeddings = False
    config.save_pretrained(folder)


def _write_generation_config(run: RunFolder, folder: Path) -> None:
    """The base's, if it has one."""
    from transformers import GenerationConfig

    with contextlib.suppress(RecipeError):
        pretrained(GenerationConfig, run.base_model, kind="other").save_pretrained(folder)


def _copy_code(run: RunFolder, folder: Path) -> None:
    """The code of the base that its configuration names, from a local folder."""
    source = Path(run.base_model)
    if run.consent.trust_remote_code and source.is_dir():
        for path in source.glob("*.py"):
            shutil.copy(path, folder)
