"""One engine of ``training.py`` in its own process: it trains, one step per line it is sent.

Started by ``training.py``, with the job as JSON on the command line. A ``step`` line lets it take a
step, a ``finish`` line after the last one lets it save its adapter; one JSON line back for each.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import IO, Any

from training_job import IGNORED, TrainingJob
from worker import Memory, send


def main() -> int:
    """Train the job of the command line."""
    import json

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not mix with the replies
    try:
        job = TrainingJob(**json.loads(sys.argv[1]))
        _train(job, replies)
    except EOFError:  # nobody wants more steps
        return 0
    except Exception as error:
        send(replies, {"error": f"{type(error).__name__}: {error}",
                       "traceback": traceback.format_exc()})  # fmt: skip
        return 1
    return 0


def _train(job: TrainingJob, replies: IO[str]) -> None:
    import torch

    from peers import PEERS
    from training_engines import ENGINES

    if job.threads:
        torch.set_num_threads(job.threads)
    turns = _turns(replies)
    name = job.engine.partition(":")[0]
    (PEERS[name].train if name in PEERS else ENGINES[name])(job, turns)
    send(replies, {"saved": job.output, "losses": turns.losses})


def _turns(replies: IO[str]) -> Any:
    """The callback that makes a trainer wait for its turn before each step.

    A step is everything from one turn to its reply: reading and collating its batches, forward,
    backward, optimizer, and what the trainer does beside them.
    """
    import torch
    from transformers import Trainer, TrainerCallback

    class Turns(TrainerCallback):
        def __init__(self) -> None:
            self.trained = self.tokens = self.width = 0
            self.losses: list[float] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.memory = Memory("cuda" if torch.cuda.is_available() else "cpu")
            setting = {"peak_rss_from": self.memory.source, "threads": torch.get_num_threads()}
            send(replies, {"loaded": self.memory.loaded, "setting": setting})
            self.wait("step")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            last = state.global_step >= state.max_steps
            send(
                replies,
                {
                    "seconds": time.perf_counter() - self.begun,
                    "trained": self.trained,
                    "width": self.width,
                    "peak": self.memory.peak(),
                    "last": last,
                },
            )
            self.wait("finish" if last else "step")

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" in (kwargs.get("logs") or {}):
                self.losses.append(float(kwargs["logs"]["loss"]))

        def count(self, labels: Any) -> None:
            """Add up a batch of labels (B, T)."""
            self.trained += int((labels[:, 1:] != IGNORED).sum())
            self.width += labels.numel()

        def wait(self, line: str) -> None:
            said = sys.stdin.readline()
            if said != f"{line}\n":
                raise EOFError
            self.trained = self.width = 0
            self.begun = time.perf_counter()

    turns, original = Turns(), Trainer.training_step

    def counted(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # not each call of the model: a trainer may call it for checks of its own
        turns.count(inputs["labels"])
        return original(trainer, model, inputs, *args, **kwargs)

    Trainer.training_step = counted
    return turns


if __name__ == "__main__":
    sys.exit(main())
