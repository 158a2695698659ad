"""Recipes with a mistake: one clear message with key and line, exit code 2, nothing written."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from ..commands import refused_run
from ..mistakes import GOOD, Case, check, good

SYNTAX = [
    Case("bracket", "a: [1\nb: 2\n", "line 2: not valid YAML"),
    Case("tab", "a:\n\tb: 1\n", "line 2: not valid YAML: found character '\\t' that cannot"),
    good("colon", "sample_prompt: why: this\n", "line 4: not valid YAML: mapping values are not"),
    Case("list", "- a\n", ": must hold keys and values, not a list"),
    Case("text", "just text\n", ": must hold keys and values, not a single value"),
    good("twice", "seed: 1\nseed: 2\n", "line 5: seed: is given twice"),
    good("twice inside", "    path: b\n", "line 4: datasets.0.path: is given twice"),
    good("no such anchor", "seed: *seed\n", "line 4: not valid YAML: found undefined alias"),
    good("itself", "tokens: &a [*a]\n", "not valid YAML: a value contains itself"),
    good(
        "aliases of aliases",
        "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
        + "".join(
            f"{k}: &{k} [{', '.join([f'*{before}'] * 9)}]\n"
            for before, k in itertools.pairwise("abcdefgh")
        ),
        "with its aliases it holds more than 50,000 values",
    ),
    good(
        "long", f"micro_batch_size: [{', '.join(['word'] * 9999)}]\n", "'word', 'word', 'word', ..."
    ),
    good("tag", "seed: !!python/name:os.system\n", "line 4: not valid YAML: could not determine"),
    good("control character", "seed: \x00\n", "not valid YAML"),
]

TYPES = [
    Case("nothing", "", "has 2 problems:"),
    Case("no model", "datasets:\n  - path: rows.jsonl\n", ", base_model: is missing"),
    Case("no data", "base_model: a/b\n", ", datasets: is missing"),
    Case("empty list", "base_model: a/b\ndatasets: []\n", "line 2: datasets: must be a list that"),
    Case("no list", "base_model: a/b\ndatasets: {path: x}\n", "line 2: datasets: must be a list, "),
    Case(
        "text for keys", "base_model: a/b\ndatasets: [rows.jsonl]\n", "2: datasets.0: must be keys"
    ),
    Case(
        "no path", "base_model: a/b\ndatasets:\n  - type: alpaca\n", "datasets.0.path: is missing"
    ),
    Case(
        "list for text", "base_model: [a]\n" + GOOD[23:], "1: base_model: must be text, not ['a']"
    ),
    good(
        "unknown",
        "lora_rank: 4\n",
        "line 4: lora_rank: is not a key of a recipe; did you mean lora_r",
    ),
    good("unknown and far", "qwertz: 4\n", "line 4: qwertz: is not a key of a recipe"),
    good("number as key", "5: 4\n", "line 4: 5: is not a key of a recipe"),
    good(
        "misspelt inside", "    tpye: alpaca\n", "4: datasets.0.tpye: is not a key of a recipe; did"
    ),
    good(
        "misspelt token", "special_tokens:\n  pda_token: x\n", "5: special_tokens.pda_token: is not"
    ),
    good(
        "misspelt format",
        "    type:\n      feild_output: x\n",
        "line 5: datasets.0.type.feild_output: is not a key of a recipe; did you mean field_",
    ),
    good(
        "text for number", "max_steps: sixty\n", "4: max_steps: must be a whole number, not 'sixty'"
    ),
    good(
        "boolean for number",
        "micro_batch_size: true\n",
        "4: micro_batch_size: must be a number, not",
    ),
    good("fraction", "max_steps: 1.5\n", "line 4: max_steps: must be a whole number, not 1.5"),
    good(
        "negative",
        "learning_rate: -1e-4\n",
        "4: learning_rate: must be greater than 0, not -0.0001",
    ),
    good("endless", "learning_rate: .inf\n", "4: learning_rate: must be a finite number, not inf"),
    good("out of range", "lora_dropout: 1.5\n", "4: lora_dropout: must be less than 1, not 1.5"),
    good("date", "seed: 2024-01-01\n", "line 4: seed: must be a whole number, not"),
    good(
        "text for boolean",
        "sample_packing: maybe\n",
        "4: sample_packing: must be true or false, not",
    ),
    good(
        "no such value", "adapter: loar\n", "4: adapter: must be 'lora', 'qlora', 'llama-adapter',"
    ),
    good(
        "no such name",
        "optimizer: adamw\n",
        "line 4: optimizer: must be one of 62 names (fusewright schema lists them), not 'adamw'; "
        "did you mean adamw_torch?",
    ),
    good(
        "another case",
        "rl: DPO\n",
        "line 4: rl: must be 'dpo', 'ipo', 'orpo', 'kto', 'simpo', 'grpo', 'gdpo', 'cpo' or "
        "'ebft', not 'DPO'; did you mean dpo?",
    ),
    good("no such method", "rl: ppo\n", "'cpo' or 'ebft', not 'ppo'"),
    good(
        "no such name in a list",
        "rl: dpo\ndpo_loss_type: [sigmod]\n",
        "line 5: dpo_loss_type.0: must be 'sigmoid', 'hinge', ",
    ),
    good(
        "another case of a template",
        "chat_template: ChatML\n",
        "there is no template 'ChatML' here; did you mean chatml?",
    ),
    good(
        "part of rows",
        "val_set_size: 1.5\n",
        "4: val_set_size: must be a fraction below 1 or a number",
    ),
]

PLACES = [
    Case(
        "no file",
        "base_model: a/b\ndatasets:\n- path: no.jsonl\n",
        "3: datasets.0.path: there is no",
    ),
    Case(
        "no builder",
        GOOD + "    builder: no.py\n",
        "line 4: datasets.0.builder: there is no no.py in",
    ),
    Case(
        "remote",
        "base_model: a/b\ndatasets:\n- path: s3://x/y\n",
        "3: datasets.0.path: s3://x/y: rem",
    ),
    Case(
        "no id",
        "base_model: a/b\ndatasets:\n- path: my data\n",
        "3: datasets.0.path: 'my data' is ne",
    ),
    Case(
        "no model there",
        "base_model: ./none\n" + GOOD[23:],
        "line 1: base_model: there is no ./none in",
    ),
    Case(
        "no package",
        "base_model: package:no_such\n" + GOOD[23:],
        "1: base_model: the package no_such is",
    ),
    Case(
        "no model id",
        "base_model: my model\n" + GOOD[23:],
        "line 1: base_model: 'my model' is neither",
    ),
    good(
        "no checkpoint",
        "resume_from_checkpoint: here\n",
        "4: resume_from_checkpoint: there is no here",
    ),
]

OVERRIDES = [
    good("unknown key", "", "override: lora_rank: is not a key", "--lora_rank", "4"),
    good("wrong type", "", "override: max_steps: must be a whole number, not 'x'", "--max_steps=x"),
    good(
        "no such place", "", "datasets.4.path: is not in the recipe, so", "--datasets.4.path", "x"
    ),
    good("no value", "", "--max_steps needs a value", "--max_steps"),
    good("no such switch", "", "--no-max_steps needs a value", "--no-max_steps"),
    good("no key", "", "unexpected argument '5'; write --key value", "5"),
]

CASES = [*SYNTAX, *TYPES, *PLACES, *OVERRIDES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_recipe_with_a_mistake(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(case, tmp_path)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    assert refused_run(tmp_path, str(tmp_path / "no.yaml")).endswith("no.yaml: file not found")
    assert "is a folder; name the recipe's YAML file" in refused_run(tmp_path, str(tmp_path))
    (tmp_path / "bad.yaml").write_bytes(b"a: b\nc: \xff\xfe")
    message = refused_run(tmp_path, str(tmp_path / "bad.yaml"))
    assert "bad.yaml: cannot be read: byte 8 is not UTF-8" in message
