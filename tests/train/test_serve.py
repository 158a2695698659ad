"""Serving: the command line that a server gets, recorded by executables in its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusewright.train.serve import vllm_line

from .commands import fusewright, refused
from .conftest import make_adapter

RECORD = """#!{python}
import json, sys
open({file!r}, "w").write(json.dumps(sys.argv[1:]))
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a server on PATH that writes its arguments; without it, there is none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(
        os, "execv", lambda path, args: subprocess.run([path, *args[1:]], check=True)
    )

    def put(name: str) -> Path:
        arguments = tmp_path / f"{name}.json"
        (folder / name).write_text(RECORD.format(python=sys.executable, file=str(arguments)))
        (folder / name).chmod(0o755)
        return arguments

    return put


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path)


def _gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF")
    return path


def test_vllm_gets_the_merged_folder(adapter: Path, install) -> None:
    arguments = install("vllm")
    done = fusewright("serve", adapter, "--port", "9000", "--", "--max-model-len", "512")
    expected = [
        "serve", str(adapter / "merged"), "--served-model-name", "adapter", "--host", "127.0.0.1",
        "--port", "9000", "--max-model-len", "512",
    ]  # fmt: skip
    assert json.loads(arguments.read_text()) == expected, done.output
    assert (adapter / "merged" / "model.safetensors").is_file()
    assert "vllm serve" in done.stdout
    newer = (adapter / "merged").stat().st_mtime + 5
    os.utime(adapter / "adapter_model.safetensors", (newer, newer))
    assert "merged is older than the run's adapter" in refused("serve", adapter, in_a_line=False)


def test_vllm_gets_base_and_adapter(adapter: Path, install) -> None:
    arguments = install("vllm")
    done = fusewright("serve", adapter, "--lora", "--name", "mine")
    assert json.loads(arguments.read_text()) == [
        "serve", str(adapter.parent / "base"), "--enable-lora", "--lora-modules", f"mine={adapter}",
        "--max-lora-rank", "8", "--host", "127.0.0.1", "--port", "8000",
    ], done.output  # fmt: skip
    assert not (adapter / "merged").exists()


def test_an_adapter_that_vllm_cannot_take(tmp_path: Path, install) -> None:
    arguments = install("vllm")
    run = make_adapter(tmp_path, use_dora=True)
    said = refused("serve", run, "--lora", in_a_line=False)
    assert "plain LoRA only" in said
    assert "lora_magnitude_vector" in said
    assert not arguments.exists()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_rslora": True, "r": 17}, None),
        ({"use_dora": True}, "plain LoRA only, and this adapter has"),
        ({"lora_bias": True}, "plain LoRA only, and this adapter has"),
        ({"modules_to_save": ["lm_head"]}, "plain LoRA only, and this adapter has"),
        ({"rank_pattern": {"q_proj": 2}}, "it does not read rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "it does not read alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "not change the base as init_lora_weights: pissa does"),
        ({"r": 600}, "its ranks end at 512"),
    ],
)
def test_the_line_for_vllm(settings: dict[str, object], why: str | None, tmp_path: Path) -> None:
    run = make_adapter(tmp_path, **settings)
    line = vllm_line(run)
    if why is None:
        base = f"vllm serve {tmp_path / 'base'}"
        assert (
            line
            == f"for vLLM: {base} --enable-lora --lora-modules adapter={run} --max-lora-rank 32"
        )
        return
    merged = f"fusewright merge {run} && vllm serve {run / 'merged'} --served-model-name adapter"
    assert line is not None
    assert line.startswith(f"for vLLM: {merged} (merged, because it")
    assert why in line


def test_the_line_for_vllm_of_whole_models(tmp_path: Path) -> None:
    run = make_adapter(tmp_path, use_dora=True)
    *_, check, said = fusewright("merge", run, "--dtype", "bf16").stdout.splitlines()
    assert check.endswith(f"training: fusewright export {run} --format merged -q bfloat16")
    assert said == f"for vLLM: vllm serve {run / 'merged'} --served-model-name merged"
    assert vllm_line(run / "merged") == said
    newer = (run / "merged").stat().st_mtime + 5
    os.utime(run / "adapter_model.safetensors", (newer, newer))
    assert "merged is older than the run's adapter" in str(vllm_line(run))
    config = json.loads((run / "merged" / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (run / "merged" / "config.json").write_text(json.dumps(config))
    assert vllm_line(run / "merged") is None  # it writes no texts


def test_llama_server_gets_the_gguf_of_the_run(adapter: Path, install) -> None:
    arguments = install("llama-server")
    said = refused("serve", adapter, in_a_line=False)
    assert f"fusewright export {adapter} --format gguf" in said
    file = _gguf(adapter / "export-q8_0" / "model-q8_0.gguf")
    _gguf(adapter / "export-q8_0" / "mmproj-model.gguf")
    expected = [
        "--model", str(file), "--mmproj", str(file.with_name("mmproj-model.gguf")), "--alias",
        "adapter", "--jinja", "--host", "127.0.0.1", "--port", "8000",
    ]  # fmt: skip
    fusewright("serve", adapter)
    assert json.loads(arguments.read_text()) == expected
    fusewright("serve", file)
    assert json.loads(arguments.read_text())[:2] == ["--model", str(file)]
    _gguf(adapter / "other.gguf")
    assert "several GGUF files" in refused("serve", adapter, in_a_line=False)


@pytest.mark.usefixtures("install")
def test_without_a_server_the_commands_are_said(adapter: Path) -> None:
    said = refused("serve", adapter, "--host", "0.0.0.0", in_a_line=False)
    for text in (
        "pip install vllm", f"fusewright merge {adapter}", f"vllm serve {adapter / 'merged'}",
        "--host 0.0.0.0", "llama.cpp", f"fusewright export {adapter} --format gguf",
    ):  # fmt: skip
        assert text in said
    assert not (adapter / "merged").exists()


def test_the_server_takes_the_place_of_the_process(adapter: Path, install) -> None:
    arguments = install("vllm")
    command = [sys.executable, "-m", "fusewright.cli", "serve", str(adapter), "--lora"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("vllm serve ")
    assert json.loads(arguments.read_text())[0] == "serve"
