"""What a weight becomes that is written in a format of an export, and read back.

All rounding is done by the library that owns the format: ``compressed-tensors``, ``gguf``, or ggml.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..recipe.export_formats import FORMATS, Format
from .multimodal import is_in, towers
from .quantize import head_modules

Shape = tuple[int, ...]


def roundtrip(format: Format, weight: Tensor, largest: Tensor | None = None) -> Tensor:
    """``weight``, written in ``format`` and read back by the library that owns it.

    ``weight`` is (out, in), in the dtype in which it is written (that of the merged model).
    ``largest``, of a format that ``shares_scale``, is the largest absolute value among all weights
    that share it (``sharing``); None: that of ``weight``. Returns (out, in): in float32 from GGUF,
    else in the dtype that the library decompresses to.

    Raises:
        ValueError: the weight has a shape that is a ``misfit``, or llama.cpp mixes types.
        NotImplementedError: no installed library writes the type.
    """
    reason = misfit(format, tuple(weight.shape))
    if reason is not None:
        raise ValueError(f"{format.name}: {reason}")
    if format.writer == "merged":
        return weight.to(getattr(torch, format.name))
    if format.writer == "compressed-tensors":
        return decompress(format, compress(format, weight, largest), weight.shape)
    if not format.type:
        raise ValueError(f"{format.name}: llama.cpp chooses a type for each tensor")
    return gguf_roundtrip(weight, format.type)


def misfit(format: Format, shape: Shape) -> str | None:
    """Why a weight of this shape, (out, in), cannot be stored in ``format``; None: it can."""
    if format.writer == "merged":
        return None
    if len(shape) != 2:
        return f"it has {len(shape)} dimensions"
    if format.writer == "gguf":
        return _indivisible(shape, _block(format.type)) if format.type else None
    weights = scheme(format).weights
    block = weights.block_structure
    reason = _indivisible(shape, block[1] if block else weights.group_size or 1)
    if reason is None:
        return None
    others = [
        other.name
        for other in FORMATS.values()
        if other.scheme == format.scheme and other.group and shape[-1] % other.group == 0
    ]
    return f"{reason}: {others[0]} fits" if others else reason


def _indivisible(shape: Sequence[int], size: int) -> str | None:
    if shape[-1] % size == 0:
        return None
    return f"its rows have {shape[-1]} values, which {size} does not divide"


# --- which weights -------------------------------------------------------------------------------


def rounded_layers(model: Any, format: Format) -> dict[str, nn.Linear]:
    """The linear layers of a model whose weights ``format`` stores in few bits, by path.

    Neither the head (but see ``Format.with_ends``), nor routers, nor towers for images and sound,
    nor layers whose shape does not fit. Experts that are stacked in one parameter are no layers:
    where they are written, it is expert by expert, (out, in) of each.
    """
    left_out = {*(() if format.with_ends else head_modules(model)), *routers(model)}
    places = towers(model)
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path not in left_out and not is_in(path, places)
        and misfit(format, (module.out_features, module.in_features)) is None
    }  # fmt: skip


def routers(model: nn.Module) -> list[str]:
    """The paths of the linear layers that choose experts, or weigh those that all tokens reach.

    Each has as many outputs as there are experts, or one, and is beside the experts.
    """
    found = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        counts = {n for child in children.values() for n in _experts(child)}
        found += [
            f"{path}.{name}".lstrip(".")
            for name, child in children.items()
            if counts and isinstance(child, nn.Linear) and child.out_features in {*counts, 1}
        ]
    return found


def _experts(module: nn.Module) -> set[int]:
    """The number of experts, of a module that has nothing else."""
    if isinstance(module, nn.ModuleList):
        return {len(module)} - {1}
    return {p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3}


def shares_scale(format: Format) -> bool:
    """Whether engines that fuse layers need one global scale for all of them."""
    tensors = format.writer == "compressed-tensors"
    return tensors and scheme(format).weights.strategy == "tensor_group"


def sharing(shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    """For each weight's layer, all layers that share its global scale: engines may fuse them.

    ``shapes`` are those of weights, (out, in), by the paths of their layers. Fused are layers of
    one module with inputs of one size, such as those of queries, keys and values.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    for path, shape in shapes.items():
        groups.setdefault((path.rpartition(".")[0], shape[1]), []).append(path)
    return {path: group for group in groups.values() for path in group}


# --- compressed-tensors --------------------------------------------------------------------------


@functools.cache
def scheme(format: Format) -> Any:
    """The ``QuantizationScheme`` of ``compressed-tensors``, for linear layers."""
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme

    result = preset_name_to_scheme(format.scheme, ["Linear"])
    if format.group is not None:
        result.weights.group_size = format.group
    result.format = infer_module_format(nn.Linear, result)
    return result


def compress(format: Format, weight: Tensor, largest: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors that ``compressed-tensors`` stores for a weight, by their last names."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight = weight.detach()
    state, overall = {"weight": weight}, None
    if shares_scale(format):
        largest = weight.abs().max() if largest is None else largest
        state["weight_global_scale"] = overall = generate_gparam(-largest, largest)
    args = scheme(format).weights
    scale, zero = calculate_qparams(*ranges(args, weight), args, global_scale=overall)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    return dict(compressor(format).compress(state, scheme(format)))


def decompress(format: Format, state: Mapping[str, Tensor], shape: Iterable[int]) -> Tensor:
    """The weight, (out, in), of the tensors that are stored for it."""
    state = {**state, "weight_shape": torch.tensor(tuple(shape))}
    weight: Tensor = compressor(format).decompress(state, scheme(format))["weight"]
    return weight.detach()


def compressor(format: Format) -> Any:
    """What packs and unpacks weights for ``compressed-tensors``."""
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(scheme(format).format.value)


def ranges(args: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of the values that share a scale: a min-max observer."""
    from compressed_tensors.quantization.utils import maybe_pad_tensor_for_block_quant

    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "block":
        rows, columns = args.block_structure
        blocks = maybe_pad_tensor_for_block_quant(weight, (rows, columns))
        blocks = blocks.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.unflatten(1, (-1, args.group_size))
    return groups.amin(-1), groups.amax(-1)


# --- GGUF ----------------------------------------------------------------------------------------


def gguf_roundtrip(weight: Tensor, type: str) -> Tensor:
    """``weight`` in a type of GGUF, such as ``"Q8_0"``, and back in float32.

    By the ``gguf`` package, or by ggml, which llama-cpp-python brings, for types that ``gguf`` can
    only read. Raises a NotImplementedError if neither writes the type, and a ValueError if its
    blocks do not divide the rows.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[type]
    if (reason := _indivisible(weight.shape, _block(type))) is not None:
        raise ValueError(f"{type}: {reason}")
    values = weight.detach().to(torch.float32).cpu().numpy()
    try:
        packed = gguf.quants.quantize(values, kind)
    except NotImplementedError:
        packed = _ggml_quantize(values, kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind).copy()).to(weight.device)


def _block(type: str) -> int:
    import gguf

    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][0])


def _ggml_quantize(values: Any, kind: Any) -> Any:
    """What llama.cpp's quantizer makes of a matrix without importances: rows of bytes."""
    import ctypes

    import gguf
    import numpy as np

    try:
        from llama_cpp._ggml import libggml
    except ImportError:
        raise NotImplementedError(f"{kind.name} needs llama-cpp-python") from None
    block, size = gguf.GGML_QUANT_SIZES[kind]
    columns = values.shape[-1]
    values = np.ascontiguousarray(values)
    packed = np.empty((*values.shape[:-1], columns // block * size), np.uint8)
    quantize = libggml.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    rows = values.size // columns
    written = quantize(kind.value, values.ctypes.data, packed.ctypes.data, 0, rows, columns, None)
    if written != packed.nbytes:
        raise NotImplementedError(f"ggml wrote {written} bytes of {packed.nbytes}")
    return packed
