"""Which adapter, length and batch are chosen, by judges that are made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusewright.errors import RecipeError
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.starter import candidates
from fusewright.train.starter.choose import MemoryVerdict
from fusewright.train.starter.init import InitOptions, run

from ..conftest import chat, make_model, make_tokenizer, write_rows
from .conftest import ROWS, TEMPLATE

Judge = Callable[[Recipe], bool | None]


@pytest.fixture(autouse=True)
def _four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "has_bitsandbytes", lambda: True)


@pytest.fixture
def choose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, Any], str]]:
    """Calls ``init`` on rows with a judge; the recipe, and its text without line breaks."""
    monkeypatch.chdir(tmp_path)

    def call(rows: list[Any], judge: Judge, positions: int = 8192) -> tuple[dict[str, Any], str]:
        write_rows(Path("rows.jsonl"), rows)
        folder = tmp_path / f"model-{positions}"
        make_model(max_position_embeddings=positions).save_pretrained(folder)
        make_tokenizer(TEMPLATE).save_pretrained(folder)

        def fits(recipe: Recipe, memory: int | None) -> MemoryVerdict:
            return MemoryVerdict(judge(recipe), None, "judged")

        capsys.readouterr()  # what libraries print while the model is saved
        run(InitOptions(["rows.jsonl"], str(folder), "24GB"), fits)
        text = capsys.readouterr().out
        return yaml.safe_load(text), text.replace("\n# ", " ")

    return call


LONG = [chat("a?", "b " * (3 if i % 2 else 1500)) for i in range(60)]
"""Half of the rows need more than a thousand tokens."""


def test_qlora_comes_before_lengths_that_leave_rows_out(choose: Any) -> None:
    found, text = choose(LONG, lambda r: r.adapter == "qlora" or r.sequence_len <= 512)
    assert found["adapter"] == "qlora"
    assert found["sequence_len"] > 1024
    assert "ROWS ARE LOST" not in text
    found, _ = choose(LONG, lambda r: True)
    assert found["adapter"] == "lora"


def test_lost_rows_are_said(choose: Any) -> None:
    found, text = choose(LONG, lambda r: r.sequence_len <= 512)
    assert found["adapter"] == "lora"
    assert 256 < found["sequence_len"] <= 512, "the longest one that fits"
    assert "ROWS ARE LOST, because of memory: 50.0% are longer and are left out, with 9" in text


def test_texts_get_an_adapter_before_they_are_cut_shorter(choose: Any) -> None:
    rows = ROWS["completion"] * 4
    found, text = choose(rows, lambda r: r.adapter == "lora" or r.sequence_len <= 128)
    assert (found["adapter"], found["sequence_len"]) == ("lora", 2048)
    assert "LESS CONTEXT" not in text
    found, text = choose(rows, lambda r: r.sequence_len <= 1024)
    assert "adapter" not in found
    assert found["sequence_len"] == 1024
    assert "with LESS CONTEXT than 2,048 tokens, because of memory" in text


def test_a_length_that_keeps_no_row_is_not_taken(choose: Any) -> None:
    rows = [chat("a?", "b " * 1500)] * 30
    with pytest.raises(RecipeError, match="the shortest length that keeps any row"):
        choose(rows, lambda r: r.sequence_len <= 1024)


def test_a_model_that_can_read_few_rows_or_none(choose: Any) -> None:
    _, text = choose(LONG, lambda r: True, positions=512)
    assert "ROWS ARE LOST, because of the positions of the model: 50.0%" in text
    with pytest.raises(RecipeError, match="reads up to 8 tokens, and the shortest row has"):
        choose(ROWS["chat"], lambda r: True, positions=8)


@pytest.mark.parametrize("name", ["completion", "chat"])
def test_what_needs_little_memory_where_nobody_knows(choose: Any, name: str) -> None:
    asked: list[str | None] = []

    def nobody_knows(recipe: Recipe) -> bool | None:
        asked.append(recipe.adapter)
        return None

    found, text = choose(ROWS[name] * 100, nobody_knows)
    assert (found["adapter"], found["micro_batch_size"]) == ("lora", 1)
    assert found["gradient_accumulation_steps"] > 1
    assert "because that needs little memory: what fits is NOT CHECKED" in text
    assert (None in asked) is (name == "completion")


def test_one_method_that_cannot_be_judged_is_passed_over(choose: Any) -> None:
    found, text = choose(ROWS["completion"] * 100, lambda r: True if r.adapter else None)
    assert (found["adapter"], found["micro_batch_size"]) == ("lora", 8)
    assert "NOT CHECKED" not in text


@pytest.mark.parametrize("count", [5, 60])
def test_what_is_validated_is_what_is_to_be_watched(choose: Any, count: int) -> None:
    found, text = choose([chat("a?", "b " * (3 + i)) for i in range(count)], lambda r: True)
    assert found["num_epochs"] == 3
    assert ("Watch eval_loss" in text) == bool(found["val_set_size"]) == (count >= 20)
    assert "sequences per optimizer step: 1, in an epoch: about 5" in text or count > 5


def test_few_rows_make_some_twenty_steps_of_an_epoch(choose: Any) -> None:
    few, text = choose([chat("a?", "b " * (10 + i % 20)) for i in range(40)], lambda r: True)
    assert few["sample_packing"] is False
    assert "sequences per optimizer step: 1, in an epoch: about 36" in text
    some, text = choose([chat("a?", "b " * 20) for i in range(300)], lambda r: True)
    assert (some["sample_packing"], some["sequence_len"]) == (True, 512)
    many, _ = choose([chat("a?", "b " * 20) for i in range(900)], lambda r: True)
    assert (many["sample_packing"], many["sequence_len"]) == (True, 1024)


def test_few_texts_are_cut_so_that_there_are_steps(choose: Any) -> None:
    found, text = choose([{"text": "word " * 400}] * 6, lambda r: True)
    assert found["sequence_len"] == 512
    assert "LESS CONTEXT than 2,048 tokens, because there are few" in text
