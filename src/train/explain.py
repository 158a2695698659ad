"""``fusewright explain``: what ``optimize`` does to a model, without training it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.rule import Rule
from rich.syntax import Syntax
from rich.text import Text
from torch import nn

from ..compiler.listing import Listing, find_listing, keep_code, listings
from ..compiler.pipeline import explain, optimize
from ..compiler.tiny_step import tiny_step
from ..errors import ModelError, RecipeError, did_you_mean
from ..memory.budget import gigabytes
from ..report import Report
from .model.from_pretrained import Kind, clear_gguf_marks, pretrained
from .model.load import quiet
from .model.multimodal import auto_class, pattern_of, towers
from .model.precision import device_for_training, dtype_for_training
from .printable import shown
from .terminal import Terminal, announce, say

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.index.json")
_ENOUGH = 2
_MOST = 12
"""Most layers of a random model: two, or as many as it takes to have one of each kind."""


@dataclass(frozen=True)
class ExplainOptions:
    """The options of the command.

    Attributes:
        model: what a recipe's ``base_model`` may be, a folder with no more than a ``config.json``,
            or the name of a model type of transformers.
        layers: the depth, or None: as deep as it is, or a few if random.
        lora: put LoRA of rank 8 on all linears.
        fp32: weights in float32, not in what training would choose.
        trust_remote_code: run the code that comes with the model.
    """

    model: str
    layers: int | None = None
    lora: bool = False
    fp32: bool = False
    trust_remote_code: bool = False


def run(
    request: ExplainOptions,
    *,
    graph: bool = False,
    module: str | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Load the model, optimize it, run one tiny step, and print what was done.

    ``graph`` prints each kind of graph, before and after the rules; ``module`` only that of this
    module; ``as_json`` the report (and the graphs) as JSON and nothing else.

    Raises:
        RecipeError: there is no such model, or it cannot be read.
        ModelError: it cannot be built, does not fit into memory, or has no such module.
    """
    console = console or Terminal(highlight=False)
    with quiet():
        announce(f"loading {request.model}")
        model, note = load(request)
        announce("compiling it, and running one small step")
        # compiling would only take time: the rules see the same graphs
        optimize(model, codegen="eager")
        if graph or module is not None:
            keep_code(model)
        tiny_step(model)
        tiny_step(model)  # a head that calls the blocks itself is captured in the second one
        report = explain(model)
    shown = _chosen(model, module)
    if as_json:
        data = report.to_dict()
        if shown:
            data["listings"] = [vars(listing) for listing in shown]
        print(json.dumps(data, indent=2))
        return
    say(console, f"{note}\n{report}")
    for listing in shown:
        _print_listing(listing, report, console)


def load(request: ExplainOptions) -> tuple[Any, str]:
    """The model to explain, in training mode, and a sentence on what it is.

    Raises RecipeError and ModelError as ``run`` does.
    """
    folder = Path(request.model).expanduser()
    if not folder.exists() and request.model in _model_types():
        model, what = _random(request, _default_config(request.model))
        what = f"the default configuration of {request.model}, {what}"
    elif (folder / "config.json").is_file() and not any(_weights(folder)):
        model, what = _random(request, _config(request))
        what = f"{folder / 'config.json'}, {what}"
    else:
        model, what = _pretrained(request)
    model = _with_lora(model) if request.lora else model
    lora = ", LoRA of rank 8 on all linears" if request.lora else ""
    weight = next(model.parameters())
    dtype = str(weight.dtype).removeprefix("torch.")
    return model.train(), f"{what}{lora}; {dtype} on {weight.device}"


# --- a model with pretrained weights --------------------------------------------------------------


def _pretrained(request: ExplainOptions) -> tuple[Any, str]:
    options: dict[str, Any] = {"dtype": _dtype(request)}
    depth = ""
    config = _config(request)
    if request.layers is not None:
        depth = f", {_shorten(config, request.layers)}"
        options["config"] = config
    model = _read(_auto(config), request, **options)
    clear_gguf_marks(model)
    return model.to(device_for_training()), f"{request.model}, its own weights{depth}"


def _auto(config: Any) -> Any:
    import transformers

    return getattr(transformers, auto_class(config))


def _config(request: ExplainOptions) -> Any:
    from transformers import AutoConfig

    return _read(AutoConfig, request, "config")


def _read(factory: Any, request: ExplainOptions, kind: Kind = "model", **options: Any) -> Any:
    """Read with ``from_pretrained``; the error for an unknown name has similar ones."""
    # set in any case: without it, transformers asks on the terminal
    options["trust_remote_code"] = request.trust_remote_code
    try:
        return pretrained(factory, request.model, kind=kind, **options)
    except RecipeError as error:
        problem = str(error).removeprefix("base_model: ")
        raise RecipeError(f"{problem}{_hint(request.model, problem)}") from error


def _hint(name: str, problem: str) -> str:
    suggestion = did_you_mean(name, _model_types()) if name.isidentifier() else ""
    return f"; {suggestion}" if suggestion else ""


def _weights(folder: Path) -> list[Path]:
    return [file for pattern in _WEIGHTS for file in folder.glob(pattern)]


def _dtype(request: ExplainOptions) -> torch.dtype:
    return dtype_for_training("float32" if request.fp32 else "auto")


# --- a random model of a configuration ------------------------------------------------------------


def _model_types() -> list[str]:
    from transformers import CONFIG_MAPPING

    return list(CONFIG_MAPPING.keys())


def _default_config(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type]()
    except Exception as error:  # some want arguments, some want packages
        raise ModelError(f"{model_type} has no default configuration: {_first(error)}") from error


def _random(request: ExplainOptions, config: Any) -> tuple[Any, str]:
    """A shallow model with random weights, and its description."""
    auto = _auto(config)
    depth = _shorten(config, request.layers)
    options = {"dtype": _dtype(request), "trust_remote_code": request.trust_remote_code}
    try:
        with torch.device("meta"):
            planned = auto.from_config(config, **options)
        _require_memory(request.model, planned)
        model = auto.from_config(config, **options)
    except ModelError:
        raise
    except Exception as error:  # the model's own code, with a configuration that we changed
        raise ModelError(f"{request.model} cannot be built, {depth}: {_first(error)}") from error
    return model.to(device_for_training()), f"RANDOM weights, {depth}"


def _require_memory(name: str, planned: nn.Module) -> None:
    needed = sum(p.numel() * p.element_size() for p in planned.parameters())
    free = psutil.virtual_memory().available
    if 2 * needed > free:  # weights and gradients
        raise ModelError(
            f"{name} takes {gigabytes(2 * needed)} and {gigabytes(free)} are free: "
            "fewer --layers, or a folder with a config.json of smaller sizes"
        )


def _shorten(config: Any, layers: int | None) -> str:
    """Limit the depth of ``config``, in place; return a description."""
    decoder = config.get_text_config(decoder=True)
    depth = getattr(decoder, "num_hidden_layers", None)
    if not isinstance(depth, int):
        if layers is not None:
            raise ModelError("the configuration does not say how deep it is: leave --layers out")
        return "all layers"
    lists = {k: v for k, v in vars(decoder).items() if isinstance(v, list) and len(v) == depth}
    number = min(layers or _one_of_each(list(lists.values())), depth)
    decoder.num_hidden_layers = number
    for name, values in lists.items():
        setattr(decoder, name, values[:number])
    return f"{number} of {depth} layers" if number < depth else f"all {depth} layers"


def _one_of_each(lists: Sequence[list[Any]]) -> int:
    """How many layers have one of each kind, by lists with one entry for each layer."""
    depth = _ENOUGH
    for values in lists:
        if all(isinstance(v, str) for v in values):
            depth = max(depth, *(values.index(v) + 1 for v in dict.fromkeys(values)))
    return min(depth, _MOST)


# --- adapters, output -----------------------------------------------------------------------------


def _with_lora(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    try:
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules="all-linear",
            exclude_modules=pattern_of(towers(model)),
        )
        return get_peft_model(model, config)
    except ValueError as error:  # layers that PEFT refuses to adapt
        raise ModelError(f"LoRA cannot be put on all linears: {_first(error)}") from error


def _chosen(model: nn.Module, module: str | None) -> list[Listing]:
    all_listings = listings(model)
    if module is None:
        return all_listings
    one = find_listing(model, all_listings, module)
    if one is None:
        paths = [path for listing in all_listings for path in listing.modules]
        near = difflib.get_close_matches(module, paths, 3, 0.4) or paths[:6]
        names = ", ".join(path or '""' for path in near)
        raise ModelError(f"no graph was captured for module {module!r}; graphs exist for {names}")
    return [one]


def _print_listing(listing: Listing, report: Report, console: Console) -> None:
    first, *others = (path or "the model" for path in listing.modules)
    more = f" and {len(others)} more" if others else ""
    width = min(console.width, 100)
    head = Text(f"{listing.kind}: {first}{more} ({listing.class_name})")
    console.print(Rule(head, align="left"), width=width)
    root = listing.modules[0]
    inside = [s for s in report.sites if s.module == root or s.module.startswith(f"{root}.")]
    for site in dict.fromkeys((s.status, s.rule, s.module, s.reason) for s in inside if root):
        say(console, "  " + ": ".join(part for part in site if part))
    for title, code in (("before the rules", listing.before), ("after", listing.after)):
        console.print(Rule(Text(title), align="left", characters="-"), width=width)
        if console.is_terminal:
            console.print(Syntax(code.strip(), "python", background_color="default"))
        else:
            console.file.write(shown(code.strip()) + "\n")


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
