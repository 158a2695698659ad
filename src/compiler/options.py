"""What ``optimize`` was asked for: one frozen record, checked once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..memory.budget import Budget

Codegen = Literal["auto", "eager", "inductor"]
Logits = Literal["lazy", "always"]
Verify = Literal["first", "always", "off"]


@dataclass(frozen=True)
class Options:
    """The choices of one ``optimize`` call.

    Attributes:
        passes: the rules, in order.
        codegen: what runs the nodes that no rule claimed.
        memory: ``"speed"``, ``"auto"``, ``"min"``, or a size such as ``"8GB"``.
        logits: ``"lazy"`` computes ``outputs.logits`` when it is read, ``"always"`` at once.
        verify: ``"first"`` checks each distinct rewrite once, ``"always"`` at every capture.
        strict: raise when a site is refused or missed.
        compile_no_grad: whether ``codegen`` also runs blocks that are called without gradients.
        packs: whether rows are several samples wherever their positions say so.
        cuda_graphs: whether Inductor launches compiled blocks as CUDA graphs.
    """

    passes: tuple[Any, ...]
    codegen: Codegen = "auto"
    memory: str = "speed"
    logits: Logits = "lazy"
    verify: Verify = "first"
    strict: bool = False
    compile_no_grad: bool = False
    packs: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("codegen", Codegen),
            ("logits", Logits),
            ("verify", Verify),
        ):
            value = getattr(self, name)
            if value not in get_args(allowed):
                choices = ", ".join(repr(c) for c in get_args(allowed))
                raise ValueError(f"{name}={value!r} is not one of {choices}")
        for name in ("strict", "compile_no_grad", "packs", "cuda_graphs"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r} is not one of False, True")
        Budget.parse(self.memory)


@dataclass(frozen=True)
class Environment:
    """The documented environment variables, read here and nowhere else.

    Attributes:
        dump: ``FUSEWRIGHT_DUMP``: a folder that receives each graph after each stage, as Python.
        fuel: ``FUSEWRIGHT_FUEL``: how many rewrites one ``optimize`` call may make; for bisecting.
        disable: ``FUSEWRIGHT_DISABLE``: names of rules to leave out, separated by commas.
        traceback: ``FUSEWRIGHT_TRACEBACK``: commands print the traceback of every error.
        keeps_verdicts: ``FUSEWRIGHT_VERDICTS``: ``fresh``: each process verifies rewrites itself;
            ``kept``, the default: not those that an earlier one has found right.
        optimizes_small: ``FUSEWRIGHT_SMALL``: ``optimize``: also blocks that are too small to gain
            run their graphs; ``keep``, the default: these keep their original code.
    """

    dump: str | None
    fuel: int | None
    disable: frozenset[str]
    traceback: bool = False
    keeps_verdicts: bool = True
    optimizes_small: bool = False

    @classmethod
    def read(cls) -> Environment:
        """Read the variables as they are now; ValueError for a value that one cannot have."""
        fuel = os.environ.get("FUSEWRIGHT_FUEL")
        if fuel and not fuel.isdecimal():
            raise ValueError(f"FUSEWRIGHT_FUEL={fuel!r}: the number of rewrites allowed, as in 12")
        verdicts = os.environ.get("FUSEWRIGHT_VERDICTS") or "kept"
        if verdicts not in ("kept", "fresh"):
            raise ValueError(f"FUSEWRIGHT_VERDICTS={verdicts!r} is neither kept nor fresh")
        small = os.environ.get("FUSEWRIGHT_SMALL") or "keep"
        if small not in ("keep", "optimize"):
            raise ValueError(f"FUSEWRIGHT_SMALL={small!r} is neither keep nor optimize")
        names = os.environ.get("FUSEWRIGHT_DISABLE", "").split(",")
        return cls(
            dump=os.environ.get("FUSEWRIGHT_DUMP") or None,
            fuel=int(fuel) if fuel else None,
            disable=frozenset(n.strip() for n in names if n.strip()),
            traceback=os.environ.get("FUSEWRIGHT_TRACEBACK", "0") not in ("", "0"),
            keeps_verdicts=verdicts == "kept",
            optimizes_small=small == "optimize",
        )
