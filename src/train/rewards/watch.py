"""What nothing is learnt from: completions that no reward judges, and rewards that are equal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...errors import RewardError
from ..processes.world import World
from .judge import Judge

SEVERAL = 5
"""Logged steps after which it is said that rewards do not differ."""


def require_judged(judges: Sequence[Judge], rewards: Tensor, world: World) -> None:
    """See that any completion has a reward; a collective.

    Args:
        judges: what has judged them.
        rewards: of all processes, (completions, judges); NaN: not judged.
        world: the processes.

    Raises:
        RewardError: none has; the message is the same in all processes.
    """
    if not len(rewards) or not bool(rewards.isnan().all()):
        return
    silent = world.gather([judge.silence for judge in judges])[0]
    key = judges[0].key if len(judges) == 1 else "trl.reward_funcs"
    said = " and ".join(
        f"the reward {judge.__name__} returned {what}"
        for judge, what in zip(judges, silent, strict=True)
    )
    hint = "; NaN often comes from 0 divided by 0" if "NaN" in silent else ""
    raise RewardError(
        f"{key}: {said} for all {len(rewards)} completions, from which nothing can be learnt; "
        f"return a number for each completion that the reward applies to{hint}"
    )


class RewardWatch:
    """Says once where training learns nothing from some completions, or from all of them.

    Args:
        names: of the rewards.
        each: completions of each prompt.
        say: prints a line.
    """

    def __init__(self, names: Sequence[str], each: int, say: Callable[[str], None]) -> None:
        self.names, self.each, self.say = names, each, say
        self.equal, self.logs, self.complete = True, 0, True
        self.least, self.most = ([sign * torch.inf] * len(names) for sign in (1, -1))

    def judged(self, rewards: Tensor, step: int) -> None:
        """Take in the rewards of completions that are to be trained on.

        Args:
            rewards: (completions, rewards); NaN: not judged. Those of a prompt are consecutive.
            step: which they are for.
        """
        unjudged = int(rewards.isnan().all(dim=1).sum())
        if unjudged and self.complete:
            self.complete = False
            self.say(
                f"warning: step {step}: no reward judged {unjudged} of {len(rewards)} completions "
                "(None or NaN); nothing is learnt from such completions"
            )
        groups = rewards.cpu().reshape(-1, self.each, len(self.names))
        least = groups.nan_to_num(nan=torch.inf).amin(dim=1)
        most = groups.nan_to_num(nan=-torch.inf).amax(dim=1)
        self.equal = self.equal and not bool((most > least).any())
        self.least = list(map(min, self.least, least.amin(dim=0).tolist()))
        self.most = list(map(max, self.most, most.amax(dim=0).tolist()))

    def logged(self, last: bool) -> None:
        """A step is logged; ``last``: no other one follows."""
        self.logs += 1
        if self.equal and (self.logs == SEVERAL or (last and self.logs < SEVERAL)):
            steps = "the only logged step" if self.logs == 1 else f"{self.logs} logged steps"
            self.say(
                f"warning: in {steps}, all completions of a prompt had the same reward, and "
                f"nothing is learnt from equal rewards: {self._which()}; use rewards that tell "
                "completions apart, or more and more varied completions (trl.num_generations, "
                "trl.temperature)"
            )

    def _which(self) -> str:
        """What each reward gave."""
        return ", ".join(
            f"{name} "
            + (f"gave {least:.4g} to all" if least == most else "did not tell them apart")
            for name, least, most in zip(self.names, self.least, self.most, strict=True)
            if least <= most  # else it judged none
        )


@contextmanager
def without_trls_lines() -> Iterator[None]:
    """Keep the line back that TRL writes of completions without a reward: the watch has its own."""
    logger = logging.getLogger("trl.trainer.grpo_trainer")

    def is_other(record: logging.LogRecord) -> bool:
        return "All reward functions returned None" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
