"""Recommends keys with which a recipe fits, or runs faster; and compares other methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import RecipeError
from ..recipe.load import check
from ..recipe.recipe import Recipe
from .cards import Card
from .count.layout import ProcessLayout
from .count.network import traffic
from .estimate import TrainingJob, estimate
from .search import fits, limits
from .speed import speed

MakeJob = Callable[[Recipe], TrainingJob]
"""Takes a step of another method's model; slow."""

_METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter": None, "load_in_4bit": False, "load_in_8bit": False},
    "LoRA": {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": False},
    "QLoRA": {"adapter": "qlora", "load_in_4bit": True, "load_in_8bit": False},
}
_WORTH = 0.97
"""Advice has to save at least three seconds of a hundred."""

_EVERY_LINEAR = {"lora_target_linear": True, "lora_r": 16, "lora_alpha": 32}
_FSDP = {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}


@dataclass(frozen=True)
class Advice:
    """Recommended changes.

    Attributes:
        keys: of a recipe, to be changed; empty: leave it as it is.
        columns: ways to share the work.
        table: for each method and each way, the peak where blocks keep all and where they keep
            least, in bytes, and whether that fits.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    columns: tuple[str, ...] = ()
    table: dict[str, list[tuple[int, int, bool]]] = field(default_factory=dict)


def advise(
    job: TrainingJob, recipe: Recipe, layout: ProcessLayout, card: Card, make: MakeJob
) -> Advice:
    """What to change, and how other methods compare; ``make`` takes their steps."""
    jobs, room = dict(_jobs(job, recipe, make)), card.memory
    layouts = _layouts(layout.world)
    table = {
        method: [_cell(other, way, room) for way in layouts.values()]
        for method, other in jobs.items()
    }
    if fits(job, layout, room):
        advice = faster(job, recipe, layout, card)
    else:
        advice = _leaner(jobs, recipe, layout, room)
    return replace(advice, columns=tuple(layouts), table=table)


def method_of(recipe: Recipe) -> str:
    """``full``, ``LoRA`` or ``QLoRA``."""
    if recipe.adapter is None:
        return "full"
    return "QLoRA" if recipe.load_in_4bit or recipe.load_in_8bit else "LoRA"


def _jobs(job: TrainingJob, recipe: Recipe, make: MakeJob) -> Iterator[tuple[str, TrainingJob]]:
    """The job of each method: LoRA's step serves QLoRA, too."""
    current = method_of(recipe)
    adapted = job if current != "full" else make(recipe.model_copy(update=_changes("LoRA", recipe)))
    for method in _METHODS if job.blueprint.stored is None else (current,):
        if method == current:
            yield method, job
        elif method == "full":
            yield method, make(recipe.model_copy(update=_METHODS["full"]))
        else:
            yield method, adapted.with_bits(4 if method == "QLoRA" else None)


def _changes(method: str, recipe: Recipe) -> dict[str, Any]:
    """The keys that make a recipe one of another method."""
    targets = recipe.lora_target_linear or recipe.lora_target_modules
    added = {} if method == "full" or targets else _EVERY_LINEAR
    return {**_METHODS[method], **added}


def _layouts(world: int) -> dict[str, ProcessLayout]:
    if world == 1:
        return {"one process": ProcessLayout("one process")}
    layouts = {
        "DDP": ProcessLayout("DDP", world, replicate=world),
        "FSDP2": ProcessLayout("FSDP2", world, shard=world),
        "ZeRO-1": ProcessLayout("ZeRO-1", world),
        "ZeRO-2": ProcessLayout("ZeRO-2", world),
        "ZeRO-3": ProcessLayout("ZeRO-3", world, shard=world),
    }
    if world % 2 == 0 and world > 2:
        shard = min(8, world // 2)
        layouts["HSDP"] = ProcessLayout("HSDP", world, shard=shard, replicate=world // shard)
    return layouts


def _cell(job: TrainingJob, layout: ProcessLayout, room: int) -> tuple[int, int, bool]:
    levels = job.all_levels()
    largest = estimate(job, layout, None, level=levels[0]).peak
    least = min(estimate(job, layout, None, level=v).peak for v in levels)
    return largest, least, fits(job, layout, room)


def faster(job: TrainingJob, recipe: Recipe, layout: ProcessLayout, card: Card) -> Advice:
    """For a run that fits: the same batch in fewer, larger passes, where that takes less time."""
    passes = recipe.accumulation()
    best, advice = _WORTH * _seconds(job, layout, card, 1), Advice()
    for factor in (f for f in range(2, passes + 1) if passes % f == 0):
        if not fits(replace(job, passes=passes // factor), layout, card.memory, factor):
            break
        seconds = _seconds(job, layout, card, factor)
        if seconds < best:
            keys = {
                "micro_batch_size": recipe.micro_batch_size * factor,
                "gradient_accumulation_steps": passes // factor,
            }
            best, advice = seconds, Advice(keys, "the same batch in fewer passes takes less time")
    return advice


def _seconds(job: TrainingJob, layout: ProcessLayout, card: Card, factor: int) -> float:
    """Of an optimizer step with micro batches ``factor`` times as large, and as many fewer."""
    larger = replace(job, passes=job.passes // factor)
    memory = estimate(larger, layout, card.memory, factor)
    tokens = job.step.tokens * factor
    sent = traffic(job.units, layout, larger.passes, tokens, job.hidden)
    return speed(larger, memory, layout, sent, card, factor).seconds


def _leaner(
    jobs: dict[str, TrainingJob], recipe: Recipe, layout: ProcessLayout, room: int
) -> Advice:
    """For a run that does not fit: the smallest change after which it does."""
    for keys, job, way in _candidates(jobs, recipe, layout):
        if keys and fits(job, way, room) and _is_valid(recipe, keys):
            return Advice(keys, "with these it fits")
    smaller = _fewer_tokens(jobs[method_of(recipe)], recipe, layout, room)
    return Advice(smaller, "with fewer tokens at a time it fits") if smaller else Advice()


def _candidates(
    jobs: dict[str, TrainingJob], recipe: Recipe, layout: ProcessLayout
) -> Iterator[tuple[dict[str, Any], TrainingJob, ProcessLayout]]:
    """Keys to change, and the changed run: what changes least comes first."""
    current, order = method_of(recipe), list(_METHODS)
    layouts: list[tuple[ProcessLayout, dict[str, Any]]] = [(layout, {})]
    if layout.engine == "DDP":
        world = layout.world
        layouts.append((ProcessLayout("FSDP2", world, shard=world), _FSDP))
    for method in (m for m in order[order.index(current) :] if m in jobs):
        keys = {} if method == current else _written(method, recipe)
        for way, more in layouts:
            for lean in ({}, {"memory": "auto"}):
                job = replace(jobs[method], memory=lean.get("memory", jobs[method].memory))
                yield {**keys, **more, **lean}, job, way


def _is_valid(recipe: Recipe, keys: dict[str, Any]) -> bool:
    values = recipe.model_dump(mode="json", exclude_unset=True, exclude={"consent"})
    try:
        check({**values, **keys}, with_data=False)
    except RecipeError:
        return False
    return True


def _written(method: str, recipe: Recipe) -> dict[str, Any]:
    """The keys of another method, as in a recipe."""
    keys = {"adapter": _METHODS[method]["adapter"], **_changes(method, recipe)}
    return {key: value for key, value in keys.items() if value not in (None, False)}


def _fewer_tokens(
    job: TrainingJob, recipe: Recipe, layout: ProcessLayout, room: int
) -> dict[str, Any]:
    lean = replace(job, memory="auto")
    rows = recipe.micro_batch_size
    passes = recipe.accumulation() * rows
    if rows > 1 and fits(replace(lean, passes=passes), layout, room, 1 / rows):
        return {"memory": "auto", "micro_batch_size": 1, "gradient_accumulation_steps": passes}
    longest = limits(lean, recipe, layout, room).longest_sequence
    return {"memory": "auto", "sequence_len": longest} if longest else {}
