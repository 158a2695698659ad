"""The commands for a trained model: ``eval``, ``generate``, ``chat``, ``merge``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RecipeError
from ..train.consent import Consent
from ..train.terminal import announce
from .switches import Builders, Code, Trust

if TYPE_CHECKING:
    from ..train.inference.run_folder import RunFolder

RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="An output_dir, a checkpoint-N in it, or a folder with a PEFT adapter or a model.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(help="The base model, if it is no longer where the folder says."),
]
Tokens = Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, help="Sampling temperature. Default: greedy decoding."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Sample from the most likely tokens of this total probability.",
    ),
]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample from this many most likely tokens.")]
Seed = Annotated[int, typer.Option(min=0, help="Random seed for sampling.")]
System = Annotated[
    str | None, typer.Option(help="The system prompt. Default: the run's default_system_message.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command("eval")(evaluate)
    for command in (generate, chat, merge):
        app.command()(command)


def evaluate(
    run: RunArgument,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A data file; can be repeated. Default: the run's validation rows."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    base_model: Base = None,
    trust_remote_code: Trust = False,
    allow_builders: Builders = False,
    allow_code: Code = False,
) -> None:
    """Compute the figures of validation on a run's validation rows, or on other data."""
    opened = _opened(run, base_model, Consent(trust_remote_code, allow_builders, allow_code))
    announce(f"loading {run}")
    from ..train.inference import evaluate as command  # slow to import

    command.evaluate(opened, data or [], as_json=as_json)


def generate(
    run: RunArgument,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads it from standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Prompts: .jsonl with prompt or messages, or one prompt per line."),
    ] = None,
    max_new_tokens: Tokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    system: System = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per answer.")] = False,
    base_model: Base = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer a prompt, or a file of prompts."""
    opened = _opened(run, base_model, Consent(trust_remote_code))
    from ..train.inference.prompt_files import read_prompt, read_prompts
    from ..train.model.chat_prompt import ChatPrompt, with_system

    if file is not None and prompt is not None:
        raise RecipeError("give a prompt or --file, not both")
    if system is None:
        system = ChatPrompt.of(opened.recipe).system
    if file is not None:
        asked = read_prompts(file, system)
    else:
        text = read_prompt(prompt, sys.stdin)
        asked = [with_system([{"role": "user", "content": text}], system)]
    announce(f"loading {run}")
    from ..train.inference import generate as command  # slow to import
    from ..train.inference.generation import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    command.generate(opened, asked, sampling, batch_size=batch_size, as_json=as_json)


def chat(
    run: RunArgument,
    max_new_tokens: Tokens = 1024,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    system: System = None,
    base_model: Base = None,
    trust_remote_code: Trust = False,
) -> None:
    """Chat with a run: in the terminal, or line by line over a pipe."""
    opened = _opened(run, base_model, Consent(trust_remote_code))
    announce(f"loading {run}")
    from ..train.inference import chat as command  # slow to import
    from ..train.inference.generation import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    command.chat(opened, sampling, system)


def merge(
    run: RunArgument,
    output: Annotated[
        Path | None, typer.Option(help="The new folder. Default: RUN/merged.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: what the run was trained in."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, e.g. 500MB.")] = "5GB",
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Dequantize the base (quantized, or of QLoRA) and merge into those weights.",
        ),
    ] = False,
    base_model: Base = None,
    trust_remote_code: Trust = False,
) -> None:
    """Merge the adapter into its base model, for plain transformers to load."""
    opened = _opened(run, base_model, Consent(trust_remote_code))
    announce("importing PyTorch and transformers")
    from ..train.merge import merge as command  # slow to import

    asked = command.MergeOptions(output, dtype, max_shard_size, dequantize)
    command.merge(opened, asked)


def _opened(folder: str, base_model: str | None, consent: Consent) -> RunFolder:
    from ..train.inference.run_folder import open_run

    return open_run(folder, base_model, consent)
