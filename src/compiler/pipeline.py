"""The three verbs: optimize a model, explain what was done, restore it.

The pipeline, top to bottom: ``regions.find`` says which callables are captured, ``install`` gives
them captured forwards, TorchDynamo hands each graph to ``backend.compile_graph`` at its first call,
the rules of ``passes.PIPELINE`` rewrite it, ``verify`` checks each rewrite before it is installed,
and ``codegen`` runs the result.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from itertools import starmap
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import OptimizeError
from ..kernels.choice import choices
from ..kernels.fallback import FAILED
from ..kernels.native.library import start_for
from ..memory.budget import Budget
from ..memory.levels import allowed
from ..memory.meter import Meter
from ..memory.planner import Planner
from ..packages import untested_once
from ..passes import PIPELINE
from ..report import Bypass, Fallback, Report, Site
from ..rewrite.engine import Fuel
from ..rewrite.rule import Rule
from ..rewrite.verify import Verifier
from ..upstream import changed
from . import hub_kernels, regions
from .calls.forwards import OUTER_COMPILE
from .choices import Choices
from .codegen.choice import choose
from .graph_log import representative
from .install import active, install, installed, replaced_by, split, uninstall
from .logits.reads import Reads
from .options import Codegen, Environment, Logits, Options, Verify
from .packs import unpackable
from .ranks.verdicts import SharedVerdicts
from .session import Session
from .small_blocks import SmallBlocks


def optimize(
    model: nn.Module,
    *,
    passes: Sequence[Rule] = PIPELINE,
    codegen: Codegen = "auto",
    memory: str = "speed",
    logits: Logits = "lazy",
    verify: Verify = "first",
    strict: bool = False,
    compile_no_grad: bool = False,
    packs: bool = False,
    cuda_graphs: bool = False,
) -> Any:
    """Make a model's training step faster and leaner, in place, without changing its results.

    Graphs are captured at the first call, so this returns at once. Calling it again replaces the
    earlier choices, and captures anew.

    Args:
        model: a decoder model of transformers, plain or wrapped by PEFT (before or after).
        passes: the rewrite rules, in order; ``[*PIPELINE, MyRule()]`` adds one.
        codegen: what runs the nodes that no rule claimed: ``"eager"``, ``"inductor"`` (one
            compilation, shared by all blocks), or ``"auto"``.
        memory: what blocks keep between forward and backward. ``"speed"``: what makes the step
            fastest; ``"min"``: their input, and everything else is computed again; a size such as
            ``"8GB"``: as much as a training step may keep without the process (on a GPU: the
            tensors on it) taking more than that; ``"auto"``: as much as the device has memory for.
        logits: ``"lazy"``: in training, ``outputs.logits`` is computed when it is read, and what
            losses need of it in tiles; ``"always"``: it is computed at once.
        verify: ``"first"`` runs each distinct rewrite against what it replaces before it is
            installed, ``"always"`` every one, ``"off"`` none.
        strict: raise ``OptimizeError`` from the first call whose graph cannot be captured, or has a
            formula that was refused or missed.
        compile_no_grad: let ``codegen`` also run blocks that are called without gradients, which
            otherwise run in eager code. Then both round alike: a loss that compares a model with
            a reference in bfloat16 sees their difference alone. It costs a second compilation.
        packs: a row holds several samples wherever its ``position_ids`` start again, also in models
            whose attention ignores that (GPT-OSS, Qwen2.5-VL, OPT): their masks are made from the
            positions. A model with layers that mix positions and take no segments is refused.
            Without it, only models with scans or short convolutions keep their samples apart.
        cuda_graphs: on an NVIDIA GPU, let Inductor launch compiled blocks as CUDA graphs (its
            option ``triton.cudagraphs``). What a block returns is then valid until the next step.

    Returns:
        The same object.

    Raises:
        TypeError: ``model`` is no module, or one of ``passes`` is no rule.
        AttributeError: a rule's pattern asks for an operation that there is none of.
        ValueError: an option has no such value.
        OptimizeError: ``strict``, and ``model`` has no repeated blocks, or PyTorch has changed; or
            ``packs``, and samples that share a row would see each other.
    """
    _require_module(model, "optimize")
    _require_rules(passes)
    options = Options(
        tuple(passes), codegen, memory, logits, verify, strict, compile_no_grad, packs, cuda_graphs
    )
    environment = Environment.read()
    restore(model)
    if (reason := changed("the compiler")) is not None:
        if strict:
            raise OptimizeError(reason)
        warnings.warn(f"the model runs as it was: {reason}", stacklevel=2)
        return model
    if (message := untested_once()) is not None:
        warnings.warn(message, stacklevel=2)
    captured = regions.find(model)
    if not captured:
        nothing = f"{_NOTHING_FOUND} in {type(model).__name__}: nothing will be rewritten"
        if strict:
            raise OptimizeError(nothing)
        warnings.warn(f"optimize: {nothing}", stacklevel=2)
    if packs and (reason := unpackable(model)):
        raise OptimizeError(
            f"packs=True: samples that share a row would see each other: {reason}; do not pack "
            "rows for this model, and leave packs=True out"
        )
    start_for(model.parameters())
    hub_kernels.switch_off(model)
    choices = _choices(model, captured, options, environment)
    session = Session(choices, split=split)
    install(captured, session)
    return model


NOT_CALLED = "nothing was captured yet: call the model once, as in training, then explain it"
"""The reason in the report of a model that was not called since ``optimize``."""

_NOTHING_FOUND = "no repeated decoder blocks were found"


def _choices(
    model: nn.Module, found: Sequence[regions.Region], options: Options, environment: Environment
) -> Choices:
    blocks = [r.module for r in found if r.kind == "block"]
    codegen = choose(options.codegen, blocks)
    planner = _planner(model, blocks, options.memory, codegen[0])
    fake = any(isinstance(p, FakeTensor) for p in model.parameters())
    return Choices(
        options,
        environment,
        codegen,
        Verifier(
            options.verify == "always",
            codegen[0] == "inductor",
            SharedVerdicts(keeps=environment.keeps_verdicts),
        ),
        Fuel(environment.fuel),
        planner,
        fake=fake,
        small_blocks=SmallBlocks(
            not (fake or environment.optimizes_small) and planner.budget.mode in ("speed", "auto")
        ),
    )


def _planner(model: nn.Module, blocks: Sequence[nn.Module], memory: str, choice: str) -> Planner:
    device = next((p.device for b in blocks for p in b.parameters()), torch.device("cpu"))
    parts = weakref.ref(model), weakref.WeakSet(blocks), Meter(device)
    levels = allowed(choice, host=device.type == "cuda", formulas=True)
    return Planner(Budget.parse(memory), *parts, levels)


def planner_of(model: nn.Module) -> Planner | None:
    """The planner of an optimized model, or None: for a trainer, to repeat a first step."""
    session = _session_of(model)
    return None if session is None else session.choices.planner


def reads_of(model: nn.Module) -> Reads | None:
    """What is counted of reads of an optimized model's logits, or None: for an audit."""
    session = _session_of(model)
    return None if session is None else session.log.reads


def _session_of(model: nn.Module) -> Session | None:
    records = (active(m) for m in model.modules())
    return next((record.session for record in records if record), None)


def _require_rules(passes: Sequence[Rule]) -> None:
    """Raise what is wrong with a rule now: inside a capture it would only end the capture."""
    for rule in passes:
        if not isinstance(rule, Rule):
            raise TypeError(f"passes holds {rule!r}, which is no instance of Rule")
        rule.compiled()


def _require_module(model: Any, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module, not {type(model).__name__}")


def restore(model: nn.Module) -> Any:
    """Give every module of ``model`` its original forward back, exactly; returns ``model``.

    A model that was not optimized is left as it is; a TypeError is raised for what is no module.
    """
    _require_module(model, "restore")
    records = [record for m in model.modules() if (record := installed(m, wrapped=True))]
    for module in model.modules():
        uninstall(module)
    for session in {r.session for r in records if r.session.choices.planner.model() is model}:
        # a function in the place of a forward may call that of a module that the model had
        session.log.restored.update(session.log.graphs)
    hub_kernels.switch_on(model)
    return model


def explain(model: nn.Module) -> Report:
    """Report what was rewritten in ``model``, what was not, and why.

    Graphs are captured when the model is called, which this function never does: call the model
    once, as in training, and then explain it.

    Raises:
        TypeError: ``model`` is no module.
    """
    _require_module(model, "explain")
    places = [(path, m, record) for path, m in model.named_modules() if (record := active(m))]
    if not places:
        if (gone := changed("the compiler")) is not None:
            return Report((), (Bypass("", gone),))
        reason = "optimize(model) was not called, or restore(model) was called since"
        return Report((), (Bypass("", reason if regions.find(model) else _NOTHING_FOUND),))
    session = places[0][2].session
    log = session.log
    sites: list[Site] = []
    bypasses: list[Bypass] = []

    if not log.outer_compile and not any(log.has_run(m) for _, m, _ in places):
        bypasses.append(Bypass("", NOT_CALLED))
    if log.outer_compile:
        bypasses.append(Bypass("", OUTER_COMPILE))
    reads = log.reads.describe()  # of a loss outside of the model, such as TRL's
    for path, module, record in places:
        graph = representative(log.graphs.get(module, []))
        if graph is not None:
            sites += [_site(path, f) for f in graph.findings if f.status != "left"]
            bypasses += [
                Bypass(_join(path, f.home), f"{f.rule}: {f.reason}")
                for f in graph.findings
                if f.status == "left"
            ]
        elif record.kind == "head" and not (log.has_run(module) or log.outer_compile or reads):
            bypasses.append(Bypass(path, "no call with labels has been captured"))
        if (other := replaced_by(module)) is not None:
            reason = f"{other} was put in the place of its forward, and may or may not call it"
            bypasses.append(Bypass(path, reason))
        reasons = log.notes.get(module, {})
        bypasses += [Bypass(path, reason, faster) for reason, faster in reasons.items()]
        if record.kind == "head":
            bypasses += [Bypass(path, reason) for reason in log.reads.reasons()]
    captured = {id(g) for _, m, _ in places for g in log.graphs.get(m, [])}
    run = [record.kind for _, m, record in places if log.graphs.get(m)]
    choice = f"{session.choices.codegen[0]} ({session.choices.codegen[1]})"
    planner = session.choices.planner
    kernels = [] if session.choices.fake else choices(planner.meter.device)
    return Report(
        tuple(sites), tuple(bypasses), len(run), len(captured), choice,
        planner.describe() if "block" in run else "", reads,
        tuple(starmap(Fallback, FAILED.items())), tuple(map(str, kernels)),
    )  # fmt: skip


def _join(path: str, home: str) -> str:
    return ".".join(p for p in (path, home) if p)


def _site(path: str, f: Any) -> Site:
    return Site(
        _join(path, f.home), f.rule, f.op, f.status, f.reason, f.formulas, **asdict(f.figures)
    )
