"""Linears whose weights libraries store in few bits, and stand-ins written like them.

A library's layer, or a layer that unpacks its weight with the library's function at each call, says
that its formula is recognised; a stand-in says the same where the library is not installed.
``python -m tests.models.stored_formats`` writes the table of ``docs/quantization.md``.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusewright.graph.opaque.quantized import inner_tensor
from fusewright.graph.opaque.stacks import packed_stack
from fusewright.graph.packed_stacks import pack_stacks
from fusewright.graph.subclasses import close_weights, open_weights
from fusewright.kernels.linear import quantized
from fusewright.kernels.linear.quantized import Quantized
from fusewright.rewrite.findings import Finding

from ..capturing import rewrite

E4M3 = torch.float8_e4m3fn


class StoredLinear(nn.Module):
    """``F.linear`` with a weight that ``dequantize`` computes from the layer's buffers."""

    def __init__(
        self, tensors: dict[str, Tensor], dequantize: Callable[[Any], Tensor], size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = size
        self.dequantize_by = dequantize
        for name, t in tensors.items():
            self.register_buffer(name, t)

    def dequantized(self) -> Tensor:
        return self.dequantize_by(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype))


class Transposed(StoredLinear):
    """A weight (in, out), as GPTQ and AWQ have it, over rows, and a bias that is added in place."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.bias = nn.Parameter(torch.randn(self.out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        rows = x.reshape(-1, x.shape[-1])
        out = torch.matmul(rows, self.dequantized().to(x.dtype)).reshape(shape)
        out.add_(self.bias.to(x.dtype))
        return out


@dataclass(frozen=True)
class Format:
    """A stored format: ``make(out, in, dtype)`` returns a layer."""

    name: str
    library: str  # the package to import, or nothing for a stand-in
    make: Callable[[int, int, torch.dtype], nn.Module]
    # the library's own weight (out, in) of a layer
    dequantized: Callable[[Any], Tensor]

    def is_installed(self) -> bool:
        return not self.library or importlib.util.find_spec(self.library) is not None


# -- stand-ins -------------------------------------------------------------------------------------
def _words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def _bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _scales(*shape: int, into: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    return (into**-0.5 * 0.2 * (0.5 + torch.rand(shape))).to(dtype)


def _gptq(out: int, into: int, dtype: torch.dtype, group: int = 64) -> nn.Module:
    def dequantize(m: Any) -> Tensor:
        zeros = torch.bitwise_right_shift(
            m.qzeros.unsqueeze(2).expand(-1, -1, 8), m.wf.unsqueeze(0)
        )
        zeros = torch.bitwise_and(zeros.to(torch.int8), 15).reshape(m.scales.shape)
        codes = torch.bitwise_right_shift(
            m.qweight.unsqueeze(1).expand(-1, 8, -1), m.wf.unsqueeze(-1)
        )
        codes = torch.bitwise_and(codes.to(torch.int8), 15)
        codes = codes.reshape(codes.shape[0] * codes.shape[1], codes.shape[2])
        order = m.g_idx.long()
        return m.scales[order] * (codes - zeros[order])

    tensors = {
        "qweight": _words(into // 8, out),
        "qzeros": _words(into // group, out // 8),
        "scales": _scales(into // group, out, into=into, dtype=dtype),
        "g_idx": (torch.randperm(into) // group).to(torch.int32),
        "wf": torch.arange(0, 32, 4, dtype=torch.int32).unsqueeze(0),
    }
    return Transposed(tensors, dequantize, (out, into))


def _awq(out: int, into: int, dtype: torch.dtype, group: int = 64) -> nn.Module:
    def unpack(words: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4, device=words.device)
        codes = torch.bitwise_right_shift(words[:, :, None], shifts[None, None, :]).to(torch.int8)
        codes = codes.view(codes.shape[0], -1)
        order = torch.arange(codes.shape[-1], dtype=torch.int32, device=words.device)
        order = order.view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].view(-1)
        return torch.bitwise_and(codes[:, order], 15)

    def dequantize(m: Any) -> Tensor:
        scales = m.scales.repeat_interleave(group, dim=0)
        zeros = unpack(m.qzeros).repeat_interleave(group, dim=0)
        return (unpack(m.qweight) - zeros) * scales

    tensors = {
        "qweight": _words(into, out // 8),
        "qzeros": _words(into // group, out // 8),
        "scales": _scales(into // group, out, into=into, dtype=dtype),
    }
    return Transposed(tensors, dequantize, (out, into))


def _fp8_blocks(out: int, into: int, dtype: torch.dtype, block: int = 128) -> nn.Module:
    def dequantize(m: Any) -> Tensor:
        scale = m.scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
        return (m.codes.to(torch.float32) * scale[:out, :into]).to(dtype)

    codes = torch.randn(out, into).mul_(32).to(E4M3)
    scale = _scales(-(-out // block), -(-into // block), into=into) / 32
    return StoredLinear({"codes": codes, "scale": scale}, dequantize, (out, into))


def _fp8_rows(out: int, into: int, dtype: torch.dtype) -> nn.Module:
    codes, scale = torch.randn(out, into).mul_(32).to(E4M3), _scales(out, 1, into=into) / 32
    return StoredLinear(
        {"codes": codes, "scale": scale},
        lambda m: m.codes.to(dtype) * m.scale.to(dtype),
        (out, into),
    )


def _mxfp4(out: int, into: int, dtype: torch.dtype) -> nn.Module:
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

    def dequantize(m: Any) -> Tensor:
        pairs = torch.stack((m.blocks & 15, m.blocks >> 4), dim=-1).reshape(out, into // 32, 32)
        exponent = m.exponents.to(torch.int32) - 127
        return torch.ldexp(m.values[pairs.long()], exponent.unsqueeze(-1)).reshape(out, into)

    tensors = {
        "blocks": _bytes(out, into // 2),
        "exponents": torch.randint(120, 124, (out, into // 32), dtype=torch.uint8),
        "values": torch.tensor(values + [-v for v in values], dtype=dtype),
    }
    return StoredLinear(tensors, dequantize, (out, into))


def _nvfp4(out: int, into: int, dtype: torch.dtype) -> nn.Module:
    def dequantize(m: Any) -> Tensor:
        flat = m.packed.flatten()
        codes = torch.stack((flat & 0x0F, (flat & 0xF0) >> 4), dim=1).flatten()
        signs, sizes = (codes & 8).to(torch.bool), (codes & 7).to(torch.long)
        values = m.values[sizes] * torch.where(signs, -1.0, 1.0)
        groups = values.reshape(out, into // 16, 16).to(dtype)
        return (groups * (m.scale.to(dtype) / m.whole).unsqueeze(-1)).reshape(out, into)

    tensors = {
        "packed": _bytes(out, into // 2),
        "scale": (torch.rand(out, into // 16) + 0.5).to(E4M3),
        "values": torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]),
        "whole": torch.full((1,), 2 * into**0.5, dtype=dtype),
    }
    return StoredLinear(tensors, dequantize, (out, into))


def _int4_groups(out: int, into: int, dtype: torch.dtype, group: int = 32) -> nn.Module:
    def dequantize(m: Any) -> Tensor:
        codes = torch.zeros((out, into), dtype=torch.int32, device=m.packed.device)
        for i in range(8):
            codes[:, i::8] = (m.packed >> (4 * i)) & 15
        groups = (codes - 8).to(torch.int8).unflatten(-1, (into // group, group))
        return (groups.to(dtype) * m.scale.unsqueeze(-1)).flatten(-2, -1)

    tensors = {
        "packed": _words(out, into // 8),
        "scale": _scales(out, into // group, into=into, dtype=dtype),
    }
    return StoredLinear(tensors, dequantize, (out, into))


def _halves(out: int, into: int, dtype: torch.dtype, group: int = 64) -> nn.Module:
    """As HQQ packs four bits: the first half of all groups in the high halves of the bytes."""

    def dequantize(m: Any) -> Tensor:
        step = m.packed.shape[0]
        codes = torch.empty([2 * step, group], dtype=dtype, device=m.packed.device)
        codes[:step] = (m.packed & 0b11110000) >> 4
        codes[step:] = m.packed & 0b00001111
        return ((codes - m.zero) * m.scale).reshape(out, into)

    groups = out * into // group
    tensors = {
        "packed": _bytes(groups // 2, group),
        "zero": (8 + torch.rand(groups, 1)).to(dtype),
        "scale": _scales(groups, 1, into=into, dtype=dtype),
    }
    return StoredLinear(tensors, dequantize, (out, into))


def _int8_rows(out: int, into: int, dtype: torch.dtype) -> nn.Module:
    codes = torch.randint(-127, 128, (out, into), dtype=torch.int8)
    tensors = {"codes": codes, "scale": _scales(out, into=into, dtype=dtype) / 16}
    return StoredLinear(tensors, lambda m: m.codes.to(dtype) * m.scale.view(-1, 1), (out, into))


class StoredExperts(nn.Module):
    """Routed experts whose stacks are computed from buffers, as transformers multiplies by them."""

    def __init__(
        self, name: str, experts: int, hidden: int, inner: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype, self.unpack = dtype, STACKS[name][1]
        for role, shape in (("up", (2 * inner, hidden)), ("down", (hidden, inner))):
            for part, t in STACKS[name][0](experts, *shape).items():
                self.register_buffer(f"{role}_{part}", t)

    def stack(self, role: str) -> Tensor:
        """The stack (experts, out, in), unpacked."""
        length = len(role) + 1
        parts = {n[length:]: t for n, t in self.named_buffers() if n.startswith(role)}
        return self.unpack(parts, self.dtype)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor, *factors: Tensor) -> Tensor:
        from fusewright.graph.opaque.stacks import updated_stack

        from ..passes.test_moe_experts import experts

        up, down = self.stack("up"), self.stack("down")
        if factors:
            up = updated_stack(up, [factors[0]], [factors[1]], [2.0])
            down = updated_stack(down, [factors[2]], [factors[3]], [2.0])
        result: Tensor = experts(x, index, weights, up, down)
        return result


def _fp4_stack(parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    # as transformers unpacks gpt-oss's
    values = torch.tensor(_FP4, dtype=dtype, device=parts["blocks"].device)
    blocks, exponents = parts["blocks"], parts["scales"].to(torch.int32) - 127
    experts, out, groups, size = blocks.shape
    blocks = blocks.reshape(experts * out * groups, size)
    codes = torch.empty(experts * out * groups, 2 * size, dtype=dtype, device=blocks.device)
    codes[:, 0::2] = values[(blocks & 15).to(torch.int)]
    codes[:, 1::2] = values[(blocks >> 4).to(torch.int)]
    codes = torch.ldexp(codes, exponents.reshape(-1, 1))
    return codes.reshape(experts, out, groups * 2 * size)


def _fp8_stack(parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    block = parts["codes"].shape[1] // parts["scale"].shape[1]
    scale = parts["scale"].repeat_interleave(block, 1).repeat_interleave(block, 2)
    return (parts["codes"].to(torch.float32) * scale).to(dtype)


def _int4_stack(parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    # the table of shifts is every expert's
    codes = (parts["packed"].unsqueeze(-1) >> parts["shifts"]) & 15
    groups = (codes.flatten(-2) - 8).to(torch.int8).unflatten(-1, (-1, 32))
    return (groups.to(dtype) * parts["scale"].to(dtype).unsqueeze(-1)).flatten(-2, -1)


_FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
_Stack = tuple[
    Callable[[int, int, int], dict[str, Tensor]],
    Callable[[dict[str, Tensor], torch.dtype], Tensor],
]
STACKS: dict[str, _Stack] = {
    "mxfp4": (
        lambda e, out, into: {
            "blocks": _bytes(e, out, into // 32, 16),
            "scales": torch.randint(120, 124, (e, out, into // 32), dtype=torch.uint8),
        },
        _fp4_stack,
    ),
    "fp8-blocks": (
        lambda e, out, into: {
            "codes": torch.randn(e, out, into).mul_(32).to(E4M3),
            "scale": _scales(e, out // 16, into // 16, into=into) / 32,
        },
        _fp8_stack,
    ),
    "int4-groups": (
        lambda e, out, into: {
            "packed": _words(e, out, into // 8),
            "scale": _scales(e, out, into // 32, into=into),
            "shifts": torch.arange(0, 32, 4, dtype=torch.int32),
        },
        _int4_stack,
    ),
}
STACKS |= {
    name: (
        lambda e, out, into, fill=fill: {
            "codes": fill(e, out, into), "scale": _scales(e, out, 1, into=into) / 24,
        },
        lambda parts, dtype: parts["codes"].to(dtype) * parts["scale"].to(dtype),
    )
    for name, fill in (
        ("fp8-rows", lambda *shape: torch.randn(shape).mul_(32).to(E4M3)),
        ("int8-rows", lambda *shape: torch.randint(-127, 128, shape, dtype=torch.int8)),
    )
}  # fmt: skip
"""Stacks of experts: (experts, out, in) -> the stored tensors, and these -> the weights."""


def _own(layer: Any) -> Tensor:
    weight: Tensor = layer.dequantized()
    return weight.t() if isinstance(layer, Transposed) else weight


STAND_INS = [
    Format(name, "", make, _own)
    for name, make in {
        "gptq": _gptq, "awq": _awq, "fp8-blocks": _fp8_blocks, "fp8-rows": _fp8_rows,
        "mxfp4": _mxfp4, "nvfp4": _nvfp4, "int4-groups": _int4_groups, "hqq": _halves,
        "int8-rows": _int8_rows,
    }.items()
]  # fmt: skip


# -- libraries' ------------------------------------------------------------------------------------
def _gptqmodel(out: int, into: int, dtype: torch.dtype, bits: int = 4) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer: Any = TorchLinear(
        bits=bits, group_size=64, sym=False, desc_act=True, in_features=into, out_features=out,
        bias=True,
    )  # fmt: skip
    layer.qweight.copy_(_words(*layer.qweight.shape))
    layer.qzeros.copy_(_words(*layer.qzeros.shape))
    layer.scales = _scales(*layer.scales.shape, into=into, dtype=dtype)
    layer.g_idx.copy_(torch.randperm(into) // 64)
    layer.bias = torch.randn(out).to(dtype)
    layer.post_init()
    return layer.train()


def _gptqmodel_awq(out: int, into: int, dtype: torch.dtype) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    layer: Any = AwqTorchLinear(
        bits=4, group_size=64, sym=False, desc_act=False, in_features=into, out_features=out,
        bias=True, register_buffers=True,
    )  # fmt: skip
    layer.qweight.copy_(_words(*layer.qweight.shape))
    layer.qzeros.copy_(_words(*layer.qzeros.shape))
    layer.scales = _scales(*layer.scales.shape, into=into, dtype=dtype)
    layer.bias = torch.randn(out).to(dtype)
    layer.post_init()
    return layer.train()


def _compressed(out: int, into: int, dtype: torch.dtype, format: str, **scheme: Any) -> nn.Module:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    args = QuantizationArgs(**scheme)
    kind = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(format)
    size = (out, into // args.group_size if args.group_size else 1)
    if scheme["strategy"] == "block":
        size = (-(-out // args.block_structure[0]), -(-into // args.block_structure[1]))
    state: dict[str, Any] = {"weight_scale": _scales(*size, into=into, dtype=dtype)}
    if format == "nvfp4-pack-quantized":
        state["weight_scale"] = (torch.rand(size) + 0.5).to(E4M3)
        state["weight_global_scale"] = torch.full((1,), 2 * into**0.5)
        state["weight_packed"] = _bytes(out, into // 2)
    elif format == "mxfp4-pack-quantized":
        state["weight_scale"] = torch.randint(120, 124, size, dtype=torch.uint8)
        state["weight_packed"] = _bytes(out, into // 2)
    elif format == "pack-quantized":
        if not args.symmetric:
            state["weight_zero_point"] = torch.randint(-8, 8, size, dtype=torch.int8)
        state = compressor.compress(
            {"weight": torch.randn(out, into).to(dtype) * 0.02, **state}, kind
        )
    elif args.type == "float":
        state["weight"] = torch.randn(out, into).mul_(32).to(E4M3)
        state["weight_scale"] /= 32
    else:
        state["weight"] = torch.randint(-127, 128, (out, into), dtype=torch.int8)
        state["weight_scale"] /= 16
    state.pop("weight_shape", None)
    names = list(state)

    def decompress(m: Any) -> Tensor:
        own: dict[str, Any] = {n: getattr(m, n) for n in names}
        own["weight_shape"] = (out, into)
        weight: Tensor = compressor.decompress(own, kind)["weight"]
        return weight

    def of_fp4(m: Any) -> Tensor:  # what ``decompress`` does, but for the parameter that it makes
        unpacked = unpack_fp4_from_uint8(m.weight_packed, out, into)
        scale = compressor._decompress_scale(m.weight_scale, unpacked.dtype)
        whole = getattr(m, "weight_global_scale", None)
        weight: Tensor = dequantize(
            x_q=unpacked, scale=scale, args=args, global_scale=whole, dtype=unpacked.dtype
        )
        return weight

    layer = StoredLinear(state, of_fp4 if "fp4" in format else decompress, (out, into))
    layer.library_weight = lambda: decompress(layer)  # type: ignore[assignment]
    return layer


def _hqq(out: int, into: int, dtype: torch.dtype, axis: int = 1, bits: int = 4) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    layer = nn.Linear(into, out, bias=True)
    return HQQLinear(layer, config, compute_dtype=dtype, device="cpu", del_orig=True)


def _torchao(out: int, into: int, dtype: torch.dtype, make: str, group: int = 0) -> nn.Module:
    from torchao import quantization

    layer = nn.Linear(into, out, dtype=dtype)
    options: dict[str, Any] = {}
    if group:
        options = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(group)}
    quantization.quantize_(layer, getattr(quantization, make)(**options))
    return layer.requires_grad_(False)


def _awq_weight(layer: Any) -> Tensor:
    dtype = layer.scales.dtype
    like = torch.empty(1, layer.in_features, dtype=dtype)
    weight: Tensor = layer._dequantize_weight_for_inference(like, dtype=dtype)
    return weight.t()


_group = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
LIBRARIES = [
    Format("GPTQ, 4 bits, act order", "gptqmodel", _gptqmodel, lambda m: m.dequantize_weight().t()),
    Format("GPTQ, 8 bits, act order", "gptqmodel", functools.partial(_gptqmodel, bits=8),
           lambda m: m.dequantize_weight().t()),
    Format("AWQ, 4 bits", "gptqmodel", _gptqmodel_awq, _awq_weight),
    *(
        Format(name, "compressed_tensors", functools.partial(_compressed, format=format, **scheme),
               lambda m: m.library_weight())
        for name, format, scheme in (
            ("INT4 pack-quantized, groups", "pack-quantized", {**_group, "symmetric": True}),
            ("INT4 pack-quantized, groups, zero points", "pack-quantized",
             {**_group, "symmetric": False}),
            ("INT4 pack-quantized, rows", "pack-quantized",
             {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}),
            ("INT8, rows", "int-quantized",
             {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
            ("FP8, rows", "float-quantized",
             {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
            ("FP8, blocks of 128", "float-quantized",
             {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128],
              "symmetric": True}),
            ("NVFP4", "nvfp4-pack-quantized",
             {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
              "symmetric": True}),
            ("MXFP4", "mxfp4-pack-quantized",
             {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
              "symmetric": True}),
        )
    ),
    Format("HQQ, 4 bits, axis 1", "hqq", _hqq, lambda m: m.dequantize()),
    Format("HQQ, 4 bits, axis 0", "hqq", functools.partial(_hqq, axis=0), lambda m: m.dequantize()),
    Format("HQQ, 8 bits", "hqq", functools.partial(_hqq, bits=8), lambda m: m.dequantize()),
    Format("HQQ, 2 bits", "hqq", functools.partial(_hqq, bits=2), lambda m: m.dequantize()),
    *(
        Format(name, "torchao", functools.partial(_torchao, make=make, group=group),
               lambda m: m.weight.dequantize())
        for name, make, group in (
            ("INT8, rows", "Int8WeightOnlyConfig", 0),
            ("FP8, rows", "Float8WeightOnlyConfig", 0),
            ("INT4 in bytes, groups", "IntxWeightOnlyConfig", 32),
        )
    ),
]  # fmt: skip


def run_rewritten(layer: nn.Module, x: Tensor) -> tuple[Tensor, list[Finding], list[Quantized]]:
    """What a layer returns once it is rewritten, what was found, and its weights by formula."""
    call, findings, weights = rewritten_layer(layer)
    return call(x), findings, weights


def rewritten_layer(layer: nn.Module) -> tuple[Any, list[Finding], list[Quantized]]:
    """A layer that is rewritten when it is first called; what is found, and its weights, then."""
    findings: list[Finding] = []
    weights: list[Quantized] = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        opened = open_weights(module)
        findings.extend(rewrite(module))
        close_weights(opened)
        pack_stacks(module)
        places = module.graph.find_nodes(op="placeholder")

        def run(*args: Any) -> Any:
            values = dict(zip(places, args, strict=True))
            for node in module.graph.nodes:
                if node.target is inner_tensor:
                    values[node] = getattr(values[node.args[0]], node.args[1])
                for fields in _stored(node.args) if node.target is not packed_stack else ():
                    tensors = tuple(values[t] for t in fields[0])
                    weights.append(Quantized(tensors, *fields[1:]))
            return module(*args)

        return run

    torch._dynamo.reset()
    return torch.compile(layer, backend=backend, fullgraph=True), findings, weights


def _stored(argument: Any) -> Iterator[Any]:
    if isinstance(argument, (tuple, list)):
        if len(argument) == 4 and isinstance(argument[3], str):
            yield argument
        for part in argument:
            yield from _stored(part)


def adapted(layer: nn.Module, dtype: torch.dtype, rank: int = 8) -> Any:
    """PEFT's LoRA layer over ``layer``, with an adapter that is not zero."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    config = LoraConfig(r=rank, lora_alpha=2 * rank)
    lora: Any = Linear(layer, "default", config, r=rank, lora_alpha=2 * rank)
    for part in (lora.lora_A, lora.lora_B):  # they come in the dtype of what is stored
        part.to(dtype)
        nn.init.normal_(part["default"].weight, std=0.05)
    return lora


# -- the table -------------------------------------------------------------------------------------
OUT, INTO, ROWS, PART = 1024, 512, 32, 1 << 16
EXPERTS, HIDDEN, INNER, ACTIVE = 8, 256, 256, 2


def peak(run: Callable[[], Any]) -> int:
    """Bytes that ``run`` holds at its highest, above what was there before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    total = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            highest = max(highest, total)
    return highest


def _experts_call(name: str) -> tuple[Any, list[Tensor], list[Tensor]]:
    """A layer of experts with adapters, what it is called with, and what of that is trained."""
    layer = StoredExperts(name, EXPERTS, HIDDEN, INNER, torch.bfloat16)
    x = torch.randn(ROWS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    index = torch.stack([torch.randperm(EXPERTS)[:ACTIVE] for _ in range(ROWS)])
    weights = torch.rand(ROWS, ACTIVE, requires_grad=True)
    shapes = ((2 * INNER, 8), (8, HIDDEN), (HIDDEN, 8), (8, INNER))
    factors = [(0.1 * torch.randn(EXPERTS, *s)).to(torch.bfloat16).requires_grad_() for s in shapes]
    return layer, [x, index, weights, *factors], [x, weights, *factors]


def memory(form: Format, lora: bool) -> tuple[str, float | None, int, int]:
    """How a layer was rewritten, its error, and the bytes of a step, eager's and ours."""
    torch.manual_seed(0)
    layer = form.make(OUT, INTO, torch.bfloat16)
    layer = adapted(layer, torch.bfloat16) if lora else layer
    x = torch.randn(1, ROWS, INTO, dtype=torch.bfloat16, requires_grad=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return measured("lora_linear" if lora else "quant_linear", layer, [x], trained)


def measured(
    rule: str, layer: nn.Module, inputs: list[Tensor], trained: list[Tensor]
) -> tuple[str, float | None, int, int]:
    """How ``rule`` rewrote a layer, its error, and the bytes of a step, eager's and ours."""
    compiled, findings, _ = rewritten_layer(layer)
    upstream = torch.randn_like(compiled(*inputs))
    torch.autograd.grad(compiled(*inputs), trained, upstream)

    def step(call: Any) -> int:
        return peak(lambda: torch.autograd.grad(call(*inputs), trained, upstream))

    found = next((f for f in findings if f.rule == rule), None)
    if found is None or found.status != "rewritten":
        return ("no: " + (found.reason if found else "not recognised")), None, step(layer), 0
    figures = found.figures
    error = None if figures is None else max(figures.error or 0.0, figures.grad_error or 0.0)
    return "yes", error, step(layer), step(compiled)


def table() -> list[str]:
    """The lines of the table, from one step of each format."""
    quantized.PART = PART
    lines = [
        f"A layer of {OUT} x {INTO} (in bfloat16 {OUT * INTO >> 9} KiB), in parts of 256 rows or",
        f"columns, and {ROWS} rows of input. Experts, with LoRA on them: {EXPERTS} of"
        f" {2 * INNER} x {HIDDEN} and",
        f"{HIDDEN} x {INNER} (in bfloat16 {3 * EXPERTS * INNER * HIDDEN >> 9} KiB), {ACTIVE} for"
        " each row.",
        "",
        "| format | stored by | plain | error | memory, eager and rewritten | LoRA | error "
        "| memory, eager and rewritten | experts | error | memory, eager and rewritten |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for form in (*STAND_INS, *LIBRARIES):
        cells = [form.name, form.library.replace("_", "-") or "(stand-in)"]
        steps = [functools.partial(memory, form, lora) for lora in (False, True)]
        if not form.library and form.name in STACKS:
            torch.manual_seed(0)
            experts = _experts_call(form.name)
            steps.append(functools.partial(measured, "moe_experts", *experts))
        for step in steps:
            if not form.is_installed():
                cells += ["not run: not installed", "", ""]
                continue
            status, error, eager, ours = step()
            cells += [status, "" if error is None else f"{error:.1e}"]
            cells.append(f"{eager >> 10} KiB, {ours >> 10} KiB" if ours else "")
        cells += ["-", "", ""] * (len(steps) < 3)
        print(cells, flush=True)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


MARKS = ("<!-- formats -->", "<!-- end of formats -->")


def main(path: str) -> None:
    """Write the table between its marks in a page."""
    page = Path(path)
    before, rest = page.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text("\n".join([before + MARKS[0], "", *table(), "", MARKS[1] + after]))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/quantization.md")
