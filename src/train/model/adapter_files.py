"""An adapter that is on disk: whether its files are whole, and whether it fits its base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...errors import ModelError
from .files import adapter_folder, adapter_weights, damaged, in_shards, read_object, shards_problem

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


_MISMATCH = re.compile(
    r"size mismatch for (?P<name>\S+): .*?Size\((?P<there>\[.*?\])\).*?Size\((?P<here>\[.*?\])\)"
)


def adapter_problem(folder: Path) -> str | None:
    """Why the folder cannot hold an adapter; None if its files look right. Nothing is loaded."""
    try:
        config = read_object(folder / "adapter_config.json")
    except ValueError as error:
        return f"{error}; copy the whole folder again, or name one that holds a PEFT adapter"
    if "peft_type" not in config:
        return f"{folder / 'adapter_config.json'} has no peft_type: it is not of a PEFT adapter"
    if in_shards(folder):
        problem = shards_problem(folder)
        return f"{problem}; copy the whole folder again" if problem else None
    weights = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not weights:
        return f"{folder} has no {WEIGHTS[0]}: saving or copying it was not completed"
    problem = damaged(weights[:1])
    return f"{problem}; copy it again" if problem else None


def put_adapter(model: Any, folder: str, **options: Any) -> Any:
    """Put an adapter on its base; its file and the model must have the same tensors.

    ``folder`` may also be an id on the hub; ``options`` are for ``PeftModel.from_pretrained``. The
    vocabulary of ``model`` must already have the adapter's size. Raises a ModelError if the adapter
    cannot be read, or was made for another base.
    """
    from peft import PeftModel

    if Path(folder).is_dir() and (problem := adapter_problem(Path(folder))) is not None:
        raise ModelError(problem)
    try:
        with adapter_folder(folder) as whole:
            adapted = PeftModel.from_pretrained(model, whole, **options)
        extra, missing = _misplaced(adapted, adapter_weights(folder))
    except Exception as error:  # PEFT, torch and the hub raise anything
        raise ModelError(_explained(error, folder)) from error
    if extra or missing:
        many = [f"{len(names)} {what}, such as {names[0]}" for names, what in (
            (extra, "of its tensors do not exist in the base model"),
            (missing, "tensors are missing in it"),
        ) if names]  # fmt: skip
        raise ModelError(_other_base(folder, ", and ".join(many)))
    return adapted


def _misplaced(model: Any, weights: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names in the file without a place in the model, and those of adapters that the file lacks."""
    from peft import LoraConfig, get_peft_model_state_dict

    if not all(isinstance(config, LoraConfig) for config in model.peft_config.values()):
        return [], []  # others save less than they have, or under other names
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # embeddings that are adapted are saved with the adapter, under either name
    base = {_of_base(name) for name in model.state_dict()}
    extra = [name for name in weights if name not in expected and _of_base(name) not in base]
    return extra, sorted(expected - set(weights))


def _of_base(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _explained(error: Exception, folder: str) -> str:
    text = str(error).strip()
    mismatches = [match.groupdict() for match in _MISMATCH.finditer(text)]
    if mismatches:
        first, more = mismatches[0], len(mismatches) - 1
        return _other_base(
            folder,
            f"{first['name']} is {first['there']} in its file and {first['here']} here"
            + (f", and {more} more tensors differ" if more else ""),
        )
    if "not found in the base model" in text:
        return _other_base(folder, "the layers that it adapts do not exist in the base model")
    reason = (text.splitlines() or [""])[0].rstrip(".") or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"its adapter_config.json says {reason}, which this version of PEFT does not know"
    return f"{folder}: the adapter cannot be loaded: {reason}"


def _other_base(folder: str, what: str) -> str:
    base = None
    if (Path(folder) / "adapter_config.json").is_file():
        base = read_object(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    of = f" (it names {base})" if base else ""
    return (
        f"{folder}: the adapter does not match the base model: {what}; set base_model to the model "
        f"that it was trained on{of}"
    )
