"""Merging holds one file of the result in memory, not the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ...load import stretched
from ..conftest import make_tokenizer

MB = 2**20

MEASURED = """
import sys, torch
from pathlib import Path
from fusewright.train.merge import MergeOptions, merge
from fusewright.train.inference.run_folder import open_run
from rich.console import Console

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith(field)).split()[1]) // 1024

run = open_run(sys.argv[1])
quiet = Console(quiet=True)
merge(run, MergeOptions(Path(sys.argv[2])), quiet)  # imports, and what they hold
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
merge(open_run(sys.argv[3]), MergeOptions(Path(sys.argv[4]), None, sys.argv[5]), quiet)
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a model of about 400 MB, in files of 64 MB."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    sizes = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816}
    config = LlamaConfig(
        **sizes, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    make_tokenizer().save_pretrained(folder / "base")
    model.save_pretrained(folder / "base", max_shard_size="64MB")
    model.config._name_or_path = model.name_or_path = str(folder / "base")
    settings = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False}
    get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM")).save_pretrained(
        folder / "adapter"
    )
    return folder / "adapter"


@pytest.mark.long
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from Linux' /proc"
)
def test_the_peak_is_about_one_file(large: Path, trained: Path, tmp_path: Path) -> None:
    total = sum(f.stat().st_size for f in (large.parent / "base").glob("*.safetensors")) / MB
    arguments = [trained, tmp_path / "warm", large, tmp_path / "merged", "64MB"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=stretched(300),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout.split()[-1])
    adapter = (large / "adapter_model.safetensors").stat().st_size / MB
    # one file of the result, and the few copies that merging its largest layer takes
    bound = 64 + adapter + 64
    assert growth < bound < total / 2, f"grew by {growth} MB of {total:.0f}"
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 4
