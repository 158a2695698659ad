"""The model card: what it says, and whose cards it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console

from fusewright.train import train
from fusewright.train.report import model_card as card
from fusewright.train.report.run_facts import Facts

MINE = "---\nlicense: mit\n---\n\n# My model\n\nIt is mine.\n"


def rendered(run: dict[str, Any]) -> str:
    return card.render(Facts.of(run), picture=True)


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n", 2)[1])
    return found


def test_the_card_of_a_run(run: dict[str, Any], run_folder: Path, tmp_path: Path) -> None:
    path = card.write(run_folder, tmp_path)
    assert path == tmp_path / "README.md"
    text = path.read_text(encoding="utf-8")
    loaded = ModelCard.load(path)  # the hub's own reader
    assert loaded.data.library_name == "peft"
    assert loaded.data.pipeline_tag == "text-generation"
    assert {"fusewright", "lora"} <= set(loaded.data.tags)
    for words in (
        "LoRA rank 4 adapter for",
        f"{run['val_loss_before']:.3f} before, {run['val_loss_after']:.3f} after",
        "fusewright generate . ",
        "AutoPeftModelForCausalLM",
        "What is 3?",
        "lora_r: 4",
        f"torch {run['versions']['torch'].replace('_', chr(92) + '_')}",
    ):
        assert words in text, words
    assert "loss.png" not in text  # there is none beside it
    assert "](loss.png)" in rendered(run)


@pytest.mark.parametrize(
    ("keys", "tags", "use", "words"),
    [
        ({}, {"sft"}, "text-generation", "by supervised fine-tuning on"),
        ({"kd_trainer": True}, {"sft", "distillation"}, "text-generation", ""),
        *(
            ({"rl": name}, {"trl", name}, "text-generation", f"with fusewright by {said} (")
            for name, said in (("dpo", "DPO"), ("ipo", "IPO"), ("kto", "KTO"), ("orpo", "ORPO"),
                               ("cpo", "CPO"), ("simpo", "SimPO"), ("grpo", "GRPO"),
                               ("gdpo", "GDPO"))
        ),
        ({"reward_model": True}, {"trl", "reward-model"}, "text-classification",
         "by reward modeling"),
        ({"process_reward_model": True}, {"trl", "process-reward-model"}, "token-classification",
         "by process reward modeling"),
    ],
)  # fmt: skip
def test_the_method_is_named(
    keys: dict[str, Any], tags: set[str], use: str, words: str, run: dict[str, Any]
) -> None:
    text = rendered({**run, "recipe": {**run["recipe"], **keys}})
    assert set(front(text)["tags"]) - {"fusewright", "lora", "transformers"} == tags
    assert front(text)["pipeline_tag"] == use
    assert words in text


def test_it_tells_no_folders_of_this_machine(run: dict[str, Any], run_folder: Path) -> None:
    text = rendered(run)
    assert str(run_folder.parent) not in text
    assert run["recipe"]["base_model"] not in text
    assert "`rows.jsonl`" in text
    stopped = {**run, "status": "interrupted", "checkpoint": f"{run_folder}/checkpoint-4"}
    assert "/checkpoint" not in rendered(stopped)
    assert "To resume from checkpoint-4" in rendered(stopped)


def test_ids_of_the_hub_are_linked(run: dict[str, Any]) -> None:
    recipe = {**run["recipe"], "base_model": "some-lab/Model-1.5B"}
    recipe["datasets"] = [{"path": "some-lab/chats"}, {"path": "/data/mine.jsonl"}]
    text = rendered({**run, "recipe": recipe})
    entries = front(text)
    assert entries["base_model"] == "some-lab/Model-1.5B"
    assert entries["datasets"] == ["some-lab/chats"]
    assert "base_model:adapter:some-lab/Model-1.5B" in entries["tags"]
    assert "[some-lab/chats](https://huggingface.co/datasets/some-lab/chats)" in text
    assert "/data/" not in text


def test_the_license_is_that_of_the_base_model(run: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**run["recipe"], "base_model": str(tmp_path)}
    assert "license" not in front(rendered({**run, "recipe": recipe}))
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    assert front(rendered({**run, "recipe": recipe}))["license"] == "apache-2.0"
    for broken in ("no front matter", "---\n- a\n---\n", "---\n{\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert "license" not in front(rendered({**run, "recipe": recipe}))


def test_full_training_and_runs_that_ended_early(run: dict[str, Any]) -> None:
    full = {**run, "recipe": {**run["recipe"], "adapter": None}, "adapter_check": None}
    assert front(rendered(full))["library_name"] == "transformers"
    assert "from transformers import AutoModelForCausalLM" in rendered(full)
    text = rendered({**run, "status": "interrupted", "signal": 2, "steps": 3})
    assert "> **Stopped early.** It ended after step 3 of 6, on SIGINT." in text
    assert "finished" not in text
    for key in run:
        for odd in (None, "text"):
            assert front(rendered({**run, key: odd}))["tags"]


@pytest.mark.parametrize(
    ("source", "loads"),
    [
        ("package:fw_shipped", "submodule_search_locations[0],\n"),
        (
            "package:fw_shipped/q8",
            'submodule_search_locations[0] + "/q8",',
        ),
        ("{here}/fw_shipped", '"fw_shipped",  # its folder'),
        ("{here}/fw_shipped/small.gguf", '"fw_shipped",  # its folder'),
    ],
)
def test_plain_peft_can_load_an_adapter_of_any_base(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, loads: str
) -> None:
    assert "With plain PEFT:" in rendered(run)
    package = tmp_path / "fw_shipped"
    (package / "q8").mkdir(parents=True)
    for file in ("__init__.py", "small.gguf", "q8/small.gguf"):
        (package / file).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = {**run["recipe"], "base_model": source.format(here=tmp_path)}
    text = rendered({**run, "recipe": recipe})
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert loads in code
    for words in ('gguf_file="small.gguf"', "model = PeftModel.from_pretrained(base, folder)"):
        assert words in code
    assert str(tmp_path) not in text


def test_a_base_that_is_not_here_has_no_code(run: dict[str, Any]) -> None:
    recipe = {**run["recipe"], "base_model": "package:some_package"}
    assert "```python" not in rendered({**run, "recipe": recipe})


def test_answers_cannot_become_markup(run: dict[str, Any]) -> None:
    answer = "```\n</details><script>alert(1)</script>\n````\n# Heading"
    text = rendered({**run, "sample": {"question": "Q", "before": answer, "after": answer}})
    assert f"`````text\n{answer}\n`````" in text  # a fence longer than any inside
    odd = rendered({**run, "sample": {"question": "Q", "after": "a\x00b\rc\ud800"}})
    assert "a\ufffdb\ufffdc\ufffd" in odd
    bad = rendered({**run, "versions": {"a": "<script>|*b*"}})
    assert r"\<script\>\|\*b\*" in bad


@pytest.mark.parametrize("text", [MINE, "", "# Notes\n[More Information Needed]\n"])
def test_a_card_of_ones_own_is_left_alone(run: dict[str, Any], tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    assert card.write(run, tmp_path) is None
    assert path.read_text() == text


def test_what_nobody_wrote_is_replaced(
    run: dict[str, Any], run_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(run["recipe"]["base_model"])
    PeftModel.from_pretrained(base, run_folder).save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    assert "Model Card for Model ID" in path.read_text()  # PEFT's form
    assert card.write(run, tmp_path) == path
    assert card.is_generated(path)
    assert card.write(run, tmp_path) == path  # our own, as it was
    path.write_text(path.read_text().replace("## Data", "## The data that I cleaned"))
    assert not card.is_generated(path)
    assert card.write(run, tmp_path) is None


def test_a_run_keeps_the_card_that_somebody_wrote(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "out" / "README.md"
    path.parent.mkdir()
    path.write_text(MINE)  # this alone is no run that would be in the way
    train(recipe, console=Console(quiet=True), max_steps=1)
    assert path.read_text() == MINE
    train(recipe, console=Console(quiet=True), max_steps=1, overwrite=True)
    assert path.read_text() == MINE
    path.unlink()
    train(recipe, console=Console(quiet=True), max_steps=1, overwrite=True)
    assert "trained with fusewright" in path.read_text()
    assert "](loss.png)" in path.read_text()


def test_a_filled_form_is_ones_own(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    form = ModelCard.from_template(ModelCard("---\nlibrary_name: peft\n---\n").data)
    form.save(path)
    assert card.is_generated(path)
    path.write_text(path.read_text().replace("# Model Card for Model ID", "# My model"))
    assert not card.is_generated(path)


def test_a_run_that_early_stopping_has_ended_says_so(run: dict[str, Any]) -> None:
    reason = "early stopping, as eval_loss did not improve for 3 validations"
    text = rendered({**run, "steps": 3, "steps_planned": 1000, "reason": reason})
    said = "> **Finished.** It ended after step 3 of 1,000: early stopping, as eval\\_loss did not"
    assert said in text


def test_the_speed_of_a_slow_run_is_not_nothing(run: dict[str, Any]) -> None:
    text = rendered({**run, "trained_tokens_per_s": 0.4242})
    assert "| trained tokens per second | 0.42 |" in text


def test_prompts_and_tokens_that_begin_like_paths_are_published_whole(tmp_path: Path) -> None:
    spaced = tmp_path / "my dir"
    spaced.mkdir()
    words = {
        "default_system_message": "/no_think",
        "sample_prompt": "/think What is 1/2 of 4?",
        "chat_template_jinja": '{%- if "/no_think" in s %}',
        "eot_tokens": ["/s"],
    }
    paths = {"output_dir": str(spaced), "datasets": [{"path": "/data/rows.jsonl"}]}
    entries = {"recipe": {**words, **paths}, "reason": f"cannot write {spaced}/x: see /var/log/a.b"}
    found = Facts(entries).published().entries
    cut = {"output_dir": "my dir", "datasets": [{"path": "rows.jsonl"}]}
    assert found["recipe"] == {**words, **cut}
    assert found["reason"] == "cannot write x: see a.b"
