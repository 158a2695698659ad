"""The keys of the optimizer steps: batches, optimizer, learning rate, and when to stop."""

from __future__ import annotations

from typing import Any, Literal

from .base import METHOD, VALIDATION, Float, Int, Keys, PositiveFloat, Status, key

OPTIMIZERS = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused",
    "adamw_torch_4bit", "adamw_torch_8bit", "adamw_anyprecision", "adamw_hf", "adamw_apex_fused",
    "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "adafactor", "adagrad", "sgd",
    "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise",
    "apollo_adamw", "apollo_adamw_layerwise",
    "lomo", "adalomo", "grokadamw", "stable_adamw",
    "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd",
    "optimi_adamw", "ao_adamw_4bit", "ao_adamw_8bit", "ao_adamw_fp8", "adopt_adamw",
    "came_pytorch", "muon", "dion", "adamc", "muon_8bit", "sinkgd", "polora", "scao",
    "q_galore_adamw8bit", "flash_adamw", "flash_adam", "flash_sgd", "flash_sgdw", "flash_lion",
]  # fmt: skip
"""What transformers has, then Axolotl's own."""

OWN_OPTIMIZERS = ("muon", "came_pytorch")
"""Those that are made here, from torch's and from a package."""

SCHEDULERS = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial",
    "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "warmup_stable_decay", "greedy", "one_cycle", "rex",
]  # fmt: skip
"""What transformers has, then Axolotl's own."""

_QGALORE = "only the optimizer q_galore_adamw8bit reads it"

_NO_OPTIMIZER: dict[Any, tuple[Status, str]] = {
    name: ("not yet available", instead)
    for name, instead in {
        "adamw_hf": "removed from transformers: use adamw_torch",
        "adamw_apex_fused": "removed from transformers: use adamw_torch_fused",
        "optimi_adamw": "use adamw_torch_fused",
        "ao_adamw_4bit": "use adamw_torch_4bit",
        "ao_adamw_8bit": "use adamw_torch_8bit",
        "ao_adamw_fp8": "use adamw_torch_8bit",
        "adopt_adamw": "use adamw_torch_fused",
        "dion": "use adamw_torch_fused",
        "adamc": "use adamw_torch_fused",
        "muon_8bit": "use adamw_8bit",
        "sinkgd": "use adafactor",
        "polora": "use adamw_torch_fused",
        "scao": "use adamw_torch_fused",
        "q_galore_adamw8bit": "use galore_adamw_8bit",
        "flash_adamw": "use adamw_torch_fused",
        "flash_adam": "use adamw_torch_fused with weight_decay: 0",
        "flash_sgd": "use sgd",
        "flash_sgdw": "use sgd",
        "flash_lion": "use lion_32bit",
    }.items()
}


_LORAPLUS = {"loraplus_lr_ratio": "loraplus_lr_ratio sets all rates: use loraplus_lr_embedding"}
_OTHER_LOSS = "set this or kd_trainer, not both: distillation has a loss of its own"
_NO_TOKENS = "weighs tokens of supervised training, and {key} has its own loss"


class LrGroupKeys(Keys):
    """An entry of ``lr_groups``."""

    name: str | None = None
    """What the group is called. Unset: it has no name."""

    modules: list[str]
    """Parts of the names of parameters, e.g. ``[q_proj, k_proj]``. The first group that has a part
    of a parameter's name is the parameter's."""

    lr: PositiveFloat
    """Their learning rate."""


class OptimizationKeys(Keys):
    """The optimizer steps."""

    micro_batch_size: Int = key(1, gt=0)
    """Sequences per forward pass (and per device)."""

    gradient_accumulation_steps: Int = key(1, gt=0)
    """Forward passes per optimizer step."""

    batch_size: Int | None = key(gt=0, excludes=["gradient_accumulation_steps"])
    """Sequences per optimizer step, an older form of ``gradient_accumulation_steps``. Unset: see
    there."""

    eval_batch_size: Int | None = key(gt=0, read_with=VALIDATION, resumable=True)
    """Sequences per forward pass of validation. Unset: ``micro_batch_size``."""

    num_epochs: Float = key(1.0, gt=0, unread_with={"max_steps": "max_steps takes precedence"})
    """Passes over the data; ``max_steps`` takes precedence."""

    max_steps: Int | None = key(gt=0, if_written=True)
    """Optimizer steps; takes precedence over ``num_epochs``. Unset: see there."""

    # --- optimizer -------------------------------------------------------------------------------

    optimizer: OPTIMIZERS = key("adamw_torch_fused", values=_NO_OPTIMIZER)
    """The optimizer, by its name in transformers. ``muon`` is torch's: it orthogonalizes the
    updates of matrices, scaled so that AdamW's learning rates suit them, and all else
    (embeddings, output head, vectors) has AdamW."""

    optim_args: str | dict[str, Any] | None = None
    """Further arguments of the optimizer, as keys and values or as ``a=1,b=2``. Unset: none."""

    optim_target_modules: list[str] | str | None = None
    """Modules that GaLore and APOLLO apply to: names, a regular expression, or ``all_linear``.
    Unset: needed by these only."""

    weight_decay: Float = key(0.0, ge=0)
    """Decoupled weight decay."""

    adam_beta1: Float = key(0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""

    adam_beta2: Float = key(0.999, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""

    adam_epsilon: Float = key(1e-8, gt=0, aliases=["adam_eps"])
    """Added to the denominator of the update. For ``came_pytorch``, which adds it to the squared
    gradient, unset: 1e-30."""

    adam_beta3: Float | None = key(ge=0, lt=1, read_with=["optimizer: came_pytorch"])
    """The third decay of CAME, of its confidence. Unset: 0.9999."""

    adam_epsilon2: Float | None = key(gt=0, read_with=["optimizer: came_pytorch"])
    """The second epsilon of CAME. Unset: 1e-16."""

    max_grad_norm: Float = key(1.0, ge=0)
    """Maximum gradient norm (L2, over all parameters); 0: no clipping."""

    # --- learning rate ---------------------------------------------------------------------------

    learning_rate: Float = key(2e-4, gt=0)
    """The peak learning rate."""

    embedding_lr: Float | None = key(gt=0, unread_with=_LORAPLUS)
    """Learning rate of the embeddings and the output head. Unset: the same."""

    embedding_lr_scale: Float | None = key(gt=0, excludes=["embedding_lr"], unread_with=_LORAPLUS)
    """The same as a multiple of ``learning_rate``. Unset: 1."""

    lr_groups: list[LrGroupKeys] | None = key(min_length=1, unread_with=_LORAPLUS)
    """Learning rates by group of modules. Unset: one for all."""

    lr_scheduler: SCHEDULERS = key(
        "cosine",
        values={"rex": ("not yet available", "use cosine")},
    )
    """The learning rate schedule after the warm-up; ``one_cycle`` has its own warm-up."""

    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Arguments of the scheduler, e.g. ``{num_cycles: 2}``. Unset: none."""

    cosine_min_lr_ratio: Float | None = key(ge=0, le=1, read_with=["lr_scheduler: cosine"])
    """Where ``cosine`` ends, as a fraction of ``learning_rate``. Unset: 0."""

    eta_min: Float | None = key(
        ge=0, read_with=["lr_scheduler: cosine"], excludes=["cosine_min_lr_ratio"]
    )
    """The same as a learning rate, as PyTorch's cosine schedule names it. Unset: see there."""

    cosine_constant_lr_ratio: Float | None = key(ge=0, le=1, read_with=["lr_scheduler: cosine"])
    """The fraction of the steps after which ``cosine`` stays at ``cosine_min_lr_ratio``. Unset:
    1."""

    lr_quadratic_warmup: bool = key(False, read_with=["lr_scheduler: cosine"])
    """Quadratic instead of linear warm-up."""

    lr_div_factor: Float | None = key(gt=1, read_with=["lr_scheduler: one_cycle"])
    """For ``one_cycle``: it starts at ``learning_rate`` divided by this. Unset: 25."""

    warmup_steps: Float | None = key(ge=0)
    """Optimizer steps of linear warm-up from 0; below 1, a fraction of all steps. Unset: none, or
    ``warmup_ratio``."""

    warmup_ratio: Float | None = key(ge=0, lt=1, excludes=["warmup_steps"])
    """The same as a fraction of all steps. Unset: none."""

    # --- regularization and watching -------------------------------------------------------------

    neftune_noise_alpha: Float | None = key(gt=0, aliases=["noisy_embedding_alpha"])
    """Strength of the noise on the embeddings (NEFTune), e.g. 5. Unset: none."""

    label_smoothing_factor: Float = key(
        0.0,
        ge=0,
        lt=1,
        excludes={"use_dft or use_eaft": "set this or {key}, not both", "kd_trainer": _OTHER_LOSS},
        unread_with={METHOD: "the method's loss has no smoothing of labels"},
    )
    """Label smoothing: the part of the target probability that is spread over all tokens."""

    early_stopping_patience: Int | None = key(gt=0, read_with=VALIDATION, resumable=True)
    """Early stopping: validations without improvement until training stops. Unset: off."""

    loss_watchdog_threshold: Float | None = key(gt=0, if_written=True, resumable=True)
    """A loss above this counts as divergence. Unset: off."""

    loss_watchdog_patience: Int | None = key(
        gt=0, read_with=["loss_watchdog_threshold"], resumable=True
    )
    """Logged losses in a row above ``loss_watchdog_threshold`` until training stops. Unset: 3."""

    use_dft: bool = key(
        False,
        aliases=["liger_use_token_scaling"],
        excludes={METHOD: _NO_TOKENS, "kd_trainer": _OTHER_LOSS},
    )
    """Weigh the loss of each token by the probability that the model gives to it (DFT). Validation
    has the plain loss. Several processes train with DDP."""

    use_eaft: bool = key(
        False,
        excludes={
            "use_dft": "set this or use_dft, not both",
            METHOD: _NO_TOKENS,
            "kd_trainer": _OTHER_LOSS,
        },
    )
    """Weigh the loss of each token by the entropy of the most probable ones (EAFT). As
    with ``use_dft``, validation has the plain loss and several processes train with DDP."""

    eaft_alpha: Float | None = key(ge=0, read_with=["use_eaft"])
    """Exponent of that entropy. Unset: 1."""

    eaft_k: Int | None = key(gt=1, read_with=["use_eaft"])
    """How many tokens the entropy is of. Unset: 20."""

    seed: Int = key(42, ge=0, lt=2**32)
    """Seed of the split, the order of the rows, the adapters and dropout."""

    gc_collect_steps: Int | None = key(ge=-1, aliases=["gc_steps"], resumable=True)
    """Steps between two collections of Python's garbage; -1: at the end of each epoch, and before
    each validation. Unset or 0: Python's own choice."""

    torch_empty_cache_steps: Int | None = key(gt=0, resumable=True)
    """Steps between two calls of ``torch.cuda.empty_cache``. Unset: never."""

    accelerator_config: dict[str, Any] | None = None
    """Arguments of accelerate's ``AcceleratorConfig``. Unset: its defaults."""
