"""The files of a model's folder, looked at before any of them is loaded."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import did_you_mean
from ..consent import CODE_SWITCH, why_not_run
from .integrity import damaged, read_object
from .shard_files import in_shards, shards_problem

_AGAIN = "download the model, or copy its folder, again"
_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"


def cached(name: str, revision: str | None = None) -> Path | None:
    """The folder in the cache that has a model of the hub; None: it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except (HFValidationError, OSError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def config_problem(folder: Path, trusted: bool = False) -> str | None:
    """What is wrong with a folder's ``config.json``; None if nothing shows.

    Args:
        folder: of a model.
        trusted: code that comes with the model may run.
    """
    path = folder / "config.json"
    try:
        config = read_object(path)
    except ValueError as error:
        return f"{error}; {_AGAIN}"
    name = config.get("model_type")
    if trusted and "auto_map" in config:
        return None
    if not isinstance(name, str) or not name:
        return (
            f"{path} has no model_type, so the architecture is unknown; use the file that came "
            "with the weights"
        )
    import transformers

    types = list(transformers.CONFIG_MAPPING.keys())
    if name in types:
        return None
    if "auto_map" in config:
        return why_not_run("needs Python code that comes with it", CODE_SWITCH)
    meant = did_you_mean(name, types)
    return (
        f"{path} has the model_type {name!r}, which transformers {transformers.__version__} does "
        f"not have; {f'{meant} Or ' if meant else ''}a newer transformers may"
    )


def weights_problem(folder: Path) -> str | None:
    """What is wrong with the weights in a folder; None if nothing shows. They are not read."""
    if in_shards(folder):
        said = shards_problem(folder)
        return f"{said}; {_AGAIN}" if said else None
    try:
        names = _with_weights(folder)
    except ValueError as error:
        return f"{error}; {_AGAIN}"
    if not names:
        return f"{folder} has a config.json and no weights ({_SAFE}); {_AGAIN}"
    said = damaged(folder / name for name in names)
    if said is not None:
        return f"{said}; {_AGAIN}"
    for name in names:
        code = _code_in(folder / name) if name.endswith(".bin") else []
        if code:
            return pickled(str(folder / name), code)
    return None


def meta_weights(folder: Path) -> dict[str, Any]:
    """The weights in a folder on the meta device: names, shapes and dtypes, without the numbers.

    Args:
        folder: in which ``weights_problem`` has found nothing.
    """
    from transformers.modeling_utils import load_state_dict

    found: dict[str, Any] = {}
    for path in (folder / name for name in _with_weights(folder)):
        if path.suffix == ".safetensors":
            found |= load_state_dict(str(path), map_location="meta")
        elif path.suffix == ".bin":
            found |= _meta_pickle(path)
    return found


def _meta_pickle(path: Path) -> dict[str, Any]:
    """The tensors in a file of ``torch.save`` on the meta device; no code in it is run."""
    import torch

    in_zip = zipfile.is_zipfile(path)  # the form before torch 1.6 can only be read as a whole
    where: dict[str, Any] = {"map_location": "cpu"}
    if in_zip:
        where = {"map_location": "meta", "mmap": True}
    loaded = torch.load(path, weights_only=True, **where)
    return {name: value.to("meta") for name, value in loaded.items()}


def tokenizer_problem(folder: Path) -> str | None:
    """What is wrong with a tokenizer's files; None if nothing shows."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            continue
        try:
            content = read_object(folder / name, any_text=True)
        except ValueError as error:
            return f"{error}; {_AGAIN}"
        if name == "tokenizer.json" and not isinstance(content.get("model"), dict):
            return f"{folder / name} is damaged: it contains no tokenizer; {_AGAIN}"
    return None


def no_tokenizer(folder: Path) -> str:
    """What to say of a folder whose tokenizer cannot be made."""
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder} has a tokenizer.model and no tokenizer.json: pip install sentencepiece "
            "tiktoken, or use a copy with a tokenizer.json"
        )
    return (
        f"{folder} has no tokenizer (no tokenizer.json); set tokenizer_config to the model that it "
        "was trained from"
    )


def pickled(name: str, code: list[str]) -> str:
    """What to say of weights that cannot be read without running what is in them."""
    what = f" ({', '.join(code[:3])})" if code else ""
    return (
        f"{name} contains more than tensors{what}, which may be foreign code and is not run; use a "
        "copy of the model in safetensors"
    )


def _with_weights(folder: Path) -> list[str]:
    """The files that transformers takes, the first of them an index if there is one.

    Raises:
        ValueError: the index is damaged.
    """
    for name in (_SAFE, f"{_SAFE}.index.json", _PICKLED, f"{_PICKLED}.index.json"):
        if (folder / name).exists():
            return [name, *(_shards(folder / name) if name.endswith(".json") else ())]
    return []


def _shards(index: Path) -> Iterator[str]:
    """The files that an index names."""
    named: Any = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
        raise ValueError(f"{index} is damaged: it has no weight_map")
    return iter(dict.fromkeys(named.values()))


def _code_in(path: Path) -> list[str]:
    """What a file of ``torch.save`` would need besides tensors, by name; nothing is run."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        return list(get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # an old form, which only reading can judge
        return []
