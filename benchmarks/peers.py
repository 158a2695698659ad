"""The peers that whole runs are compared with: each in an environment of its own.

    python -m benchmarks peers                  # make all of them
    python -m benchmarks peers unsloth axolotl

An environment is made by ``venv`` and ``pip`` from what is named here, with this Python, and kept
in ``$FUSEWRIGHT_PEERS``, or ``~/.cache/fusewright/peers``. What pip chose is in ``installed.txt``
there, and with every figure. Peers are run as their documentation says; none of their code is here.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training_job import TrainingJob


@dataclass(frozen=True)
class Peer:
    """One peer.

    Attributes:
        packages: what pip installs, besides PyTorch of this environment's version.
        train: trains a job in the peer's environment, taking its turns from a callback.
        about: how it trains.
        first: the module that it wants to be imported before all others.
        more: how many tokens of each row it trains beyond the answer and its end.
    """

    packages: tuple[str, ...]
    train: Callable[[TrainingJob, Any], None]
    about: str
    first: str = ""
    more: int = 0


def folder(name: str) -> Path:
    """The environment of a peer, whether it is there or not."""
    home = os.environ.get("FUSEWRIGHT_PEERS") or Path.home() / ".cache" / "fusewright" / "peers"
    return Path(home) / name


def python(name: str) -> str | None:
    """The interpreter of a peer's environment; None where it has not been made whole."""
    made = folder(name)
    return str(made / "bin" / "python") if (made / "installed.txt").exists() else None


def installed(name: str) -> list[str] | None:
    """What pip chose: the packages that decide figures, as ``name==version``."""
    if python(name) is None:
        return None
    lines = (folder(name) / "installed.txt").read_text("utf-8").splitlines()
    chosen = {"torch", "transformers", "peft", "trl", "accelerate", *PEERS[name].packages}
    return [line for line in lines if line.partition("==")[0].lower() in chosen]


def make(name: str, say: Callable[[str], None] = print) -> bool:
    """Make the environment of a peer; False, with pip's reason, where it cannot be installed."""
    import torch

    made = folder(name)
    shutil.rmtree(made, ignore_errors=True)
    venv.create(made, with_pip=True)
    pip = [str(made / "bin" / "python"), "-m", "pip"]
    # the same PyTorch where the peer takes it: else pip says which it wants
    wanted = [f"torch=={torch.__version__}", *PEERS[name].packages]
    say(f"{name}: pip install {' '.join(wanted)}")
    done = subprocess.run(
        [*pip, "install", "--quiet", *_index(torch.__version__), *wanted],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        say(f"{name}: not installed: {' '.join(reason) or done.stderr[-500:]}")
        return False
    listed = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True).stdout
    (made / "installed.txt").write_text(listed, "utf-8")
    say(f"{name}: installed in {made}")
    return True


def _index(version: str) -> list[str]:
    """Where PyTorch's own builds are, such as ``2.13.0+cpu``."""
    local = version.partition("+")[2]
    return ["--extra-index-url", f"https://download.pytorch.org/whl/{local}"] if local else []


def main(names: list[str]) -> int:
    """Make the environments; 0 when all could be made."""
    unknown = sorted(set(names) - set(PEERS))
    if unknown:
        print(f"unknown peer {unknown[0]!r}; known: {', '.join(PEERS)}", file=sys.stderr)
        return 2
    made = [make(name) for name in names or PEERS]
    return 0 if all(made) else 1


# --- how they train -------------------------------------------------------------------------------
# called in the peer's environment, where fusewright is not installed


def take_turns(turns: Any) -> None:
    """Give every Trainer that is made in this process the callback."""
    from transformers import Trainer

    original = Trainer.__init__

    @functools.wraps(original)  # ms-swift looks at its signature
    def made(trainer: Any, *args: Any, **kwargs: Any) -> None:
        original(trainer, *args, **kwargs)
        trainer.add_callback(turns)

    Trainer.__init__ = made  # type: ignore[method-assign]


def default_system(base: str) -> str:
    """What the model's template says where a chat begins without a system message."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    said = [{"role": "user", "content": "?"}]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", text, re.DOTALL)
    return found[1] if found else ""


def unsloth(job: TrainingJob, turns: Any) -> None:
    """``FastLanguageModel`` and TRL's ``SFTTrainer``, on the tokens that all train.

    On a CPU it turns packing off, so its batches are then the stock Trainer's.
    """
    import torch
    from datasets import Dataset
    from unsloth import FastLanguageModel

    from training_job import ALPHA, RANK, read_samples
    from trl import SFTConfig, SFTTrainer

    packs = torch.cuda.is_available()
    take_turns(turns)
    model, tokenizer = FastLanguageModel.from_pretrained(
        job.base, max_seq_length=job.sequence_len, dtype=getattr(torch, job.dtype),
        load_in_4bit=False,
    )  # fmt: skip
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=linear,
        use_gradient_checkpointing="unsloth", random_state=42,
    )  # fmt: skip
    from training_engines import arguments

    SFTTrainer(
        model=model,
        args=SFTConfig(
            **arguments(job), per_device_train_batch_size=job.packs if packs else job.batch,
            max_length=job.sequence_len, packing=packs,
        ),
        train_dataset=Dataset.from_dict(read_samples(job.samples)),
        processing_class=tokenizer,
    ).train()  # fmt: skip
    model.save_pretrained(job.output)


def llamafactory(job: TrainingJob, turns: Any) -> None:
    """``run_exp`` with ``neat_packing``, on the chats, in the template that the model brings."""
    import json

    from llamafactory.train.tuner import run_exp

    from training_engines import arguments
    from training_job import ALPHA, RANK

    home = Path(job.output).with_name("llamafactory-data")
    home.mkdir(parents=True, exist_ok=True)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user",
            "assistant_tag": "assistant", "system_tag": "system"}  # fmt: skip
    rows = {"file_name": job.rows, "formatting": "sharegpt", "tags": tags,
            "columns": {"messages": "messages"}}  # fmt: skip
    (home / "dataset_info.json").write_text(json.dumps({"rows": rows}), "utf-8")
    take_turns(turns)
    run_exp(
        arguments(job)
        | {
            "stage": "sft", "do_train": True, "model_name_or_path": job.base, "dataset": "rows",
            "dataset_dir": str(home), "cutoff_len": job.sequence_len,
            "packing": True, "neat_packing": True, "finetuning_type": "lora", "lora_rank": RANK,
            "lora_alpha": ALPHA, "lora_target": "all", "lora_dropout": 0.0,
            "per_device_train_batch_size": job.packs, "output_dir": job.output,
            "overwrite_output_dir": True, "save_strategy": "no",
        }
    )  # fmt: skip


def swift(job: TrainingJob, turns: Any) -> None:
    """``sft_main`` with ``packing``, on the chats; packing needs flash attention, and so a GPU."""
    import torch
    from swift import SftArguments, sft_main
    from transformers import AutoConfig

    from training_engines import arguments
    from training_job import ALPHA, RANK

    packs = torch.cuda.is_available()
    take_turns(turns)
    given = arguments(job) | {"save_strategy": "epoch"}  # behind the last step
    sft_main(
        SftArguments(
            **given, model=job.base, dataset=[job.rows], torch_dtype=job.dtype,
            model_type=AutoConfig.from_pretrained(job.base).model_type,  # several share a config
            tuner_type="lora", lora_rank=RANK, lora_alpha=ALPHA, lora_dropout=0.0,
            target_modules=["all-linear"], max_length=job.sequence_len, packing=packs,
            per_device_train_batch_size=job.packs if packs else job.batch, template="chatml",
            system=default_system(job.base), add_version=False, gradient_accumulation_steps=1,
        )
    )  # fmt: skip
    (saved,) = Path(job.output).rglob("checkpoint-*/adapter_config.json")
    shutil.copytree(saved.parent, job.output, dirs_exist_ok=True)


def axolotl(job: TrainingJob, turns: Any) -> None:
    """``do_train`` of a recipe with ``sample_packing``, the same that fusewright reads.

    Its own kernels, which it chooses by itself, run on a GPU alone.
    """
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"

    import torch
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.utils.dict import DictDefault

    from training_engines import recipe

    take_turns(turns)
    keys = recipe(job) | {"gradient_checkpointing": True, "optimizer": "adamw_torch_fused"}
    keys.pop("memory")
    if not torch.cuda.is_available():
        keys |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
    do_train(load_cfg(DictDefault(keys)), TrainerCliArgs())


PEERS = {
    "unsloth": Peer(
        ("unsloth",),
        unsloth,
        "its own code and checkpoints; on a CPU padded, on a GPU packed",
        first="unsloth",
    ),
    "llamafactory": Peer(
        ("llamafactory",),
        llamafactory,
        "neat_packing; it also trains the line break behind an answer",
        more=1,
    ),
    "swift": Peer(
        ("ms-swift",),
        swift,
        "on a CPU padded, on a GPU packed; it also trains the line break behind an answer",
        more=1,
    ),
    "axolotl": Peer(("axolotl",), axolotl, "sample_packing, gradient checkpointing"),
}
