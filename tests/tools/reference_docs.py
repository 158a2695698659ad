"""Write docs/recipes.md: ``python -m tests.tools.reference_docs docs/recipes.md``."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from fusewright.train.recipe.deepspeed_config import built_in_names
from fusewright.train.recipe.keys.adapter import LoftQ, PeftKeys
from fusewright.train.recipe.keys.base import Keys, UnreadKeys, extra_of, nested
from fusewright.train.recipe.keys.dataset import Dataset, PretrainingDataset, PromptFormat
from fusewright.train.recipe.keys.distributed import ContextParallelKeys, FsdpKeys
from fusewright.train.recipe.keys.model import SpecialTokens
from fusewright.train.recipe.keys.optimization import LrGroupKeys
from fusewright.train.recipe.keys.output import DynamicCheckpointKeys
from fusewright.train.recipe.keys.precision import QatKeys
from fusewright.train.recipe.keys.preferences import TrlKeys, VllmKeys
from fusewright.train.recipe.keys.row_types import TEACHER_TYPES, TYPES, preference_types
from fusewright.train.recipe.recipe import GROUPS, Recipe

_INTRODUCTION = """\
# Recipes

<!-- Written by `python -m tests.tools.reference_docs docs/recipes.md`. Change the docstrings of the
     keys in src/train/recipe/keys/, its unread_keys.txt, or the introduction in
     tests/tools/reference_docs.py, and run it again. -->

A recipe is a YAML file that says what to train on what, and how:

```yaml
base_model: Qwen/Qwen3-0.6B
adapter: lora
lora_target_linear: true
datasets:
  - path: rows.jsonl          # one {{"messages": [...]}} a line
val_set_size: 0.05
sample_packing: true
learning_rate: 2e-4
```

    fusewright train recipe.yaml

`examples/` has recipes for several families of models.

## How a recipe is read

- Only `base_model` and `datasets` (or `pretraining_dataset`) are required. Every other key has
  the default below.
- A key without a value, or with `null`, is unset: it has its default.
- An unknown key is an error, which suggests the nearest name if there is one. All problems of a
  file are listed at once, each with its line, before anything is loaded or written.
- Paths are looked up next to the recipe, then in the current folder. `output_dir` and
  `dataset_prepared_path` are relative to the current folder. A dataset `path` that is found in
  neither is an id on the Hugging Face hub, unless it looks like a file.
- `2e-4` is a number. YAML anchors work; a duplicate key is an error.

## Keys on the command line

Any key can be set on the command line, where it takes precedence over the file. Dashes and
underscores are the same. Values are read as YAML, and dots reach into nested keys:

    fusewright train recipe.yaml --learning_rate 1e-4 --lora_r=32 --datasets.0.path other.jsonl
    fusewright train recipe.yaml --load_in_4bit --no-sample_packing

## Recipes and models that you do not trust

A recipe, a dataset, a checkpoint and the folder of a run are data: no code in them is executed,
whatever they say. Only you can allow that, on the command line:

- `--trust-remote-code`: the Python code that comes with a model or its tokenizer, pickled weights
  that contain more than tensors, attention kernels from the hub. All commands that load a model
  have it.
- `--allow-builders`: the Python files that datasets name as `builder` (`train`, `preprocess`,
  `eval`).
- `--allow-code`: the Python functions that a recipe names in `trl.reward_funcs`, or as the `type`
  of rows of preferences (`train`, `preprocess`, `eval`; `verify` does not train such recipes).
- `--allow-image-urls`: the addresses that rows, and prompts, name as images (all commands that
  read images). This downloads, and runs no code.

Without the switch, the command stops and names it. `trust_remote_code: true` in a recipe is not
enough: if transformers has a class for the model, that class is used. From Python, call
`train(recipe, trust_remote_code=True)`; the key in a recipe passed as a mapping is not enough,
either. Other pickles (such as a checkpoint's) are read as tensors and numbers only, YAML creates
no objects, and chat templates run in Jinja's sandbox.

## The status of a key

    fusewright train recipe.yaml --dry-run

says whether the recipe is refused, whether it fits and how long a step takes, then lists the keys
that do not simply do what they say. With `--verbose`, all keys follow with line, value and status,
and the whole recipe with its defaults. It loads no weights, reads no rows and writes nothing. A key
is

- **honoured**: it does what it says;
- **subsumed**: something else already has its effect;
- **not applicable**: it has no effect here, for the reason given;
- **not yet available**: it would change the run in a way that is not implemented. `train` refuses
  such a recipe;
- or unknown, which is an error.

Training prints one line about the keys that were subsumed or not applicable. `fusewright schema`
prints this page as a JSON schema. For completion in an editor, save it (`fusewright schema >
recipe.schema.json`) and put `# yaml-language-server: $schema=recipe.schema.json` at the top of a
recipe.

## Several processes

Several processes train with DDP, unless a key shards the model:

- `deepspeed`: ZeRO, with a configuration from a JSON file or as keys and values, where `auto` is
  what the recipe says. The files in `deepspeed_configs/` that Axolotl's recipes name need not be
  there. Without them, fusewright's own configurations of the same names are used, which have the
  same stage and offload the same: {deepspeed}. A section `optimizer`, `scheduler` or `amp` is
  refused: the recipe has keys for those. Adapters over bf16 are trained in 32 bits, as they are by
  one process.
- `fsdp: true`, or any key in `fsdp_config`: FSDP2. Recipes that were written for FSDP1 run on it:

{fsdp}

`dp_shard_size` is the number of processes that share one copy of the weights, and
`dp_replicate_size` the number of copies. `tensor_parallel_size` processes share each layer, and
`context_parallel_size` each sequence; with FSDP, there may be several such groups. The number of
processes is the product of all four. With `load_in_4bit`, weights that FSDP or ZeRO-3 shards
are stored in the dtype of computation, unless `bnb_config_kwargs` has `bnb_4bit_quant_storage`.

## Coming from Axolotl

The keys, their types and their defaults are Axolotl's, and older names of keys work, too. Most of
its current example recipes for text are accepted as they are, and most of these have run on small
stand-ins of their checkpoints: [axolotl.md](axolotl.md). Start with `--dry-run`. The differences:

- Unknown keys are errors. Axolotl ignores them.
- Kernels and patches (`liger_*`, `lora_*_kernel`, `unsloth_*`, `cut_cross_entropy`,
  `torch_compile`, `flash_attention`) are subsumed: the compiler does their work on any model, and
  `fusewright explain` shows what it did.
- Without `save_steps` or `saves_per_epoch` a run that is not stopped has no checkpoints, only the
  result. Validation always runs before and after training.
- FSDP is always FSDP2. Recipes for FSDP1 run on it, [too](#several-processes).
- Tensor parallelism is that of transformers. Context parallelism is torch's ring attention or, with
  `sample_packing` and on CPUs, keys and values that are gathered for each layer
  ([scale.md](scale.md)).
- With `sample_packing`, a sample starts anew in recurrent layers, too (Mamba, Mamba-2, gated delta
  rule, short convolutions): that is what `optimize` does ([optimize.md](optimize.md)). A model with
  layers that cannot do so (RWKV, MiniMax, RecurrentGemma) is refused when it is loaded, by the name
  of the layer. The plain model cannot pack recurrent layers: the plain ways of `fusewright verify`
  train the samples of the packs one by one.
- `expert_parallel_size` shards experts with FSDP2. Plugins are not loaded. Those that a
  key or the compiler replaces are subsumed, and the others are refused. For preference methods
  (`rl`), see [preferences.md](preferences.md).
- A checkpoint with towers for images or sound (`Qwen3_5ForConditionalGeneration`, say) is loaded as
  the class that its configuration names. Its language model is trained, on text or on
  [images](images.md), with LoRA on its layers only; regular expressions in `lora_target_modules`
  mean them in whatever class's names. Towers are frozen (`freeze_mm_modules`), and
  `language_model_only` does not load them.
- `optimize`, `codegen`, `memory`, `cuda_graphs`, `strict`, `verbose`, `sample_prompt`,
  `sample_image` and a dataset's `builder` are fusewright's own. `strict` means that every known
  formula must be rewritten.

There are {number} keys, including those of datasets.
"""

_FSDP1 = {
    "`fsdp: [full_shard, auto_wrap]`, `sharding_strategy: FULL_SHARD`": (
        "`reshard_after_forward: true`, which is the default"
    ),
    "`fsdp: [shard_grad_op]`, `sharding_strategy: SHARD_GRAD_OP`": "`reshard_after_forward: false`",
    "`HYBRID_SHARD`, `HYBRID_SHARD_ZERO2`": "the same two, with `dp_replicate_size`",
    "`NO_SHARD`": "DDP",
    "`fsdp: [offload]`": "`offload_params: true`",
    "`fsdp_NAME`, in `fsdp_config` or outside": "`NAME` in `fsdp_config`",
    "`use_orig_params`, `limit_all_gathers`, `sync_module_states`, `backward_prefetch`, "
    "`forward_prefetch`": "subsumed",
}
"""What recipes for FSDP1 say, and what it is in FSDP2."""

_GROUPS = {
    "ModelKeys": "Model and tokenizer",
    "PrecisionKeys": "Precision and quantization",
    "AttentionKeys": "Attention and memory",
    "AdapterKeys": "Adapters",
    "DataKeys": "Data",
    "ImageKeys": "Images",
    "OptimizationKeys": "Optimization",
    "OutputKeys": "Output",
    "TrackingKeys": "Trackers",
    "FusewrightKeys": "Fusewright's own",
    "SubsumedKeys": "Other engines' speed-ups",
    "DistributedKeys": "Several devices",
    "PreferenceKeys": "Preferences and rewards",
    "DistillationKeys": "Distillation",
    "MethodKeys": "Other methods",
    "PluginKeys": "Axolotl's plugins",
    "CloudKeys": "Axolotl's cloud services",
}

_INNER: dict[type[Keys], str] = {
    Dataset: "An entry of `datasets` or `test_datasets`",
    PretrainingDataset: "An entry of `pretraining_dataset`: the same keys, and these",
    PromptFormat: "A `type` written as keys",
    SpecialTokens: "`special_tokens`",
    QatKeys: "`qat`",
    PeftKeys: "`peft`",
    LoftQ: "`peft.loftq_config`",
    LrGroupKeys: "An entry of `lr_groups`",
    DynamicCheckpointKeys: "`dynamic_checkpoint`",
    ContextParallelKeys: "`context_parallel`",
    TrlKeys: "`trl`",
    VllmKeys: "`vllm`",
    FsdpKeys: "`fsdp_config`; older names of its keys begin with `fsdp_`",
}

_FEW = 9
"""More values than this stand below the table."""

_BELOW = "a name, see below"
"""The type of such a value."""


def page() -> str:
    """The whole page as Markdown."""
    number = sum(len(model.model_fields) for model in (Recipe, Dataset))
    names = ", ".join(f"`{name}`" for name in built_in_names())
    rows = [f"| {old} | {new} |" for old, new in {"FSDP1": "FSDP2", "---": "---", **_FSDP1}.items()]
    parts = [_INTRODUCTION.format(number=number, deepspeed=names, fsdp="\n".join(rows))]
    for group in GROUPS:
        own = {k: f for k, f in group.model_fields.items() if k in group.__annotations__}
        parts.append(_section(f"## {_GROUPS[group.__name__]}", own))
    for model, title in _INNER.items():
        own = {k: f for k, f in model.model_fields.items() if k in model.__annotations__}
        parts.append(_section(f"## {title}", own))
    parts += [_types_of_rows(), _whole_groups()]
    return "\n".join(parts)


def _types_of_rows() -> str:
    """The names that the ``type`` of a dataset may have."""
    lines = ["## Types of rows", "", "| rows | `type` |", "|---|---|"]
    kinds = {
        "of supervised training": TYPES,
        "of distillation": TEACHER_TYPES,
        "of preferences, pairs": preference_types("pairs"),
        "of preferences, labelled answers": preference_types("labelled"),
        "of rewards, prompts": preference_types("prompts"),
        "of steps": preference_types("steps"),
    }
    for rows, names in kinds.items():
        lines.append(f"| {rows} | {', '.join(f'`{name}`' for name in names)} |")
    below = "One row of each common type: [training.md](training.md#one-row-of-each-common-type)."
    return "\n".join([*lines, "", below, ""])


def _whole_groups() -> str:
    """The groups that nothing reads, with the names that are taken in each."""
    lines = ["## Groups with one status as a whole", "", "| group | status | its keys |",
             "|---|---|---|"]  # fmt: skip
    for dotted, field, inner in _unread(Recipe, ""):
        names = ", ".join(f"`{name}`" for name in inner.model_fields)
        lines.append(f"| `{dotted}` | {_status(field)} | {names} |")
    return "\n".join([*lines, ""])


def _unread(model: type[Keys], prefix: str) -> Iterator[tuple[str, FieldInfo, type[Keys]]]:
    """The groups of a class that nothing reads, and those inside of them."""
    for name, field in model.model_fields.items():
        inner = nested(field.annotation)
        if inner is not None and issubclass(inner, UnreadKeys):
            yield prefix + name, field, inner
            yield from _unread(inner, f"{prefix}{name}.")


def _section(title: str, fields: dict[str, FieldInfo]) -> str:
    lines = [title, "", "| key | type | default | meaning | status |", "|---|---|---|---|---|"]
    below = []
    for name, field in fields.items():
        kind = " or ".join(dict.fromkeys(_kinds(field.annotation)))
        kind = kind.replace(f"list of {_BELOW} or {_BELOW}", "a name or a list of names, see below")
        default = _default(field)
        meaning = " ".join((field.description or "").split()).replace("``", "`")
        cells = [f"`{name}`", kind, default, meaning, _status(field)]
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        below += [
            f"`{name}`: {', '.join(f'`{v}`' for v in values)}."
            for values in dict.fromkeys(_literals(field.annotation))
            if len(values) > _FEW
        ]
    return "\n".join([*lines, "", *(f"{text}\n" for text in below)])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    value = field.get_default(call_default_factory=True)
    return "" if value in (None, [], {}) else f"`{json.dumps(value)}`"


def _status(field: FieldInfo) -> str:
    extra = extra_of(field)
    said = [_with(extra.get("status", "honoured"), extra.get("note"))]
    for special in extra.get("values", ()):
        value = json.dumps(special["value"]).strip('"')
        said.append(f"`{value}`: {_with(special['status'], special['note'])}")
    if old := extra.get("aliases"):
        said.append("older names: " + ", ".join(f"`{name}`" for name in old))
    return "; ".join(said)


def _with(status: str, note: str | None) -> str:
    return f"{status} ({note})" if note else status


def _literals(kind: Any) -> Iterator[tuple[Any, ...]]:
    if get_origin(kind) is Literal:
        yield get_args(kind)
    else:
        for inner in get_args(kind):
            yield from _literals(inner)


_NAMES = {
    str: "text", SecretStr: "text", int: "whole number", float: "number", bool: "true/false",
    Any: "any value",
}  # fmt: skip


def _kinds(kind: Any) -> Iterator[str]:
    """The types of a value in words, one for each branch of a union."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for inner in arguments:
            if inner is not type(None):
                yield from _kinds(inner)
    elif origin is Annotated:
        yield from _kinds(arguments[0])
    elif origin is Literal:
        few = len(arguments) <= _FEW
        yield ", ".join(f"`{value}`" for value in arguments) if few else _BELOW
    elif origin is list:
        yield f"list of {' or '.join(_kinds(arguments[0]))}"
    elif origin is tuple:
        yield "pair"
    elif origin is dict or (isinstance(kind, type) and issubclass(kind, Keys)):
        yield "keys and values"
    else:
        yield _NAMES[kind]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
