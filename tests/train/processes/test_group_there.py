"""A run in processes whose group is there already, as Ray Train and own programs make it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.processes.world import joined

from ..results import difference, same, weights
from .ranks import run_bare
from .runs import Runs


@pytest.fixture
def runs(base: Path, tmp_path: Path) -> Runs:
    return Runs(base, tmp_path)


def _join(rank: int, folder: Path, size: int = 2) -> None:
    """Make the group as a program does that no launcher has started."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        os.environ.pop(name, None)
    dist.init_process_group("gloo", f"file://{folder / 'rendezvous'}", rank=rank, world_size=size)


def _train(rank: int, folder: Path, *recipes: dict[str, Any]) -> None:
    _join(rank, folder)

    def work() -> None:
        for recipe in recipes:  # more than one run in the same group
            assert train(recipe, console=Console(quiet=True)).status == "finished"
        done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=work)  # as in a worker of Ray: signals are not its own
    thread.start()
    thread.join()
    assert done
    both = torch.ones(1)  # the group is as it was
    dist.all_reduce(both)
    assert both.item() == 2
    dist.destroy_process_group()


def test_two_runs_train_what_one_process_does_and_leave_the_group(runs: Runs) -> None:
    keys: dict[str, Any] = {"max_steps": 4, "num_epochs": None, "eval_steps": None}
    recipes = [runs.recipe(name, **keys) for name in ("first", "second")]
    run_bare(_train, runs.folder, *recipes)
    first, second = (weights(runs.folder / name) for name in ("first", "second"))
    assert same(first, second)
    assert difference(first, runs.alone(**keys).weights()) < 1e-5


def _refused(rank: int, folder: Path) -> None:
    _join(rank, folder)
    dist.get_backend_config = lambda *_: "cuda:nccl"  # as where Ray asks for GPUs
    with pytest.raises(RecipeError, match=r"\(cuda:nccl\) has no backend for the CPU: make it"):
        train({"base_model": "x", "datasets": [{"path": __file__}]})
    assert dist.is_initialized()


def test_a_group_of_gpus_alone_is_refused_with_the_remedy(tmp_path: Path) -> None:
    run_bare(_refused, tmp_path)


def test_a_group_of_one_is_one_process(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        with joined(None) as world:
            assert (world.rank, world.size) == (0, 1)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_under_ray_train(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs Ray, which is nobody's dependency here")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    def work(recipe: dict[str, Any]) -> None:  # by value: workers do not import this file
        from rich.console import Console

        from fusewright.train import train

        train(recipe, console=Console(quiet=True))

    keys: dict[str, Any] = {"max_steps": 4, "num_epochs": None, "eval_steps": None}
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        TorchTrainer(
            work, train_loop_config=runs.recipe("ray", **keys),
            torch_config=TorchConfig(backend=backend), scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=str(runs.folder / "of ray")),
        ).fit()  # fmt: skip
    finally:
        ray.shutdown()
    assert difference(weights(runs.folder / "ray"), runs.alone(**keys).weights()) < 1e-5
