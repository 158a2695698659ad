"""Exports: read back equal to what was trained, within the format's own rounding, or exit 1."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fusewright.train import merge, train
from fusewright.train.data.sample import Sample
from fusewright.train.export import certificate, command, compressed, ollama
from fusewright.train.export.certificate import CHECKS
from fusewright.train.export.options import ExportOptions, choose
from fusewright.train.export.reading import compared
from fusewright.train.export.scores import HeldOut
from fusewright.train.inference.run_folder import open_run
from fusewright.train.model.rounding import misfit, roundtrip
from fusewright.train.recipe.export_formats import FORMATS

from ..commands import fusewright, refused, snapshot
from ..conftest import (
    learnt,
    make_adapter,
    make_model,
    make_tokenizer,
    numbers,
    write_rows,
)
from ..model.multimodal import MTP, make_multimodal, stored
from .convert_hf_to_gguf import PLANTED

STAND_IN = Path(__file__).parent
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="needs compressed-tensors"
)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A base and an adapter; its rows are beside it."""
    model = make_model(hidden_size=64, intermediate_size=128, tie_word_embeddings=False)
    write_rows(tmp_path / "rows.jsonl", numbers(4))
    return make_adapter(tmp_path, model)


def export(run: Path, *arguments: str | Path, exit_code: int = 0) -> dict[str, Any]:
    """The certificate that the command writes."""
    folder = run / "out"
    done = fusewright("export", run, "--output", folder, "--data", run.parent / "rows.jsonl",
                      "--llama-cpp", STAND_IN, *arguments)  # fmt: skip
    assert done.exit_code == exit_code, done.output + repr(done.exception)
    found: dict[str, Any] = json.loads((folder / "certificate.json").read_text())
    assert found["passed"] == (exit_code == 0)
    for finding in found["findings"]:
        assert f"{finding['check']}: {finding['reason']}" in " ".join(done.output.split())
    return {**found, **{finding["check"]: finding for finding in found["findings"]}}


@needs_library
@pytest.mark.long
@pytest.mark.parametrize("name", ["fp8", "int4-g32", "nvfp4", "mxfp4"])
def test_compressed_tensors(adapter: Path, name: str) -> None:
    found = export(adapter, "--format", "compressed-tensors", "-q", name)
    assert found["merged-tensors"]["figures"]["changed"] == 14
    assert found["exported-tensors"]["figures"]["tensors"] == {name: 14, "as it is": 7}
    assert found["facts"]["models"].keys() == {"base", "adapter", "merged", "base, exported",
                                               "exported"}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(adapter / "out")
    assert model.model.layers[0].mlp.up_proj.quantization_scheme.weights is not None
    assert f"compressed-tensors {name} and read back" in (adapter / "out/README.md").read_text()


@needs_library
@pytest.mark.parametrize(("columns", "advice"), [(96, ": int4-g32 fits"), (192, ": int4-g64 fits"),
                                                 (100, "")])  # fmt: skip
def test_rows_that_groups_do_not_divide_name_a_format_that_fits(columns: int, advice: str) -> None:
    reason = misfit(FORMATS["int4"], (8, columns))
    assert reason == f"its rows have {columns} values, which 128 does not divide{advice}"
    assert misfit(FORMATS["int4"], (8, 256)) is None


@needs_library
@pytest.mark.long
def test_layers_that_stay_as_they_are_say_why(adapter: Path) -> None:
    found = export(adapter, "--format", "compressed-tensors", "-q", "int4")
    why = "its rows have 64 values, which 128 does not divide: int4-g64 fits"
    kinds = {"int4": 2, f"as it is ({why})": 12, "as it is": 7}
    assert found["exported-tensors"]["figures"]["tensors"] == kinds


@needs_library
@pytest.mark.long
def test_a_run_is_exported_in_the_format_that_it_trained_for(recipe: dict[str, Any]) -> None:
    keys = {**recipe, "export_format": "int4-g32", "max_steps": 8, "learning_rate": 1e-2}
    run = train(keys, console=Console(quiet=True)).output_dir
    folder = run.parent / "exported"
    done = fusewright("export", run, "--format", "compressed-tensors", "--output", folder)
    assert done.exit_code == 0, done.output + repr(done.exception)
    found = json.loads((folder / "certificate.json").read_text())
    assert found["passed"]
    models = found["facts"]["models"]
    assert models["exported"]["loss"] < models["base"]["loss"]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert {group["weights"]["num_bits"] for group in config["config_groups"].values()} == {4}


@pytest.mark.long
@pytest.mark.parametrize("name", ["q8_0", "bf16"])
def test_gguf(adapter: Path, name: str) -> None:
    kind = "ollama" if name == "q8_0" else "gguf"
    found = export(adapter, "--format", kind, "-q", name)
    kinds = {"F32": 5, "Q8_0": 16} if name == "q8_0" else {"BF16": 21}  # norms are ones
    assert found["exported-tensors"]["figures"]["tensors"] == kinds
    assert found["facts"]["greedy"]["prompts"] == 4
    is_there = importlib.util.find_spec("llama_cpp") is not None
    assert found["llama-cpp"]["verdict"] == ("pass" if is_there else "skipped")
    assert is_there or found["llama-cpp"]["reason"] == "llama-cpp-python is not installed"
    if kind == "ollama":
        lines = (adapter / "out/Modelfile").read_text().splitlines()
        assert lines[0] == "FROM ./model-q8_0.gguf"
        assert lines[1].startswith('TEMPLATE """{{ range .Messages }}')
        assert lines[-1] == 'PARAMETER stop "<|im_end|>"'
    assert found["facts"]["bytes"]["export"] == (adapter / f"out/model-{name}.gguf").stat().st_size


@pytest.mark.long
def test_merged(adapter: Path) -> None:
    found = export(adapter, "--format", "merged")
    assert found["merged-tensors"]["verdict"] == "pass"
    assert found["facts"]["models"]["merged"]["kl"] < 1e-9
    modes = {path.stat().st_mode for path in (adapter / "out").iterdir()}
    assert len(modes) == 1  # weights are not their owner's alone to read
    assert found["facts"]["rows"] == {"what": "rows.jsonl", "samples": 4, "trained_tokens": 144}


@pytest.mark.long
@pytest.mark.parametrize("fault", ["transposed", "dropped", "no-template"])
def test_faults_of_a_converter(adapter: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", fault)
    found = export(adapter, "--format", "gguf", exit_code=1)
    if fault == "no-template":
        assert found["chat-template"]["reason"] == "chat_template: it is missing"
    else:
        assert found["exported-tensors"]["subjects"] == [PLANTED]
        said = "it is transposed" if fault == "transposed" else "it is missing"
        assert said in found["exported-tensors"]["reason"]


@needs_library
@pytest.mark.long
@pytest.mark.parametrize("fault", ["transposed", "wrong scale", "missing"])
def test_faults_of_the_writer(adapter: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save = compressed.save_file

    def planted(tensors: dict[str, Tensor], *arguments: Any, **options: Any) -> None:
        if PLANTED in tensors and fault == "transposed":
            tensors[PLANTED] = tensors[PLANTED].T.contiguous()
        elif PLANTED in tensors and fault == "missing":
            del tensors[PLANTED], tensors[f"{PLANTED}_scale"]
        elif PLANTED in tensors:
            tensors[f"{PLANTED}_scale"] = tensors[f"{PLANTED}_scale"].flip(0).contiguous()
        save(tensors, *arguments, **options)

    monkeypatch.setattr(compressed, "save_file", planted)
    found = export(adapter, "--format", "compressed-tensors", exit_code=1)
    assert found["exported-tensors"]["subjects"] == [PLANTED]


@pytest.mark.long
@pytest.mark.parametrize("fault", ["dropped", "doubled", "nan", "wrong base"])
def test_faults_of_a_merge(
    adapter: Path, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensor, files = merge.Layers.tensor, merge.base_files

    def planted(self: Any, stored: str) -> Tensor:
        merged = tensor(self, stored)
        if stored != PLANTED:
            return merged
        before: Tensor = self.files.read(stored)
        if fault == "nan":
            merged[:1] = torch.nan
            return merged
        return before if fault == "dropped" else merged + (merged - before)

    if fault == "wrong base":
        make_model(3, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "other")
        monkeypatch.setattr(merge, "base_files", lambda *_: files(str(tmp_path / "other")))
    else:
        monkeypatch.setattr(merge.Layers, "tensor", planted)
    found = export(adapter, "--format", "merged", exit_code=1)["merged-tensors"]
    if fault == "wrong base":
        assert "model.embed_tokens.weight" in found["subjects"]
        assert len(found["subjects"]) == 16  # all but the norms, which begin as ones
    else:
        assert found["subjects"] == [PLANTED]
        said = {
            "dropped": "0% of the adapter's change", "doubled": "200% of the adapter's change",
            "nan": "numbers are inf or nan",
        }  # fmt: skip
        assert said[fault] in found["reason"]


@pytest.mark.long
def test_another_base(run_folder: Path, tmp_path: Path) -> None:
    """A base that only looks like the one in training: its losses are not those of the run."""
    done = fusewright("export", run_folder, "--format", "merged", "--output", tmp_path / "1")
    assert done.exit_code == 0, done.output
    assert "✓ recorded-loss: " in done.output
    assert "✓ merged-gain: " in done.output
    make_model(3, initializer_range=0.3).save_pretrained(tmp_path / "other")
    done = fusewright("export", run_folder, "--format", "merged", "--output", tmp_path / "2",
                      "--base-model", tmp_path / "other")  # fmt: skip
    assert done.exit_code == 1, done.output
    assert "✗ recorded-loss: base: its loss is " in done.output


@needs_library
@pytest.mark.long
def test_experts(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64,
             "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
             "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2}  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=262, eos_token_id=2, **sizes))
    write_rows(tmp_path / "rows.jsonl", numbers(4))
    run = make_adapter(tmp_path, model, target_modules=["q_proj"],
                       target_parameters=["mlp.experts.down_proj"])  # fmt: skip
    found = export(run, "--format", "compressed-tensors", "-q", "int4-g32")
    kinds = found["exported-tensors"]["figures"]["tensors"]
    assert kinds["int4-g32"] == 4 + 3 * 4
    ignored = json.loads((run / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.layers.0.mlp.gate"]
    said = refused("export", run, "--format", "compressed-tensors", "-q", "nvfp4")
    assert "cannot read experts in nvfp4" in said
    said = refused("export", run, "--format", "gguf", "--llama-cpp", STAND_IN)
    assert "Qwen3MoeForCausalLM is not supported" in said


@needs_library
@pytest.mark.long
@pytest.mark.parametrize("fault", [False, True])
def test_towers(tmp_path: Path, fault: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is outside the language model is written bit for bit; a changed bit is found."""
    write_rows(tmp_path / "rows.jsonl", numbers(4))
    base = make_multimodal("qwen2_5_vl", tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language.*(q|down)_proj"))
    learnt(adapted).save_pretrained(run := tmp_path / "adapter")
    tower, tensor = "visual.blocks.0.mlp.up_proj.weight", merge.Layers.tensor

    def planted(self: Any, stored: str) -> Tensor:
        return tensor(self, stored) * (1.01 if stored == tower else 1)

    if fault:
        monkeypatch.setattr(merge.Layers, "tensor", planted)
    found = export(run, "--format", "compressed-tensors", "-q", "int4-g32", exit_code=int(fault))
    if fault:
        assert found["merged-tensors"]["subjects"] == [f"model.{tower}"]
        return
    ours, theirs = stored(run / "out"), stored(base)
    towers = [name for name in theirs if name.startswith("visual.")]
    assert towers
    for name in (*towers, MTP):
        assert torch.equal(ours[name], theirs[name]), name
    assert found["exported-tensors"]["figures"]["tensors"]["int4-g32"] == 14


def test_code_that_a_folder_names_is_not_run_unasked(adapter: Path) -> None:
    """llama.cpp's converter loads some tokenizers with their own code."""
    whole = adapter.parent / "whole"
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(whole)
    make_tokenizer().save_pretrained(whole)
    config = json.loads((whole / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["own.Own", None]}
    (whole / "tokenizer_config.json").write_text(json.dumps(config))
    said = refused("export", whole, "--format", "gguf", "--llama-cpp", STAND_IN)
    assert "tokenizer_config.json names Python code (auto_map)" in said


def test_a_stopped_export_leaves_nothing(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, calls = merge.Layers.tensor, []

    def stopped(self: Any, stored: str) -> Tensor:
        calls.append(stored)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return tensor(self, stored)

    monkeypatch.setattr(merge.Layers, "tensor", stopped)
    before = snapshot(adapter)
    done = fusewright("export", adapter, "--format", "merged")
    assert done.exit_code == 128 + signal.SIGTERM
    assert snapshot(adapter) == before
    assert not [path for path in adapter.iterdir() if path.name.startswith(".")]


def test_a_tensor_of_which_only_the_shape_is_known_is_not_judged() -> None:
    plain, noise = torch.ones(4, 4), torch.randn(4, 4)
    assert not compared("w", plain, {"Q4_K": None}, noise).is_judged
    assert compared("w", plain, {"Q4_K": None}, noise, allowed=9.0).is_judged
    assert compared("w", plain, {"Q4_K": None}, noise, allowed=1e-3).problem
    noise[0, 0] = torch.nan
    assert compared("w", plain, {"Q4_K": None}, noise).problem == "1 of 16 numbers are inf or nan"


def test_what_is_missing(adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    before = snapshot(adapter)
    said = refused("export", adapter, "--format", "gguf")
    assert "no convert_hf_to_gguf.py on PATH: git clone" in said
    said = refused("export", adapter, "--format", "gguf", "-q", "int4")
    assert "int4: no such format of gguf" in said
    assert "there are merged, gguf" in refused("export", adapter, "--format", "onnx")
    assert "--create NAME goes with" in refused("export", adapter, "--format", "gguf", "--create",
                                                "x")  # fmt: skip
    (tmp_path / "rows.jsonl").touch()
    said = refused("export", adapter, "--format", "merged", "--data", tmp_path / "row.jsonl")
    assert said.startswith(f"--data: there is no {tmp_path}/row.jsonl in ")
    assert said.endswith(f"did you mean {tmp_path}/rows.jsonl?")
    said = refused("export", adapter, "--format", "merged", "--output", tmp_path)
    assert said == f"{tmp_path} is there already; name another folder: --output DIR"
    assert snapshot(adapter) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--format", "onnx"), "--format: onnx: there are "),
        (("--format", "gguf", "-q", "int4"), "int4: no such format of gguf"),
        (("--format", "gguf"), "GGUF is written by llama.cpp's converter"),
        (
            ("--format", "ollama", "--create", "x", "--llama-cpp", str(STAND_IN)),
            "--create: there is no ollama on PATH",
        ),
        (("--format", "merged", "--data", "none.jsonl"), "--data: there is no none.jsonl in "),
        (("--format", "merged", "--output", "."), ". is there already"),
        (
            ("--format", "merged", "--max-shard-size", "5"),
            "--max-shard-size: Unit '5' not supported. Supported units are TB, GB, MB, KB. Got "
            "'5'.; say 500MB or 5GB",
        ),
    ],
)
def test_what_is_wrong_is_said_before_pytorch_is_imported(
    adapter: Path, words: tuple[str, ...], said: str
) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from fusewright.cli.main import main; "
        f"sys.argv[1:] = {['export', str(adapter), *words]}; main()"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"fusewright: {said}")


def test_what_scores_texts_is_refused_before_programs_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    run = {"base_model": "some/base", "recipe": {"reward_model": True}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    said = refused("export", tmp_path, "--format", "gguf")
    assert "holds a model that scores texts (reward_model)" in said


@needs_library
def test_the_format_that_a_run_was_trained_for_is_what_is_checked(tmp_path: Path) -> None:
    run = {"base_model": "some/base", "recipe": {"export_format": "int4-g32", "load_in_4bit": True}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    choice = choose(open_run(tmp_path), ExportOptions("compressed-tensors"))
    assert choice.format is FORMATS["int4-g32"]
    assert choice.output.name == "export-int4-g32"
    other = choose(open_run(tmp_path), ExportOptions("compressed-tensors", "fp8"))
    assert other.format is FORMATS["fp8"]


@needs_library
@pytest.mark.long
@pytest.mark.parametrize("kind", ["compressed-tensors", "gguf"])
def test_a_full_disk(adapter: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the run is lost, nor is anything half-written left."""

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(compressed, "save_file", full)
    monkeypatch.setenv("FAULT", "disk")
    before = snapshot(adapter)
    said = refused("export", adapter, "--format", kind, "--llama-cpp", STAND_IN)
    assert "No space left on device" in said
    assert snapshot(adapter) == before


DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}" + str(make_tokenizer().chat_template)
)
TRIMMED = "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] | trim }}{% endfor %}"


def test_templates_for_ollama() -> None:
    found = ollama.turns(make_tokenizer(), {})
    assert found is not None
    assert found.go() == (
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )
    found = ollama.turns(make_tokenizer(DEFAULT_SYSTEM), {})
    assert found is not None
    assert found.go().startswith("{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ e")
    counted = "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}"
    assert ollama.turns(make_tokenizer(counted), {}) is None


@needs_library
def test_roundtrips() -> None:
    """Rounding twice is rounding once, and no format confuses rows and columns."""
    torch.manual_seed(0)
    weight = torch.randn(48, 256) * torch.logspace(-3, 0, 48)[:, None]
    for format in FORMATS.values():
        if format.writer == "gguf" and not format.type:
            continue
        rounded = roundtrip(format, weight).float()
        assert rounded.shape == weight.shape
        error = (rounded - weight).norm(dim=1) / weight.norm(dim=1)  # of each row, large or small
        assert float(error.max()) < 0.15, format.name
    assert set(CHECKS) >= {"merged-tensors", "exported-tensors", "format-cost"}


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ("", []),
        ("llama-cpp-python is not installed", ["llama-cpp-python is not installed"]),
        ([], ["there are no rows"]),
        ([3000], ["the first row has more than 2,048 tokens"]),
    ],
)
def test_why_no_other_engine_is_asked(tokens: str | list[int], said: list[str]) -> None:
    why = tokens if isinstance(tokens, str) else None
    rows = [] if why is not None else [Sample([1] * n, [1] * n) for n in tokens]
    writer = SimpleNamespace(other_reader=lambda *_: torch.zeros if why is None else why)
    subject: Any = SimpleNamespace(writer=writer, export=Path("export"))
    results: Any = {"exported": SimpleNamespace(answers=["a"])}
    found = certificate._other_reader(subject, results, HeldOut("rows", rows, []))
    assert [(f.check, f.verdict, f.reason) for f in found] == [
        ("llama-cpp", "skipped", reason) for reason in said
    ]


@pytest.mark.parametrize(
    ("dtype", "base", "in_its_own", "said"),
    [
        (
            "bfloat16",
            5.0,
            (5.0, 4.0),
            "the trained model has its loss in bfloat16 only: 4.0000, in float32 3.7000",
        ),
        (
            "bfloat16",
            6.0,
            (5.0, 4.0),
            "the base has its loss in bfloat16 only: 5.0000, in float32 6.0000",
        ),
        ("bfloat16", 5.0, (5.0, 3.7), "trained model: its loss is 3.7000 (in bfloat16)"),
        ("bfloat16", 6.0, (6.0, 4.0), "base: its loss is 6.0000 (in bfloat16)"),
        ("float32", 5.0, (5.0, 4.0), "trained model: its loss is 3.7000 (in float32)"),
    ],
)
def test_a_loss_that_was_recorded_in_16_bits(
    dtype: str, base: float, in_its_own: tuple[float, float], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What agrees in the precision of the run passes and says so, the base and what is trained."""

    def of(loss: float) -> Any:
        return SimpleNamespace(loss=loss, losses=torch.zeros(0))

    def load(run: Any) -> Any:
        loss = in_its_own[0] if run == "the base" else in_its_own[1]
        return SimpleNamespace(dtype=getattr(torch, dtype), loss=loss)

    monkeypatch.setattr(certificate, "load_model_of", load)
    monkeypatch.setattr(certificate, "open_run", lambda folder, consent: folder)
    monkeypatch.setattr(certificate, "forward", lambda model: model)
    monkeypatch.setattr(certificate, "scores", lambda model, rows: of(model.loss))
    facts = {"val_loss_before": 5.0, "val_loss_after": 4.0}
    run = SimpleNamespace(recipe={}, facts=facts, consent=None)
    subject: Any = SimpleNamespace(run=run)
    rows: Any = SimpleNamespace(spread=lambda losses: 0.0)
    kept: Any = SimpleNamespace(folder="the base")
    results = {"base": of(base), "adapter": of(3.7)}
    found = certificate._recorded(subject, kept, results, of(3.7), rows)
    assert said in found.reason
    assert found.verdict == ("pass" if " only: " in said else "fail")
    assert found.verdict == "pass" or "they may differ by 0.1500" in found.reason


@pytest.mark.parametrize(("kept", "said"), [(0.36, True), (0.72, False), (None, False)])
def test_an_export_that_loses_most_of_the_gain_is_warned_of(kept: float | None, said: bool) -> None:
    facts = {"gain_kept": kept, "models": {}, "greedy": {"prompts": 0}, "format": "gguf",
             "quantization": "q2", "date": "2026-12-02", "rows": {"what": "rows"}}  # fmt: skip
    audit: Any = SimpleNamespace(facts=facts, findings=[], failed=[])
    text = io.StringIO()
    command.show(audit, Console(file=text, width=300))
    for found in (text.getvalue(), command.line(audit)):
        assert ("most of it is lost, so take a format with more bits" in found) == said
