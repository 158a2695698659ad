"""GRPO and GDPO: what runs generate, learn and report, and how they resume."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from fusewright.errors import DataError, RecipeError, RewardError
from fusewright.train import train
from fusewright.train.consent import Consent
from fusewright.train.data import prepare
from fusewright.train.model.tokenizer import load_tokenizer
from fusewright.train.recipe.load import load_recipe
from fusewright.train.report.result import RunResult
from fusewright.train.requirements import has_vllm
from fusewright.train.user_functions import load_function

from ..commands import fusewright
from ..results import assert_same, curves, stop_at, weights
from .completions import drawn, grpo_recipe

pytest.importorskip("trl", reason="TRL trains these methods, and is an extra")

QUIET = Console(quiet=True)
ROOT = Path(__file__).parents[3]
FULL = {"adapter": None, "lora_r": None, "lora_target_linear": None, "learning_rate": 1e-3}


def run(recipe: dict[str, Any], **keys: Any) -> RunResult:
    return train(recipe, console=QUIET, allow_code=True, **keys)


# --- what a run does ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grpo", "gdpo"])
def test_a_run_reports_rewards(method: str, base: Path, tmp_path: Path) -> None:
    rewards = ("letters", "length:3", "length:5")
    keys = {"rl": method, "eval_steps": 2, "rl_beta": 0.1}
    result = run(grpo_recipe(base, tmp_path, rewards, **keys))
    assert (result.status, result.steps, result.figure) == ("finished", 4, "reward")
    assert result.adapter_check["exact"]
    steps = [entry for entry in result.history if "loss" in entry]
    assert len(steps) == 4
    for name in (
        "reward", "reward_std", "kl", "entropy", "completions/mean_length",
        "rewards/letters/mean", "rewards/length_2/mean", "rewards/length_3/mean",
    ):  # fmt: skip
        assert all(name in entry for entry in steps), name
    assert len({entry["reward"] for entry in steps}) > 1
    assert any(
        weight.any() for name, weight in weights(tmp_path / "out").items() if "lora_B" in name
    )
    validations = [entry for entry in result.history if "eval_reward" in entry]
    assert [entry["step"] for entry in validations] == [0, 2, 4]
    assert {"eval_kl", "eval_rewards/letters/mean"} <= validations[1].keys()
    assert "eval_loss" not in validations[1]
    assert validations[2]["eval_reward"] == result.val_reward_after
    assert validations[2]["eval_reward"] == pytest.approx(
        sum(validations[2][f"eval_rewards/{n}/mean"] for n in ("letters", "length_2", "length_3"))
    )
    assert result.val_loss_before is result.val_loss_after is None
    tokens = sum(8 * entry["completions/mean_length"] for entry in steps)
    assert result.trained_tokens == round(tokens)
    assert result.tokens == steps[-1]["num_tokens"]
    assert [entry["step"] for entry in result.completions] == [1] * 4 + [4] * 4
    assert set(result.completions[0]["rewards"]) == {"letters", "length_2", "length_3"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Completions, first and last" in page
    assert "Validation reward" in page
    assert "user: Say" in page
    assert "validation reward" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_completions_continue_the_tokens_of_the_rows(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with variables of the template that only prompts have."""
    from fusewright.train.methods.grpo import Grpo

    seen: list[list[list[int]]] = []
    was = Grpo._generate_single_turn

    def noted(self: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(prompt_ids)
        assert not self.model.training or args
        return was(self, prompt_ids, *args, **kwargs)

    monkeypatch.setattr(Grpo, "_generate_single_turn", noted)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ mark }}"
    keys = {
        "chat_template": "jinja", "chat_template_jinja": template, "val_set_size": 0,
        "chat_template_kwargs": {"mark": "?"}, "trl": {"chat_template_kwargs": {"mark": "="}},
    }  # fmt: skip
    recipe = grpo_recipe(base, tmp_path, **keys)
    run(recipe, max_steps=2)
    checked = load_recipe(recipe, None, Consent(allow_code=True))
    tokenizer = load_tokenizer(checked)
    texts = {f"Say {i}" + "!" * (i % 3) + "=" for i in range(20)}
    assert len(seen) == 2
    for prompts in seen:
        assert len(prompts) == 8
        assert [prompts[i] == prompts[i + 1] for i in range(7)].count(True) == 6
        assert {tokenizer.decode(ids) for ids in prompts} <= texts
    rows = {tuple(sample.input_ids) for sample in prepare(checked, tokenizer).train}
    assert {tuple(ids) for prompts in seen for ids in prompts} <= rows


def test_the_end_of_a_turn_ends_a_completion(base: Path, tmp_path: Path) -> None:
    """Also where the end of texts is another token."""
    folder = tmp_path / "other"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name, key, value in (
        ("tokenizer_config.json", "eos_token", "<|pad|>"),
        ("config.json", "eos_token_id", 0), ("generation_config.json", "eos_token_id", 0),
    ):  # fmt: skip
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, key: value}))
    trl = {"max_completion_length": 200, "generation_kwargs": {"suppress_tokens": [0]}}
    result = run(grpo_recipe(folder, tmp_path, trl=trl, val_set_size=0, max_steps=1))
    entry = next(e for e in result.history if "loss" in e)
    assert entry["completions/clipped_ratio"] < 1.0
    assert entry["completions/min_length"] < 200


@pytest.mark.long
@pytest.mark.parametrize("optimize", [False, True])
def test_a_format_is_learnt(optimize: bool, base: Path, tmp_path: Path) -> None:
    """In some steps nearly all that is drawn begins with a letter."""
    keys: dict[str, Any] = {
        **FULL, "max_steps": 16, "micro_batch_size": 16, "learning_rate": 0.05,
        "optimize": optimize, "trl": {"num_generations": 8, "max_completion_length": 4},
    }  # fmt: skip
    result = run(grpo_recipe(base, tmp_path, ("regex:^[a-zA-Z]",), **keys))
    assert result.val_reward_before < 0.5
    assert result.val_reward_after > 0.8
    if optimize:
        assert result.optimize["logits"].startswith("in tiles: log-probabilities of the trainer")


@pytest.mark.long
def test_no_logits_of_tokens_by_vocabulary_are_made_in_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those of the last token, of which the next one is drawn."""
    from fusewright.compiler.logits.lazy_logits import Buffer

    shapes: list[tuple[int, ...]] = []
    heads: list[tuple[int, ...]] = []
    was, linear = Buffer.fill, torch.nn.functional.linear

    def counted(self: Any) -> Any:
        is_new, values = self.values is None, was(self)
        if is_new:
            shapes.append(tuple(values.shape))
        return values

    def noted(x: Any, weight: Any, *args: Any) -> Any:
        if weight.shape[0] == 262 and torch.is_grad_enabled():
            heads.append(tuple(x.shape))
        return linear(x, weight, *args)

    monkeypatch.setattr(Buffer, "fill", counted)
    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    keys = {"optimize": True, "rl_beta": 0.1, "trl": {"num_iterations": 2}}
    result = run(grpo_recipe(base, tmp_path, **keys))
    assert result.optimize["logits"].startswith("in tiles: log-probabilities of the trainer")
    assert shapes == heads == []


@pytest.mark.slow
def test_no_step_captures_the_model_anew(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation, validation and training change modes; each has its graphs after a few steps."""
    from torch._dynamo.utils import counters

    from fusewright.train.methods.grpo import Grpo

    seen: list[int] = []
    was = Grpo.on_step_end

    def noted(self: Any) -> None:
        was(self)
        seen.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(Grpo, "on_step_end", noted)
    torch._dynamo.reset()
    trl = {"generation_kwargs": {"suppress_tokens": [0, 2]}}
    keys = {"optimize": True, "rl_beta": 0.1, "max_steps": 16, "eval_steps": 1, "trl": trl}
    run(grpo_recipe(base, tmp_path, **keys))
    assert len(seen) == 16, seen
    assert seen[-1] == seen[7] > 0, seen


def test_the_draws_of_a_validation_are_the_same_and_its_own(base: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"learning_rate": 1e-12, "max_steps": 3}
    often = run(grpo_recipe(base, tmp_path, **keys, eval_steps=1))
    found = [entry["eval_reward"] for entry in often.history if "eval_reward" in entry]
    assert len(found) == 4
    assert len(set(found)) == 1
    never = run(grpo_recipe(base, tmp_path, **keys, eval_on_start=False), overwrite=True)
    for name in ("reward", "loss", "entropy"):
        assert [e[name] for e in often.history if name in e] == [
            e[name] for e in never.history if name in e
        ]


def test_several_sets_and_a_reward_that_does_not_judge_all(base: Path, tmp_path: Path) -> None:
    recipe = grpo_recipe(base, tmp_path, ("some", "later"), eval_batch_size=8)
    recipe["test_datasets"] = [{**recipe["datasets"][0], "split": "train[:3]"}] * 2
    recipe["val_set_size"] = 0
    try:
        result = run(recipe, eval_steps=2)
    except RecipeError:  # splits of files are not sliced
        recipe["test_datasets"] = [recipe["datasets"][0]] * 2
        result = run(recipe, eval_steps=4)
    entry = next(e for e in result.history if "eval_reward" in e and e["step"] == 4)
    names = [name for name in entry if name.endswith("_reward") and name != "eval_reward"]
    assert len(names) == 2
    assert entry[names[0]] == pytest.approx(entry[names[1]], rel=0.5)
    assert entry["eval_reward"] == pytest.approx((entry[names[0]] + entry[names[1]]) / 2)


@pytest.mark.parametrize("keys", [{}, {"metric_for_best_model": "rewards/letters/mean"}])
def test_the_best_checkpoint_has_the_highest_reward(
    keys: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    recipe = grpo_recipe(base, tmp_path, eval_steps=1, save_steps=1, load_best_model_at_end=True)
    result = run(recipe, **keys)
    name = f"eval_{keys.get('metric_for_best_model', 'reward')}"
    found = {e["step"]: e[name] for e in result.history if name in e and e["step"]}
    best = max(found, key=lambda step: found[step])
    assert_same(tmp_path / "out", tmp_path / "out" / f"checkpoint-{best}")


def test_logged_completions(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from datasets import Dataset

    trl = {"log_completions": True, "num_completions_to_print": 7}
    result = run(grpo_recipe(base, tmp_path, trl=trl, max_steps=2))
    assert [entry["step"] for entry in result.completions] == [1] * 7 + [2] * 7
    said = "".join(capfd.readouterr())
    assert "Advantage" not in said
    assert "Say" not in said
    files = sorted((tmp_path / "out" / "completions").iterdir())
    assert [file.name for file in files] == [
        "completions_00001.parquet",
        "completions_00002.parquet",
    ]
    table = Dataset.from_parquet(str(files[0]), cache_dir=str(tmp_path / "cache"))
    assert len(table) == 8
    assert {"step", "prompt", "completion", "letters", "advantage"} <= set(table.column_names)
    again = run(grpo_recipe(base, tmp_path, max_steps=1), overwrite=True)
    assert again.status == "finished"
    assert not list((tmp_path / "out" / "completions").iterdir())


# --- resuming -------------------------------------------------------------------------------------

REUSED = {"num_iterations": 2, "generation_batch_size": 12}
"""Completions of three passes, each trained on twice: six passes, and a step makes two."""


@pytest.mark.long("keys0-trl0", "keys1-trl1", "keys2-trl2")
@pytest.mark.parametrize(
    ("keys", "trl"),
    [
        ({"lora_dropout": 0.2}, {}),
        ({"eval_steps": 2, "logging_steps": 2}, {**REUSED, "use_adaptive_entropy": True,
                                                 "entropy_coef": 0.01, "entropy_target": 9.0}),
        ({**FULL, "rl_beta": 0.2}, {**REUSED, "sync_ref_model": True, "ref_model_sync_steps": 2}),
    ],
)  # fmt: skip
def test_a_run_resumes_bit_for_bit_after_each_step(
    keys: dict[str, Any], trl: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    given = {"max_steps": 6, "save_steps": 1, "lr_scheduler": "cosine", **keys}
    recipe = grpo_recipe(base, tmp_path, trl=trl, **given)
    whole = run(recipe, output_dir=str(tmp_path / "whole"))
    for step in range(1, 6):
        start = tmp_path / "whole" / f"checkpoint-{step}"
        rest = run(recipe, output_dir=str(tmp_path / f"rest-{step}"),
                   resume_from_checkpoint=str(start))  # fmt: skip
        assert (rest.status, rest.resumed_from) == ("finished", step)
        assert_same(tmp_path / "whole", tmp_path / f"rest-{step}")
        assert curves(rest) == curves(whole)
        assert rest.completions == whole.completions
    done = run(recipe, output_dir=str(tmp_path / "done"),
               resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))  # fmt: skip
    assert done.completions == whole.completions
    assert curves(done) == curves(whole)
    there = [len(list((tmp_path / "whole" / f"checkpoint-{s}").glob("completions-*")))
             for s in range(1, 7)]  # fmt: skip
    assert there == ([1, 1, 0, 1, 1, 0] if "num_iterations" in trl else [0] * 6)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_signal_within_a_step(
    step: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the unfinished step has generated, drawn and counted is as if it had not been."""
    recipe = grpo_recipe(base, tmp_path, trl=REUSED, max_steps=4)
    whole = run(recipe, output_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        stop_at(patched, step, "on_substep_end")
        stopped = run(recipe)
    assert (stopped.status, stopped.steps) == ("interrupted", step)
    rest = run(recipe, resume_from_checkpoint=True)
    assert_same(tmp_path / "whole", tmp_path / "out")
    assert curves(rest) == curves(whole)


# --- as TRL ---------------------------------------------------------------------------------------


@pytest.mark.long("keys2-trl2-True", "keys1-trl1-True", "keys0-trl0-True")
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(
    ("keys", "trl"),
    [
        ({}, {}),
        ({"rl_beta": 0.3, "rl": "gdpo"}, {"loss_type": "grpo", "temperature": 0.7}),
        ({}, {"num_iterations": 2, "scale_rewards": "batch", "entropy_coef": 0.02}),
    ],
)
def test_steps_are_those_of_trl(
    keys: dict[str, Any],
    trl: dict[str, Any],
    optimize: bool,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the same completions: losses, gradients, rewards, divergence and entropy."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from fusewright.train.data.order import RepeatedOrder
    from fusewright.train.methods.task import task_of
    from trl import GRPOTrainer

    def fixed(self: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return drawn(prompt_ids), None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", fixed)
    recipe = grpo_recipe(base, tmp_path, trl=trl, **FULL, val_set_size=0, max_steps=3, **keys)
    result = run(recipe, optimize=optimize)
    own = [entry for entry in result.history if "loss" in entry]
    checked = load_recipe(recipe, None, Consent(allow_code=True))
    task: Any = task_of(checked)
    tokenizer = load_tokenizer(checked)
    rows = task.sequences(prepare(checked, tokenizer))
    args = task.arguments(rows, _alone())

    class Plain(GRPOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            repeats = self.num_iterations * self.args.steps_per_generation
            return RepeatedOrder([0] * len(rows), checked.seed, "shuffled", 2, 4, repeats)

    args.save_strategy = "no"
    args.model_init_kwargs = {"dtype": "float32"}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    columns = [{k: v for k, v in row.items() if k != "prompt_ids"} for row in rows]
    trainer = Plain(
        model=model, args=args, train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer, reward_funcs=list(task.judges),
    )  # fmt: skip
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(own) == len(theirs) == 3
    for mine, other in zip(own, theirs, strict=True):
        for name in ("loss", "grad_norm", "reward", "reward_std", "kl", "entropy", "num_tokens"):
            assert (name in mine) == (name in other), name
            if name in mine:
                expected = pytest.approx(other[name], rel=2e-4, abs=2e-6)
                assert mine[name] == expected, name
    for name, value in weights(tmp_path / "out").items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=5e-5)


def _alone() -> Any:
    from fusewright.train.processes.world import World

    return World()


# --- what is refused ------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fewer completions than a prompt has": (
        {"micro_batch_size": 1},
        r"trl.num_generations: 2 completions are generated at a time, which is micro_batch_size \(1"
        r"\) x gradient_accumulation_steps \(2\) x processes \(1\), and that must be a multiple of "
        r"trl.num_generations \(4\)",
    ),
    "a default that does not fit": (
        {"trl": {"num_generations": None}, "micro_batch_size": 3},
        r"trl.num_generations \(8, its default\); change one of them",
    ),
    "a generation of no whole batches": (
        {"trl": {"generation_batch_size": 4}, "micro_batch_size": 3},
        r"trl.generation_batch_size: must be a multiple of micro_batch_size \(3\) times",
    ),
    "too few rows": (
        {"gradient_accumulation_steps": 40}, r"completions of 40 prompts .* only 16 rows",
    ),
    "the loss as a judge": (
        {"eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True,
         "metric_for_best_model": "eval_loss"},
        "metric_for_best_model: the loss of grpo does not say how good the model is",
    ),
    "a figure that there is not": (
        {"eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True,
         "metric_for_best_model": "accuracy"},
        "validation has no accuracy; it has eval_reward, ",
    ),
    "a reference that moves beside an adapter": (
        {"trl": {"sync_ref_model": True}, "rl_beta": 0.1},
        "trl.sync_ref_model: needs a reference model of its own, and an adapter has",
    ),
    "a reference that moves and is none": (
        {"trl": {"sync_ref_model": True}, **FULL}, "trl.sync_ref_model: needs rl_beta above 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_model_is_loaded(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusewright.train import run as run_module

    monkeypatch.setattr(run_module, "ready_model", lambda *args, **kwargs: pytest.fail("loaded"))
    keys, said = REFUSED[name]
    with pytest.raises(RecipeError, match=said) as refused:
        run(grpo_recipe(base, tmp_path, **keys))
    assert "\n" not in str(refused.value).strip()


def test_processes_that_share_layers_do_not_generate(base: Path, tmp_path: Path) -> None:
    for key in ("tensor_parallel_size", "context_parallel_size"):
        keys = {key: 2, "fsdp": True, "trl": {"reward_funcs": ["format"]}}
        with pytest.raises(RecipeError, match=f"{key}: grpo is not trained with it"):
            load_recipe(grpo_recipe(base, tmp_path, **keys))


def test_a_field_with_the_answer_is_missing(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs the field 'solution' with the right answer"):
        run(grpo_recipe(base, tmp_path, ("exact_match:solution",)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("too_few", "too_few returned 1 rewards for 16 completions, not one each"),
        ("words", "words returned 'good' as a reward, which is not a number"),
        ("one_number", "one_number returned a float, not a list with one number each"),
        ("endless", "endless returned an infinite reward"),
    ],
)
def test_what_is_no_reward(name: str, said: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=f"^trl.reward_funcs.1: the reward {said}\n"):
        run(grpo_recipe(base, tmp_path, ("letters", name), eval_batch_size=16))


def test_a_reward_that_fails_leaves_a_checkpoint(base: Path, tmp_path: Path) -> None:
    recipe = grpo_recipe(base, tmp_path, ("failing",), val_set_size=0)
    said = r"^trl.reward_funcs.0: the reward failing raised KeyError at of_mine.py:\d+: 'no such"
    with pytest.raises(RewardError, match=said):
        run(recipe)
    assert (tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors").exists()


def told(recipe: dict[str, Any]) -> tuple[RunResult, str]:
    """A run, and what it printed."""
    text = io.StringIO()
    result = train(recipe, console=Console(file=text, width=1000), allow_code=True)
    return result, text.getvalue()


@pytest.mark.parametrize("held", [0, 4])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ("no_number",),
            r"^trl.reward_funcs.0: the reward no_number returned NaN for all \d+ c",
        ),
        (("silent",), r"^trl.reward_funcs.0: the reward silent returned None for all \d+ comple"),
        (
            ("silent", "no_number"),
            "^trl.reward_funcs: the reward silent returned None and the reward no_number returned "
            r"NaN for all \d+ completions, from which nothing can be learnt",
        ),
        (
            ("ending",),
            r"^trl.reward_funcs.0: the reward ending called sys.exit\(0\) at of_mine.py:",
        ),
    ],
)
def test_a_step_that_no_reward_judges(
    names: tuple[str, ...], said: str, held: int, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(RewardError, match=said):
        run(grpo_recipe(base, tmp_path, names, val_set_size=held))


def test_some_completions_that_no_reward_judges(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result, said = told(grpo_recipe(base, tmp_path, ("some",), val_set_size=0, max_steps=2))
    assert result.status == "finished"
    assert said.count("no reward judged") == 1
    assert "warning: step 1: no reward judged 3 of 8 completions (None or NaN)" in said
    assert "All reward functions returned None" not in capfd.readouterr().err


def test_equal_rewards_are_told_once(base: Path, tmp_path: Path) -> None:
    keys = {"val_set_size": 0, "max_steps": 7}
    _, said = told(grpo_recipe(base, tmp_path, ("constant", "by_prompt"), **keys))
    line = next(line for line in said.splitlines() if "equal rewards" in line)
    assert line.startswith("warning: in 5 logged steps, all completions of a prompt had the same")
    assert "constant gave 0.25 to all, by_prompt did not tell them apart; use rewards" in line
    assert said.count("equal rewards") == 1
    keys |= {"max_steps": 1, "overwrite_output_dir": True}
    _, said = told(grpo_recipe(base, tmp_path, ("constant",), **keys))
    assert "warning: in the only logged step, all completions of a prompt had the same" in said
    _, said = told(grpo_recipe(base, tmp_path, ("constant", "letters"), **keys))
    assert "equal rewards" not in said


def test_the_rows_of_a_nan_loss(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusewright.train.methods.grpo import Grpo

    was = Grpo.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = was(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 1 else loss

    monkeypatch.setattr(Grpo, "compute_loss", broken)
    result = run(grpo_recipe(base, tmp_path, val_set_size=0))
    assert (result.status, result.steps, result.problems) == ("nan", 1, [])
    text = (tmp_path / "out" / "nan-batch-2.txt").read_text(encoding="utf-8")
    assert text.count("row 3, loss of the forward pass nan") >= 1
    assert "Say" in text
    tensors = load_file(tmp_path / "out" / "nan-batch-2.safetensors")
    assert {"0.prompt_ids", "0.completion_ids", "0.advantages"} <= tensors.keys()


@pytest.mark.skipif(has_vllm(), reason="vLLM is installed, and would generate")
def test_without_vllm_the_model_generates(base: Path, tmp_path: Path) -> None:
    keys = {"trl": {"use_vllm": True, "vllm_server_timeout": 5}, "max_steps": 1}
    text = io.StringIO()
    recipe = grpo_recipe(base, tmp_path, **keys)
    result = train(recipe, console=Console(file=text, width=300), allow_code=True)
    assert result.status == "finished"
    assert "trl.use_vllm: needs the package vllm, which is not installed" in text.getvalue()


def test_a_finished_run_is_evaluated_by_its_rewards(base: Path, tmp_path: Path) -> None:
    recipe = grpo_recipe(base, tmp_path, ("length:4",), load_best_model_at_end=True, eval_steps=2,
                         save_steps=2)  # fmt: skip
    result = train(recipe, console=QUIET)
    assert fusewright("eval", tmp_path / "out").exit_code == 0
    found = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    assert found["reward"] == pytest.approx(result.val_reward_after, abs=0.5)
    assert found["recorded_val_reward"] == result.val_reward_after
    assert "loss" not in found


def test_a_run_with_a_function_is_evaluated_with_the_callers_word(
    base: Path, tmp_path: Path
) -> None:
    result = run(grpo_recipe(base, tmp_path, max_steps=1))
    refused = fusewright("eval", tmp_path / "out")
    assert refused.exit_code == 2
    assert "trl.reward_funcs.0" in refused.output
    assert "pass --allow-code" in " ".join(refused.output.split())
    assert fusewright("eval", tmp_path / "out", "--allow-code").exit_code == 0
    found = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    assert found["recorded_val_reward"] == result.val_reward_after


def test_the_function_of_the_documentation(base: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    code, keys = (re.findall(rf"```{kind}\n(.*?)```", text, re.S)[0] for kind in ("python", "yaml"))
    rows = re.search(r"rows such as `(\{.*?\]), (\"answer\".*?)`", text)
    assert rows is not None
    lines = f'{rows[1]}, {rows[2]}\n{rows[1]}, "answer": null}}\n' * 4
    (tmp_path / "sums.jsonl").write_text(lines, encoding="utf-8")
    written = yaml.safe_load(keys)
    recipe = grpo_recipe(base, tmp_path, max_steps=1, val_set_size=0)
    recipe |= {name: value for name, value in written.items() if name != "trl"}
    recipe["trl"] |= written["trl"]
    (tmp_path / "of_mine.py").write_text(code, encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert fusewright("train", path, "--allow-code", "--dry-run").exit_code == 0
    result = train(path, console=QUIET, allow_code=True)
    assert set(result.completions[0]["rewards"]) == {"sums", "length"}
    sums = load_function(f"{tmp_path}/of_mine.py:sums", "key", Consent(allow_code=True))
    said = ["It is 7.", "8", "seven", "7"]
    answers = ["7", "7", "7", None]
    for completions in (said, [[{"role": "assistant", "content": text}] for text in said]):
        assert sums(completions, answers, prompts=["2+5?"] * 4) == [1.0, 0.2, 0.0, None]


@pytest.mark.long
def test_completions_that_the_model_has_no_positions_for(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    trl = {"max_completion_length": 500}
    recipe = grpo_recipe(base, tmp_path, trl=trl, max_steps=1, micro_batch_size=2)
    train({**recipe, "trl": {**recipe["trl"], "num_generations": 2}}, allow_code=True)
    said = capsys.readouterr().out
    assert "trl.max_completion_length: prompts of up to 27 tokens and completions of 500" in said
    folder = tmp_path / "table"
    config = GPT2Config(vocab_size=262, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    for file in base.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        RecipeError, match=r"are more than the 64 positions .* set it to 37 or less"
    ):
        run(grpo_recipe(folder, tmp_path, trl={"max_completion_length": 40}), overwrite=True)
