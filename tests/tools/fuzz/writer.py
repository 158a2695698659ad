"""A writer of source code: what the generator of models says in, and draws its choices from."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

DIM = 16
HEADS = 2
HEAD = DIM // HEADS
WIDE = 24
VOCAB = 37


class Writer:
    """Collects the source of one block class: its constructor and its methods.

    Attributes:
        rng: the source of every choice.
        init: lines of the constructor.
        body: lines of the method that is being written.
        names: how often each prefix was used, so that names are unique.
        linears: names of the linears, which adapters may be put on.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.init: list[str] = []
        self.body: list[str] = []
        self.names: dict[str, int] = {}
        self.linears: list[str] = []

    def pick(self, *options: Any) -> Any:
        """One of the options."""
        return self.rng.choice(options)

    def weighted(self, options: dict[Any, float]) -> Any:
        """One of the keys, by weight."""
        return self.rng.choices(list(options), list(options.values()))[0]

    def chance(self, p: float) -> bool:
        """True with probability ``p``."""
        return self.rng.random() < p

    def new(self, prefix: str) -> str:
        """A name that nothing has yet."""
        self.names[prefix] = self.names.get(prefix, -1) + 1
        return f"{prefix}{self.names[prefix]}"

    def let(self, expression: str, prefix: str = "t") -> str:
        """Write an assignment; returns the variable's name."""
        name = self.new(prefix)
        self.body.append(f"{name} = {expression}")
        return name

    def line(self, text: str) -> None:
        """Write a line into the method."""
        self.body.append(text)

    def member(self, prefix: str, expression: str) -> str:
        """Write a member into the constructor; returns ``self.NAME``."""
        name = self.new(prefix)
        self.init.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def parameter(self, shape: str, low: float = 0.5) -> str:
        """A parameter of uniform values around one."""
        return self.member("p", f"nn.Parameter(torch.rand({shape}) + {low})")

    def linear(self, inputs: int, outputs: int, bias: bool | None = None) -> str:
        """A linear layer; with a bias one time in three."""
        bias = self.chance(0.33) if bias is None else bias
        name = self.member("lin", f"nn.Linear({inputs}, {outputs}, bias={bias})")
        self.linears.append(name.removeprefix("self."))
        return name

    def applied(self, x: str, inputs: int, outputs: int) -> str:
        """An expression of a linear map of ``x``, in one of its spellings."""
        if self.chance(0.12):
            return self._adapted(x, inputs, outputs)
        layer = self.linear(inputs, outputs)
        return self.weighted(
            {
                f"{layer}({x})": 8,
                f"F.linear({x}, {layer}.weight, {layer}.bias)": 1,
                f"F.linear({x}, weight={layer}.weight)": 0.5,
                f"({x} @ {layer}.weight.t())": 1,
                f"torch.matmul({x}, {layer}.weight.transpose(0, 1))": 0.5,
            }
        )

    def _adapted(self, x: str, inputs: int, outputs: int) -> str:
        """A LoRA by hand."""
        base, a, b = (
            self.linear(inputs, outputs),
            self.linear(inputs, 4, bias=False),
            self.linear(4, outputs, bias=False),
        )
        dropped = self.pick(x, x, f"F.dropout({x}, 0.25, self.training)")
        scale = self.pick("0.5", "2", "1.0", "self.scale")
        if scale == "self.scale":
            self.init.append("self.scale = 0.75")
        return self.pick(
            f"({base}({x}) + {b}({a}({dropped})) * {scale})",
            f"({scale} * {b}({a}({dropped})) + {base}({x}))",
            f"({base}({x}) + {b}({scale} * {a}({dropped})))",
            f"({base}({x}) - {b}({a}({dropped})) * {scale})",
        )

    def method(self, name: str, arguments: str, write: Callable[[], str]) -> list[str]:
        """The lines of a method whose body ``write`` writes; it returns the result's expression."""
        outer, self.body = self.body, []
        result = write()
        lines = [f"def {name}(self, {arguments}):", *(f"    {t}" for t in self.body)]
        self.body = outer
        return [*lines, f"    return {result}", ""]
