"""The three verbs: optimize a model, explain what was done, restore it.

The pipeline, top to bottom: ``regions.find`` says which callables are captured, ``install`` gives
them captured forwards, TorchDynamo hands each graph to ``backend.compile_graph`` at its first call,
the rules of ``passes.PIPELINE`` rewrite it, ``verify`` checks each rewrite before it is installed,
and ``codegen`` runs the result.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import OptimizeError
from ..kernels.fallback import FAILED
from ..kernels.native.library import start_for
from ..memory.budget import Budget
from ..memory.levels import allowed
from ..memory.meter import Meter
from ..memory.planner import Planner
from ..packages import untested_once
from ..passes import PIPELINE
from ..report import THE_MODEL, Bypass, Fallback, Report, Site
from ..rewrite.engine import Fuel
from ..rewrite.rule import Rule
from ..rewrite.verify import Verifier, quiet_randomness
from ..sharding import collectives_of
from ..upstream import changed
from . import regions
from .block_races import BlockRaces, raced_ops
from .calls.forwards import OUTER_COMPILE
from .codegen.choice import choose
from .codegen.cuda_graphs import CudaGraphs
from .copies.decoding import Decoding
from .graph_log import GraphLog, representative
from .install import active, install, replaced_by, split, uninstall
from .logits.reads import Reads
from .options import Codegen, Environment, Logits, Options, Verify
from .options import CudaGraphs as CudaGraphsMode
from .packs import ByRowsOnTrial
from .ranks.verdicts import SharedVerdicts
from .session import Choices, Session


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
    cuda_graphs: CudaGraphsMode = "off",
) -> Any:
    """Make a model's training step faster and leaner, in place, without changing its results.

    Graphs are captured at the first call, so this returns at once (unless ``strict``). Calling it
    again replaces the earlier choices, and captures anew.

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
        strict: capture now, and raise when a formula was refused or missed.
        compile_no_grad: let ``codegen`` also run blocks that are called without gradients, which
            otherwise run in eager code. Then both round alike: a loss that compares a model with
            a reference in bfloat16 sees their difference alone. It costs a second compilation.
        packs: a row holds several samples wherever its ``position_ids`` start again, also in models
            whose attention does not look for that (GPT-OSS, Qwen2.5-VL, OPT): their masks keep the
            samples apart; and in those with layers of another kind that let samples see each other
            (RWKV, MiniMax, RecurrentGemma): what these are is found by a few calls with some
            tokens, and they run over the samples as rows of a batch. Without it only models with
            recurrent layers that are known by how these are called do so.
        cuda_graphs: on an NVIDIA GPU, compiled blocks (``codegen``) can be launched as CUDA graphs,
            one call in place of one for each kernel: ``"auto"`` where that is faster, which is
            measured, ``"on"`` wherever they can be captured, ``"off"`` nowhere; off until they have
            run on a card.

    Returns:
        The same object.

    Raises:
        TypeError: ``model`` is no module, or one of ``passes`` is no rule.
        AttributeError: a rule's pattern asks for an operation that there is none of.
        ValueError: an option has no such value.
        OptimizeError: ``strict`` found a gap; the message lists all of them.
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
        warnings.warn(
            f"optimize: {_NOTHING_FOUND} in {type(model).__name__}: nothing will be rewritten",
            stacklevel=2,
        )
    start_for(model.parameters())
    choices = _choices(model, captured, options, environment)
    if packs:
        _find_by_rows(model, captured, choices)
    session = Session(choices)
    install(captured, session)
    for region in captured:
        if choices.by_rows.reason(region.module) is not None:
            choices.by_rows.hold(region.module)
            split(region.module, session)
    if strict and choices.by_rows.problem:
        raise OptimizeError(choices.by_rows.problem)
    if strict:
        _require_no_gaps(explain(model), session)
    return model


_NOTHING_FOUND = "no repeated decoder blocks were found"


def _find_by_rows(model: nn.Module, captured: Sequence[regions.Region], choices: Choices) -> None:
    """Find which modules are to be run over the samples of a row, by calls with a few tokens."""
    # other processes would have to call it, too; and meta and fake tensors have no values
    if choices.fake or collectives_of(model) or any(p.is_meta for p in model.parameters()):
        choices.by_rows.problem = (
            "whether samples that share a row see each other was not tried: the model is sharded, "
            "or its weights have no values"
        )
        return
    trial = ByRowsOnTrial()
    install(captured, Session(replace(choices, by_rows=trial)))
    try:
        trial.find(model, captured)
    finally:
        restore(model)
    choices.by_rows.places.update(trial.places)
    choices.by_rows.problem = trial.problem
    if trial.problem:
        warnings.warn(f"optimize(packs=True): {trial.problem}", stacklevel=3)


def _choices(
    model: nn.Module, found: Sequence[regions.Region], options: Options, environment: Environment
) -> Choices:
    blocks = [r.module for r in found if r.kind == "block"]
    codegen = choose(options.codegen, blocks)
    planner = _planner(model, blocks, options.memory, codegen[0])
    graphs = CudaGraphs(options.cuda_graphs, lambda: len(planner.blocks))
    planner.pooled = graphs.may_serve(planner.meter.device, codegen[0])
    fake = any(isinstance(p, FakeTensor) for p in model.parameters())
    rules = [r.name for r in options.passes if r.name not in environment.disable]
    about = codegen[0], rules, options.memory, options.verify, options.cuda_graphs, environment.fuel
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
        split=split,
        fake=fake,
        decoding=_decoding(options, environment),
        graphs=graphs,
        races=BlockRaces(None if fake else planner, about),
    )


def _decoding(options: Options, environment: Environment) -> Decoding:
    """Where the rule ``attention`` is on, generation has the op, too."""
    rules = {r.name for r in options.passes} - set(environment.disable)
    return Decoding("attention" in rules, options.verify)


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
    for module in model.modules():
        record = active(module)
        if record is not None:
            record.session.choices.graphs.release()
        uninstall(module)
    return model


def explain(model: nn.Module) -> Report:
    """Say what was rewritten in ``model``, what was not, and why.

    If nothing has been captured yet, one tiny forward and backward runs first. Gradients and the
    random state are left untouched. It does not run where it would wait for other processes, in a
    model that is sharded or wrapped for several: that is explained after its first step.

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
        with session.choices.races.suspended():
            bypasses += _captured(model, lambda: _heads_wait(places, log))
    if log.outer_compile:
        bypasses.append(Bypass("", OUTER_COMPILE))
    if session.choices.by_rows.problem:
        bypasses.append(Bypass("", session.choices.by_rows.problem))
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
        if (decoded := session.choices.decoding.findings.get(module)) is not None:
            sites.append(_site(path, decoded))
        if (other := replaced_by(module)) is not None:
            reason = f"{other} was put in the place of its forward, and may or may not call it"
            bypasses.append(Bypass(path, reason))
        reasons = log.notes.get(module, {})
        if (apart := session.choices.by_rows.reason(module)) is not None:
            reasons = {apart: False, **reasons}
        bypasses += [Bypass(path, reason, faster) for reason, faster in reasons.items()]
        if record.kind == "head":
            bypasses += [Bypass(path, reason) for reason in log.reads.reasons()]
    captured = {id(g) for _, m, _ in places for g in log.graphs.get(m, [])}
    run = [record.kind for _, m, record in places if log.graphs.get(m)]
    choice = f"{session.choices.codegen[0]} ({session.choices.codegen[1]})"
    planner, races = session.choices.planner, session.choices.races
    ops = [] if session.choices.fake else raced_ops(planner.meter.device)
    return Report(
        tuple(sites), tuple(bypasses), len(run), len(captured), choice,
        planner.describe() if "block" in run else "", reads,
        tuple(starmap(Fallback, FAILED.items())), tuple(map(str, races.choices.values())),
        tuple(session.choices.graphs.describe()), tuple(map(str, ops)),
        races.pending() if sites else "",
    )  # fmt: skip


def _captured(model: nn.Module, heads_wait: Callable[[], bool]) -> list[Bypass]:
    """Capture by tiny steps what has not run; returns why that was not possible, if it was not."""
    waits = collectives_of(model)
    if waits is not None:
        return [
            Bypass(
                "",
                f"it is explained after its first step: {waits}, so that a call by explain would "
                "wait for the other ranks. Train a step on all of them, then explain the model",
            )
        ]
    try:
        _tiny_step(model)
        if heads_wait():
            _tiny_step(model)  # a head that calls the blocks itself is captured the second time
    except Exception as error:  # a model may want other inputs; explaining must not crash
        reason = f"the tiny step of explain failed ({type(error).__name__}: {error}); "
        return [Bypass("", f"{reason}call the model once yourself, then explain it")]
    return []


def _heads_wait(places: Sequence[tuple[str, nn.Module, Any]], log: GraphLog) -> bool:
    return any(r.kind == "head" and not log.has_run(m) for _, m, r in places)


def _join(path: str, home: str) -> str:
    return ".".join(p for p in (path, home) if p)


def _site(path: str, f: Any) -> Site:
    return Site(
        _join(path, f.home), f.rule, f.op, f.status, f.reason, f.formulas, **asdict(f.figures)
    )


def _tiny_step(model: nn.Module) -> None:
    """One small forward and backward, so that there is something to report on."""
    embedding = regions.input_embeddings(model)
    if embedding is None:
        return
    weight = next(embedding.parameters())
    with quiet_randomness(), torch.enable_grad():
        ids = torch.arange(22, device=weight.device).reshape(2, 11) % weight.shape[0]
        inputs = {"input_ids": ids, **_tiny_labels(model, ids)}
        try:
            outputs = model(**inputs, use_cache=False)
        except TypeError:  # a model without a cache has no such argument
            outputs = model(**inputs)
        parameters = [p for p in model.parameters() if p.requires_grad]
        # an output class has the loss by name, a tuple has it first; without one, scores or states
        # are first
        loss = outputs[0] if isinstance(outputs, tuple) else getattr(outputs, "loss", None)
        loss = loss if "labels" in inputs and loss is not None else outputs[0].sum()
        if isinstance(loss, Tensor) and loss.requires_grad and loss.dim() == 0 and parameters:
            torch.autograd.grad(loss, parameters, allow_unused=True)


def _tiny_labels(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Labels for a tiny step, by the kind of loss that transformers notes in a model."""
    kind = next(filter(None, (getattr(m, "loss_type", None) for m in model.modules())), None)
    if kind == "ForSequenceClassification":  # which would note the kind of labels for all calls
        return {}
    return {"labels": torch.zeros_like(ids) if kind == "ForTokenClassification" else ids}


def _require_no_gaps(report: Report, session: Session) -> None:
    gaps = [f"{s.module or THE_MODEL}: {s.rule} {s.status}: {s.reason}" for s in report.gaps()]
    gaps += [f"{type(m).__name__}: {reason}" for m, reason in session.log.failed.items()]
    if not report.sites:
        gaps += [f"{b.module or THE_MODEL}: {b.reason}" for b in report.bypasses]
    if gaps:
        raise OptimizeError(
            "strict=True, and these places run as they were:\n  "
            + "\n  ".join(dict.fromkeys(gaps))
            + "\nPass strict=False to accept them; explain(model) lists them."
        )
