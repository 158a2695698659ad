"""``fusewright eval --tasks``: a run judged by the tasks of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from ...errors import DataError, RecipeError, did_you_mean, first_line
from ...packages import install_extra
from ..consent import FUNCTION_SWITCH, Consent, why_not_run
from ..model.load import quiet
from ..terminal import Terminal, announce, say
from .evaluate import write_results
from .load_run import load_run
from .run_folder import RunFolder

RESULTS = "eval_tasks.json"


@dataclass(frozen=True)
class TaskOptions:
    """The options of the command.

    Attributes:
        tasks: names of tasks, groups or tags, or paths of YAML files.
        include: folders with tasks of one's own, which come before the harness's of the same name.
        limit: documents of each task; below 1: that share of them.
        shots: solved examples in each prompt; None: as each task has it.
        batch_size: a number, or ``"auto"``.
        chat: write prompts by the run's chat template.
    """

    tasks: Sequence[str]
    include: Sequence[Path] = ()
    limit: float | None = None
    shots: int | None = None
    batch_size: str = "8"
    chat: bool = False


def evaluate_tasks(
    run: RunFolder, request: TaskOptions, *, as_json: bool = False, console: Console | None = None
) -> Path:
    """Judge ``run`` by tasks, print the figures, and write them to the file that is returned.

    The model is the plain one: figures are those that the harness has for it anywhere.

    Raises:
        RecipeError: the harness is not installed; a task is unknown, or brings code that the
            caller has not allowed; an option is wrong.
        DataError: a task or its data cannot be loaded, or fails.
        ModelError: the run cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(
            "--tasks: needs the package lm-eval (lm-evaluation-harness), which is not installed: "
            f"{install_extra('evaluation')}"
        )
    if request.batch_size != "auto" and not (
        request.batch_size.isdecimal() and int(request.batch_size)
    ):
        raise RecipeError(f"--batch-size: must be a number or auto, not {request.batch_size}")
    if request.limit is not None and request.limit <= 0:
        raise RecipeError("--limit: must be above 0")
    own = [*_task_files(request.include), *(p for t in request.tasks if (p := Path(t)).is_file())]
    if not run.consent.allow_code:
        for path in own:
            if code := next(_code_in(path), None):
                raise RecipeError(why_not_run(f"{path}: {code}", FUNCTION_SWITCH))
    console = console or Terminal(highlight=False)
    announce("loading the tasks")
    with quiet(), _sandboxed_templates(bool(own), run.consent), _few_words():
        tasks = _load_tasks(request)
        announce(f"loading {run.folder}")
        model, tokenizer = load_run(run)
        announce("evaluating")
        found = _judged(model, tokenizer, tasks, request, run.consent)
    content = _content(found, request)
    path = write_results(run, RESULTS, content)
    if as_json:
        print(path.read_text(encoding="utf-8"), end="")
    else:
        console.print(_table(content["tasks"]))
        say(console, f"written to {path}")
    return path


# --- tasks, and the code that they may bring -----------------------------------------------------


def _task_files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        if not folder.is_dir():
            raise RecipeError(f"--include-path: {folder} is not a folder")
        yield from sorted(folder.glob("**/*.yaml"))


class _Reader(yaml.SafeLoader):
    """Reads tags of YAML that stand for code as text."""


class _Code(str):
    pass


for _tag in ("!", "tag:yaml.org,2002:python/"):
    _Reader.add_multi_constructor(
        _tag, lambda _, suffix, node, tag=_tag: _Code(f"{tag}{suffix} {node.value}")
    )


def _code_in(path: Path, seen: frozenset[Path] = frozenset()) -> Iterator[str]:
    """What a task's file, or one that it includes, would run besides the harness's own code."""
    path = path.resolve()
    if path in seen:
        return
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Reader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as a task: {first_line(error)}") from None
    yield from _code_of(content)
    if isinstance(content, dict) and (names := content.get("include")):
        for name in names if isinstance(names, list) else [names]:
            yield from _code_in(path.parent / str(name), seen | {path})


def _code_of(value: Any) -> Iterator[str]:
    from lm_eval.api import metrics, registry  # metrics: fills the registry

    if isinstance(value, _Code):
        yield f"{value} is Python code"
    elif isinstance(value, list):
        for each in value:
            yield from _code_of(each)
    elif isinstance(value, dict):
        name = value.get("metric")
        function = getattr(metrics, str(name), None)  # not a module that it has imported
        known = name in registry.metric_registry
        known |= getattr(function, "__module__", None) == metrics.__name__
        if value.get("hf_evaluate") or (isinstance(name, str) and not known):
            yield f"the metric {name} is a Python file, which the package evaluate would load"
        if value.get("unsafe_code"):
            yield "unsafe_code: the model's answers are Python code"
        for each in value.values():
            yield from _code_of(each)


@contextlib.contextmanager
def _sandboxed_templates(own: bool, consent: Consent) -> Iterator[None]:
    """Keep templates of tasks that are not the harness's from calling what they like."""
    if not own or consent.allow_code:
        yield
        return
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    sandbox = ImmutableSandboxedEnvironment(
        undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
    )
    sandbox.filters.update(plain.filters)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = plain


@contextlib.contextmanager
def _few_words() -> Iterator[None]:
    """Keep back the harness's log: its warnings are about how we call it."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load_tasks(request: TaskOptions) -> list[Any]:
    """The tasks and groups, with their data; none of them inside another."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=list(request.include))
    names: list[str] = []
    for name in request.tasks:
        matches = [name] if Path(name).is_file() else manager.match_tasks([name])
        if not matches:
            near = did_you_mean(name, manager.all_tasks)
            raise RecipeError(f"--tasks: there is no task {name}; {near or 'lm-eval ls tasks'}")
        names += matches
    try:
        loaded = manager.load(names)
    except Exception as error:  # datasets and hub raise anything
        raise _refused(error) or DataError(
            f"--tasks {','.join(names)}: cannot be loaded: {first_line(error)}"
        ) from error
    groups = loaded.get("groups", {})
    inside = {name for group in groups.values() for name in _members(group)}
    return [each for name, each in {**groups, **loaded["tasks"]}.items() if name not in inside]


def _members(group: Any) -> set[str]:
    return {t.task_name for t in group.get_all_tasks()} | {
        g.name for g in group.get_all_groups()
    } - {group.name}


def _judged(
    model: Any, tokenizer: Any, tasks: list[Any], request: TaskOptions, consent: Consent
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    size = request.batch_size if request.batch_size == "auto" else int(request.batch_size)
    # the harness ties the weights of what it is given; those that were trained apart stay apart
    model.tie_weights = lambda *_, **__: None
    try:
        judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        found: dict[str, Any] = simple_evaluate(
            judged, tasks=tasks, num_fewshot=request.shots, limit=request.limit,
            apply_chat_template=request.chat, log_samples=False, bootstrap_iters=1000,
            confirm_run_unsafe_code=consent.allow_code,
        )  # fmt: skip
    except Exception as error:  # tasks, templates and metrics raise anything
        raise _refused(error) or DataError(
            f"--tasks: the harness ended: {first_line(error)}"
        ) from error
    finally:
        del model.tie_weights
    return found


def _refused(error: Exception) -> RecipeError | None:
    """What is said where the harness or the sandbox has refused to run code."""
    from jinja2.exceptions import SecurityError

    if isinstance(error, SecurityError):
        what = f"--tasks: a task's template is code ({first_line(error)})"
    elif "confirm_run_unsafe_code" in str(error):
        what = "--tasks: one of the tasks runs the model's answers, which are Python code"
    else:
        return None
    return RecipeError(why_not_run(what, FUNCTION_SWITCH))


# --- figures -------------------------------------------------------------------------------------


def _content(found: dict[str, Any], request: TaskOptions) -> dict[str, Any]:
    """What is written: for each task and group the figures, each with its standard error."""
    import lm_eval

    tasks = {}
    for name, figures in {**found["results"], **found.get("groups", {})}.items():
        values = {
            key.removesuffix(",none"): {"value": value, "stderr": figures.get(_stderr(key))}
            for key, value in figures.items()
            if isinstance(value, int | float) and "," in key and "_stderr," not in key
        }
        counts = found.get("n-samples", {}).get(name, {})
        tasks[name] = {
            "figures": values,
            "samples": counts.get("effective"),
            "of": counts.get("original"),
            "shots": found.get("n-shot", {}).get(name),
        }
    return {
        "tasks": tasks, "limit": request.limit, "chat_template": request.chat,
        "lm_eval": lm_eval.__version__,
    }  # fmt: skip


def _stderr(key: str) -> str:
    metric, _, filtered = key.partition(",")
    return f"{metric}_stderr,{filtered}"


def _table(tasks: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("value", "± error", "shots", "samples"):
        table.add_column(name, justify="right")
    for task, of in tasks.items():
        for metric, figure in of["figures"].items():
            error = figure["stderr"]
            shown = f"{error:.4f}" if isinstance(error, int | float) else "-"
            counts = (of["shots"], of["samples"])
            table.add_row(
                task, metric, f"{figure['value']:.4f}", shown,
                *("-" if count is None else f"{count:,}" for count in counts),
            )  # fmt: skip
    return table
