"""What all groups of keys are made of: number types that take no booleans, and a key's status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Status = Literal["honoured", "subsumed", "not applicable", "not yet available"]
"""What becomes of a key. A key that is none of these is unknown, and an error."""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):  # Python, and so pydantic, takes True for 1
        raise ValueError("not a number")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]


class Keys(BaseModel):
    """A group of keys. Attributes cannot be changed, and no other keys are taken."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


def key(
    default: Any = None,
    *,
    values: Mapping[Any, tuple[Status, str]] | None = None,
    aliases: Sequence[str] = (),
    **constraints: Any,
) -> Any:
    """A key that is honoured. One without any of these arguments needs no ``key()``.

    Args:
        default: what it is when unset.
        values: the values that have another status than the key, each with the reason.
        aliases: older names of the same key.
        constraints: pydantic's, e.g. ``gt=0``.
    """
    extra: dict[str, Any] = {}
    if values:
        extra["values"] = {value: {"status": s, "note": n} for value, (s, n) in values.items()}
    if aliases:
        extra["aliases"] = list(aliases)
    return Field(default, json_schema_extra=extra, **constraints)


def subsumed(by: str, default: Any = None, *, aliases: Sequence[str] = ()) -> Any:
    """A key whose effect one has anyway, ``by`` something else."""
    return _marked("subsumed", by, default, aliases)


def not_applicable(why: str, default: Any = None, *, aliases: Sequence[str] = ()) -> Any:
    """A key that cannot change the run here; ``why`` says the reason."""
    return _marked("not applicable", why, default, aliases)


def not_yet(instead: str, default: Any = None, *, aliases: Sequence[str] = ()) -> Any:
    """A key that would change the run and cannot yet; ``instead`` says what to do."""
    return _marked("not yet available", instead, default, aliases)


def _marked(status: Status, note: str, default: Any, aliases: Sequence[str]) -> Any:
    extra: dict[str, Any] = {"status": status, "note": note}
    if aliases:
        extra["aliases"] = list(aliases)
    return Field(default, json_schema_extra=extra)
