"""Weights of checkpoints by the model's own names, which transformers' files may not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations import deepspeed

from fusewright.train import train
from fusewright.train.checkpoint.load import load_trained, trained_weights

from ..conftest import make_model, make_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 262, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip


def _experts(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**SIZES))


@pytest.mark.parametrize("kind", ["experts", "tied"])
def test_all_that_is_trained_is_loaded(kind: str, tmp_path: Path) -> None:
    make = _experts if kind == "experts" else lambda s=0: make_model(s, tie_word_embeddings=True)
    saved, other = make(0), make(1)
    saved.save_pretrained(tmp_path)
    load_trained(tmp_path, other)
    found = dict(other.named_parameters())
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, found[name]), name


def test_weights_are_whole_also_under_zero_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Config:
        def is_zero3(self) -> bool:
            return True

    config = Config()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    model = _experts()
    model.save_pretrained(tmp_path)
    found = trained_weights(tmp_path, model)
    assert all(torch.equal(p, found[name]) for name, p in model.named_parameters())
    assert deepspeed.is_deepspeed_zero3_enabled()


def test_a_file_without_some_of_them_is_refused(tmp_path: Path) -> None:
    make_model(num_hidden_layers=1).save_pretrained(tmp_path)
    model = make_model()
    with pytest.raises(ValueError, match=r"its weights have no model\.layers\.1\.input_layernorm"):
        load_trained(tmp_path, model)


def test_a_fully_trained_model_of_experts_goes_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    _experts().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    keys = {"base_model": str(base), "adapter": None, "lora_r": None, "lora_target_linear": None,
            "save_steps": 2}  # fmt: skip
    train({**recipe, **keys})
    folder = Path(recipe["output_dir"])
    start = {"resume_from_checkpoint": str(folder / "checkpoint-2")}
    train({**recipe, **keys, **start, "output_dir": str(tmp_path / "resumed")})
    whole, resumed = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
