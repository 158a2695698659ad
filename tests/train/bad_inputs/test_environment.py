"""What the machine lacks, what the model cannot do, and where results may not go."""

from __future__ import annotations

import errno
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ..commands import fusewright
from ..conftest import make_tokenizer
from .box import Bad, Box, Make, check, keys

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def table(box: Box) -> Path:
    """A model that looks its positions up, and has 64 of them."""
    folder = box.folder / "gpt2"
    config = GPT2Config(
        vocab_size=262, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def with_table(**changed: Any) -> Make:
    return lambda box: box.recipe(base_model=str(table(box)), **changed)


def output(path: str, **files: str) -> Make:
    """Training into this folder, which has these files."""

    def make(box: Box) -> list[str]:
        for name, content in files.items():
            box.write(name, content)
        return box.recipe(output_dir=path)

    return make


CASES = {
    "half precision without a GPU": Bad(keys(bf16=None, fp16=True), "fp16: needs a GPU", "bf16: a"),
    "an attention's misspelling": Bad(
        keys(attn_implementation="sdap"), "attn_implementation: there is no attention 'sdap'",
        "did you mean sdpa?",
    ),
    "an optimizer that needs a package": Bad(
        keys(optimizer="lomo"), "optimizer: lomo needs the package lomo-optim", "pip install lomo"
    ),
    "a tracker that needs a package": Bad(
        keys(comet_project_name="x"), "comet_project_name", "pip install comet-ml"
    ),
    "more tokens than positions": Bad(
        with_table(sequence_len=65),
        "sequence_len: 65 is more than the 64 positions that the model has", "set it to 64",
    ),
    "more validated tokens than positions": Bad(
        with_table(sequence_len=64, eval_sequence_len=100), "eval_sequence_len: 100", "set it to 64"
    ),
    "too small a budget": Bad(
        keys(memory="0.001GB", optimize=True, codegen="eager", max_steps=1),
        "memory='0.001GB' is too small for any plan", "The smallest budget that fits is", late=True,
    ),
    "layers that the model has not": Bad(
        keys(lora_target_linear=None, lora_target_modules=["c_attn"]),
        "lora_target_modules: the model has no layer c_attn", "it has embed_tokens, q_proj, k_pr",
    ),
    "settings that PEFT refuses": Bad(
        keys(peft_init_lora_weights="nosuch"), "adapter: PEFT refuses these settings",
        "init_lora_weights",
    ),
    "parameters that the model has not": Bad(
        keys(adapter=None, lora_r=None, lora_target_linear=None, unfrozen_parameters=["h.1"]),
        "unfrozen_parameters: no parameter name matches 'h.1'", "names: model.e",
    ),
    "a schedule without its arguments": Bad(
        keys(lr_scheduler="cosine_warmup_with_min_lr", lr_scheduler_kwargs={"x": 1}),
        "lr_scheduler", "lr_scheduler_kwargs",
    ),
    "a file for a folder": Bad(
        output("here", here="mine"), "output_dir", "is not a folder; name another one"
    ),
    "a folder in a file": Bad(
        output("here/there", here="mine"), "output_dir", "cannot be written to: Not a directory"
    ),
    "a folder of others": Bad(
        output("data", **{"data/letter.txt": "mine"}), "output_dir", "choose a new folder"
    ),
    "a folder of the system": Bad(output("/etc/model"), "output_dir: /etc/model", "of the system"),
    "a folder that takes nothing": Bad(output("/proc/model"), "output_dir: /proc/model", "folder"),
    "the model's own folder": Bad(
        lambda box: box.recipe(base_model=str(box.model()), output_dir=str(box.folder / "base")),
        "output_dir", "is the folder of base_model: choose another one",
    ),
    "an earlier run": Bad(
        keys(overwrite_output_dir=None), "already holds a run", "another folder, or pass --ov"
    ),
}  # fmt: skip
# the steps that a schedule is made for are known with the rows, which a dry run does not read
WITH_ROWS = {"a schedule without its arguments"}
EARLY = {name: bad for name, bad in CASES.items() if not bad.late and name not in WITH_ROWS}


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of those that the cases ask for is installed."""
    find = importlib.util.find_spec
    missing = {"flash_attn", "lomo_optim", "comet_ml"}

    def found(name: str, *more: Any) -> Any:
        return None if name in missing else find(name, *more)

    monkeypatch.setattr("fusewright.train.requirements.importlib.util.find_spec", found)


@pytest.mark.long("too small a budget")
@NO_GPU
@pytest.mark.parametrize("name", CASES)
def test_a_run_does_not_start(name: str, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    check(CASES[name], box, monkeypatch)


@NO_GPU
@pytest.mark.parametrize("name", EARLY)
def test_a_dry_run_says_it_too(name: str, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = EARLY[name]
    check(bad._replace(make=lambda box: [*bad.make(box), "--dry-run"]), box, monkeypatch)


def test_a_full_disk_before_the_first_step(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusewright.train.data.cache import ArrowWriter

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ArrowWriter, "add", full)
    bad = Bad(
        keys(), "dataset_prepared_path: the rows cannot be cached in", "No space left on device"
    )
    check(bad, box, monkeypatch)


def test_rows_beyond_what_the_model_has_learnt_are_said(box: Box) -> None:
    words = keys(
        max_steps=1, sequence_len=1024, overrides_of_model_config={"max_position_embeddings": 10}
    )(box)
    result = fusewright(*words)
    assert result.exit_code == 0, result.output
    assert (
        "sequence_len: 1024 is more than the 10 positions of the model: 12 rows are longer, and "
        "use positions that it was not trained on; sequence_len: 10 leaves them out"
    ) in " ".join(result.stdout.split())
    again = fusewright(*keys(max_steps=1, sequence_len=1024)(box))
    assert "which is harmless: no row is longer" in " ".join(again.stdout.split())


def test_rows_as_long_as_a_table_are_trained(box: Box) -> None:
    result = fusewright(*with_table(sequence_len=64, max_steps=1)(box))
    assert result.exit_code == 0, result.output
