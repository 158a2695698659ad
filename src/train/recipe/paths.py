"""The paths of a recipe, made absolute, and the problems with those that do not exist."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...errors import RecipeError
from ..consent import CODE_SWITCH, must_build, refused_builder, refused_function, why_not_run
from ..output_files import why_not_ours_to_write
from ..user_functions import is_package_rows, load_function, located, module_of, why_none
from .deepspeed_config import mismatches, read_config
from .keys.dataset import Dataset
from .keys.row_types import is_function, is_function_type
from .locate import find_file, locate, meant_file, nowhere
from .preferences import rows_of
from .problems import Loc
from .recipe import Recipe

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
_D = TypeVar("_D", bound=Dataset)

Problems = list[tuple[Loc, str]]

DATA = ("datasets", "test_datasets", "pretraining_dataset")
"""The keys that say where rows are."""

FUNCTIONS = ("datasets", "test_datasets", "trl")
"""The keys that may name Python functions."""


def with_paths(recipe: Recipe, folder: Path, whole: bool = True) -> tuple[Recipe, Problems]:
    """Make the paths of a recipe absolute, and return what could not be found.

    A path is looked for in ``folder``, where the recipe is, then in the current folder. Keys are
    compared with each other only if the recipe is ``whole``: else some values are not the user's.
    """
    folders = list(dict.fromkeys([folder, Path.cwd()]))
    problems: Problems = []
    update: dict[str, Any] = {}
    for name in DATA:
        if datasets := getattr(recipe, name):
            update[name] = [
                _dataset(d, folders, (name, i), problems) for i, d in enumerate(datasets)
            ]
            if not recipe.consent.allow_builders:
                problems += _unallowed(update[name], name)
    update |= _models(recipe, folders, problems)
    update |= _functions(recipe.model_copy(update=update), folders, problems)
    for name in ("output_dir", "dataset_prepared_path"):
        if (path := getattr(recipe, name)) is not None:
            update[name] = str(Path(path).expanduser().resolve())
            if (problem := why_not_ours_to_write(Path(update[name]))) is not None:
                problems.append(((name,), problem))
    for name in ("base_model", "lora_model_dir"):
        # its weights would be overwritten
        if whole and update.get(name) == update.get("output_dir"):
            problems.append((("output_dir",), f"is the folder of {name}: choose another one"))
    if isinstance(resume_from := recipe.resume_from_checkpoint, str):
        places = [Path.cwd(), folder, Path(update["output_dir"])]
        checkpoint = find_file(resume_from, places)
        if checkpoint is None:
            places = list(dict.fromkeys(places))
            problems.append((("resume_from_checkpoint",), nowhere(resume_from, places)))
        update["resume_from_checkpoint"] = str(checkpoint)
    if recipe.sample_image is not None:
        image = find_file(recipe.sample_image, folders)
        if image is None:
            problems.append((("sample_image",), nowhere(recipe.sample_image, folders)))
        update["sample_image"] = str(image)
    if (template := recipe.chat_template_jinja) is not None:
        update["chat_template_jinja"] = _template(template, folders, (), problems)
    if recipe.deepspeed:
        update["deepspeed"] = _deepspeed(recipe, recipe.deepspeed, folders, problems, whole)
    problems += needs_consent(recipe)
    return recipe.model_copy(update=update), problems


def _functions(recipe: Recipe, folders: list[Path], problems: Problems) -> dict[str, Any]:
    """The Python functions that a recipe names, with the paths of their files."""
    update: dict[str, Any] = {}
    for loc, name in _named_functions(recipe):
        key, i = str(loc[0]), loc[-1]
        full_name = _function(name, folders, loc, problems)
        if key == "trl":
            trl: Any = update.get(key, recipe.trl)
            names = [full_name if place == i else n for place, n in enumerate(trl.reward_funcs)]
            update[key] = trl.model_copy(update={"reward_funcs": names})
        else:
            datasets = list(update.get(key, getattr(recipe, key)))
            place = int(loc[1])
            datasets[place] = datasets[place].model_copy(update={"type": full_name})
            update[key] = datasets
    return update


def _named_functions(recipe: Recipe) -> Iterator[tuple[Loc, str]]:
    rows = rows_of(recipe)
    if rows is None:
        return
    for key in ("datasets", "test_datasets"):
        for i, dataset in enumerate(getattr(recipe, key)):
            if isinstance(dataset.type, str) and is_function_type(dataset.type, rows):
                yield (key, i, "type"), dataset.type
    if rows == "prompts" and recipe.trl is not None:
        for i, name in enumerate(recipe.trl.reward_funcs or ()):
            if is_function(name):
                yield ("trl", "reward_funcs", i), name


def _function(name: str, folders: list[Path], loc: Loc, problems: Problems) -> str:
    name_with_path = located(name, folders)
    if (missing := module_of(name_with_path)) is not None:
        problems.append(
            (loc, f"there is no {missing}.py in {_either(folders)}, and no such package")
        )
    return name_with_path


def unallowed_functions(recipe: Recipe) -> Problems:
    """The Python functions that a run would call without the caller's permission.

    The recipe has absolute paths.
    """
    if recipe.consent.allow_code:
        return []
    return [(loc, refused_function(name)) for loc, name in _named_functions(recipe)]


def broken_functions(recipe: Recipe, keys: Collection[str] = FUNCTIONS) -> Problems:
    """The Python functions of ``keys`` that cannot be loaded; their modules are imported.

    The recipe has absolute paths, and the caller's permission.
    """
    problems: Problems = []
    for loc, name in _named_functions(recipe):
        if loc[0] not in keys or not recipe.consent.allow_code:
            continue
        key = ".".join(map(str, loc))
        try:
            load_function(name, key, recipe.consent)
        except RecipeError as error:
            problems.append((loc, str(error).removeprefix(f"{key}: ")))
    return problems


def _unallowed(datasets: list[Dataset], key: str) -> Problems:
    """Builders that the caller has not allowed."""
    return [
        ((key, i, "builder"), refused_builder(d.builder, d.path))
        for i, d in enumerate(datasets)
        if d.builder and Path(d.builder).exists() and must_build(d.builder, d.path)
    ]


def _models(recipe: Recipe, folders: list[Path], problems: Problems) -> dict[str, Any]:
    update: dict[str, Any] = {}
    for name in ("base_model", "base_model_config", "tokenizer_config", "lora_model_dir"):
        value = getattr(recipe, name)
        if value is None:
            continue
        path = None if value.startswith("package:") else find_file(value, folders)
        update[name] = str(path) if path else value
        try:
            if name == "base_model" or path is None:
                locate(value, folders)
            if path is None and not value.startswith("package:") and not _HUB_ID.fullmatch(value):
                raise RecipeError(_no_id(value, folders))
        except RecipeError as error:
            problems.append(((name,), str(error)))
    return update


def _dataset(dataset: _D, folders: list[Path], loc: Loc, problems: Problems) -> _D:
    """The dataset with absolute paths. A path that nothing on disk has may be an id of the hub."""
    update: dict[str, Any] = {}
    path, builder = dataset.path, dataset.builder
    if is_package_rows(path):
        if (problem := why_none(path)) is not None:
            problems.append(((*loc, "path"), problem))
        return dataset
    local = find_file(path, folders)
    if builder is not None:
        builder_file = find_file(builder, folders)
        if builder_file is None:
            problems.append(((*loc, "builder"), nowhere(builder, folders)))
        update = {
            "builder": str(builder_file),
            "path": str(local or folders[0] / Path(path).expanduser()),
        }
    elif local is not None:
        update["path"] = str(local)
    elif "://" in path:
        problems.append(
            ((*loc, "path"), f"{path}: remote storage is not yet available: download it first")
        )
    elif path.startswith(("/", "./", "../", "~")) or Path(path).suffix in _FILES:
        problems.append(((*loc, "path"), nowhere(path, folders)))
    elif not _HUB_ID.fullmatch(path):
        problems.append(((*loc, "path"), _no_id(path, folders)))
    if dataset.data_files is not None and local is None:  # else they are inside the folder
        files = [dataset.data_files] if isinstance(dataset.data_files, str) else dataset.data_files
        update["data_files"] = [str(find_file(file, folders) or file) for file in files]
    if dataset.images_dir is not None:
        images = find_file(dataset.images_dir, folders)
        if images is None or not images.is_dir():
            problems.append(((*loc, "images_dir"), nowhere(dataset.images_dir, folders)))
        update["images_dir"] = str(images)
    if dataset.chat_template_jinja is not None:
        template = dataset.chat_template_jinja
        update["chat_template_jinja"] = _template(template, folders, loc, problems)
    return dataset.model_copy(update=update)


def _template(text: str, folders: list[Path], loc: Loc, problems: Problems) -> str:
    """The absolute path of a template's file, or the template itself."""
    if "{" in text or "\n" in text:
        return text
    file = find_file(text, folders)
    if file is None:
        problems.append(((*loc, "chat_template_jinja"), nowhere(text, folders)))
    return str(file or text)


def _deepspeed(
    recipe: Recipe,
    value: str | dict[str, Any],
    folders: list[Path],
    problems: Problems,
    whole: bool,
) -> str | dict[str, Any]:
    """The absolute path of a configuration of DeepSpeed, if it is in a file."""
    file = find_file(value, folders) if isinstance(value, str) else None
    try:
        config = read_config(str(file) if file else value)
        settings = {
            "micro_batch_size": recipe.micro_batch_size,
            "gradient_accumulation_steps": recipe.accumulation(),
            "max_grad_norm": recipe.max_grad_norm,
        }
        if whole:
            problems += [(("deepspeed",), message) for message in mismatches(config, settings)]
    except RecipeError as error:
        problems.append((("deepspeed",), str(error)))
    return str(file) if file else value


def _no_id(name: str, folders: list[Path]) -> str:
    text, meant = f"{name!r} is neither in {_either(folders)}", meant_file(name, folders)
    return f"{text} nor a Hugging Face id" + (f"; {meant}" if meant else "")


def _either(folders: list[Path]) -> str:
    return " or ".join(map(str, folders))


def needs_consent(recipe: Recipe) -> Iterator[tuple[Loc, str]]:
    """The keys by which a recipe would run foreign code without consent, each with the refusal.

    ``trust_remote_code`` itself is none of them: without consent it is not obeyed, and most models
    that it is written for have long been part of transformers. Nor is ``attn_implementation``, for
    which the model's own attention stands in.
    """
    if recipe.consent.trust_remote_code:
        return
    for where, options in (
        ("overrides_of_model_kwargs", recipe.overrides_of_model_kwargs),
        ("overrides_of_model_config", recipe.overrides_of_model_config),
    ):
        for name, value in (options or {}).items():
            what = _runs_code(name, value)
            if what:
                yield (where, name), why_not_run(what, CODE_SWITCH)


def require_consent(recipe: Recipe) -> None:
    """Raise RecipeError if anything in ``recipe`` needs consent that the caller has not given."""
    for place, problem in needs_consent(recipe):
        raise RecipeError(f"{'.'.join(map(str, place))}: {problem}")


def _runs_code(name: str, value: Any) -> str | None:
    """What an argument of ``from_pretrained``, or a value of a configuration, would run."""
    if name == "weights_only" and not value:
        return "weights in pickles can contain code"
    if name in ("trust_remote_code", "allow_all_kernels") and value:
        return "this runs code that comes with the model"
    if name.lstrip("_").startswith("attn_implementation"):
        values = value.values() if isinstance(value, Mapping) else [value]
        if any(map(is_hub_kernel, values)):
            return "an attention with a / in its name is code on the hub"
    return None


def is_hub_kernel(name: Any) -> bool:
    """Whether an attention is a kernel on the hub, ``owner/name``."""
    return isinstance(name, str) and "/" in name
