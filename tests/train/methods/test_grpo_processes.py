"""GRPO in two processes: what one process would have trained, and resumed."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.methods.grpo import read_batches, write_batches
from fusewright.train.processes.launchers import Placement
from fusewright.train.processes.world import World

from ..processes.runs import STRATEGIES, launched_with
from ..results import difference, weights
from .completions import drawn, grpo_recipe

pytest.importorskip("trl", reason="TRL trains these methods, and is an extra")

REWARD_ARGUMENTS = """
from fusewright.train.methods.grpo import Grpo

def drawn(prompts, length=5):
    return [
        [3 + (sum(ids) * 7 + 31 * (i % 4) + 13 * j * (1 + i % 4)) % 250 for j in range(length)]
        for i, ids in enumerate(prompts)
    ]

Grpo._generate_single_turn = lambda self, prompts, *args, **kwargs: (drawn(prompts), None)
"""
"""The completions of ``completions.drawn``, in other processes."""

KEYS: dict[str, Any] = {
    "eval_steps": 2, "save_steps": 1, "max_steps": 4, "rl_beta": 0.1, "learning_rate": 1e-3,
    "micro_batch_size": 4, "trl": {"num_iterations": 2},
}  # fmt: skip


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusewright.train.methods.grpo import Grpo

    def fixed(self: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return drawn(prompt_ids), None

    monkeypatch.setattr(Grpo, "_generate_single_turn", fixed)


def history(folder: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((folder / "run.json").read_text())["history"]
    return found


def in_two(folder: Path, code: str, name: str, *arguments: str, **keys: Any) -> tuple[int, str]:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**keys, "output_dir": str(folder / name)}), encoding="utf-8")
    return launched_with(code, "train", str(path), "--allow-code", *arguments)


@pytest.mark.long
def test_two_processes_train_what_one_does(base: Path, tmp_path: Path, given: None) -> None:
    """Also the steps that reuse what was generated before; five prompts to validate on do not go
    round; and one process resumes what two have begun."""

    keys = grpo_recipe(base, tmp_path, val_set_size=5, **KEYS)
    two = {**keys, "gradient_accumulation_steps": 1}
    code, said = in_two(tmp_path, REWARD_ARGUMENTS, "two", **two)
    assert code == 0, said
    train(keys, console=Console(quiet=True), allow_code=True)
    one = tmp_path / "out"
    assert difference(weights(tmp_path / "two"), weights(one)) < 1e-5
    names = ("loss", "reward", "reward_std", "kl", "entropy", "num_tokens", "grad_norm",
             "eval_reward", "eval_rewards/letters/mean", "eval_kl")  # fmt: skip
    for mine, other in zip(history(tmp_path / "two"), history(one), strict=True):
        for name in names:
            assert (name in mine) == (name in other), name
            if name in mine:
                assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    texts = json.loads((tmp_path / "two" / "run.json").read_text())["completions"]
    assert texts == json.loads((one / "run.json").read_text())["completions"]
    start = tmp_path / "two" / "checkpoint-1"
    assert sorted(p.name for p in start.glob("completions-*")) == [
        "completions-0.safetensors", "completions-1.safetensors",
    ]  # fmt: skip
    rest = {**keys, "output_dir": str(tmp_path / "rest"), "resume_from_checkpoint": str(start)}
    train(rest, console=Console(quiet=True), allow_code=True)
    assert difference(weights(tmp_path / "rest"), weights(one)) < 1e-5


@pytest.mark.long
def test_a_reward_that_fails_in_one_process(base: Path, tmp_path: Path) -> None:
    """Both end with one message, and with a checkpoint of the last step."""
    code = """
from fusewright.train.rewards.judge import Judge
was = Judge.__call__
def failing(self, **given):
    if rank == 1 and given["trainer_state"].global_step == 1:
        self.reward = lambda **columns: [1.0]
    return was(self, **given)
Judge.__call__ = failing
"""
    keys = {**grpo_recipe(base, tmp_path), "val_set_size": 0, "gradient_accumulation_steps": 1}
    ended, said = in_two(tmp_path, code, "two", **keys)
    assert ended == 2, said
    message = "trl.reward_funcs.0: the reward letters returned 1 rewards for 4 completions"
    assert said.count(message) == 1, said
    assert (tmp_path / "two" / "checkpoint-1" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "fsdp",
        pytest.param(
            "zero3",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed"),
        ),
    ],
)
@pytest.mark.parametrize("optimize", [False, True])
def test_sharded_weights_generate_and_train_the_same(
    name: str, optimize: bool, base: Path, tmp_path: Path
) -> None:
    """Also the reference model, which is sharded as well."""
    full = {"adapter": None, "lora_r": None, "lora_target_linear": None}
    keys = grpo_recipe(base, tmp_path, **{**KEYS, "optimize": optimize}, **full)
    found = {}
    for kind in ("ddp", name):
        code, said = in_two(tmp_path, "", kind, **keys, **STRATEGIES[kind])
        assert code == 0, said
        found[kind] = history(tmp_path / kind)
    assert any(entry.get("kl", 0.0) > 0.0 for entry in found["ddp"])
    for one, other in zip(found["ddp"], found[name], strict=True):
        for figure in ("loss", "reward", "kl", "entropy", "eval_reward", "eval_kl"):
            if figure in one:
                assert other[figure] == pytest.approx(one[figure], rel=1e-3, abs=1e-5), figure
    assert difference(weights(tmp_path / "ddp"), weights(tmp_path / name)) < 1e-4


def world(rank: int, size: int) -> World:
    return World(Placement(rank=rank, size=size, local_rank=rank, local_size=size))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2), (2, 4), (4, 2)])
def test_pending_batches_of_other_processes(before: int, after: int, tmp_path: Path) -> None:
    """Those of eight passes, by their numbers."""
    for rank in range(before):
        mine = [
            {"ids": torch.full((2, 1 + i), i), "number": torch.tensor(float(i)), "none": None}
            for i in range(rank, 8, before)
        ]
        write_batches(tmp_path, mine, world(rank, before))
    for rank in range(after):
        found = read_batches(tmp_path, world(rank, after), before)
        assert [int(batch["number"]) for batch in found] == list(range(rank, 8, after))
        assert all(b["ids"].shape == (2, 1 + int(b["number"])) for b in found)
        assert all(b.keys() == {"ids", "number"} for b in found)
    shutil.rmtree(tmp_path)
    with pytest.raises(RecipeError, match=r"it has no completions-0\.safetensors"):
        read_batches(tmp_path, world(0, after), before)
