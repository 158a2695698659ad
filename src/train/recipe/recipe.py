"""What a recipe may say, as one class.

The keys are in ``keys/``, by subject, in Axolotl's vocabulary. A key that is not there is an error
(with the nearest name), never dropped. ``null`` means unset.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PrivateAttr

from ..consent import Consent
from .keys.adapter import AdapterKeys
from .keys.attention import AttentionKeys
from .keys.axolotl import CloudKeys, MethodKeys, PluginKeys, SubsumedKeys
from .keys.base import Keys
from .keys.data import DataKeys
from .keys.dataset import Dataset, PretrainingDataset, PromptFormat
from .keys.distillation import DistillationKeys
from .keys.distributed import DistributedKeys
from .keys.fusewright import FusewrightKeys
from .keys.images import ImageKeys
from .keys.model import ModelKeys
from .keys.optimization import OptimizationKeys
from .keys.output import OutputKeys
from .keys.precision import PrecisionKeys
from .keys.preferences import PreferenceKeys
from .keys.tracking import TrackingKeys
from .strategy import Strategy, strategy_of

__all__ = ["GROUPS", "Dataset", "PretrainingDataset", "PromptFormat", "Recipe"]

GROUPS: tuple[type[Keys], ...] = (
    ModelKeys, PrecisionKeys, AttentionKeys, AdapterKeys, DataKeys, ImageKeys, OptimizationKeys,
    OutputKeys, TrackingKeys, FusewrightKeys, DistributedKeys, SubsumedKeys, PreferenceKeys,
    DistillationKeys, MethodKeys, PluginKeys, CloudKeys,
)  # fmt: skip
"""The groups of keys, in the order of the documentation."""


class Recipe(
    ModelKeys, PrecisionKeys, AttentionKeys, AdapterKeys, DataKeys, ImageKeys, OptimizationKeys,
    OutputKeys, TrackingKeys, FusewrightKeys, DistributedKeys, SubsumedKeys, PreferenceKeys,
    DistillationKeys, MethodKeys, PluginKeys, CloudKeys,
):  # fmt: skip
    """One training run. The methods say what several keys mean together."""

    _consent: Consent = PrivateAttr(default=Consent())

    @property
    def consent(self) -> Consent:
        """What the caller has allowed. It is no key: nothing that is read can set it."""
        return self._consent

    def allowed(self, consent: Consent) -> Recipe:
        """The same recipe, with the caller's word."""
        copy = self.model_copy()
        copy._consent = consent
        return copy

    def recorded(self) -> dict[str, Any]:
        """Every key as a run's files keep it: ``trust_remote_code`` says what was in force."""
        keys = self.model_dump(mode="json")
        return {**keys, "trust_remote_code": self.consent.trust_remote_code}

    def attention(self) -> str | None:
        """The attention to ask transformers for; None: the model's own choice."""
        if self.strategy().context > 1:
            return "sdpa"  # whose calls torch replaces by ring attention
        if self.attn_implementation is not None:
            return self.attn_implementation
        switches = {
            "sdpa": self.sdp_attention,
            "eager": self.eager_attention,
            "flex_attention": self.flex_attention,
        }
        return next((name for name, on in switches.items() if on), None)

    def precision(self) -> Literal["auto", "bfloat16", "float16", "float32"]:
        """The dtype of weights and computation; ``auto``: see ``has_bfloat16``."""
        if self.fp16 or self.float16:
            return "float16"
        if self.float32 or (self.bf16 is False and not self.bfloat16):
            return "float32"
        return "auto" if self.bf16 == "auto" and not self.bfloat16 else "bfloat16"

    def rounds_as(self) -> str | None:
        """The format of an export whose rounding weights get in training; None: none."""
        # of which torchao needs a GPU that multiplies in it
        nvfp4 = self.qat is not None and self.qat.weight_dtype == "nvfp4"
        return "nvfp4" if nvfp4 else self.export_format

    def rounds_after(self) -> int:
        """The number of steps after which weights are rounded."""
        qat = self.qat.fake_quant_after_n_steps if self.qat is not None else None
        return (qat or self.export_format_after_n_steps) or 0

    def checkpointing(self) -> bool:
        """Whether blocks keep only their inputs for backward."""
        fsdp = self.strategy().fsdp
        return bool(self.gradient_checkpointing or (fsdp and fsdp.activation_checkpointing))

    def accumulation(self) -> int:
        """Forward passes per optimizer step, from ``batch_size`` where that is set."""
        if self.batch_size is None:
            return self.gradient_accumulation_steps
        return max(1, self.batch_size // self.micro_batch_size)

    def strategy(self) -> Strategy:
        """How the work is shared between processes."""
        return strategy_of(self)

    def one_process(self) -> str | None:
        """A key, as it is written, that means one process; None: none does."""
        if self.lisa_n_layers:  # each process would draw blocks, and DDP looks for all gradients
            return f"lisa_n_layers: {self.lisa_n_layers}"
        return "async_save: true" if self.async_save else None

    def packs_sequences(self) -> bool:
        """Whether rows are packed, for training or validation."""
        return self.packs() or (self.validates() and self.packs_validation())

    def packs(self) -> bool:
        """Whether training rows are packed."""
        return bool(self.sample_packing)

    def takes_tokens(self) -> bool:
        """Whether rows are already tokens.

        Axolotl's recipes for images set ``skip_prepare_dataset`` for rows that are none: there they
        are tokenized when a batch is made.
        """
        return self.skip_prepare_dataset and self.processor_type is None

    def packs_validation(self) -> bool:
        """Whether validation rows are packed."""
        return self.packs() if self.eval_sample_packing is None else self.eval_sample_packing

    def validates(self) -> bool:
        """Whether there are rows to validate on."""
        return bool(self.val_set_size or self.test_datasets)

    def streams(self) -> bool:
        """Whether rows are read during training."""
        return bool(self.streaming or self.pretraining_dataset)

    def saving(self) -> Literal["no", "steps", "epoch", "best"]:
        """When checkpoints are made."""
        if self.save_strategy is not None:
            return self.save_strategy
        return "steps" if self.save_steps or self.saves_per_epoch else "no"

    def evaluation(self) -> Literal["no", "steps", "epoch", "best"]:
        """When validation is done between the first and the last step."""
        if not self.validates():
            return "no"
        if self.eval_strategy is not None:
            return self.eval_strategy
        return "steps" if self.eval_steps or self.evals_per_epoch else "no"

    def reporters(self) -> list[str]:
        """The trackers that the figures go to, by their names in transformers' ``report_to``."""
        switches: dict[str, Any] = {
            "wandb": _either(self.use_wandb, self.wandb_project) and self.wandb_mode != "disabled",
            "mlflow": _either(
                self.use_mlflow, self.mlflow_experiment_name or self.mlflow_tracking_uri
            ),
            "comet_ml": _either(self.use_comet, self.comet_project_name),
            "tensorboard": self.use_tensorboard,
            "trackio": _either(self.use_trackio, self.trackio_project_name),
            "swanlab": _either(self.use_swanlab, self.swanlab_project)
            and self.swanlab_mode != "disabled",
        }
        return [name for name, on in switches.items() if on]


def _either(explicit: bool | None, implied: Any) -> bool:
    """The value of a switch, or else what other keys imply."""
    return bool(implied) if explicit is None else explicit
