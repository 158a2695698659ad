"""The keys of a recipe that trains on preferences or rewards, or a model of rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_serializer, field_validator

from ..base import Float, Int, Keys, PositiveFloat, key, not_applicable
from .trl import TrlKeys
from .unread import METHOD_KEYS, loose_types
from .vllm import VllmKeys

_EBFT = "it samples and embeds with Axolotl's own trainer; use rl: grpo with a reward function"
_GONE = "TRL no longer has it"

_Fraction = Annotated[Float, Field(ge=0, le=1)]
_NotNegative = Annotated[Float, Field(ge=0)]
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

    The rows of ``datasets`` have types of their own: ``chat_template`` (and ``.argilla``,
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
