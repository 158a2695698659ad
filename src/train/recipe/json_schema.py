"""The keys of a recipe as a JSON schema, for editors and for the documentation."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from .keys.base import Keys, aliases, moved, nested
from .recipe import Recipe


class _Schema(GenerateJsonSchema):
    """Pydantic's schema without titles."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # a title would only repeat the key


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe (draft 2020-12).

    Every key has its ``description``, its ``default`` if it has one, and its ``status``:
    ``honoured``, ``subsumed``, ``not applicable`` or ``not yet available``, with a ``note`` for all
    but the first, and ``values`` that have another status than the key. Older names are
    ``deprecated`` keys.
    """
    schema = Recipe.model_json_schema(schema_generator=_Schema)
    for model in (schema, *schema["$defs"].values()):
        for name, key in model["properties"].items():
            model["properties"][name] = (
                _nullable(key) if name not in model.get("required", ()) else key
            )
            model["properties"][name].setdefault("status", "honoured")
            model["properties"][name].pop("rules", None)  # what they mean is said by the checks
    _add_older_names(Recipe, schema, "#")
    for group in filter(None, (nested(f.annotation) for f in Recipe.model_fields.values())):
        _add_older_names(group, schema["$defs"][group.__name__], f"#/$defs/{group.__name__}")
    for old, (name, new) in moved(Recipe).items():
        inner = nested(Recipe.model_fields[name].annotation)
        assert inner is not None
        where = f"#/$defs/{inner.__name__}/properties/{new}"
        schema["properties"][old] = {"$ref": where, "deprecated": True}
    _spell_out(schema)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


_LIMITS = {
    "ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum",
}  # fmt: skip
"""Pydantic's names, which it leaves at types with a validator, and those of JSON schemas."""

_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
"""YAML 1.1 reads ``1e-3`` as text; a run takes it for what it is."""


def _spell_out(schema: Any) -> None:
    """Name limits as validators know them, and let numbers be texts of numbers."""
    if isinstance(schema, list):
        for part in schema:
            _spell_out(part)
    if not isinstance(schema, dict):
        return
    for ours, name in _LIMITS.items():
        if ours in schema:
            schema[name] = schema.pop(ours)
    if schema.get("type") == "number":
        schema.update(type=["number", "string"], pattern=_NUMBER)
    for key, part in schema.items():
        if key not in ("default", "values", "enum", "const"):
            _spell_out(part)


def _add_older_names(model: type[Keys], schema: dict[str, Any], here: str) -> None:
    """Add the older names of a class's keys to its schema, which is at ``here``."""
    for old, new in aliases(model).items():
        where = f"{here}/properties/{new}"
        schema["properties"][old] = {"$ref": where, "deprecated": True}


def _nullable(key: dict[str, Any]) -> dict[str, Any]:
    """The same key, which may be null, too: that is how a recipe says that it is unset."""
    null = {"type": "null"}
    if "anyOf" in key:
        return key if null in key["anyOf"] else {**key, "anyOf": [*key["anyOf"], null]}
    about = ("description", "default", "status", "note", "values", "aliases", "rules")
    kind = {k: v for k, v in key.items() if k not in about}
    return {"anyOf": [kind, null], **{k: v for k, v in key.items() if k in about}}
