"""What ``run.json`` says, read with tolerance: a run that ended early lacks half of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path, PurePath
from typing import Any

from ...errors import DataError

METHODS = {"lora": "LoRA", "qlora": "QLoRA", None: "full fine-tuning"}

TASKS = {
    "dpo": "DPO (direct preference optimization)", "ipo": "IPO (identity preference optimization)",
    "kto": "KTO (Kahneman-Tversky optimization)",
    "orpo": "ORPO (odds ratio preference optimization)",
    "cpo": "CPO (contrastive preference optimization)",
    "simpo": "SimPO (simple preference optimization)",
    "grpo": "GRPO (group relative policy optimization)",
    "gdpo": "GDPO (GRPO whose rewards are normalized one by one)",
    "reward-model": "reward modeling (Bradley and Terry)",
    "process-reward-model": "process reward modeling",
}  # fmt: skip
"""What trains on preferences or rewards, by the tag that model cards have for it."""


_PATH = re.compile(
    r"(?<=['\"])/[^'\"\n]+(?=['\"])|(?<![\w:/.<~-])(?:/[^\s/'\",;:()<>]+){2,}"
    r"|\b[A-Za-z]:(?:\\[^\s\\'\",;:()<>]+)+"
)
"""An absolute path in a text, on its own or in quotes."""
_LOCAL = re.compile(r"^(?:file|sqlite):/+")
"""How an address begins that is a path."""


class Facts:
    """The entries of a run, each of which may be missing or of an unexpected kind.

    Args:
        entries: as in ``run.json``.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self.entries = entries

    @classmethod
    def of(cls, result: Any) -> Facts:
        """Read a ``RunResult``, a mapping, or the path of a ``run.json`` or of its folder.

        Raises:
            DataError: there is no such file, or it holds no JSON object.
        """
        if is_dataclass(result) and not isinstance(result, type):
            return cls(asdict(result))
        if isinstance(result, Mapping):
            return cls(result)
        path = Path(result)
        path = path / "run.json" if path.is_dir() else path
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: is not the record of a run: {error}") from None
        if not isinstance(entries, dict):
            raise DataError(f"{path}: is not the record of a run: it holds no keys and values")
        return cls(entries)

    def published(self) -> Facts:
        """The same without the folders of this machine, except in what the model has written."""
        names: dict[str, str] = {}  # of the recipe's paths: they may have spaces elsewhere, too
        recipe = _changed(self.entries.get("recipe"), lambda text: _whole_path(text, names))
        rest = _changed(self.entries, lambda text: _without_paths(text, names))
        written = {key: self.entries.get(key) for key in ("sample", "completions")}
        return Facts({**rest, "recipe": recipe, **written})

    def number(self, key: str) -> float | None:
        """A number that is set, even an infinite one; None for everything else."""
        return number(self.entries.get(key))

    def text(self, key: str) -> str:
        """Some text; empty when there is none."""
        value = self.entries.get(key)
        return "" if value is None else str(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Keys and values; empty when there are none."""
        value = self.entries.get(key)
        return value if isinstance(value, Mapping) else {}

    def rows(self, key: str) -> list[Any]:
        """A list; empty when there is none."""
        value = self.entries.get(key)
        return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []

    def history(self, key: str) -> list[tuple[float, float]]:
        """``(step, value)`` of the logged entries that have ``key``, in the order of the steps.

        A value that is not a number becomes NaN; of two entries for one step the later one counts.
        """
        found: dict[float, float] = {}
        for entry in self.rows("history"):
            step = number(entry.get("step")) if isinstance(entry, Mapping) else None
            if step is not None and math.isfinite(step) and entry.get(key) is not None:
                value = number(entry[key])
                found[step] = math.nan if value is None else value
        return sorted(found.items())

    def validations(self) -> Iterator[tuple[str, str]]:
        """``(key, name)`` of each validation's loss, or reward, in the history."""
        keys = {k: None for e in self.rows("history") if isinstance(e, Mapping) for k in e}
        for key in keys:
            if key.startswith("eval_") and key.endswith(self.figure):
                name = key.removeprefix("eval_").removesuffix(self.figure).strip("_")
                yield key, f"validation {name}".strip()

    @property
    def figure(self) -> str:
        """What validations judge the run by: ``loss`` or ``reward``."""
        return "reward" if self.text("figure") == "reward" else "loss"

    # --- what a run is called --------------------------------------------------------------------

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Every key with the value that was used."""
        return self.mapping("recipe")

    @property
    def base(self) -> str:
        """The short name of the base model."""
        name = str(self.recipe.get("base_model") or "").rstrip("/")
        return PurePath(name.removeprefix("package:")).name or "a model"

    @property
    def method(self) -> str:
        """How it was trained, e.g. ``LoRA rank 16``."""
        adapter = self.recipe.get("adapter")
        name = METHODS.get(adapter, str(adapter))
        rank = self.recipe.get("lora_r")
        return f"{name} rank {rank}" if adapter and rank else name

    @property
    def task(self) -> str | None:
        """The method of preferences or rewards, one of ``TASKS``; None: supervised training."""
        for key in ("reward_model", "process_reward_model"):
            if self.recipe.get(key):
                return key.replace("_", "-")
        named = self.recipe.get("rl")
        return str(named) if named in TASKS else None

    @property
    def folder(self) -> str:
        """Where the results are; empty when that is not known."""
        return self.text("output_dir")


def number(value: Any) -> float | None:
    """A number, also one that JSON had to write as text (``nan``, ``inf``); else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Data with ``change`` made to every text in it."""
    if isinstance(value, Mapping):
        return {key: _changed(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def _whole_path(value: str, names: dict[str, str]) -> str:
    """A value of the recipe, cut down to its last part if all of it is an absolute path.

    What only begins like one is a prompt (``/no_think``), or a token.
    """
    path = _LOCAL.sub("/", value)
    is_path = PurePath(path).is_absolute() and len(PurePath(path).parts) > 2 and "\n" not in path
    if not is_path or (" " in path and not Path(path).exists()):
        return value
    return names.setdefault(path, PurePath(path).name)


def _without_paths(text: str, names: Mapping[str, str]) -> str:
    """A message whose absolute paths are cut down likewise."""
    text = _LOCAL.sub("/", text)
    for path in sorted(names, key=len, reverse=True):
        below = re.escape(path) + r"(?:/[^\s/'\",;:()<>]+)*"
        text = re.sub(below, lambda found: PurePath(found[0]).name, text)
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[0])[-1], text)
