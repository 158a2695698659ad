"""Reads the rows as a run would, and finds their format; names the first ones that do not fit."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import DataError
from ..data.formats.conversation import ROLES
from ..data.formats.fields import IMAGE_FIELDS, kind
from ..data.readers import sources
from ..data.readers.bad_rows import BadRows, require_readable
from ..data.readers.files import Row
from ..recipe.recipe import Dataset

# --- shapes of rows ------------------------------------------------------------------------------


_LISTS = ("messages", "conversations", "conversation")
_ROLES, _CONTENTS = ("role", "from", "speaker", "author"), ("content", "value", "text", "message")
_PROMPTS = ("instruction", "question", "query", "prompt", "INSTRUCTION", "input")
_ANSWERED = ("output", "response", "answer", "completion", "RESPONSE", "target")
_SYSTEMS = ("system", "system_prompt")
_TEXTS = ("text", "content", "document")

TOKENIZED, _TEXT_KIND = "already tokenized", "text (completion)"
"""Kinds of rows that are treated apart."""


@dataclass(frozen=True)
class Shape:
    """The type of one row.

    Attributes:
        kind: in words, e.g. ``chat``; rows of several kinds are not one dataset.
        keys: what the entry of ``datasets`` must have so that it is read so.
        pair: of two answers, the same for ``rl: dpo``; then ``keys`` are those that read the better
            one alone. None: it is no pair.
    """

    kind: str
    keys: tuple[tuple[str, Any], ...] = field(default=())
    pair: tuple[tuple[str, Any], ...] | None = None

    def entry(self) -> dict[str, Any]:
        """The keys of the one answer, as a mapping."""
        return _mapping(self.keys)

    def trained(self) -> dict[str, Any]:
        """The keys with which it is trained: both answers of a pair."""
        return self.entry() if self.pair is None else _mapping(self.pair)


def _mapping(keys: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return {key: dict(v) if isinstance(v, tuple) else v for key, v in keys}


def shape_of(row: Any, where: str) -> Shape:
    """The shape of a row; raises a DataError if it has none of the fields that tell it."""
    require_readable(row)
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: must be an object with named fields, such as messages or text")
    for test in (_preference, _tokenized, _chat, _segments, _prompt, _instruction, _text):
        shape = test(row)
        if shape is not None:
            return shape
    has = ", ".join(map(repr, row)) or "no fields"
    raise DataError(
        f"{where}: no known format has these fields ({has}). Known are: messages; instruction and "
        "output; prompt and completion; text; segments; input_ids and labels; prompt, chosen and "
        "rejected. Rename the fields, or spell the format out in datasets: type, with "
        "field_instruction, field_output and format"
    )


def _preference(row: Mapping[str, Any]) -> Shape | None:
    if not {"chosen", "rejected"} <= set(row):
        return None
    prompt = next((name for name in _PROMPTS if name in row), None)
    kind = "preference pairs"
    names = _names("chosen", row["chosen"])
    chats = (("type", "chat_template.default"), *(n for n in names if n[0] != "field_messages"))
    if prompt is None and isinstance(row["chosen"], list):  # the whole conversation, twice
        return Shape(kind, (("type", "chat_template"), *names), chats)
    if prompt is None:
        return Shape(kind, (("type", "completion"), ("field", "chosen")), ())
    field = () if prompt == "prompt" else (("field_messages", prompt),)
    if isinstance(row["chosen"], list) and not isinstance(row[prompt], list):
        # TRL's older form: the prompt is in it, too
        return Shape(kind, (("type", "chat_template"), *names), (*chats, *field))
    keys = (("type", "prompt_completion"), ("field_human", prompt), ("field_model", "chosen"))
    texts = isinstance(row[prompt], str) and isinstance(row["chosen"], str)
    return Shape(kind, keys, field if texts else (*chats, *field))


def _tokenized(row: Mapping[str, Any]) -> Shape | None:
    return Shape(TOKENIZED) if "input_ids" in row else None


def _chat(row: Mapping[str, Any]) -> Shape | None:
    name = next((name for name in _LISTS if name in row), None)
    name = name or next((n for n, v in row.items() if _is_chat(v)), None)
    if name is None:
        return None
    return Shape("chat", (("type", "chat_template"), *_names(name, row[name])))


def _is_chat(value: Any) -> bool:
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    first = value[0]
    return any(r in first for r in _ROLES) and any(c in first for c in _CONTENTS)


def _names(name: str, messages: Any) -> list[tuple[str, Any]]:
    keys: list[tuple[str, Any]] = [] if name in _LISTS else [("field_messages", name)]
    first = messages[0] if isinstance(messages, list) and messages else {}
    if not isinstance(first, Mapping):
        return keys
    role = next((r for r in _ROLES if r in first), "role")
    content = next((c for c in _CONTENTS if c in first), "content")
    if (role, content) not in (("role", "content"), ("from", "value")):
        keys.append(("message_property_mappings", (("role", role), ("content", content))))
    return keys


def _segments(row: Mapping[str, Any]) -> Shape | None:
    return Shape("segments", (("type", "input_output"),)) if "segments" in row else None


def _prompt(row: Mapping[str, Any]) -> Shape | None:
    if {"prompt", "completion"} <= set(row):
        return Shape("prompt and completion", (("type", "prompt_completion"),))
    return None


def _instruction(row: Mapping[str, Any]) -> Shape | None:
    prompt = next((name for name in _PROMPTS if name in row), None)
    answered = next((name for name in _ANSWERED if name in row), None)
    if prompt is None or answered is None:
        return None
    system = next((name for name in _SYSTEMS if name in row), None)
    keys = [("type", "alpaca_w_system.load_instruct" if system else "alpaca")]
    names = {"instruction": prompt, "output": answered, "system": system or "system"}
    keys += [(f"field_{usual}", used) for usual, used in names.items() if usual != used]
    return Shape("instruction and answer (alpaca)", tuple(keys))


def _text(row: Mapping[str, Any]) -> Shape | None:
    name = next((name for name in _TEXTS if isinstance(row.get(name), str)), None)
    if name is None:
        return None
    keys = (("type", "completion"), *([] if name == "text" else [("field", name)]))
    return Shape(_TEXT_KIND, keys)


SAMPLE = 1000
"""Rows whose tokens are counted, drawn from all that are read."""

_MOST, _MOST_OF_HUB = 100_000, 1000
"""Rows that are read of a file, and of a dataset on the hub."""

_KNOWN = {name for names in ROLES.values() for name in names}
_THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thought")
_MARKS = ("<think>", "<reasoning>", "<|begin_of_thought|>")


@dataclass
class ChatFeatures:
    """Features of the chats of the rows.

    Attributes:
        roles: names of roles, with how many messages have each.
        first: the roles of the first messages that are not the system's.
        last: the roles of the last messages.
        tools: rows with a list of tools, or calls of them.
        marks: answers with the reasoning in marks such as ``<think>``.
        images: rows with images, in their messages or in a field.
    """

    roles: Counter[str] = field(default_factory=Counter)
    first: Counter[str] = field(default_factory=Counter)
    last: Counter[str] = field(default_factory=Counter)
    tools: int = 0
    thinking: str | None = None
    marks: int = 0
    images: int = 0

    def add(self, messages: Any, row: Mapping[str, Any]) -> None:
        """Add one chat of a row."""
        turns = (
            [m for m in messages if isinstance(m, Mapping)] if isinstance(messages, list) else []
        )
        names = [str(_of(m, "role", "from", "speaker", "author")) for m in turns]
        self.roles.update(names)
        others = [name for name in names if name != "system"]
        if others:
            self.first[others[0]] += 1
            self.last[others[-1]] += 1
        self.tools += bool(row.get("tools")) or any(m.get("tool_calls") for m in turns)
        parts = [part for m in turns for part in _parts(m)]
        named = any(row.get(name) for name in IMAGE_FIELDS)
        self.images += named or any(str(p.get("type")).startswith("image") for p in parts)
        for message in turns:
            self.thinking = self.thinking or next((t for t in _THOUGHTS if message.get(t)), None)
            text = _of(message, "content", "value", "text", "message")
            self.marks += isinstance(text, str) and any(mark in text for mark in _MARKS)

    def mapping(self) -> dict[str, list[str]] | None:
        """Roles for names that no reader knows, guessed by who opens and who closes; or None."""
        unknown = [name for name in self.roles if name not in _KNOWN]
        if not unknown or not self.last:
            return None
        answers, asks = self.last.most_common(1)[0][0], self.first.most_common(1)[0][0]
        if answers == asks:
            return None
        guessed = {answers: "assistant", asks: "user"}
        result: dict[str, list[str]] = {role: list(names) for role, names in ROLES.items()}
        for name in unknown:
            if name in guessed:
                result[guessed[name]].append(name)
        return result


@dataclass(frozen=True)
class RowsRead:
    """The rows that were read.

    Attributes:
        dataset: with an absolute path, as a recipe's entry.
        complete: whether these are all.
    """

    dataset: Dataset
    shape: Shape
    count: int
    complete: bool
    sample: list[Row]
    features: ChatFeatures


@dataclass(frozen=True)
class AllRows:
    """The rows of all datasets of a recipe, which are trained together."""

    each: tuple[RowsRead, ...]

    @property
    def count(self) -> int:
        """The number of rows that were read."""
        return sum(rows.count for rows in self.each)

    @property
    def complete(self) -> bool:
        """Whether these are all."""
        return all(rows.complete for rows in self.each)

    @property
    def are_pairs(self) -> bool:
        """Whether they are pairs of answers."""
        return self.each[0].shape.pair is not None  # those of all, or of none

    @property
    def are_texts(self) -> bool:
        """Whether all of them are texts, which are cut where they are long."""
        return all(rows.shape.kind == _TEXT_KIND for rows in self.each)

    @property
    def have_images(self) -> bool:
        """Whether some have images."""
        return any(rows.features.images for rows in self.each)


def look_at(datasets: Sequence[Dataset]) -> AllRows:
    """Read the rows of datasets as ``look`` does; the samples are in proportion.

    Raises a DataError also if one recipe cannot train them together.
    """
    each = [look(dataset) for dataset in datasets]
    apart = [rows for rows in each if _trained_as(rows) != _trained_as(each[0])]
    if apart:
        ours, first = apart[0], each[0]
        raise DataError(
            f"{ours.dataset.path}: these rows are {ours.shape.kind}, and those of "
            f"{first.dataset.path} are {first.shape.kind}, which one recipe does not train "
            "together: write a recipe for each"
        )
    total = sum(rows.count for rows in each)
    draw = random.Random(0)
    for i, rows in enumerate(each):
        size = min(len(rows.sample), math.ceil(SAMPLE * rows.count / total))
        chosen = sorted(draw.sample(range(len(rows.sample)), size))  # the first fault is named
        each[i] = replace(rows, sample=[rows.sample[k] for k in chosen])
    return AllRows(tuple(each))


def _trained_as(rows: RowsRead) -> str:
    alone = rows.shape.kind == TOKENIZED or rows.shape.pair is not None
    return rows.shape.kind if alone else "texts and chats"


def _of(message: Mapping[str, Any], *names: str) -> Any:
    return next((message[name] for name in names if message.get(name) is not None), "")


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = _of(message, "content", "value", "text", "message")
    return [p for p in content if isinstance(p, Mapping)] if isinstance(content, list) else []


def look(dataset: Dataset) -> RowsRead:
    """Read the rows of a dataset, as many as are needed to know them.

    ``dataset`` has an absolute path, or the id of one on the hub, which is streamed. Raises a
    DataError, with file and line, if there are no rows, or one cannot be read, has no known format,
    or another one than the first.
    """
    source = sources.find(dataset, "DATA", streaming=True)
    limit = _MOST if source.files or hasattr(source.table, "__len__") else _MOST_OF_HUB
    draw, sample, features = random.Random(0), list[Row](), ChatFeatures()
    first: tuple[str, Any, Shape] | None = None
    count, bad = 0, BadRows()
    rows = replace(source, limit=limit + 1).rows_and_faults()
    for number, (where, row) in enumerate(rows):
        if number == limit or bad.enough:
            bad.rest = "later ones were not looked at"
            break
        try:
            shape = shape_of(row, where)
            if first is not None and shape != first[2]:
                raise DataError(_mixed(where, row, shape, *first))
        except DataError as error:
            bad.add(where, str(error))
            continue
        first = first or (where, row, shape)
        if shape.kind in ("chat", "preference pairs"):
            features.add(row.get(_field(row, shape)), row)
        count += 1
        if len(sample) < SAMPLE:
            sample.append((where, row))
        elif (place := draw.randrange(count)) < SAMPLE:
            sample[place] = where, row
    else:
        limit += 1
    bad.raise_any()
    if first is None:
        raise DataError(f"{dataset.path}: the dataset is empty")
    return RowsRead(dataset, first[2], count, count < limit, sample, features)


def _field(row: Mapping[str, Any], shape: Shape) -> str:
    entry = shape.entry()
    fields = (entry.get("field_messages"), "messages", "conversations", "conversation")
    return next((name for name in fields if name and name in row), "messages")


def _mixed(where: str, row: Any, shape: Shape, place: str, before: Any, first: Shape) -> str:
    """Why a row does not go with the first one, ``before``, at ``place``."""
    has, had = _field_names(row, shape), _field_names(before, first)
    if shape.kind == first.kind:
        what, todo = "which means the same by other names", "Rename them"
        if set(row) < set(before) or set(before) < set(row):
            more = ", ".join(sorted(set(row) ^ set(before)))
            what, todo = f"so one of them lacks {more}", "Give all rows the same fields"
        elif others := [
            f"{name} is {kind(row[name])} here and {kind(before[name])} there"
            for name in row
            if name in before and kind(row[name]) != kind(before[name])
        ]:
            what, todo = f"but {', '.join(others)}", "Write them alike"
        return (
            f"{where}: this row has {has}, and the first one ({place}) has {had}, {what}. {todo}, "
            "or put such rows into a file of their own"
        )
    return (
        f"{where}: this row is {shape.kind} (it has {has}), and the first one ({place}) is "
        f"{first.kind} ({had}). One dataset has one format: put each into a file of its own, and "
        "list both under datasets"
    )


def _field_names(row: Mapping[str, Any], shape: Shape) -> str:
    """The fields of a row; of a chat, those of its first message, too."""
    names = ", ".join(map(str, row))
    turns = row.get(_field(row, shape))
    inner = turns[0] if isinstance(turns, list) and turns else None
    return f"{names} (of {', '.join(map(str, inner))})" if isinstance(inner, Mapping) else names
