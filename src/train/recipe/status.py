"""What each key of a recipe does: honoured, subsumed, not applicable, or not yet available.

The status of a key is declared with the key (``keys/``); here it is looked up for the values of one
recipe. A value that asks for nothing (unset, false, the default) is honoured whatever the key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..chat_templates import TOKENIZER_TEMPLATES
from ..consent import CODE_SWITCH
from .conflicts import groups_in, without_effect
from .deepspeed_config import uses_built_in
from .keys.base import Keys, Status, UnreadKeys, extra_of, is_default, nested
from .keys.preferences import OF_METHODS, ONLY, has_method
from .problems import Loc
from .recipe import Recipe
from .secret_values import hide

_ORDER: tuple[Status, ...] = ("honoured", "subsumed", "not applicable", "not yet available")


_TOKENIZER_TEMPLATE = "the tokenizer's own template, which is of that kind, is taken"
_BUILT_IN = "there is no such file here: fusewright's own configuration of that name is used"


@dataclass(frozen=True)
class Entry:
    """One written key.

    Attributes:
        loc: where it is, e.g. ``("datasets", 0, "path")``.
        note: by what, why, or what to do instead.
        asks: whether the value asks for something.
    """

    loc: Loc
    value: Any
    status: Status
    note: str
    asks: bool

    @property
    def key(self) -> str:
        """The dotted name."""
        return ".".join(map(str, self.loc))


def entries(values: Mapping[str, Any], recipe: Recipe | None = None) -> list[Entry]:
    """The status of every key of a checked recipe as written, nested ones included.

    ``recipe`` has its paths resolved; without it, replacements of missing files are not reported.
    """
    idle = dict(without_effect(values))
    result = []
    for entry in _every(values):
        if entry.key == "deepspeed" and recipe is not None and uses_built_in(recipe.deepspeed):
            entry = Entry(entry.loc, entry.value, entry.status, _BUILT_IN, entry.asks)
        if entry.loc[-1] == "chat_template" and entry.value in TOKENIZER_TEMPLATES:
            entry = Entry(entry.loc, entry.value, entry.status, _TOKENIZER_TEMPLATE, entry.asks)
        if entry.key in idle and entry.status in ("honoured", "subsumed") and entry.asks:
            entry = Entry(entry.loc, entry.value, "not applicable", idle[entry.key], True)
        result.append(entry)
    return result


def refusals(values: Mapping[str, Any]) -> list[tuple[Loc, str]]:
    """What training must refuse, because the run would not be what was asked for.

    ``values`` is a recipe as written, which may have other problems.
    """
    return [
        (
            entry.loc,
            f"{_short(without_secrets(entry))} is not yet available: {entry.note}",
        )
        for entry in _every(values)
        if entry.status == "not yet available"
    ]


def without_secrets(entry: Entry) -> Any:
    """The value of a key, for display."""
    key = str(entry.loc[-1])
    return hide({key: entry.value})[key]


def messages(recipe: Recipe) -> list[str]:
    """Short lines about keys that ask for something that is done otherwise, or not at all."""
    requests = [e for e in entries(recipe.model_dump(exclude_unset=True)) if e.asks]
    lines = {
        "subsumed": "fusewright does this itself",
        "not applicable": "without effect here",
    }
    lines_of_keys = []
    for status, text in lines.items():
        keys = [entry.key for entry in requests if entry.status == status]
        if keys:
            lines_of_keys.append(f"{text}: {', '.join(keys)} (train --dry-run says why)")
    if uses_built_in(recipe.deepspeed):
        lines_of_keys.append(f"deepspeed: {recipe.deepspeed}: {_BUILT_IN}")
    if recipe.trust_remote_code and not recipe.consent.trust_remote_code:
        lines_of_keys.append(
            f"trust_remote_code: without effect, because {CODE_SWITCH} is not on the command "
            "line: transformers' own classes are used"
        )
    return lines_of_keys


def _every(values: Mapping[str, Any]) -> Iterator[Entry]:
    """The status of every key; keys of preference methods do nothing without a method."""
    read = has_method(values)
    for entry in _walk(Recipe, values, ()):
        if not read and entry.loc[0] in OF_METHODS and entry.value is not None:
            note = entry.note if entry.status == "not applicable" else ONLY
            entry = replace(entry, status="not applicable", note=note)
        yield entry


def _walk(model: type[Keys], values: Mapping[str, Any], loc: Loc) -> Iterator[Entry]:
    for name, value in values.items():
        here, field = (*loc, name), model.model_fields.get(name)
        if field is None:  # of a recipe that has been refused
            continue
        inner = nested(field.annotation)
        whole = inner is None or issubclass(inner, UnreadKeys)
        groups = [] if whole else list(groups_in(value))
        for place, group in groups:
            assert inner is not None
            yield from _walk(inner, group, (*here, *place))
        if not groups:
            yield _entry(model, name, value, here)


def _entry(model: type[Keys], name: str, value: Any, loc: Loc) -> Entry:
    field = model.model_fields[name]
    extra = extra_of(field)
    if value is None:
        return Entry(loc, value, "honoured", "", False)
    asks = value not in (False, "", [], {}) and not is_default(field, value)
    status, note = extra.get("status", "honoured"), extra.get("note", "")
    special = {str(v["value"]): (v["status"], v["note"]) for v in extra.get("values", ())}
    items = value if isinstance(value, list) else [value]
    if special and items:
        status, note = max(
            (special.get(str(item), (status, note)) for item in items),
            key=lambda pair: _ORDER.index(pair[0]),
        )
    if status == "not yet available" and not asks:
        status, note = "honoured", "off"
    return Entry(loc, value, status, note, asks)


def _short(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
