"""Whether a checked recipe can be trained here, as far as that shows before anything is loaded.

Both a run and ``--dry-run`` begin with it. What needs torch or transformers is checked only where
there is something to check: a model that is on this disk, a precision, an attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError, RecipeError, did_you_mean
from .model import files as modelfiles
from .model.adapter_files import adapter_problem
from .recipe.locate import locate
from .recipe.preferences import generation_sizes, rows_of
from .recipe.recipe import Recipe
from .requirements import (
    OTHER_ATTENTIONS,
    attention,
    missing_for_training,
    missing_packages,
)


def require_startable(recipe: Recipe, processes: int = 1) -> None:
    """Raise RecipeError with all that keeps a checked recipe from being trained here."""
    if problems := obstacles(recipe, processes):
        raise RecipeError("\n  ".join(problems))


def obstacles(recipe: Recipe, processes: int | None = None) -> list[str]:
    """What keeps a checked recipe from being trained here: a sentence each, with its key.

    ``processes`` train it; None: not known yet.
    """
    problems = [*missing_for_training(), *model_obstacles(recipe)]
    problems += [*_beforehand(recipe, processes), *_generation(recipe, processes)]
    return [*problems, *_output(recipe, processes)]


def model_obstacles(recipe: Recipe) -> Iterator[str]:
    """What keeps the model of a recipe from being loaded here: a sentence each, with its key."""
    yield from missing_packages(recipe)
    for look in _LOOKS:
        yield from look(recipe)


def encoding_obstacles(recipe: Recipe) -> Iterator[str]:
    """What would keep any row from being tokenized: the tokenizer, or its chat template.

    A run sees it when it prepares its rows; a dry run, which reads none, asks here. The recipe has
    no ``obstacles``.
    """
    place = recipe.tokenizer_config or recipe.base_model
    source = locate(place, [Path.cwd()])
    here = source.gguf_file is not None or Path(source.name).is_dir()
    if not here and modelfiles.cached(place, recipe.revision_of_model) is None:
        return  # a dry run downloads nothing
    from .data.prepare import require_encoders
    from .model.load import quiet
    from .model.processor import load_processing

    try:
        with quiet():
            require_encoders(recipe, load_processing(recipe))
    except (DataError, RecipeError) as error:
        yield str(error)


def _precision(recipe: Recipe) -> Iterator[str]:
    precision, divides = recipe.precision(), recipe.strategy().tensor > 1
    if precision != "float16" and not (precision == "auto" and divides):
        return
    from .model.precision import computes_in, dtype_for_training

    try:
        dtype_for_training(precision)
    except RecipeError as error:
        yield str(error)
    if divides and computes_in(precision) == "float16":
        yield (
            "tensor_parallel_size: not in float16, where Trainer clips the gradients of divided "
            "layers while they are scaled: set float32: true, or use FSDP or DDP"
        )


def _attention(recipe: Recipe) -> Iterator[str]:
    name, problem = attention(recipe)
    if name in (None, "eager", "sdpa") or problem is not None:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kinds: Any = ALL_ATTENTION_FUNCTIONS
    known = ["eager", *kinds.valid_keys(), *OTHER_ATTENTIONS]
    if name not in known and "/" not in str(name):  # a kernel of the hub has a / in its name
        hint = did_you_mean(str(name), known) or f"there are {', '.join(known)}"
        yield f"attn_implementation: there is no attention {name!r}; {hint}"


def _model(recipe: Recipe) -> Iterator[str]:
    """The files of the base model, if they are on this disk."""
    source = locate(recipe.base_model, [Path.cwd()])
    folder: Path | None = Path(source.name)
    if source.gguf_file is not None:
        with (Path(source.name) / source.gguf_file).open("rb") as file:
            if file.read(4) != b"GGUF":
                yield f"base_model: {file.name} is not a valid GGUF file: download it again"
        return
    if not Path(source.name).is_dir():
        folder = modelfiles.cached(source.name, recipe.revision_of_model)
    if folder is None:
        return
    from .model.adapters import require_names
    from .model.from_pretrained import meta_model
    from .model.load import load_config, quiet
    from .model.positions import too_long
    from .model.stored import require_usable

    here, meta = recipe.model_copy(update={"base_model": str(folder)}), None
    try:
        with quiet():
            config = load_config(here)
            require_usable(recipe, config)
            model = meta_model(here, config)
            meta = type(model), copy.deepcopy(model.config)  # adapters may replicate layers
            require_names(model, recipe)
            _require_groups(model, recipe)
            problem = too_long(here, config)
    except RecipeError as error:
        yield str(error)
        return
    if problem is not None:
        yield problem
    if recipe.language_model_only and not list(folder.glob("*.safetensors")):
        yield (
            "language_model_only: what is saved takes the towers from the base's safetensors "
            f"files, and {folder} has none: leave the key out, or use a copy in safetensors"
        )
    if not recipe.overrides_of_model_kwargs:  # which can say that other files are taken
        yield from _weights(recipe, folder, meta)


def _weights(recipe: Recipe, folder: Path, meta: tuple[type[Any], Any] | None) -> Iterator[str]:
    """Check a folder's weights for ``meta``, the model's class and configuration, if known."""
    problem = modelfiles.weights_problem(folder)
    if problem is not None:
        yield f"base_model: {problem}"
    elif meta is not None:
        from .model.from_pretrained import require_fit
        from .model.load import quiet

        try:
            with quiet():
                require_fit(*meta, recipe, folder)
        except RecipeError as error:
            yield str(error)


def _require_groups(model: Any, recipe: Recipe) -> None:
    """Raise RecipeError unless processes can share the layers, or the sequences, of a model."""
    strategy = recipe.strategy()
    if strategy.tensor > 1:
        from .processes.tensor_parallel import require_divisible

        require_divisible(model, strategy.tensor)
    if strategy.context > 1:
        from .processes.context_parallel import require_causal

        require_causal(model)


def _reference(recipe: Recipe) -> Iterator[str]:
    """Whether a reference model that moves is whole in each process, as checkpoints keep it."""
    strategy = recipe.strategy()
    whole = strategy.engine == "ddp" and strategy.tensor == 1
    if recipe.trl is not None and recipe.trl.sync_ref_model and not whole:
        yield "trl.sync_ref_model: needs whole weights in each process: train without sharding them"


def _beforehand(recipe: Recipe, processes: int | None) -> Iterator[str]:
    """Whether the reference's part can be computed before training."""
    if recipe.precompute_ref_log_probs and processes is not None and processes > 1:
        yield (
            "precompute_ref_log_probs: works in one process only, and there are "
            f"{processes}: leave it out"
        )


def _generation(recipe: Recipe, processes: int | None) -> Iterator[str]:
    """Whether completions can be generated in whole groups."""
    if rows_of(recipe) != "prompts":
        return
    if processes is None:
        return
    try:
        generation_sizes(recipe, processes)
    except RecipeError as error:
        yield str(error)


def _output(recipe: Recipe, processes: int | None) -> Iterator[str]:
    """Where the results go, and which checkpoint a run resumes from."""
    from .checkpoint import resume
    from .checkpoint.files import checkpoints
    from .checkpoint.output_folder import check_output, state_of

    folder = Path(recipe.output_dir)
    try:
        start = resume.find(recipe)
        in_place = start is not None and start.parent == folder
        saved = None if start is None else resume.Saved.read(start)
        # of an earlier checkpoint, those after it would be lost
        is_last = in_place and start == checkpoints(folder)[-1]
        longer = (
            saved is not None
            and is_last
            and (
                saved.is_more_patient(recipe)
                if state_of(folder) == "stopped early"
                else bool(saved.longer_keys(recipe))
            )
        )
        if start is not None and saved is not None and saved.is_longer_than(recipe):
            resume.require_same_run(start, saved, recipe, processes)
        check_output(folder, recipe.overwrite_output_dir, in_place, longer)
        if start is not None and saved is not None:
            resume.require_same_run(start, saved, recipe, processes)
    except RecipeError as error:
        yield str(error)


def _tokenizer(recipe: Recipe) -> Iterator[str]:
    place = recipe.tokenizer_config or recipe.base_model
    problem = modelfiles.tokenizer_problem(Path(place)) if Path(place).is_dir() else None
    if problem is not None:
        yield f"{'tokenizer_config' if recipe.tokenizer_config else 'base_model'}: {problem}"


def _adapter(recipe: Recipe) -> Iterator[str]:
    folder = Path(recipe.lora_model_dir).expanduser() if recipe.lora_model_dir else None
    if recipe.adapter and folder is not None and folder.is_dir():
        problem = adapter_problem(folder)
        if problem is not None:
            yield f"lora_model_dir: {problem}"


_LOOKS: tuple[Callable[[Recipe], Iterator[str]], ...] = (
    _precision, _attention, _model, _tokenizer, _adapter, _reference,
)  # fmt: skip
