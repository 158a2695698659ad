"""Checkpoints in shards on disk: which files they must have, and their tensors made whole."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .integrity import damage, read_object

FOLDER, LIST = "shards", "shards.json"
"""Where the shards of a checkpoint are, and the file that lists them."""

_FORMAT = 1


@dataclass(frozen=True)
class Shards:
    """A checkpoint in shards.

    Attributes:
        folder: of the checkpoint.
        files: the names of its shards, each with its size.
        adapter: for each tensor of an adapter's file, the weight that it is; None: whole models.
        optimizer: what the optimizer's state has besides tensors; None: no state was saved.
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
        """Read the list of shards, and see that each of them is there, as long as it was.

        Args:
            folder: of the checkpoint.

        Raises:
            ValueError: a file is missing or damaged; the message names it.
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
        found = cls(folder, files, adapter, optimizer)
        found._require_files()
        return found

    def _require_files(self) -> None:
        for name, size in sorted(self.files.items()):
            path = self.place / name
            said = damage(path) if Path(name).name == name else "is in another folder"
            there = path.stat().st_size if said is None else size
            if there != size:
                said = f"is damaged: it should have {size:,} bytes and has {there:,}"
            if said is not None:
                raise ValueError(f"{path} {said}")
        for path in sorted(self.place.glob("*.safetensors")):
            if path.name not in self.files:
                raise ValueError(f"{path} is not one of the files that {LIST} lists")

    def weights(self) -> dict[str, Any]:
        """The whole weights, by the names that they have in the model."""
        from ..processes.shards import WEIGHTS, read_whole

        return read_whole(self.place, WEIGHTS)

    def adapter_weights(self) -> dict[str, Any]:
        """The whole weights of an adapter, by the names that its file would have.

        Raises:
            ValueError: one of them is not there.
        """
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
    """Yield a folder that has an adapter as PEFT reads it.

    Args:
        folder: of the adapter, or its id on the hub. One in shards is made whole, elsewhere.

    Raises:
        ValueError: a file is missing or damaged.
    """
    if not in_shards(Path(folder)):
        yield folder
        return
    from safetensors.torch import save_file

    tensors = Shards.read(Path(folder)).adapter_weights()
    with tempfile.TemporaryDirectory(prefix="fusewright-adapter-") as made:
        shutil.copy(Path(folder) / "adapter_config.json", made)
        save_file(tensors, Path(made) / "adapter_model.safetensors", metadata={"format": "pt"})
        yield made


def adapter_weights(folder: str) -> dict[str, Any]:
    """The tensors of an adapter, by the names in its file.

    Args:
        folder: of the adapter, in shards or not, or its id on the hub.
    """
    if in_shards(Path(folder)):
        return Shards.read(Path(folder)).adapter_weights()
    from peft.utils import load_peft_weights

    found: dict[str, Any] = load_peft_weights(folder, device="cpu")
    return found


def _is_list(value: Any, kind: type) -> bool:
    """Whether a value maps names to values of a kind."""
    return isinstance(value, dict) and all(type(entry) is kind for entry in value.values())
