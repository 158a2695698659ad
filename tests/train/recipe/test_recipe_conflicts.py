"""Keys that do not go together, and keys that are not yet available: both are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..mistakes import Case, check, good

TOGETHER = [
    good(
        "duplicates of a stream",
        "streaming: true\nmax_steps: 2\ndataset_exact_deduplication: true\n",
        "line 6: dataset_exact_deduplication: needs all rows at once",
    ),
    Case(
        "a dataset of a stream that counts twice",
        "base_model: a/b\nmax_steps: 2\npretraining_dataset: [{path: a, weight: 2}]\n",
        "weight: needs all rows at once, which a stream (",
    ),
    good(
        "two places of rows to train on",
        "max_steps: 2\npretraining_dataset: [{path: a}]\n",
        "line 5: pretraining_dataset: set this or datasets, not both: only one of them is trained",
    ),
    good(
        "a part of a stream",
        "streaming: true\nmax_steps: 2\ndataset_shard_num: 2\n",
        "line 6: dataset_shard_num: needs all rows at once",
    ),
    good(
        "no targets",
        "adapter: lora\n",
        "4: adapter: lora needs lora_target_linear: true, or a list",
    ),
    good(
        "qlora in full",
        "adapter: qlora\nlora_target_linear: true\n",
        "line 4: adapter: qlora needs load_in_4bit: true",
    ),
    good(
        "gradients of adapters in 16 bits",
        "adapter: lora\nlora_target_linear: true\nlora_fp32_gradients: true\n"
        "peft_autocast_adapter_dtype: false\n",
        "line 6: lora_fp32_gradients: needs peft_autocast_adapter_dtype: true",
    ),
    good(
        "blocks drawn by several processes",
        "lisa_n_layers: 1\nlisa_step_interval: 2\ntensor_parallel_size: 2\n",
        "line 6: tensor_parallel_size: set this or lisa_n_layers, not both",
    ),
    good(
        "two quantizations",
        "adapter: lora\nlora_target_linear: true\nload_in_4bit: true\nload_in_8bit: true\n",
        "line 7: load_in_8bit: set this or load_in_4bit, not both",
    ),
    good(
        "nothing to train",
        "load_in_8bit: true\n",
        "4: load_in_8bit: quantized weights cannot be tra",
    ),
    good("dtypes", "bf16: true\nfp16: true\n", "line 5: fp16: set this or bf16, not both"),
    good(
        "attentions",
        "flash_attention: true\nsdp_attention: true\n",
        "line 5: sdp_attention: set this or flash_attention, not both",
    ),
    good(
        "warm-ups",
        "warmup_steps: 1\nwarmup_ratio: 0.1\n",
        "5: warmup_ratio: set this or warmup_steps",
    ),
    good(
        "saves", "save_steps: 1\nsaves_per_epoch: 1\n", "5: saves_per_epoch: set this or save_steps"
    ),
    good(
        "evals",
        "val_set_size: 1\neval_steps: 1\nevals_per_epoch: 1\n",
        "6: evals_per_epoch: set this",
    ),
    good(
        "no saves",
        "save_strategy: no\nsave_steps: 1\n",
        "5: save_steps: needs save_strategy: steps, wh",
    ),
    good(
        "nothing to validate",
        "eval_steps: 3\n",
        "line 4: eval_steps: needs val_set_size or test_data",
    ),
    good(
        "validated twice",
        "val_set_size: 2\ntest_datasets:\n  - path: rows.jsonl\n",
        "line 4: val_set_size: set this or test_datasets, not both",
    ),
    good(
        "batches",
        "batch_size: 8\ngradient_accumulation_steps: 2\n",
        "line 4: batch_size: set this or gradient_accumulation_steps, not both",
    ),
    good(
        "uneven",
        "batch_size: 8\nmicro_batch_size: 3\n",
        "4: batch_size: must be a multiple of micro_",
    ),
    good(
        "template",
        "chat_template: jinja\n",
        "line 4: chat_template: jinja needs chat_template_jinja",
    ),
    good(
        "template inside",
        "    chat_template: jinja\n",
        "4: datasets.0.chat_template: jinja needs chat",
    ),
    good(
        "endless stream", "streaming: true\n", "line 4: streaming: needs max_steps: a stream has no"
    ),
    good(
        "shards",
        "    shards: 2\n    shards_idx: 2\n",
        "5: datasets.0.shards_idx: must be less than sha",
    ),
    good(
        "names",
        "eval_strategy: no\nevaluation_strategy: no\n",
        "5: evaluation_strategy: is the old name",
    ),
    good(
        "again",
        "resume_from_checkpoint: true\n",
        "resume_from_checkpoint: set this or overwrite",
        "--overwrite",
    ),
    good(
        "part of all rows",
        "dataset_shard_num: 2\ndataset_shard_idx: 2\n",
        "5: dataset_shard_idx: must be less than dataset_shard_num",
    ),
    good("which part", "dataset_shard_idx: 1\n", "dataset_shard_idx: needs dataset_shard_num"),
    good(
        "type of rows",
        "    type: alpacca\n",
        "4: datasets.0.type: 'alpacca' is not a type of rows; did",
    ),
    good(
        "no such type",
        "    type: qwertz\n",
        "'qwertz' is not a type of rows; there are chat_template,",
    ),
    good(
        "part of steps",
        "save_steps: 1.5\n",
        "4: save_steps: must be a fraction below 1 or a number of",
    ),
]

UNAVAILABLE = [
    good("rl", "rl: ebft\n", "line 4: rl: ebft is not yet available: it samples and embeds with"),
    good(
        "expert parallelism",
        "expert_parallel_size: 2\n",
        "line 4: expert_parallel_size: 2 is not yet available: leave it out, and use fsdp_config",
    ),
    good(
        "context parallelism, by its older name",
        "sequence_parallel_degree: 2\n",
        "4: context_parallel_size: needs FSDP, which adds up what the parts of a sequence give",
    ),
    good(
        "context",
        "context_parallel_size: 2\n",
        "line 4: context_parallel_size: needs FSDP",
    ),
    good(
        "optimizer",
        "optimizer: muon\n",
        "4: optimizer: muon is not yet available: use adamw_torch_fu",
    ),
    good(
        "plugin",
        "plugins: [a.B]\n",
        "line 4: plugins: ['a.B'] is not yet available: plugins are not",
    ),
]


@pytest.mark.parametrize("case", [*TOGETHER, *UNAVAILABLE], ids=lambda case: case.name)
def test_keys_that_do_not_go_together(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(case, tmp_path)
