"""Prints a plan."""

from __future__ import annotations

import math

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from ...memory.budget import GB, gigabytes
from ...memory.levels import Level
from ..recipe.preferences import preference_settings
from ..terminal import say
from .count.images import ImageUsage
from .engines import which_engines
from .estimate import SPARE
from .plan import RunPlan
from .recommend import Advice

_LEVEL_TEXT: dict[Level, str] = {
    "weights": "keep what is fastest, unpacked weights included",
    "all": "keep all that their operations keep",
    "products": "keep results of matrix products, and compute the rest again",
    "input": "keep their input, and compute the rest again",
    "tiles": "keep their input, with MLPs in tiles",
    "offload": "keep their input in host memory",
    "offload_tiles": "keep their input in host memory, with MLPs in tiles",
}

_MEANING = {
    "process": "interpreter and libraries, or the context of a GPU",
    "weights": "model and adapters",
    "gradients": "of the trainable parameters",
    "optimizer": "its states, and copies of the weights in 32 bits",
    "activations": "what blocks keep for backward, and hidden states around the head",
    "logits": "those that exist at one time",
    "working": "temporary memory of one block",
    "communication": "gathered weights, buckets",
    "verification": "with capture and code generation",
    "slack": "lost to fragmentation",
    "checkpoint": "the copy that async_save writes from",
}

_ON_HOST = "offloaded weights, states and inputs; the copy that async_save writes from"


def show(plan: RunPlan, console: Console) -> None:
    """Print a plan."""
    advice = plan.advice
    say(console, _model(plan))
    say(console, f"rewritten formulas: {', '.join(sorted(plan.rewrites)) or 'none'}")
    for path, reason in plan.uncaptured.items():
        say(console, f"runs as it is: {path}, and blocks like it: {reason}")
    if plan.images is not None:
        say(console, _images(plan.images))
    console.print(_parts(plan))
    for line in (_verdict(plan), *_beyond(plan), *_limits(plan), *_work(plan)):
        say(console, line)
    if advice.table:
        console.print(_comparison(advice))
    if advice.keys:
        say(console, f"\nrecommended: {advice.reason}")
        for line in yaml.safe_dump(advice.keys, sort_keys=False).splitlines():
            say(console, f"  {line}")
    model_type = str(getattr(plan.model_config, "model_type", "this model"))
    say(console, "\n" + which_engines(plan.recipe, plan.layout, model_type, not plan.on_cpu))
    say(console, assumptions(plan))


def verdict_lines(plan: RunPlan) -> list[str]:
    """Whether it fits, what would fit, and how long a step takes."""
    lines = [_verdict(plan), *_beyond(plan), *_limits(plan), *_work(plan)]
    if plan.images is not None:
        lines.insert(1, _images(plan.images))
    if plan.advice.keys:
        changes = yaml.safe_dump(plan.advice.keys, sort_keys=False).splitlines()
        lines += [f"{plan.advice.reason}:", *(f"  {line}" for line in changes)]
    return lines


def _model(plan: RunPlan) -> str:
    share = plan.trained / plan.parameters
    method = _method(plan)
    return (
        f"{plan.recipe.base_model}: {_count(plan.parameters)} parameters in {plan.depth} blocks, "
        f"{_count(plan.trained)} trained ({share:.2%}, {method}); {plan.devices}, "
        f"{plan.layout.engine}"
    )


def _images(images: ImageUsage) -> str:
    of = f"in the first {images.rows:,} rows, of at most {images.longest:,} tokens"
    of = of if images.rows else "ASSUMED, as no row is here"
    kept = f" and keep {gigabytes(images.kept)} outside of blocks" if images.kept else ""
    towers = f"hold up to {gigabytes(images.passing)} in forward{kept}"
    if images.why_not:
        towers = f"are NOT COUNTED: {images.why_not}"
    return (
        f"images: {images.images:,.2f} a row, for which {images.tokens:,.0f} tokens stand ({of}); "
        f"towers {towers}"
    )


def _method(plan: RunPlan) -> str:
    if plan.recipe.adapter is None:
        return "full fine-tuning"
    bits = 4 if plan.recipe.load_in_4bit else 8 if plan.recipe.load_in_8bit else None
    return f"LoRA over {bits}-bit weights" if bits else "LoRA"


def _parts(plan: RunPlan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("memory of each process", no_wrap=True)
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("what it is")
    for name, size in plan.memory.parts().items():
        if size:
            table.add_row(name, _gib(size), _MEANING[name])
    table.add_row("peak", _gib(plan.memory.peak), f"between steps {_gib(plan.between_steps)}")
    if plan.memory.host:
        table.add_row("on the host", _gib(plan.memory.host), _ON_HOST)
    return table


def _verdict(plan: RunPlan) -> str:
    has = plan.devices.card.memory
    blocks = "; ".join(
        f"{n} blocks {_LEVEL_TEXT[level]}" for level, n in plan.memory.levels.items()
    )
    room = f"the {gigabytes(SPARE * has)} that a run may take ({SPARE:.0%} of {gigabytes(has)})"
    if plan.fits:
        return f"fits: {gigabytes(plan.memory.peak)} of {room}; {blocks}"
    return f"DOES NOT FIT: {gigabytes(plan.memory.peak)} are more than {room}; {blocks}"


def _beyond(plan: RunPlan) -> list[str]:
    known, asked = plan.limits.positions, plan.recipe.sequence_len
    if known is None or asked <= known:
        return []
    return [
        f"warning: sequence_len: {asked:,} is more than the {known:,} positions of the model: rows "
        "that are longer use positions that it was not trained on"
    ]


def _limits(plan: RunPlan) -> list[str]:
    fit = plan.limits
    name, count = plan.devices.card.name, plan.devices.count
    card = f"{fit.smallest_card} GiB" if fit.smallest_card else "no known card is large enough"
    smallest = f"smallest common device memory that fits: {card}"
    if not plan.on_cpu:
        number = fit.fewest_devices
        fewest = f"fewest devices: {number}" if number else "more devices do not help"
        smallest = f"{smallest} (with {count}); {fewest} (of {name}, with {plan.layout.engine})"
    if not fit.longest_sequence:
        return [smallest]
    read = " (the model's max_position_embeddings)"
    by_model = read if fit.longest_sequence == fit.positions else ""
    largest = (
        f"with micro_batch_size {plan.recipe.micro_batch_size}, sequence_len up to "
        f"{fit.longest_sequence:,}{by_model}; with sequence_len {plan.recipe.sequence_len:,}, "
        f"micro_batch_size up to {fit.largest_micro_batch:,}"
    )
    return [smallest, largest]


_SMALL = 10**9
"""Parameters below which a GPU waits for the launches of kernels."""


def _work(plan: RunPlan) -> list[str]:
    s = plan.speed
    sent = f" and {gigabytes(s.sent)} sent" if s.sent else ""
    parts = f" ({_time(s.compute_seconds)} computing, {_time(s.network_seconds)} sending)"
    work = f"{s.flops / 1e12:,.{max(2, _decimals(s.flops / 1e12))}f} TFLOP{sent}"
    lines = [
        f"each optimizer step: {s.tokens:,} tokens in all; {work} by each process",
        f"about {_time(s.seconds)} for a step{parts if s.sent else ''} on a machine that does "
        f"nothing else, {float(f'{s.tokens_per_second:.2g}'):,.0f} tokens/s in all",
    ]
    if not plan.on_cpu and plan.parameters < _SMALL:
        lines.append("launching kernels is not counted: so small a model takes longer than that")
    if plan.hours is not None and plan.steps is not None:
        about, by_size = "", ""
        if plan.steps_are_estimated:
            about, by_size = "about ", " (by the size of the rows' files)"
        compiling = " besides compiling in the first one" if plan.recipe.optimize else ""
        lines.append(
            f"the run: {about}{plan.steps:,} steps{by_size}, {_count(plan.steps * s.tokens)} "
            f"tokens, about {_time(3600 * plan.hours)}{compiling}"
        )
    else:
        lines.append(
            f"a million tokens: about {_time(1e6 / s.tokens_per_second)} (how many the run has is "
            "not known: max_steps is unset, and not all rows are in plain files on this machine)"
        )
    return lines


def _time(seconds: float) -> str:
    """``0.047 s``, ``12 s``, ``4 min``, ``5.1 h`` or ``3.2 days``: estimates have two digits."""
    for size, unit, digits in ((86400 * 2, "days", 1), (3600 * 2, "h", 1), (120, "min", 0)):
        if seconds >= size:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:,.{digits}f} {unit}"
    return f"{seconds:.{_decimals(seconds)}f} s"


def _decimals(number: float) -> int:
    """The decimals that give a number two digits."""
    return max(0, 1 - math.floor(math.log10(number))) if number > 0 else 0


def _comparison(advice: Advice) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("GiB, memory: speed / least", no_wrap=True)
    for name in advice.columns:
        table.add_column(name, justify="right", no_wrap=True)
    for method, cells in advice.table.items():
        table.add_row(method, *(_cell(*cell) for cell in cells))
    return table


def _cell(most: int, least: int, fits: bool) -> str:
    """The peak where blocks keep all, and where they keep least."""
    return f"{_gib(most)} / {_gib(least)}{'' if fits else ' (does not fit)'}"


def assumptions(plan: RunPlan) -> str:
    """The assumptions of a plan."""
    card = plan.devices.card
    data = "every token is trained, sequences are full"
    settings = preference_settings(plan.recipe)
    if settings is not None and settings.rows == "prompts":
        data += "; the generation of completions is not counted"
    if plan.on_cpu:
        return f"assumed: {data}; the rate of matrix products was measured here"
    like = " of a card that is as large" if card.assumed else ""
    if plan.recipe.optimizer.startswith(("galore", "apollo")):
        data += f"; {plan.recipe.optimizer} keeps what AdamW does"
    between = ""
    if plan.devices.count > 1:
        link = card.link if plan.devices.count <= 8 else card.network
        between = f", {link / 1e9:,.0f} GB/s between cards"
    peak = f"{card.flops / 1e12:,.0f} TFLOP/s in {'bf16' if card.bfloat16 else 'fp16'}"
    return f"assumed: {data}; 45% of the peak{like} ({peak}){between}"


def _gib(size: float) -> str:
    return f"{size / GB:,.2f}"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,}"
