"""What a recipe needs installed, checked before anything is loaded."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator

from ..errors import FusewrightError
from ..packages import install, install_extra, untested_once
from ..upstream import changed
from .consent import CODE_SWITCH
from .recipe.export_formats import FORMATS
from .recipe.methods_table import METHODS, Method
from .recipe.paths import is_hub_kernel
from .recipe.preferences import method_of, rows_of
from .recipe.recipe import Recipe

_TRACKERS = {
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "swanlab": ("swanlab", "swanlab"),
}
"""The module and the package of each tracker."""

_OPTIMIZERS = {
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "came_pytorch": ("came_pytorch", "came-pytorch"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "adamw_torch_xla": ("torch_xla", "torch-xla"),
    "adamw_torch_npu": ("torch_npu", "torch-npu"),
    **{
        name: ("bitsandbytes", "bitsandbytes")
        for name in ("adamw_8bit", "adamw_bnb", "ademamix", "lion", "paged_", "rmsprop_bnb")
    },
}
"""The same for optimizers, by prefixes of their names."""


_ATTENTIONS = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn.cute", "flash-attn-4"),
}
"""The same for attentions of transformers, which all need a GPU."""

OTHER_ATTENTIONS = ("xformers", "sage", "varlen", "flash_attention_torch", "fp8")
"""Attentions that transformers does not have, by Axolotl's names: they compute the same, some of
them with rounded products."""


def attention(recipe: Recipe) -> tuple[str | None, str | None]:
    """The attention that a model is loaded with, and a message where it is not the requested one.

    Implementations differ in speed, not in values. What cannot be had here is replaced by the
    model's own choice, which is ``sdpa`` for nearly all. Both are None without a name or a message.
    """
    name = recipe.attention()
    if name in (None, "eager", "sdpa"):
        return name, None
    hub = is_hub_kernel(name)
    why = _hub_kernel_not_here(recipe) if hub else _not_here(str(name))
    if why is None:
        return name, None
    key = "flex_attention" if recipe.attn_implementation is None else "attn_implementation"
    instead = "the model's own attention computes the same values (sdpa, for nearly all models)"
    return None, f"{key}: {name} {why}; {instead}"


def _hub_kernel_not_here(recipe: Recipe) -> str | None:
    """Why an attention that is code on the hub is not used; None: it is allowed, and can run."""
    if not recipe.consent.trust_remote_code:
        return f"is code on the hub, which is run only with {CODE_SWITCH}"
    if not _is_there("kernels"):
        return f"needs the package kernels, which is not installed ({install('kernels')})"
    import torch

    return None if torch.cuda.is_available() else "needs a GPU"


def _not_here(name: str) -> str | None:
    """Why an attention cannot be used on this machine; None: it can, or it has no such name."""
    if name in OTHER_ATTENTIONS:
        return "is not an attention of transformers"
    module, package = _ATTENTIONS.get(name, ("", ""))
    if module and not _is_there(module):
        return f"needs the package {package}, which is not installed ({install(package)})"
    if not module and name != "flex_attention":
        return None
    import torch

    return None if torch.cuda.is_available() else "needs a GPU"


def notices(recipe: Recipe) -> list[str]:
    """The messages about what is replaced here, because it is not installed, or is untested."""
    attentions = attention(recipe)[1]
    return [said for said in (untested_once(), attentions, _vllm_notice(recipe)) if said]


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    return _is_there("vllm")


def _vllm_notice(recipe: Recipe) -> str | None:
    if rows_of(recipe) != "prompts" or recipe.trl is None or not recipe.trl.use_vllm:
        return None
    if has_vllm():
        return None
    return (
        f"trl.use_vllm: needs the package vllm, which is not installed ({install('vllm')}); the "
        "trained model itself generates the completions"
    )


def require_known_names(recipe: Recipe) -> None:
    """Raise FusewrightError where the installed libraries lack names that training needs."""
    needed = {"GRPO": rows_of(recipe) == "prompts", "AdEMAMix": "ademamix" in recipe.optimizer}
    for part in ("training", *(part for part, is_needed in needed.items() if is_needed)):
        if (reason := changed(part)) is not None:
            raise FusewrightError(f"nothing can be trained with this installation: {reason}")


def missing_for_training() -> list[str]:
    """What each run of training imports and is not there, in a sentence, if anything is."""
    missing = [name for name in ("datasets", "jinja2", "matplotlib") if not _is_there(name)]
    names = ", ".join(missing)
    text = f"training needs packages that are not installed ({names}): {install_extra('train')}"
    return [text] if missing else []


def missing_packages(recipe: Recipe) -> list[str]:
    """What the recipe names and cannot be imported: a sentence each; imports nothing."""
    missing = []
    required = [
        (_KEYS[name], name, _TRACKERS[name]) for name in recipe.reporters() if name in _TRACKERS
    ]
    required += [
        ("optimizer", recipe.optimizer, package)
        for start, package in _OPTIMIZERS.items()
        if recipe.optimizer.startswith(start)
    ]
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(recipe, key):
            required.append((key, "true", ("bitsandbytes", "bitsandbytes")))
    if (name := recipe.rounds_as()) is not None:
        gguf = FORMATS[name].writer == "gguf"
        library = ("gguf", "gguf") if gguf else ("compressed_tensors", "compressed-tensors")
        required.append(("qat" if recipe.qat else "export_format", name, library))
    elif recipe.qat is not None:
        required.append(("qat", recipe.qat.weight_dtype, ("torchao", "torchao")))
    if recipe.tokenizer_use_mistral_common:
        tokens = ("mistral_common", "mistral-common")
        required.append(("tokenizer_use_mistral_common", "true", tokens))
    for key, value, (module, package) in required:
        if not _is_there(module):
            rounds = key in ("qat", "export_format") and module != "torchao"
            command = install_extra("export") if rounds else install(package)
            missing.append(
                f"{key}: {value} needs the package {package}, which is not installed: {command}"
            )
    if (method := method_of(recipe)) is not None:
        missing += _trl(method)
    if recipe.deepspeed and not _is_there("deepspeed"):
        missing.append(
            "deepspeed: needs the package deepspeed, which is not installed: "
            f"{install('deepspeed')}"
        )
    return missing


_TRL = (1, 16)
"""The first version of TRL whose trainers have what the methods here need."""


def _trl(method: Method) -> list[str]:
    """What of TRL is missing for a preference method; imports nothing."""
    key = METHODS[method].head.key or f"rl: {method}"
    try:
        present = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return [f"{key} needs the package trl, which is not installed: {install('trl')}"]
    version = tuple(int(part) for part in present.split(".")[:2] if part.isdecimal())
    if version < _TRL:
        return [f"{key} needs trl {'.'.join(map(str, _TRL))} or newer, and {present} is installed: "
                f"{install('trl')}"]  # fmt: skip
    return []


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # what it is in
        return False


_KEYS = {
    "wandb": "wandb_project",
    "mlflow": "mlflow_tracking_uri",
    "comet_ml": "comet_project_name",
    "tensorboard": "use_tensorboard",
    "trackio": "trackio_project_name",
    "swanlab": "swanlab_project",
}


@contextlib.contextmanager
def tracking(recipe: Recipe) -> Iterator[None]:
    """Tell the trackers what the recipe says, by environment variables, which all of them read.

    The variables are restored at the end.
    """
    variables = _environment(recipe)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _environment(recipe: Recipe) -> dict[str, str]:
    """The variables that the trackers read, as far as the recipe sets them."""
    keys = recipe.comet_api_key, recipe.swanlab_api_key
    comet_key, swanlab_key = (key.get_secret_value() if key else None for key in keys)
    settings = {
        "WANDB_PROJECT": recipe.wandb_project,
        "WANDB_ENTITY": recipe.wandb_entity,
        "WANDB_NAME": recipe.wandb_name,
        "WANDB_RUN_ID": recipe.wandb_run_id,
        "WANDB_RESUME": "allow" if recipe.wandb_run_id else None,
        "WANDB_MODE": recipe.wandb_mode,
        "WANDB_WATCH": recipe.wandb_watch,
        "WANDB_LOG_MODEL": recipe.wandb_log_model,
        "MLFLOW_TRACKING_URI": recipe.mlflow_tracking_uri,
        "MLFLOW_EXPERIMENT_NAME": recipe.mlflow_experiment_name,
        "HF_MLFLOW_LOG_ARTIFACTS": True if recipe.hf_mlflow_log_artifacts else None,
        "COMET_API_KEY": comet_key,
        "COMET_WORKSPACE": recipe.comet_workspace,
        "COMET_PROJECT_NAME": recipe.comet_project_name,
        "COMET_EXPERIMENT_KEY": recipe.comet_experiment_key,
        "COMET_START_MODE": recipe.comet_mode,
        "COMET_START_ONLINE": recipe.comet_online,
        "TRACKIO_PROJECT": recipe.trackio_project_name,
        "SWANLAB_PROJECT": recipe.swanlab_project,
        "SWANLAB_WORKSPACE": recipe.swanlab_workspace,
        "SWANLAB_MODE": recipe.swanlab_mode,
        "SWANLAB_API_KEY": swanlab_key,
        "SWANLAB_WEB_HOST": recipe.swanlab_web_host,
        "SWANLAB_API_HOST": recipe.swanlab_api_host,
    }
    trackers = {"WANDB": "wandb", "MLFLOW": "mlflow", "HF": "mlflow", "COMET": "comet_ml",
                "SWANLAB": "swanlab"}  # fmt: skip
    used = set(recipe.reporters())
    variables = {}
    for name, value in settings.items():
        if value is not None and trackers.get(name.split("_")[0], "trackio") in used:
            variables[name] = str(value).lower() if isinstance(value, bool) else str(value)
    if "tensorboard" in used:
        variables["TENSORBOARD_LOGGING_DIR"] = os.path.join(recipe.output_dir, "runs")
    return variables
