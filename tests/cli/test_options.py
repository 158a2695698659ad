"""Options are taken with dashes and with underscores; a near name is suggested, no other."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fusewright.cli.main import app

from ..train.commands import refused

GROUP: Any = typer.main.get_command(app)
SPELLED = [
    (command, option)
    for command, made in GROUP.commands.items()
    for parameter in made.params
    for option in parameter.opts
    if option.startswith("--") and "-" in option[2:]
]


@pytest.mark.parametrize(("command", "option"), SPELLED)
def test_every_option_is_taken_with_underscores(command: str, option: str) -> None:
    made = GROUP.commands[command]
    group = GROUP.make_context("fusewright", [command, "--help"], resilient_parsing=True)
    context = made.make_context(command, [], parent=group, resilient_parsing=True)
    parser = made.make_parser(context)
    (parameter,) = (p for p in made.params if option in p.opts)
    value = [] if parameter.is_flag else ["1"]
    mixed = f"--{option[2:].replace('-', '_', 1)}"
    for spelled in (option, option[:2] + option[2:].replace("-", "_"), mixed):
        found, rest, _ = parser.parse_args([spelled, *value])
        assert parameter.name in found
        assert rest == []


def test_both_spellings_are_documented() -> None:
    assert ("generate", "--max-new-tokens") in SPELLED
    assert ("train", "--dry-run") in SPELLED


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_the_help_of_a_flag_names_no_type(words: list[str]) -> None:
    said = CliRunner().invoke(app, words).stdout
    assert "--help" in said
    assert "bool" not in said.lower()


@pytest.mark.parametrize("spelled", ["--learning_rate", "--learning-rate"])
def test_keys_of_a_recipe_too(spelled: str) -> None:
    said = CliRunner().invoke(app, ["train", "no.yaml", spelled]).stderr
    assert f"{spelled} needs a value" in said


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--dryrun", "; did you mean --dry_run?"),
        ("--overwite", "; did you mean --overwrite?"),
        ("--sample_paking", "; did you mean --sample_packing?"),
        ("--xyz", ""),
    ],
)
def test_a_misspelt_switch_is_not_asked_for_a_value(typed: str, meant: str) -> None:
    said = CliRunner().invoke(app, ["train", "no.yaml", typed]).stderr
    assert said == f"fusewright: {typed} is neither an option nor a key of a recipe{meant}\n"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("merge-lora", "merge"),
        ("inference", "generate"),
        ("evaluate", "eval"),
        ("finetune", "train"),
        ("convert", "export"),
    ],
)
def test_the_commands_of_axolotl_lead_to_ours(theirs: str, ours: str) -> None:
    said = CliRunner().invoke(app, [theirs, "recipe.yaml"]).stderr
    assert f"no such command '{theirs}'; did you mean {ours}?" in said


def test_what_is_no_command_is_answered_with_how_it_is_done() -> None:
    said = refused("resume", "outputs/run")
    assert "no such command 'resume'; a run resumes with its recipe: fusewright train " in said
    assert said.endswith("--resume_from_checkpoint true. See fusewright --help")
    assert "that is fusewright train RECIPE.yaml --dry-run. See" in refused("dry-run", "x.yaml")
