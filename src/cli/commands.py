"""The commands other than ``train``. Each imports what it needs when it runs."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RecipeError
from ..train.consent import Consent
from ..train.terminal import Terminal, announce, say

if TYPE_CHECKING:
    from ..train.data.images.picture import Gallery
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


Images = Annotated[
    list[str] | None,
    typer.Option("--image", help="An image that the prompt is about; can be repeated."),
]


def evaluate(
    run: RunArgument,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A data file; can be repeated. Default: the run's validation rows."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness instead: arc_easy,hellaswag."),
    ] = None,
    include_path: Annotated[
        list[Path] | None,
        typer.Option(help="A folder with task files of your own; can be repeated."),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(min=0, help="Documents of each task; below 1: that share of them."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Solved examples in each prompt. Default: the task's.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="For tasks: a number, or auto.")] = "8",
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Write the tasks' prompts as chats.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    base_model: Base = None,
    trust_remote_code: Trust = False,
    allow_builders: Builders = False,
    allow_code: Code = False,
    allow_image_urls: Urls = False,
) -> None:
    """Compute the figures of validation on a run's validation rows, or on other data or tasks."""
    consent = Consent(trust_remote_code, allow_builders, allow_code, allow_image_urls)
    opened = _opened(run, base_model, consent)
    if tasks is not None:
        if data:
            raise RecipeError("eval: --data has rows and --tasks tasks: give one of them")
        from ..train.inference import harness  # slow to import

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        options = harness.TaskOptions(
            names, include_path or [], limit, num_fewshot, batch_size, apply_chat_template
        )
        harness.evaluate_tasks(opened, options, as_json=as_json)
        return
    if include_path or limit is not None or num_fewshot is not None or apply_chat_template:
        raise RecipeError("eval: name the tasks, too: --tasks TASK,TASK")
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
        typer.Option(
            help="Prompts: .jsonl with prompt or messages, with or without images, or one prompt "
            "per line."
        ),
    ] = None,
    image: Images = None,
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
    allow_image_urls: Urls = False,
) -> None:
    """Answer a prompt, or a file of prompts."""
    opened = _opened(run, base_model, Consent(trust_remote_code, allow_image_urls=allow_image_urls))
    from ..train.inference.prompts import read_prompt, read_prompts, user_message
    from ..train.model.tokenizer import ChatPrompt, with_system

    if file is not None and (prompt is not None or image):
        raise RecipeError(
            "give a prompt or --file, not both" if prompt is not None
            else "--image goes with a prompt: rows of --file name their own images"
        )  # fmt: skip
    if system is None:
        system = ChatPrompt.of(opened.recipe).system
    with _gallery(allow_image_urls) as gallery:
        if file is not None:
            chats = read_prompts(file, system, replace(gallery, folder=file.parent))
        else:
            text = read_prompt(prompt, sys.stdin)
            shown = [gallery.picture(path, "--image").path for path in image or []]
            chats = [with_system([user_message(text, shown)], system)]
        announce(f"loading {run}")
        from ..train.inference import generate as command  # slow to import
        from ..train.inference.generate import Sampling

        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
        command.generate(opened, chats, sampling, batch_size=batch_size, as_json=as_json)


@contextlib.contextmanager
def _gallery(may_download: bool) -> Iterator[Gallery]:
    """Opens the images of prompts; copies of what is no file are there as long as the block."""
    from ..train.data.images.picture import Gallery

    with tempfile.TemporaryDirectory(prefix="fusewright-images-") as copies:
        yield Gallery(None, Path(copies), may_download=may_download)


def chat(
    run: RunArgument,
    image: Images = None,
    max_new_tokens: Tokens = 1024,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    system: System = None,
    base_model: Base = None,
    trust_remote_code: Trust = False,
    allow_image_urls: Urls = False,
) -> None:
    """Chat with a run: in the terminal, or line by line over a pipe."""
    opened = _opened(run, base_model, Consent(trust_remote_code, allow_image_urls=allow_image_urls))
    with _gallery(allow_image_urls) as gallery:
        shown = [gallery.picture(path, "--image").path for path in image or []]
        announce(f"loading {run}")
        from ..train.inference import generate as command  # slow to import
        from ..train.inference.generate import Sampling

        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
        command.chat(opened, sampling, system, shown)


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
    from ..train import merge as command  # slow to import
    from ..train.serve import vllm_line

    options = command.MergeOptions(output, dtype, max_shard_size, dequantize)
    merged = command.merge(opened, options)
    console = Terminal(highlight=False)
    if opened.adapter:
        asked = ["fusewright", "export", str(run), "--format", "merged"]
        # an export has one name of each, and ``merge`` has checked this one
        asked += ["-q", str(command.DTYPES[dtype]).removeprefix("torch.")] if dtype else []
        asked += ["--dequantize"] if dequantize else []
        say(console, f"a certificate of what rounding left of the training: {shlex.join(asked)}")
    if (line := vllm_line(merged, opened.consent)) is not None:
        say(console, line)


def serve(
    context: typer.Context,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="As for the other commands, or a GGUF file.")
    ],
    server: Annotated[
        str | None, typer.Option(help="vllm or llama.cpp. Default: one that is installed.")
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Serve the adapter on its base, instead of merging it.")
    ] = False,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests. Default: the folder's.")
    ] = None,
    base_model: Base = None,
    trust_remote_code: Trust = False,
) -> None:
    """Serve a run by vLLM or llama.cpp, merging it first."""
    announce("importing PyTorch and transformers")
    from ..train import serve as command  # slow to import

    options = command.ServeOptions(server, lora, host, port, name, context.args)
    command.serve(run, base_model, Consent(trust_remote_code), options)


def export(
    run: RunArgument,
    kind: Annotated[
        str,
        typer.Option("--format", help="merged, gguf, compressed-tensors or ollama."),
    ],
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization",
            "-q",
            help="gguf, ollama: f16, bf16, q8_0 (default), q4_k_m and so on. compressed-tensors: "
            "fp8 (default), int4, nvfp4, mxfp4 and so on. merged: bfloat16, float16, float32.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The new folder. Default: RUN/export-QUANTIZATION.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Rows to judge the export on; can be repeated. Default: the run's."),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="A folder with llama.cpp. Default: FUSEWRIGHT_LLAMA_CPP, or PATH."),
    ] = None,
    create: Annotated[
        str | None, typer.Option(help="Run ollama create with this name, if it is installed.")
    ] = None,
    certificate: Annotated[
        bool, typer.Option(help="Read the export back and compare it with what was trained.")
    ] = True,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, e.g. 500MB.")] = "5GB",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="As for fusewright merge.")
    ] = False,
    base_model: Base = None,
    trust_remote_code: Trust = False,
    allow_builders: Builders = False,
    allow_code: Code = False,
    allow_image_urls: Urls = False,
) -> None:
    """Write a run for other engines, read it back, and certify what survived.

    The exit code is 1 if a tensor is wrong, or more was lost than the format costs the base.
    """
    consent = Consent(trust_remote_code, allow_builders, allow_code, allow_image_urls)
    opened = _opened(run, base_model, consent)
    from ..train.export.options import ExportOptions, choose

    options = ExportOptions(
        kind, quantization, output, tuple(data or ()), llama_cpp, create, certificate,
        max_shard_size, dequantize,
    )  # fmt: skip
    choice = choose(opened, options)  # errors are raised now
    announce("importing PyTorch and transformers")
    from ..train.export import command  # slow to import

    audit = command.export(opened, choice).certificate
    raise typer.Exit(int(audit is not None and not audit.passed))


def _opened(folder: str, base_model: str | None, consent: Consent) -> RunFolder:
    from ..train.inference.run_folder import open_run

    return open_run(folder, base_model, consent)


# ``fusewright preprocess``: prepare the rows of a recipe before a run, and look at them.


def preprocess(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            "--show",
            help="Show samples token by token; trained tokens are green and marked ▸.",
        ),
    ] = False,
    debug_num_examples: Annotated[int, typer.Option(min=1, help="Number of samples to show.")] = 5,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Read only this many rows of each dataset; cache nothing."),
    ] = None,
    trust_remote_code: Trust = False,
    allow_builders: Builders = False,
    allow_code: Code = False,
    allow_image_urls: Urls = False,
) -> None:
    """Read, tokenize and mask the data of a recipe, and cache it for later runs."""
    from ..train.consent import Consent

    consent = Consent(trust_remote_code, allow_builders, allow_code, allow_image_urls)
    _preprocess(recipe, context.args, debug_num_examples if debug else 0, limit, consent)


def _preprocess(
    name: str, arguments: list[str], examples: int, limit: int | None, consent: Consent
) -> None:
    from ..train.recipe.load import load_recipe
    from ..train.recipe.overrides import parse_overrides
    from ..train.recipe.paths import DATA

    recipe = load_recipe(name, parse_overrides(arguments), consent, DATA)

    announce("importing PyTorch and transformers")
    from ..train.data import prepare  # slow to import: only for a recipe that is right
    from ..train.data.images.reading import featurizer_of
    from ..train.data.preview import first, show, summary
    from ..train.model.load import quiet
    from ..train.model.processor import load_processing

    console = Terminal()
    with quiet():
        processing = load_processing(recipe)
        prepared = prepare(recipe, processing, console, keep=limit is None, limit=limit)
    summary(prepared, console)
    if examples:
        featurizer = featurizer_of(recipe, processing)
        show(first(prepared, examples), processing.tokenizer, console, featurizer)


# ``fusewright doctor``: what this machine has for training, and what mends each gap.


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print what is found as JSON.")] = False,
) -> None:
    """Check versions, devices, compilers and libraries, and say what mends each gap."""
    from ..train.doctor.report import run

    raise typer.Exit(run(as_json))


# ``fusewright init``: a starter recipe for somebody's rows.


def init(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Files, folders, ids of datasets on the hub, or whatever else path may be in a "
            "recipe; each becomes an entry of datasets.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="What base_model may be. Default: a small model."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="What training may use, such as 24GB. Default: what is free here."),
    ] = None,
    images_dir: Annotated[
        str | None,
        typer.Option(
            help="The folder where relative paths of images begin. Default: that of DATA."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The file to write. Default: standard output.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of --output.")
    ] = False,
) -> None:
    """Look at rows, and write a commented recipe for them."""
    announce("importing PyTorch and transformers")
    from ..train.starter.init import InitOptions, run  # slow to import

    run(InitOptions(data, model, memory, output, overwrite, images_dir))


# ``fusewright plan``: what a recipe will take, before a machine is rented.


def plan(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    gpus: Annotated[
        str | None,
        typer.Option(
            help="What the run gets: 8xH100, 8x80GB, 24GB. Default: what this machine has."
        ),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Number of processes on this machine.")
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            help="A card of your own: name=X,memory=48,tflops=100,bandwidth=900,link=50,network=12 "
            "(GB, TFLOP/s, GB/s)."
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Compare full fine-tuning, LoRA and QLoRA, shared in each way."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    trust_remote_code: Trust = False,
    allow_image_urls: Urls = False,
) -> None:
    """Say what a recipe will take: memory by part, time, network, and the smallest that fits."""
    from ..train.consent import Consent

    consent = Consent(trust_remote_code, allow_image_urls=allow_image_urls)
    _plan(recipe, context.args, consent, gpus, nproc, card, compare, as_json)


def _plan(
    name: str,
    arguments: list[str],
    consent: Consent,
    gpus: str | None,
    nproc: int | None,
    card: str | None,
    compare: bool,
    as_json: bool,
) -> None:
    from ..train.plan.cards import parse_card, parse_devices
    from ..train.recipe.load import check
    from ..train.recipe.overrides import parse_overrides

    custom_card = parse_card(card) if card else None
    text = gpus or (f"1x{custom_card.name}" if custom_card else None)
    devices = parse_devices(text, custom_card) if text else None
    checked = check(name, parse_overrides(arguments), consent, with_data=False)

    announce("importing PyTorch and transformers")
    from ..train.plan.plan import make_plan  # slow to import

    announce("counting a training step on tensors without contents")
    result = make_plan(checked.recipe, devices, nproc, compare=compare)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2, default=str))
        return
    from ..train.plan.page import show

    show(result, Terminal(highlight=False))


# ``fusewright verify``: prove on a recipe's own data that the optimized engine trains the same.


def verify(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps that each way trains.")] = 5,
    processes: Annotated[
        int,
        typer.Option(
            "--processes", "--nproc", min=1, help="Processes to compare with one; 1 leaves it out."
        ),
    ] = 2,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the scratch folder, and say where it is.")
    ] = False,
    trust_remote_code: Trust = False,
    allow_builders: Builders = False,
    allow_code: Code = False,
    allow_image_urls: Urls = False,
) -> None:
    """Train a few steps of a recipe in several ways, and compare losses and gradients.

    Eager and optimized, packed and unpacked, accumulated and not, one process and several.
    """
    from ..train.consent import Consent
    from ..train.processes.launchers import placement
    from ..train.recipe.load import load_recipe
    from ..train.recipe.overrides import parse_overrides

    if recipe.startswith("--"):
        raise RecipeError(f"verify: name the recipe first: fusewright verify RECIPE.yaml {recipe}")
    consent = Consent(trust_remote_code, allow_builders, allow_code, allow_image_urls)
    checked = load_recipe(recipe, parse_overrides(context.args), consent)
    if placement(os.environ).size > 1:
        raise RecipeError(
            "verify: it starts its own processes; run it without torchrun, and give --processes"
        )
    if json is not None and not json.resolve().parent.is_dir():
        raise RecipeError(f"--json: the folder {json.parent} does not exist; make it first")
    announce("importing PyTorch and transformers")
    from ..train.proof import command  # slow to import: only for a recipe that is right

    options = command.VerifyOptions(recipe, steps, processes, json, keep)
    raise typer.Exit(command.verify(checked, options))


# ``fusewright audit``: judge one step of a recipe, a run or a script.


def audit(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="A recipe, the output_dir of a run, or SCRIPT.py:FUNCTION, which is run and "
            "returns a model and its batches."
        ),
    ],
    tokens: Annotated[
        int, typer.Option(min=16, help="About so many tokens are compared with the plain model.")
    ] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print the audit as JSON.")] = False,
    trust_remote_code: Trust = False,
    allow_builders: Builders = False,
    allow_code: Code = False,
    allow_image_urls: Urls = False,
) -> None:
    """Judge one training step: gradients, loss, tokens, adapters, packs, against the plain model.

    Whoever has built the model: patched by another engine, optimized by this one, or nobody.
    """
    from ..train.consent import Consent

    consent = Consent(trust_remote_code, allow_builders, allow_code, allow_image_urls)
    if ".py:" in source:
        checked = None
    elif Path(source).suffix in (".yaml", ".yml"):
        from ..train.recipe.load import load_recipe
        from ..train.recipe.overrides import parse_overrides

        checked = load_recipe(source, parse_overrides(context.args), consent)
    elif Path(source).is_dir():
        checked = None
    else:
        raise RecipeError(
            f"audit: {source} is neither a recipe (.yaml), nor a folder, nor SCRIPT.py:FUNCTION"
        )
    if checked is None and context.args:
        raise RecipeError(f"audit: {context.args[0]}: keys are set with a recipe alone")
    announce("importing PyTorch and transformers")
    from ..train.proof import audit as command  # slow to import

    if checked is not None:
        result = command.of_recipe(checked, tokens)
    elif ".py:" in source:
        result = command.of_function(source, tokens)
    else:
        result = command.of_run(Path(source), consent, tokens)
    raise typer.Exit(command.show(result, as_json))


# The switches that several commands have: the caller's permission to run code.


Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. Recipes and folders cannot allow it.",
    ),
]
Code = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Run the Python functions that the recipe names, as rewards or as types of rows. "
        "Recipes cannot allow it.",
    ),
]
Urls = Annotated[
    bool,
    typer.Option(
        "--allow-image-urls",
        help="Download the images that rows name by an address. Recipes cannot allow it.",
    ),
]
Builders = Annotated[
    bool,
    typer.Option(
        "--allow-builders",
        help="Run the Python files that datasets name as builder. Recipes cannot allow it.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``, in the order in which ``--help`` lists them."""
    keys: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
    any_key = "Any key of the recipe can also be set here: --sequence_len"
    app.command(context_settings=keys, epilog=f"{any_key} 8192")(plan)
    app.command(context_settings=keys, epilog=f"{any_key} 2048")(preprocess)
    app.command("eval")(evaluate)
    for command in (generate, chat, merge, export):
        app.command()(command)
    app.command(
        context_settings={"allow_extra_args": True},
        epilog="What follows -- is passed on: fusewright serve RUN -- --max-model-len 4096",
    )(serve)
    endings = "Exit code 0: all ways passed; 1: one failed; 2: the recipe cannot be used."
    app.command(context_settings=keys, epilog=f"{any_key} 256. {endings}")(verify)
    endings = "Exit code 0: nothing is wrong; 1: something is; 2: it cannot be audited."
    app.command(context_settings=keys, epilog=endings)(audit)
    app.command()(doctor)
    app.command()(init)
