"""``fusewright verify``, called as a user would; each way is a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml

from fusewright.cli import main
from fusewright.passes.rms_norm import RMSNorm
from fusewright.rewrite.verify import Verdict, Verifier
from fusewright.train.proof import command, worker
from fusewright.train.proof.command import recipe_of, run_way
from fusewright.train.proof.ways import BatchLayout, Way, select, ways_of
from fusewright.train.recipe.load import load_recipe

from ...load import stretched
from ..commands import fusewright, snapshot
from ..conftest import make_model


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


@pytest.fixture
def file(recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "codegen": "eager", "use_tensorboard": True}))
    return path


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leave out ways that a test says nothing of: each takes as long as the others."""

    def leave_out(*names: str) -> None:
        def others(*given: Any) -> list[Way]:
            ways = ways_of(*given)
            assert {way.name for way in ways} >= set(names)
            return [way for way in ways if way.name not in names]

        monkeypatch.setattr(command, "ways_of", others)

    return leave_out


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> None:
    """Ways of one process are run in this one, which has imported all that they need."""

    @contextlib.contextmanager
    def here(folder: Path, number: int) -> Iterator[Any]:
        if number > 1:
            with started(folder, number) as processes:
                yield processes
            return
        with (folder / "rank-0.out").open("w") as out, contextlib.redirect_stdout(out):
            code = worker.main(folder)
        yield [SimpleNamespace(poll=lambda: code, returncode=code)]

    started = command._started
    monkeypatch.setattr(command, "_started", here)


def _verified(file: Path, *arguments: str) -> tuple[Any, dict[str, Any]]:
    """The command's result, and its figures."""
    figures = file.with_suffix(".json")
    done = fusewright("verify", str(file), "--json", str(figures), *arguments)
    assert figures.exists(), done.output
    return done, json.loads(figures.read_text(encoding="utf-8"))


@pytest.mark.usefixtures("scratch")
@pytest.mark.slow
def test_lora_trains_the_same_in_all_ways(file: Path, tmp_path: Path, scratch: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("not to be touched")
    before = snapshot(output)
    done, found = _verified(file, "--steps", "3", "--lora_dropout", "0.1")
    assert done.exit_code == 0, done.output
    assert found["passed"]
    assert {way["name"]: way["verdict"] for way in found["ways"]} == {
        "exact": "reference", "eager": "limit", "optimized": "passed", "merged": "passed",
        "unpacked": "passed", "1 x 2": "passed", "2 processes": "passed",
    }  # fmt: skip
    ways = {way["name"]: way for way in found["ways"]}
    assert ways["exact"]["dtype"] == "float64"
    assert ways["optimized"]["rewritten"]["rms_norm"] == 5
    assert ways["eager"]["rewritten"] == {}
    assert len(ways["2 processes"]["memory"]) == 2
    merged = ways.pop("merged")
    assert merged["loss_merged"] == pytest.approx(merged["loss_adapter"], rel=1e-5)
    assert 0 < merged["off"] <= merged["allowed"] < 1e-4
    kinds = {(each["kind"], each["direction"]) for each in ways["optimized"]["deviations"]["drift"]}
    assert {("", "size"), ("", "offset")} < kinds
    for way in ways.values():
        assert len(way["losses"]) == len(way["norms"]) == len(way["seconds"]) == 3
        assert way["losses"][2] < way["losses"][0]
        assert way["tokens_per_s"] > 0
    # fp32 against fp64: rounding, and nothing else
    assert max(ways["optimized"]["deviations"]["gradients"].values()) < 2e-6
    assert snapshot(output) == before
    assert list(scratch.iterdir()) == []
    for text in ("optimized", "2 x 1 packs", "allowed", "all ways that were run passed"):
        assert text in done.stdout
    assert "lora_dropout" in done.stdout
    assert "6 ways, one after the other" in done.stderr
    assert "2 processes: trained in" in done.stderr


@pytest.mark.long
@pytest.mark.usefixtures("scratch", "in_this_process")
@pytest.mark.parametrize(
    ("too_much", "by"), [(0.01, "the first step"), (2e-6, "16 steps with the initial weights")]
)
def test_a_wrong_rule_fails(
    file: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without: Callable[..., None],
    too_much: float,
    by: str,
) -> None:
    """A rule with a wrong rewrite, and no verification; however little is wrong, in any draw."""

    def wrong(self: Any, m: Any, x: Any, ops: Any) -> Any:  # weights of 1 become more
        return ops.rms_norm(x, m.get("w"), float(m.eps), too_much, "inner")

    monkeypatch.setattr(RMSNorm, "_norm", wrong)
    monkeypatch.setattr(Verifier, "__call__", lambda self, candidate: Verdict(None))
    without("packed", "1 x 2")
    shutil.copytree(base, tmp_path / "one-layer")
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "one-layer")
    small = ("--base_model", str(tmp_path / "one-layer"), "--steps", "1", "--processes", "1")
    done, found = _verified(file, *small, "--no-sample_packing")
    assert done.exit_code == 1, done.output
    assert not found["passed"]
    ways = {way["name"]: way for way in found["ways"]}
    assert ways["optimized"]["verdict"] == "failed"
    assert ways["optimized"]["rewritten"]["rms_norm"] == 3
    assert ways["optimized"]["deviations"]["gradients"]["all"] > too_much / 10
    assert "FAILED" in done.stdout
    assert f"optimized: FAILED: the gradients of {by} differ in " in done.stdout
    assert "FUSEWRIGHT_DISABLE=RULE (rewritten here: " in done.stdout
    assert "1 processes: skipped: --processes 1 asks for one process only" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("precision", ["--bf16", "--no-bf16"])
@pytest.mark.usefixtures("in_this_process")
def test_qlora_trains_the_same_on_a_cpu(
    scratch: Path, file: Path, precision: str, without: Callable[..., None]
) -> None:
    without("unpacked", "1 x 2")  # as in the tests of LoRA
    done, found = _verified(file, "--steps", "3", "--adapter", "qlora", "--load_in_4bit", precision)
    assert done.exit_code == 0, done.output
    assert [way["verdict"] for way in found["ways"]][2:] == ["passed"] * 3
    assert found["ways"][0]["dtype"] == {"--bf16": "float32"}.get(precision, "float64")
    assert found["ways"][2]["rewritten"]["lora_linear"]
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_sharded_processes_train_the_same(
    scratch: Path, file: Path, without: Callable[..., None]
) -> None:
    without("unpacked", "1 x 2")
    done, found = _verified(file, "--steps", "2", "--fsdp", "[full_shard, auto_wrap]")
    assert done.exit_code == 0, done.output
    shared = found["ways"][-1]
    assert (shared["name"], shared["verdict"]) == ("2 processes", "passed")
    assert len(shared["deviations"]["gradients"]) == 15
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("scratch", "in_this_process")
def test_plain_recurrent_layers_train_packs_one_by_one(
    file: Path, base: Path, tmp_path: Path, without: Callable[..., None]
) -> None:
    without("1 x 2")
    from transformers import AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "recurrent")
    config = Lfm2Config(
        vocab_size=len(AutoTokenizer.from_pretrained(base)), hidden_size=32, intermediate_size=64,
        num_attention_heads=2, num_key_value_heads=1, layer_types=["conv", "full_attention"],
        num_hidden_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "recurrent")
    _assert_plain_ways_train_one_by_one(file, tmp_path / "recurrent")


def _assert_plain_ways_train_one_by_one(file: Path, model: Path) -> None:
    arguments = ("--base_model", str(model), "--sample_packing")
    done, found = _verified(file, *arguments, "--steps", "3", "--processes", "1")
    assert done.exit_code == 0, done.output
    assert "exact and eager train them one by one" in done.stderr
    ways = {way["name"]: way for way in found["ways"]}
    assert [ways[name]["packing"] for name in ("exact", "eager", "optimized")] == [0, 0, 1]
    assert ways["optimized"]["verdict"] == ways["unpacked"]["verdict"] == "passed"


def _job(recipe: dict[str, Any], folder: Path, **keys: Any) -> Path:
    """A worker's folder."""
    from fusewright.train.data import Sample

    checked = load_recipe({**recipe, **keys})
    ids = list(range(3, 19))
    chosen = select([[Sample(ids, [-100, *ids[1:]])]], 1, 2)
    worker.write_samples(folder / worker.SAMPLES, chosen.samples)
    layout = BatchLayout.of(chosen.steps, checked.packs(), 2)
    changed = recipe_of(checked, Way("a", optimize=False, layout=layout), 1, str(folder / "out"))
    own = folder / "a"
    own.mkdir()
    keys = changed.model_dump(mode="json", exclude_defaults=True)
    worker.Job(keys, checked.consent, exact=False, sequences=layout.sequences).write(own)
    return own


def test_a_model_that_cannot_pack_says_so(
    recipe: dict[str, Any], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _job(recipe, scratch, sample_packing=True)
    monkeypatch.setattr("fusewright.compiler.packs.unpackable", lambda *_, **__: "a mixer")
    assert worker.main(folder) == 2
    result = json.loads((folder / worker.RESULT).read_text())
    assert result["status"] == "refused"
    assert "samples of a pack would see each other" in result["reason"]


def test_too_little_memory_is_no_bug(
    recipe: dict[str, Any], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory")

    folder = _job(recipe, scratch)
    monkeypatch.setattr("fusewright.train.proof.worker.make_trainer", none)
    assert worker.main(folder) == 3
    result = json.loads((folder / worker.RESULT).read_text())
    assert result == {"status": "refused", "reason": "there was not enough memory for this way"}


@pytest.mark.parametrize(("optional", "status"), [(True, "skipped"), (False, "failed")])
@pytest.mark.usefixtures("scratch")
def test_a_refused_way_is_left_out_if_it_may_be(
    recipe: dict[str, Any], tmp_path: Path, optional: bool, status: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    code = "import json, pathlib, sys; p = pathlib.Path(sys.argv[-1]) / 'result.json'; "
    code += "p.write_text(json.dumps({'status': 'refused', 'reason': 'it does not'})); sys.exit(2)"
    _stub(tmp_path, monkeypatch, code)
    layout = BatchLayout(True, 2, 1, 1, ((0,), (0,)))
    way = Way("packed", optimize=True, layout=layout, optional=optional)
    checked = load_recipe(recipe)
    run = run_way(checked, way, 1, tmp_path, checked.consent, print)
    assert (run.status, run.reason) == (status, "it does not")


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("import sys; sys.exit('there is no such thing')", "no such thing"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        (
            "import os; os.write(2, b'free(): invalid size\\n'); os.abort()",
            "was killed by SIGABRT; what was last printed:\n  free(): invalid size",
        ),
        ("import faulthandler, os; faulthandler.enable(); os.abort()", 'stub.py", line 1 in <mod'),
        ("", "exit code 0: it printed nothing"),
    ],
)
def test_a_process_that_ends_otherwise_has_failed(
    recipe: dict[str, Any], tmp_path: Path, code: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stub(tmp_path, monkeypatch, code)
    way = Way(
        "packed", optimize=True, layout=BatchLayout(True, 2, 1, 1, ((0,), (0,))), optional=True
    )
    checked = load_recipe(recipe)
    run = run_way(checked, way, 1, tmp_path, checked.consent, print)
    assert run.status == "failed"
    assert word in run.reason


def _stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Run ``code`` in the place of a worker."""
    script = tmp_path / "stub.py"
    script.write_text(code)
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    stub.chmod(0o755)
    monkeypatch.setattr("fusewright.train.proof.command.sys.executable", str(stub))


def _command(arguments: list[str], errors: Path) -> None:
    """The command, in a process that has imported already what it needs."""
    torch.set_num_threads(1)  # of a fork, others are not there
    sys.argv = ["fusewright", *arguments]
    with errors.open("w", buffering=1) as sys.stderr, open(os.devnull, "w") as sys.stdout:
        main()


@pytest.mark.long("15", "2")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_and_cleans_up(
    file: Path, scratch: Path, tmp_path: Path, number: signal.Signals
) -> None:
    errors = tmp_path / "errors"
    errors.touch()
    process = multiprocessing.get_context("fork").Process(
        target=_command, args=(["verify", str(file), "--max_steps", "9"], errors)
    )
    process.start()
    assert process.pid is not None
    try:
        children: list[psutil.Process] = []
        end = time.monotonic() + 200
        while not children and process.is_alive() and time.monotonic() < end:
            time.sleep(0.1)
            if "1/6 exact" in errors.read_text():
                children = psutil.Process(process.pid).children(recursive=True)
        assert children, errors.read_text()
        assert list(scratch.iterdir())
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == 128 + number
    finally:
        process.kill()
        process.join()
    assert "verify was stopped" in errors.read_text()
    _, left = psutil.wait_procs(children, timeout=stretched(30))
    assert not left
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--steps", "0"], "--steps"),
        (["--json", "nowhere/figures.json"], "--json: the folder nowhere does not exist"),
        (["--lora_rr", "3"], "did you mean lora_r?"),
        (["--nproc", "0"], "--processes"),
    ],
)
def test_bad_input_is_refused(file: Path, scratch: Path, arguments: list[str], word: str) -> None:
    done = fusewright("verify", str(file), *arguments)
    assert done.exit_code == 2, done.output
    assert word in done.stderr
    assert list(scratch.iterdir()) == []


def test_a_launcher_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    done = fusewright("verify", str(file))
    assert done.exit_code == 2
    assert "without torchrun" in done.stderr


def test_a_recipe_that_eager_mode_refuses(
    file: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(recipe: Any, way: Way, *_: Any) -> Any:
        from fusewright.train.proof.command import Run

        return Run(way, "failed", "sample_packing: the samples see each other")

    monkeypatch.setattr(command, "run_way", refuses)
    done = fusewright("verify", str(file))
    assert done.exit_code == 2
    assert "eager mode does not train this recipe" in done.stderr
    assert list(scratch.iterdir()) == []


def test_the_folder_is_kept_on_request(scratch: Path) -> None:
    said: list[str] = []
    with command._scratch(True, said.append) as folder:
        pass
    assert said == [f"kept {folder}"]
    assert list(scratch.iterdir()) == [folder]
    assert folder.stat().st_mode & 0o077 == 0
