"""Is what was asked for in force: dropout, gradient checkpointing."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..compiler.install import active
from .bench import cast_to
from .findings import AuditFinding
from .reference import Batch, Loss, unwrapped
from .slices import first_rows, first_tokens
from .state import only_dropout, rates_of

_SEEDS = 8

NO_DROPOUT_MODULE = (
    "PEFT puts a dropout into each of its layers: something has replaced them, or taken them out; "
    "train without that patch"
)
"""What to do where an adapter's dropout has no module."""


def asked_of_adapters(model: nn.Module) -> dict[str, float]:
    """The probabilities of dropout above zero that adapters' configurations ask for, by name."""
    configs = getattr(unwrapped(model), "peft_config", None)
    return {
        name: float(value)
        for config in (configs.values() if isinstance(configs, dict) else ())
        for name, value in vars(config).items()
        if "dropout" in name and isinstance(value, float) and value > 0
    }


def dropout(model: nn.Module, batch: Batch, loss: Loss, autocast: Any) -> AuditFinding:
    """Whether two forwards differ for each kind of dropout; call it with dropout on."""
    rates = list(rates_of(model))
    kinds = {kind: value for kind, _, _, value in rates}
    for name, value in asked_of_adapters(model).items():
        if not any("dropout" in kind and isinstance(m, _DropoutNd) for kind, m, _, _ in rates):
            reason = f"{name} is {value:g} in the adapter's configuration, and no module has it"
            return AuditFinding("dropout", "fail", reason, advice=NO_DROPOUT_MODULE)
    if not kinds:
        return AuditFinding("dropout", "pass", "none was asked for")
    off = [kind for kind, module, _, _ in rates if not module.training]
    if len(off) == len(rates):
        return AuditFinding(
            "dropout", "fail",
            f"the model is in evaluation mode, so that none of {len(kinds)} kinds of dropout is on",
            tuple(sorted(set(off))),
        )  # fmt: skip
    batch = first_tokens(first_rows(batch, 1) or batch, 64) or batch
    # each kind is asked alone; but other probabilities are other graphs of fusewright
    ours = any(active(module) is not None for module in model.modules())
    missing = []
    for kinds_on in [set(kinds)] if ours else [{kind} for kind in kinds]:
        with only_dropout(model, kinds_on):
            losses: set[float] = set()
            for seed in range(_SEEDS):  # a small one may not show in fp32
                if len(losses) > 1:
                    break
                torch.manual_seed(seed)
                with torch.no_grad(), cast_to(batch, autocast):
                    losses.add(float(loss(model, batch)))
        if len(losses) == 1:
            missing += sorted(kinds_on)
    if missing:
        return AuditFinding(
            "dropout", "fail",
            f"{len(missing)} of {len(kinds)} kinds of dropout have no effect: "
            + ", ".join(f"{kind} ({kinds[kind]:g})" for kind in missing),
            tuple(missing),
        )  # fmt: skip
    values = ", ".join(sorted({f"{value:g}" for value in kinds.values()}))
    return AuditFinding("dropout", "pass", f"{len(kinds)} kinds of {values}")


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated layers of a model, by path: the elements of its largest lists of one class."""
    found: dict[str, nn.Module] = {}
    for path, module in unwrapped(model).named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(b + ".") for b in found):
            continue
        by_class: dict[type, list[tuple[str, nn.Module]]] = defaultdict(list)
        for name, child in module.named_children():
            if any(True for _ in child.children()):
                by_class[type(child)].append((f"{path}.{name}", child))
        for same in by_class.values():
            found |= dict(same)
    return found


def asks_for_checkpointing(model: nn.Module) -> bool | None:
    """What the model's own flags say; None: it has none."""
    flags = [
        bool(m.gradient_checkpointing)
        for m in unwrapped(model).modules()
        if hasattr(m, "gradient_checkpointing")
    ]
    return any(flags) if flags else None


class CountsCalls:
    """Notes which blocks have run, and which ran again in backward.

    Blocks that run as graphs of fusewright are left out: a hook inside would make them run as they
    were.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks = blocks_of(model)
        self.ours = [path for path, block in self.blocks.items() if active(block) is not None]
        self.called: set[str] = set()
        self.again: set[str] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> CountsCalls:
        for path, block in self.blocks.items():
            # transformers checkpoints a block's forward: its own hooks are outside
            for child in () if path in self.ours else block.children():
                self._handles.append(
                    child.register_forward_pre_hook(lambda *_, path=path: self._note(path))
                )
        return self

    def _note(self, path: str) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        (self.again if in_backward else self.called).add(path)

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()


def checkpointing(model: nn.Module, counted: CountsCalls, asked: bool | None) -> AuditFinding:
    """Whether blocks were computed again in backward; ``asked``: None: the model's flags say."""
    check = "checkpointing"
    wanted = asks_for_checkpointing(model) if asked is None else asked
    if counted.ours:
        return AuditFinding(
            check, "skipped",
            "the layers run as graphs of fusewright, which plans what is computed again: see "
            "explain(model)",
        )  # fmt: skip
    if not counted.called:
        return AuditFinding(
            check, "skipped", "no repeated layers were called that could be counted"
        )
    if wanted is None:
        return AuditFinding(check, "skipped", "nothing says whether it was asked for")
    number = len(counted.called)
    again = [path for path in counted.blocks if path in counted.again]
    once = [path for path in counted.blocks if path in counted.called - counted.again]
    if wanted and once:
        why = "" if model.training else "; the model is in evaluation mode"
        return AuditFinding(
            check, "fail",
            f"it was asked for, but {len(once)} of {number} layers are not computed again in "
            f"backward{why}", tuple(once),
        )  # fmt: skip
    if not wanted and again:
        return AuditFinding(
            check, "fail",
            f"it was not asked for, but {len(again)} of {number} layers are computed again in "
            "backward", tuple(again),
        )  # fmt: skip
    how = f"{len(again)} of {number} layers are computed again" if again else "off, as asked for"
    return AuditFinding(check, "pass", how)
