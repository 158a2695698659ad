"""The keys of ``trl``: what TRL's trainers read, most of them GRPO's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..base import (
    Float,
    Int,
    Keys,
    PositiveFloat,
    PositiveInt,
    key,
    not_applicable,
)

ONLY = "only a preference method (key rl) reads it"
_ASYNC = "only async_prefetch and use_data_producer read it"
_BETWEEN = "leave it out: completions are generated between the steps that train on them"

_MOVING = {"sync_ref_model: true": "only trl.sync_ref_model: true reads it"}

_Fraction = Annotated[Float, Field(ge=0, le=1)]
_NotNegative = Annotated[Float, Field(ge=0)]


class TrlKeys(Keys):
    """``trl``: settings for TRL's trainers."""

    beta: _NotNegative | None = None
    """The same as ``rl_beta``. Unset: that."""

    # --- completions -----------------------------------------------------------------------------

    max_completion_length: PositiveInt | None = None
    """Longest completion that is generated, in tokens. Unset: 512."""

    num_generations: Int | None = key(gt=1)
    """Completions of each prompt, which are compared with each other. Unset: 8."""

    generation_batch_size: PositiveInt | None = None
    """Completions that are generated at a time, by all processes; a multiple of
    ``num_generations``. Unset: those of one optimizer step."""

    temperature: PositiveFloat | None = None
    """Temperature of sampling. Unset: 1."""

    top_p: Annotated[PositiveFloat, Field(le=1)] | None = None
    """Sample from the likeliest tokens whose probabilities sum up to this. Unset: 1, from all."""

    top_k: Annotated[Int, Field(ge=0)] | None = None
    """Sample from this many of the likeliest tokens. Unset: 0, from all."""

    min_p: _Fraction | None = None
    """Sample from tokens that have at least this fraction of the likeliest one's probability.
    Unset: from all."""

    repetition_penalty: PositiveFloat | None = None
    """Above 1: tokens that are already there become less likely. Unset: 1."""

    generation_kwargs: dict[str, Any] | None = None
    """More arguments of the generation. Unset: none."""

    chat_template_kwargs: dict[str, Any] | None = None
    """What the chat template reads when prompts are written, e.g. ``enable_thinking: false``.
    Unset: the recipe's ``chat_template_kwargs``."""

    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss."""

    # --- rewards ---------------------------------------------------------------------------------

    reward_funcs: Annotated[list[str], Field(min_length=1)] | None = None
    """What judges completions: ``exact_match:FIELD``, ``regex:PATTERN``, ``format:TAG,TAG``,
    ``length:LEAST-MOST``, or Python functions as ``module.function``, which run only with
    ``--allow-code`` (``docs/preferences.md``). Unset: GRPO needs at least one."""

    reward_weights: list[Float] | None = None
    """The weight of each reward. Unset: 1 each."""

    scale_rewards: bool | Literal["group", "batch", "none"] = True
    """Divide advantages by the standard deviation of the rewards: of a prompt's completions
    (``true``, ``group``), of the ``batch``, or not at all (``false``, ``none``)."""

    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None = None
    """How several rewards become one advantage. Unset: ``sum_then_normalize`` for GRPO,
    ``normalize_then_sum`` for GDPO."""

    # --- loss ------------------------------------------------------------------------------------

    loss_type: (
        Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] | None
    ) = None
    """How the losses of tokens become one. Unset: ``dapo``."""

    num_iterations: PositiveInt | None = None
    """How often each batch of completions is trained on. Unset: 1."""

    epsilon: PositiveFloat | None = None
    """Where the ratio of new to old probabilities is clipped. Unset: 0.2."""

    epsilon_high: PositiveFloat | None = None
    """The same above 1. Unset: as ``epsilon``."""

    importance_sampling_level: Literal["sequence", "token"] | None = None
    """Whether that ratio is of each token (GRPO) or of the whole completion (GSPO). Unset:
    ``token``."""

    off_policy_mask_threshold: PositiveFloat | None = None
    """Leave out completions whose KL divergence from the policy is larger. Unset: none."""

    use_bias_correction_kl: bool | None = None
    """Weigh the KL term by the ratio of new to old probabilities. Unset: yes."""

    entropy_coef: _NotNegative | None = None
    """Weight of an entropy bonus. Unset: 0."""

    use_adaptive_entropy: bool | None = None
    """Adjust that weight so that the entropy comes to ``entropy_target``. Unset: no."""

    entropy_target: _NotNegative | None = None
    """The entropy that is aimed at. Unset: 0.2."""

    entropy_coef_delta: _NotNegative | None = None
    """By how much the weight changes at a step. Unset: 0.005."""

    entropy_coef_min: _NotNegative | None = None
    """The smallest weight. Unset: 0."""

    entropy_coef_max: _NotNegative | None = None
    """The largest weight. Unset: 1."""

    sync_ref_model: bool | None = None
    """Move the reference model towards the model during training. Unset: no."""

    ref_model_mixup_alpha: _Fraction | None = key(read_with=_MOVING)
    """How much of the model goes into the reference model. Unset: 0.9."""

    ref_model_sync_steps: PositiveInt | None = key(read_with=_MOVING)
    """Steps after which it is moved. Unset: 64."""

    # --- logging ---------------------------------------------------------------------------------

    log_completions: bool | None = None
    """Write the completions of each logged step to ``completions`` in ``output_dir``, and to
    trackers. Unset: no; the report shows a few anyway."""

    num_completions_to_print: PositiveInt | None = None
    """Completions of the first and of the last generation that the report shows. Unset: 4."""

    # --- vLLM ------------------------------------------------------------------------------------

    use_vllm: bool = False
    """Generate with vLLM."""

    vllm_mode: Literal["server", "colocate"] | None = None
    """Whether vLLM is a server, or runs beside the trainer. Unset: ``server``."""

    vllm_server_host: str | None = None
    """Host of the server. Unset: ``vllm.host``, or 0.0.0.0."""

    vllm_server_port: Annotated[Int, Field(gt=0, lt=65536)] | None = None
    """Port of the server. Unset: ``vllm.port``, or 8000."""

    vllm_server_timeout: PositiveFloat | None = None
    """Seconds to wait for the server. Unset: 240."""

    vllm_guided_decoding_regex: str | None = None
    """A regular expression that completions must match. Unset: none."""

    vllm_enable_sleep_mode: bool | None = None
    """Free the memory of vLLM beside the trainer while it waits. Unset: no."""

    vllm_importance_sampling_correction: bool | None = None
    """Weigh tokens by the trainer's probabilities over vLLM's. Unset: yes."""

    vllm_importance_sampling_mode: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None
    """Whether large ratios are clipped or left out, by token or by sequence. Unset:
    ``sequence_mask``."""

    vllm_importance_sampling_cap: PositiveFloat | None = key(
        if_written=True,
        excludes={
            "vllm_importance_sampling_clip_max": (
                "is the older name of vllm_importance_sampling_clip_max, which is set, too"
            )
        },
    )
    """The older name of ``vllm_importance_sampling_clip_max``. Unset: that."""

    vllm_importance_sampling_clip_min: _NotNegative | None = None
    """The smallest such ratio. Unset: 0."""

    vllm_importance_sampling_clip_max: PositiveFloat | None = key(if_written=True)
    """The largest such ratio. Unset: 3."""

    # --- Axolotl's asynchronous trainer ----------------------------------------------------------

    replay_buffer_size: Int = not_applicable(_ASYNC, 0, ge=0)
    """Groups of completions that are kept to be trained on again."""


SAME_AS_GRPO = (
    "max_completion_length", "num_generations", "generation_batch_size", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "generation_kwargs", "mask_truncated_completions",
    "reward_weights", "loss_type", "num_iterations", "epsilon", "epsilon_high",
    "importance_sampling_level", "off_policy_mask_threshold", "use_bias_correction_kl",
    "entropy_coef", "use_adaptive_entropy", "entropy_target", "entropy_coef_delta",
    "entropy_coef_min", "entropy_coef_max", "log_completions", "num_completions_to_print",
)  # fmt: skip
"""The keys of ``trl`` that have the same name in TRL's configuration of GRPO."""
