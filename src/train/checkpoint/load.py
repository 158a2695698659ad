"""Reading checkpoints, with errors that name the checkpoint and the remedy."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations import deepspeed as deepspeed_state

from ...errors import RecipeError
from ...memory.oom_retry import is_out_of_memory
from ...sharding import class_before_fsdp2
from ..model.files import Shards, in_shards
from ..model.from_pretrained import first_words
from .resume import another, without_code


@contextlib.contextmanager
def readable(folder: Any) -> Iterator[None]:
    """Turn errors in reading a checkpoint's files into a RecipeError; None: nothing is read."""
    try:
        with without_code(Path(folder) if folder is not None else None):
            yield
    except RecipeError:
        raise
    except Exception as error:  # torch, safetensors and PEFT raise whatever they meet
        if folder is None or is_out_of_memory(error):
            raise
        raise RecipeError(another(Path(folder), first_words(error))) from error


def trained_weights(folder: Path, model: Any) -> dict[str, Tensor]:
    """The weights of a checkpoint, by their names in ``model``.

    Raises:
        ValueError: it does not have all that is trained.
    """
    if in_shards(folder):
        return dict(Shards.read(folder).weights())
    if not hasattr(model, "peft_config"):
        return _of_whole_model(folder, model)
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    numbers = {name: torch.tensor(i) for i, name in enumerate(names)}
    # PEFT leaves out the adapter's name, and more in some kinds of adapters
    numbers = get_peft_model_state_dict(model, state_dict=numbers, save_embedding_layers=False)
    stored = load_peft_weights(str(folder), device="cpu")
    return {names[int(number)]: stored[key] for key, number in numbers.items()}


def load_trained(folder: Path, model: Any) -> None:
    """Load the weights of a checkpoint into a whole model without adapters."""
    model.load_state_dict(trained_weights(folder, model), strict=False)


def _of_whole_model(folder: Path, model: Any) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    stored = {name: value for file in files for name, value in load_file(file).items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if stored and trained - set(stored):
        stored = _by_model_names(stored, model)
    if missing := sorted(trained - set(stored)):
        raise ValueError(f"its weights have no {missing[0]}")
    return stored


def _by_model_names(stored: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    # transformers saves experts, for one, in an older form, which ``load_state_dict`` does not
    # know: it would leave those weights as they are
    kind: Any = class_before_fsdp2(model)
    dtypes = [value.dtype for value in stored.values() if value.is_floating_point()]
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    with without_zero3():
        instance, info = kind.from_pretrained(
            None, config=copy.deepcopy(model.config), state_dict=stored, dtype=widest,
            output_loading_info=True, use_kernels=False,
        )  # fmt: skip
    invented = set(info["missing_keys"])  # which have random numbers
    return {name: value for name, value in instance.state_dict().items() if name not in invented}


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Let transformers load whole weights; under ZeRO-3 it would divide them."""
    state: Any = deepspeed_state
    before = state._hf_deepspeed_config_weak_ref
    state.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        state._hf_deepspeed_config_weak_ref = before
