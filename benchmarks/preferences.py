"""A step of TRL's trainers, on the plain model and on the optimized one, step by step in turn.

    python benchmarks/preferences.py --methods dpo,grpo --batch 8 --seq 512 --steps 4 --json FILE

Each engine has its own process, with the same trainer, the same rows and LoRA on all linears; what
differs is ``optimize(model)``. Rows are of real text, a quarter of a sequence is the prompt. A step
is forward, backward, clipping and optimizer, for GRPO also the completions, whose seconds are given
apart. The first step compiles, and is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

METHODS = ("dpo", "kto", "orpo", "cpo", "grpo", "reward")
ENGINES = ("trl", "fusewright")


@dataclass(frozen=True)
class MethodJob:
    """What one engine shall do: ``steps`` of ``method``, with ``batch`` sequences of ``seq``."""

    engine: str
    method: str
    model: str
    dtype: str
    batch: int
    seq: int
    steps: int
    threads: int
    codegen: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each method; 0 when both engines' losses agree."""
    options = _parse(arguments)
    from environment import describe
    from harness import EngineProcess

    rows = []
    for method in options.methods:
        jobs = [
            MethodJob(
                engine, method, options.model, options.dtype, options.batch, options.seq,
                options.steps, options.threads, options.codegen,
            )
            for engine in ENGINES
        ]  # fmt: skip
        with contextlib.ExitStack() as stack:
            running = [stack.enter_context(EngineProcess(job, Path(__file__))) for job in jobs]
            for process in running:
                process.load()
            for number in range(options.steps):
                turn = number % len(running)
                for process in running[turn:] + running[:turn]:
                    process.step()
        made = [asdict(p.run.job) | summary(p.run.steps) for p in running]
        rows += made
        for row in made:
            _print(row, made[0])
    if options.json:
        options.json.write_text(json.dumps([row | describe() for row in rows], indent=2) + "\n")
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    far = [a["method"] for a, b in pairs if not _agree(a["losses"], b["losses"])]
    if far:
        print(f"the losses disagree: {', '.join(far)}", file=sys.stderr)
    return 1 if far else 0


def _agree(ones: Sequence[float], others: Sequence[float]) -> bool:
    """The losses of the first step: later ones differ as rounding does, and GRPO's as draws do."""
    return abs(ones[0] - others[0]) <= 0.02 * max(1.0, abs(ones[0]))


def _print(row: dict[str, Any], base: dict[str, Any]) -> None:
    said = f"{row['method']:<7}{row['engine']:<12}{row['seconds']:8.2f} s"
    if row["generation"]:
        said += f" ({row['generation']:.2f} s of it completions)"
    said += f"{row['growth_mb']:9.0f} MB"
    if row is not base:
        said += f"   {base['seconds'] / row['seconds']:.2f} times as fast"
        said += f", {row['growth_mb'] / base['growth_mb']:.0%} of the memory"
    print(said, flush=True)


def summary(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians without the first step, which compiles; the growth is the largest."""
    later = steps[1:]
    return {
        "seconds": statistics.median(s["seconds"] for s in later),
        "generation": statistics.median(s["generation"] for s in later),
        "first_seconds": steps[0]["seconds"],
        "growth_mb": max(s["growth_mb"] for s in later),
        "losses": [s["loss"] for s in steps],
        "all_seconds": [s["seconds"] for s in steps],
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default="dpo,grpo")
    parser.add_argument("--model", default="smollm2", help="or a size of workload.py")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--codegen", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    options.methods = options.methods.split(",")
    unknown = set(options.methods) - set(METHODS)
    if unknown:
        parser.error(f"unknown method {sorted(unknown)[0]!r}; known: {', '.join(METHODS)}")
    return options


# --- the process of one engine -------------------------------------------------------------------


def _rows(job: MethodJob, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of real text, for one step more than is made; any two of its pieces are a pair."""
    from workload import _real_tokens

    prompt, answer, number = job.seq // 4, job.seq - job.seq // 4, job.batch * (job.steps + 1)
    text = _real_tokens(tokenizer, number * (prompt + 2 * answer)).tolist()

    def take(count: int) -> list[int]:
        found = text[:count]
        del text[:count]
        return found

    rows: list[dict[str, Any]] = []
    for i in range(number):
        asked, one, other = take(prompt), take(answer), take(answer)
        if job.method == "kto":
            row = {"completion_ids": one, "KL_completion_ids": other, "label": i % 2 == 0}
        else:
            row = {"chosen_ids": one, "rejected_ids": other}
        rows.append({"prompt_ids": asked, "prompt": "x", **row})
    return rows


def _dataset(job: MethodJob, tokenizer: Any) -> Any:
    from datasets import Dataset

    from fusewright.train.methods.rows import PreparedDataset

    rows = _rows(job, tokenizer)
    if job.method == "grpo":
        return Dataset.from_list([{"prompt": tokenizer.decode(r["prompt_ids"])} for r in rows])
    if job.method == "reward":
        rows = [
            {f"{n}_ids": r["prompt_ids"] + r[f"{n}_ids"] for n in ("chosen", "rejected")}
            for r in rows
        ]
    return PreparedDataset(Dataset.from_list(rows).data.table)


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(c)) + len(c) % 7) for c in completions]


def _parts(job: MethodJob) -> tuple[Any, Any, dict[str, Any], Any]:
    """Trainer, configuration, its settings, and what makes batches."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from fusewright.train.methods import rows as own
    from fusewright.train.methods.table import CPOConfig, CPOTrainer, ORPOConfig, ORPOTrainer
    from trl import (
        DPOConfig,
        DPOTrainer,
        GRPOConfig,
        GRPOTrainer,
        KTOConfig,
        KTOTrainer,
        RewardConfig,
        RewardTrainer,
    )

    whole = {"max_length": None}
    answer = job.seq - job.seq // 4
    if job.method == "grpo":
        settings = {
            "max_completion_length": answer, "num_generations": min(4, job.batch),
            "generation_kwargs": {"min_new_tokens": answer}, "beta": 0.04,
        }  # fmt: skip
        return GRPOTrainer, GRPOConfig, settings, None
    if job.method == "kto":
        from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference as Unpaired

        return KTOTrainer, KTOConfig, whole | {"train_sampling_strategy": "sequential"}, Unpaired
    if job.method == "reward":
        from trl.trainer.reward_trainer import DataCollatorForPreference as Scored

        return RewardTrainer, RewardConfig, whole, Scored
    if job.method == "dpo":
        return DPOTrainer, DPOConfig, whole, DataCollatorForPreference
    chosen = (ORPOTrainer, ORPOConfig) if job.method == "orpo" else (CPOTrainer, CPOConfig)
    return *chosen, {"max_length": job.seq}, own.SeparateAnswers


def _model(job: MethodJob) -> tuple[Any, Any]:
    """SmolLM2 with LoRA and its tokenizer; for rewards with a new head of one output."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from shapes import model_shape
    from workload import _load_smollm2

    dtype = getattr(torch, job.dtype)
    if job.model == "smollm2":
        model, tokenizer = _load_smollm2(dtype)
    else:  # random weights of the size, and SmolLM2's tokenizer
        tokenizer = _load_smollm2(dtype)[1]
        config = model_shape(job.model).llama_config()
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    task = "CAUSAL_LM"
    torch.manual_seed(0)
    if job.method == "reward":
        config = model.config
        config.num_labels, task = 1, "SEQ_CLS"
        config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
        scored = transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        scored.base_model.load_state_dict(model.base_model.state_dict())
        model = scored
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task)
    return get_peft_model(model, lora), tokenizer


def _trainer(job: MethodJob, folder: str) -> Any:
    """TRL's trainer of a method, with the model optimized or not."""
    from fusewright.train.methods.reference import drop_idle_copy

    model, tokenizer = _model(job)
    kind, configuration, settings, collator = _parts(job)
    if job.engine == "fusewright":
        from fusewright import optimize

        compared = job.method in ("dpo", "kto")  # with a reference: as recipes do
        optimize(model, codegen=job.codegen, compile_no_grad=compared)
    rows = job.batch // 2 if job.method in ("dpo", "orpo", "cpo", "reward") else job.batch
    args = configuration(
        output_dir=folder, per_device_train_batch_size=rows, use_cpu=True, max_steps=job.steps,
        bf16=job.dtype == "bfloat16", gradient_checkpointing=False, report_to=[], disable_tqdm=True,
        remove_unused_columns=False, learning_rate=1e-4, **settings,
    )  # fmt: skip
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    others: dict[str, Any] = {"data_collator": collator(pad)} if collator else {}
    if job.method == "grpo":
        others["reward_funcs"] = _reward

    class Prepared(kind):  # type: ignore[misc]  # 2026-11-27: which trainer, the job says
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    made = Prepared(
        model=model, args=args, train_dataset=_dataset(job, tokenizer),
        processing_class=tokenizer, **others,
    )  # fmt: skip
    drop_idle_copy(made.model)  # the reference is the model without its adapter, for both
    return made


def _timed(trainer: Any, spent: list[float]) -> None:
    """Add up in ``spent`` what the generation of completions takes."""
    generate = getattr(trainer, "_generate", None)
    if generate is None:
        return

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = generate(*args, **kwargs)
        spent[0] += time.perf_counter() - start
        return found

    trainer._generate = timed


def serve(job: MethodJob) -> None:
    """One step for each line that it is sent."""
    import torch

    from worker import Memory, send

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not mix with the replies
    warnings.simplefilter("ignore")
    if job.threads:
        torch.set_num_threads(job.threads)
    with tempfile.TemporaryDirectory(prefix="fusewright-bench-") as folder:
        trainer = _trainer(job, folder)
        batches = iter(trainer.get_train_dataloader())
        optimizer = trainer.create_optimizer()
        model = trainer.accelerator.prepare_model(trainer.model).train()
        trainer.model_wrapped, trainer.current_gradient_accumulation_steps = model, 1
        spent = [0.0]
        _timed(trainer, spent)
        trained = [p for p in model.parameters() if p.requires_grad]
        memory = Memory("cpu")
        send(replies, {"loaded": memory.loaded, "setting": {"threads": torch.get_num_threads()}})
        while sys.stdin.readline():
            batch, memory = next(batches), Memory("cpu")
            spent[0], start = 0.0, time.perf_counter()
            loss = trainer.training_step(model, batch, None)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
            growth = memory.peak()["rss_mb"] - memory.loaded["rss_mb"]
            send(replies, {
                "loss": float(loss), "seconds": seconds, "generation": spent[0],
                "growth_mb": growth,
            })  # fmt: skip


if __name__ == "__main__":
    words = sys.argv[1:]
    if len(words) == 1 and words[0].startswith("{"):
        serve(MethodJob(**json.loads(words[0])))
    else:
        sys.exit(main())
