"""Training with weights as an export will round them (``export_format``).

A linear layer whose merged weight M an export stores in few bits multiplies by Q(M) in training,
too: y = x Q(W + s B A)^T. Backward, rounding is the identity (the straight-through estimator,
Bengio et al. 2013): A and B get the gradients of an adapter that is not rounded, in split products,
and x that of Q(M). What is gained is gained after rounding; what is saved is plain.

Nothing of the size of a weight is kept for backward: the weight is rounded anew there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import TrainerCallback

from ...errors import RecipeError
from ...upstream import changed
from ..recipe.export_formats import Format, format_named
from ..recipe.recipe import Recipe
from . import rounding
from .relora import dense
from .stored import is_stored

# --- what a weight becomes -----------------------------------------------------------------------

_CHUNK = 2**17
"""Elements of a weight that are rounded at a time: those that fit into a core's cache."""


@torch.no_grad()
def roundtrip(format: Format, weight: Tensor, largest: Tensor | None = None) -> Tensor:
    """``rounding.roundtrip``, bit for bit, in a few passes over parts that stay in the cache.

    The library's takes 16 passes to round to FP4, and packs and unpacks. Scales are the library's.
    """
    if format.type == "Q8_0":
        return _q8_0(weight)
    args = rounding.scheme(format).weights if format.writer == "compressed-tensors" else None
    if args is None or args.strategy == "block" or not args.symmetric or _by_library(args):
        return rounding.roundtrip(format, weight, largest)
    divisor, factor, dtype = _scales(format, args, weight, largest)
    result = torch.empty_like(weight, dtype=dtype)
    group = weight.shape[1] // divisor.shape[1]
    low, high = _range(args)
    # of one memory: that of a large temporary tensor costs more than what is computed in it
    memory = _memory(weight, torch.promote_types(weight.dtype, divisor.dtype))
    for rows in _chunks(weight):
        values, out = weight[rows].unflatten(1, (-1, group)), result[rows].unflatten(1, (-1, group))
        v = torch.div(values, divisor[rows].unsqueeze(-1), out=memory[: len(out)].view_as(out))
        v = _nearest(v.clamp_(low, high), args).to(factor.dtype)
        torch.mul(v, factor[rows].unsqueeze(-1), out=out)
    return result


def _by_library(args: Any) -> bool:
    """Whether only the library can store scales, whose names have changed."""
    return args.scale_dtype is not None and changed("stored scales") is not None


def _scales(
    format: Format, args: Any, weight: Tensor, largest: Tensor | None
) -> tuple[Tensor, Tensor, torch.dtype]:
    """What divides a weight, and multiplies it once it is read, (out, groups); its dtype then."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    overall = None
    if rounding.shares_scale(format):
        largest = weight.abs().max() if largest is None else largest
        overall = generate_gparam(-largest, largest)
    low, high = rounding.ranges(args, weight)
    scale, _ = calculate_qparams(low, high, args, global_scale=overall)
    divisor = scale if overall is None else scale / overall
    factor, dtype = scale, scale.dtype
    if args.scale_dtype is not None:
        compressor = rounding.compressor(format)
        stored = compressor._compress_scale(scale, args)
        packs = args.num_bits == 4
        factor = compressor._decompress_scale(stored, *((torch.bfloat16,) if packs else ()))
        dtype = factor.dtype
        factor = factor if overall is None else factor / overall
    return divisor, factor, dtype


def _range(args: Any) -> tuple[float, float]:
    from compressed_tensors.quantization.utils import calculate_range

    low, high = calculate_range(args, "cpu")
    return float(low), float(high)


def _nearest(v: Tensor, args: Any) -> Tensor:
    """The nearest values of the format, halves to even; ``v`` is in its range, and overwritten."""
    if args.type == "int":
        return v.round_()
    # adding 1.5 * 2^(23 - bits) times the power of two below |v|, which is at least the smallest
    # one of the format, leaves as many bits of mantissa in float32
    bits, smallest = (1, 0x3F800000) if args.num_bits == 4 else (3, 0x3C800000)  # 1 and 2^-6
    v = v.float()
    power = (v.view(torch.int32) & 0x7F800000).clamp_(min=smallest).view(torch.float32)
    power *= 1.5 * 2 ** (23 - bits)
    return v.add_(power).sub_(power)


def _memory(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the rows of a chunk."""
    return torch.empty(
        next(_chunks(weight)).stop, weight.shape[1], dtype=dtype, device=weight.device
    )


def _q8_0(weight: Tensor) -> Tensor:
    result = torch.empty_like(weight, dtype=torch.float32)
    for rows in _chunks(weight):
        v = weight[rows].float().unflatten(1, (-1, 32))
        scale = v.abs().amax(-1, keepdim=True) / 127
        v = v * torch.where(scale == 0, 0.0, 1 / scale)
        size = v.abs()
        floor = size.floor()
        v = v.sign() * (floor + (2 * (size - floor)).floor())  # halves away from zero
        result[rows] = (v.to(torch.int8).float() * scale.half().float()).flatten(1)
    return result


def _chunks(weight: Tensor) -> Iterator[slice]:
    step = max(_CHUNK // max(weight.shape[1], 1), 1)
    return (slice(i, i + step) for i in range(0, weight.shape[0], step))


# --- layers --------------------------------------------------------------------------------------


class Rounding(nn.Module):
    """What a layer's merged weight becomes in an export; the layer has it as ``rounding``.

    Attributes:
        enabled: whether the layer rounds; else it is what it was.
        dtype: of the merged weight.
        siblings: the layers whose weights share a global scale with this one's, itself included.
    """

    def __init__(self, format: Format, dtype: torch.dtype, siblings: list[Any]) -> None:
        super().__init__()
        self.format, self.dtype, self.siblings = format, dtype, siblings
        self.enabled = True
        self._largest: tuple[list[Tensor], Tensor] | None = None

    def extra_repr(self) -> str:
        """As it is printed."""
        return self.format.name if self.enabled else f"{self.format.name}, not yet"

    @torch.no_grad()
    def rounded(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """The rounded weight of ``layer``, (out, in), in ``dtype``."""
        weight = merged_weight(layer, self.dtype)
        if _is_empty(weight):
            return weight.to(dtype)
        largest = self._of_siblings() if self.siblings else None
        return roundtrip(self.format, weight, largest).to(dtype)

    def _of_siblings(self) -> Tensor:
        """The largest absolute value among the weights of all siblings."""
        # it is the same until an adapter changes: these are small, and compared
        small = [p for layer in self.siblings for p in _trained(layer)]
        first: Rounding = self.siblings[0].rounding
        if first._largest is not None:
            copies, largest = first._largest
            if all(map(torch.equal, copies, small)):
                return largest
        parts = [merged_weight(m, self.dtype).abs().max() for m in self.siblings]
        largest = torch.stack(parts).max()
        if all(_is_adapted(m) or not m.weight.requires_grad for m in self.siblings):
            first._largest = [p.clone() for p in small], largest
        return largest


def _is_adapted(layer: Any) -> bool:
    return hasattr(layer, "lora_A")


def _is_empty(weight: Tensor) -> bool:
    """Whether it has a shape only, as in a plan."""
    return isinstance(weight, FakeTensor) or weight.is_meta


def _trained(layer: Any) -> list[Tensor]:
    """The adapter of a layer: all that its merged weight depends on, besides its base."""
    parts = ("lora_A", "lora_B", "lora_magnitude_vector") if _is_adapted(layer) else ()
    return [p.detach() for part in parts for p in getattr(layer, part, nn.Module()).parameters()]


def _adapter(layer: Any) -> str | None:
    """The name of a layer's active adapter; None: its base alone computes."""
    if not _is_adapted(layer) or layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) > 1:
        raise RuntimeError(f"export_format: {', '.join(names)} are active: only one can be rounded")
    return cast("str", names[0]) if names else None


@torch.no_grad()
def merged_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight, (out, in), of a linear layer with its adapter merged, as ``merge.py`` merges it.

    PEFT's sum in float32, rounded once to ``dtype``. The layer's own where it has no adapter.
    """
    name = _adapter(layer)
    base = layer.get_base_layer() if _is_adapted(layer) else layer
    weight = _base_weight(base).to(dtype)
    if name is None or _is_empty(weight):
        return weight
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if name in layer.lora_variant:
        return _with_magnitude(layer, name, weight).to(dtype)
    result, memory = torch.empty_like(weight), _memory(weight, torch.float32)
    right, left, scale = a.detach().float(), b.detach().float(), layer.scaling[name]
    for rows in _chunks(weight):
        update = torch.mm(left[rows], right, out=memory[: len(left[rows])]).mul_(scale)
        update = update.to(a.dtype).float() if a.dtype.itemsize == 2 else update
        torch.add(weight[rows], update, out=result[rows])
    return result


def _with_magnitude(layer: Any, name: str, weight: Tensor) -> Tensor:
    """DoRA's weight: rows of the sum, each scaled to the length that is trained."""
    update, weight = layer.get_delta_weight(name), weight.float()
    vector = layer.lora_magnitude_vector[name]
    norm = vector.get_weight_norm(weight, update, scaling=1)
    result: Tensor = (vector.weight / norm).view(-1, 1) * (weight + update)
    return result


def _base_weight(base: Any) -> Tensor:
    unpacked = getattr(base, "unpacked", None)  # of compressed-tensors
    weight: Tensor = dense(base) if unpacked is None else unpacked(base)
    return weight


class _Product(torch.autograd.Function):
    """x Q(M)^T + bias; of a layer without an adapter, whose ``weight`` is trained or frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, layer: Any) -> Any:
        ctx.layer = layer
        ctx.save_for_backward(x if weight is not None and weight.requires_grad else None)
        return F.linear(x, layer.rounding.rounded(layer, x.dtype), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # 2026-11-30: no types
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        dx = _to_input(ctx, grad)
        dw = None
        if ctx.needs_input_grad[1]:
            dw = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        return dx, dw, _to_bias(ctx, grad, 2), None


class _AdaptedProduct(torch.autograd.Function):
    """x Q(W + scale b a)^T + bias; a (r, in) and b (out, r) are those of ``layer``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, layer: Any, scale: float
    ) -> Any:
        ctx.layer, ctx.scale = layer, scale
        ctx.save_for_backward(x, a, b)
        return F.linear(x, layer.rounding.rounded(layer, x.dtype), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # 2026-11-30: no types
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, a, b = ctx.saved_tensors
        dx = _to_input(ctx, grad)
        # in the adapter's dtype, as PEFT computes
        rows, dy = x.flatten(0, -2).to(a.dtype), grad.flatten(0, -2).to(a.dtype)
        da = db = None
        if ctx.needs_input_grad[1]:
            da = ((dy @ b).t() @ rows).mul_(ctx.scale)
        if ctx.needs_input_grad[2]:
            db = (dy.t() @ (rows @ a.t())).mul_(ctx.scale)
        return dx, da, db, _to_bias(ctx, grad, 3), None, None


def _to_input(ctx: Any, grad: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[0]:
        return None
    weight: Tensor = ctx.layer.rounding.rounded(ctx.layer, grad.dtype)
    return grad @ weight


def _to_bias(ctx: Any, grad: Tensor, place: int) -> Tensor | None:
    return grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[place] else None


_product: Any = _Product.apply
_adapted_product: Any = _AdaptedProduct.apply


# a tracer would see the weight's rounding, and not that nothing is kept of it
@torch.compiler.disable(reason="its weight is rounded as an export rounds it")  # type: ignore[untyped-decorator]  # 2026-11-30: no types
def _multiply(layer: Any, x: Tensor, plain: Callable[..., Tensor]) -> Tensor:
    """What ``layer`` gives for x (..., in); ``plain`` is its forward without rounding."""
    name, kind = _adapter(layer), x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    base = layer.get_base_layer() if _is_adapted(layer) else layer
    bias = None if base.bias is None else base.bias.to(x.dtype)
    with torch.autocast(kind, enabled=False):
        if name is None:
            weight = layer.weight if layer.weight.requires_grad else None
            return cast("Tensor", _product(x, weight, bias, layer))
        a, b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        if name in layer.lora_variant:
            # the value of the rounded weight, and the gradient of an adapter that is not rounded
            adapted = plain(layer, x.detach())
            y = _product(x, None, None if bias is None else bias.detach(), layer)
            return cast("Tensor", y + (adapted - adapted.detach()))
        if b.bias is not None:
            shift = b.bias * scale
            bias = (shift if bias is None else bias + shift).to(x.dtype)
        y = _adapted_product(x, a.weight, b.weight, bias, layer, scale)
        dropout = layer.lora_dropout[name]
        if not isinstance(dropout, nn.Identity) and layer.training:
            wide = x.to(a.weight.dtype)  # the merged weight has all of x
            y = y + (b(a(dropout(wide) - wide)) * scale).to(y.dtype)
        return cast("Tensor", y)


@functools.cache
def rounding_class(kind: Any) -> Any:
    """The class of a linear layer's class that multiplies as the layer's ``rounding`` says."""
    plain = kind.forward

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        off = not self.rounding.enabled or getattr(self, "disable_adapters", False)
        if off or args or kwargs or getattr(self, "merged", False):
            return plain(self, x, *args, **kwargs)
        return _multiply(self, x, plain)

    # the names of its base, by which libraries know layers
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


# --- a model -------------------------------------------------------------------------------------


def exported_layers(model: Any, recipe: Recipe) -> list[str]:
    """The paths of the linear layers that the recipe's export rounds; ``model`` has no adapter."""
    name = recipe.rounds_as()
    return [] if name is None else list(rounding.rounded_layers(model, format_named(name)))


def round_in_training(
    model: Any, recipe: Recipe, paths: Sequence[str], say: Callable[[str], None] | None = None
) -> None:
    """Let the layers at ``paths`` of a model's base round as the recipe's export does, in place.

    The base has its adapters by now. ``say`` is called with lines about what is rounded.

    Raises:
        RecipeError: the merged weights of an adapter, or of a base in few bits, cannot be had here;
            or there is nothing to round.
    """
    name = recipe.rounds_as()
    if name is None:
        return
    format, adapts = format_named(name), hasattr(model, "peft_config")
    base = model.get_base_model() if adapts else model
    layers = {p: m for p in paths if (m := _module(base, p)) is not None}
    whole = {p: m for p, m in layers.items() if m is base.get_output_embeddings()}
    layers = {p: m for p, m in layers.items() if p not in whole}
    _require_layers(base, layers, format)
    groups = {path: [path] for path in layers}
    if rounding.shares_scale(format):
        groups = rounding.sharing({p: (m.out_features, m.in_features) for p, m in layers.items()})
    # what is frozen is rounded once and for good, where it is not saved: beside an adapter
    at_once = adapts and not recipe.rounds_after()
    for names in {tuple(names): names for names in groups.values()}.values():
        siblings = [layers[name] for name in names]
        if at_once and all(map(_is_frozen, siblings)):
            _round_for_good(format, [layer.weight for layer in siblings])
            continue
        shared = siblings if rounding.shares_scale(format) else []
        for layer in siblings:
            layer.rounding = Rounding(format, model.dtype, shared)
            layer.rounding.enabled = not recipe.rounds_after()
            layer.__class__ = rounding_class(type(layer))  # type: ignore[arg-type]  # 2026-11-30: a class
    left = _round_ends(base, format, at_once)
    if say is not None:
        say(f"export_format: {len(layers)} layers multiply by weights rounded to {format.name}")
        if left:
            say(f"export_format: rounded in the export only: {', '.join(left)}")


def _module(base: Any, path: str) -> Any:
    """The module at a path, or its trained copy (``modules_to_save``); None: there is none."""
    module = base
    for part in path.split("."):
        module = getattr(module, part, None)
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and len(copies):
            module = next(iter(copies.values()))
    return module


def _is_frozen(layer: Any) -> bool:
    """Whether a layer's weight is plain, has no adapter, and is not trained."""
    return not _is_adapted(layer) and _is_plain(layer) and not layer.weight.requires_grad


def _is_plain(base: Any) -> bool:
    weight = base.weight
    return (
        type(weight) is nn.Parameter and weight.dtype.is_floating_point
        and weight.dtype.itemsize > 1 and weight.shape == (base.out_features, base.in_features)
    )  # fmt: skip


def _require_layers(base: nn.Module, layers: dict[str, Any], format: Format) -> None:
    """Raise a RecipeError unless the merged weight of each layer can be computed at each step."""
    if not layers:
        raise RecipeError(f"export_format: the model has no layers that {format.name} rounds")
    for path, module in base.named_modules():
        if is_stored(module) and not isinstance(module, nn.Linear):
            raise RecipeError(
                f"export_format: {path} ({type(module).__name__}) computes its weight within its "
                "product; train on a base of 16 bits, or with load_in_4bit"
            )
    for path, layer in layers.items():
        variants = getattr(layer, "lora_variant", {}).values()
        names = [getattr(v, "__name__", type(v).__name__) for v in variants]
        odd = not all(name.startswith("Dora") for name in names)
        if odd or not (_is_adapted(layer) or isinstance(layer, nn.Linear)):
            raise RecipeError(
                f"export_format: {path} has an adapter other than LoRA or DoRA: only those are "
                "merged while they are trained"
            )
        inner = layer.get_base_layer() if _is_adapted(layer) else layer
        packed = type(inner.weight).__name__ in ("Params4bit", "Int8Params")
        if not (packed or hasattr(inner, "unpacked") or _is_plain(inner)):
            raise RecipeError(
                f"export_format: {path} has weights in few bits that are not unpacked here; train "
                "on a base of 16 bits, or with load_in_4bit"
            )


@torch.no_grad()
def _round_for_good(format: Format, weights: Sequence[Tensor]) -> None:
    """Round weights, which share a global scale if the format has one, in place."""
    if any(map(_is_empty, weights)):
        return
    largest = torch.stack([w.abs().max() for w in weights]).max()
    for weight in weights:
        weight.copy_(roundtrip(format, weight, largest if rounding.shares_scale(format) else None))


def _round_ends(base: Any, format: Format, at_once: bool) -> list[str]:
    """Round frozen embeddings and the head, if the format does; names what is left to the export.

    That is what is trained of them, and experts that are stacked in one parameter.
    """
    left = [f"{module} {name}" for module, name in _stacks(base)]
    ends = [base.get_input_embeddings(), base.get_output_embeddings()] if format.with_ends else []
    weights = {id(e.weight): e.weight for e in ends if isinstance(e, (nn.Embedding, nn.Linear))}
    frozen = [w for w in weights.values() if at_once and not w.requires_grad]
    for weight in frozen:
        if rounding.misfit(format, tuple(weight.shape)) is None:
            _round_for_good(format, [weight])
    if ends and len(frozen) < len({id(getattr(e, "weight", e)) for e in ends}):
        left.append("embeddings and head, where they are trained")
    return left


def _stacks(base: nn.Module) -> dict[tuple[str, str], None]:
    return {
        (type(module).__name__, name): None
        for module in base.modules()
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and p.is_floating_point()
    }


def rounds(module: nn.Module) -> bool:
    """Whether it is what rounds weights or activations, ours or torchao's."""
    ao = type(module).__module__ == "torchao.quantization.qat.fake_quantizer"
    return isinstance(module, Rounding) or ao


def stop_rounding(model: nn.Module) -> bool:
    """Let layers be what they were; whether there are any that round.

    What was rounded for good, because it is frozen, stays so.
    """
    modules: list[Any] = [m for m in model.modules() if rounds(m)]
    for module in modules:
        module.enabled = False
    return bool(modules)


class RoundingStart(TrainerCallback):
    """Begins to round ``model`` after the recipe's number of steps."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.layers: list[Any] = [m for m in model.modules() if rounds(m)]
        self.steps = recipe.rounds_after()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, where this is due; also where a run resumes after it."""
        for layer in self.layers:
            layer.enabled = state.global_step >= self.steps
