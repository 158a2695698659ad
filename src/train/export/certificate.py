"""The certificate of an export: what was written, read back and compared with what was trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...auditing.findings import Audit, AuditFinding, Check
from ...errors import ModelError, RecipeError, first_line
from ...kernels.tolerance import FACTOR
from ..data.chat.stops import render_chat, stop_tokens
from ..data.images.features import Illustrated
from ..inference.evaluate import held_out
from ..inference.load_run import load_model_of, load_processing
from ..inference.run_folder import RunFolder, open_run, stored_dtype
from ..merge import base_in_memory, forget_conversions, merged_in_memory
from ..model.base_files import BaseFiles, base_files, copy_processor, save_with_base
from ..model.multimodal import names_in_model, untrained
from ..model.tokenizer import ChatPrompt
from ..processing import Processing
from ..terminal import announce
from .reading import Compared, TokenizerRead, compared, meta_model_of, not_finite
from .scores import HeldOut, Logits, Scores, answers, cost, distance, forward, scores

CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        Check("merged-tensors", "Is every tensor of the merged model the base's plus the adapter's "
              "change, and every other one the base's, bit for bit?",
              "merge again, into the base that the adapter was trained on: --base-model BASE"),
        Check("exported-tensors", "Is every tensor of the merged model in the export, rounded as "
              "the format's own library rounds it?", "do not use the files: the writer is wrong"),
        Check("tokenizer", "Does the export give texts the same tokens, and end answers with the "
              "same one?", "save the run's tokenizer again before it is converted"),
        Check("chat-template", "Does the export have the chat template?",
              "put the run's chat template into the exported tokenizer"),
        Check("recorded-loss", "Have base and trained model the losses that the run recorded?",
              "the base is another one than in training: --base-model BASE"),
        Check("merged-gain", "Does the merged model keep what training gained?",
              "merge into the weights that the adapter was trained on: --dequantize"),
        Check("format-cost", "Does the format cost the trained model no more than it costs the "
              "base?", "take a format with more bits, or train for this one: export_format"),
        Check("llama-cpp", "Does llama.cpp compute from the file what transformers computes?",
              "one of both reads the file wrongly: try a newer llama-cpp-python"),
    )
}  # fmt: skip
"""The questions that a certificate answers."""

_PROMPTS = ("What is the capital of France?", "Write a short poem about the sea.",
            "Explain what a hash table is.", "List three animals.", "Hello!")  # fmt: skip
_TEXTS = (*_PROMPTS, "Grüße, 世界! 🙂 \t\n  def f(x): return x ** 2")
_LLAMA_TOKENS = 2048


class Writer(Protocol):
    """What writes a format and reads it back."""

    def write(self, source: Path, folder: Path) -> None:
        """Write the plain model in ``source`` to ``folder``."""

    def compare(self, source: Path, folder: Path) -> Iterator[Compared]:
        """Compare each tensor; raises a ValueError if they cannot be read here."""

    def load(self, folder: Path) -> Any:
        """The model as it is read, in float32; raises a RecipeError if it cannot be."""

    def tokenizer(self, folder: Path, ours: Any) -> TokenizerRead:
        """The tokenizer as it is read; ``ours`` is the run's."""

    def other_reader(self, folder: Path, length: int) -> Logits | str:
        """What another engine computes from the file, for texts of so many tokens.

        Or why it does not; an empty text where no other engine is asked about the format.
        """


@dataclass
class Subject:
    """What is certified.

    Attributes:
        merged: the folder of the plain model; of a run of a whole model, its own.
        export: the folder that was written; it may be ``merged``.
        scratch: a folder for what is needed on the way.
        files: datasets to judge on, in place of the run's rows.
        dequantize: whether the adapter was merged into the base's dequantized weights.
    """

    run: RunFolder
    merged: Path
    export: Path
    writer: Writer
    scratch: Path
    files: Sequence[Path] = ()
    dequantize: bool = False
    unread: str = "the export could not be read"

    @property
    def is_plain(self) -> bool:
        """Whether the merged model is what was exported."""
        return self.export == self.merged


def certify(subject: Subject) -> Audit:
    """Read everything back and compare. Models are loaded one by one, and compute in float32.

    The base in the same format is the yardstick: what the format costs there is its own cost.
    """
    processing = load_processing(subject.run)
    writer, ours = subject.writer, processing.tokenizer
    rows, validated = _rows(subject, processing)
    audit = Audit(subject.run.base_model)
    announce("comparing the tensors")
    base = _base(subject, ours)
    audit.add([_merged_tensors(subject, base)])
    if base is not None and not subject.is_plain:
        base.export.mkdir()
        writer.write(base.folder, base.export)
        with suppress(ValueError):  # the export says so, too
            for _ in writer.compare(base.folder, base.export):  # whose errors are a yardstick
                pass
    audit.add([_exported_tensors(subject)])
    audit.add(_texts(subject, ours, rows))
    results = _results(subject, base, rows)
    audit.add(_judged(subject, base, results, rows, validated))
    audit.facts = _facts(subject, results, rows)
    return audit


# --- rows and models -----------------------------------------------------------------------------


def _rows(subject: Subject, processing: Processing) -> tuple[HeldOut, bool]:
    """The rows to judge on, and whether they are of those that the run was validated on.

    Rows with images are left out: not every format that is read back has the towers.
    """
    tokenizer = processing.tokenizer
    prompt, questions = ChatPrompt.of(subject.run.recipe), []
    for text in _PROMPTS:
        with suppress(ValueError):  # there is no template, or it refuses
            text = render_chat(tokenizer, prompt.question(text), prompt.variables, True)
        questions.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    what, sets = held_out(subject.run, subject.files, processing)
    every = [sample for samples in sets for sample in samples]
    samples = [sample for sample in every if Illustrated.of(sample) is None]
    if left := len(every) - len(samples):
        what += f", without {left} that have images: what towers compute is not judged"
    validated = not subject.files and not left and subject.run.facts.get("val_loss_before")
    return HeldOut.of(what, samples, questions), bool(validated)


@dataclass
class _Base:
    """The base model.

    Attributes:
        folder: where it is saved as the merged model is, in the same dtype.
        export: where it is written in the format.
        state: its tensors in float32, by their names in the model.
        run: what loads it.
    """

    folder: Path
    export: Path
    state: dict[str, Tensor]
    run: RunFolder


def _base(subject: Subject, tokenizer: Any) -> _Base | None:
    """Save the base beside the export; None: a whole model whose base is unknown or not there."""
    run = subject.run
    if not run.adapter:
        if not run.recipe.get("base_model"):
            return None
        run = replace(run, base_model=str(run.recipe["base_model"]))
    try:
        model = base_in_memory(run, torch.float32, subject.dequantize)
    except RecipeError:
        if subject.run.adapter:
            raise
        return None
    forget_conversions(model)
    tokens = meta_model_of(open_run(subject.merged, consent=run.consent)).get_input_embeddings()
    if len(model.get_input_embeddings().weight) != len(tokens.weight):
        model.resize_token_embeddings(len(tokens.weight), mean_resizing=False)
    state = dict(model.state_dict())
    base = _Base(subject.scratch / "base", subject.scratch / "base-exported", state, run)
    nn.Module.to(model, getattr(torch, stored_dtype(subject.merged)))  # ``state`` keeps its own
    try:
        save_with_base(model, base.folder, None)
        tokenizer.save_pretrained(base.folder)
        copy_processor(str(subject.merged), None, base.folder)  # which converters of towers read
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the base, which the certificate compares with, cannot be written beside the export: "
            f"{first_line(error)}; --no-certificate exports without one"
        ) from error
    return base


def _load(run: RunFolder) -> Any:
    """The model of a folder with its weights as they are, computing in float32."""
    unknown = run.adapter and not run.recipe  # what it was trained in: nothing is rounded then
    dtype = torch.float32 if unknown else None
    return nn.Module.float(load_model_of(run, dtype=dtype)).eval()


def _results(subject: Subject, base: _Base | None, rows: HeldOut) -> dict[str, Scores]:
    """What each model computes."""

    def opened(folder: Path) -> Any:
        return _load(open_run(folder, consent=subject.run.consent))

    models: dict[str, Callable[[], Any]] = {}
    if base is not None:
        models["base"] = lambda: opened(base.folder)
    if subject.run.adapter:
        models["adapter"] = lambda: _load(subject.run)
    models["merged"] = lambda: opened(subject.merged)
    if not subject.is_plain:
        if base is not None:
            models["base, exported"] = lambda: subject.writer.load(base.export)
        models["exported"] = lambda: subject.writer.load(subject.export)
    results = {}
    for name, load in models.items():
        announce(f"computing with the {name} model")
        try:
            model = load()
        except RecipeError as error:
            if "exported" not in name:
                raise
            subject.unread = first_line(error)
            logits = _otherwise(subject, base.export if base and "base" in name else None, rows)
            if logits is not None:
                results[name] = scores(logits, rows)
            continue
        results[name] = scores(forward(model), rows)
        if name in ("adapter", "merged", "exported"):
            results[name].answers = answers(model, rows)
        del model
    return results


def _otherwise(subject: Subject, folder: Path | None, rows: HeldOut) -> Logits | None:
    """What another reader than transformers computes, by default from the export, if one does."""
    length = max(len(ids) for ids in (*(s.input_ids for s in rows.samples), *rows.prompts))
    try:
        logits = subject.writer.other_reader(folder or subject.export, length)
    except ValueError:  # it cannot read it, either
        return None
    return None if isinstance(logits, str) else logits


# --- the questions about tensors -----------------------------------------------------------------


def _merged_tensors(subject: Subject, base: _Base | None) -> AuditFinding:
    """Compare with W + delta in float32, which PEFT merges in memory."""
    if base is None or not subject.run.adapter:
        return AuditFinding("merged-tensors", "skipped", "the run trained the whole model")
    run, consent = subject.run, subject.run.consent
    reference = merged_in_memory(run, torch.float32, subject.dequantize).state_dict()
    merged = load_model_of(open_run(subject.merged, consent=consent)).state_dict()
    wrong: dict[str, str] = {}
    changed, lowest = 0, (1.0, "")
    for name in sorted({*reference, *merged}):
        value, exact = merged.get(name), reference.get(name)
        if value is None or exact is None:
            wrong[name] = "it is missing" if value is None else "the base has no such tensor"
            continue
        before = base.state.get(name)
        if before is None or before.shape != exact.shape or not torch.equal(before, exact):
            changed += 1
            problem, kept = _changed(before, exact, value)
            lowest = min(lowest, (kept, name))
        else:
            problem = compared(name, exact, {"": exact.to(value.dtype)}, value).problem
        if problem is not None:
            wrong[name] = problem
    wrong |= _unloaded(subject, reference)
    figures = {"tensors": len(reference), "changed": changed, "least_of_a_change": lowest[0]}
    found = f"{len(reference)} tensors, {changed} of them changed by the adapter"
    if lowest[0] < 0.9:
        found += f"; rounding keeps {lowest[0]:.0%} of the change of {lowest[1]}"
    return _finding("merged-tensors", wrong, found, figures)


def _changed(before: Tensor | None, exact: Tensor, value: Tensor) -> tuple[str | None, float]:
    """The problem of a tensor that the adapter changes, and the share of the change that it has.

    Each number may be off by the roundings of W, of the change and of their sum; together they
    must have as much of the change as the exact sum has when it is rounded once.
    """
    if value.shape != exact.shape:
        sizes = [" x ".join(map(str, t.shape)) for t in (value, exact)]
        return f"it is {sizes[0]}, and should be {sizes[1]}", 0.0
    if before is None or before.shape != exact.shape:  # replaced, or grown
        return compared("", exact, {"": exact.to(value.dtype)}, value).problem, 1.0
    if problem := not_finite(value, exact):
        return problem, 0.0
    step = torch.finfo(value.dtype).eps
    change, read, once = exact - before, value.float(), exact.to(value.dtype).float()
    size = float(change.double().square().sum())
    kept, should = (float(((t - before).double() * change).sum()) / size for t in (read, once))
    # rounding errors are independent of the change: their projection has this spread
    noise = float((once - exact).double().square().mean() / size) ** 0.5
    over = (read - exact).abs() > step * (exact.abs() + change.abs()) + 8 * 1.2e-7 * before.abs()
    if bool(over.any()) or abs(kept - should) > 0.1 + 4 * noise:
        what = f"it has {kept:.0%} of the adapter's change, and should have {should:.0%}"
        square = value.ndim == 2 and value.shape[0] == value.shape[1]
        if square and (read.T - exact).norm() < (read - exact).norm() / 2:
            what += "; it is transposed"
        return f"{what}; {int(over.sum()):,} of {over.numel():,} numbers are off", kept
    return None, kept


def _unloaded(subject: Subject, known: Mapping[str, Tensor]) -> dict[str, str]:
    """Problems of what the base's files have and its class does not load, bit for bit."""
    run = subject.run
    theirs = base_files(run.base_model, run.recipe.get("revision_of_model"))
    if theirs is None:
        return {}
    ours = BaseFiles(sorted(subject.merged.glob("*.safetensors")))
    meta = meta_model_of(open_run(subject.merged, consent=run.consent))
    names, wrong = names_in_model(meta, theirs.shapes), {}
    for key in untrained(meta, theirs.shapes):
        if names[key] in known:
            continue
        value = ours.read(key) if key in ours.shapes else None
        exact = theirs.read(key)
        kept = exact if value is None else exact.to(value.dtype)
        problem = compared(key, exact, {"": kept}, value).problem
        if problem is not None:
            wrong[key] = problem
    return wrong


def _exported_tensors(subject: Subject) -> AuditFinding:
    if subject.is_plain:
        return AuditFinding("exported-tensors", "skipped", "the merged model is the export")
    wrong, kinds, largest, unjudged = {}, dict[str, int](), (0.0, ""), 0
    try:
        for one in subject.writer.compare(subject.merged, subject.export):
            kinds[one.kind] = kinds.get(one.kind, 0) + 1
            largest = max(largest, (one.error or 0.0, one.name))
            unjudged += not one.is_judged
            if one.problem is not None:
                wrong[one.name] = one.problem
    except ValueError as error:
        return AuditFinding("exported-tensors", "skipped", first_line(error))
    of = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind)
    figures = {"tensors": kinds, "largest_error": largest[0], "of": largest[1]}
    if unjudged and not wrong:
        reason = (
            f"of {unjudged} tensors only the shape is right for sure: no quantizer for Python "
            "(llama-cpp-python) and no base tell what they should be"
        )
        return AuditFinding("exported-tensors", "skipped", reason, figures=figures)
    return _finding("exported-tensors", wrong, of, figures)


def _finding(
    check: str, wrong: Mapping[str, str], found: str, figures: dict[str, Any] | None = None
) -> AuditFinding:
    """A pass that says what was ``found``, or a failure that names each problem's subject."""
    if not wrong:
        return AuditFinding(check, "pass", found, figures=figures or {})
    name, problem = next(iter(wrong.items()))
    more = f"; and {len(wrong) - 1} more are wrong" if len(wrong) > 1 else ""
    reason = f"{name}: {problem}{more}"
    return AuditFinding(
        check, "fail", reason, tuple(wrong), CHECKS[check].advice,
        {**(figures or {}), "wrong": wrong},
    )  # fmt: skip


# --- the questions about texts -------------------------------------------------------------------


def _texts(subject: Subject, ours: Any, rows: HeldOut) -> Iterator[AuditFinding]:
    read = subject.writer.tokenizer(subject.export, ours)
    texts = [*_TEXTS, *(ours.decode(s.input_ids) for s in rows.samples[:5])]
    wrong = {
        repr(text[:40]): "it has other tokens"
        for text in texts
        if read.encode(text) != ours(text, add_special_tokens=False)["input_ids"]
    }
    ends = stop_tokens(None, ours, ChatPrompt.of(subject.run.recipe).variables)
    if read.end not in ends:
        wrong["the end of texts"] = f"it is token {read.end}, and should be one of {ends}"
    yield _finding("tokenizer", wrong, f"{len(texts)} texts have the same tokens")
    if ours.chat_template is None:
        yield AuditFinding("chat-template", "skipped", "the run has none")
    else:
        problem = "it is missing" if read.template is None else "it is another one"
        wrong = {} if read.template == ours.chat_template else {"chat_template": problem}
        yield _finding("chat-template", wrong, "it is the run's")


# --- the questions about what models compute -----------------------------------------------------


def _judged(
    subject: Subject, base: _Base | None, results: dict[str, Scores], rows: HeldOut,
    validated: bool,
) -> Iterator[AuditFinding]:  # fmt: skip
    trained = results.get("adapter") or results["merged"]
    if validated:
        yield _recorded(subject, base, results, trained, rows)
    else:
        yield AuditFinding(
            "recorded-loss", "skipped", "the rows are not those of the run's validation"
        )
    yield _gain(results, rows)
    if subject.is_plain:
        return
    if "exported" not in results:
        yield AuditFinding("format-cost", "skipped", subject.unread)
    elif "base, exported" not in results:
        yield AuditFinding("format-cost", "skipped", "there is no base to measure its own cost on")
    else:
        found = _cost(results)
        if not results["exported"].answers:  # transformers could not read it
            found = replace(
                found, reason=f"{found.reason}, as llama.cpp computes ({subject.unread})"
            )
        yield found
    yield from _other_reader(subject, results, rows)


def _recorded(
    subject: Subject, base: _Base | None, results: Mapping[str, Scores], trained: Scores,
    rows: HeldOut,
) -> AuditFinding:  # fmt: skip
    """Compare with the losses that the run recorded: in its own dtype, in packs, on all rows."""
    run = subject.run
    if key := next((k for k in ("export_format", "qat") if run.recipe.get(k)), None):
        reason = f"the run validated with weights that {key} rounds, and these are not rounded"
        return AuditFinding("recorded-loss", "skipped", reason)
    before, after = (float(run.facts[f"val_loss_{w}"]) for w in ("before", "after"))
    asked = [("trained model", after, trained, run)]
    if base is not None:
        kept = open_run(base.folder, consent=run.consent)
        asked.insert(0, ("base", before, results["base"], kept))
    wrong, notes = {}, list[str]()
    for name, recorded, one, folder in asked:
        limit = 0.1 * abs(before - after) + 0.01 * before + 3 * rows.spread(one.losses)
        if abs(one.loss - recorded) <= limit:  # nan is not
            continue
        model = load_model_of(folder)
        dtype, loss = model.dtype, one.loss
        # what was trained and validated in 16 bits can have quite another loss in float32
        if dtype in (torch.bfloat16, torch.float16):
            loss = scores(forward(model), rows).loss
        del model
        precision = str(dtype).removeprefix("torch.")
        if abs(loss - recorded) <= limit:
            notes.append(
                f"{name} has its loss in {precision} only: {loss:.4f}, in float32 {one.loss:.4f}"
            )
        else:
            wrong[name] = (
                f"its loss is {loss:.4f} (in {precision}), and the run recorded {recorded:.4f}; "
                f"they may differ by {limit:.4f}"
            )
    found = f"{before:.4f} before and {after:.4f} after training"
    return _finding("recorded-loss", wrong, "; the ".join([found, *notes]))


def _gain(results: Mapping[str, Scores], rows: HeldOut) -> AuditFinding:
    if not rows.samples:
        return AuditFinding("merged-gain", "skipped", "there are no rows; name some: --data FILE")
    if "base" not in results or "adapter" not in results:
        return AuditFinding("merged-gain", "skipped", "there is no adapter and base to compare")
    gain, error = cost(results["adapter"], results["base"])
    if gain <= 2 * error:
        return AuditFinding(
            "merged-gain", "skipped", f"training gained nothing here: {gain:.4f} nats"
        )
    kept = share(results, "merged")
    wrong = {} if kept is None or kept >= 0.9 else {"the merged model": f"it keeps {kept:.0%}"}
    return _finding("merged-gain", wrong, f"{kept:.1%} of {gain:.4f} nats", {"gain": gain})


def share(results: Mapping[str, Scores], name: str) -> float | None:
    """The share of what training gained that a model keeps; None where that cannot be said."""
    base, trained = results.get("base"), results.get("adapter") or results.get("merged")
    if base is None or trained is None or name not in results:
        return None
    gain, error = cost(trained, base)
    return (base.loss - results[name].loss) / gain if gain > 2 * error else None


def _cost(results: Mapping[str, Scores]) -> AuditFinding:
    paid, error = cost(results["merged"], results["exported"])
    own, own_error = cost(results["base"], results["base, exported"])
    far = distance(results["merged"], results["exported"])
    base = distance(results["base"], results["base, exported"])
    # rounding may happen to help on some rows; the divergence is what it costs on average
    expected, noise = max(abs(own), base.kl), 2 * (error + own_error)
    allowed = FACTOR * expected + noise
    figures = {"cost": paid, "on_the_base": own, "allowed": allowed, "noise": noise, "kl": far.kl,
               "kl_on_the_base": base.kl, "largest_logit_error": far.largest,
               "same_next_token": far.same, "same_on_the_base": base.same}  # fmt: skip
    found = (
        f"it costs {paid:+.4f} nats a token; the limit is {allowed:.4f}, which is {FACTOR:g} times "
        f"what it costs the base ({_of_base(own, base.kl)}) and two standard errors ({noise:.4f})"
    )
    wrong = {} if paid <= allowed else {"the export": found}
    return _finding("format-cost", wrong, found, figures)


def _of_base(cost: float, divergence: float) -> str:
    return f"loss {cost:+.4f}" if abs(cost) > divergence else f"divergence {divergence:.4f}"


def _other_reader(
    subject: Subject, results: Mapping[str, Scores], rows: HeldOut
) -> Iterator[AuditFinding]:
    """What llama.cpp computes, on the first rows; it rounds activations to 8 bits."""
    ours = results.get("exported")
    if ours is None or not ours.answers:  # which transformers could not read
        return
    some, tokens = list[Any](), 0
    for sample in rows.samples:
        if tokens + len(sample.input_ids) > _LLAMA_TOKENS:
            break
        some.append(sample)
        tokens += len(sample.input_ids)
    length = max((len(s.input_ids) for s in some), default=0)
    try:
        logits = subject.writer.other_reader(subject.export, length)
    except ValueError as error:
        if some:
            yield _finding("llama-cpp", {"llama.cpp": first_line(error)}, "")
            return
        logits = first_line(error)
    if not isinstance(logits, str) and not some:
        long = f"the first row has more than {_LLAMA_TOKENS:,} tokens"
        logits = long if rows.samples else "there are no rows"
    if isinstance(logits, str):
        if logits:
            yield AuditFinding("llama-cpp", "skipped", logits)
        return
    theirs = scores(logits, HeldOut(rows.what, some, []))
    count = len(theirs.losses)
    loss, expected = theirs.loss, float(ours.losses[:count].double().mean())
    found = f"its loss is {loss:.4f} on {count} tokens, and that of transformers {expected:.4f}"
    wrong = {} if abs(loss - expected) <= 0.02 * expected else {"llama.cpp": found}
    yield _finding("llama-cpp", wrong, found, {"loss": loss, "of_transformers": expected})


# --- the record ----------------------------------------------------------------------------------


def _facts(subject: Subject, results: Mapping[str, Scores], rows: HeldOut) -> dict[str, Any]:
    last = results.get("exported") or results["merged"]
    reference = results.get("adapter") or results["merged"]
    return {
        "rows": {"what": rows.what, "samples": len(rows.samples), "trained_tokens": rows.count},
        "models": {
            name: {
                "loss": one.loss if rows.samples else None,
                "gain_kept": share(results, name),
                **asdict(distance(reference, one)),
            }
            for name, one in results.items()
        },
        "gain_kept": share(results, "exported" if "exported" in results else "merged"),
        "greedy": {
            "prompts": len(rows.prompts) if last.answers else 0,
            "same_as_the_trained_model": sum(
                a == b for a, b in zip(reference.answers, last.answers, strict=False)
            ),
            "tokens": {n: one.answers for n, one in results.items() if one.answers},
        },
    }
