"""The keys that no other engine has."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from ....memory.budget import Budget
from .base import Int, Keys, key


def _budget(value: Any) -> Any:
    try:
        return Budget.parse(value).text
    except ValueError:
        expected = "auto, speed, min, or the whole of what the process may use, such as 8GB"
        raise PydanticCustomError("budget", expected) from None


class FusewrightKeys(Keys):
    """Fusewright's own."""

    resumable = True

    optimize: bool = True
    """Rewrite the model's formulas (``fusewright.optimize``); false: train it as it is."""

    codegen: Literal["auto", "eager", "inductor"] = "auto"
    """What runs the operations that no rewrite claims."""

    memory: Annotated[str, BeforeValidator(_budget)] = "auto"
    """What blocks keep for backward: ``auto`` as much as the device has memory for, ``speed``
    everything, ``min`` only their inputs, or the whole budget of the process, such as ``8GB``
    (1 GB is 2^30 bytes)."""

    cuda_graphs: bool = False
    """Let Inductor launch compiled blocks as CUDA graphs."""

    strict: bool = False
    """Stop when a rewrite is refused or a known formula is missed. Unknown keys are always
    errors."""

    verbose: bool = False
    """Print the whole table of rewrites after training, not only how many there were."""

    audit: bool = True
    """Judge the training itself, after the first step and at the end: is what should be trained
    trained, with the gradients, the loss and the learning rates that it should have? Takes about
    the time of the first step, and changes nothing that is computed. See audit.md."""

    sample_prompt: str | None = None
    """A question that is answered before and after training. Unset: none."""

    sample_image: str | None = key(read_with=["sample_prompt"])
    """An image that ``sample_prompt`` is about: the path of its file. Unset: none."""

    sample_max_tokens: Int = key(64, gt=0)
    """Longest answer to ``sample_prompt``, in tokens."""
