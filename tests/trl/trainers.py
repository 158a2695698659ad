"""One tiny run of each of TRL's trainers."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from ..models.zoo import FAMILIES, build

LLAMA = FAMILIES[0]
_WORDS = [f"w{i}" for i in range(200)]
_TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)


def tokenizer() -> tf.PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant"]
    vocabulary = {w: i for i, w in enumerate([*special, *_WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", chat_template=_TEMPLATE,
    )  # fmt: skip


def _text(seed: int, length: int) -> str:
    return " ".join(_WORDS[(seed * 31 + i * i * 7) % 200] for i in range(length))


def _rows(kind: str) -> Dataset:
    rows = []
    for i in range(8):
        prompt, good, bad = _text(i, 4), _text(i + 50, 5 + i % 3), _text(i + 90, 6)
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]
        rows.append({
            "text": {"text": f"{prompt} {good}"},
            "pairs": {"prompt": f"{prompt} ", "chosen": good, "rejected": bad},
            "labels": {"prompt": f"{prompt} ", "completion": good, "label": i % 2 == 0},
            "prompts": {"prompt": prompt},
            "chats": {"messages": chat},
            "scored": {"chosen": f"{prompt} {good}", "rejected": f"{prompt} {bad}"},
        }[kind])  # fmt: skip
    return Dataset.from_list(rows)


def _length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c.split()) % 5) + 0.1 * len(c) for c in completions]


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SFT": ("trl", "text", {"max_length": 32}),
    "DPO": ("trl", "pairs", {"max_length": 32}),
    "KTO": ("trl", "labels", {"max_length": 32}),
    "GRPO": ("trl", "prompts", {"max_completion_length": 6, "num_generations": 2, "beta": 0.1}),
    "RLOO": ("trl", "prompts", {"max_completion_length": 6, "num_generations": 2}),
    "Distillation": ("trl", "prompts", {"max_completion_length": 6}),
    "Reward": ("trl", "scored", {"max_length": 32}),
    "ORPO": ("trl.experimental.orpo", "pairs", {"max_length": 32}),
    "CPO": ("trl.experimental.cpo", "pairs", {"max_length": 32, "cpo_alpha": 0.5}),
    "SimPO": ("trl.experimental.cpo", "pairs",
              {"max_length": 32, "loss_type": "simpo", "cpo_alpha": 0.0}),
    "GKD": ("trl.experimental.gkd", "chats", {"max_length": 32, "lmbda": 0.0}),
}  # fmt: skip
"""Trainer -> (module, data, settings)."""


def model_for(kind: str, seed: int = 0) -> nn.Module:
    if kind != "Reward":
        return build(LLAMA, lora=False, seed=seed)
    torch.manual_seed(seed)
    config = build(LLAMA, lora=False).config
    config.num_labels = 1
    return tf.LlamaForSequenceClassification(config).train()


def trainer(
    kind: str, model: nn.Module, folder: Path, lora: bool, change: Callable[..., Any] = lambda m: m,
    **given: Any,
) -> Any:  # fmt: skip
    """A trainer, ready to run; ``change`` is applied to a reference model or teacher."""
    module, data, settings = KINDS[kind]
    library = importlib.import_module(module)
    name = "CPO" if kind == "SimPO" else kind
    settings = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4,
        "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "learning_rate": 1e-3, "gradient_checkpointing": False,
        **settings, **given,
    }  # fmt: skip
    others: dict[str, Any] = {}
    if kind in ("DPO", "KTO") and not lora:
        others["ref_model"] = change(model_for(kind))
    if kind in ("GKD", "Distillation"):
        others["teacher_model"] = change(model_for(kind, seed=1))
    if kind in ("GRPO", "RLOO"):
        others["reward_funcs"] = _length_reward
    if kind in ("GRPO", "RLOO") and not lora:
        settings["beta"] = 0.0
    if lora:
        task = {"task_type": "SEQ_CLS"} if kind == "Reward" else {}
        others["peft_config"] = LoraConfig(
            r=4, lora_alpha=8, target_modules=LLAMA.targets, init_lora_weights="gaussian", **task
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(library, f"{name}Trainer")(
            model=model, args=getattr(library, f"{name}Config")(**settings),
            train_dataset=_rows(data), processing_class=tokenizer(), **others,
        )  # fmt: skip


_TIMES = ("runtime", "per_second", "time", "flos", "epoch", "num_tokens")


def run(made: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train; returns what was logged, and the trained weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        made.train()
    logged = [
        {k: v for k, v in entry.items() if not any(t in k for t in _TIMES)}
        for entry in made.state.log_history
    ]
    trained = {n: p.detach() for n, p in made.model.named_parameters() if p.requires_grad}
    return logged, trained
