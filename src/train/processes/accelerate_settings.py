"""What ``accelerate launch`` was told of the training. The recipe decides, so it is not read.

Its options and the files of ``accelerate config`` arrive as environment variables, which
transformers and accelerate read at many places.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .launchers import Environment

_BEGIN = (
    "ACCELERATE_USE_", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_",
    "ACCELERATE_GRADIENT_", "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_FP8_", "ACCELERATE_DOWNCAST_BF16", "ACCELERATE_TORCH_DEVICE", "FSDP_", "FP8_",
    "MEGATRON_LM_", "PARALLELISM_CONFIG_",
)  # fmt: skip
"""How the names of those variables begin."""

_SAID = {
    "ACCELERATE_USE_FSDP": "use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "use_parallelism_config",
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_DYNAMO_BACKEND": "dynamo_backend",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
}
"""The options that a user may miss, by their variables."""

_NOTHING = ("", "no", "none", "false", "auto")
"""Values with which an option does nothing."""


@contextlib.contextmanager
def ignored(environ: Environment) -> Iterator[str | None]:
    """Take the settings of ``accelerate launch`` out of the environment, until the end.

    Args:
        environ: as before once the block is left, whatever libraries have set in it.

    Yields:
        What to say about those that would have changed the run; None: there is none.
    """
    before = {name: environ.pop(name) for name in _settings(environ)}
    try:
        yield _message(before)
    finally:
        for name in _settings(environ):
            del environ[name]
        environ.update(before)


def _settings(environ: Environment) -> list[str]:
    return [name for name in environ if name.startswith(_BEGIN)]


def _message(settings: dict[str, str]) -> str | None:
    found = []
    for name, option in _SAID.items():
        value = settings.get(name, "").lower()
        if value not in _NOTHING:
            found.append(option if value == "true" else f"{option} {value}")
    if settings.get("ACCELERATE_USE_CPU", "").lower() == "true" and torch.cuda.is_available():
        found.append("cpu (CUDA_VISIBLE_DEVICES= hides the GPUs)")
    if not found:
        return None
    return f"the recipe decides; not applied from accelerate launch: {', '.join(found)}"
