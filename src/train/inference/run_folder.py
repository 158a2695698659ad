"""What a folder holds: a run, one of its checkpoints, a PEFT adapter, or a whole model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import ModelError, RecipeError
from ..consent import Consent
from ..model.files import LIST, in_shards, read_object
from ..recipe.locate import locate
from ..recipe.secret_values import without_hidden

_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_MODELS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """A folder that can be loaded.

    Attributes:
        base_model: what ``pretrained`` takes: the adapter's base, or the folder itself.
        tokenizer: the folder that has the run's own tokenizer; None: the base's is used.
        recipe: every key of the recipe, from ``run.json``, except secrets; empty where there is
            none.
        consent: what the caller allows. The folder may come from anybody, so that what its recipe
            was allowed counts for nothing.
    """

    folder: Path
    adapter: bool
    base_model: str
    tokenizer: Path | None
    recipe: dict[str, Any]
    facts: dict[str, Any]
    consent: Consent = field(default_factory=Consent)


def open_run(
    path: str | Path, base_model: str | None = None, consent: Consent | None = None
) -> RunFolder:
    """Find out what ``path`` holds, without loading it.

    It may be an ``output_dir``, a ``checkpoint-N`` in it, a folder with a PEFT adapter, or one with
    a whole model. ``base_model`` is where the adapter's base is, by default where the folder says.
    ``consent`` is what the caller allows, by default nothing. Raises a ModelError that says what
    was looked for, and where, if there is nothing usable.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "is not there"
        raise ModelError(f"{path} {what}; name the output_dir of a training run")
    folder = folder.resolve()
    facts = _json(_with_run(folder)[-1] / "run.json")
    recipe = without_hidden(facts.pop("recipe", None) or {})
    folders = (f for f in _with_run(folder) if (f / "tokenizer_config.json").is_file())
    run = RunFolder(folder, True, "", next(folders, None), recipe, facts, consent or Consent())
    if (folder / "adapter_config.json").is_file():
        _require(folder, (*_ADAPTERS, LIST), "adapter_config.json")
        base = base_model or _base(folder, recipe)
        return replace(run, base_model=_located(base, folder))
    if in_shards(folder) or any((folder / name).is_file() for name in _MODELS):
        _require(folder, ("config.json",), "a model")
        if base_model:
            raise ModelError(f"{folder} holds a whole model, which has no base: no --base-model")
        return replace(run, adapter=False, base_model=str(folder))
    raise ModelError(_nothing(folder))


def stored_dtype(folder: Path) -> str:
    """The name of the dtype in which the model in ``folder`` says it is stored."""
    config = _json(folder / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


# --- paths ---------------------------------------------------------------------------------------


def _with_run(folder: Path) -> list[Path]:
    """``folder`` and, of a checkpoint, the run that it belongs to."""
    run = folder.parent
    belongs = folder.name.startswith("checkpoint-") and (run / "run.json").exists()
    return [folder, run] if belongs else [folder]


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path) if path.exists() else {}
    except ValueError as error:
        raise ModelError(f"{error}; copy the run again") from None


def _base(folder: Path, recipe: dict[str, Any]) -> str:
    base = recipe.get("base_model") or _json(folder / "adapter_config.json").get(
        "base_model_name_or_path"
    )
    if not base:
        raise ModelError(
            f"{folder}: adapter_config.json does not name the base model; --base-model does"
        )
    return str(base)


def _located(base: str, folder: Path) -> str:
    """``base``, after a check that it is there (a Hugging Face id is not checked)."""
    try:
        path = locate(base, [Path.cwd(), folder])
    except RecipeError as error:
        raise ModelError(
            f"{folder}: the base model is missing: {error}; --base-model BASE says where it is now"
        ) from None
    special = base.startswith("package:") or path.gguf_file
    return base if special or not Path(path.name).is_dir() else str(Path(path.name).resolve())


def _require(folder: Path, names: tuple[str, ...], other: str) -> None:
    if not any((folder / name).is_file() for name in names):
        raise ModelError(
            f"{folder} has {other} but no {names[0]}: saving or copying it was not completed"
        )


def _runs_in(folder: Path) -> list[str]:
    """The runs in a folder, also those that were killed, the last one first."""
    names = ("run.json", "adapter_config.json", "checkpoint-*")
    runs = {file.parent for name in names for file in folder.glob(f"*/{name}")}
    return [str(run) for run in sorted(runs, key=lambda r: r.stat().st_mtime, reverse=True)]


def _nothing(folder: Path) -> str:
    checkpoints = sorted(
        folder.glob("checkpoint-*"), key=lambda p: (len(p.name), p.name), reverse=True
    )
    if checkpoints:
        return f"{folder} has checkpoints but no result; name one of them: {checkpoints[0]}"
    if (folder / "run.json").exists():
        return f"{folder} has a run.json but neither an adapter nor a model: nothing was saved"
    if runs := _runs_in(folder):
        more = ", ..." * bool(runs[3:])
        named = ", ".join(runs[:3])
        return f"{folder} contains runs but is not a run itself; name one of them: {named}{more}"
    return (
        f"{folder} is neither a run nor a model: it has no adapter_config.json and no "
        "model.safetensors"
    )
