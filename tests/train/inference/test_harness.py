"""Tasks of lm-evaluation-harness: the figures of the run's own model, and no code unasked."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ..commands import fusewright, refused
from ..conftest import write_rows

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval"
)
ROWS = [
    {"question": f"What is {i}?", "choices": [f"It is {j}." for j in range(3)], "answer": i % 3}
    for i in range(6)
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_rows(folder / "rows.jsonl", ROWS)
    _write_task(folder)
    return folder


def _write_task(folder: Path, more: str = "", **keys: Any) -> None:
    task = {
        "task": "mine", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "output_type": "multiple_choice", "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "answer", "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}], "metadata": {"version": 1}, **keys,
    }  # fmt: skip
    (folder / "mine.yaml").write_text(yaml.safe_dump(task) + more)


@needs_harness
@pytest.mark.long
def test_the_figures_are_those_of_the_runs_model(trained: Path, tasks: Path) -> None:
    arguments = ("--tasks", "mine", "--include-path", tasks, "--limit", "5", "--batch-size", "2")
    done = fusewright("eval", trained, *arguments)
    assert done.exit_code == 0, done.output
    found = json.loads((trained / "eval_tasks.json").read_text())["tasks"]["mine"]
    right = _right(trained)
    assert 0 < sum(right) < 5
    assert found["figures"]["acc"]["value"] == pytest.approx(sum(right) / 5)
    assert (found["samples"], found["of"], found["shots"]) == (5, 6, 0)
    assert f"{sum(right) / 5:.4f}" in done.stdout
    done = fusewright("eval", trained, *arguments, "--num-fewshot", "1", "--json")
    assert json.loads(done.stdout)["tasks"]["mine"]["shots"] == 1


def _right(run: Path) -> list[bool]:
    """Whether the right answer is the likeliest one, computed without the harness."""
    from fusewright.train.inference.load_run import load_run

    model, tokenizer = load_run(run)
    right = []
    for row in ROWS[:5]:
        sums = []
        for choice in row["choices"]:
            prompt = tokenizer(f"Q: {row['question']}\nA:")["input_ids"]
            ids = tokenizer(f"Q: {row['question']}\nA: {choice}")["input_ids"]
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            scores = scores.gather(1, torch.tensor(ids[1:])[:, None])[len(prompt) - 1 :]
            sums.append(float(scores.sum()))
        right.append(sums.index(max(sums)) == row["answer"])
    return right


@needs_harness
def test_code_in_a_task_is_not_run_unasked(trained: Path, tasks: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-was-run"
    code = (
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\ndef pick(rows):\n    return rows\n"
    )
    (tasks / "own.py").write_text(code)
    other = tmp_path / "base.yaml"
    other.write_text(f"process_docs: !function {tasks.name}.own.pick\n")
    arguments = ("eval", trained, "--tasks", "mine", "--include-path", tasks)
    _write_task(tasks, "process_docs: !function own.pick\n")
    assert "--allow-code" in refused(*arguments)
    _write_task(tasks, include=str(other))
    assert "--allow-code" in refused(*arguments)
    _write_task(tasks, metric_list=[{"metric": str(tasks / "own.py")}])
    assert "--allow-code" in refused(*arguments)
    _write_task(tasks, metric_list=[{"metric": "random"}])  # random/random.py of this folder
    assert "--allow-code" in refused(*arguments)
    _write_task(
        tasks, doc_to_text="{{ cycler.__init__.__globals__.os.mkdir('" + str(mark) + "') }}"
    )
    sandboxed = fusewright(*arguments)  # which has shown the loading of the rows
    assert sandboxed.exit_code == 2
    assert "template is code" in sandboxed.stderr.splitlines()[-1]
    assert "--allow-code" in sandboxed.stderr.splitlines()[-1]
    assert not mark.exists()
    _write_task(tasks, "process_docs: !function own.pick\n")
    done = fusewright(*arguments, "--allow-code")
    assert done.exit_code == 0, done.output
    assert mark.exists()


@needs_harness
def test_an_unknown_task_is_named(trained: Path) -> None:
    assert "there is no task arc_eazy; did you mean arc_easy?" in refused(
        "eval", trained, "--tasks", "arc_eazy"
    )


def test_a_missing_harness_names_package_and_extra(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a)
    )
    text = refused("eval", trained, "--tasks", "arc_easy")
    assert "needs the package lm-eval" in text
    assert 'pip install "fusewright[evaluation]"' in text


def test_options_of_tasks_need_tasks(trained: Path) -> None:
    assert "name the tasks, too: --tasks" in refused("eval", trained, "--limit", "5")
