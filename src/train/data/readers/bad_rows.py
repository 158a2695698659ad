"""Rows that cannot be used: the first of them, and how many they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from ....errors import DataError

_SHOWN, _ENOUGH = 10, 1000


@dataclass
class BadRows:
    """What is wrong with rows, in their order.

    Attributes:
        first: the places and messages of the first ones.
        further: how many batches were looked at since the first of them.
        rest: what was not seen of later rows, in words; empty: all were looked at.
    """

    first: list[tuple[str, str]] = field(default_factory=list)
    count: int = 0
    further: int = 0
    rest: str = ""

    def add(self, where: str, message: str) -> None:
        """Take in the next one."""
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append((where, message))

    def extend(self, others: BadRows) -> None:
        """Take in those of later rows."""
        self.first = [*self.first, *others.first][:_SHOWN]
        self.count += others.count

    @property
    def enough(self) -> bool:
        """Whether looking for more would tell nothing new."""
        return self.count >= _ENOUGH

    def raise_any(self) -> None:
        """Raise a DataError with all of that, equal reasons joined, if there are any."""
        if not self.count:
            return
        by_reason: dict[str, list[tuple[str, str]]] = {}
        for where, message in self.first:
            by_reason.setdefault(message.removeprefix(where), []).append((where, message))
        lines = [_line(likewise) for likewise in by_reason.values()]
        if self.count > 1 or self.rest:
            rows = f"{self.count:,} row{'s' * (self.count > 1)}"
            more, rest = (" or more", f": {self.rest}") if self.rest else ("", "")
            total = f"{rows}{more} cannot be used{rest}"
            lines[-1] += f"; {total}" if not lines[1:] else f"\n  {total}"
        raise DataError("\n  ".join(lines))


def _line(rows: list[tuple[str, str]]) -> str:
    (_, message), *others = rows
    places = ", ".join(where.rpartition(", ")[2] for where, _ in others)
    return f"{message} (likewise {places})" if others else message
