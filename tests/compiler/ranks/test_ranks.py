"""Ranks of one job: sites verified once, ranks that die, what runs a collective."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusewright import optimize, sharding
from fusewright.compiler.ranks import verdicts
from fusewright.compiler.ranks.verdicts import SharedVerdicts, job_store
from fusewright.rewrite import verify
from fusewright.rewrite.engine import Candidate, Verdict
from fusewright.sharding import collectives_of
from fusewright.train.finish import differences, statuses
from fusewright.train.processes.world import World
from tests.explained import explain

from ...train.processes.ranks import alone, run_ranks, values

SITES = ("module", "rule", "op", "status", "reason", "error", "grad_error", "saved_after")


def _model(act: str = "silu", width: int = 32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=width, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, hidden_act=act,
        )
    )  # fmt: skip


def _step(model: nn.Module) -> float:
    ids = torch.arange(22).reshape(2, 11)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach())


def _counting(seen: list[str], before: Callable[[], None] = lambda: None) -> None:
    """Note each verification of this process."""
    judge = verify._judge

    def counted(candidate: Candidate, traced: bool) -> Verdict:
        before()
        seen.append(candidate.rule.name)
        return judge(candidate, traced)

    verify._judge = counted


def _sites(model: nn.Module) -> list[list[Any]]:
    return [[getattr(s, name) for name in SITES] for s in explain(model).sites]


def _first_step(world: World, acts: list[str], width: int = 32) -> dict[str, Any]:
    seen: list[str] = []
    judge = verify._judge
    _counting(seen)
    model = optimize(_model(acts[world.rank], width), codegen="eager")
    loss = _step(model)
    verify._judge = judge
    own = statuses(explain(model))
    return {
        "verified": sorted(seen), "sites": _sites(model), "loss": loss,
        "differences": differences(world.gather(own)),
    }  # fmt: skip


def _all_parts(world: World) -> dict[str, Any]:
    return {
        "equal": _first_step(world, ["silu", "silu"]),
        "other": _first_step(world, ["silu", "relu"], 48),
    }


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """What one process finds."""
    return _first_step(alone(), ["silu"])


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What two find, in one run for all tests: most of its time is the first imports."""
    return values(_all_parts)


@pytest.mark.long
def test_two_ranks_verify_each_site_once(one: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    found = [r["equal"] for r in ranks]
    assert one["verified"]
    assert sorted(found[0]["verified"] + found[1]["verified"]) == one["verified"]
    for rank in found:
        assert rank["sites"] == one["sites"]
        assert rank["loss"] == one["loss"]
        assert rank["differences"] == []


def test_ranks_with_other_graphs_verify_their_own(
    one: dict[str, Any], ranks: list[dict[str, Any]]
) -> None:
    found = [r["other"] for r in ranks]
    verified = [r["verified"] for r in found]
    # the sites that are equal once, and the new activation by its rank; the other one is known
    assert sum(v.count("rms_norm") for v in verified) == one["verified"].count("rms_norm")
    assert [v.count("glu") for v in verified] == [0, 1]
    assert all(site[3] == "rewritten" for r in found for site in r["sites"])
    assert [len(r["sites"]) for r in found] == [len(one["sites"])] * 2


def _one_dies(world: World, folder: Path) -> None:
    verdicts.PATIENCE = 1.0
    seen: list[str] = []

    def die() -> None:
        if world.rank == 1:
            (folder / "claimed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    _counting(seen, die)
    while world.rank != 1 and not (folder / "claimed").exists():
        time.sleep(0.02)
    model = optimize(_model(), codegen="eager")
    _step(model)
    text = json.dumps({"verified": sorted(seen), "sites": _sites(model)})
    (folder / f"{world.rank}.json").write_text(text)


@pytest.mark.long
def test_a_rank_that_dies_while_the_others_wait(one: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(_one_dies, tmp_path, size=3)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 2)]
    assert all(r["sites"] == one["sites"] for r in found)
    # what the dead one had claimed both may have verified; the rest one of them has
    assert len(found[0]["verified"] + found[1]["verified"]) <= len(one["verified"]) + 1


# ------------------------------------------------------------------------------ collectives


def _hooked() -> nn.Module:
    def hook(*_: Any) -> None: ...

    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_pre_hook(hook)
    return model


def _sharded() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.ds_id = 0  # type: ignore[assignment]
    return model


def _checkpointed() -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_hooked, "0 is wrapped by deepspeed.runtime.zero"),
        (_sharded, "its parameters are sharded"),
        (_checkpointed, None),
        (lambda: nn.Linear(2, 2), None),
    ],
)
def test_what_runs_a_collective_when_it_is_called(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], said: str | None
) -> None:
    model = make()
    assert collectives_of(model) is None  # of one process
    monkeypatch.setattr(sharding, "has_peers", lambda: True)
    assert collectives_of(model) == said


# ------------------------------------------------------------------------------ ranks that differ


def test_what_is_said_of_ranks_that_differ() -> None:
    one = {f"layers.{i}: glu": "rewritten" for i in range(5)}
    assert differences([one, dict(one)]) == []
    assert differences([one]) == []
    two = {**one, "layers.1: glu": "refused (output 0: …)"}
    two.pop("layers.4: glu")
    assert differences([one, dict(one), two]) == [
        "rank 2 has other rewrites than rank 0: layers.1: glu refused (output 0: …) in place of "
        "rewritten; layers.4: glu not found in place of rewritten"
    ]
    (line,) = differences([one, {}])
    assert line.endswith("; and at 2 more places")
    assert differences([one, None]) == ["rank 1 cannot say what was rewritten"]
    assert differences([None, one]) == ["rank 0 cannot say what was rewritten"]


# ------------------------------------------------------------------------------ many at a time


def _many(world: World, count: int) -> dict[str, Any]:
    order = list(range(count))
    random.Random(world.rank).shuffle(order)
    shared, made, found = SharedVerdicts(), [], {}

    def verdict(number: int) -> Verdict:
        time.sleep(0.001 * (number % 3))
        made.append(number)
        return Verdict(f"{number} by {world.rank}")

    for number in order:
        found[number] = shared.decide(
            job_store(), world.rank, str(number), lambda n=number: verdict(n)
        ).reason
    return {"made": made, "found": found, "silent": len(shared.silent)}


@pytest.mark.slow
def test_ranks_that_meet_sites_in_other_orders() -> None:
    ranks = values(_many, 60, size=4)
    assert sorted(n for r in ranks for n in r["made"]) == list(range(60))
    assert all(r["found"] == ranks[0]["found"] and not r["silent"] for r in ranks)
