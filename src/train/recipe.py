"""What a recipe may say. The keys are Axolotl's; the last group is ours.

A key that is not here is an error (with the nearest name), never dropped. ``null`` means unset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):  # Python, and so pydantic, takes True for 1
        raise ValueError("not a number")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Dataset(_Model):
    """One entry of ``datasets``."""

    path: str
    """A ``.jsonl`` file (one row a line) or a ``.json`` file (a list of rows)."""

    builder: str | None = None
    """A Python file that makes ``path`` when that is missing or older than this file: it is run as
    ``python BUILDER PATH`` and must write ``path``. Unset: a missing file is an error."""

    type: Literal["chat_template"] = "chat_template"
    """How a row is read: ``chat_template`` renders its messages with the tokenizer's template."""

    field_messages: str = "messages"
    """The field of a row that holds its list of messages."""

    message_property_mappings: dict[Literal["role", "content"], str] = {}
    """The names of a message's fields, where they are not ``role`` and ``content``."""


class Recipe(_Model):
    """One training run."""

    # --- model -----------------------------------------------------------------------------------

    base_model: str
    """A Hugging Face id, a folder, a ``.gguf`` file, or ``package:NAME`` for the model that an
    installed Python package ships."""

    attn_implementation: str | None = None
    """The attention of transformers, e.g. ``sdpa`` or ``eager``. Unset: the model's own choice."""

    bf16: bool | Literal["auto"] = "auto"
    """Weights and computation in bfloat16 (adapters stay in float32); false: float32. ``auto``:
    bfloat16, except on a GPU that cannot."""

    gradient_checkpointing: bool = False
    """Keep only the inputs of each block for backward, and compute the rest again."""

    memory: str = "auto"
    """What blocks keep for backward: ``auto`` as much as the device has memory for, ``speed``
    everything, ``min`` only their inputs, or the whole budget of the process, such as ``8GB``."""

    # --- adapter ---------------------------------------------------------------------------------

    adapter: Literal["lora"] | None = None
    """``lora``, or unset to train every weight."""

    lora_r: Int = Field(8, gt=0)
    """Rank of the update."""

    lora_alpha: Int = Field(16, gt=0)
    """Scale of the update, times ``lora_r``: it is multiplied by ``lora_alpha / lora_r``."""

    lora_dropout: Float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an input feature of the adapter."""

    lora_target_linear: bool = False
    """Adapt every linear layer except the output head."""

    lora_target_modules: list[str] | None = None
    """Names of the layers to adapt, e.g. ``[q_proj, v_proj]``; adds to ``lora_target_linear``."""

    # --- data ------------------------------------------------------------------------------------

    datasets: list[Dataset] = Field(min_length=1)
    """The rows to train on, from one or several files. A relative path is looked for beside the
    recipe, then in the current folder."""

    val_set_size: Float = Field(0.0, ge=0)
    """Rows held out for validation: a share below 1, or a number of rows. 0: none."""

    sequence_len: Int = Field(512, gt=1)
    """Longest row, and the size of a pack, in tokens."""

    excess_length_strategy: Literal["drop", "truncate", "raise"] = "drop"
    """What happens to a row of more than ``sequence_len`` tokens."""

    sample_packing: bool = False
    """Put several rows into one sequence; each attends only to itself, from position 0."""

    train_on_inputs: bool = False
    """Train every token, not only the assistant's."""

    # --- steps -----------------------------------------------------------------------------------

    micro_batch_size: Int = Field(1, gt=0)
    """Sequences per forward pass (and per device)."""

    gradient_accumulation_steps: Int = Field(1, gt=0)
    """Forward passes per optimizer step."""

    num_epochs: Float = Field(1.0, gt=0)
    """Passes over the data, unless ``max_steps`` says otherwise."""

    max_steps: Int | None = Field(None, gt=0)
    """Optimizer steps; wins over ``num_epochs``."""

    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"] = "adamw_torch_fused"
    """The optimizer, by its name in transformers."""

    learning_rate: Float = Field(2e-4, gt=0)
    """The highest learning rate."""

    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """The course of the learning rate after the warm-up."""

    warmup_steps: Int | None = Field(None, ge=0)
    """Optimizer steps of linear warm-up from 0. Unset: none, or ``warmup_ratio``."""

    warmup_ratio: Float | None = Field(None, ge=0, lt=1)
    """The same as a share of all steps."""

    weight_decay: Float = Field(0.0, ge=0)
    """Decoupled weight decay."""

    adam_beta1: Float = Field(0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""

    adam_beta2: Float = Field(0.999, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""

    adam_epsilon: Float = Field(1e-8, gt=0)
    """Added to the denominator of the update."""

    max_grad_norm: Float = Field(1.0, ge=0)
    """Longest gradient of a step (L2 norm over all parameters); 0: unlimited."""

    seed: Int = Field(42, ge=0)
    """Seed of the split, the order of the rows, the adapters and dropout."""

    # --- output ----------------------------------------------------------------------------------

    output_dir: str = "./model-out"
    """Folder of the results, relative to the current folder."""

    overwrite_output_dir: bool = False
    """Replace the run that ``output_dir`` holds; otherwise that is an error."""

    logging_steps: Int = Field(1, gt=0)
    """Optimizer steps between two entries of the loss curve."""

    eval_steps: Int | None = Field(None, gt=0)
    """Optimizer steps between two validations. Unset: before the first and after the last step."""

    save_steps: Int | None = Field(None, gt=0)
    """Optimizer steps between two checkpoints. Unset: none, only the result is saved."""

    save_total_limit: Int | None = Field(None, gt=0)
    """Checkpoints that are kept. Unset: all."""

    # --- fusewright's own ------------------------------------------------------------------------

    optimize: bool = True
    """Rewrite the model's formulas (``fusewright.optimize``); false: train it as it is."""

    codegen: Literal["auto", "eager", "inductor"] = "auto"
    """What runs the operations that no rewrite claims."""

    strict: bool = False
    """Stop when a rewrite is refused or a known formula is missed."""

    sample_prompt: str | None = None
    """A question that is answered before and after training. Unset: none."""

    sample_max_tokens: Int = Field(64, gt=0)
    """Longest answer to ``sample_prompt``, in tokens."""


def conflicts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield ``(key, problem)`` for keys that are each fine but do not go together.

    Args:
        values: the recipe as written, unset keys left out. It may have other problems.
    """
    targets = values.get("lora_target_linear") or values.get("lora_target_modules")
    if values.get("adapter") == "lora" and not targets:
        yield "adapter", "lora needs lora_target_linear: true, or a list lora_target_modules"
    if "warmup_steps" in values and "warmup_ratio" in values:
        yield "warmup_ratio", "set this or warmup_steps, not both"
    if "eval_steps" in values and not values.get("val_set_size"):
        yield "eval_steps", "needs val_set_size: there are no rows to validate on"
