"""The keys of adapters: LoRA and its kin, by PEFT; and which weights train without one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from .base import METHOD, Float, Int, Keys, PositiveInt, key, not_applicable, not_yet, subsumed


def _off(value: Any) -> Any:
    return None if value is False else value


StepsOrOff = Annotated[Int | None, BeforeValidator(_off)]
"""A number of steps; false is unset."""

_MIXLORA = "only adapter: mixlora reads it"


_NOT_ADDED = (
    "peft_use_dora", "peft_use_rslora", "lora_rank_pattern", "lora_alpha_pattern",
    "peft_init_lora_weights", "lora_target_parameters", "peft_layer_replication",
)  # fmt: skip
"""Keys of adapters that cannot be added up to one."""


class LoftQ(Keys):
    """``peft.loftq_config``."""

    loftq_bits: Int = key(4, gt=0)
    """Bits of the quantization whose error the adapters start from."""


class PeftKeys(Keys):
    """``peft``: further settings of PEFT."""

    loftq_config: LoftQ | None = not_yet("leave it out")
    """Initialize the adapters with the quantization error. Unset: no."""

    backend: Literal["bnb", "torchao"] | None = key(
        values={"torchao": ("not yet available", "use bnb (bitsandbytes)")}
    )
    """Who quantizes the base model: ``bnb``. Unset: the same."""


class AdapterKeys(Keys):
    """Small trained weights alongside frozen ones."""

    adapter: Literal["lora", "qlora", "llama-adapter", "mora", "mixlora"] | None = key(
        values={
            "llama-adapter": ("not yet available", "use lora"),
            "mora": ("not yet available", "use lora"),
            "mixlora": ("not yet available", "use lora with lora_target_parameters"),
        }
    )
    """``lora``, or ``qlora`` (the same on weights of 4 bits), or unset to train every weight."""

    lora_model_dir: str | None = None
    """A folder with an adapter to continue training from. Unset: a new one."""

    lora_r: Int = key(8, gt=0)
    """Rank of the update of each layer."""

    lora_alpha: Int = key(16, gt=0)
    """The update of a layer is multiplied by ``lora_alpha / lora_r``."""

    lora_rank_pattern: dict[str, PositiveInt] | None = None
    """Ranks of layers that have another one than ``lora_r``, by the end of the layer's name or a
    regular expression for it, e.g. ``{down_proj: 32}``, as PEFT's ``rank_pattern``. Unset: none."""

    lora_alpha_pattern: dict[str, PositiveInt] | None = None
    """The same for ``lora_alpha``, as PEFT's ``alpha_pattern``. Unset: none."""

    lora_dropout: Float = key(0.0, ge=0, lt=1)
    """Probability of dropping an input feature of the adapter."""

    lora_target_linear: bool = False
    """Adapt every linear layer except the output head."""

    lora_target_modules: list[str] | str | None = None
    """Names of the layers to adapt, e.g. ``[q_proj, v_proj]``; adds to ``lora_target_linear``. A
    single string is a regular expression for whole names, and ``all-linear`` is every linear layer.
    Unset: see ``lora_target_linear``."""

    lora_target_parameters: list[str] | str | None = key(
        excludes={"lora_dropout": "needs lora_dropout: 0"}
    )
    """Names of bare parameters to adapt, e.g. the experts of a mixture. Unset: none."""

    lora_exclude_modules: list[str] | str | None = None
    """Names of layers that are not adapted, or a regular expression. Unset: none."""

    lora_modules_to_save: list[str] | None = None
    """Modules that are trained as a whole and saved with the adapter, e.g. ``[embed_tokens,
    lm_head]`` for new tokens. Unset: none."""

    lora_fan_in_fan_out: bool | None = None
    """The weights are stored as (in, out), like GPT-2's. Unset: seen from the layer's class."""

    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""

    peft_use_dora: bool = False
    """Adapt a weight's length apart from its direction (DoRA)."""

    peft_use_rslora: bool = False
    """Scale by ``lora_alpha / sqrt(lora_r)`` (rsLoRA)."""

    peft_layers_to_transform: list[Int] | None = key(if_written=True)
    """Indices of the blocks that are adapted. Unset: all."""

    peft_layers_pattern: list[str] | str | None = key(needs=["peft_layers_to_transform"])
    """The name of the list of blocks, for ``peft_layers_to_transform``. Unset: PEFT finds it."""

    peft_layer_replication: list[tuple[Int, Int]] | None = None
    """Ranges of blocks to repeat, as PEFT's ``layer_replication``. Unset: none."""

    peft_init_lora_weights: bool | str | None = None
    """How adapters are initialized, as PEFT's ``init_lora_weights``, e.g. ``pissa``. Unset: the
    update is zero."""

    peft_trainable_token_indices: list[Int] | dict[str, list[Int]] | None = None
    """Ids of tokens whose embeddings are trained. Unset: none."""

    peft_autocast_adapter_dtype: bool = True
    """Keep the adapters in float32 where the weights have 16 bits."""

    peft_ensure_weight_tying: bool | None = None
    """Keep adapters of tied weights tied. Unset: PEFT's default."""

    peft: PeftKeys | None = not_applicable("what it holds has a status of its own")
    """Further keys of PEFT. Unset: none."""

    loraplus_lr_ratio: Float | None = key(gt=0, if_written=True)
    """Ratio of the learning rates of ``lora_B`` and ``lora_A`` (LoRA+). Unset: 1."""

    loraplus_lr_embedding: Float = key(1e-6, gt=0, read_with=["loraplus_lr_ratio"])
    """Learning rate of adapted embeddings, with ``loraplus_lr_ratio``."""

    unfrozen_parameters: list[str] | None = key(
        unread_with={"adapter": "with an adapter, only the adapter is trained"}
    )
    """Regular expressions: without an adapter, only parameters whose names match one of them at the
    beginning are trained. Unset: all."""

    nf4_backend: Literal["bitsandbytes", "torchao"] = subsumed(
        "load_in_4bit, which is bitsandbytes'", "bitsandbytes",
        values={"torchao": ("not yet available", "use bitsandbytes")},
    )  # fmt: skip
    """Who quantizes to 4 bits."""

    # --- restarts --------------------------------------------------------------------------------

    relora: bool = key(
        False,
        needs={
            "adapter": "needs adapter: lora or qlora, which is merged",
            "jagged_restart_steps": "needs jagged_restart_steps: when it is merged",
        },
        excludes={
            **dict.fromkeys(_NOT_ADDED, "set this or {key}, not both: adapters are added up"),
            "deepspeed or fsdp or fsdp_config": "set this or {key}, not both: merging needs whole "
            "weights in each process (DDP)",
            METHOD: "{key} compares the model with itself without the adapter: leave one out",
        },
    )
    """ReLoRA: merge the adapter into the base after every ``jagged_restart_steps``, and begin a new
    one. The result is one adapter, the sum of all, whose rank is ``lora_r`` times their number."""

    relora_prune_ratio: Float | None = key(ge=0, le=1, read_with=["relora"])
    """Fraction of the optimizer's moments that a restart clears. Unset: 0.9, or 0.999 for
    ``reset``."""

    relora_prune_method: Literal["magnitude", "random", "reset"] | None = key(read_with=["relora"])
    """Which moments a restart clears: the smallest, or random ones. Unset: ``magnitude``."""

    jagged_restart_steps: StepsOrOff = key(gt=0, aliases=["relora_steps"])
    """Steps between two restarts of the learning rate, each of which begins a warm-up anew on top
    of the schedule. Unset, or false: none."""

    jagged_restart_warmup_steps: StepsOrOff = key(
        ge=0, read_with=["jagged_restart_steps"], aliases=["relora_warmup_steps"]
    )
    """Warm-up after such a restart, in steps. Unset, or false: none."""

    jagged_restart_anneal_steps: StepsOrOff = key(
        ge=0, read_with=["jagged_restart_steps"], aliases=["relora_anneal_steps"]
    )
    """Steps over which the learning rate decays before such a restart. Unset, or false: 1."""

    lisa_n_layers: Int | None = key(
        gt=0,
        needs=["lisa_step_interval"],
        excludes={"adapter": "trains whole blocks: set this or adapter, not both"},
    )
    """Number of blocks that train at a time, drawn at random, while the others are frozen (LISA).
    The embeddings and the output head always train. One process, and no adapter. Unset: all."""

    lisa_step_interval: Int | None = key(gt=0, read_with=["lisa_n_layers"])
    """Steps until LISA draws other blocks. Unset: needed by ``lisa_n_layers``."""

    lisa_layers_attribute: str = key("model.layers", read_with=["lisa_n_layers"])
    """Where LISA finds the list of blocks."""
