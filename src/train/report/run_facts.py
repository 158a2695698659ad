"""The entries of ``run.json``, read with tolerance: a run that ended early lacks half of it."""

from __future__ import annotations

import contextlib
import json
import keyword
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from ...errors import DataError, RecipeError
from ..model.files import cached, read_object
from ..model.tokenizer import ChatPrompt
from ..recipe import methods_table
from ..recipe.locate import ModelSource, locate
from ..recipe.preferences import HEADS, LANGUAGE_HEAD, Head
from .format import loss_ends

METHODS = {"lora": "LoRA", "qlora": "QLoRA", None: "full fine-tuning"}

IMAGE_SIZES = ("image_size", "image_max_pixels", "image_min_pixels")
"""Keys that resize images before the processor has them."""

TASKS = {
    (method.head.key or name).replace("_", "-"): method.title
    for name, method in methods_table.METHODS.items()
}
"""Methods of preferences and rewards, by their tags in model cards."""

_PATH = re.compile(
    r"(?<=['\"])/[^'\"\n]+(?=['\"])|(?<![\w:/.<~-])(?:/[^\s/'\",;:()<>]+){2,}"
    r"|\b[A-Za-z]:(?:\\[^\s\\'\",;:()<>]+)+"
)
"""An absolute path in a text, on its own or in quotes."""
_LOCAL = re.compile(r"^(?:file|sqlite):/+")
"""The beginning of an address that is a path."""


class Facts:
    """The entries of a run, as in ``run.json``; each may be missing or of an unexpected kind."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self.entries = entries

    @classmethod
    def of(cls, result: Any) -> Facts:
        """Read a ``RunResult``, a mapping, or the path of a ``run.json`` or of its folder.

        Raises a DataError if there is no such file, or it holds no JSON object.
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
        kept = ("sample", "sample_image", "completions")  # what models wrote, and encoded bytes
        generated = {key: self.entries.get(key) for key in kept}
        return Facts({**rest, "recipe": recipe, **generated})

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
        by_step: dict[float, float] = {}
        for entry in self.rows("history"):
            step = number(entry.get("step")) if isinstance(entry, Mapping) else None
            if step is not None and math.isfinite(step) and entry.get(key) is not None:
                value = number(entry[key])
                by_step[step] = math.nan if value is None else value
        return sorted(by_step.items())

    def training_loss(self) -> tuple[float, float, str] | None:
        """The training loss at the beginning and at the end, and what these are; None: unknown."""
        return loss_ends(loss for _, loss in self.history("loss"))

    def validations(self) -> Iterator[tuple[str, str]]:
        """``(key, name)`` of each validation's loss, or reward, in the history."""
        keys = {k: None for e in self.rows("history") if isinstance(e, Mapping) for k in e}
        for key in keys:
            if key.startswith("eval_") and key.endswith(self.figure):
                name = key.removeprefix("eval_").removesuffix(self.figure).strip("_")
                yield key, f"validation {name}".strip()

    @property
    def figure(self) -> str:
        """The figure by which validations judge the run: ``loss`` or ``reward``."""
        return "reward" if self.text("figure") == "reward" else "loss"

    @property
    def images(self) -> int:
        """How many images the rows have."""
        return int(number(self.mapping("data").get("images")) or 0)

    # --- names -----------------------------------------------------------------------------------

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
        """The method of training, e.g. ``LoRA rank 16``."""
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
        method = self.recipe.get("rl")
        return str(method) if method in TASKS else None

    @property
    def stops(self) -> list[int]:
        """The tokens that end an answer, where the base's generation settings lack one."""
        return [token for token in self.rows("stop_tokens") if type(token) is int]

    @property
    def folder(self) -> str:
        """The folder of the results; empty when it is not known."""
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
    if isinstance(value, Mapping):
        return {key: _changed(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def _whole_path(value: str, names: dict[str, str]) -> str:
    """The last part of a value that is an absolute path; others may be prompts (``/no_think``)."""
    path = _LOCAL.sub("/", value)
    is_path = PurePath(path).is_absolute() and len(PurePath(path).parts) > 2 and "\n" not in path
    if not is_path or (" " in path and not Path(path).exists()):
        return value
    return names.setdefault(path, PurePath(path).name)


def _without_paths(text: str, names: Mapping[str, str]) -> str:
    """A message with its absolute paths cut to their last parts."""
    text = _LOCAL.sub("/", text)
    for path in sorted(names, key=len, reverse=True):
        below = re.escape(path) + r"(?:/[^\s/'\",;:()<>]+)*"
        text = re.sub(below, lambda match: PurePath(match[0]).name, text)
    return _PATH.sub(lambda match: re.split(r"[/\\]", match[0])[-1], text)


# --- commands and code to copy, for the report and the card --------------------------------------


_LANGUAGE = """\
fusewright generate . "Your question"  # one answer
fusewright chat .                      # a conversation
"""
_ILLUSTRATED = """\
fusewright generate . "Your question" --image image.png  # one answer
fusewright chat .                      # a conversation; /image PATH shows an image
"""
_ALL = """\
fusewright eval .                      # loss on the validation rows
fusewright merge .                     # one model without adapters"""


def commands(recipe: Mapping[str, Any], images: bool = False) -> str:
    """Shell commands for the results in the current folder; ``images``: they are read, too."""
    if _head(recipe).classifies:
        return _ALL
    return (_ILLUSTRATED if images else _LANGUAGE) + _ALL


def _head(recipe: Mapping[str, Any]) -> Head:
    trained = (head for head in HEADS.values() if head.key and recipe.get(head.key))
    return next(trained, LANGUAGE_HEAD)


def snippet(
    recipe: Mapping[str, Any], folder: str, images: bool = False, stops: Sequence[int] = ()
) -> str | None:
    """Python that loads the result and uses it without this package.

    A language model answers a question, with ``images`` about one; a reward model judges an answer.
    ``folder`` is where the results are, or their id on the hub. An adapter's base does not know the
    ``stops``; a whole model has them in its settings. None for an adapter whose base model is not
    here.
    """
    base = str(recipe.get("base_model") or "")
    head = _head(recipe)
    if not head.classifies:
        head = replace(head, auto=_auto_class(recipe, base))
    labels = f", num_labels={head.labels}" if head.labels else ""
    adapter = bool(recipe.get("adapter"))
    readers = [*["AutoProcessor"] * images, *["AutoTokenizer"] * (adapter or not images)]
    plain = f"from transformers import {', '.join([head.auto, *readers])}"
    imports, loading = plain, f"model = {head.auto}.from_pretrained(folder)"
    if adapter:
        try:
            source = locate(base, [Path.cwd()])
        except RecipeError:
            return None
        multimodal = not head.classifies and head.auto != LANGUAGE_HEAD.auto
        compressed = _quant_method(recipe, base) == "compressed-tensors"
        name = head.auto.replace("AutoModel", "AutoPeftModel")
        imports = f"from peft import {name}\nfrom transformers import {', '.join(readers)}"
        loading = f"model = {name}.from_pretrained(folder{labels})"
        if source.gguf_file or base.startswith("package:") or multimodal or compressed:
            find = "from importlib.util import find_spec\n\n" * base.startswith("package:")
            imports = f"{find}from peft import PeftModel\n{plain}"
            imports += ", CompressedTensorsConfig" * compressed
            call = _load_base(base, source, head, compressed)
            loading = f"base = {call}\nmodel = PeftModel.from_pretrained(base, folder)"
    loaded = f"""{imports}

folder = {json.dumps(folder, ensure_ascii=False)}
{loading}
{_PROCESSOR[adapter] if images else _TOKENIZER}
"""
    if head.classifies:
        return loaded + _judging(recipe)
    stop = f", eos_token_id={list(stops)}" if adapter and stops else ""
    return loaded + (_looking if images else _answering)(recipe, stop)


_TOKENIZER = "tokenizer = AutoTokenizer.from_pretrained(folder)"
_PROCESSOR = {
    False: "processor = AutoProcessor.from_pretrained(folder)",
    True: """\
processor = AutoProcessor.from_pretrained(model.get_base_model().name_or_path)
processor.tokenizer = AutoTokenizer.from_pretrained(folder)
processor.chat_template = processor.tokenizer.chat_template""",
}
"""How images are prepared; by whether the results are an adapter, which leaves that to its base."""


def _auto_class(recipe: Mapping[str, Any], base: str) -> str:
    """The Auto class that a base model is loaded with, by its configuration if that is here."""
    from ..model.multimodal import auto_class  # imports PyTorch

    config = _config(recipe, base)
    return LANGUAGE_HEAD.auto if config is None else auto_class(config)


def _quant_method(recipe: Mapping[str, Any], base: str) -> str | None:
    """How the files of a base model store its weights in few bits, where they do."""
    saved = (_config(recipe, base) or {}).get("quantization_config")
    return saved.get("quant_method") if isinstance(saved, dict) else None


def _config(recipe: Mapping[str, Any], base: str) -> dict[str, Any] | None:
    """The configuration of a base model, if that is here."""
    with contextlib.suppress(RecipeError, ValueError):
        source = locate(base, [Path.cwd()])
        folder = Path(source.name)
        if not folder.is_dir():
            folder = cached(base, recipe.get("revision_of_model")) or folder
        if source.gguf_file is None and (folder / "config.json").is_file():
            return read_object(folder / "config.json")
    return None


def _judging(recipe: Mapping[str, Any]) -> str:
    asking = ChatPrompt.of(recipe)
    answer = {"role": "assistant", "content": "An answer"}
    conversation = json.dumps([*asking.question("Your question"), answer], ensure_ascii=False)
    return f"""inputs = tokenizer.apply_chat_template(
    {conversation},
    return_tensors="pt", return_dict=True,{_more(asking.variables)}
)
print(model(**inputs).logits)"""


def _answering(recipe: Mapping[str, Any], stop: str) -> str:
    asking = ChatPrompt.of(recipe)
    conversation = json.dumps(asking.question("Your question"), ensure_ascii=False)
    return f"""inputs = tokenizer.apply_chat_template(
    {conversation},
    add_generation_prompt=True, return_tensors="pt", return_dict=True,{_more(asking.variables)}
)
answer = model.generate(**inputs, max_new_tokens=200{stop})[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def _looking(recipe: Mapping[str, Any], stop: str) -> str:
    """Ask about an image, with contents in parts, as processors expect them."""
    asking = ChatPrompt.of(recipe)
    messages = asking.question("Your question")
    for message in messages:
        message["content"] = [{"type": "text", "text": message["content"]}]
    messages[-1]["content"].insert(0, {"type": "image", "path": "image.png"})
    lines = ",\n    ".join(json.dumps(message, ensure_ascii=False) for message in messages)
    resized = [f"{k}: {recipe[k]}" for k in IMAGE_SIZES if recipe.get(k)]
    note = f"  # the run resized its images before: {', '.join(resized)}" if resized else ""
    given = recipe.get("processor_kwargs")
    given = f"\n    processor_kwargs={{'images_kwargs': {given!r}}}," if given else ""
    return f"""messages = [{note}
    {lines},
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True,\
{given}{_more(asking.variables)}
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=200{stop})[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))"""


def _load_base(base: str, source: ModelSource, head: Head, compressed: bool) -> str:
    """The call that loads a base model which only ``locate`` can find, or that is compressed."""
    where = json.dumps(Path(source.name).name, ensure_ascii=False) + ",  # its folder"
    if not Path(source.name).exists():
        where = json.dumps(base, ensure_ascii=False) + ","
    if base.startswith("package:"):
        package, *inner = base.removeprefix("package:").split("/")
        below = "".join(f' + "/{part}"' for part in inner if not part.endswith(".gguf"))
        where = f"find_spec({package!r}).submodule_search_locations[0]{below},"
    file = f"\n    gguf_file={json.dumps(source.gguf_file)}," if source.gguf_file else ""
    labels = f"\n    num_labels={head.labels}," if head.labels else ""
    unpacked = "\n    quantization_config=CompressedTensorsConfig(dequantize=True)," * compressed
    return f"{head.auto}.from_pretrained(\n    {where}{file}{labels}{unpacked}\n)"


def _more(variables: Mapping[str, Any]) -> str:
    """Further arguments of a call, on a separate line; empty when there are none."""
    if not variables:
        return ""
    if all(name.isidentifier() and not keyword.iskeyword(name) for name in variables):
        return "\n    " + " ".join(f"{name}={value!r}," for name, value in variables.items())
    return f"\n    **{dict(variables)!r},"
