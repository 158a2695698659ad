"""Recipes: syntax, values, keys."""

from __future__ import annotations

import pytest

from .box import Bad, Box, Make, check, keys

GOOD = "base_model: a/b\ndatasets:\n  - path: rows.jsonl\n"


def text(more: str) -> Make:
    """A recipe that is right but for what is added at line 4."""
    return lambda box: box.text(GOOD + more)


def words(*more: str) -> Make:
    """Training a good recipe with more words on the command line."""
    return lambda box: [*box.recipe(), *more]


CASES = {
    "no YAML": Bad(text("seed: [1\n"), "recipe.yaml, line 5", "not valid YAML"),
    "a tab": Bad(text("trl:\n\tx: 1\n"), "recipe.yaml, line 5", "indent with spaces"),
    "a key twice": Bad(text("seed: 1\nseed: 2\n"), "line 5: seed", "is given twice"),
    "an unknown key": Bad(text("lora_rank: 4\n"), "line 4: lora_rank", "did you mean lora_r?"),
    "a key inside": Bad(text("    tpye: x\n"), "line 4: datasets.0.tpye", "did you mean type?"),
    "words left out": Bad(text("epochs: 4\n"), "line 4: epochs", "did you mean num_epochs?"),
    "memory that is no size": Bad(
        text("memory: lots\n"), "line 4: memory: must be", "such as 8GB, not 'lots'"
    ),
    "memory in another unit": Bad(
        text("memory: 1MB\n"), "line 4: memory: must be auto, speed, min", "such as 8GB, not '1MB'"
    ),
    "memory that is a number": Bad(
        text("memory: 8\n"), "line 4: memory: must be auto, speed, min", "such as 8GB, not 8"
    ),
    "a huge seed": Bad(
        text(f"seed: {2**80}\n"), "line 4: seed", "must be a number that 64 bits can hold"
    ),
    "a large seed": Bad(text(f"seed: {2**32}\n"), "line 4: seed", "must be less than 4294967296"),
    "a huge rank": Bad(
        text(f"adapter: lora\nlora_target_linear: true\nlora_r: {10**30}\n"),
        "line 6: lora_r", "must be a number that 64 bits can hold",
    ),
    "half a character": Bad(
        text('sample_prompt: "\\ud83d"\n'), "4: sample_prompt", "a lone surrogate (\\ud83d)"
    ),
    "a NUL in a path": Bad(
        text('lora_model_dir: "a\\0b"\n'), "line 4: lora_model_dir", "character 2 is a NUL"
    ),
    "a template's misspelling": Bad(
        text("chat_template: chatlm\n"), "line 4: chat_template", "did you mean chatml?"
    ),
    "that of one dataset": Bad(
        text("    chat_template: lama3\n"), "datasets.0.chat_template", "did you mean llama3?"
    ),
    "a template's file": Bad(
        text("chat_template_jinja: no.jinja\n"), "4: chat_template_jinja", "there is no no.jinja in"
    ),
    "preferences": Bad(
        text("    field_chosen: c\n    field_rejected: r\nrl: ebft\n"),
        "line 6: rl: ebft is not yet available", "use rl: grpo with a reward function",
    ),
    "a folder for a recipe": Bad(
        lambda box: ["train", str(box.folder)], "is a folder", "name the recipe's YAML file"
    ),
    "no recipe": Bad(
        lambda box: ["train", "no.yaml"], "no.yaml", "file not found"
    ),
    "keys before the recipe": Bad(
        lambda box: ["train", "--max_steps", "3"], "train: name the recipe first",
        "fusewright train RECIPE.yaml --max_steps",
    ),
    "an override without a key": Bad(words("5"), "unexpected argument '5'", "write --key value"),
    "an override of another type": Bad(
        words("--max_steps", "x"), "override: max_steps", "must be a whole number, not 'x'"
    ),
    "an override that is not UTF-8": Bad(
        words("--sample_prompt", "\udce4"), "override: sample_prompt",
        "character 1 is a byte that is not UTF-8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_is_refused(name: str, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    check(CASES[name], box, monkeypatch)


def test_all_problems_are_told_at_once_with_those_of_what_is_missing_here(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ..commands import complaint, fusewright

    result = fusewright(*text("memory: lots\nrl: ebft\nlora_rank: 3\n")(box))
    said = complaint(result).splitlines()
    assert said[0].endswith("recipe.yaml has 3 problems:")
    assert [line.split(":")[1].strip() for line in said[1:]] == ["memory", "rl", "lora_rank"]


def test_a_good_recipe_is_none_of_them(box: Box) -> None:
    from ..commands import fusewright

    result = fusewright(*keys(max_steps=1)(box))
    assert result.exit_code == 0, result.output
