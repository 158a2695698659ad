"""An adapter that is on disk: whether its files are whole, and whether it fits its base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...errors import ModelError
from .integrity import damaged, read_object
from .shard_files import adapter_folder, adapter_weights, in_shards, shards_problem

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
        said = shards_problem(folder)
        return f"{said}; copy the whole folder again" if said else None
    weights = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not weights:
        return f"{folder} has no {WEIGHTS[0]}: saving or copying it was not completed"
    said = damaged(weights[:1])
    return f"{said}; copy it again" if said else None


def put_adapter(model: Any, folder: str, **options: Any) -> Any:
    """Put an adapter on its base; every tensor of its file must have found its place, and no other.

    Args:
        model: the base, with its vocabulary as the adapter wants it.
        folder: of the adapter, or its id on the hub.
        options: for ``PeftModel.from_pretrained``.

    Returns:
        The PEFT model.

    Raises:
        ModelError: it cannot be read, or was made for another base.
    """
    from peft import PeftModel

    if Path(folder).is_dir() and (said := adapter_problem(Path(folder))) is not None:
        raise ModelError(said)
    try:
        with adapter_folder(folder) as whole:
            made = PeftModel.from_pretrained(model, whole, **options)
        left, missing = _misplaced(made, adapter_weights(folder))
    except Exception as error:  # PEFT, torch and the hub raise whatever they meet
        raise ModelError(_explained(error, folder)) from error
    if left or missing:
        many = [f"{len(names)} {what}, such as {names[0]}" for names, what in (
            (left, "of its tensors do not exist in the base model"),
            (missing, "tensors are missing in it"),
        ) if names]  # fmt: skip
        raise ModelError(_other_base(folder, ", and ".join(many)))
    return made


def _misplaced(model: Any, weights: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names in the file that the model has no place for, and of adapters that the file lacks."""
    from peft import LoraConfig, get_peft_model_state_dict

    if not all(isinstance(config, LoraConfig) for config in model.peft_config.values()):
        return [], []  # others save less than they have, or under other names
    own = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # embeddings that are adapted are saved with the adapter, under either name
    base = {_of_base(name) for name in model.state_dict()}
    left = [name for name in weights if name not in own and _of_base(name) not in base]
    return left, sorted(own - set(weights))


def _of_base(name: str) -> str:
    """The name that a tensor has without adapters around its layer."""
    return name.replace(".base_layer.", ".")


def _explained(error: Exception, folder: str) -> str:
    """Why an adapter could not be loaded, and what to do."""
    text = str(error).strip()
    found = [match.groupdict() for match in _MISMATCH.finditer(text)]
    if found:
        first, more = found[0], len(found) - 1
        return _other_base(
            folder,
            f"{first['name']} is {first['there']} in its file and {first['here']} here"
            + (f", and {more} more tensors differ" if more else ""),
        )
    if "not found in the base model" in text:
        return _other_base(folder, "the layers that it adapts do not exist in the base model")
    said = (text.splitlines() or [""])[0].rstrip(".") or type(error).__name__
    if isinstance(error, KeyError):
        said = f"its adapter_config.json says {said}, which this version of PEFT does not know"
    return f"{folder}: the adapter cannot be loaded: {said}"


def _other_base(folder: str, what: str) -> str:
    """What to say of an adapter that was made for another base."""
    base = None
    if (Path(folder) / "adapter_config.json").is_file():
        base = read_object(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    of = f" (it names {base})" if base else ""
    return (
        f"{folder}: the adapter does not match the base model: {what}; set base_model to the model "
        f"that it was trained on{of}"
    )
