"""The keys of a recipe that trains on preferences or rewards, or a model of rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    TypeAdapter,
    ValidationInfo,
    create_model,
    field_serializer,
    field_validator,
)

from .base import Float, Int, Keys, PositiveFloat, PositiveInt, UnreadKeys, key, not_applicable

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
    """Whether vLLM is a server, or shares the GPUs of the trainer. Unset: ``server``."""

    vllm_server_host: str | None = None
    """Host of the server. Unset: ``vllm.host``, or 0.0.0.0."""

    vllm_server_port: Annotated[Int, Field(gt=0, lt=65536)] | None = None
    """Port of the server. Unset: ``vllm.port``, or 8000."""

    vllm_server_timeout: PositiveFloat | None = None
    """Seconds to wait for the server. Unset: 240."""

    vllm_guided_decoding_regex: str | None = None
    """A regular expression that completions must match. Unset: none."""

    vllm_enable_sleep_mode: bool | None = None
    """Free the memory of colocated vLLM while it waits. Unset: no."""

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


class VllmKeys(Keys):
    """``vllm``: settings for vLLM, which generates completions for GRPO."""

    host: str | None = None
    """Host of the server. Unset: ``trl.vllm_server_host``."""

    port: Int | None = key(gt=0, lt=65536)
    """Port of the server. Unset: ``trl.vllm_server_port``."""

    gpu_memory_utilization: PositiveFloat | None = key(le=1)
    """Fraction of a GPU's memory that colocated vLLM takes. Unset: 0.3."""

    tensor_parallel_size: PositiveInt | None = None
    """Processes that share each layer of colocated vLLM. Unset: 1."""

    max_model_len: PositiveInt | None = None
    """Longest prompt and completion, in tokens. Unset: what the model was made for."""


# A recipe without a preference method reads none of their keys. It is often made from another one,
# and keeps its keys: a value that no method could take is no mistake then.


METHOD_KEYS = ("rl", "reward_model", "process_reward_model")
"""The keys that ask for a method; each of them is read whatever the others say."""


def has_method(values: Any) -> bool:
    """Whether any of these keys of a recipe asks for a method."""
    return any(values.get(key) for key in METHOD_KEYS)


def loose_types(*groups: type[Keys]) -> dict[str, TypeAdapter[Any]]:
    """What values must be where nothing reads them, by key: of the right type, within no limits.

    A key that has no limits is left out. ``groups`` are the classes of ``trl`` and of ``vllm``,
    whose keys may have any value.
    """
    number = TypeAdapter[Any](Float | None)
    types = dict.fromkeys(_NUMBERS, number)
    types["num_labels"] = TypeAdapter(Int | None)
    types["dpo_loss_type"] = TypeAdapter(list[str] | str | None)
    types["dpo_loss_weights"] = TypeAdapter(list[Float] | None)
    for name, group in zip(("trl", "vllm"), groups, strict=True):
        fields: Any = {key: (Any, None) for key in group.model_fields}
        unread: Any = create_model(group.__name__, __base__=UnreadKeys, **fields)
        types[name] = TypeAdapter(unread | None)
    return types


_NUMBERS = (
    "rl_beta", "center_rewards_coefficient", "dpo_label_smoothing", "dpo_ld_alpha", "orpo_alpha",
    "cpo_alpha", "simpo_gamma", "kto_desirable_weight", "kto_undesirable_weight",
)  # fmt: skip


_EBFT = "it samples and embeds with Axolotl's own trainer; use rl: grpo with a reward function"
_GONE = "TRL no longer has it"

DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
"""The losses that TRL's trainer of DPO has."""


PAIRED = ("dpo", "ipo")
GENERATING = ("grpo", "gdpo")
WITH_BETA = (*PAIRED, "orpo", "kto", "simpo", "cpo", *GENERATING)


_LOOSE = loose_types(TrlKeys, VllmKeys)


class PreferenceKeys(Keys):
    """Preferences and rewards."""

    rl: Literal["dpo", "ipo", "orpo", "kto", "simpo", "grpo", "gdpo", "cpo", "ebft"] | None = key(
        values={"ebft": ("not yet available", _EBFT)},
        one_of=["reward_model", "process_reward_model", "kd_trainer"],
        because=": a run trains with one method",
    )
    """The preference or reinforcement learning method. Unset: supervised training.

    The rows of ``datasets`` have other types: ``chat_template`` (and ``.argilla``,
    ``.argilla_chat``), which also reads TRL's plain fields; ``chatml`` and ``llama3``, and their
    variants (``.intel``, ``.icr``, ``.argilla``, ``.argilla_chat``, ``.prompt_pairs``, ``.ultra``);
    the format spelled out as keys; ``bradley_terry.chat_template`` and ``bradley_terry.llama3.icr``
    for reward models; ``stepwise_supervised`` for process reward models; or a Python function,
    ``module.function``, which changes rows and runs only with ``--allow-code``."""

    reward_model: bool | None = None
    """Train a reward model. Unset: no."""

    process_reward_model: bool | None = None
    """Train a reward model that scores each reasoning step. Unset: no."""

    rl_beta: _NotNegative | None = key(aliases=["dpo_beta", "beta"], methods=WITH_BETA)
    """Strength of the penalty for moving away from the reference model. Unset: the method's
    default."""

    num_labels: Int | None = key(gt=0, methods=["reward", "process_reward"])
    """Number of outputs of a reward model. Unset: 1 for ``reward_model``, 2 for
    ``process_reward_model``."""

    center_rewards_coefficient: _NotNegative | None = key(methods=["reward"])
    """Coefficient of the loss term that keeps the mean reward close to 0. Unset: 0."""

    # --- DPO and IPO -----------------------------------------------------------------------------

    dpo_loss_type: list[DpoLoss] | DpoLoss | None = None
    """The loss, or losses, of DPO. Unset: ``sigmoid``."""

    dpo_loss_weights: list[Float] | None = key(min_length=1, needs=["dpo_loss_type"])
    """Weights of several DPO losses. Unset: 1 each."""

    dpo_label_smoothing: Annotated[Float, Field(ge=0, lt=0.5)] | None = key(methods=["dpo"])
    """Probability that the two answers of a pair are swapped. Unset: 0."""

    dpo_use_weighting: bool | None = key(methods=PAIRED)
    """Weight each pair by its probability under the model. Unset: no."""

    dpo_ld_alpha: _Fraction | None = key(methods=PAIRED)
    """Weight of the tokens that an answer has beyond the length of the shorter one (LD-DPO). Unset:
    1."""

    dpo_padding_free: bool | None = not_applicable(
        "TRL's trainer pads the sequences of a batch",
        methods=PAIRED,
        excludes=["precompute_ref_log_probs"],
    )
    """Concatenate the sequences of a batch instead of padding them. Unset: no."""

    precompute_ref_log_probs: bool | None = key(methods=[*PAIRED, "kto"])
    """Compute the log probabilities of the reference model before training. Unset: no."""

    # --- the other methods -----------------------------------------------------------------------

    orpo_alpha: PositiveFloat | None = key(methods=["orpo"])
    """Weight of the odds-ratio term of ORPO. Unset: 0.1."""

    cpo_alpha: _NotNegative | None = key(methods=["cpo", "simpo"])
    """Weight of the log-likelihood term of CPO and SimPO; 0 is SimPO as published. Unset: 1."""

    simpo_gamma: _NotNegative | None = key(methods=["simpo"])
    """Target reward margin of SimPO. Unset: 0.5."""

    kto_desirable_weight: PositiveFloat | None = key(methods=["kto"])
    """Weight of desirable answers in KTO. Unset: 1."""

    kto_undesirable_weight: PositiveFloat | None = key(methods=["kto"])
    """Weight of undesirable answers in KTO. Unset: 1."""

    # --- groups ----------------------------------------------------------------------------------

    trl: TrlKeys | None = key(methods=WITH_BETA)
    """Settings for TRL's trainers. Unset: none."""

    vllm: VllmKeys | None = key(methods=GENERATING)
    """Settings for vLLM, which generates completions for GRPO. Unset: none."""

    # The keys that ask for a method stand first, so that their values are known here.
    @field_validator(*_LOOSE, mode="wrap")
    @classmethod
    def _read_by_a_method(
        cls, value: Any, within_limits: Callable[[Any], Any], info: ValidationInfo
    ) -> Any:
        """Keep values within their limits if there is a method that reads them."""
        assert info.field_name is not None
        # one that asks for what there is not has no value
        if any(info.data.get(key, True) for key in METHOD_KEYS):
            return within_limits(value)
        return _LOOSE[info.field_name].validate_python(value)

    @field_serializer(*_LOOSE)
    def _as_it_is(self, value: Any) -> Any:
        """Take values of any type, without a warning."""
        return value


OF_METHODS = PreferenceKeys.model_fields.keys() - set(METHOD_KEYS)
"""The keys that nothing reads without a method."""
