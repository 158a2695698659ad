"""Configurations of DeepSpeed: from a file, or built-in equivalents of files that recipes name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import RecipeError
from ..json_text import BadJsonError, parse_json

_FOLDER = "deepspeed_configs"
"""The folder that recipes name: of Axolotl's repository, which a package does not have."""

_CPU: dict[str, Any] = {"device": "cpu", "pin_memory": True}

_BUILT_IN: dict[str, dict[str, Any]] = {
    "zero1.json": {"stage": 1},
    "zero1_torch_compile.json": {"stage": 1},
    "zero2.json": {"stage": 2, "offload_optimizer": _CPU},
    "zero2_torch_compile.json": {"stage": 2, "offload_optimizer": _CPU},
    "zero3.json": {"stage": 3},
    "zero3_bf16.json": {"stage": 3},
    "zero3_bf16_cpuoffload_params.json": {"stage": 3, "offload_param": _CPU},
    "zero3_bf16_cpuoffload_all.json": {
        "stage": 3, "offload_param": _CPU, "offload_optimizer": _CPU,
    },
}  # fmt: skip
"""What ``zero_optimization`` has besides the settings of its stage, by the file's name."""

_COMMUNICATION: dict[int, dict[str, Any]] = {
    1: {"overlap_comm": True},
    2: {"overlap_comm": True, "contiguous_gradients": True},
    3: {
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}

_AUTO = (
    "gradient_accumulation_steps", "gradient_clipping", "train_batch_size",
    "train_micro_batch_size_per_gpu",
)  # fmt: skip


_SAME = {
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
"""Settings that a recipe has a key for, too."""


_OF_THE_RECIPE = {
    "optimizer": "optimizer, learning_rate, weight_decay and adam_*",
    "scheduler": "lr_scheduler, warmup_ratio and warmup_steps",
    "amp": "bf16 and fp16",
}
"""Sections that a recipe has keys for, with the keys."""


def built_in(name: str) -> dict[str, Any] | None:
    """The equivalent of a file that recipes name, e.g. ``deepspeed_configs/zero3.json``, or None.

    The folder may be left out. The configuration has the same stage, with the same offloading.
    Dtypes, batches and clipping are ``auto``, which is what the recipe says. The optimizer is the
    recipe's, too: one that is offloaded needs no C++ compiler.
    """
    path = Path(name)
    settings = _BUILT_IN.get(path.name)
    if settings is None or path.parent.name not in ("", _FOLDER):
        return None
    config: dict[str, Any] = {
        "zero_optimization": {**_COMMUNICATION[settings["stage"]], **settings},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        **dict.fromkeys(_AUTO, "auto"),
        "wall_clock_breakdown": False,
    }
    if "offload_optimizer" in settings:
        config |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    return config


def built_in_names() -> list[str]:
    """The names of the files that have an equivalent."""
    return list(_BUILT_IN)


def uses_built_in(deepspeed: Any) -> bool:
    """Whether a recipe's ``deepspeed``, its path resolved, names a built-in configuration."""
    named = isinstance(deepspeed, str) and built_in(deepspeed) is not None
    return named and not Path(deepspeed).is_file()


def read_config(deepspeed: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration that a recipe's ``deepspeed`` is or names.

    It is keys and values, a JSON file, or a name that ``built_in`` knows.

    Raises:
        RecipeError: there is no such file, or it is no configuration.
    """
    if not isinstance(deepspeed, str):
        return _checked(deepspeed, "")
    path = Path(deepspeed)
    if not path.is_file():
        config = built_in(deepspeed)
        if config is None:
            raise RecipeError(
                f"there is no file {deepspeed} next to the recipe or in the current folder; those "
                f"that need no file are, in {_FOLDER}/, {', '.join(_BUILT_IN)}"
            )
        return config
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except BadJsonError as error:
        line = f", line {error.line}" if error.line else ""
        raise RecipeError(error.of(f"{path}{line}")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path} must hold one JSON object, a configuration of DeepSpeed")
    return _checked(value, f"{path}: ")


def mismatches(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """The values of a configuration that are not those of the recipe, a sentence each.

    Of the recipe: ``micro_batch_size``, ``gradient_accumulation_steps`` and ``max_grad_norm``.
    """
    return [
        f"{name} is {config[name]}, but {key} is {recipe[key]}: write auto for it in the "
        f"configuration, or set {key}: {config[name]}"
        for name, key in _SAME.items()
        if config.get(name, "auto") not in ("auto", recipe[key])
    ]


def _checked(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    for name in ("zero_optimization", "bf16", "fp16"):
        value = config.get(name, {})
        if not isinstance(value, Mapping):
            hint = ', such as {"enabled": "auto"}' if name != "zero_optimization" else ""
            raise RecipeError(f"{where}{name} must be keys and values{hint}, not {value!r}")
    if stage(config) not in (1, 2, 3):
        raise RecipeError(
            f"{where}zero_optimization.stage must be 1, 2 or 3; remove deepspeed to train without "
            "ZeRO (DDP)"
        )
    for name, keys in _OF_THE_RECIPE.items():
        if name in config:
            raise RecipeError(f"{where}{name}: the recipe's {keys} say this: remove the section")
    return config


def stage(config: Mapping[str, Any]) -> Any:
    """The stage of ZeRO; 0 is none."""
    return (config.get("zero_optimization") or {}).get("stage", 0)
