"""GRPO and GDPO: completions that the model writes, and rewards that compare them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from ..checkpoint.pending_batches import read_batches, write_batches
from ..checkpoint.resume import Saved
from ..checkpoint.rng_state import same_draws
from ..data.chat.stops import stop_tokens
from ..data.order import RepeatedOrder, kind_of
from ..recipe.preferences import generation_sizes
from ..rewards.built_in import Shown, shown
from ..rewards.judge import (
    RewardWatch,
    means,
    require_judged,
    require_rewards,
    reward_figures,
    without_trls_lines,
)
from ..trainer.evaluation import reporter
from .reference import add_reference
from .tuner import MethodTuner

_CARRIED = "generation"
_UNLIKE_TRAINING = ("num_tokens", "clip_ratio/", "cispo_clip_ratio", "vespo/", "reward")
"""How those of TRL's figures begin that say nothing of validations, or are computed here."""


@dataclass(frozen=True)
class _State:
    """What the next step needs of those before it.

    Attributes:
        passes: forward and backward passes so far, of this process.
        batches: what was generated last.
        tokens: that the trainer has seen.
        entropy: the coefficient of the entropy, and what it was last.
        texts: completions to look at.
    """

    passes: int = 0
    batches: Sequence[Mapping[str, Any]] = ()
    tokens: int = 0
    entropy: tuple[float, float] = (0.0, math.inf)
    texts: dict[str, list[Shown]] = field(default_factory=dict)


class GrpoTuner(MethodTuner, GRPOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """TRL's trainer of GRPO (Shao et al. 2024) and GDPO (Liu et al. 2026) in this engine's loop.

    Each batch of the loader is that of a generation, of which a pass trains a part (TRL's
    ``_prepare_inputs``). A checkpoint between two generations keeps the parts that are left.

    Args:
        ref_model: the reference model, where that is another one than the trained one without its
            adapter.
        kwargs: those of ``MethodTuner``.
    """

    args: Any  # TRL's and Trainer's own attributes
    ref_model: Any
    reward_funcs: Any
    generation_config: Any
    num_generations: Any
    num_generations_eval: Any
    _buffered_inputs: Any

    def __init__(self, *args: Any, ref_model: Any = None, **kwargs: Any) -> None:
        del kwargs["data_collator"]  # TRL has its own, which leaves the rows as they are
        given: Any = kwargs["args"]
        self._prompt_ids: list[list[int]] = []
        self._rewards = torch.empty(0)
        self._texts: dict[str, list[Shown]]
        self._state = _State()
        asked = given.beta, given.sync_ref_model, given.log_completions
        given.log_completions = False  # it would make a folder before the first step
        if ref_model is not None:  # it would load one
            given.beta, given.sync_ref_model = 0.0, False
        super().__init__(*args, **kwargs)
        given.beta, given.sync_ref_model, given.log_completions = asked
        self.beta, self.log_completions = given.beta, given.log_completions
        self.num_completions_to_print = -1  # to the terminal; the report shows them
        if ref_model is not None:
            add_reference(self, ref_model)
        self._watch = RewardWatch(self.reward_func_names, self.num_generations, self.context.say)
        self._texts = dict((self._kept or {}).get("texts", {}))
        variables = self.context.recipe.chat_template_kwargs or {}
        self.eos_token_ids = stop_tokens(self.model, self.processing_class, variables)
        if not self.use_vllm:
            self._set_generation(eos_token_id=self.eos_token_ids)
            if self.generation_config.use_cache is None:  # not what the model says for training
                self._set_generation(use_cache=True)

    def _set_generation(self, **values: Any) -> None:
        self.generation_config.update(**values)
        self.generation_kwargs.update(values)

    # --- the rows --------------------------------------------------------------------------------

    @property
    def _rows_per_batch(self) -> int:
        return int(self._train_batch_size * self.args.steps_per_generation)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = train_dataset or self.train_dataset
        recipe, kind = self.context.recipe, kind_of(self.context.recipe)
        sizes = generation_sizes(recipe, self.world.size)
        lengths = [0] * len(rows)
        if kind == "by length":
            lengths = [len(rows[i]["prompt_ids"]) for i in range(len(rows))]
        repeats = self.num_iterations * self.args.steps_per_generation
        return RepeatedOrder(lengths, recipe.seed, kind, sizes.prompts, sizes.each, repeats)

    def _trains(self, batch: Any) -> bool:
        return True

    # --- a step ----------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate where it is time to; forward and backward of a part of what was generated."""
        model.train()
        start = time.perf_counter()
        batch = self._prepare_inputs(inputs)
        self._current_train_step_time += time.perf_counter() - start
        trained = int(batch["completion_mask"].sum())
        counts = {"tokens": trained + int(batch["prompt_mask"].sum()), "trained": trained}
        return super().training_step(model, {**batch, **counts}, *args, **kwargs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        if isinstance(inputs, Mapping):
            return inputs  # what training_step has prepared
        before = self._buffered_inputs
        batch = super()._prepare_inputs(inputs)
        if self._buffered_inputs is not before:
            self._note_texts()
        return batch

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self._prompt_ids = [row["prompt_ids"] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: Any) -> Any:
        return self._prompt_ids, None, {}  # as they were prepared

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        generate: Any = super()._generate_single_turn
        with self._evaluating():  # without dropout
            return generate(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with without_trls_lines():
            self._rewards = super()._calculate_rewards(*args, **kwargs)
        require_rewards(self.reward_funcs, self.world)
        model: Any = self.model
        if model.training:  # validations are judged as a whole
            require_judged(self.reward_funcs, self._rewards, self.world)
            self._watch.judged(self._rewards, self.state.global_step + 1)
        return self._rewards

    def _note_texts(self) -> None:
        """Note some of the completions that were generated last, and keep the first ones."""
        step = self.state.global_step + 1
        each, most = self.num_generations, self.args.num_completions_to_print
        texts = shown(self._logs, step, each, most)
        self._texts = {"first": self._texts.get("first", texts), "last": texts}

    @property
    def completions(self) -> list[Shown]:
        """Completions to look at, of the first generation and of the last one."""
        first, last = self._texts.get("first", []), self._texts.get("last", [])
        return first if first == last else first + last

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was measured; write completions, if that is asked for."""
        if self.log_completions and self.world.main:
            Path(self.args.output_dir, "completions").mkdir(parents=True, exist_ok=True)
        if "loss" in logs:
            self._watch.logged(self.state.global_step >= self.state.max_steps)
        super().log(logs, start_time)

    # --- checkpoints -----------------------------------------------------------------------------

    def on_step_end(self) -> None:
        """Record what a checkpoint would need if the next step does not finish."""
        super().on_step_end()
        self._note_state()

    def _note_state(self) -> None:
        self._state = _State(
            self._step, self._buffered_inputs or (), self.state.num_input_tokens_seen,
            (self.entropy_coef, self._last_world_entropy), self._texts,
        )  # fmt: skip

    def _saved(self) -> Saved:
        saved, state = super()._saved(), self._state
        coefficient, last = state.entropy
        kept = {
            "passes": state.passes * self.world.batch_ranks,
            "entropy": [coefficient, last if math.isfinite(last) else None],
            "texts": state.texts,
        }
        return replace(saved, carried={**saved.carried, _CARRIED: kept})

    def _write_checkpoint(self, part: Path) -> None:
        state, seen = self._state, self.state.num_input_tokens_seen
        self.state.num_input_tokens_seen = state.tokens
        super()._write_checkpoint(part)
        self.state.num_input_tokens_seen = seen
        if self._is_midway(state.passes) and not self.args.save_only_model:
            write_batches(part, state.batches, self.world)

    def _is_midway(self, passes: int) -> bool:
        """Whether more is trained of what was generated before so many passes."""
        return bool(passes % (self.args.steps_per_generation * self.num_iterations))

    @property
    def _kept(self) -> Mapping[str, Any] | None:
        """What the checkpoint kept that the run resumes from."""
        kept = self._resumed.carried.get(_CARRIED) if self._resumed is not None else None
        return kept if isinstance(kept, Mapping) else None

    def start(self) -> None:
        """Restore what was generated before the checkpoint and is not yet trained."""
        super().start()
        kept = self._kept
        if kept is None or self._resumed is None:
            return
        self._step = kept["passes"] // self.world.batch_ranks
        if self.use_adaptive_entropy:
            coefficient, last = kept["entropy"]
            self.entropy_coef = coefficient
            self._last_world_entropy = math.inf if last is None else last
        if self._is_midway(self._step) and self.resumed_from is not None:
            batches = read_batches(self.resumed_from, self.world, self._resumed.processes)
            self._buffered_inputs = [
                {name: value.to(self.args.device) for name, value in batch.items()}
                for batch in batches
            ]
        self._note_state()

    # --- validation ------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """The mean reward of completions of the validation prompts, and what goes with it.

        ``eval_reward``; ``eval_rewards/NAME/mean`` of each reward; what TRL measures of completions
        and of the model; and, of several datasets, ``eval_NAME_reward`` each. The draws are the
        same each time. With several processes, a collective.
        """
        judged: dict[str, list[Tensor]] = {}
        with self._evaluating(), torch.no_grad(), self._apart():
            for name, batches in self.context.validation.items():
                judged[name] = list(self._judged(batches.packs))
            measured = self.pending("eval")
            sizes = [len(rewards) for batches in judged.values() for rewards in batches]
            found = means(measured, sizes)
            measured.clear()
        sets = {name: torch.cat(rewards) for name, rewards in judged.items()}
        require_judged(self.reward_funcs, torch.cat(list(sets.values())), self.world)
        others = {k: v for k, v in found.items() if not k.startswith(_UNLIKE_TRAINING)}
        return {
            **reward_figures(sets, self.reward_func_names, self.reward_weights),
            **{f"eval_{name}": value for name, value in others.items()},
        }

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Let what is generated leave no trace in training."""
        logs = copy.deepcopy(self._logs)
        try:
            with same_draws(self.args.seed):
                yield
        finally:
            self._logs = logs

    def _judged(self, rows: Any) -> Iterator[Tensor]:
        """The rewards of completions of all rows, (completions, rewards) of each batch."""
        each = self.num_generations_eval
        most = max(1, self.args.per_device_eval_batch_size // each)
        ranks, rank = self.world.batch_ranks, self.world.batch_rank
        start = 0
        on_batch = reporter(-(-len(rows) // (most * ranks)), self.context.say)
        while start < len(rows):
            size = min(most, -(-(len(rows) - start) // ranks))
            at = start + rank * size
            # all processes have as many; those past the end do not count
            own = [rows[i if i < len(rows) else 0] for i in range(at, at + size)]
            batch = self._generate_and_score_completions([row for row in own for _ in range(each)])
            batch["completion_mask"][max(0, len(rows) - at) * each :] = 0
            with self.compute_loss_context_manager():
                self.compute_loss(self.model, batch)
            yield self._rewards[: (len(rows) - start) * each].cpu()
            start += size * ranks
            on_batch()

    def probe(self) -> dict[str, Any]:
        """A prompt, to compare models on."""
        rows: Any = self.train_dataset
        return {"input_ids": torch.tensor([rows[0]["prompt_ids"]])}
