"""One bad input: how it is made, what must be said of it, and what else must hold.

Whatever is wrong, the command ends with exit code 2 and one line that names the place and what to
do about it; no file has changed, not even an earlier run in ``output_dir``, which the recipe allows
to be overwritten; and no weights were loaded, unless only they could show what is wrong.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from ..commands import complaint, fusewright, snapshot
from ..conftest import chat, small_recipe

ROW = json.dumps(chat("q", "a"))


class Box:
    """The folder of one case: it has rows, an earlier run, and a model beside it.

    Args:
        folder: an empty one, which is the current one.
        base: the tiny model, to read only.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.rows(f"{ROW}\n" * 12)
        earlier = folder / "out"
        earlier.mkdir()
        about = {"status": "finished", "output_dir": str(earlier), "recipe": {}}
        (earlier / "run.json").write_text(json.dumps(about))
        (earlier / "adapter_model.safetensors").write_bytes(b"of an earlier run")

    def write(self, name: str, content: str | bytes) -> Path:
        """A file in the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def rows(self, content: str | bytes, name: str = "rows.jsonl") -> Path:
        """The file of rows."""
        return self.write(name, content)

    def model(self) -> Path:
        """A copy of the model, to be damaged."""
        return Path(shutil.copytree(self.base, self.folder / "base"))

    def recipe(self, **keys: Any) -> list[str]:
        """The words that train a recipe with these keys; None leaves one out."""
        rows = self.folder / "rows.jsonl"
        whole = small_recipe(self.base, rows, self.folder / "out") | {"overwrite_output_dir": True}
        kept = {k: v for k, v in {**whole, **keys}.items() if v is not None}
        return self.text(yaml.safe_dump(kept))

    def text(self, text: str) -> list[str]:
        """The words that train the recipe with this text."""
        return ["train", str(self.write("recipe.yaml", text))]


Make = Callable[[Box], Sequence[str]]


class Bad(NamedTuple):
    """A bad input.

    Attributes:
        make: prepares it, and gives the words of the command.
        place: is in the message: the file, the line, the key.
        remedy: is in the message: what to do.
        late: weights must be loaded before it can be known.
    """

    make: Make
    place: str
    remedy: str
    late: bool = False


def keys(**changed: Any) -> Make:
    """Training with these keys of the recipe."""
    return lambda box: box.recipe(**changed)


def check(bad: Bad, box: Box, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the command, see that it is refused as it must be, and return the message."""
    from fusewright.train.model import load as model
    from fusewright.train.trainer import ready

    loaded: list[bool] = []

    def load(*arguments: Any) -> Any:
        loaded.append(True)
        return model.load_model(*arguments)

    monkeypatch.setattr(ready, "load_model", load)
    words = bad.make(box)
    before = snapshot(box.folder)
    result = fusewright(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    message = complaint(result).removesuffix("\n")
    assert message.count("fusewright: ") == 1
    assert len(message.splitlines()) == 1
    assert "Error" not in message, "a class of Python's is no explanation"
    assert bad.place in message, message
    assert bad.remedy in message, message
    assert snapshot(box.folder) == before
    assert bool(loaded) == bad.late
    return message
