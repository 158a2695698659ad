"""How far the preparation is, on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """A bar per dataset, while entered.

    Args:
        console: where; nothing is shown if it is None, or no terminal.
    """

    def __init__(self, console: Console | None) -> None:
        self._bars: Any = None
        if console is not None and console.is_terminal and not console.quiet:
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("preparing {task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )

    def dataset(self, path: str) -> Callable[[float], None]:
        """Add a bar; what it returns is called with the share that is done."""
        if self._bars is None:
            return lambda share: None
        task = self._bars.add_task(Path(path).name, total=1.0)
        bars = self._bars
        return lambda share: bars.update(task, completed=share)

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
