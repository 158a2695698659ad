"""Rows that cannot be used: the first of them, and how many each dataset has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ....errors import DataError

_SHOWN, _ENOUGH = 10, 1000


@dataclass(frozen=True)
class Unreadable:
    """What a reader yields in the place of a row that it cannot read, so that it can go on."""

    message: str


def require_readable(row: Any) -> None:
    """Raise a DataError if a reader has yielded that in the place of a row."""
    if isinstance(row, Unreadable):
        raise DataError(row.message)


class BadRowsError(DataError):
    """Rows cannot be used."""


@dataclass
class BadRows:
    """What is wrong with the rows of a dataset, in their order.

    Attributes:
        path: of the dataset.
        first: the places and messages of the first ones.
        searching: whether samples are of no use any more, because this or an earlier dataset has
            bad rows: what follows is only looked at.
        further: how many batches were only looked at, also of earlier datasets.
        rest: what was not seen of later rows, in words; empty: all were looked at.
    """

    path: str = ""
    first: list[tuple[str, str]] = field(default_factory=list)
    count: int = 0
    searching: bool = False
    further: int = 0
    rest: str = ""

    def following(self, path: str) -> BadRows:
        """Those of the next dataset, of which none is known yet."""
        return BadRows(path, searching=self.searching, further=self.further)

    def add(self, where: str, message: str) -> None:
        """Take in the next one."""
        self.count, self.searching = self.count + 1, True
        if len(self.first) < _SHOWN:
            self.first.append((where, message))

    def extend(self, others: BadRows) -> None:
        """Take in those of later rows."""
        self.first = [*self.first, *others.first][:_SHOWN]
        self.count += others.count
        self.searching = self.searching or others.searching
        self.rest = self.rest or others.rest

    @property
    def enough(self) -> bool:
        """Whether looking for more would tell nothing new."""
        return self.count >= _ENOUGH

    def raise_any(self) -> None:
        """Raise a BadRowsError with all of that, equal reasons joined, if there are any."""
        if not self.count:
            return
        lines = _lines(self.first)
        if self.count > 1 or self.rest:
            lines[-1] += f"; {self.total()}" if not lines[1:] else f"\n  {self.total()}"
        raise BadRowsError("\n  ".join(lines))

    def total(self) -> str:
        """How many they are, and what was not seen."""
        if not self.count:
            return self.rest
        rows = f"{self.count:,} row{'s' * (self.count > 1)}"
        more, rest = (" or more", f": {self.rest}") if self.rest else ("", "")
        return f"{rows}{more} cannot be used{rest}"


def raise_any(found: Sequence[BadRows], later: str = "") -> None:
    """Raise a BadRowsError with the bad rows of several datasets, if there are any.

    It names the first ones of each, as many in all as it would name of one, and all counts.
    ``later``: an error that came after them, and is told with them.
    """
    told = [bad for bad in found if bad.count or bad.rest]
    if len(told) == 1 and not later:
        told[0].raise_any()
    if not any(bad.count for bad in told):
        return
    numbers = _shares([len(bad.first) for bad in told])
    first = (_lines(bad.first[:number]) for bad, number in zip(told, numbers, strict=True))
    lines = [line for each in first for line in each]
    lines += [f"{bad.path}: {bad.total()}" for bad in told]
    lines += [later] if later else []
    raise BadRowsError("\n  ".join(lines))


def _shares(numbers: Sequence[int]) -> list[int]:
    """How many of each are named, one of each in turn."""
    shares = [0] * len(numbers)
    for turn in range(max(numbers)):
        for i, number in enumerate(numbers):
            shares[i] += turn < number and sum(shares) < _SHOWN
    return shares


def _lines(rows: Sequence[tuple[str, str]]) -> list[str]:
    """The places and messages of rows, those of an equal reason in one line."""
    by_reason: dict[str, list[tuple[str, str]]] = {}
    for where, message in rows:
        by_reason.setdefault(message.removeprefix(where), []).append((where, message))
    return [_line(likewise) for likewise in by_reason.values()]


def _line(rows: list[tuple[str, str]]) -> str:
    (_, message), *others = rows
    places = ", ".join(where.rpartition(", ")[2] for where, _ in others)
    return f"{message} (likewise {places})" if others else message
