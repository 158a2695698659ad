"""Processes that share caches, begin again, are forked, or run a cell of a notebook anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ..load import stretched

MODEL = """
import hashlib, json, os, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
import fusewright
from tests.explained import explain

torch.set_num_threads(int(sys.argv[1]))
config = LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1,
)
ids = torch.arange(48).reshape(2, 24)

def made():
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return fusewright.optimize(get_peft_model(model, lora), codegen=sys.argv[2])

def step(model):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    values = hashlib.sha256(loss.detach().numpy().tobytes())
    for parameter in model.parameters():
        if parameter.grad is not None:
            values.update(parameter.grad.contiguous().numpy().tobytes())
    return values.hexdigest()

def rewritten(model):
    return sum(explain(model).by_rule().values())
"""

FORKED = """
model = made()
first = step(model)
assert rewritten(model) > 0
reader, writer = os.pipe()
child = os.fork()
if not child:
    torch.set_num_threads(1)  # as in a loader's worker: OpenMP's threads are not forked
    os.write(writer, step(model).encode())
    os._exit(0)
torch.set_num_threads(1)
own = step(model)
os.waitpid(child, 0)
print(json.dumps([os.read(reader, 100).decode(), own]))
"""

CELL = """
import gc, weakref
from fusewright.rewrite import verify

judged, judge = [], verify._judge
verify._judge = lambda *a: judged.append(0) or judge(*a)
found = []
for _ in range(3):
    model = made()  # the model of the last time has no other name
    gc.collect()
    values, before = step(model), len(judged)
    found.append([values, rewritten(model), before])
    alive = weakref.ref(model.get_base_model())
    del model
    gc.collect()
    assert alive() is None, gc.get_referrers(alive())
print(json.dumps(found))
"""

STEP = """
model = made()
print(json.dumps([step(model), rewritten(model)]), flush=True)
"""


def _begin(code: str, cache: Path, threads: int, codegen: str) -> subprocess.Popen[str]:
    environ = {
        **os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "FUSEWRIGHT_VERDICTS": "kept",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    words = [sys.executable, "-c", MODEL + code, str(threads), codegen]
    return subprocess.Popen(
        words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def _end(process: subprocess.Popen[str]) -> Any:
    printed, errors = process.communicate(timeout=stretched(300))
    assert process.returncode == 0, errors
    return json.loads(printed.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_a_fork_of_a_process_that_has_trained_trains(codegen: str, tmp_path: Path) -> None:
    child, own = _end(_begin(FORKED, tmp_path, 2, codegen))
    assert child == own


@pytest.mark.slow
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_a_cell_that_is_run_again_lets_the_model_before_go(codegen: str, tmp_path: Path) -> None:
    first, *later = _end(_begin(CELL, tmp_path, 1, codegen))
    assert first[1] > 0
    for again in later:
        assert again == first  # and no rewrite was verified a second time


@pytest.mark.slow
def test_two_runs_begin_at_once_with_empty_caches(tmp_path: Path) -> None:
    alone = _end(_begin(STEP, tmp_path / "alone", 1, "inductor"))
    two = [_begin(STEP, tmp_path / "shared", 1, "inductor") for _ in range(2)]
    assert [_end(process) for process in two] == [alone, alone]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [4, 8, 12])
def test_a_kernel_that_is_killed_and_restarted(seconds: int, tmp_path: Path) -> None:
    """What it was compiling, or held a lock of, is no obstacle to the next."""
    killed = _begin(STEP, tmp_path / "cache", 1, "inductor")
    time.sleep(seconds)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = _end(_begin(STEP, tmp_path / "cache", 1, "inductor"))
    assert again == _end(_begin(STEP, tmp_path / "fresh", 1, "inductor"))
