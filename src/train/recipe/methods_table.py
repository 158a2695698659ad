"""The methods of preferences and rewards in recipes: a record each.

What trains them (trainer, arguments, batches, figures) is in ``methods/table.py``, which has a
record of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .keys.preferences import TrlKeys, VllmKeys
from .recipe import Recipe

Method = Literal[
    "dpo", "ipo", "orpo", "kto", "simpo", "cpo", "grpo", "gdpo", "reward", "process_reward"
]
RowKind = Literal["pairs", "labelled", "prompts", "steps"]
"""What a row is: two answers to a prompt, one answer that is good or bad, a prompt alone, or an
answer in steps that are each right or wrong."""


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

_OTHERS = "leave such rows out, or train them by rl: dpo, ipo, kto, cpo or simpo"
_NOT_PRECOMPUTED = (
    "computes precompute_ref_log_probs of texts alone: set it to false, or leave such rows out"
)


@dataclass(frozen=True)
class RecipeMethod:
    """A method in a recipe.

    Attributes:
        title: what model cards call it.
        arguments: what a recipe says of it, by the names in the configuration of its trainer; None
            where the recipe says nothing, so that the trainer's default holds.
        reference: whether it compares the model with a reference model: always, only with a
            ``beta`` above 0, or never.
        other_passes: forward passes for each sequence on other answers than its own, as the model
            and its reference each make them.
        no_images: why rows may have no images, as a recipe says; empty: they may.
    """

    title: str
    rows: RowKind
    arguments: Callable[[Recipe, TrlKeys], dict[str, Any]]
    reference: Literal["always", "with beta", "never"] = "never"
    head: Head = LANGUAGE_HEAD
    other_passes: int = 0
    no_images: Callable[[Recipe], str] = lambda recipe: f"trains texts alone: {_OTHERS}"

    def has_reference(self, recipe: Recipe, trl: TrlKeys) -> bool:
        """Whether a recipe compares the model with a reference model."""
        return self.reference == "always" or (
            self.reference == "with beta" and bool(_beta(recipe, trl))
        )


def _beta(recipe: Recipe, trl: TrlKeys) -> float | None:
    return recipe.rl_beta if trl.beta is None else trl.beta


def _with_images(recipe: Recipe) -> str:
    return ""


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
    return {
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


def _ipo(recipe: Recipe, trl: TrlKeys) -> dict[str, Any]:
    unread = {"loss_weights": None, "label_smoothing": None}  # its loss has no smoothing
    return {**_dpo(recipe, trl), "loss_type": ["ipo"], **unread}


def _kto(recipe: Recipe, trl: TrlKeys) -> dict[str, Any]:
    return {
        "beta": _beta(recipe, trl),
        "desirable_weight": recipe.kto_desirable_weight,
        "undesirable_weight": recipe.kto_undesirable_weight,
        "precompute_ref_log_probs": recipe.precompute_ref_log_probs,
        **_moving_reference(trl),
    }


def _orpo(recipe: Recipe, trl: TrlKeys) -> dict[str, Any]:
    beta = _beta(recipe, trl)
    return {"beta": recipe.orpo_alpha if beta is None else beta}


def _cpo(recipe: Recipe, trl: TrlKeys) -> dict[str, Any]:
    return {"beta": _beta(recipe, trl), "cpo_alpha": recipe.cpo_alpha}


def _simpo(recipe: Recipe, trl: TrlKeys) -> dict[str, Any]:
    return {**_cpo(recipe, trl), "loss_type": "simpo", "simpo_gamma": recipe.simpo_gamma}


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


def _grpo(recipe: Recipe, trl: TrlKeys) -> dict[str, Any]:
    scaled = trl.scale_rewards
    if isinstance(scaled, bool):
        scaled = "group" if scaled else "none"
    kwargs = trl.chat_template_kwargs
    return {
        **{name: getattr(trl, name) for name in _SAME_AS_GRPO},
        "beta": _beta(recipe, trl),
        "scale_rewards": scaled,
        "multi_objective_aggregation": trl.multi_objective_aggregation,
        "chat_template_kwargs": recipe.chat_template_kwargs if kwargs is None else kwargs,
        **_moving_reference(trl),
        **(_vllm(trl, recipe.vllm or VllmKeys()) if trl.use_vllm else {}),
    }


def _gdpo(recipe: Recipe, trl: TrlKeys) -> dict[str, Any]:
    joined = trl.multi_objective_aggregation or "normalize_then_sum"
    return {**_grpo(recipe, trl), "multi_objective_aggregation": joined}


def _reward(recipe: Recipe, trl: TrlKeys) -> dict[str, Any]:
    return {"center_rewards_coefficient": recipe.center_rewards_coefficient}


METHODS: Mapping[Method, RecipeMethod] = {
    "dpo": RecipeMethod(
        "DPO (direct preference optimization)", "pairs", _dpo, "always",
        no_images=_with_images,
    ),
    "ipo": RecipeMethod(
        "IPO (identity preference optimization)", "pairs", _ipo, "always",
        no_images=_with_images,
    ),
    "orpo": RecipeMethod(
        "ORPO (odds ratio preference optimization)", "pairs", _orpo,
        no_images=lambda recipe: f"trains prompts, too, where an image is no text: {_OTHERS}",
    ),
    "kto": RecipeMethod(
        "KTO (Kahneman-Tversky optimization)", "labelled", _kto, "always",
        other_passes=1,  # it also compares each prompt with another one's answer
        no_images=lambda recipe: _NOT_PRECOMPUTED if recipe.precompute_ref_log_probs else "",
    ),
    "simpo": RecipeMethod(
        "SimPO (simple preference optimization)", "pairs", _simpo, no_images=_with_images
    ),
    "cpo": RecipeMethod(
        "CPO (contrastive preference optimization)", "pairs", _cpo, no_images=_with_images
    ),
    "grpo": RecipeMethod(
        "GRPO (group relative policy optimization)", "prompts", _grpo, "with beta"
    ),
    "gdpo": RecipeMethod(
        "GDPO (GRPO whose rewards are normalized one by one)", "prompts", _gdpo, "with beta"
    ),
    "reward": RecipeMethod(
        "reward modeling (Bradley and Terry)", "pairs", _reward,
        head=Head("AutoModelForSequenceClassification", "SEQ_CLS", 1, "reward_model"),
    ),
    "process_reward": RecipeMethod(
        "process reward modeling", "steps", lambda recipe, trl: {},
        head=Head("AutoModelForTokenClassification", "TOKEN_CLS", 2, "process_reward_model"),
    ),
}  # fmt: skip

ROWS: dict[str, RowKind] = {name: method.rows for name, method in METHODS.items()}
"""The rows of each method."""

HEADS: dict[str, Head] = {
    name: method.head for name, method in METHODS.items() if method.head.classifies
}
"""The heads of the methods that do not train a language model."""
