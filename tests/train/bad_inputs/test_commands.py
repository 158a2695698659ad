"""The command line: options, folders that are no run, prompts."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from .box import Bad, Box, Make, check


def words(*given: str) -> Make:
    return lambda box: given


def on(change: Callable[[Path], object], *given: str) -> Make:
    """A command on a folder ``run``, which is made first."""

    def make(box: Box) -> list[str]:
        (box.folder / "run").mkdir()
        change(box.folder / "run")
        return [given[0], "run", *given[1:]]

    return make


def prompts(content: str | bytes, name: str = "prompts.jsonl") -> Make:
    def make(box: Box) -> list[str]:
        box.write(name, content)
        return ["generate", str(box.base), "--file", name]

    return make


def said(prompt: str) -> Make:
    return lambda box: ["generate", str(box.base), prompt]


def nothing(folder: Path) -> None:
    pass


CASES = {
    "no such command": Bad(words("trian", "x"), "no such command 'trian'", "did you mean train?"),
    "no such option": Bad(
        words("generate", "run", "hi", "--max_tokens", "3"), "no such option: --max-tokens",
        "did you mean --max-new-tokens? See fusewright generate --help",
    ),
    "an option's longer name": Bad(
        words("init", "rows.jsonl", "--base-model", "x"), "no such option: --base-model",
        "did you mean --model? See fusewright init --help",
    ),
    "no recipe": Bad(words("train"), "train: missing argument", "fusewright train --help"),
    "text for a number": Bad(
        words("generate", "run", "hi", "--top_k", "x"), "value for '--top-k'", "; see fusewright"
    ),
    "no number of layers": Bad(
        words("explain", "llama", "--layers", "0"), "invalid value for '--layers'", "; see fuse"
    ),
    "an unknown model": Bad(words("explain", "./llamma"), "./llamma", "there is no"),
    "a run that is not there": Bad(
        words("eval", "nowhere"), "nowhere is not there", "name the output_dir of a training run"
    ),
    "a file for a run": Bad(
        words("eval", "rows.jsonl"), "rows.jsonl is not a folder", "name the output_dir of a train"
    ),
    "an empty folder": Bad(
        on(nothing, "chat"), "run is neither a run nor a model", "it has no adapter_config.json"
    ),
    "a run without results": Bad(
        on(lambda run: (run / "run.json").write_text("{}"), "merge"), "has a run.json but neither",
        "nothing was saved",
    ),
    "a broken run.json": Bad(
        on(lambda run: (run / "run.json").write_text("{oops"), "eval"),
        "run.json is not valid JSON", "copy the run again",
    ),
    "a run with checkpoints alone": Bad(
        on(lambda run: (run / "checkpoint-5").mkdir(), "generate", "hi"),
        "has checkpoints but no result", "name one of them: ",
    ),
    "an adapter whose base is gone": Bad(
        on(
            lambda run: [
                (run / "adapter_config.json").write_text(
                    '{"peft_type": "LORA", "base_model_name_or_path": "./gone"}'
                ),
                (run / "adapter_model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}"),
            ],
            "generate", "hi",
        ),
        "the base model is missing", "--base-model BASE says where it is now",
    ),
    "no prompt": Bad(
        lambda box: ["generate", str(box.base)], "there is no prompt", "or - to read it from stand"
    ),
    "two prompts": Bad(
        lambda box: ["generate", str(box.base), "hi", "--file", "rows.jsonl"],
        "give a prompt or --file", "not both",
    ),
    "a prompt that is not UTF-8": Bad(
        said("a\udce4"), "the prompt is not text: character 2", "write it as UTF-8"
    ),
    "no file of prompts": Bad(
        lambda box: ["generate", str(box.base), "--file", "no.jsonl"], "no.jsonl", "No such file"
    ),
    "prompts that are no JSON": Bad(
        prompts('"hi"\n{oops\n'), "prompts.jsonl, line 2", "not valid JSON"
    ),
    "prompts that are half a character": Bad(
        prompts('"hi \\ud83d"\n'), "prompts.jsonl, line 1", "replace it"
    ),
    "prompts that are none": Bad(prompts("5\n"), "prompts.jsonl, line 1", "must be a text"),
    "prompts that are not UTF-8": Bad(
        prompts(b"\xff\n", "prompts.txt"), "prompts.txt: cannot be read: byte 1", "save it as UTF-8"
    ),
    "nothing to merge": Bad(
        lambda box: ["merge", str(box.base)], "holds a whole model", "there is nothing to merge"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_command_is_refused(name: str, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    check(CASES[name], box, monkeypatch)


def test_a_pipe_that_is_not_utf_8(box: Box) -> None:
    from fusewright.errors import RecipeError
    from fusewright.train.inference.prompts import read_prompt

    stdin = io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8")
    with pytest.raises(RecipeError, match="standard input is not UTF-8: save the prompt as UTF-8"):
        read_prompt("-", stdin)
