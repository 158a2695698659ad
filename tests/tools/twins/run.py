"""Runs a recipe on a twin of its checkpoint, and loads what it saves with transformers and PEFT."""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn

from fusewright.errors import FusewrightError
from fusewright.train.model.merge_aware import stop_rounding
from fusewright.train.recipe.load import load_recipe

from .checkpoint import class_named, kind_of, make_checkpoint, make_tokenizer
from .image_checkpoint import inputs_with_image, make_image_checkpoint
from .rows import COUNT, rows_of, write_rows

Values = dict[str, Any]
Inputs = Mapping[str, Tensor]

STEPS, LENGTH = 2, 256
SMALL_GROUP = 32
"""The largest group that rows of a twin's weights can be divided into."""

LAUNCH = (
    "deepspeed", "fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type",
    "dp_shard_size", "dp_replicate_size", "tensor_parallel_size", "context_parallel_size",
    "expert_parallel_size", "use_ray", "ray_num_workers",
)  # fmt: skip
TRACKERS = (
    "wandb", "use_wandb", "trackio", "swanlab", "use_swanlab", "mlflow", "use_mlflow", "comet",
    "use_comet", "use_tensorboard", "use_otel", "otel",
)  # fmt: skip
PUSHES = ("hub_model_id", "hub_strategy", "push_dataset_to_hub", "hf_use_auth_token")
PACKAGES = {
    "adamw_torch_8bit": "torchao", "adamw_torch_4bit": "torchao", "adamw_8bit": "bitsandbytes",
    "adamw_bnb_8bit": "bitsandbytes", "paged_adamw_8bit": "bitsandbytes",
    "paged_adamw_32bit": "bitsandbytes",
}  # fmt: skip


@dataclass(frozen=True)
class Override:
    """Something that a twin's recipe has differently.

    Attributes:
        name: what the table's column says; empty: every recipe has it.
        text: what the table's header says.
        change: applies it; returns whether the recipe is another one now.
    """

    name: str
    text: str
    change: Callable[[Values, Path], bool]


def _model(values: Values, folder: Path) -> bool:
    values["base_model"] = str(folder / "base")
    for key in ("base_model_config", "tokenizer_config", "revision_of_model"):
        values.pop(key, None)
    return True


def _rows(values: Values, folder: Path) -> bool:
    number = 0
    for key in ("datasets", "test_datasets", "pretraining_dataset"):
        for dataset in datasets_of(values, key):
            file = write_rows(rows_of(dataset), folder / f"rows-{number}")
            for choice in ("name", "split", "data_files", "revision", "data_dir"):
                dataset.pop(choice, None)
            dataset["path"], number = str(file), number + 1
    return True


def _short(values: Values, folder: Path) -> bool:
    values["sequence_len"] = min(int(values.get("sequence_len") or LENGTH), LENGTH)
    values["max_steps"] = STEPS
    values["output_dir"] = str(folder / "out")
    if values.get("dataset_prepared_path"):
        values["dataset_prepared_path"] = str(folder / "prepared")
    values["codegen"] = "eager"
    for key, value in (("min_sample_len", 1), ("lisa_n_layers", 1)):
        if values.get(key):
            values[key] = value
    if 0 < (values.get("val_set_size") or 0) < 2 / COUNT:
        values["val_set_size"] = 2
    return True


def _drop(*names: str) -> Callable[[Values, Path], bool]:
    def change(values: Values, folder: Path) -> bool:
        keys = [k for k in values if k in names or any(k.startswith(f"{n}_") for n in names)]
        return any([values.pop(key) not in (None, False, [], "") for key in keys])

    return change


def _optimizer(values: Values, folder: Path) -> bool:
    package = PACKAGES.get(str(values.get("optimizer")))
    if package is None or importlib.util.find_spec(package):
        return False
    values["optimizer"] = "adamw_torch_fused"
    return True


def _half(values: Values, folder: Path) -> bool:
    half = [key for key in ("fp16", "float16") if values.get(key)]
    if not half or torch.cuda.is_available():
        return False
    for key in half:
        del values[key]
    values["bf16"] = "auto"
    return True


def _tekken(values: Values, folder: Path) -> bool:
    if importlib.util.find_spec("mistral_common"):
        return False
    return bool(values.pop("tokenizer_use_mistral_common", False))


def _groups(values: Values, folder: Path) -> bool:
    qat = values.get("qat")
    if not qat or (qat.get("group_size") or 0) <= SMALL_GROUP:
        return False
    qat["group_size"] = SMALL_GROUP
    return True


OVERRIDES = (
    Override(
        "",
        "`base_model` is the twin, without `tokenizer_config`, `base_model_config` and "
        "`revision_of_model`",
        _model,
    ),
    Override(
        "",
        f"`path` of a dataset is a file with {COUNT} rows of the same `type` and fields, without "
        "`name`, `split` and `data_files`",
        _rows,
    ),
    Override(
        "",
        f"`max_steps: {STEPS}`, `sequence_len` of at most {LENGTH}, a `val_set_size` of at least 2 "
        "rows, `min_sample_len: 1` and `lisa_n_layers: 1` where they are set, `codegen: eager` "
        "(without a C++ compiler); `output_dir` and `dataset_prepared_path` are temporary",
        _short,
    ),
    Override(
        "",
        "trackers and uploads are left out (`wandb_*`, `trackio_*`, `swanlab_*`, `use_otel_*`, "
        "`hub_model_id`, ...)",
        _drop(*TRACKERS, *PUSHES),
    ),
    Override(
        "one process",
        "**one process**: what starts processes or divides a model or its batches between them is "
        f"left out ({', '.join(f'`{key}`' for key in LAUNCH)})",
        _drop(*LAUNCH),
    ),
    Override(
        "optimizer",
        "**optimizer**: `adamw_torch_fused` in place of one whose package was not installed "
        "(torchao)",
        _optimizer,
    ),
    Override(
        "precision",
        "**precision**: `bf16: auto` in place of `fp16: true`, which needs a GPU",
        _half,
    ),
    Override(
        "tokenizer",
        "**tokenizer**: `tokenizer_use_mistral_common` is left out, because mistral-common was not "
        "installed",
        _tekken,
    ),
    Override(
        "groups",
        f"**groups**: a `qat.group_size` of {SMALL_GROUP}, which divides the rows of a twin's "
        "weights",
        _groups,
    ),
)


def datasets_of(values: Values, key: str) -> list[Values]:
    """The datasets under a key of a recipe, in place."""
    if isinstance(value := values.get(key), str | dict):
        values[key] = [value]
    listed = values.get(key) or []
    listed[:] = [d if isinstance(d, dict) else {"path": d} for d in listed]
    return listed


@dataclass
class Outcome:
    """What became of a recipe.

    Attributes:
        recipe: its path below the folder of examples.
        base_model: as it names it.
        kind: the type of the twin; ends in a question mark where it is a guess.
        accepted: whether the recipe is taken, before anything is loaded.
        stage: the last thing that was begun; ``done`` when all of it held.
        why: why it is not accepted, or what ended it.
        overrides: those of ``OVERRIDES`` that changed it.
        text: whether it reads text alone.
        figures: of the comparison.
    """

    recipe: str
    base_model: str
    kind: str = ""
    accepted: bool = False
    stage: str = "accept"
    why: str = ""
    overrides: list[str] = field(default_factory=list)
    text: bool = True
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def ran(self) -> bool:
        """Whether all of it held."""
        return self.stage == "done"

    @property
    def current(self) -> bool:
        """Whether it is no archived recipe."""
        return not self.recipe.startswith("archived/")


def run(
    file: Path,
    examples: Path,
    folder: Path,
    say: Callable[[Outcome], None],
    more: Mapping[str, Any] | None = None,
) -> Outcome:
    """Run the recipe in ``file`` on a twin in ``folder``; ``say`` is told of every stage.

    ``more`` are keys that win over all others.

    The recipe itself is read as it is, in the folder where it lies: that is what accepts it.
    """
    values: Values = yaml.safe_load(file.read_text(encoding="utf-8"))
    kind = kind_of(values["base_model"])
    outcome = Outcome(str(file.relative_to(examples)), values["base_model"], str(kind))
    outcome.text = not values.get("processor_type")
    try:
        load_recipe(file)
        outcome.accepted = True
        if kind.why_not is not None:
            outcome.stage, outcome.why = "twin", kind.why_not
            return outcome
        for stage in _stages(values, kind, folder, outcome, more or {}):
            outcome.stage = stage
            say(outcome)
    except FusewrightError as error:
        outcome.why = _plainly(str(error), examples.parent, file, folder)
    except Exception as error:
        outcome.why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return outcome


def _plainly(message: str, root: Path, *paths: Path) -> str:
    """A message on one line without the paths of this machine; those in ``root`` begin there."""
    message = message.replace(f"{paths[-1] / 'base'}", "the twin")
    for path in paths:
        message = message.replace(f"{path}, ", "").replace(f"{path}", path.name)
    message = message.replace(f"{root}/", "").replace(f"{root}", "the folder of examples/")
    first, _, rest = message.partition("problems:")
    return " ".join((rest if rest and len(first) < 40 else message).split())


def _stages(
    values: Values, kind: Any, folder: Path, outcome: Outcome, more: Mapping[str, Any]
) -> Iterator[str]:
    """Do all of it, saying what comes next."""
    yield "twin"
    out, base = folder / "out", folder / "base"
    inputs: Inputs
    if outcome.text:
        original = copy.deepcopy(values)
        texts = [json.dumps(row) for key in ("datasets", "test_datasets", "pretraining_dataset")
                 for dataset in datasets_of(original, key) for row in rows_of(dataset)]  # fmt: skip
        tokenizer = make_tokenizer(values, texts)
        class_name = make_checkpoint(kind, tokenizer, base)
        ids = torch.randint(4, len(tokenizer), (1, 32), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids}
    else:
        class_name = make_image_checkpoint(kind, base)
        inputs = inputs_with_image(base)
    for override in OVERRIDES:
        if override.change(values, folder) and override.name:
            outcome.overrides.append(override.name)
    values.update(more)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    yield "train"
    model = _train(folder / "recipe.yaml", folder / "log.txt")
    if values.get("qat"):
        _stop_rounding(model)
    yield "load plainly"
    model_class = _plain_class(values, class_name)
    if not values.get("adapter"):
        plain = _loaded(model_class, out)
        yield "same logits"
        _require_equal("memory and file", logits(model, inputs), logits(plain, inputs), outcome)
        _require_towers(base, out)
        yield "done"
        return
    adapted = _adapted(model_class, base, out)
    after = logits(adapted, inputs)
    with adapted.disable_adapter():
        outcome.figures["effect"] = _difference(after, logits(adapted, inputs))
    yield "merge"
    _merge(out, folder / "merged", dequantize=kind.stored == "nf4")
    yield "same logits"
    merged = _loaded(model_class, folder / "merged")
    _require_equal("adapter and merged", after, logits(merged, inputs), outcome)
    _require_towers(base, folder / "merged")
    yield "done"


def _train(file: Path, log: Path) -> nn.Module:
    """Train, and return the model as it was when it was saved, in fp32 and without rewrites."""
    from fusewright import restore
    from fusewright.train import finish, train

    saved: list[Any] = []
    save = finish.save

    def keep(trainer: Any, result: Any) -> None:
        save(trainer, result)
        saved.append(trainer.model)

    finish.save = keep
    try:
        with log.open("w", encoding="utf-8") as stream:
            result = train(file, console=Console(file=stream, width=200))
    finally:
        finish.save = save
    if result.status != "finished" or result.steps != STEPS or result.problems:
        raise RuntimeError(f"{result.status} after {result.steps} steps: {result.problems}")
    check = result.adapter_check
    if check is not None and not check["exact"]:
        raise RuntimeError(f"the saved adapter differs from the trained one: {check}")
    model: nn.Module = saved[0]
    restore(model)
    return model


def _plain_class(values: Values, class_name: str) -> Any:
    if values.get("reward_model"):
        return class_named("AutoModelForSequenceClassification")
    if values.get("process_reward_model"):
        return class_named("AutoModelForTokenClassification")
    return class_named(class_name)


def _loaded(model_class: Any, folder: Path, new_head: bool = False) -> Any:
    """Load a folder with transformers alone, in fp32; its files must have all weights, no more."""
    torch.manual_seed(0)
    model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {name: sorted(map(str, info[name]))[:3] for name in
             ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(name)}  # fmt: skip
    if wrong and not new_head:
        raise RuntimeError(f"{folder.name} has other weights than {model_class.__name__}: {wrong}")
    if getattr(model, "is_quantized", False):  # in fp32, as the merged model is
        model = model.dequantize(dtype=torch.float32)
    return model.eval()


def _adapted(model_class: Any, base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    new_head = config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS")
    model = _loaded(model_class, base, new_head)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        return PeftModel.from_pretrained(model, adapter).eval()


def _merge(run_folder: Path, output: Path, dequantize: bool) -> None:
    from fusewright.train.inference.run_folder import open_run
    from fusewright.train.merge import MergeOptions, merge

    options = MergeOptions(output=output, dtype="float32", dequantize=dequantize)
    merge(open_run(run_folder), options, Console(quiet=True))


def _stop_rounding(model: Any) -> None:
    """Let a model compute with its weights as they are saved."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    stop_rounding(model)
    quantize_(model, QATConfig(step="convert"))


def logits(model: Any, inputs: Inputs) -> Tensor:
    """What a model says of some tokens, with an image where it reads one, in fp32."""
    with torch.no_grad():
        return model.float().eval()(**inputs).logits.float()


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _require_equal(what: str, a: Tensor, b: Tensor, outcome: Outcome) -> None:
    """Both must be the same up to fp32's roundings, and an adapter must change more than that."""
    outcome.figures["difference"] = found = _difference(a, b)
    limit = 1e-4 * max(1.0, float(a.abs().max()))
    if not found <= limit:
        raise RuntimeError(f"{what}: logits differ by {found:.2g}")
    if outcome.figures.get("effect", 1.0) <= 10 * found:
        raise RuntimeError(f"the adapter changes logits by {outcome.figures['effect']:.2g} only")


_TOWERS = ("vision", "visual", "audio", "projector", "mtp.", "embed_image")


def _require_towers(base: Path, result: Path) -> None:
    """What does not read text must be in the result, bit for bit."""
    before = dict(_tensors(base))
    after = dict(_tensors(result))
    for name, tensor in before.items():
        if any(part in name for part in _TOWERS) and not name.endswith("quant_state"):
            if name not in after:
                raise RuntimeError(f"{result.name} lacks {name}")
            if not torch.equal(after[name].float(), tensor.float()):
                raise RuntimeError(f"{result.name} has changed {name}")


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (it is no mapping)
                yield name, weights.get_tensor(name)


def examples_in(folder: Path) -> list[Path]:
    """The recipes below a folder: YAML files with a ``base_model``."""
    files = []
    for file in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(values, Mapping) and values.get("base_model"):
            files.append(file)
    return files
