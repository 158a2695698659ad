"""Which samples are trained in which batches, and which ways there are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fusewright.train.data import IGNORED, Sample
from fusewright.train.proof.command import alone, recipe_of
from fusewright.train.proof.ways import (
    DRAWS,
    FILLER,
    BatchLayout,
    Selection,
    Way,
    draws_of,
    in_draws,
    second_eager,
    select,
    sequences_per_step,
    ways_of,
)
from fusewright.train.recipe.keys.base import extra_of
from fusewright.train.recipe.keys.tracking import TrackingKeys
from fusewright.train.recipe.load import load_recipe
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.trainer.schedule import custom_schedule

from ..conftest import small_recipe


def _sample(length: int) -> Sample:
    return Sample(list(range(length)), [IGNORED, *range(1, length)])


def _recipe(tmp_path: Path, **keys: Any) -> Recipe:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    (tmp_path / "config.json").write_text("{}")
    return load_recipe({**small_recipe(tmp_path, rows, tmp_path / "out"), **keys})


FULL: dict[str, Any] = {"adapter": None, "lora_target_linear": None, "lora_r": None}

PACKS = select([[_sample(9), _sample(5)], [_sample(7)], [_sample(4)] * 3, [_sample(8)]], 2, 2)
SINGLES = select([[_sample(n)] for n in (9, 5, 7, 4)], 2, 2)


def _contents(chosen: Selection, layout: BatchLayout) -> list[Counter[int]]:
    """The numbers of the samples of each step."""
    each = layout.rows * layout.passes * layout.processes
    steps = [layout.sequences[i : i + each] for i in range(0, len(layout.sequences), each)]
    assert len(steps) == len(chosen.steps)
    return [Counter(i for s in step for i in s if i != FILLER) for step in steps]


@pytest.mark.parametrize(("chosen", "packing"), [(PACKS, True), (SINGLES, False)])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("processes", [2, 3])
def test_every_way_has_the_same_samples_in_each_step(
    tmp_path: Path, chosen: Selection, packing: bool, rows: int, processes: int
) -> None:
    recipe = _recipe(tmp_path, sample_packing=packing, micro_batch_size=rows)
    ways = ways_of(recipe, chosen, processes, None)
    expected = [Counter(i for s in step for i in s) for step in chosen.steps]
    assert [way.name for way in ways if way.skipped] == []
    for way in [*ways, second_eager(ways[1], chosen)]:
        assert way.layout is not None
        assert _contents(chosen, way.layout) == expected, way.name


def test_names_and_batches(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, micro_batch_size=2)
    found = {w.name: w.layout.text() for w in ways_of(recipe, PACKS, 2, None) if w.layout}
    assert found == {
        "exact": "2 x 1 packs",
        "eager": "2 x 1 packs",
        "optimized": "2 x 1 packs",
        "unpacked": "2 x 2 rows",
        "1 x 2": "1 x 2 packs",
        "2 processes": "1 x 2 packs",
    }
    optimized = [way.name for way in ways_of(recipe, PACKS, 2, None) if way.optimize]
    assert optimized == ["optimized", "unpacked", "1 x 2", "2 processes"]


def test_a_batch_of_one_is_compared_with_one_of_two(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, micro_batch_size=1)
    assert sequences_per_step(recipe) == 2
    found = {w.name: w.layout.text() for w in ways_of(recipe, PACKS, 2, None) if w.layout}
    assert found["eager"] == "1 x 2 packs"
    assert found["2 x 1"] == "2 x 1 packs"


def test_eager_again_has_other_batches(tmp_path: Path) -> None:
    for rows, text in ((2, "1 x 2 packs"), (1, "2 x 1 packs")):
        recipe = _recipe(tmp_path, micro_batch_size=rows)
        eager = ways_of(recipe, PACKS, 2, None)[1]
        again = second_eager(eager, PACKS)
        assert again.layout is not None
        assert again.layout.text() == text
        assert not again.exact
        assert not again.optimize


def test_a_plain_model_that_cannot_pack_trains_one_by_one(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, micro_batch_size=2)
    ways = ways_of(recipe, PACKS, 2, None, mixes=True)
    again = second_eager(ways[1], PACKS)
    found = {w.name: w.layout.text() for w in [*ways, again] if w.layout}
    assert found == {
        "exact": "2 x 2 rows",
        "eager": "2 x 2 rows",
        "optimized": "2 x 1 packs",
        "unpacked": "2 x 2 rows",
        "1 x 2": "1 x 2 packs",
        "2 processes": "1 x 2 packs",
        "eager again": "1 x 4 rows",
    }
    assert not recipe_of(recipe, again, 2, str(tmp_path)).packs()
    expected = [Counter(i for s in step for i in s) for step in PACKS.steps]
    for way in [*ways, again]:
        assert way.layout is not None
        assert _contents(PACKS, way.layout) == expected, way.name


def _skipped(recipe: Recipe, chosen: Selection, processes: int = 2, gpus: Any = None) -> Any:
    return {w.name: w.skipped for w in ways_of(recipe, chosen, processes, gpus) if w.skipped}


def test_packs_of_one_sample_need_no_unpacking(tmp_path: Path) -> None:
    said = _skipped(_recipe(tmp_path), SINGLES)
    assert list(said) == ["unpacked"]
    assert "a single sample" in said["unpacked"]


def test_samples_too_long_to_share_a_sequence(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, sample_packing=False, sequence_len=10)
    said = _skipped(recipe, SINGLES)
    assert said == {"packed": "no two samples of a step fit into sequence_len: 10"}


@pytest.mark.parametrize(
    ("keys", "gpus", "word"),
    [
        ({}, 1, "2 processes need as many GPUs, and there is 1 here"),
        ({"ddp": False}, None, "ddp: false means one process"),
        ({"lisa_n_layers": 1, "lisa_step_interval": 2, **FULL}, None, "lisa_n_layers: 1 means one"),
        ({"dp_replicate_size": 3}, None, "dp_replicate_size"),
        ({"tensor_parallel_size": 2}, None, "tensor_parallel_size"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, None, "deepspeed: it keeps"),
    ],
)
def test_why_several_processes_are_left_out(
    tmp_path: Path, keys: dict[str, Any], gpus: int | None, word: str
) -> None:
    assert word in _skipped(_recipe(tmp_path, **keys), PACKS, 2, gpus)["2 processes"]


def test_one_process_was_asked_for(tmp_path: Path) -> None:
    assert _skipped(_recipe(tmp_path), PACKS, 1) == {
        "1 processes": "--processes 1 asks for one process only"
    }


def test_two_gpus_are_enough(tmp_path: Path) -> None:
    assert not _skipped(_recipe(tmp_path), PACKS, 2, 2)


def test_few_sequences_are_taken_again() -> None:
    chosen = select([[_sample(9)], [_sample(5)], [_sample(7)]], steps=3, size=2)
    assert chosen.steps == [[(0,), (1,)], [(2,), (0,)], [(1,), (2,)]]
    assert [chosen.tokens_of(step) for step in range(3)] == [14, 16, 12]
    assert chosen.tokens == 42
    assert chosen.trained == 36


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_draws_are_all_steps_with_their_tokens_at_other_places(tmp_path: Path, steps: int) -> None:
    chosen = select([[_sample(9), _sample(5)], [_sample(7)], [_sample(8)]], steps, 2)
    draws = draws_of(chosen)
    assert DRAWS <= len(draws.steps) < DRAWS + steps
    assert draws.samples[: len(chosen.samples) - 1] == chosen.samples[:-1]
    assert draws.samples[-1] == chosen.samples[-1]
    assert draws.trained * steps == chosen.trained * len(draws.steps)
    moved = draws.samples[len(chosen.samples) - 1]
    assert moved.input_ids != sorted(moved.input_ids) == list(range(9))
    assert moved.labels == [IGNORED, *moved.input_ids[1:]]
    expected = [Counter(i for s in step for i in s) for step in draws.steps]
    for way in ways_of(_recipe(tmp_path, micro_batch_size=3), chosen, 2, None):
        if way.layout is not None:
            made = in_draws(way, chosen)
            assert (made.name, made.merges, made.fixed_weights) == (way.name, False, True)
            assert made.layout is not None
            assert made.layout.text() == way.layout.text()
            assert _contents(draws, made.layout) == expected, way.name


def test_what_stands_for_an_image_stays_at_its_place() -> None:
    ids, labels = [1, 7, 7, 2, 3, 4], [IGNORED] * 3 + [2, 3, 4]
    sample = Sample(ids, labels, extra='{"images": ["a.png"]}')
    first, moved = draws_of(select([[sample]], DRAWS // 2, 1)).samples[:2]
    assert first == sample
    assert moved == Sample(ids, [IGNORED, 7, 7, 2, IGNORED, IGNORED], sample.extra)


def test_no_more_than_is_needed_is_read() -> None:
    def endless() -> Any:
        while True:
            yield [_sample(3)]

    assert len(select(endless(), 2, 2).samples) == 5  # and the filler


def test_the_filler_trains_nothing() -> None:
    assert PACKS.samples[-1].trained == 0


def test_nothing_is_written_where_the_recipe_says(tmp_path: Path) -> None:
    recipe = _recipe(
        tmp_path, hub_model_id="me/model", use_wandb=True, wandb_project="mine",
        mlflow_experiment_name="mine", comet_project_name="mine", trackio_project_name="mine",
        use_tensorboard=True, save_steps=1, eval_steps=1, warmup_steps=50, lora_dropout=0.1,
        neftune_noise_alpha=5.0, lr_scheduler="cosine", cosine_min_lr_ratio=0.1,
    )  # fmt: skip
    assert recipe.reporters()
    for way in ways_of(recipe, PACKS, 2, None):
        changed = recipe_of(recipe, way, 3, str(tmp_path / "scratch"))
        assert changed.output_dir == str(tmp_path / "scratch")
        assert changed.reporters() == []
        assert changed.hub_model_id is None
        assert changed.saving() == "no"
        assert changed.evaluation() == "no"
        assert changed.lora_dropout == 0
        assert changed.neftune_noise_alpha is None
        assert (changed.warmup_steps, changed.lr_scheduler) == (0, "constant")
        assert (changed.max_steps, changed.optimize) == (3, way.optimize)


def _every_tracker() -> dict[str, Any]:
    """Keys that turn on each tracker there is, in one way or another."""
    found: dict[str, Any] = {}
    for name, field in TrackingKeys.model_fields.items():
        if name.startswith("use_"):
            found[name] = True
        elif field.annotation == str | None:
            found[name] = "mine"
    return found


def test_no_tracker_is_left_on(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, **_every_tracker())
    implied = _recipe(
        tmp_path, **{k: v for k, v in _every_tracker().items() if not k.startswith("use_")}
    )
    switches = [
        name for name, field in TrackingKeys.model_fields.items()
        if name.startswith("use_") and extra_of(field).get("status", "honoured") == "honoured"
    ]  # fmt: skip
    assert len(recipe.reporters()) == len(switches) >= 6
    assert "swanlab" in implied.reporters()
    way = ways_of(recipe, PACKS, 2, None)[1]
    for asked in (recipe, implied):
        assert recipe_of(asked, way, 3, str(tmp_path / "scratch")).reporters() == []
        assert alone(asked).reporters() == []


def test_nothing_is_saved_validated_or_scheduled(tmp_path: Path) -> None:
    """Whatever the recipe says in one of the keys of what comes out."""
    recipe = _recipe(
        tmp_path, dynamic_checkpoint={"enabled": True}, val_set_size=0.2, eval_steps=2,
        eval_on_start=True, do_causal_lm_eval=True, eval_causal_lm_metrics=["perplexity"],
        logging_nan_inf_filter=True, jagged_restart_steps=2, jagged_restart_warmup_steps=1,
        jagged_restart_anneal_steps=1,
    )  # fmt: skip
    way = ways_of(recipe, PACKS, 2, None)[1]
    changed = recipe_of(recipe, way, 3, str(tmp_path / "scratch"))
    assert changed.dynamic_checkpoint is None
    assert changed.eval_on_start is None
    assert changed.do_causal_lm_eval is None
    assert not changed.logging_nan_inf_filter
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    assert custom_schedule(recipe, optimizer, 0, 3) is not None
    assert custom_schedule(changed, optimizer, 0, 3) is None


def test_the_keys_survive_as_json(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, deepspeed={"zero_optimization": {"stage": 2}}, batch_size=8)
    way = ways_of(recipe, PACKS, 2, None)[2]
    changed = recipe_of(recipe, way, 3, str(tmp_path / "scratch"))
    read = Recipe.model_validate(changed.model_dump(mode="json", exclude_defaults=True))
    assert read == changed
    assert read.strategy().engine == "ddp"  # of one process
    assert read.accumulation() == 1


def test_a_way_that_is_not_run_has_no_layout() -> None:
    assert Way("2 processes", optimize=True, skipped="why").layout is None
