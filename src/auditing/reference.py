"""The plain model: fresh classes built from the configuration, adapters by PEFT, the same weights.

It has no weights of its own. Each parameter is the audited model's, cast when it is read: to fp32
for the reference, or as it is for eager's own error in the model's dtype. What autograd saves of a
cast is the parameter, and the cast is made again in backward, so the reference takes fp32 copies of
trained weights, their gradients, activations of its rows, and a few frozen weights at a time.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ..errors import ModelError, first_line
from ..kernels.tolerance import unit
from ..sharding import class_before_fsdp2, whole
from .by_hand import causal_lm
from .fresh import FreshSources, is_foreign, is_modeling
from .state import rates_of

SEED = 0
"""Each step draws its random numbers from it, if it draws any."""

Precision = Literal["exact", "own"]
Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass
class AuditStep:
    """One forward and backward.

    Attributes:
        loss: of the batch; None if only a forward without labels ran.
        gradients: by parameter name; None where there is none.
        logits: (rows, tokens, words), or None if the model has returned none.
        own_loss: what the model returned as loss itself.
        order: names of the parameters, in the order in which backward reaches them.
    """

    loss: float
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    logits: Tensor | None = None
    own_loss: float | None = None
    order: list[str] = field(default_factory=list)

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are all finite."""
        gradients = (g for g in self.gradients.values() if g is not None)
        return math.isfinite(self.loss) and all(bool(torch.isfinite(g).all()) for g in gradients)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers for several processes and for compilation."""
    inner: Any = model
    while True:
        if isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif type(inner).__module__.startswith("torch.nn.parallel.") and hasattr(inner, "module"):
            inner = inner.module
        else:
            return inner  # type: ignore[no-any-return]


def core_of(model: nn.Module) -> nn.Module:
    """The model of transformers, or the user's own, inside PEFT's."""
    inner: Any = unwrapped(model)
    if hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
        inner = inner.get_base_model()
    return unwrapped(inner)


def plain_class(core: nn.Module) -> type:
    """The class that the model is of by its configuration, under subclasses of others' making."""
    kind: type = class_before_fsdp2(core)
    config: Any = getattr(core, "config", None)
    for base in kind.__mro__:
        if is_modeling(base.__module__) and (
            config is None or isinstance(config, getattr(base, "config_class", None) or object)
        ):
            found: type = base
            return found
    return kind


def dtypes_of(model: nn.Module, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """The dtype that a step of ``model`` rounds to, and that of its reference."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    found |= set(filter(None, map(_computes_in, model.modules())))
    halves = found & {torch.bfloat16, torch.float16, torch.float8_e4m3fn}
    own: torch.dtype = autocast or min(halves, key=str, default=torch.float32)
    return own, torch.float32 if halves or autocast else torch.float64


def step_bytes(model: nn.Module, exact: torch.dtype, tokens: int, recompute: bool = False) -> int:
    """About what a step of the plain model takes beyond ``model``: trained copies, casts, logits.

    With it, the gradients in the dtypes of ``model``, of its own step and of eager mode's.
    ``recompute``: its blocks keep only their inputs, where transformers can checkpoint them.
    """
    parameters = list(model.parameters())
    trained = sum(p.numel() * (2 * exact.itemsize + 2 * p.itemsize)
                  for p in parameters if p.requires_grad)  # fmt: skip
    largest = max((p.numel() for p in parameters), default=0)
    config: Any = getattr(core_of(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width, layers, words = (
        int(getattr(text, name, 0) or 0)
        for name in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    # a block keeps some thirty activations as wide as the hidden state (gates included)
    kept = layers + 30 if recompute and any(_checkpointed(model)) else 30 * layers
    activations = tokens * (4 * words + kept * width)
    return trained + exact.itemsize * (2 * largest + activations)


def _checkpointed(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that transformers checkpoints on request: not all models have such."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))


class PlainModel:
    """The reference of one audited model.

    ``recompute``: its blocks keep only their inputs for backward, where transformers can checkpoint
    them. Raises a ModelError if it cannot be built; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        sources: FreshSources,
        autocast: Any = None,
        recompute: bool = False,
    ) -> None:
        self.audited = unwrapped(model)
        self.recompute = recompute
        self.autocast = autocast
        self.dtype, self.exact = dtypes_of(self.audited, autocast)
        self.sources = sources
        self.precision: Precision = "exact"
        self.is_running = False
        self._cache: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()
        self.leaves: dict[Precision, dict[int, Tensor]] = {"exact": {}, "own": {}}
        self.names: dict[str, nn.Parameter] = {}
        try:
            self.model = self._adapted(self._base())
            named = list(self.model.named_parameters())
            # PEFT changes these gradients itself (OSF): there is nothing to compare
            self.hooked = {name for name, p in named if p._backward_hooks}
            self.meant = {name for name, p in named if p.requires_grad}
            for _, module, name, _ in list(rates_of(self.model)):
                setattr(module, name, 0.0)
            self._fill()
        except (ModelError, MemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"the plain {type(core_of(model)).__name__} cannot be built from its configuration "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error

    @property
    def is_wide(self) -> bool:
        """Whether the reference is in fp64."""
        return self.exact == torch.float64

    def _base(self) -> nn.Module:
        core: Any = core_of(self.audited)
        kind = plain_class(core)
        if not is_modeling(kind.__module__) or not hasattr(core, "config"):
            raise ModelError(
                f"{kind.__name__} is not a class of transformers' modeling files, so that there is "
                "no source to build a plain one from"
            )
        config: Any = copy.deepcopy(core.config)
        twin = self.sources.twin(kind)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"
        if getattr(config, "_attn_implementation", None) is not None:
            config._attn_implementation = _attention_of(twin)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if self.recompute:  # a block that runs twice would add to a cache twice
            for each in (config, config.get_text_config()):
                each.use_cache = False
        with _parameters_on_meta(), _initialized_later():
            built = twin(config)
        if getattr(built, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration"):
            built.loss_function = causal_lm
        return built.train(core.training)  # type: ignore[no-any-return]

    def _adapted(self, base: nn.Module) -> nn.Module:
        audited: Any = self.audited
        configs = getattr(audited, "peft_config", None)
        if not isinstance(configs, dict):
            return base
        from peft import PeftModel, inject_adapter_in_model

        wraps = isinstance(audited, PeftModel)
        model: Any = base
        with _parameters_on_meta():
            for number, (name, config) in enumerate(configs.items()):
                config = copy.deepcopy(config)
                config.inference_mode = False
                if hasattr(config, "init_lora_weights"):
                    config.init_lora_weights = False  # PiSSA and others would change the base
                if not wraps:
                    model = inject_adapter_in_model(config, model, name)
                elif number:
                    model.add_adapter(name, config)
                else:
                    kind: Any = type(audited)
                    model = kind(model, config, adapter_name=name, autocast_adapter_dtype=False)
        if wraps:
            model.base_model.set_adapter(audited.active_adapters)
        elif hasattr(audited, "active_adapters"):
            from peft.tuners.tuners_utils import BaseTunerLayer

            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.set_adapter(_active(audited))
        for module in model.modules():
            kind = type(module)
            if kind.__module__.startswith("peft.") and _has_foreign_methods(kind):
                self.sources.patched.append(f"{kind.__module__}.{kind.__name__}")
                module.__class__ = self.sources.twin(kind)
        return model.train(audited.training)  # type: ignore[no-any-return]

    # --- weights ---------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Give every module the audited model's tensors."""
        theirs = dict(self.audited.named_modules())
        parameters = dict(self.audited.named_parameters(remove_duplicate=False))
        buffers = dict(self.audited.named_buffers(remove_duplicate=False))
        shared: dict[int, nn.Parameter] = {}
        for path, module in list(self.model.named_modules()):
            other: Any = theirs.get(path)
            if isinstance(module, nn.Linear) and other is not None and is_quantized(other):
                _replace(self.model, path, Dequantized(self, other))
                continue
            for name, old in module._parameters.items():
                full = f"{path}.{name}" if path else name
                if old is None:
                    continue
                parameter = parameters.get(full)
                if parameter is None:
                    raise ModelError(f"the audited model has no parameter {full}")
                data = whole(parameter).detach()
                if data.shape != old.shape:
                    raise ModelError(
                        f"{full} is {tuple(data.shape)} in the audited model, and "
                        f"{tuple(old.shape)} by its configuration"
                    )
                if id(parameters[full]) not in shared:
                    shared[id(parameters[full])] = nn.Parameter(data, requires_grad=False)
                    if parameters[full].requires_grad and full not in self.hooked:
                        self.names[full] = shared[id(parameters[full])]
                module._parameters[name] = shared[id(parameters[full])]
            for name, buffer in module._buffers.items():
                full = f"{path}.{name}" if path else name
                there = buffers.get(full)
                lasting = name not in module._non_persistent_buffers_set
                if there is not None and buffer is not None and (lasting or buffer.is_meta):
                    module._buffers[name] = there.detach().clone()
                elif there is not None and buffer is not None:
                    module._buffers[name] = buffer.to(there.device)
            vars(module)["_parameters"] = _Casting(module._parameters, self)
            vars(module)["_buffers"] = _CastingBuffers(module._buffers, self)
        for module in self.model.modules():
            if hasattr(module, "_activate_lora") and hasattr(module, "parameter_name"):
                vars(module)["_activate_lora"] = functools.partial(_adapted_parameter, module)
        self.left_out = [
            name
            for name, p in self.audited.named_parameters()
            if p.requires_grad and name not in self.names
        ]

    def passes_by(self, path: str) -> bool:
        """Whether the steps so far read what an adapter's layer wraps, but not the adapter."""
        layer: Any = self.model.get_submodule(path)
        base = layer.get_base_layer()
        own = [
            module
            for name, module in layer.named_modules()
            if name and not name.startswith("base_layer")
        ]
        read = [_was_read(m) for m in own if len(m._parameters)]
        return _was_read(base) and bool(read) and not any(read)

    def nbytes(self, batch: Batch) -> int:
        """About what a step of the reference takes beyond the model."""
        ids = batch.get("input_ids")
        tokens = ids.numel() if isinstance(ids, Tensor) else 0
        return step_bytes(self.audited, self.exact, tokens, self.recompute)

    def cast(self, parameter: Tensor) -> Tensor:
        """What a module of the plain model reads as its parameter."""
        leaf = self.leaves[self.precision].get(id(parameter))
        if leaf is not None:
            return leaf
        if self.precision == "own" or not parameter.is_floating_point():
            return parameter
        return self.formed(parameter, lambda: parameter.to(self.exact))

    def formed(self, parameter: Tensor, form: Callable[[], Tensor]) -> Tensor:
        """``form()``, or what it gave for ``parameter`` a moment ago."""
        key = id(parameter)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key][1]
        with torch.no_grad():
            made = form()
        if made.data_ptr() == parameter.data_ptr():
            return made
        self._cache[key] = (parameter, made)
        while len(self._cache) > _CASTS:
            self._cache.popitem(last=False)
        self._forms[key] = form
        return made

    @contextlib.contextmanager
    def _running(self, precision: Precision) -> Iterator[None]:
        """Cast as ``precision`` says, and make casts again in backward instead of saving them."""
        self.precision, self.is_running = precision, True
        self._forms: dict[int, Callable[[], Tensor]] = {}

        def pack(t: Tensor) -> Any:
            storage = t.untyped_storage()._cdata
            for parameter, made in self._cache.values():
                if made.untyped_storage()._cdata == storage and not t.requires_grad:
                    form = self._forms[id(parameter)]
                    return parameter, form, t.size(), t.stride(), t.storage_offset()
            return t

        def unpack(saved: Any) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            parameter, form, *layout = saved
            return self.formed(parameter, form).as_strided(*layout)

        for parameter in self.names.values():
            leaf = parameter.detach()
            if precision == "exact":
                leaf = leaf.to(self.exact)
            self.leaves[precision][id(parameter)] = leaf.requires_grad_()
        wide = precision == "exact" and self.is_wide
        try:
            with (
                torch.autograd.graph.saved_tensors_hooks(pack, unpack),
                _StaysWide() if wide else contextlib.nullcontext(),
            ):
                yield
        finally:
            self.is_running = False
            self._cache.clear()
            self._forms.clear()
            self.leaves[precision].clear()

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return {
            name: value.to(self.exact)
            if self.precision == "exact" and isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in batch.items()
        }

    # --- steps -----------------------------------------------------------------------------------

    def step(
        self, batch: Batch, loss: Loss, precision: Precision = "exact", noise: int | None = None
    ) -> AuditStep:
        """One forward and backward of the plain model.

        ``noise``: seeds errors of up to half a unit of rounding in what each layer returns, as
        another kernel would make them.
        """
        recorded: list[Any] = []
        order: dict[str, None] = {}
        with contextlib.ExitStack() as hooks, _as_model_error():
            hook = self.model.register_forward_hook(lambda *a: recorded.append(a[-1]))
            hooks.callback(hook.remove)
            if noise is not None:
                hooks.enter_context(self._noise(noise))
            elif self.recompute:  # noise would be another the second time
                hooks.enter_context(self._recomputing())
            torch.manual_seed(SEED)
            with self._running(precision), torch.enable_grad():
                for name, parameter in self.names.items():
                    self.leaves[precision][id(parameter)].register_post_accumulate_grad_hook(
                        lambda _, name=name: order.setdefault(name)
                    )
                with _autocast(batch, self.autocast if precision == "own" else None):
                    value = loss(self.model, self._inputs(batch))
                value.backward()  # type: ignore[no-untyped-call]
                leaves = self.leaves[precision]
                gradients = {name: leaves[id(p)].grad for name, p in self.names.items()}
        outputs = recorded[-1] if recorded else None
        return AuditStep(
            float(value.detach()), gradients, _detached(getattr(outputs, "logits", None)),
            _number(getattr(outputs, "loss", None)), list(order),
        )  # fmt: skip

    @contextlib.contextmanager
    def _recomputing(self) -> Iterator[None]:
        blocks: list[Any] = list(_checkpointed(self.model))
        for block in blocks:
            block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
            block.gradient_checkpointing = True
        try:
            yield
        finally:
            for block in blocks:
                block.gradient_checkpointing = False

    @contextlib.contextmanager
    def _noise(self, seed: int) -> Iterator[None]:
        generators: dict[torch.device, torch.Generator] = {}

        def disturb(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            device = output.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(seed)
            draw = torch.rand(output.shape, generator=generators[device], device=device) - 0.5
            return (output.double() * (1 + unit(self.dtype) * draw)).to(output.dtype)

        leaves = [m for m in self.model.modules() if not any(True for _ in m.children())]
        handles = [m.register_forward_hook(disturb) for m in leaves]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, batch: Batch, precision: Precision = "exact") -> Any:
        """The plain model's outputs, without gradients."""
        autocast = self.autocast if precision == "own" else None
        autocasting = _autocast(batch, autocast)
        with _as_model_error(), self._running(precision), torch.no_grad(), autocasting:
            return self.model(**self._inputs(batch))


class _StaysWide(TorchDispatchMode):
    """Keeps in fp64 what a model's code casts to fp32.

    Models compute recurrences, routers and norms in fp32 whatever their dtype is. A reference that
    did so would make the rounding errors of eager mode, and a form that is more exact than both
    would look wrong. Random draws stay as they are, and so do integers that become fp32: the angles
    of rotary embeddings are no rounding error of a kernel.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32 and _narrows(func, args):
            kwargs = {**kwargs, "dtype": torch.float64}
        if func.overloadpacket in _OF_ONE_DTYPE and any(_is_wide(a) for a in args):
            args = tuple(
                a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
            )
        return func(*args, **kwargs)


_ATEN = torch.ops.aten
_OF_ONE_DTYPE = {
    _ATEN.mm, _ATEN.bmm, _ATEN.addmm, _ATEN.baddbmm, _ATEN.mv, _ATEN.dot, _ATEN.convolution,
}  # fmt: skip
"""Products, which refuse fp32 beside fp64: other ops compute in the wider of the two."""


def _is_wide(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.float64


def _narrows(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a result in fp32 would be met by what is in fp64."""
    if torch.Tag.nondeterministic_seeded in func.tags or func._schema.name == "aten::arange":
        return False
    first = args[0] if args else None
    return not isinstance(first, Tensor) or _is_wide(first)


_CASTS = 8
"""So many casts are kept: a module reads its weight several times, experts one after the other."""


@contextlib.contextmanager
def _as_model_error() -> Iterator[None]:
    """Raise what the plain model's code raises as a ModelError."""
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"the plain model cannot be computed ({reason})") from error


class _Casting(dict[str, Any]):
    """The parameters of a module of the plain model, cast when they are read."""

    def __init__(self, values: Mapping[str, Any], plain: PlainModel) -> None:
        super().__init__(values)
        self.plain = plain
        self.adapted: dict[str, Tensor] = {}
        self.was_read = False

    def __getitem__(self, name: str) -> Any:
        self.was_read = True
        if name in self.adapted:
            return self.adapted[name]
        value = super().__getitem__(name)
        return value if value is None else self.plain.cast(value)

    def items(self) -> Any:
        """As they are cast, in a step: AdaLoRA's loss goes through ``named_parameters``."""
        if not self.plain.is_running:
            return super().items()
        return ((name, self[name]) for name in self)


@contextlib.contextmanager
def _adapted_parameter(wrapper: Any, adapters: list[str]) -> Iterator[None]:
    """PEFT's adapter of a bare parameter; PEFT itself would register the cast as the parameter."""
    name = wrapper.parameter_name
    values: _Casting = wrapper.get_base_layer()._parameters
    value = values[name]
    for adapter in adapters:
        if adapter in wrapper.lora_A:
            value = value + wrapper.get_delta_weight(adapter)
    values.adapted[name] = value
    try:
        yield
    finally:
        del values.adapted[name]


class _CastingBuffers(_Casting):
    """As ``_Casting``; but a buffer that may be written is the buffer itself."""

    def __getitem__(self, name: str) -> Any:
        value = dict.__getitem__(self, name)
        if self.plain.precision == "exact" and value is not None and value.is_floating_point():
            return value.to(self.plain.exact)
        return value


class Dequantized(nn.Module):
    """A linear layer of the plain model whose weight is quantized in the audited one."""

    def __init__(self, plain: PlainModel, layer: nn.Module) -> None:
        super().__init__()
        shown: Any = layer
        self.in_features, self.out_features = shown.in_features, shown.out_features
        # not a child: its parameters are not the plain model's
        self._behind: Any = (plain, layer)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (out, in), in fp32 or as it is dequantized."""
        plain, layer = self._behind
        made: Tensor = plain.formed(
            layer.weight,
            lambda: (
                dequantized(layer)
                if plain.precision == "own"
                else dequantized(layer).to(plain.exact)
            ),
        )
        return made

    @property
    def bias(self) -> Any:
        """As the audited layer's, cast."""
        plain, layer = self._behind
        return None if layer.bias is None else plain.cast(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The layer as its class says, or its dequantized weight in fp32."""
        plain, layer = self._behind
        if plain.precision == "own":
            return type(layer).forward(layer, x)  # type: ignore[no-any-return]
        return nn.functional.linear(x, self.weight, self.bias)


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer has no weight of floats in the shape (out, in)."""
    shown: Any = module
    if not (hasattr(shown, "in_features") and hasattr(shown, "out_features")):
        return False
    if hasattr(shown, "base_layer"):
        return False
    weight = getattr(shown, "weight", None)
    plain = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return (
        weight is None
        or weight.dtype not in plain
        or (whole(weight).shape != (shown.out_features, shown.in_features))
    )


def dequantized(layer: Any) -> Tensor:
    """The weight (out, in) that a quantized linear layer stands for."""
    if type(layer).__module__.startswith("bitsandbytes."):
        from bitsandbytes import functional

        weight: Any = layer.weight
        if hasattr(weight, "quant_state"):
            of_four: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
            return of_four
        scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
        of_eight: Tensor = functional.int8_vectorwise_dequant(weight.data, scales)
        return of_eight
    tensor = next(t for t in (*layer.parameters(), *layer.buffers()))
    dtype = next((t.dtype for t in layer.buffers() if t.is_floating_point()), torch.float32)
    rows = torch.eye(layer.in_features, dtype=dtype, device=tensor.device)
    zero = torch.zeros_like(rows[:1])
    # one term of each sum is not zero: nothing is rounded
    result: Tensor = type(layer).forward(layer, rows) - type(layer).forward(layer, zero)
    return result.t()


def _attention_of(kind: Any) -> str:
    """PyTorch's attention where a class takes it and nobody has exchanged it, else eager mode's."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not getattr(kind, "_supports_sdpa", False) or "sdpa" not in ALL_ATTENTION_FUNCTIONS:
        return "eager"
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    module = sys.modules.get("transformers.integrations.sdpa_attention")
    return "eager" if is_foreign(function, str(getattr(module, "__file__", ""))) else "sdpa"


def _was_read(module: Any) -> bool:
    return bool(getattr(module._parameters, "was_read", False))


def _computes_in(module: nn.Module) -> torch.dtype | None:
    """The dtype that a quantized layer computes in, whatever its inputs are."""
    dtype: Any = getattr(module, "compute_dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    weight = module._parameters.get("weight")
    return torch.float16 if weight is not None and weight.dtype == torch.int8 else None


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _active(audited: Any) -> list[str]:
    active = audited.active_adapters
    active = active() if callable(active) else active
    return [active] if isinstance(active, str) else list(active)


def _has_foreign_methods(kind: type) -> bool:
    module = inspect.getmodule(kind)
    path = getattr(module, "__file__", None)
    return path is not None and any(is_foreign(value, path) for value in vars(kind).values())


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside have no memory; buffers do."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


@contextlib.contextmanager
def _initialized_later() -> Iterator[None]:
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


def _autocast(batch: Batch, dtype: Any) -> Any:
    device = next((t.device.type for t in batch.values() if isinstance(t, Tensor)), "cpu")
    if dtype is None:
        return torch.autocast(device, enabled=False)
    return torch.autocast(device, dtype=dtype)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else None


def _number(value: Any) -> float | None:
    return float(value.detach()) if isinstance(value, Tensor) and value.numel() == 1 else None
