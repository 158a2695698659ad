"""What all groups of keys are made of: number types that take no booleans, and a key's status."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, create_model
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, to_jsonable_python

Status = Literal["honoured", "subsumed", "not applicable", "not yet available"]
"""What a key does. A key without a status is unknown, and an error."""


def is_default(field: FieldInfo, value: Any) -> bool:
    """Whether ``value``, as a recipe or as JSON has it, is the default of ``field``."""
    if field.is_required():
        return False
    default = to_jsonable_python(field.get_default(call_default_factory=True, validated_data={}))
    value = to_jsonable_python(value)
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):  # Python, and so pydantic, takes True for 1
        raise ValueError("not a number")
    if isinstance(value, int) and abs(value) > _MOST:  # of a tensor's and a file's numbers
        raise PydanticCustomError("size", "a number that 64 bits can hold")
    return value


_MOST = 2**63 - 1


Int = Annotated[int, BeforeValidator(_no_bool)]
PositiveInt = Annotated[int, BeforeValidator(_no_bool), Field(gt=0)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
PositiveFloat = Annotated[Float, Field(gt=0)]


@dataclass
class _Unread:
    """One line of ``unread_keys.txt``."""

    after: str | None
    name: str
    type: str
    default: Any
    meaning: str
    extra: dict[str, Any]

    def annotation(self) -> Any:
        """What a value must be."""
        kind = _type(self.type)
        return kind | None if self.default is None and kind is not Any else kind


_TYPES: dict[str, Any] = {
    "true/false": bool, "text": str, "secret": SecretStr, "any value": Any,
    "whole number": Int, "positive whole number": PositiveInt,
    "number": Float, "positive number": PositiveFloat,
    "fraction": Annotated[Float, Field(ge=0, le=1)],
    "keys and values": dict[str, Any], "texts by name": dict[str, str],
    "plain values by name": dict[str, bool | int | float | str],
}  # fmt: skip


def _type(words: str) -> Any:
    if " or " in words:
        return functools.reduce(operator.or_, map(_type, words.split(" or ")))
    if words.startswith("one of "):
        names = words.removeprefix("one of ").split(", ")
        return Literal[tuple(int(name) if name.isdecimal() else name for name in names)]
    if words.startswith("list of "):
        return list[_type(words.removeprefix("list of "))]  # type: ignore[misc]  # 2026-11-29: a type by its name
    return _TYPES[words] if words in _TYPES else _group(words)


@functools.cache
def _group(name: str) -> type[UnreadKeys]:
    """The class of a group that nothing reads."""
    about = _unread_keys()[1][name]
    return create_model(name, __base__=UnreadKeys, __doc__=about, __module__=__name__)


@functools.cache
def _unread_keys() -> tuple[dict[str, list[_Unread]], dict[str, str]]:
    """The keys that nothing reads, by class, and the descriptions of groups with such keys."""
    rows: dict[str, list[_Unread]] = {}
    groups: dict[str, str] = {}
    text = Path(__file__).with_name("unread_keys.txt").read_text(encoding="utf-8")
    owner, after = "", None
    extra: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith("["):
            place, _, about = line[1:].partition("]")
            owner, _, last = place.partition(" after ")
            after = last or None
            if about:
                groups[owner] = about.strip()
        elif line.startswith("    "):
            cells = line.strip().split(" | ")
            names = cells[0].split()
            kind, _, default = cells[1].partition(" = ") if cells[1:] else ("any value", "", "")
            meaning = cells[2] if cells[2:] else "As in Axolotl. Unset: its default there."
            value = json.loads(default) if default else None
            rows.setdefault(owner, []).extend(
                _Unread(after, name, kind, value, meaning, extra) for name in names
            )
        elif line and not line.startswith("#"):
            status, _, note = line.partition(": ")
            extra = {"status": status, "note": note}
    return rows, groups


def _add_unread(model: type[Keys]) -> None:
    """Give a class its keys that nothing reads, each at its place among the others."""
    annotations = dict(model.__annotations__)
    known: dict[str | None, list[_Unread]] = {}  # by the key that they follow
    for row in _unread_keys()[0].get(model.__name__, ()):
        if row.name not in annotations:
            known.setdefault(row.after, []).append(row)
            extra = {**row.extra, "rules": KeyRules(resumable=True)}
            default = Field(row.default, description=row.meaning, json_schema_extra=extra)
            setattr(model, row.name, default)
    if lost := known.keys() - {None, *annotations}:
        raise ValueError(
            f"unread_keys.txt: {model.__name__} has no key {', '.join(map(str, lost))}"
        )
    for place in (None, *annotations) if known else ():
        if place is not None:  # to the end, so that its followers come behind it
            model.__annotations__[place] = model.__annotations__.pop(place)
        model.__annotations__ |= {row.name: row.annotation() for row in known.get(place, ())}


@dataclass(frozen=True)
class KeyRules:
    """How a key goes with others of its class; ``conflicts.py`` applies these.

    A condition is ``NAME`` (that key asks for something), ``NAME: VALUE``, or several of them with
    `` or `` between them. ``METHOD`` is the preference method that a recipe asks for. What is said
    may have ``{key}`` in it: the first of the names that the recipe has (of ``METHOD``, its name).

    Attributes:
        excludes: conditions that must not hold together with the key, each with what is said: a
            sequence says ``set this or KEY, not both``.
        needs: conditions that must hold together with it; a sequence says ``needs CONDITION``.
        one_of: keys that exclude each other, and this one: the second that is set is refused.
        because: the end of what is said then.
        read_with: conditions without which nothing reads the key; a sequence says
            ``only CONDITION reads it``.
        unread_with: conditions under which nothing reads it, each with the reason.
        methods: the preference methods that read it; None: this does not depend on them.
        more_than: a number asks for something only above this.
        if_written: any value asks for something, 0 and an empty one too.
        resumable: a run may be resumed with another value, for what is trained does not depend on
            it (rows, for one, are compared by content). Of a group's keys, the group says it.
    """

    excludes: Mapping[str, str] | Sequence[str] = ()
    needs: Mapping[str, str] | Sequence[str] = ()
    one_of: Sequence[str] = ()
    because: str = ""
    read_with: Mapping[str, str] | Sequence[str] = ()
    unread_with: Mapping[str, str] = dataclasses.field(default_factory=dict)
    methods: Sequence[str] | None = None
    more_than: int | None = None
    if_written: bool = False
    resumable: bool = False


class Keys(BaseModel):
    """A group of keys. Attributes cannot be changed, and no other keys are taken."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    older_prefix: ClassVar[str] = ""
    """What the older names of all its keys begin with, here and outside of the group."""

    resumable: ClassVar[bool] = False
    """Whether all its keys are ``KeyRules.resumable``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _add_unread(cls)  # before pydantic collects the fields


class UnreadKeys(Keys):
    """A group of keys of Axolotl that nothing reads: it has one status as a whole."""

    model_config = ConfigDict(use_attribute_docstrings=False)  # there is no source to look for


Reasons = Mapping[Any, tuple[Status, str]]
"""Values whose status is not the key's own, each with the status and the reason."""


def key(
    default: Any = None,
    *,
    values: Reasons | None = None,
    aliases: Sequence[str] = (),
    **rules_and_limits: Any,
) -> Any:
    """A key that is honoured. One without any of these arguments needs no ``key()``.

    Args:
        default: what it is when unset.
        values: those of its values (or of the items of a list) that have another status.
        aliases: older names of the same key.
        rules_and_limits: how it goes with other keys, by the names in ``KeyRules``; and pydantic's
            limits, e.g. ``gt=0``.
    """
    return _field("honoured", "", default, values, aliases, rules_and_limits)


def subsumed(by: str, default: Any = None, *, values: Reasons | None = None, **rest: Any) -> Any:
    """A key whose effect one has anyway, ``by`` something else."""
    return _field("subsumed", by, default, values, (), rest)


def not_applicable(
    why: str, default: Any = None, *, aliases: Sequence[str] = (), **rest: Any
) -> Any:
    """A key that cannot change the run here; ``why`` says the reason."""
    return _field("not applicable", why, default, None, aliases, rest)


def not_yet(
    instead: str, default: Any = None, *, values: Reasons | None = None, **rest: Any
) -> Any:
    """A key that would change the run and cannot yet; ``instead`` says what to do."""
    return _field("not yet available", instead, default, values, (), rest)


METHOD = "preference method"
"""In a condition: any method that trains on preferences or rewards."""

VALIDATION = {
    "val_set_size or test_datasets": "there are no rows to validate on: val_set_size is 0"
}
"""Without these, nothing reads the keys of validation."""

_RULES = frozenset(rule.name for rule in fields(KeyRules))


def _field(
    status: Status,
    note: str,
    default: Any,
    values: Reasons | None,
    aliases: Sequence[str],
    rules_and_limits: Mapping[str, Any],
) -> Any:
    """What the JSON schema says about a key besides its type, and its rules."""
    extra: dict[str, Any] = {"status": status}
    if note:
        extra["note"] = note
    if values:
        extra["values"] = [{"value": v, "status": s, "note": n} for v, (s, n) in values.items()]
    if aliases:
        extra["aliases"] = list(aliases)
    if rules := {k: v for k, v in rules_and_limits.items() if k in _RULES}:
        extra["rules"] = KeyRules(**rules)
    limits = {k: v for k, v in rules_and_limits.items() if k not in _RULES}
    return Field(default, json_schema_extra=extra, **limits)


def nested(annotation: Any) -> type[Keys] | None:
    """The class of keys that a type holds, itself or in a list or a union."""
    if isinstance(annotation, type) and issubclass(annotation, Keys):
        return annotation
    return next(filter(None, map(nested, get_args(annotation))), None)


def aliases(model: type[Keys]) -> dict[str, str]:
    """The older names of a class's keys, each with the name that it has now."""
    names = {
        old: name
        for name, field in model.model_fields.items()
        for old in extra_of(field).get("aliases", ())
    }
    prefix = model.older_prefix
    if prefix:
        names |= {prefix + old: new for old, new in names.items()}
        names |= {prefix + name: name for name in model.model_fields}
    return names


def moved(model: type[Keys]) -> dict[str, tuple[str, str]]:
    """Keys that have become those of a group: each with the group and the name that it has now."""
    keys: dict[str, tuple[str, str]] = {}
    for group, field in model.model_fields.items():
        inner = nested(field.annotation)
        if inner is not None and inner.older_prefix:
            keys |= {
                old: (group, new)
                for old, new in aliases(inner).items()
                if old.startswith(inner.older_prefix) and old not in model.model_fields
            }
    return keys


def current(model: type[Keys], dotted: str) -> tuple[str | int, ...]:
    """The place of a dotted key, e.g. ``datasets.0.path``, with the names that keys have now."""
    path: tuple[str | int, ...] = ()
    inner: type[Keys] | None = model
    for part in dotted.split("."):
        names: tuple[str, ...] = (part,)
        if part.isdecimal():  # an item of a list, which has the same keys
            path = (*path, int(part))
            continue
        if inner is not None:
            names = moved(inner).get(part, (aliases(inner).get(part, part),))
        for name in names:
            field = inner.model_fields.get(name) if inner is not None else None
            inner = nested(field.annotation) if field is not None else None
        path = (*path, *names)
    return path


def extra_of(field: FieldInfo) -> dict[str, Any]:
    """What was said about a key with the functions above."""
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {}


_NO_RULES = KeyRules()


def rules_of(model: type[Keys], name: str) -> KeyRules:
    """How a key goes with others."""
    about = model.model_fields.get(name)
    rules: KeyRules = _NO_RULES if about is None else extra_of(about).get("rules", _NO_RULES)
    return rules


def resumable(model: type[Keys], name: str) -> bool:
    """Whether a run may be resumed with another value of a key, by its name or an older one."""
    name = aliases(model).get(name, name)
    holders = [c for c in model.__mro__ if name in getattr(c, "model_fields", ())]
    # of its own group: what inherits from several has other keys, too
    in_group = bool(holders) and vars(holders[-1]).get("resumable", False)
    return rules_of(model, name).resumable or in_group
