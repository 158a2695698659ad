"""``from_pretrained`` for all that ``base_model`` may be, with errors that say what to do."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

from ...errors import RecipeError
from ...memory.oom_retry import is_out_of_memory
from ..consent import code_refused
from ..recipe.locate import ModelSource, hub_problem, locate
from ..recipe.preferences import HEADS, LANGUAGE_HEAD, head_of
from ..recipe.recipe import Recipe
from .files import (
    Shards,
    cached,
    config_problem,
    in_shards,
    meta_weights,
    no_tokenizer,
    pickled,
    tokenizer_problem,
    weights_problem,
)
from .multimodal import auto_class, remove_towers, require_text
from .quantize import clear_marks, head_modules

Kind = Literal["model", "config", "tokenizer", "other"]


def pretrained(
    factory: Any,
    name: str,
    *,
    kind: Kind = "model",
    key: str = "base_model",
    on_new_head: Callable[[Sequence[str]], None] | None = None,
    **options: Any,
) -> Any:
    """Call ``factory.from_pretrained`` for whatever ``base_model`` may be.

    ``key`` is the recipe's, for messages. ``on_new_head`` is called with the weights of the head
    that the files lack, and which are random; None: there may be none.

    Raises:
        RecipeError: there is none, it cannot be read, or its weights are not those of its
            configuration.
    """
    source = locate(name, [Path.cwd()])
    problem = _problem(source, kind, options)
    if problem is not None:
        raise RecipeError(f"{key}: {problem}")
    may_mismatch = bool(options.get("ignore_mismatched_sizes"))
    if kind == "model":
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        options |= {"use_kernels": False}  # those of the Hub, which would be fetched for a GPU
    if source.gguf_file:
        options |= _gguf(source, kind)
    silent = None if Path(source.name).exists() else hub_problem()
    options |= {} if silent is None else {"local_files_only": True}
    bar = contextlib.redirect_stderr(io.StringIO()) if source.gguf_file else None
    try:
        with bar or contextlib.nullcontext():  # unpacking a GGUF file draws its own progress bar
            if kind == "model" and in_shards(Path(source.name)):
                loaded = _from_shards(factory, Path(source.name), **options)
            else:
                loaded = factory.from_pretrained(source.name, **options)
    except Exception as error:  # a model's code, and the readers of its files, raise anything
        if is_out_of_memory(error):
            raise
        folder = Path(source.name)
        if not folder.is_dir():
            folder = cached(name, options.get("revision")) or folder
        why = _explained(error, name, folder, kind, factory, silent)
        raise RecipeError(f"{key}: {why}") from error
    if kind != "model" or not isinstance(loaded, tuple):  # a model's code may not return a pair
        return loaded
    model, info = loaded
    new = [] if on_new_head is None else _new_in_head(model, info)
    problem = None if may_mismatch else _unfit(model, info, new)
    if problem is not None:
        raise RecipeError(f"{key}: {name}: {problem}")
    if on_new_head is not None and new:
        on_new_head(new)
    return model


def _from_shards(
    factory: Any, folder: Path, config: Any = None, trust_remote_code: bool = False, **options: Any
) -> Any:
    """Load a model from shards: ``from_pretrained`` takes its weights in place of a folder."""
    import torch
    from transformers import AutoConfig

    if config is None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if hasattr(factory, "from_config"):  # an Auto class, which needs a folder
        with torch.device("meta"):
            model = factory.from_config(config, trust_remote_code=trust_remote_code)
        factory = type(model)
    weights = Shards.read(folder).weights()
    return factory.from_pretrained(None, config=config, state_dict=weights, **options)


def class_by_name(name: str | None, default: str, base: str, key: str) -> Any:
    """A transformers class by its name, or ``default``; any other must be derived from ``base``.

    Raises a RecipeError, which begins with ``key``, if there is no such class.
    """
    import transformers

    if name in (None, default):
        return getattr(transformers, default)
    result, kind = getattr(transformers, str(name), None), getattr(transformers, base)
    auto = default.startswith("AutoModel") and str(name).startswith("AutoModel")
    if not (auto and hasattr(result, "from_pretrained")) and not (
        isinstance(result, type) and issubclass(result, kind)
    ):
        raise RecipeError(
            f"{key}: {name} is not a suitable class of transformers; leave the key out, or use "
            f"{default}"
        )
    return result


def class_of(recipe: Recipe, config: Any) -> Any:
    """The class that loads the model of a recipe: an Auto class, or what ``model_type`` names.

    ``config`` is the checkpoint's configuration; None, of a GGUF file: that of a causal language
    model. Raises a RecipeError if transformers has no such class.
    """
    head = head_of(recipe)
    auto = head.auto if head.classifies or config is None else auto_class(config)
    name = None if recipe.model_type == LANGUAGE_HEAD.auto else recipe.model_type
    return class_by_name(name, auto, "PreTrainedModel", "model_type")


def meta_model(recipe: Recipe, config: Any) -> Any:
    """The model of a configuration without its weights, on the meta device.

    Raises a RecipeError if there is no such model, or it cannot be trained on text.
    """
    import torch

    kind: Any = class_of(recipe, config)
    name = recipe.base_model
    options: dict[str, Any] = {}
    if recipe.attention() in ("eager", "sdpa"):  # others need packages, or a GPU
        options["attn_implementation"] = recipe.attention()
    if hasattr(kind, "from_config"):  # an Auto class
        make = kind.from_config
        options["trust_remote_code"] = recipe.consent.trust_remote_code
    else:
        make = kind._from_config
        text = config.get_text_config(decoder=True)
        config = config if isinstance(config, kind.config_class) else text
    try:
        with torch.device("meta"):
            model = make(config, **options)
    except Exception as error:  # a model's code raises anything
        why = _explained(error, name, Path(name), "config", kind)
        raise RecipeError(f"base_model: {why}") from error
    require_text(model, name)
    if recipe.language_model_only:
        remove_towers(model)
    return model


def _problem(source: ModelSource, kind: Kind, options: Mapping[str, Any]) -> str | None:
    folder = Path(source.name)
    if source.gguf_file or not folder.is_dir():
        return None
    if kind == "tokenizer":
        return tokenizer_problem(folder)
    elsewhere = {"subfolder", "variant", "gguf_file", "use_safetensors"} & set(options)
    if kind == "other" or elsewhere:
        return None
    problem = None
    if "config" not in options:
        problem = config_problem(folder, bool(options.get("trust_remote_code")))
    return problem or (weights_problem(folder) if kind == "model" else None)


def _explained(
    error: Exception,
    name: str,
    folder: Path,
    kind: Kind,
    factory: Any,
    silent: str | None = None,
) -> str:
    if silent is not None and isinstance(error, OSError) and not folder.is_dir():
        return (
            f"{name} is not on this disk, and {silent}; copy its folder to this machine, and name "
            "the folder"
        )
    text = str(error)
    refused = code_refused(error)
    if refused is not None:
        return f"{name} {refused}"
    if isinstance(error, UnpicklingError):  # its text recommends what should not be done
        return pickled(f"{name}: its file of weights", [])
    problem = weights_problem(folder) if kind == "model" and folder.is_dir() else None
    if problem is not None:  # of a model in the cache
        return problem
    if isinstance(error, KeyError):
        return f"{name} cannot be loaded: its files lack {text}; download or copy it again"
    if "backend tokenizer" in text:
        return no_tokenizer(folder)
    if "Unrecognized configuration class" in text:
        head = next((h for h in HEADS.values() if h.auto == factory.__name__), None)
        if head is not None:
            return (
                f"transformers has no {head.auto} for the architecture of {name}, which {head.key} "
                "and num_labels need; use a model of another architecture"
            )
        return f"{name} is not a causal language model; use a model that generates text"
    return f"{name} cannot be loaded: {first_words(error)}"


def first_words(error: BaseException) -> str:
    """The first sentence of an error, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    while len(lines) > 1 and lines[0].endswith(":"):  # a heading
        lines.pop(0)
    text = lines[0] if lines else type(error).__name__
    kind, colon, rest = text.partition(": ")
    return rest if colon and kind.endswith("Error") and kind.isidentifier() else text


_FEW = 2


def _new_in_head(model: Any, info: Mapping[str, Any]) -> list[str]:
    """The parameters of the head that are not in the files, or not in this size."""
    absent = {*(info.get("missing_keys") or ()), *(m[0] for m in info.get("mismatched_keys") or ())}
    names = (f"{path}.{name}" for path, module in head_modules(model).items()
           for name, _ in module.named_parameters(recurse=False))  # fmt: skip
    return [name for name in names if name in absent]


def _unfit(model: Any, info: Mapping[str, Any], new: Sequence[str] = ()) -> str | None:
    """Why the weights in the files do not fit the model, or None.

    What the files lack would be random, and what has another size left out; ``new`` may be random.
    """
    wrong = sorted(tuple(m) for m in info.get("mismatched_keys") or ())
    if wrong:
        tensor, stored, here = wrong[0]
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        if tensor in new:
            return (
                f"its head has {stored[0]} outputs, and num_labels is {here[0]}; use a model whose "
                "head has as many or that has none, or set overrides_of_model_kwargs: "
                "{ignore_mismatched_sizes: true} for a new head"
            )
        return (
            f"its weights do not match its config.json: {tensor} is {tuple(stored)} in the file "
            f"and {tuple(here)} according to the configuration{more}; both must come from the same "
            "model"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    lost = sorted((set(info.get("missing_keys") or ()) & set(parameters)) - set(new))
    if lost:
        few = ", ".join(lost[:_FEW]) + (f" and {len(lost) - _FEW} more" if len(lost) > _FEW else "")
        return (
            f"its files have no weights for {few}, which would be random; config.json and weights "
            "must come from the same model"
        )
    return None


def require_fit(kind: type[Any], config: Any, recipe: Recipe, folder: Path) -> None:
    """Check the weights in a folder against its configuration, without reading them.

    They are loaded as for training, but on the meta device, so that names are mapped, merged and
    tied in the same way. ``config`` is consumed, and ``weights_problem`` must have found nothing.
    Raises a RecipeError if shapes differ, weights are missing, or a pickle has more than tensors.
    """
    if in_shards(folder) or getattr(config, "quantization_config", None):
        return  # packed weights have other shapes
    try:
        model, info = kind.from_pretrained(
            None, config=config, state_dict=meta_weights(folder),
            output_loading_info=True, ignore_mismatched_sizes=True, device_map={"": "meta"},
            use_kernels=False,
        )  # fmt: skip
    except UnpicklingError as error:
        why = _explained(error, recipe.base_model, folder, "model", kind)
        raise RecipeError(f"base_model: {why}") from error
    except Exception:  # a model's code raises anything; what is wrong shows when it is loaded
        return
    problem = _unfit(model, info, _new_in_head(model, info) if head_of(recipe).classifies else ())
    if problem is not None:
        raise RecipeError(f"base_model: {recipe.base_model}: {problem}")


def _gguf(source: ModelSource, kind: Kind) -> dict[str, Any]:
    """What ``from_pretrained`` needs for a GGUF file: dense weights, made from its blocks."""
    extra: dict[str, Any] = {"gguf_file": source.gguf_file}
    if kind == "model":  # older transformers always unpack, and have no such config
        with contextlib.suppress(ImportError):
            from transformers import GgufConfig

            extra["quantization_config"] = GgufConfig(dequantize=True)
    return extra


def clear_gguf_marks(model: Any) -> None:
    """Clear the marks of a GGUF file, whose weights are plain now; else nothing can be saved."""
    kind = getattr(model, "quantization_method", None)
    if str(getattr(kind, "value", kind)) == "gguf":
        clear_marks(model)
