"""Writes a model in a format of compressed-tensors, file by file, for vLLM and transformers.

The scales are those of a min-max observer: the library's own rounding to the nearest value.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import ModelError, first_line
from ..consent import Consent
from ..inference.run_folder import open_run
from ..inference.run_recipe import recipe_for
from ..model.base_files import BaseFiles
from ..model.from_pretrained import class_of, pretrained
from ..model.load import load_config
from ..model.multimodal import is_in, names_in_model, towers
from ..model.quantize import head_modules
from ..model.rounding import (
    compress,
    decompress,
    misfit,
    rounded_layers,
    roundtrip,
    routers,
    scheme,
    shares_scale,
    sharing,
)
from ..output_files import let_others_read
from ..recipe.export_formats import FORMATS, Format
from .reading import Compared, TokenizerRead, compared, folder_tokenizer, meta_model_of
from .scores import Logits

_INDEX = "model.safetensors.index.json"


@dataclass
class Rounded:
    """What is written in few bits, by the names in the files of the plain model.

    Attributes:
        keys: the weights that are.
        left: layers that are not, though they are linear layers of the language model, and why.
        ignored: paths of all modules with a matrix that are not, for readers of the result.
        sharing: of each layer in ``keys``, those that have one global scale with it.
    """

    keys: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    sharing: dict[str, list[str]] = field(default_factory=dict)


def select(model: Any, files: BaseFiles, format: Format) -> Rounded:
    """Choose the weights that are written in few bits: those that the library's recipes choose.

    ``model`` is on the meta device, of the configuration that the files belong to. Raises a
    ModelError for experts that the files have in one tensor.
    """
    names = names_in_model(model, files.shapes)
    modules, places = dict(model.named_modules()), towers(model)
    heads, layers = {*head_modules(model), *routers(model)}, rounded_layers(model, format)
    result, ignored = Rounded(), set(heads)
    for key, name in names.items():
        path, _, last = name.rpartition(".")
        shape, inside = files.shapes[key], not is_in(name, places)
        expert = _is_expert(model, name)
        if inside and expert and len(shape) == 3:
            raise ModelError(
                f"{key} holds the experts of a layer in one tensor, and compressed-tensors stores "
                "each by itself: export to gguf, or merged"
            )
        if inside and expert and not _reads_experts(format):
            raise ModelError(
                f"{key}: transformers cannot read experts in {format.name}, so that they could not "
                f"be checked; it reads {', '.join(_formats_of_experts())}"
            )
        if len(shape) != 2 or not key.endswith(".weight"):
            continue
        linear = isinstance(modules.get(path), nn.Linear) and path not in heads
        reason = misfit(format, shape)
        if inside and reason is None and (expert or (last == "weight" and path in layers)):
            result.keys.append(key)
            continue
        if inside and (expert or linear):
            result.left[key] = reason or "it chooses experts"
        if not isinstance(modules.get(path), nn.Embedding) or path in heads:
            ignored |= {key.removesuffix(".weight"), name.removesuffix(".weight")}
    result.ignored = sorted(ignored)
    result.sharing = sharing({k.removesuffix(".weight"): files.shapes[k] for k in result.keys})
    return result


def _is_expert(model: Any, name: str) -> bool:
    """Whether a tensor of the files is an expert's, or of all: they are stacked in the model."""
    path, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    parameter = module._parameters.get(last)
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    return parameter is not None and parameter.ndim == 3 and not convolution


def _reads_experts(format: Format) -> bool:
    """Whether transformers takes all that is stored for an expert into account.

    Its ``CompressedTensorsDequantize`` (5.24) leaves out global scales, without a word, and fails
    at scales of blocks or groups of weights that are not packed.
    """
    weights = scheme(format).weights
    packed = "weight_packed" in _parts(format)
    return weights.strategy == "channel" or (weights.strategy == "group" and packed)


def _formats_of_experts() -> list[str]:
    ours = [f for f in FORMATS.values() if f.writer == "compressed-tensors"]
    return [f.name for f in ours if _reads_experts(f)]


def _parts(format: Format) -> tuple[str, ...]:
    """The last names of the tensors that are stored for a weight."""
    from compressed_tensors.compressors import BaseCompressor

    kind = BaseCompressor.get_value_from_registry(scheme(format).format.value)
    names: tuple[str, ...] = kind.compression_param_names(scheme(format))
    return names


def write_compressed(source: Path, folder: Path, format: Format, model: Any) -> Rounded:
    """Write the model in ``source`` to ``folder``, which is empty; returns what was rounded.

    No more than one file's tensors are in memory. Raises a ModelError if nothing fits the format,
    or the disk is full.
    """
    files = source_files(source)
    selection = select(model, files, format)
    if not selection.keys:
        key, why = next(iter(selection.left.items()), ("the model", "it has no linear layers"))
        raise ModelError(f"{format.name} fits no layer of this model: {key}: {why}")
    chosen, places = set(selection.keys), files.places()
    largest = _Largest(files, selection) if shares_scale(format) else None
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(set(places.values())):
        tensors: dict[str, Tensor] = {}
        for key in (k for k, place in places.items() if place == path):
            tensor = files.read(key)
            if key not in chosen:
                tensors[key] = tensor
                continue
            state = compress(format, tensor, largest.of(key) if largest else None)
            layer = key.removesuffix("weight")
            tensors |= {f"{layer}{name}": value.contiguous() for name, value in state.items()}
        try:
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        except Exception as error:  # safetensors raises its own class
            raise ModelError(f"{path.name} cannot be written: {first_line(error)}") from error
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(t.nbytes for t in tensors.values())
    let_others_read(folder)
    _copy_others(source, folder)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / _INDEX).write_text(text, encoding="utf-8")
    _write_config(folder, format, selection.ignored)
    return selection


def source_files(source: Path) -> BaseFiles:
    """The tensors of the plain model in ``source``."""
    return BaseFiles(sorted(source.glob("*.safetensors")))


class _Largest:
    """The largest absolute value of the weights that share a scale with one, read once."""

    def __init__(self, files: BaseFiles, selection: Rounded) -> None:
        self.files, self.selection = files, selection
        self._known: dict[tuple[str, ...], Tensor] = {}

    def of(self, key: str) -> Tensor:
        group = tuple(self.selection.sharing[key.removesuffix(".weight")])
        if group not in self._known:
            each = [self.files.read(f"{layer}.weight").abs().max() for layer in group]
            self._known[group] = torch.stack(each).max()
        return self._known[group]


def _copy_others(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != _INDEX:
            shutil.copy(path, folder)


def _write_config(folder: Path, format: Format, ignored: list[str]) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig(
        config_groups={"group_0": scheme(format)}, ignore=ignored,
        format=scheme(format).format.value, quantization_status="compressed",
    )  # fmt: skip
    ModelCompressor(quantization_config=config).update_config(str(folder))


# --- reading it back -----------------------------------------------------------------------------


class CompressedWriter:
    """Exports to a format of compressed-tensors.

    Attributes:
        selection: what was rounded, of the model that was written last.
    """

    def __init__(self, format: Format, consent: Consent) -> None:
        self.format, self.consent = format, consent
        self.selection = Rounded()

    def write(self, source: Path, folder: Path) -> None:
        """Write the plain model in ``source`` to ``folder``."""
        model = meta_model_of(open_run(source, consent=self.consent))
        self.selection = write_compressed(source, folder, self.format, model)

    def compare(self, source: Path, folder: Path) -> Iterator[Compared]:
        """Compare each tensor with the plain model's, rounded by the library's own code."""
        files, chosen = source_files(source), set(self.selection.keys)
        written = CompressedFiles(folder, self.format)
        largest = _Largest(files, self.selection) if shares_scale(self.format) else None
        for key, shape in files.shapes.items():
            plain, why = files.read(key), self.selection.left.get(key)
            kind = f"as it is ({why})" if why else "as it is"
            rounded = plain
            if key in chosen:
                kind = self.format.name
                rounded = roundtrip(self.format, plain, largest.of(key) if largest else None)
            yield compared(key, plain, {kind: rounded}, written.read(key, shape))
        extra = written.keys() - files.shapes.keys()
        yield from (Compared(key, "it is not in the merged model", "", None) for key in extra)

    def load(self, folder: Path) -> Any:
        """The model as transformers reads it, in float32; activations are rounded, too."""
        run = open_run(folder, consent=self.consent)
        recipe = recipe_for(run)
        config = load_config(recipe)
        trusted: dict[str, Any] = {"trust_remote_code": self.consent.trust_remote_code}
        with contextlib.redirect_stderr(io.StringIO()):  # bars of the library
            model = pretrained(class_of(recipe, config), str(folder), dtype="auto", **trusted)
            model.hf_quantizer.compressor.decompress_model(model)
        return nn.Module.float(model).eval()  # a quantized model's own method refuses

    def tokenizer(self, folder: Path, ours: Any) -> TokenizerRead:
        """The tokenizer that is in the folder."""
        return folder_tokenizer(folder, self.consent)

    def other_reader(self, folder: Path, length: int) -> Logits | str:
        """Nothing: vLLM needs a GPU."""
        return ""


class CompressedFiles:
    """The tensors in a folder that compressed-tensors wrote, decompressed one by one."""

    def __init__(self, folder: Path, format: Format) -> None:
        self.format, self._parts = format, _parts(format)
        self._file: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._file |= dict.fromkeys(file.keys(), path)

    def keys(self) -> set[str]:
        """The names of the plain model's tensors."""
        return {
            f"{layer}weight" if f"{layer}weight_scale" in self._file and last in self._parts else n
            for n in self._file
            for layer, last in [(n[: n.rfind(".") + 1], n[n.rfind(".") + 1 :])]
        }

    def read(self, key: str, shape: tuple[int, ...]) -> Tensor | None:
        """The tensor ``key`` of the plain model, of a shape; None: it is not there."""
        layer = key.removesuffix("weight")
        if key.endswith(".weight") and f"{layer}weight_scale" in self._file:
            state = {
                n: self._tensor(f"{layer}{n}") for n in self._parts if f"{layer}{n}" in self._file
            }
            if "weight" not in state and "weight_packed" not in state:
                return None
            stored = state.get("weight_shape", torch.tensor(shape)).tolist()
            return decompress(self.format, state, stored)
        return self._tensor(key) if key in self._file else None

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self._file[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
