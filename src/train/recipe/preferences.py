"""What the keys of training on preferences mean together: one record, which the trainers read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ...errors import RecipeError
from .keys.preferences import TrlKeys, VllmKeys
from .recipe import Recipe

Method = Literal[
    "dpo", "ipo", "orpo", "kto", "simpo", "cpo", "grpo", "gdpo", "reward", "process_reward"
]
RowKind = Literal["pairs", "labelled", "prompts", "steps"]
"""What a row is: two answers to a prompt, one answer that is good or bad, a prompt alone, or an
answer in steps that are each right or wrong."""

ROWS: dict[str, RowKind] = {
    "dpo": "pairs", "ipo": "pairs", "orpo": "pairs", "simpo": "pairs", "cpo": "pairs",
    "reward": "pairs", "kto": "labelled", "grpo": "prompts", "gdpo": "prompts",
    "process_reward": "steps",
}  # fmt: skip
"""The rows of each method."""


@dataclass(frozen=True)
class Head:
    """The head of the model that a recipe trains.

    Attributes:
        auto: the Auto class of transformers whose models have it.
        task: PEFT's name of its task.
        labels: its outputs; None: as many as the vocabulary, or the model's configuration, has.
        key: the key that asks for it; None: it is that of a language model.
    """

    auto: str
    task: str
    labels: int | None = None
    key: str | None = None

    @property
    def classifies(self) -> bool:
        """Whether it gives scores to a text or its tokens, and not the next token."""
        return self.key is not None

    def belongs_to(self, name: str) -> bool:
        """Whether a class of transformers has it: an Auto class, or that of an architecture."""
        return name.endswith(self.auto.removeprefix("AutoModel"))


LANGUAGE_HEAD = Head("AutoModelForCausalLM", "CAUSAL_LM")
HEADS = {
    "reward": Head("AutoModelForSequenceClassification", "SEQ_CLS", 1, "reward_model"),
    "process_reward": Head("AutoModelForTokenClassification", "TOKEN_CLS", 2,
                           "process_reward_model"),
}  # fmt: skip
"""The heads of the methods that do not train a language model."""


@dataclass(frozen=True)
class PreferenceSettings:
    """How a recipe trains on preferences or rewards.

    Attributes:
        method: the method.
        rows: what its rows are.
        reference: it compares the model with a reference model: with an adapter, the same model
            without it.
        num_labels: outputs of a reward model; 0 for others, which keep their language head.
        reward_functions: the names of what judges completions.
        arguments: what the recipe says of the method, by the names in the configuration of TRL's
            trainer. What the recipe does not say is not there, so that TRL's default holds.
    """

    method: Method
    rows: RowKind
    reference: bool = False
    num_labels: int = 0
    reward_functions: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        """Sequences that a row puts into a training step."""
        return 2 if self.rows == "pairs" else 1

    @property
    def generates(self) -> bool:
        """Whether the model writes what it is trained on."""
        return self.rows == "prompts"

    @property
    def passes_beside(self) -> int:
        """Forward passes without gradients, beside that of each sequence which is trained.

        KTO also compares each prompt with another one's answer.
        """
        beside = int(self.reference and not self.arguments.get("precompute_ref_log_probs"))
        return 2 * beside + 1 if self.method == "kto" else beside


def method_of(recipe: Recipe) -> Method | None:
    """The method of a recipe; None: supervised training."""
    if recipe.reward_model:
        return "reward"
    if recipe.process_reward_model:
        return "process_reward"
    return None if recipe.rl is None or recipe.rl == "ebft" else recipe.rl


def rows_of(recipe: Recipe) -> RowKind | None:
    """What the rows of a recipe are; None: those of supervised training."""
    method = method_of(recipe)
    return None if method is None else ROWS[method]


def head_of(recipe: Recipe) -> Head:
    """The head of the model that a recipe trains.

    ``num_labels`` alone asks for none, because recipes of supervised training keep it without
    effect; with a ``model_type`` that classifies it does.

    Args:
        recipe: checked.
    """
    method, labels = method_of(recipe), recipe.num_labels or None
    if method in HEADS:
        return replace(HEADS[method], labels=labels or HEADS[method].labels)
    for head in HEADS.values():
        if method is None and head.belongs_to(recipe.model_type or ""):
            return replace(head, labels=labels, key="model_type")
    return LANGUAGE_HEAD


def preference_settings(recipe: Recipe) -> PreferenceSettings | None:
    """What a recipe says of training on preferences or rewards.

    Args:
        recipe: checked.

    Returns:
        The record, or None for supervised training.
    """
    method = method_of(recipe)
    if method is None:
        return None
    trl = recipe.trl or TrlKeys()
    arguments: dict[str, Any] = {}
    if method in ("dpo", "ipo"):
        arguments = _dpo(recipe, trl)
    elif method == "kto":
        arguments = {
            "beta": _beta(recipe, trl),
            "desirable_weight": recipe.kto_desirable_weight,
            "undesirable_weight": recipe.kto_undesirable_weight,
            "precompute_ref_log_probs": recipe.precompute_ref_log_probs,
            **_moving_reference(trl),
        }
    elif method == "orpo":
        beta = _beta(recipe, trl)
        arguments = {"beta": recipe.orpo_alpha if beta is None else beta}
    elif method in ("cpo", "simpo"):
        arguments = {"beta": _beta(recipe, trl), "cpo_alpha": recipe.cpo_alpha}
        if method == "simpo":
            arguments |= {"loss_type": "simpo", "simpo_gamma": recipe.simpo_gamma}
    elif method in ("grpo", "gdpo"):
        arguments = _grpo(recipe, trl, method)
    elif method == "reward":
        arguments = {"center_rewards_coefficient": recipe.center_rewards_coefficient}
    generates = ROWS[method] == "prompts"
    return PreferenceSettings(
        method,
        ROWS[method],
        reference=method in ("dpo", "ipo", "kto") or (generates and bool(_beta(recipe, trl))),
        num_labels=head_of(recipe).labels or 0,
        reward_functions=tuple(trl.reward_funcs or ()) if generates else (),
        arguments={name: value for name, value in arguments.items() if value is not None},
    )


def _beta(recipe: Recipe, trl: TrlKeys) -> float | None:
    return recipe.rl_beta if trl.beta is None else trl.beta


def _moving_reference(trl: TrlKeys) -> dict[str, Any]:
    """A reference model that follows the model, with Axolotl's defaults."""
    if not trl.sync_ref_model:
        return {}
    alpha, steps = trl.ref_model_mixup_alpha, trl.ref_model_sync_steps
    return {
        "sync_ref_model": True,
        "ref_model_mixup_alpha": 0.9 if alpha is None else alpha,
        "ref_model_sync_steps": 64 if steps is None else steps,
    }


def _dpo(recipe: Recipe, trl: TrlKeys) -> dict[str, Any]:
    losses = recipe.dpo_loss_type
    arguments = {
        "beta": _beta(recipe, trl),
        "loss_type": [losses] if isinstance(losses, str) else losses,
        "loss_weights": recipe.dpo_loss_weights,
        "label_smoothing": recipe.dpo_label_smoothing,
        "use_weighting": recipe.dpo_use_weighting,
        "ld_alpha": recipe.dpo_ld_alpha,
        "padding_free": recipe.dpo_padding_free,
        "precompute_ref_log_probs": recipe.precompute_ref_log_probs,
        **_moving_reference(trl),
    }
    if recipe.rl == "ipo":  # its loss has no smoothing
        arguments |= {"loss_type": ["ipo"], "loss_weights": None, "label_smoothing": None}
    return arguments


def _grpo(recipe: Recipe, trl: TrlKeys, method: str) -> dict[str, Any]:
    scaled = trl.scale_rewards
    if isinstance(scaled, bool):
        scaled = "group" if scaled else "none"
    joined = trl.multi_objective_aggregation
    if joined is None and method == "gdpo":
        joined = "normalize_then_sum"
    kwargs = trl.chat_template_kwargs
    return {
        **{name: getattr(trl, name) for name in _SAME_AS_GRPO},
        "beta": _beta(recipe, trl),
        "scale_rewards": scaled,
        "multi_objective_aggregation": joined,
        "chat_template_kwargs": recipe.chat_template_kwargs if kwargs is None else kwargs,
        **_moving_reference(trl),
        **(_vllm(trl, recipe.vllm or VllmKeys()) if trl.use_vllm else {}),
    }


_SAME_AS_GRPO = (
    "max_completion_length", "num_generations", "generation_batch_size", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "generation_kwargs", "mask_truncated_completions",
    "reward_weights", "loss_type", "num_iterations", "epsilon", "epsilon_high",
    "importance_sampling_level", "off_policy_mask_threshold", "use_bias_correction_kl",
    "entropy_coef", "use_adaptive_entropy", "entropy_target", "entropy_coef_delta",
    "entropy_coef_min", "entropy_coef_max", "log_completions", "num_completions_to_print",
)  # fmt: skip
"""The keys of ``trl`` that have the same name in TRL's configuration of GRPO."""

_SAME_AS_VLLM = (
    "vllm_enable_sleep_mode", "vllm_server_timeout", "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_min",
)  # fmt: skip
"""The keys of ``trl`` that have the same name in TRL's configuration of GRPO."""


def _vllm(trl: TrlKeys, vllm: VllmKeys) -> dict[str, Any]:
    """How completions are generated by vLLM, by the names in TRL's configuration of GRPO."""
    most = trl.vllm_importance_sampling_clip_max
    arguments = {
        **{name: getattr(trl, name) for name in _SAME_AS_VLLM},
        "use_vllm": True,
        "vllm_mode": trl.vllm_mode or "server",
        "vllm_structured_outputs_regex": trl.vllm_guided_decoding_regex,
        "vllm_importance_sampling_clip_max": (
            trl.vllm_importance_sampling_cap if most is None else most
        ),
    }
    if arguments["vllm_mode"] == "colocate":
        return arguments | {
            "vllm_gpu_memory_utilization": vllm.gpu_memory_utilization,
            "vllm_tensor_parallel_size": vllm.tensor_parallel_size,
            "vllm_max_model_length": vllm.max_model_len,
        }
    return arguments | {
        "vllm_server_host": trl.vllm_server_host or vllm.host,
        "vllm_server_port": trl.vllm_server_port or vllm.port,
    }


_COMPLETIONS = 8
"""Completions of each prompt, where the recipe does not say."""


@dataclass(frozen=True)
class GenerationSizes:
    """How many completions are generated at a time.

    Attributes:
        each: completions of each prompt.
        batch: completions at a time, of all processes together.
        iterations: how often they are trained on.
    """

    each: int
    batch: int
    iterations: int

    @property
    def prompts(self) -> int:
        """Prompts at a time."""
        return self.batch // self.each

    def passes(self, rows: int) -> int:
        """Completions that are trained on in an epoch; prompts that fill no batch are left out.

        Raises:
            RecipeError: all of them are.
        """
        if rows < self.prompts:
            raise RecipeError(
                f"micro_batch_size: completions of {self.prompts} prompts are generated at a time "
                f"({self.batch} completions, {self.each} of each prompt), and there are only "
                f"{rows} rows; lower micro_batch_size, gradient_accumulation_steps or "
                "trl.generation_batch_size, or add rows"
            )
        return rows // self.prompts * self.batch * self.iterations


def generation_sizes(recipe: Recipe, processes: int) -> GenerationSizes:
    """How many completions a recipe has generated at a time.

    Args:
        recipe: of a method that generates.
        processes: how many train it.

    Raises:
        RecipeError: they are no whole groups of completions of one prompt.
    """
    trl = recipe.trl or TrlKeys()
    each = trl.num_generations or _COMPLETIONS
    micro, passes = recipe.micro_batch_size, recipe.accumulation()
    asked = trl.generation_batch_size
    batch = asked or micro * passes * processes
    if batch % (micro * processes):
        raise RecipeError(
            f"trl.generation_batch_size: must be a multiple of micro_batch_size ({micro}) times "
            f"the processes ({processes}), and {batch} is not"
        )
    if batch % each:
        said = "" if trl.num_generations else ", its default"
        product = (
            "trl.generation_batch_size"
            if asked
            else f"micro_batch_size ({micro}) x gradient_accumulation_steps ({passes}) x "
            f"processes ({processes})"
        )
        raise RecipeError(
            f"trl.num_generations: {batch} completions are generated at a time, which is {product}"
            f", and that must be a multiple of trl.num_generations ({each}{said}); change one of "
            "them"
        )
    return GenerationSizes(each, batch, trl.num_iterations or 1)
