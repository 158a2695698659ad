"""Inspects the files of a model's folder before any of them is loaded."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import did_you_mean
from ..consent import CODE_SWITCH, why_not_run
from ..json_text import BadJsonError, parse_json

_REDOWNLOAD = "download the model, or copy its folder, again"
_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"


def cached(name: str, revision: str | None = None) -> Path | None:
    """The folder in the cache of a model on the hub; None: it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except (HFValidationError, OSError):
        return None
    return Path(path).parent if isinstance(path, str) else None


def config_problem(folder: Path, trusted: bool = False) -> str | None:
    """The problem of a folder's ``config.json``; None if nothing shows.

    ``trusted``: code that comes with the model may run.
    """
    path = folder / "config.json"
    try:
        config = read_object(path)
    except ValueError as error:
        return f"{error}; {_REDOWNLOAD}"
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
    suggestion = did_you_mean(name, types)
    return (
        f"{path} has the model_type {name!r}, which transformers {transformers.__version__} does "
        f"not have; {f'{suggestion} Or ' if suggestion else ''}a newer transformers may"
    )


def weights_problem(folder: Path) -> str | None:
    """The problem of the weights in a folder, which are not read; None if nothing shows."""
    if in_shards(folder):
        problem = shards_problem(folder)
        return f"{problem}; {_REDOWNLOAD}" if problem else None
    try:
        names = _with_weights(folder)
    except ValueError as error:
        return f"{error}; {_REDOWNLOAD}"
    if not names:
        return f"{folder} has a config.json and no weights ({_SAFE}); {_REDOWNLOAD}"
    problem = damaged(folder / name for name in names)
    if problem is not None:
        return f"{problem}; {_REDOWNLOAD}"
    for name in names:
        code = _code_in(folder / name) if name.endswith(".bin") else []
        if code:
            return pickled(str(folder / name), code)
    return None


def meta_weights(folder: Path) -> dict[str, Any]:
    """The weights in a folder, by name, on the meta device: shapes and dtypes without the numbers.

    ``weights_problem`` must have found nothing in it.
    """
    from transformers.modeling_utils import load_state_dict

    tensors_by_name: dict[str, Any] = {}
    for path in (folder / name for name in _with_weights(folder)):
        if path.suffix == ".safetensors":
            tensors_by_name |= load_state_dict(str(path), map_location="meta")
        elif path.suffix == ".bin":
            tensors_by_name |= _meta_pickle(path)
    return tensors_by_name


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
    """The problem of a tokenizer's files; None if nothing shows."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            continue
        try:
            content = read_object(folder / name, any_text=True)
        except ValueError as error:
            return f"{error}; {_REDOWNLOAD}"
        if name == "tokenizer.json" and not isinstance(content.get("model"), dict):
            return f"{folder / name} is damaged: it contains no tokenizer; {_REDOWNLOAD}"
    return None


def no_tokenizer(folder: Path) -> str:
    """The message for a folder whose tokenizer cannot be made."""
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
    """The message for weights that cannot be read without running code in them."""
    what = f" ({', '.join(code[:3])})" if code else ""
    return (
        f"{name} contains more than tensors{what}, which may be foreign code and is not run; use a "
        "copy of the model in safetensors"
    )


def _with_weights(folder: Path) -> list[str]:
    """The files that transformers takes, an index first; raises a ValueError if that is damaged."""
    for name in (_SAFE, f"{_SAFE}.index.json", _PICKLED, f"{_PICKLED}.index.json"):
        if (folder / name).exists():
            return [name, *(_shards(folder / name) if name.endswith(".json") else ())]
    return []


def _shards(index: Path) -> Iterator[str]:
    names: Any = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{index} is damaged: it has no weight_map")
    return iter(dict.fromkeys(names.values()))


def _code_in(path: Path) -> list[str]:
    """What a file of ``torch.save`` would need besides tensors, by name; nothing is run."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        return list(get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # an old form, which only reading can judge
        return []


# --- damage --------------------------------------------------------------------------------------


_POINTER = b"version https://git-lfs"
_LARGEST_HEADER = 100_000_000  # of the safetensors format


def damage(path: Path) -> str | None:
    """Why a file cannot be what its name says, in a few words; None if nothing shows.

    Only its size and what describes its content are read, so that this is quick for large files.
    ``.safetensors``, ``.json`` and files of ``torch.save`` are checked, others are not.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(len(_POINTER))
        if not begin:
            return "is empty"
        if begin == _POINTER:
            return "is a pointer of Git LFS instead of the file: run git lfs pull"
        if path.suffix == ".safetensors":
            tensors(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif begin.startswith(b"PK"):  # as torch.save writes since 1.6
            zipfile.ZipFile(path).close()
    except FileNotFoundError:
        return "is not there"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except json.JSONDecodeError as error:
        return f"is not valid JSON: {error.msg} (line {error.lineno})"
    except UnicodeDecodeError:
        return "is not valid JSON: it is not UTF-8"
    except zipfile.BadZipFile:
        return "is damaged: its end is missing"
    except ValueError as error:
        return f"is damaged: {error}"
    return None


def damaged(paths: Iterable[Path]) -> str | None:
    """The first of several files that is damaged, and why; None if none is."""
    for path in paths:
        problem = damage(path)
        if problem is not None:
            return f"{path} {problem}"
    return None


def tensors(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in a safetensors file, of which only the header is read.

    Raises:
        ValueError: it is none, not as long as it says, or its header is not valid.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LARGEST_HEADER:
            raise ValueError("it does not start like a safetensors file")
        if size < 8 + length:
            raise ValueError(f"its {size:,} bytes are only a part of it")
        try:
            header = json.loads(file.read(length))
            entries: dict[str, Any] = {k: v for k, v in header.items() if k != "__metadata__"}
            end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
            shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise ValueError("it does not start like a safetensors file") from None
    whole = 8 + length + end
    if size != whole:
        raise ValueError(f"it should have {whole:,} bytes and has {size:,}")
    _require_valid_header(path)
    return shapes


def _require_valid_header(path: Path) -> None:
    """Raise a ValueError, with the library's reason, if safetensors cannot read the header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"its header is not valid ({why})") from None


def read_object(path: Path, any_text: bool = False) -> dict[str, Any]:
    """The object in a JSON file; raises a ValueError, with the path, if it has none.

    ``any_text``: it may hold characters that no text has, as vocabularies do.
    """
    try:
        parse = json.loads if any_text else parse_json
        content = parse(path.read_text(encoding="utf-8"))
    except BadJsonError as error:
        where = f" (line {error.line})" if error.line else ""
        raise ValueError(f"{error.of(str(path))}{where}") from None
    except (OSError, ValueError):
        raise ValueError(f"{path} {damage(path) or 'cannot be read'}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object")
    return content


# --- checkpoints in shards -----------------------------------------------------------------------


FOLDER, LIST = "shards", "shards.json"
"""The folder of a checkpoint's shards, and the file that lists them."""

_FORMAT = 1


@dataclass(frozen=True)
class Shards:
    """A checkpoint in shards.

    Attributes:
        files: the names of its shards, each with its size.
        adapter: for each tensor of an adapter's file, the name of its weight; None: whole models.
        optimizer: the optimizer's state without its tensors; None: no state was saved.
    """

    folder: Path
    files: Mapping[str, int]
    adapter: Mapping[str, str] | None
    optimizer: Mapping[str, Any] | None

    @property
    def place(self) -> Path:
        """The folder of the shards."""
        return self.folder / FOLDER

    def write(self) -> None:
        """Write the list of shards into the checkpoint."""
        content = {
            "format": _FORMAT, "files": dict(self.files), "adapter": self.adapter,
            "optimizer": self.optimizer,
        }  # fmt: skip
        (self.folder / LIST).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Shards:
        """Read the list of shards of a checkpoint, and check that each is there in its full size.

        Raises a ValueError that names the file which is missing or damaged.
        """
        path = folder / LIST
        content = read_object(path, any_text=True)
        files, adapter, optimizer = (content.get(k) for k in ("files", "adapter", "optimizer"))
        if content.get("format") != _FORMAT:
            raise ValueError(f"{path} was written by another version")
        if not _is_list(files, int) or not files or not (adapter is None or _is_list(adapter, str)):
            raise ValueError(f"{path} is damaged: it does not list the shards")
        if not (optimizer is None or isinstance(optimizer, dict)):
            raise ValueError(f"{path} is damaged: it has no state of the optimizer")
        shards = cls(folder, files, adapter, optimizer)
        shards._require_files()
        return shards

    def _require_files(self) -> None:
        for name, size in sorted(self.files.items()):
            path = self.place / name
            problem = damage(path) if Path(name).name == name else "is in another folder"
            size_on_disk = path.stat().st_size if problem is None else size
            if size_on_disk != size:
                problem = f"is damaged: it should have {size:,} bytes and has {size_on_disk:,}"
            if problem is not None:
                raise ValueError(f"{path} {problem}")
        for path in sorted(self.place.glob("*.safetensors")):
            if path.name not in self.files:
                raise ValueError(f"{path} is not one of the files that {LIST} lists")

    def weights(self) -> dict[str, Any]:
        """The whole weights, by the model's names."""
        from ..processes.shards import WEIGHTS, read_whole

        return read_whole(self.place, WEIGHTS)

    def adapter_weights(self) -> dict[str, Any]:
        """The whole adapter weights, by its file's names; raises a ValueError if one is missing."""
        weights, names = self.weights(), dict(self.adapter or {})
        if missing := sorted(set(names.values()) - set(weights)):
            raise ValueError(f"{self.place} has no {missing[0]}")
        return {key: weights[name] for key, name in names.items()}


def in_shards(folder: Path) -> bool:
    """Whether a checkpoint is one in shards."""
    return (folder / LIST).is_file() or (folder / FOLDER).is_dir()


def shards_problem(folder: Path) -> str | None:
    """Which file of a checkpoint in shards is missing or damaged; None if none is."""
    try:
        Shards.read(folder)
    except ValueError as error:
        return str(error)
    return None


@contextlib.contextmanager
def adapter_folder(folder: str) -> Iterator[str]:
    """Yield a folder that has an adapter as PEFT reads it; one in shards is merged elsewhere.

    ``folder`` may also be an id on the hub. Raises a ValueError if a file is missing or damaged.
    """
    if not in_shards(Path(folder)):
        yield folder
        return
    from safetensors.torch import save_file

    tensors = Shards.read(Path(folder)).adapter_weights()
    with tempfile.TemporaryDirectory(prefix="fusewright-adapter-") as merged:
        shutil.copy(Path(folder) / "adapter_config.json", merged)
        save_file(tensors, Path(merged) / "adapter_model.safetensors", metadata={"format": "pt"})
        yield merged


def adapter_weights(folder: str) -> dict[str, Any]:
    """The tensors of an adapter, in shards or not, or on the hub, by the names in its file."""
    if in_shards(Path(folder)):
        return Shards.read(Path(folder)).adapter_weights()
    from peft.utils import load_peft_weights

    weights: dict[str, Any] = load_peft_weights(folder, device="cpu")
    return weights


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(type(entry) is kind for entry in value.values())
