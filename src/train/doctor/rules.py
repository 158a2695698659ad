"""Which implementation each rewrite has here, as the ops themselves choose it; and which codegen.

Each op is called as a model would call it, with tensors that have shapes and, unless it has to read
them, no contents: ``Op.unsupported`` has its limits, and whether it launches one of our Triton
kernels shows in the operators that it calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ...compiler.codegen.choice import choose
from ...compiler.options import Environment
from ...kernels.launch import IMPLEMENTATIONS, LAUNCHES
from ...kernels.op import Maker, Op
from ...passes import PIPELINE
from ...rewrite.op_table import OPS
from ..model.precision import device_for_training
from .result import CheckResult, reason

DTYPES = (torch.float32, torch.bfloat16)
"""The dtypes that are checked."""


class _Launches(TorchDispatchMode):
    """Counts the operators that launch a Triton kernel, also inside of opaque ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # 2026-11-27: torch is not typed here
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, or in its place what implements it."""
        launches, implementation = LAUNCHES.get(func), IMPLEMENTATIONS.get(func)
        if launches is not None:
            self.count += launches(*args)
        elif implementation is not None:
            with self:
                return implementation(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def ops_of_rules() -> Iterator[tuple[str, Op]]:
    """The rules' names in the order of the pipeline, each with the ops that it calls.

    At the end come the ops that no rule calls, each under its own name.
    """
    rest = {op.name: op for op in OPS if op.rule is not None}
    for rule in dict.fromkeys(rule.name for rule in PIPELINE):
        for op in [op for op in rest.values() if (op.rule or op.name) == rule]:
            yield rule, rest.pop(op.name)
    yield from rest.items()


def implementation(op: Op, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The implementation of an op, with tensors of ``dtype``, and the reason for it.

    It is ``Triton``, ``CPU``, ``ATen`` (plain operators of PyTorch, on a GPU) or ``reference`` (the
    model's own operations).
    """
    try:
        with FakeTensorMode():
            return _called(op, dtype, device)
    except (DataDependentOutputException, DynamicOutputShapeException):  # it reads numbers
        return _called(op, dtype, device)


def _called(op: Op, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    maker, reasons = Maker(dtype, device, adapters=torch.float32), list[str]()
    for example in op.examples().values():  # PyTorch may be as fast at one of them
        args = example(maker)
        reason = op.unsupported(*args)
        if not reason:
            break
        reasons = reasons or reason
    else:
        return "reference", "; ".join(reasons)
    with _Launches() as launches:
        op.call(*args)
    if launches.count:
        return "Triton", ""
    return ("CPU" if device.type == "cpu" else "ATen"), ""


def rules() -> list[dict[str, str]]:
    """One row for each rule and op: ``rule``, ``op``, both dtypes, and a note."""
    device, disabled = device_for_training(), Environment.read().disable
    rows = []
    for rule, op in ops_of_rules():
        row: dict[str, str] = {"rule": rule, "op": op.name}
        notes: dict[str, None] = {}
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            try:
                row[name], note = implementation(op, dtype, device)
            except Exception as error:  # of a library, a driver, a compiler
                row[name], note = "unknown", reason(error)
            if rule in disabled:
                row[name], note = "off", "in FUSEWRIGHT_DISABLE"
            if note:
                notes[note] = None
        rows.append({**row, "note": "; ".join(notes)})
    return rows


def codegen() -> list[CheckResult]:
    """What ``codegen: auto`` chooses for a model of usual size."""
    with FakeTensorMode():
        block = torch.nn.Linear(4096, 4096, device=device_for_training())
    backend, why = choose("auto", [block])
    note = f"{why}; models whose blocks have fewer than 10 M parameters run in eager PyTorch"
    return [CheckResult("codegen: auto", backend, note=note if backend == "inductor" else why)]
