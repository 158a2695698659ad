"""The settings of one ``optimize`` call, which all compilations of its model share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..memory.planner import Planner
from ..rewrite.engine import Fuel
from ..rewrite.verify import Verifier
from .options import Environment, Options
from .small_blocks import SmallBlocks


@dataclass(frozen=True, eq=False)
class Choices:
    """The settings of one ``optimize`` call, and the objects that act on them.

    ``codegen`` is ``(choice, reason)`` for the blocks. ``fake``: the model's weights are fake
    tensors: its steps are counted, not computed.
    """

    options: Options
    environment: Environment
    codegen: tuple[str, str]
    verifier: Verifier
    fuel: Fuel
    planner: Planner
    fake: bool = False
    small_blocks: SmallBlocks = field(default_factory=SmallBlocks)

    @property
    def rules(self) -> list[Any]:
        """The rules that are not disabled by the environment."""
        return [r for r in self.options.passes if r.name not in self.environment.disable]
