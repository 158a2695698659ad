"""GRPO and GDPO: rewards that compare completions which the model generates."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from ...errors import RecipeError
from ..checkpoint.resume import Saved, another
from ..checkpoint.rng_state import same_draws
from ..data.chat.stops import stop_tokens
from ..data.order import RepeatedOrder, kind_of
from ..data.preferences.examples import Examples
from ..processes.world import World
from ..recipe.preferences import GenerationSizes, PreferenceSettings, generation_sizes
from ..recipe.recipe import Recipe
from ..report.result import Figure
from ..requirements import has_vllm
from ..rewards.built_in import Shown, rewards_of, shown
from ..rewards.judge import (
    RewardWatch,
    judges,
    means,
    require_columns,
    require_judged,
    require_rewards,
    reward_figures,
    without_trls_lines,
)
from ..trainer.arguments import arguments_for
from ..trainer.context import Context
from ..trainer.engine import EngineMixin
from ..trainer.evaluation import reporter
from .build import Method, PreferenceTask
from .objective import Preferences
from .reference import add_reference
from .rows import PromptDataset

_CARRIED = "generation"
_UNLIKE_TRAINING = ("num_tokens", "clip_ratio/", "cispo_clip_ratio", "vespo/", "reward")
"""Beginnings of TRL's figures that mean nothing in validation, or are computed here."""


class Grpo(EngineMixin, GRPOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """GRPO (Shao et al. 2024) and GDPO (Liu et al. 2026).

    Each batch of the loader is that of a generation, of which a pass trains a part (TRL's
    ``_prepare_inputs``). A checkpoint between two generations keeps the remaining parts.

    Args:
        ref_model: the reference model, unless it is the trained one without its adapter.
        kwargs: those of ``EngineMixin``.

    Attributes:
        texts: completions to look at, of the ``first`` generation and of the ``last`` one.
        rewards: of the completions that were generated last, (completions, rewards).
    """

    args: Any  # TRL's and Trainer's attributes
    ref_model: Any
    reward_funcs: Any
    generation_config: Any
    num_generations: Any
    num_generations_eval: Any
    _buffered_inputs: Any

    def __init__(self, *args: Any, ref_model: Any = None, **kwargs: Any) -> None:
        del kwargs["data_collator"]  # TRL has its own, which leaves the rows as they are
        arguments: Any = kwargs["args"]
        self._prompt_ids: list[list[int]] = []
        self.rewards = torch.empty(0)
        self.texts: dict[str, list[Shown]]
        requested = arguments.beta, arguments.sync_ref_model, arguments.log_completions
        arguments.log_completions = False  # it would make a folder before the first step
        if ref_model is not None:  # it would load one
            arguments.beta, arguments.sync_ref_model = 0.0, False
        super().__init__(*args, **kwargs)
        arguments.beta, arguments.sync_ref_model, arguments.log_completions = requested
        self.beta, self.log_completions = arguments.beta, arguments.log_completions
        self.num_completions_to_print = -1  # to the terminal; the report shows them
        if ref_model is not None:
            add_reference(self, ref_model)
        self._watch = RewardWatch(self.reward_func_names, self.num_generations, self.context.say)
        self.texts = dict((_generation_of(self.resumed) or {}).get("texts", {}))
        variables = self.context.recipe.chat_template_kwargs or {}
        self.eos_token_ids = stop_tokens(self.model, self.processing_class, variables)
        if not self.use_vllm:
            self._set_generation(eos_token_id=self.eos_token_ids)
            if self.generation_config.use_cache is None:  # not what the model says for training
                self._set_generation(use_cache=True)

    def _set_generation(self, **values: Any) -> None:
        self.generation_config.update(**values)
        self.generation_kwargs.update(values)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate when it is due; forward and backward of a part of what was generated."""
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
        with self.objective.evaluating():  # without dropout
            return generate(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with without_trls_lines():
            self.rewards = super()._calculate_rewards(*args, **kwargs)
        require_rewards(self.reward_funcs, self.world)
        model: Any = self.model
        if model.training:  # validations are judged as a whole
            require_judged(self.reward_funcs, self.rewards, self.world)
            self._watch.judged(self.rewards, self.state.global_step + 1)
        return self.rewards

    def _note_texts(self) -> None:
        """Note some of the completions that were generated last, and keep the first ones."""
        step = self.state.global_step + 1
        each, most = self.num_generations, self.args.num_completions_to_print
        texts = shown(self._logs, step, each, most)
        self.texts = {"first": self.texts.get("first", texts), "last": texts}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was measured; write completions if requested."""
        if self.log_completions and self.world.main:
            Path(self.args.output_dir, "completions").mkdir(parents=True, exist_ok=True)
        if "loss" in logs:
            self._watch.logged(self.state.global_step >= self.state.max_steps)
        super().log(logs, start_time)


@dataclass(frozen=True)
class _State:
    """What the next step needs of those before it.

    Attributes:
        passes: forward and backward passes so far, of this process.
        batches: what was generated last.
        tokens: that the trainer has seen.
        entropy: the coefficient of the entropy, and its last value.
    """

    passes: int = 0
    batches: Sequence[Mapping[str, Any]] = ()
    tokens: int = 0
    entropy: tuple[float, float] = (0.0, math.inf)
    texts: dict[str, list[Shown]] = field(default_factory=dict)


class Completions(Preferences):
    """The objective of GRPO: the rewards of completions, and the generation they come from."""

    def __init__(self) -> None:
        super().__init__()
        self._state = _State()

    # --- the rows --------------------------------------------------------------------------------

    def order(self, rows: Any) -> Any:
        """The sampler of the prompts: each as often as it has completions."""
        trainer, recipe = self.trainer, self.trainer.context.recipe
        kind, sizes = kind_of(recipe), generation_sizes(recipe, trainer.world.size)
        lengths = [0] * len(rows)
        if kind == "by length":
            lengths = [len(rows[i]["prompt_ids"]) for i in range(len(rows))]
        repeats = trainer.num_iterations * trainer.args.steps_per_generation
        return RepeatedOrder(lengths, recipe.seed, kind, sizes.prompts, sizes.each, repeats)

    @property
    def rows_per_batch(self) -> int:
        """Rows in a batch of the loader: those of a generation."""
        return super().rows_per_batch * int(self.trainer.args.steps_per_generation)

    def counts(self, batch: Any) -> bool:
        """All batches count."""
        return True

    # --- validation ------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """The mean reward of completions of the validation prompts, and further figures.

        ``eval_reward``; ``eval_rewards/NAME/mean`` of each reward; what TRL measures of completions
        and of the model; and, of several datasets, ``eval_NAME_reward`` each. The draws are the
        same each time. A collective.
        """
        trainer = self.trainer
        judged: dict[str, list[Tensor]] = {}
        with self.evaluating(), torch.no_grad(), self._without_trace():
            for name, batches in trainer.context.validation.items():
                judged[name] = list(self._judged(batches.packs))
            measured = self.pending("eval")
            sizes = [len(rewards) for batches in judged.values() for rewards in batches]
            by_name = means(measured, sizes)
            measured.clear()
        sets = {name: torch.cat(rewards) for name, rewards in judged.items()}
        require_judged(trainer.reward_funcs, torch.cat(list(sets.values())), trainer.world)
        others = {k: v for k, v in by_name.items() if not k.startswith(_UNLIKE_TRAINING)}
        return {
            **reward_figures(sets, trainer.reward_func_names, trainer.reward_weights),
            **{f"eval_{name}": value for name, value in others.items()},
        }

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        """Keep what is generated here from changing training."""
        logs = copy.deepcopy(self.trainer._logs)
        try:
            with same_draws(self.trainer.args.seed):
                yield
        finally:
            self.trainer._logs = logs

    def _judged(self, rows: Any) -> Iterator[Tensor]:
        """The rewards of completions of all rows, (completions, rewards) of each batch."""
        trainer = self.trainer
        each = trainer.num_generations_eval
        most = max(1, trainer.args.per_device_eval_batch_size // each)
        ranks, rank = trainer.world.batch_ranks, trainer.world.batch_rank
        start = 0
        on_batch = reporter(-(-len(rows) // (most * ranks)), trainer.context.say)
        while start < len(rows):
            size = min(most, -(-(len(rows) - start) // ranks))
            at = start + rank * size
            # all processes take the same number; those past the end do not count
            share = [rows[i if i < len(rows) else 0] for i in range(at, at + size)]
            repeated = [row for row in share for _ in range(each)]
            batch = trainer._generate_and_score_completions(repeated)
            batch["completion_mask"][max(0, len(rows) - at) * each :] = 0
            with trainer.compute_loss_context_manager():
                trainer.compute_loss(trainer.model, batch)
            yield trainer.rewards[: (len(rows) - start) * each].cpu()
            start += size * ranks
            on_batch()

    def probe(self) -> dict[str, Any]:
        """A prompt, to compare models on."""
        return {"input_ids": torch.tensor([self.trainer.train_dataset[0]["prompt_ids"]])}

    @property
    def completions(self) -> list[Shown]:
        """Completions to look at, of the first generation and of the last one."""
        texts: dict[str, list[Shown]] = self.trainer.texts
        first, last = texts.get("first", []), texts.get("last", [])
        return first if first == last else first + last

    # --- checkpoints -----------------------------------------------------------------------------

    def end_step(self) -> None:
        """Record what a checkpoint needs if the next step does not finish."""
        super().end_step()
        self._note_state()

    def _note_state(self) -> None:
        trainer = self.trainer
        self._state = _State(
            trainer._step, trainer._buffered_inputs or (), trainer.state.num_input_tokens_seen,
            (trainer.entropy_coef, trainer._last_world_entropy), trainer.texts,
        )  # fmt: skip

    def carried(self) -> dict[str, Any]:
        """The position in the generation, besides what was measured."""
        state = self._state
        coefficient, last = state.entropy
        generation = {
            "passes": state.passes * self.trainer.world.batch_ranks,
            "entropy": [coefficient, last if math.isfinite(last) else None],
            "texts": state.texts,
        }
        return {**super().carried(), _CARRIED: generation}

    @contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """A context around writing a checkpoint, which adds what is generated and not trained."""
        state, seen = self.trainer.state, self.trainer.state.num_input_tokens_seen
        state.num_input_tokens_seen = self._state.tokens  # without those of an unfinished step
        with super().writing(folder):
            yield
        state.num_input_tokens_seen = seen
        if self._is_midway(self._state.passes) and not self.trainer.args.save_only_model:
            write_batches(folder, self._state.batches, self.trainer.world)

    def _is_midway(self, passes: int) -> bool:
        """Whether more is trained of what was generated before so many passes."""
        trainer = self.trainer
        return bool(passes % (trainer.args.steps_per_generation * trainer.num_iterations))

    def restore(self, resumed: Saved | None) -> None:
        """Restore what was generated before the checkpoint and is not yet trained."""
        super().restore(resumed)
        generation, trainer = _generation_of(resumed), self.trainer
        if generation is None or resumed is None:
            return
        trainer._step = generation["passes"] // trainer.world.batch_ranks
        if trainer.use_adaptive_entropy:
            coefficient, last = generation["entropy"]
            trainer.entropy_coef = coefficient
            trainer._last_world_entropy = math.inf if last is None else last
        resumed_from = trainer.checkpoints.resumed_from
        if self._is_midway(trainer._step) and resumed_from is not None:
            batches = read_batches(resumed_from, trainer.world, resumed.processes)
            trainer._buffered_inputs = [
                {name: value.to(trainer.args.device) for name, value in batch.items()}
                for batch in batches
            ]
        self._note_state()


def _generation_of(resumed: Saved | None) -> Mapping[str, Any] | None:
    generation = resumed.carried.get(_CARRIED) if resumed is not None else None
    return generation if isinstance(generation, Mapping) else None


class CompletionTask(PreferenceTask):
    """GRPO and GDPO; RecipeError if a reward cannot be imported."""

    figure: Figure = "reward"

    def __init__(self, recipe: Recipe, settings: PreferenceSettings, method: Method) -> None:
        super().__init__(recipe, settings, method)
        self.rewards = rewards_of(recipe)
        self.judges = judges(self.rewards)

    @property
    def figures(self) -> tuple[str, ...]:
        """What validations measure besides the reward."""
        means = [f"rewards/{judge.__name__}/mean" for judge in self.judges]
        return (*super().figures, *means, *(["kl"] if self.settings.reference else []))

    def sequences(self, prepared: Any) -> Any:
        """The prompts of an epoch."""
        examples = super().sequences(prepared)
        require_columns(self.rewards, examples.columns)
        return examples

    def arguments(self, sequences: Examples, world: World) -> Any:
        """The arguments of TRL's trainer; its batches are of completions."""
        recipe, sizes = self.recipe, generation_sizes(self.recipe, world.size)
        kwargs = {
            **self._requested(),
            "num_generations": sizes.each,
            "per_device_eval_batch_size": self._validated_at_a_time(sizes, world),
        }
        passes = range(sizes.passes(len(sequences)))
        return arguments_for(recipe, passes, world, self.method.arguments, kwargs, self.figure)

    def _requested(self) -> dict[str, Any]:
        """Without vLLM where it is not installed, which ``requirements.notices`` reports."""
        requested = super()._requested()
        return {k: v for k, v in requested.items() if has_vllm() or "vllm" not in k}

    def _validated_at_a_time(self, sizes: GenerationSizes, world: World) -> int:
        """Completions that each process generates at a time to validate, those of whole prompts."""
        number = self.recipe.eval_batch_size or sizes.batch // world.size
        return -(-number // sizes.each) * sizes.each

    def require_figure(self, args: Any, names: Iterable[str]) -> None:
        """Raise RecipeError unless validations have the figure that judges them."""
        if (args.metric_for_best_model or "").removeprefix("eval_") == "loss":
            raise RecipeError(
                f"metric_for_best_model: the loss of {self.settings.method} does not say how good "
                "the model is; use eval_reward"
            )
        super().require_figure(args, names)

    def _judging(self, context: Context) -> dict[str, Any]:
        return {"reward_funcs": list(self.judges)}

    def _dataset(self, examples: Examples) -> PromptDataset:
        return PromptDataset(examples)


# --- batches that were generated before a checkpoint and are trained after it ----------------
# One file for each process, read by any number of processes. Pass k of process r of N has the
# number k * N + r of all, as in ``data.ranks``.


def write_batches(folder: Path, batches: Sequence[Mapping[str, Any]], world: World) -> None:
    """Write the batches of this process into a checkpoint, without what is None in them."""
    tensors = {
        f"{k}.{name}": value.detach().cpu().clone().contiguous()
        for k, batch in enumerate(batches)
        for name, value in batch.items()
        if value is not None
    }
    save_file(tensors, _file(folder, world.batch_rank))


def read_batches(folder: Path, world: World, processes: int) -> list[dict[str, Tensor]]:
    """Read the batches of this process from a checkpoint that ``processes`` have written.

    Raises:
        RecipeError: a file is missing.
    """
    batches: dict[int, dict[str, Tensor]] = {}
    for rank in range(processes):
        file = _file(folder, rank)
        if not file.is_file():
            raise RecipeError(another(folder, f"it has no {file.name}"))
        for key, value in load_file(file).items():
            k, _, name = key.partition(".")
            batches.setdefault(int(k) * processes + rank, {})[name] = value
    return [batches[i] for i in range(world.batch_rank, len(batches), world.batch_ranks)]


def _file(folder: Path, rank: int) -> Path:
    return folder / f"completions-{rank}.safetensors"
