"""The keys of distillation: training on the probabilities that a teacher gave to tokens."""

from __future__ import annotations

from .base import Float, Keys, PositiveFloat, key

_SERVER = "only kd_online_server_base_url reads it"


_TRAINER = ["kd_trainer: true"]


class DistillationKeys(Keys):
    """Distillation."""

    kd_trainer: bool = False
    """Train on the probabilities that a teacher gave to the tokens of each answer (knowledge
    distillation); see the type ``axolotl.integrations.kd.chat_template`` of a dataset."""

    kd_alpha: Float | None = key(ge=0, le=1, read_with=_TRAINER)
    """Weight of the divergence from the teacher. Unset: 1."""

    kd_ce_alpha: Float | None = key(ge=0, le=1, read_with=_TRAINER)
    """Weight of the cross entropy that is added to it. Unset: 0."""

    kd_temperature: PositiveFloat | None = key(read_with=_TRAINER)
    """Temperature at which teacher and model are compared; the divergence is multiplied by its
    square. Unset: 1."""

    kd_beta: Float | None = key(ge=0, le=1, read_with=_TRAINER)
    """The divergence: 0 is the forward KL divergence, from the teacher to the model, 1 the reverse
    one; between them, a generalized Jensen-Shannon divergence. Unset: 0."""

    kd_normalize_topk: bool | None = key(read_with=_TRAINER)
    """Normalize the model's probabilities over the tokens that the teacher names, as the teacher's
    always are. Unset: they are those among the whole vocabulary."""

    kd_top_k_before_softmax: bool | None = key(read_with=_TRAINER)
    """The older name of ``kd_normalize_topk``: the softmax is that of the teacher's tokens. Unset:
    no."""
