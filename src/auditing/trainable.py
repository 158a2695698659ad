"""What is trained: the trainable set, the reach of adapters, the experts."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bench import Bench, cast_to, trained
from .findings import AuditFinding
from .gradients import Fault, Gradients
from .reference import AuditStep, Batch, core_of, unwrapped


def trainable_set(model: nn.Module, bench: Bench | None, expected: Sequence[str]) -> AuditFinding:
    """Compare what is trained with ``expected`` (regular expressions), or with what PEFT trains."""
    inner = unwrapped(model)
    is_trained = {name for name, _ in trained(model)}
    every = {name for name, p in inner.named_parameters()}
    if not is_trained:
        return AuditFinding("trainable-set", "fail", f"none of {len(every)} tensors is trainable")
    if expected:
        meant = {name for name in every if any(re.search(e, name) for e in expected)}
        source = _EXPECTED
    elif not isinstance(getattr(inner, "peft_config", None), dict):
        frozen = sorted(every - is_trained)
        if untied := untied_weights(inner):
            return AuditFinding("trainable-set", "fail", _UNTIED, tuple(untied), _TIE)
        if not frozen:
            return AuditFinding("trainable-set", "pass", f"all {len(every)} tensors are trained")
        return AuditFinding(
            "trainable-set", "skipped",
            f"{len(frozen)} of {len(every)} tensors are frozen, and nothing says whether they were "
            "meant to be", tuple(frozen), "say which names are trained (expected=[...])",
        )  # fmt: skip
    elif bench is None:
        return AuditFinding("trainable-set", "skipped", "there is no plain model to compare with")
    else:
        meant, source = bench.plain.meant, "what the adapter's configuration trains"
    untied = untied_weights(inner)
    own = {
        name for path, layer in adapter_layers(model).items() for name in tensors_of(path, layer)
    }
    if source != _EXPECTED:  # which of an adapter's tensors are trained is its own matter
        meant |= own
        meant -= _frozen_halves(meant & every, is_trained)
    extra, lacking = sorted(is_trained - meant), sorted((meant & every) - is_trained)
    if not extra and not lacking and not untied:
        numbers = sum(p.numel() for _, p in trained(model))
        return AuditFinding(
            "trainable-set", "pass", f"{len(is_trained)} tensors with {numbers} numbers are trained"
        )
    clauses = []
    if untied:
        clauses.append(_UNTIED)
    if lacking:
        clauses.append(f"{len(lacking)} tensors are frozen, but belong to {source}")
    if extra:
        clauses.append(f"{len(extra)} tensors are trained, but do not belong to {source}")
    subjects = (*untied, *lacking, *extra)
    advice = _TIE if untied and not lacking and not extra else ""
    return AuditFinding("trainable-set", "fail", "; ".join(clauses), subjects, advice)


_EXPECTED = "what was expected"


def _frozen_halves(meant: set[str], is_trained: set[str]) -> set[str]:
    """Parts of adapters that are frozen in all layers, as LoRA-FA's first matrices are."""
    by_part: dict[str, set[str]] = defaultdict(set)
    for name in meant:
        if match := _PART.search(name):
            by_part[match[1]].add(name)
    frozen = {part for part, names in by_part.items() if not names & is_trained}
    return set().union(*(by_part[part] for part in frozen)) if len(frozen) < len(by_part) else set()


_PART = re.compile(r"\.(lora_[A-Z]\w*)\.")

_UNTIED = "weights that the configuration ties are two tensors, and are trained apart"

_TIE = "call model.tie_weights() after what replaced one of them, or set tie_word_embeddings: false"


def untied_weights(model: nn.Module) -> list[str]:
    """Pairs that are tied by the configuration, but are two tensors of which one is trained."""
    core: Any = core_of(model)
    tied, config = getattr(core, "_tied_weights_keys", None), getattr(core, "config", None)
    if not isinstance(tied, dict) or not getattr(config, "tie_word_embeddings", False):
        return []
    by_name = dict(core.named_parameters(remove_duplicate=False))
    found = []
    for name, source in tied.items():
        a, b = by_name.get(name), by_name.get(source)
        if a is not None and b is not None and a is not b and (a.requires_grad or b.requires_grad):
            found += [name, source]
    return found


# --- adapters -------------------------------------------------------------------------------------


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers in ``model``, by path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = unwrapped(model).named_modules()
    return {path: module for path, module in modules if isinstance(module, BaseTunerLayer)}


def tensors_of(path: str, layer: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable tensors of one adapter layer, but not of one that it wraps."""
    return {
        f"{path}.{name}": p
        for name, p in layer.named_parameters()
        if p.requires_grad and not name.startswith("base_layer.")
    }


def inert_adapters(
    bench: Bench, batch: Batch, step: AuditStep, eager: AuditStep
) -> tuple[dict[str, str], set[str]]:
    """Adapter layers that take no part in the forward, with the reason; and their tensors.

    ``eager``: a step of the plain model in the audited one's dtypes, whose zeros are no fault.
    """
    inert: dict[str, str] = {}
    tensors: set[str] = set()
    suspects: dict[str, list[nn.Parameter]] = {}
    for path, layer in adapter_layers(bench.model).items():
        own = tensors_of(path, layer)
        if not own:
            continue
        if bench.plain.passes_by(path):
            inert[path] = "the plain model reads their layers' weights without calling them"
            tensors |= own.keys()
        elif any(_some(eager.gradients.get(n)) for n in own) and not any(
            _some(step.gradients.get(n)) for n in own
        ):
            suspects[path] = list(own.values())
    if suspects and not _has_effect(bench, batch, [p for ps in suspects.values() for p in ps]):
        for path in suspects:
            patch = _patch_around(unwrapped(bench.model), path)
            inert[path] = f"the patched forward{patch and f' ({patch})'} leaves them out"
            tensors |= tensors_of(path, unwrapped(bench.model).get_submodule(path)).keys()
    return inert, tensors


def _patch_around(model: nn.Module, path: str) -> str:
    """What replaces the forward of a module, or of one around it; empty: nothing that is known."""
    names = path.split(".")
    for end in range(len(names), -1, -1):
        module = model.get_submodule(".".join(names[:end]))
        owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
        function = vars(module).get("forward", vars(owner)["forward"])
        if "forward" not in vars(module) and function.__module__ == owner.__module__:
            continue
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        if code is not None:
            return f"{code.co_qualname}, {Path(code.co_filename).name}:{code.co_firstlineno}"
    return ""


def _some(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _has_effect(bench: Bench, batch: Batch, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the audited model's loss depends on the values of ``parameters``."""
    saved = [p.detach().clone() for p in parameters]
    with torch.no_grad(), cast_to(batch, bench.autocast):
        before = float(bench.loss(bench.model, batch))
        again = float(bench.loss(bench.model, batch))
        for p in parameters:
            p.mul_(3.0)
        try:
            after = float(bench.loss(bench.model, batch))
        finally:
            for p, value in zip(parameters, saved, strict=True):
                p.copy_(value)
    return not math.isclose(before, after, rel_tol=1e-7, abs_tol=abs(before - again))


def adapter_reach(model: nn.Module, inert: Mapping[str, str]) -> AuditFinding:
    """Whether each layer that the targets name has an adapter in force."""
    layers = adapter_layers(model)
    if not layers:
        return AuditFinding("adapter-reach", "skipped", "the model has no adapter")
    merged = [path for path, layer in layers.items() if getattr(layer, "merged", False)]
    off = [path for path, layer in layers.items() if getattr(layer, "disable_adapters", False)]
    bare = bare_stacks(model)
    named = [name for name, by_target in bare.items() if by_target]
    clauses, subjects, advice = [], [], ""
    for paths, words in (
        (merged, "adapters are merged into their layers, so that they have no effect of their own"),
        (off, "adapters are disabled"),
    ):
        if paths:
            clauses.append(f"{len(paths)} {words}")
            subjects += paths
    for words in sorted(set(inert.values())):
        paths = [path for path, reason in inert.items() if reason == words]
        part = f"{len(paths)} of {len(layers)} adapters"
        clauses.append(f"{part} take no part in the forward: {words}")
        subjects += paths
    if named:
        advice = "name them in target_parameters, such as " + re.sub(r"^.*\.\d+\.", "", named[0])
    elif inert:
        advice = (
            "call these layers in the forward that leaves them out, train without the patch, or "
            "leave them out of target_modules"
        )
    if named:
        clauses.append(
            f"{len(named)} stacked parameters of experts have no adapter, though target_modules "
            f"names {', '.join(sorted({by for by in bare.values() if by}))}: target_modules "
            "finds modules, and these are parameters"
        )
        subjects += named
    if clauses:
        return AuditFinding("adapter-reach", "fail", "; ".join(clauses), tuple(subjects), advice)
    reason = f"{len(layers)} adapters"
    if bare:
        reason += f"; {len(bare)} stacked parameters of experts have none, and none is named"
    return AuditFinding("adapter-reach", "pass", reason)


def bare_stacks(model: nn.Module) -> dict[str, str]:
    """Stacked parameters of experts without adapters, and the target that names them, or ''."""
    inner: Any = unwrapped(model)
    configs = getattr(inner, "peft_config", None)
    if not isinstance(configs, dict):
        return {}
    adapted = {
        (id(layer.get_base_layer()), layer.parameter_name)
        for layer in adapter_layers(model).values()
        if hasattr(layer, "parameter_name")
    }
    targets: set[str] = set()
    for config in configs.values():
        named = getattr(config, "target_modules", None)
        targets |= set(() if named is None or isinstance(named, str) else named)
    found = {}
    for path, module in inner.named_modules():
        for name, p in module.named_parameters(recurse=False):
            stacked = p.ndim == 3 and len(p) > 1 and p.is_floating_point()
            if stacked and (id(module), name) not in adapted and not p.requires_grad:
                found[f"{path}.{name}"] = next(
                    (t for t in sorted(targets) if _covers(t, path, name)), ""
                )
    return found


def _covers(target: str, path: str, name: str) -> bool:
    """Whether a target such as ``gate_proj`` names what is stacked in ``gate_up_proj``."""
    parent, _, last = target.rpartition(".")
    return f".{path}".endswith(f".{parent}" if parent else "") and (
        set(last.split("_")) <= set(name.split("_"))
    )


# --- experts --------------------------------------------------------------------------------------


def expert_parts(name: str, gradient: Tensor, stacks: Mapping[str, int]) -> Tensor | None:
    """A tensor's gradient by expert (experts, numbers); None: it is not one of several experts'."""
    for stack, experts in stacks.items():
        if name == stack:
            return gradient.flatten(1)
        if name.startswith(stack.rpartition(".")[0] + ".") and "lora_" in name:
            if "lora_A" in name and len(gradient) % experts == 0:
                return gradient.reshape(experts, -1)
            if "lora_B" in name and gradient.ndim == 2 and gradient.shape[1] % experts == 0:
                return gradient.reshape(len(gradient), -1, experts).movedim(-1, 0).flatten(1)
    return None


def stacks_of(model: nn.Module) -> dict[str, int]:
    """Stacked parameters of experts, by name: how many experts."""
    found = {}
    for path, module in unwrapped(model).named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p.ndim == 3 and len(p) > 1 and not isinstance(module, _CONVOLUTIONS):
                # an adapter's own name is that of the module which it wraps
                found[f"{re.sub(r'([.]base_layer)+$', '', path)}.{name}"] = len(p)
    return found


_CONVOLUTIONS = (nn.modules.conv._ConvNd,)

_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.")


def experts_reached(
    model: nn.Module,
    step: Gradients,
    exact: Gradients,
    eager: Gradients,
    expected: Sequence[str],
) -> tuple[AuditFinding, set[str]]:
    """Whether each expert with tokens gets a gradient; and the tensors that fail.

    It has tokens if it has in ``exact`` and in ``eager``: rounding may send them elsewhere.
    """
    stacks = stacks_of(model)
    names = [name for name, _ in unwrapped(model).named_parameters()]
    has_modules = any(_EXPERT.match(name) for name in names)
    if not stacks and not has_modules:
        return AuditFinding("experts-reached", "skipped", "the model has no experts"), set()
    frozen = _frozen_experts(model, stacks)
    if frozen and not expected:
        reason = (
            f"{len(frozen)} tensors of experts are frozen, and the rest of their layers is trained"
        )
        return AuditFinding("experts-reached", "fail", reason, tuple(frozen)), set()
    routed = reached = 0
    failed: dict[str, list[int]] = {}
    by_module: dict[tuple[str, int], list[bool]] = defaultdict(lambda: [False, False])
    tensors: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, truth in exact.items():
        if truth is None:
            continue
        g = step.get(name)
        if match := _EXPERT.match(name):
            key = match[1], int(match[2])
            by_module[key][0] |= bool(truth.any()) and _some(eager.get(name))
            by_module[key][1] |= _some(g)
            tensors[key].append(name)
            continue
        parts = expert_parts(name, truth, stacks)
        if parts is None:
            continue
        there, got = parts.any(1), _reached(name, g, stacks, parts)
        there &= _reached(name, eager.get(name), stacks, parts)
        routed, reached = routed + int(there.sum()), reached + int((there & got).sum())
        if bool((there & ~got).any()):
            failed[name] = (there & ~got).nonzero().flatten().tolist()
    for key, (there_, got_) in by_module.items():
        routed, reached = routed + there_, reached + (there_ and got_)
        if there_ and not got_:
            failed |= {name: [key[1]] for name in tensors[key]}
    if not routed:
        return AuditFinding(
            "experts-reached", "skipped", "no tensor of an expert is trained"
        ), set()
    if not failed:
        return AuditFinding(
            "experts-reached", "pass", f"all {routed} experts' parts with tokens"
        ), set()
    first = next(iter(failed))
    reason = (
        f"{routed - reached} of {routed} experts' parts that tokens are routed to get no gradient "
        f"(experts {', '.join(map(str, failed[first][:8]))} of {first})"
    )
    return AuditFinding("experts-reached", "fail", reason, tuple(failed)), set(failed)


def _reached(name: str, gradient: Tensor | None, stacks: Mapping[str, int], like: Tensor) -> Tensor:
    """Which experts' parts of a gradient, cut as those in ``like``, are not zero."""
    parts = None if gradient is None else expert_parts(name, gradient.to(like.device), stacks)
    return torch.zeros_like(like[:, 0], dtype=torch.bool) if parts is None else parts.any(1)


def _frozen_experts(model: nn.Module, stacks: Mapping[str, int]) -> list[str]:
    """Tensors of experts that are frozen in a model whose other weights are trained."""
    inner: Any = unwrapped(model)
    if hasattr(inner, "peft_config") or inner is not core_of(model):
        return []
    experts: dict[str, bool] = {}
    others: dict[str, bool] = {}
    for name, p in inner.named_parameters():
        is_expert = name in stacks or _EXPERT.match(name)
        (experts if is_expert else others)[name] = p.requires_grad
    in_layers = [on for name, on in others.items() if re.search(r"\.\d+\.", name)]
    if not in_layers or sum(in_layers) < 0.9 * len(in_layers):
        return []
    return [name for name, on in experts.items() if not on]


def renamed(faults: Sequence[Fault], names: set[str], check: str) -> list[Fault]:
    """The faults; those of ``names`` under the name of the check that explains them."""
    return [replace(f, check=check) if f.name in names else f for f in faults]
