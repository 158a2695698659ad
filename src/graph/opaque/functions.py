"""Functions that are captured as one node: the scans of state-space models and linear attention.

In plain PyTorch a scan is a loop over time, which a tracer unrolls: hundreds of nodes for a few
tokens, and another graph for each length. Such a function is known by its calling convention, the
public one of the CUDA packages that it replaces, and never by its name or its model. A *leaf* is
called in its place while a block is captured: TorchDynamo puts it into the graph as one node, for
any length. Outside of tracing, a leaf is the function itself.

A *segmented* leaf also takes where the samples of a row begin (``segments.py``), and runs the
function over each of them apart. Short convolutions are leaves only so: without segments a tracer
follows them.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from .segments import Unread, attend_apart, run_apart

MARK = "__fusewright_whole__"
"""The attribute of a leaf that says so: the function that it calls."""
_SEGMENTED = "__fusewright_segmented__"


@dataclass(frozen=True)
class Convention:
    """A way of calling a scan, or a convolution over time."""

    name: str
    # the names of the arguments, in order; those of the first two are free. The last two are the
    # segments, and a tuple of pairs, of all further ones, as far as they say anything.
    params: tuple[str, ...]
    known_by: frozenset[str]  # the names that a function with this convention must have
    time: int  # the dimension of time in the first two arguments, B, C, z and the first output
    defaults: Mapping[str, Any]  # values of the arguments after the first five (and a chunk size)
    # of the first five, in a small example; ``constants``: what else has no default
    sizes: tuple[tuple[int, ...], ...]
    constants: Mapping[str, Any]
    first: tuple[str | None, ...] = (None, None, "A", "B", "C")  # the names of the first five
    # gives the results for fake arguments; None: they are those of one step of time
    outline: Callable[[Mapping[str, Any]], Any] | None = None
    # arguments for which a function must give what ``outline`` says
    examples: Callable[[], list[dict[str, Any]]] = list
    # further arguments that are sequences, besides the first two
    sequences: tuple[str, ...] = ("B", "C", "z")
    # those that ask for more than a pack can be given: states before and after
    states: tuple[str, ...] = ()


SELECTIVE = Convention(
    "scan_call",
    ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state",
     "segments", "others"),
    frozenset(("D", "z", "delta_bias", "delta_softplus")),
    2,
    {"D": None, "z": None, "delta_bias": None, "delta_softplus": False, "return_last_state": False},
    ((1, 2, 3), (1, 2, 3), (2, 2), (1, 2, 3), (1, 2, 3)),
    {},
    states=("return_last_state",),
)  # fmt: skip
"""u, delta, z (B, D, L); A (D, N); B, C (B, N, L): Gu & Dao, "Mamba", 2023."""

CHUNKED = Convention(
    "chunk_scan_call",
    ("x", "dt", "A", "B", "C", "chunk_size", "D", "z", "dt_bias", "dt_softplus", "dt_limit",
     "initial_states", "return_final_states", "segments", "others"),
    frozenset(("chunk_size", "D", "dt_bias", "dt_softplus")),
    1,
    {"D": None, "z": None, "dt_bias": None, "dt_softplus": False,
     "dt_limit": (0.0, float("inf")), "initial_states": None, "return_final_states": False},
    ((1, 3, 1, 2), (1, 3, 1), (1,), (1, 3, 1, 2), (1, 3, 1, 2)),
    {"chunk_size": 2},
    states=("initial_states", "return_final_states"),
)  # fmt: skip
"""x (B, L, H, P); dt (B, L, H); A (H,); B, C (B, L, G, N): Dao & Gu, "Transformers are SSMs"."""


def _outline_of_delta(given: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    query, key, value = given["query"], given["key"], given["value"]
    out = value.new_empty(value.shape, dtype=query.dtype)
    if not given["output_final_state"]:
        return out, None
    if given.get("cu_seqlens") is not None:
        raise TypeError("how many final states a pack has is not known")
    size = (value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    return out, value.new_empty(size, dtype=torch.float32)


def _examples_of_delta() -> list[dict[str, Any]]:
    def draw(*size: int) -> Tensor:
        return torch.linspace(-0.9, -0.1, prod(size), dtype=torch.float32, device="cpu").view(size)

    heads, (key, value) = (2, 5, 3), (4, 6)
    fixed = {
        "query": draw(*heads, key), "key": draw(*heads, key), "value": draw(*heads, value),
        "beta": -draw(*heads),
    }  # fmt: skip
    return [
        {**fixed, "g": g, "initial_state": state, "output_final_state": final}
        for g in (draw(*heads), draw(*heads, key))
        for state, final in ((None, False), (draw(2, 3, key, value), True))
    ]


DELTA = Convention(
    "delta_rule_call",
    (
        "query",
        "key",
        "value",
        "g",
        "beta",
        "initial_state",
        "output_final_state",
        "use_qk_l2norm_in_kernel",
        "segments",
        "others",
    ),
    frozenset(("initial_state", "output_final_state")),
    1,
    {"initial_state": None, "output_final_state": False, "use_qk_l2norm_in_kernel": False},
    ((1, 3, 1, 2), (1, 3, 1, 2), (1, 3, 1, 2), (1, 3, 1), (1, 3, 1)),
    {},
    ("query", "key", "value", "g", "beta"),
    _outline_of_delta,
    _examples_of_delta,
    ("value", "g", "beta"),
    ("initial_state", "output_final_state"),
)
"""query, key (B, L, H, K); value (B, L, H, V); g (B, L, H), or one for each feature of the key;
beta (B, L, H): Yang et al., "Gated Delta Networks", 2024, as in flash-linear-attention."""

CONVOLUTION = Convention(
    "short_conv_call",
    ("x", "weight", "bias", "activation", "segments", "others"),
    frozenset(("bias", "activation")),
    2,
    {"bias": None, "activation": None},
    ((1, 2, 3), (2, 2), (2,)),
    {},
    (None, "weight", "bias"),
    sequences=(),
    states=("initial_states", "return_final_states", "final_states_out"),
)
"""x (B, D, L); weight (D, W): a causal convolution of each channel, as in causal-conv1d."""

CONVENTIONS = (SELECTIVE, CHUNKED, DELTA)
"""Those of what is captured whole in any call."""


LIBRARIES = ("transformers", "fla", "mamba_ssm", "causal_conv1d")
"""Packages whose scans and convolutions are tried on small tensors; no function of others is."""


def _is_of_library(function: Callable[..., Any]) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] in LIBRARIES


@functools.cache
def convention(function: Callable[..., Any]) -> Convention | None:
    """The convention of those that are captured whole that ``function`` follows, or None."""
    kind = next((c for c in CONVENTIONS if _follows(c, _names(function))), None)
    return kind if kind is None or _keeps_to(function, kind) else None


@functools.cache
def segmented_convention(function: Callable[..., Any]) -> Convention | None:
    """The convention of those that take segments that ``function`` follows, or None."""
    if _follows(CONVOLUTION, _names(function)) and _is_convolution(function):
        return CONVOLUTION
    return convention(function)


def _names(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # no signature
        return []


def _is_convolution(function: Callable[..., Any]) -> bool:
    """Whether a function gives the causal convolution, and writes to no argument."""
    if not _is_of_library(function):
        return False
    # libraries' own take no tensors that are not on a GPU
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return any(_convolves(function, device) for device in devices)


def _convolves(function: Callable[..., Any], device: str) -> bool:
    with _disable_current_modes(), torch.no_grad(), torch.autocast(device, enabled=False):
        x, weight, bias = (
            torch.linspace(-0.9, 0.7, prod(size), device=device).view(size)
            for size in ((2, 8, 5), (8, 3), (8,))
        )
        padded = F.pad(x, (2, 0))
        expected = F.conv1d(padded, weight.unsqueeze(1), bias, groups=8)
        before = [t.clone() for t in (x, weight, bias)]
        try:
            result = function(x, weight=weight, bias=bias, activation=None)
        except Exception:  # whatever it does not like
            return False
        same = isinstance(result, Tensor) and result.shape == expected.shape
        return (
            same
            and torch.allclose(result, expected, atol=1e-3)
            and all(map(torch.equal, (x, weight, bias), before))
        )


def _keeps_to(function: Callable[..., Any], kind: Convention) -> bool:
    """Whether a function gives what the outline says, and writes to no argument."""
    examples = kind.examples()
    if examples and not _is_of_library(function):
        return False
    # it need not take all examples: some have a decay for each feature, others one a head
    with _disable_current_modes():  # a plan asks on fake tensors, which have no values to compare
        verdicts = [_as_outlined(function, kind, kwargs) for kwargs in examples]
    return not examples or (any(verdicts) and None not in verdicts)


def _as_outlined(function: Callable[..., Any], kind: Convention, given: dict[str, Any]) -> Any:
    """True; False where the function does not take the example; None where it differs."""
    tensors = [t for t in given.values() if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors]
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            result = function(**given)
    except Exception:  # whatever it does not like
        result = NotImplemented
    if not all(map(torch.equal, tensors, before)):
        return None
    if result is NotImplemented:
        return False
    outline = kind.outline(given) if kind.outline is not None else result
    return True if _shapes(result) == _shapes(outline) else None


def _shapes(results: Any) -> Any:
    if isinstance(results, tuple):
        return tuple(map(_shapes, results))
    return (results.shape, results.dtype) if isinstance(results, Tensor) else results


def _follows(kind: Convention, names: list[str]) -> bool:
    pairs = zip(kind.first, names, strict=False)
    enough = len(names) >= len(kind.first) + (kind is not CONVOLUTION)
    return enough and kind.known_by <= set(names) and all(a in (None, b) for a, b in pairs)


@functools.cache
def leaf(function: Callable[..., Any]) -> Callable[..., Any]:
    """The leaf of a function that has a convention: a new object, registered with TorchDynamo."""
    kind = convention(function)
    if kind is None:
        raise TypeError(f"{function} is no scan")

    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, FakeTensor) for a in (*args, *kwargs.values())):
            return _outline(function, kind, args, kwargs)
        result = function(*args, **kwargs)
        if kind.outline is None:
            return result
        return tuple(t.contiguous() if isinstance(t, Tensor) else t for t in result)

    call.__name__ = call.__qualname__ = kind.name
    setattr(call, MARK, function)
    result: Callable[..., Any] = torch._dynamo.allow_in_graph(call)  # type: ignore[no-untyped-call]
    return result


_SAY_THE_SAME = ("seq_idx", "cu_seqlens")
"""Keywords by which libraries' kernels are told of samples."""


@functools.cache
def segmented_leaf(function: Callable[..., Any]) -> Callable[..., Any]:
    """The leaf of a function that takes segments; these are its first argument."""
    kind = segmented_convention(function)
    if kind is None:
        raise TypeError(f"{function} takes no segments")

    def call(segments: Tensor, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, FakeTensor) for a in (*args, *kwargs.values())):
            return _outline(function, kind, args, kwargs)
        arguments = _given(function, args, kwargs)
        arguments = {n: v for n, v in arguments.items() if n not in _SAY_THE_SAME}
        asked = [n for n in kind.states if arguments.get(n) not in (None, False)]
        if asked:
            raise NotImplementedError(f"{asked[0]} with several samples in a row")
        first = list(arguments)[: 1 if kind is CONVOLUTION else 2]
        names = (n for n in (*first, *kind.sequences) if isinstance(arguments.get(n), Tensor))
        sequences = dict.fromkeys(names, kind.time)
        return run_apart(function, segments, arguments, sequences, kind.time)

    call.__name__ = call.__qualname__ = kind.name
    setattr(call, MARK, function)
    setattr(call, _SEGMENTED, True)
    result: Callable[..., Any] = torch._dynamo.allow_in_graph(call)  # type: ignore[no-untyped-call]
    return result


setattr(attend_apart, MARK, attend_apart)


def is_leaf(target: Any) -> bool:
    """Whether a node's target is a leaf."""
    return getattr(target, MARK, None) is not None


def bind(
    target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, tuple[Any, ...]] | None:
    """The canonical name and arguments of a call of a leaf; None for any other target."""
    # a further argument is left out where it is None or False, where it only chooses among
    # implementations of the same thing (``use_...``), and where the function does not look at it
    function = getattr(target, MARK, None)
    if function is None:
        return None
    segments = None
    if getattr(target, _SEGMENTED, False):
        segments, *rest = args
        args = tuple(rest)
    kind = segmented_convention(function)
    if kind is None:
        return None
    inputs = _given(function, args, kwargs)
    first, second = list(inputs)[:2]
    values = [inputs.pop(first), inputs.pop(second)]
    values += [inputs.pop(name, kind.defaults.get(name)) for name in kind.params[2:-2]]
    others = tuple(
        (name, value) for name, value in inputs.items()
        if value is not None and value is not False and not name.startswith("use_")
        and not (segments is not None and name in _SAY_THE_SAME)
        and not _is_overlooked(function, name)
    )  # fmt: skip
    return kind.name, (*values, segments, others)


_signature = functools.cache(inspect.signature)


def _given(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments by name, in the order of the signature, defaults included."""
    signature = _signature(function)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name)
    return arguments


@functools.cache
def _is_overlooked(function: Callable[..., Any], name: str) -> bool:
    """Whether a scan takes a keyword among any others, and never looks at its value."""
    kind, names = segmented_convention(function), list(_signature(function).parameters)
    if kind is None or name in names or not _is_of_library(function):
        return False
    if examples := kind.examples():  # of which it need not take all
        return any(overlooks(function, example, name) for example in examples)
    tensors = {
        # steps that are positive and decays that are negative: all numbers stay finite
        n: torch.linspace(0.1, -0.9 if n == "A" else 0.9, prod(size), device="cpu").view(size)
        for n, size in zip(names, kind.sizes, strict=False)
    }
    return overlooks(function, {**tensors, **kind.constants}, name)


def _outline(
    function: Callable[..., Any], kind: Convention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What ``function`` would return for fake tensors, worked out from a single step of time."""
    arguments = _given(function, args, kwargs)
    if kind.outline is not None:
        return kind.outline(arguments)
    names = list(arguments)
    length = arguments[names[0]].shape[kind.time]
    for name in (*names[: 1 if kind is CONVOLUTION else 2], *kind.sequences):
        if isinstance(arguments.get(name), Tensor):
            arguments[name] = arguments[name].narrow(kind.time, 0, 1)
    results = function(**arguments)
    first, *rest = results if isinstance(results, tuple) else (results,)
    shape = [length if d == kind.time else size for d, size in enumerate(first.shape)]
    whole = first.expand(shape).clone(memory_format=torch.contiguous_format)
    return (whole, *rest) if isinstance(results, tuple) else whole


# --- whether a function looks at a keyword that its signature does not name -----------------------
#
# Models hand all keywords of their own call down to their parts, for any of them to pick from. One
# that a function takes among "any others" and never looks at says nothing to it.


def overlooks(function: Callable[..., Any], given: Mapping[str, Any], name: str) -> bool:
    """Whether ``function`` takes the keyword ``name`` besides ``given``, and never looks at it."""
    # It is called twice, without the keyword and with a value that tells when somebody looks at it.
    # What can be seen without looking (it is there; it is not None) changes the result, or nothing.
    value = Unread()
    try:
        with _disable_current_modes(), torch.no_grad():
            plain, other = function(**given), function(**given, **{name: value})
    except Exception:  # it asks for more, or refuses the value
        return False
    return not object.__getattribute__(value, "seen") and _equal(plain, other)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype is b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


# --- the function by which PEFT reads a module's weight -------------------------------------------
#
# It asks which library a quantized weight is of by the place where its class is defined, which
# TorchDynamo does not know of a parameter's class. In a captured forward another function is called
# in its place: it returns an ordinary parameter itself, and dequantizes a 4-bit one as bitsandbytes
# does. Everything else it leaves to the original.


def reads_weight(function: Any) -> bool:
    """Return True for PEFT's ``dequantize_module_weight``."""
    if not isinstance(function, types.FunctionType):
        return False
    place = function.__module__, function.__name__
    return place == ("peft.utils.integrations", "dequantize_module_weight")


@functools.cache
def stand_in(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does what PEFT's does, and that TorchDynamo can follow."""
    # of 4-bit weights PEFT asks the class's name, which TorchDynamo does not know either
    library = sys.modules.get("bitsandbytes.functional")
    dequantized: Any = getattr(library, "dequantize_4bit", None)

    def own_weight(module: Any) -> Any:
        weight: Any = getattr(module, "weight", None)
        if type(weight) is nn.Parameter and not hasattr(module, "W_q"):  # which a layer of HQQ has
            return weight
        if dequantized and getattr(weight, "quant_state", None) is not None:
            return dequantized(weight.data, weight.quant_state)
        return function(module)

    return own_weight
