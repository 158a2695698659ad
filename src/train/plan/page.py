"""A plan as text."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from ...memory.levels import Level
from ..terminal import say
from .cards import GIB
from .engines import which_engines
from .plan import RunPlan
from .recommend import Advice

_KEPT: dict[Level, str] = {
    "all": "keep all that their operations keep",
    "products": "keep matrix products",
    "input": "keep their input",
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
    "slack": "what the allocator cannot use again",
}


def show(plan: RunPlan, console: Console) -> None:
    """Print a plan.

    Args:
        plan: what was found.
        console: where to print.
    """
    advice = plan.advice
    say(console, _model(plan))
    say(console, f"rewritten formulas: {', '.join(sorted(plan.rewrites)) or 'none'}")
    for path, reason in plan.uncaptured.items():
        say(console, f"runs as it is: {path}, and blocks like it: {reason}")
    console.print(_parts(plan))
    for line in (_verdict(plan), *_limits(plan), *_work(plan)):
        say(console, line)
    if advice.table:
        console.print(_comparison(advice))
    if advice.keys:
        say(console, f"\nrecommended: {advice.reason}")
        for key, value in advice.keys.items():
            say(console, f"  {key}: {value}")
    model_type = str(getattr(plan.model_config, "model_type", "this model"))
    say(console, "\n" + which_engines(plan.recipe, plan.layout, model_type, not plan.on_cpu))
    say(console, assumptions(plan))


def verdict_lines(plan: RunPlan) -> list[str]:
    """Whether it fits, what would fit, and how long a step takes."""
    changes = [f"{key}: {value}" for key, value in plan.advice.keys.items()]
    advice = [f"{plan.advice.reason}: {', '.join(changes)}"] if changes else []
    return [_verdict(plan), *_limits(plan), *_work(plan), *advice]


def _model(plan: RunPlan) -> str:
    share = plan.trained / plan.parameters
    method = _method(plan)
    return (
        f"{plan.recipe.base_model}: {_count(plan.parameters)} parameters in {plan.depth} blocks, "
        f"{_count(plan.trained)} trained ({share:.2%}, {method}); {plan.devices}, "
        f"{plan.layout.engine}"
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
        table.add_row("on the host", _gib(plan.memory.host), "offloaded weights, states and inputs")
    return table


def _verdict(plan: RunPlan) -> str:
    has = plan.devices.card.memory
    says = "fits" if plan.fits else "DOES NOT FIT"
    kept = "; ".join(f"{n} blocks {_KEPT[level]}" for level, n in plan.memory.levels.items())
    return f"{says}: {_gib(plan.memory.peak)} of {_gib(has)} GiB on each of {plan.devices}; {kept}"


def _limits(plan: RunPlan) -> list[str]:
    found = plan.limits
    name = plan.devices.card.name
    card = f"{found.smallest_card} GiB" if found.smallest_card else "none of the known cards"
    smallest = f"smallest that fits: {card} for each process"
    if not plan.on_cpu:
        number = found.fewest_devices
        fewest = f"{number} of {name}" if number else f"no number of {name} as it is shared"
        smallest = f"smallest that fits: {plan.devices.count} of {card}, or {fewest}"
    if not found.longest_sequence:
        return [smallest]
    read = " (what the model has learnt to read)"
    by_model = read if found.longest_sequence == found.positions else ""
    most = (
        f"with micro_batch_size {plan.recipe.micro_batch_size}, sequence_len up to "
        f"{found.longest_sequence:,}{by_model}; with sequence_len {plan.recipe.sequence_len:,}, "
        f"micro_batch_size up to {found.largest_micro_batch:,}"
    )
    return [smallest, most]


def _work(plan: RunPlan) -> list[str]:
    s = plan.speed
    lines = [
        f"each optimizer step: {s.tokens:,} tokens in all; {s.flops / 1e12:,.2f} TFLOP and "
        f"{_gib(s.sent)} GiB sent by each process",
        f"about {s.seconds:,.2f} s per step ({s.compute_seconds:,.2f} computing, "
        f"{s.network_seconds:,.2f} sending), {s.tokens_per_second:,.0f} tokens/s",
    ]
    if plan.hours is not None and plan.steps is not None:
        by_size = " (by the size of the rows' files)" if plan.steps_are_estimated else ""
        lines.append(
            f"the run: {plan.steps:,} steps{by_size}, {plan.steps * s.tokens / 1e6:,.2f} M tokens, "
            f"about {plan.hours:,.1f} h"
        )
    else:
        hours = 1e6 / s.tokens_per_second / 3600
        lines.append(f"a million tokens: about {hours:,.2f} h")
    return lines


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
    return f"{_gib(most)} / {_gib(least)}{'' if fits else ' no'}"


def assumptions(plan: RunPlan) -> str:
    """What a plan takes for granted."""
    card = plan.devices.card
    said = "every token is trained, sequences are full"
    if plan.on_cpu:
        return f"assumed: {said}; the rate of matrix products was measured here"
    like = " of a card that is as large" if card.assumed else ""
    if plan.recipe.optimizer.startswith(("galore", "apollo")):
        said += f"; {plan.recipe.optimizer} keeps what AdamW does"
    return (
        f"assumed: {said}; 45% of the peak{like} ({card.flops / 1e12:,.0f} TFLOP/s in bf16), "
        f"{(card.link if plan.devices.count <= 8 else card.network) / 1e9:,.0f} GB/s between cards"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,}"
