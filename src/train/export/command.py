"""``fusewright export``: a run as files for other engines, and the certificate of what they are."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...auditing.findings import Audit
from ..consent import Consent
from ..inference.load_run import load_tokenizer
from ..inference.run_folder import RunFolder, stored_dtype
from ..merge import MergeOptions, merge, new_folder
from ..model.files import in_shards
from ..model.load import quiet
from ..model.tokenizer import ChatPrompt
from ..output_files import GENERATION_SETTINGS
from ..processes.signals import Interrupts
from ..recipe.export_formats import FORMATS, Format
from ..report.environment import machine, versions
from ..serve import vllm_line
from ..terminal import Terminal, announce, say
from . import ollama
from .certificate import Subject, Writer, certify
from .compressed import CompressedWriter
from .gguf_file import GgufWriter
from .merged import MergedWriter
from .options import ExportChoice, ExportOptions

CERTIFICATE = "certificate.json"


@dataclass
class Exported:
    """What ``export`` wrote.

    Attributes:
        certificate: None: none was asked for.
    """

    folder: Path
    certificate: Audit | None = None
    size: int = field(default=0)


def export(run: RunFolder, choice: ExportChoice, console: Console | None = None) -> Exported:
    """Write ``run`` in a format, read it back, and write the certificate beside it.

    ``choice`` is what ``options.choose`` has checked. The folder appears when everything in it is
    written; what it should replace stays.

    Raises a ModelError if the run cannot be merged or written in this format, or the disk is full.
    """
    console = console or Terminal(highlight=False)
    options, format, output = choice.options, choice.format, choice.output
    writer = _writer(choice, run.consent)
    with Interrupts(), new_folder(output) as folder, quiet():
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=folder.parent))
        try:
            audit = _export(run, options, format, writer, folder, scratch, console)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    size = _size(output)
    say(console, f"the export, {size / 1e6:,.0f} MB, is in {output}")
    if audit is not None:
        show(audit, console)
    served = options.kind in ("merged", "compressed-tensors")
    if served and (line := vllm_line(output, run.consent)) is not None:
        say(console, line)
    if options.kind == "ollama":
        model = options.create or output.name
        say(console, f"for Ollama: cd {output} && ollama create {model} -f Modelfile")
        if options.create and (audit is None or audit.passed):
            ollama.create(output, options.create)
    return Exported(output, audit, size)


def _writer(choice: ExportChoice, consent: Consent) -> Writer:
    """What writes the chosen format."""
    if choice.format is None or choice.format.writer == "merged":
        return MergedWriter(consent)
    if choice.llama_cpp is not None:
        return GgufWriter(choice.format, choice.llama_cpp, consent)
    return CompressedWriter(choice.format, consent)


def _export(
    run: RunFolder, options: ExportOptions, format: Format | None, writer: Writer, folder: Path,
    scratch: Path, console: Console,
) -> Audit | None:  # fmt: skip
    plain = format is None or format.writer == "merged"
    merged = folder if plain else scratch / "merged"
    if run.adapter or in_shards(run.folder):
        dtype = format.name if plain and format else None
        request = MergeOptions(merged, dtype, options.max_shard_size, options.dequantize)
        merge(run, request, Console(quiet=True))
    else:
        merged = run.folder
    if not plain:
        announce(f"writing {format.name if format else 'the model'}")
        writer.write(merged, folder)
    if isinstance(writer, GgufWriter) and options.kind == "ollama":
        _modelfile(run, merged, folder / writer.name, console)
    audit = None
    if options.certify:
        subject = Subject(
            run, merged, folder, writer, scratch, options.data, options.dequantize,
        )  # fmt: skip
        audit = certify(subject)
        _record(audit, run, options, format, folder)
    return audit


def _modelfile(run: RunFolder, merged: Path, gguf: Path, console: Console) -> None:
    from transformers import GenerationConfig

    settings = None
    if (merged / GENERATION_SETTINGS).is_file():
        settings = _Settings(GenerationConfig.from_pretrained(str(merged)))
    tokenizer, chat = load_tokenizer(run), ChatPrompt.of(run.recipe)
    if note := ollama.write_modelfile(gguf.parent, gguf, settings, tokenizer, chat):
        say(console, note)


@dataclass
class _Settings:
    """What a model has that ``stop_tokens`` asks for."""

    generation_config: Any


# --- the record ----------------------------------------------------------------------------------


def _record(
    audit: Audit, run: RunFolder, options: ExportOptions, format: Format | None, folder: Path
) -> None:
    """Write the certificate, and the model card with its line."""
    adapter = sum(f.stat().st_size for f in run.folder.glob("adapter_model.*"))
    audit.facts = {
        "format": options.kind,
        "quantization": format.name if format else stored_dtype(folder),
        "about": format.about if format else "the merged model",
        "run": run.folder.name,
        "base": run.base_model if run.adapter else run.recipe.get("base_model"),
        "bytes": {"adapter": adapter, "export": _size(folder)},
        **audit.facts,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {**versions(), **_other_versions()},
        "machine": machine(),
    }
    text = json.dumps(audit.to_dict(), indent=2) + "\n"
    (folder / CERTIFICATE).write_text(text, encoding="utf-8")
    source = run.folder / "README.md"
    card = source.read_text(encoding="utf-8", errors="replace") if source.is_file() else _HEAD
    (folder / "README.md").write_text(f"{card.rstrip()}\n\n{_card(audit)}", encoding="utf-8")


_HEAD = "---\ntags:\n- fusewright\n---\n# An export"


def _other_versions() -> dict[str, str]:
    found = {}
    for name in ("compressed-tensors", "gguf", "llama-cpp-python"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _size(folder: Path) -> int:
    """Bytes of the files that hold weights."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    return sum(path.stat().st_size for path in files)


def _card(audit: Audit) -> str:
    """The line of a model card, and its table."""
    rows = [f"| {' | '.join(cells)} |" for cells in (_TITLES, _RULE, *_table(audit))]
    return "\n".join(["## Certificate\n", f"{line(audit)}\n", *rows, ""])


_LITTLE = 0.5
"""An export that keeps less than this of the gain is said to have lost most of it. No check fails:
the base loses as much, and then it is the format that does not suit the model."""

_LOST = "most of it is lost, so take a format with more bits"


def line(audit: Audit) -> str:
    """The certificate in a sentence."""
    facts, failed = audit.facts, [f.check for f in audit.failed]
    kept = facts["gain_kept"]
    gain = f"{kept:.1%} of what training gained survives" if kept is not None else "gain unknown"
    if kept is not None and kept <= 0:
        gain += ": the export is no better than the base"
    elif kept is not None and kept < _LITTLE:
        gain += f": {_LOST}"
    verdict = f"FAILED: {', '.join(failed)}" if failed else "every check passed"
    skipped = [f.check for f in audit.findings if f.verdict == "skipped"]
    verdict += f" (not asked: {', '.join(skipped)})" if skipped else ""
    return (
        f"Exported as {facts['format']} {facts['quantization']} and read back on "
        f"{facts['date'][:10]}: {gain}, on {facts['rows']['what']}; {verdict}. See "
        f"`{CERTIFICATE}`."
    )


_TITLES = ("model", "loss", "gain kept", "KL to the trained", "same next token")
_RULE = ("---", "---:", "---:", "---:", "---:")


def _table(audit: Audit) -> list[tuple[str, ...]]:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        (name, cell(of["loss"], ".4f"), cell(of["gain_kept"], ".1%"), cell(of["kl"], ".2e"),
         cell(of["same"], ".1%"))
        for name, of in audit.facts["models"].items()
    ]  # fmt: skip


def show(audit: Audit, console: Console) -> None:
    """Print the certificate: what each model computes, and what is wrong with what to do."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, title in enumerate(_TITLES):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for cells in _table(audit):
        table.add_row(*cells)
    console.print(table)
    for finding in audit.findings:
        mark = {"pass": "✓", "fail": "✗", "skipped": "–"}[finding.verdict]
        say(console, f"{mark} {finding.check}: {finding.reason}")
        if finding.verdict == "fail":
            say(console, f"    {finding.advice}")
    kept = audit.facts["gain_kept"]
    if kept is not None and kept < _LITTLE:
        say(console, f"warning: {kept:.1%} of what training gained survives: {_LOST}")
    greedy = audit.facts["greedy"]
    if not greedy["prompts"]:
        return
    say(
        console,
        f"{greedy['same_as_the_trained_model']} of {greedy['prompts']} prompts are continued as "
        "the trained model continues them",
    )


def formats() -> list[tuple[str, str, str]]:
    """Every format: kind, name and what it is."""
    return [(f.writer, f.name, f.about) for f in FORMATS.values()]
