"""The model card of a run: ``README.md``, as the Hugging Face hub shows it with a model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from ..output_files import write_atomically
from ..printable import printable
from ..recipe.written import folded
from . import run_facts
from .format import duration, memory, millions, rate
from .page_sections import audit_headline, data, ending, model
from .run_facts import TASKS, Facts

NAME = "README.md"

_MARK = re.compile(r"\n<!-- written by fusewright, ([0-9a-f]{16}) -->\n")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def write(result: Any, folder: str | Path) -> Path | None:
    """Write the card to ``README.md`` in ``folder``, unless a person has written or changed it.

    ``result`` is a ``RunResult``, a mapping like ``run.json``, or the path of one or of its folder.
    Returns the file, or None when the existing card is left alone.

    Raises:
        DataError: ``result`` is a path, and there is no record of a run.
        OSError: the file cannot be written.
    """
    path = Path(folder) / NAME
    if path.exists() and not is_generated(path):
        return None
    text = render(Facts.of(result), (Path(folder) / "loss.png").exists())
    write_atomically(path, text, errors="replace")
    return path


def is_generated(path: Path) -> bool:
    """Whether no person has edited a card: PEFT's empty form, or ours unchanged."""
    try:
        text = path.read_bytes().decode("utf-8")  # line ends as they are: they are in the digest
    except (OSError, UnicodeDecodeError):
        return False
    mark = _MARK.search(text)
    if mark is not None:
        return mark[1] == _digest(_MARK.sub("", text))
    return "\n# Model Card for Model ID\n" in text and text.count("[More Information Needed]") > 20


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()[:16]


def render(facts: Facts, picture: bool) -> str:
    """The card as Markdown; ``picture``: with ``loss.png`` in its folder."""
    parts = [*_opening(facts.published()), *_use(facts), *_results(facts.published(), picture)]
    text = f"---\n{_data(facts).to_yaml()}\n---\n" + "\n".join(parts).rstrip() + "\n"
    return text + f"\n<!-- written by fusewright, {_digest(text)} -->\n"


def _data(facts: Facts) -> ModelCardData:
    recipe = facts.recipe
    base, adapter = _hub_id(recipe.get("base_model")), recipe.get("adapter")
    rows = [row.get("path") for row in _datasets(facts)]
    relation = [f"base_model:{'adapter' if adapter else 'finetune'}:{base}"] if base else []
    method = [str(adapter)] if adapter else []
    return ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        license=_license(str(recipe.get("base_model") or "")),
        pipeline_tag=_PIPELINES.get(
            facts.task or "", "image-text-to-text" if facts.images else "text-generation"
        ),
        tags=[*relation, "fusewright", *method, *_task_tags(facts), "transformers"],
        datasets=[name for name in map(_hub_id, rows) if name] or None,
    )


_PIPELINES = {
    "reward-model": "text-classification", "process-reward-model": "token-classification",
}  # fmt: skip
"""The hub's names for the use of models that write no text."""


def _task_tags(facts: Facts) -> list[str]:
    if facts.task is not None:
        return ["trl", facts.task]
    return ["sft", "distillation"] if facts.recipe.get("kd_trainer") else ["sft"]


def _hub_id(name: Any) -> str | None:
    """A name on the hub; None for a file, a folder or a package."""
    text = str(name or "")
    is_local = Path(text).expanduser().exists() or Path(text).suffix in (".jsonl", ".json", ".gguf")
    return text if _HUB_ID.fullmatch(text) and not is_local else None


def _datasets(facts: Facts) -> list[dict[str, Any]]:
    rows = facts.recipe.get("datasets")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _license(base: str) -> str | None:
    """The license in the card of the base model, where that card is on this machine."""
    card: Path | None = Path(base) / NAME if base else None
    if _hub_id(base):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(base, NAME)
        card = Path(cached) if isinstance(cached, str) else None
    try:
        entries = metadata_load(card) if card else None
    except (OSError, ValueError, YAMLError):  # none, or not as it should be
        return None
    license_id = entries.get("license") if entries else None
    return license_id if isinstance(license_id, str) else None


def _opening(facts: Facts) -> Iterator[str]:
    recipe = facts.recipe
    base = _hub_id(recipe.get("base_model"))
    name = f"[{base}](https://huggingface.co/{base})" if base else f"`{facts.base}`"
    kind = "adapter for" if recipe.get("adapter") else "of"
    method = facts.method[:1].upper() + facts.method[1:]
    yield f"# {facts.base}, {facts.method}\n"
    how = TASKS[facts.task] if facts.task is not None else "supervised fine-tuning"
    yield f"{method} {kind} {name}, trained with fusewright by {how} on {_sources(facts)}.\n"
    end = ending(facts)
    if end.text:
        yield f"> **{end.label.capitalize()}.** {_line(end.text)}\n"


def _results(facts: Facts, picture: bool) -> Iterator[str]:
    yield from _training(facts, picture)
    yield from _sample(facts)
    if facts.recipe:
        text = folded(facts.recipe)
        yield f"<details>\n<summary>The recipe</summary>\n\n{_fenced(text.chosen, 'yaml')}\n"
        yield "All other keys have their defaults.\n\n</details>\n"
    versions = [f"{k} {v}" for k, v in facts.mapping("versions").items() if v != "not installed"]
    if versions:
        yield f"## Versions\n\n{_line(', '.join(versions))}"


def _sources(facts: Facts) -> str:
    """The data by name, without the folders of one machine."""
    names = [str(row.get("path") or "") for row in _datasets(facts)]
    sources = [
        f"[{n}](https://huggingface.co/datasets/{n})" if _hub_id(n) else f"`{Path(n).name}`"
        for n in names
        if n
    ]
    return ", ".join(sources) or "unnamed data"


def _use(facts: Facts) -> Iterator[str]:
    if not facts.number("steps"):
        return
    yield "## Use it\n"
    images = bool(facts.images)
    yield (
        _fenced(run_facts.commands(facts.recipe, images), "sh") + "\n\nin a copy of this folder.\n"
    )
    code = run_facts.snippet(facts.recipe, ".", images, facts.stops)
    if code is not None:
        below = "PEFT" if facts.recipe.get("adapter") else "transformers"
        yield f"With plain {below}:\n\n{_fenced(code, 'python')}\n"


def _training(facts: Facts, picture: bool) -> Iterator[str]:
    rows = [(k, v) for k, v in model(facts) if k not in ("base model", "method")]
    sets, others = data(facts)
    figure = facts.figure
    before, after = (facts.number(f"val_{figure}_{when}") for when in ("before", "after"))
    if before is not None and after is not None:
        rows.append((f"validation {figure}", f"{before:.3f} before, {after:.3f} after"))
    if (trained := facts.training_loss()) is not None:
        begin, end, of = trained
        rows.append(("training loss", f"{begin:.3f} at first, {end:.3f} in the end ({of})"))
    for name, key, show in (
        ("optimizer steps", "steps", lambda v: f"{v:,.0f}"),
        ("tokens trained on", "trained_tokens", millions),
        ("trained tokens per second", "trained_tokens_per_s", rate),
        ("peak memory", "peak_rss_mb", memory),
        ("peak GPU memory", "peak_cuda_mb", memory),
    ):
        value = facts.number(key)
        if value:
            rows.append((name, show(value)))
    seconds = facts.mapping("seconds").get("training")
    if isinstance(seconds, int | float):
        rows.append(("time of training", duration(seconds)))
    if audited := audit_headline(facts):
        rows.append(("audit of the training", audited))
    if rows:
        yield "## Training\n"
        yield _table(("", ""), rows)
    if picture:
        yield f"![Training and validation {figure} over the optimizer steps](loss.png)\n"
    if sets or others:
        yield "## Data\n"
        if sets:
            yield _table(sets.head, sets.rows)
        if others:
            yield _line(", ".join(f"{k}: {v}" for k, v in others)) + "\n"


def _sample(facts: Facts) -> Iterator[str]:
    sample = facts.mapping("sample")
    if sample.get("question") is None or sample.get("after") is None:
        return
    name = facts.mapping("sample_image").get("name")
    about = f" about the image {_line(str(name))}" if name else ""
    yield f"## An answer{about}\n\n{_fenced(str(sample['question']), 'text')}\n"
    for name in ("before", "after"):
        if sample.get(name) is not None:
            yield f"{name.capitalize()} training:\n\n{_fenced(str(sample[name]), 'text')}\n"


# --- Markdown ------------------------------------------------------------------------------------


def _fenced(text: str, language: str) -> str:
    """A block of code, with a fence longer than any that the text has."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text).rstrip()}\n{fence}"


def _line(text: str) -> str:
    """Text without line breaks, escaped so that nothing in it is Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(printable(text).split()))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    rows_of_cells = [head, rule, *([_line(cell) for cell in row] for row in rows)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows_of_cells)
