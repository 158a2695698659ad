"""One training run, from the recipe to the report."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..errors import DataError, RecipeError
from . import card, export, page, report
from .chat import Sample, encode
from .data import Chat, read_chats, split
from .meter import Meter, flops_per_token, mean_context, peak_flops
from .model import add_adapter, load_model, load_tokenizer, parameters, quiet
from .packing import Pack, count, leaks, pack
from .recipe import Recipe
from .report import RunResult
from .signals import Interrupts, Stopped
from .status import told
from .trainer import batches, make_trainer, validation_loss


class Run:
    """One run of one recipe.

    - everything that can be wrong with the recipe and the rows is found before weights are loaded;
    - validation before and after, and one question answered before and after;
    - the model is optimized in place, trained by transformers' Trainer, and restored;
    - the saved adapter is loaded again by plain PEFT and compared;
    - Ctrl-C, SIGTERM or SIGHUP end it after a whole step, with a usable adapter.

    Args:
        recipe: checked, with absolute paths.
        console: where to print.
    """

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.recipe = recipe
        self.console = console
        self.folder = Path(recipe.output_dir)
        self.result = RunResult(
            output_dir=self.folder,
            recipe=recipe.model_dump(mode="json"),
            versions=report.versions(),
            machine=report.machine(),
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    def run(self) -> RunResult:
        """Do all of it, in order.

        Raises:
            RecipeError: the recipe cannot be run.
            DataError: a dataset cannot be used.
            Stopped: a signal came before the first step was done, or a second one came.
        """
        export.check_output(self.folder, self.recipe.overwrite_output_dir)
        for line in told(self.recipe):
            self._say(line)
        with Interrupts() as interrupts, quiet():
            with self._timed("data"):
                chats = read_chats(self.recipe.datasets)
                parts = split(chats, self.recipe.val_set_size, self.recipe.seed)
            with self._timed("load"):
                tokenizer = load_tokenizer(self.recipe)
                packs, validation = self._prepare(parts, tokenizer)
                model = self._model()
            self._before(model, tokenizer, validation)
            export.clear_output(self.folder)
            self._train(model, tokenizer, packs, validation, interrupts)
            try:
                self._explain(model)
                if self.result.status == "finished":
                    self._after(model, tokenizer, packs, validation)
            except Stopped as stopped:  # what was trained has been saved
                self.result.status, self.result.signal = "interrupted", stopped.signal
            self._finish()
        return self.result

    # --- in the order of `run` -------------------------------------------------------------------

    def _prepare(
        self, parts: tuple[list[Chat], list[Chat]], tokenizer: Any
    ) -> tuple[list[Pack], list[dict[str, torch.Tensor]]]:
        """Tokens, packs and validation batches."""
        recipe, data = self.recipe, self.result.data
        data["rows"] = sum(map(len, parts))
        data["too_long"] = data["nothing_to_train"] = 0
        kept = [self._kept(part, encode(part, tokenizer, recipe.train_on_inputs)) for part in parts]
        if not kept[0]:
            raise DataError("no row is left to train on: all are too long or have nothing to train")
        made = [
            pack(s, recipe.sequence_len) if recipe.sample_packing else [[x] for x in s]
            for s in kept
        ]
        for name, samples, packs in zip(("train", "validation"), kept, made, strict=True):
            data[f"{name}_samples"], data[f"{name}_sequences"] = len(samples), len(packs)
            data[f"{name}_tokens"], data[f"{name}_trained_tokens"] = count(packs)
        self._say(
            f"data: {data['rows']:,} rows, of them {data['validation_samples']:,} for validation; "
            f"{data['train_sequences']:,} sequences, {data['train_tokens']:,} tokens, "
            f"{data['train_trained_tokens']:,} trained; dropped {data['too_long']} too long, "
            f"{data['nothing_to_train']} with nothing to train"
        )
        return made[0], batches(made[1], recipe, export.pad_token(tokenizer))

    def _kept(self, chats: Sequence[Chat], samples: list[Sample]) -> list[Sample]:
        """The samples that can be trained on, by the recipe's rule for long ones."""
        limit, kept = self.recipe.sequence_len, []
        for chat, sample in zip(chats, samples, strict=True):
            if len(sample.input_ids) > limit:
                if self.recipe.excess_length_strategy == "raise":
                    raise DataError(
                        f"{chat.where}: {len(sample.input_ids)} tokens, and sequence_len is {limit}"
                    )
                self.result.data["too_long"] += 1
                if self.recipe.excess_length_strategy == "drop":
                    continue
                sample = Sample(sample.input_ids[:limit], sample.labels[:limit])
            if sample.trained:
                kept.append(sample)
            else:
                self.result.data["nothing_to_train"] += 1
        return kept

    def _model(self) -> Any:
        """The model with its adapters, seeded and checked."""
        from transformers import set_seed

        model = load_model(self.recipe)
        if self.recipe.sample_packing and leaks(model, model.config.vocab_size, model.device):
            raise RecipeError(
                f"sample_packing: {type(model).__name__} lets the samples of a pack see each "
                "other; set it to false"
            )
        set_seed(self.recipe.seed)
        model = add_adapter(model, self.recipe)
        trained, total = parameters(model)
        self.result.parameters = {"trained": trained, "total": total}
        self.result.loaded_rss_mb = report.rss_mb()
        self._say(
            f"model: {self.recipe.base_model}, {total / 1e6:,.1f}M parameters "
            f"({trained / 1e6:,.2f}M trained), {model.dtype} on {model.device}"
        )
        return model

    def _before(
        self, model: Any, tokenizer: Any, validation: list[dict[str, torch.Tensor]]
    ) -> None:
        """Answer and validate, and optimize."""
        recipe = self.recipe
        if recipe.sample_prompt:
            self._say(f"answering: {recipe.sample_prompt}")
            with self._timed("answer before"):
                text = export.answer(
                    model, tokenizer, recipe.sample_prompt, recipe.sample_max_tokens
                )
            self.result.sample = {"question": recipe.sample_prompt, "before": text}
        if recipe.optimize:
            from ..pipeline import optimize

            optimize(model, codegen=recipe.codegen, memory=recipe.memory, strict=recipe.strict)
        if validation:
            self._say(f"validating on {self.result.data['validation_samples']} rows")
            with self._timed("validation before"):
                self.result.val_loss_before = validation_loss(model, validation)
            self._say(f"validation loss before: {self.result.val_loss_before:.3f}")

    def _train(
        self,
        model: Any,
        tokenizer: Any,
        packs: list[Pack],
        validation: list[dict[str, torch.Tensor]],
        interrupts: Interrupts,
    ) -> None:
        """The optimizer steps; saves what they made."""
        result = self.result
        context = mean_context([len(s.input_ids) for p in packs for s in p])
        meter = Meter(
            flops=flops_per_token(model, context), peak=peak_flops(model.device, model.dtype)
        )
        trainer = make_trainer(
            model, self.recipe, packs, validation, export.pad_token(tokenizer),
            meter, interrupts, self.console,
        )  # fmt: skip
        result.steps_planned = trainer.args.max_steps
        first = "; the first one compiles, which can take a minute" if self.recipe.optimize else ""
        self._say(f"training for {result.steps_planned} steps{first}")
        with self._timed("training"), interrupts.patiently():
            trainer.train()
        result.steps = trainer.state.global_step
        if interrupts.signal is not None:
            if not result.steps:
                raise Stopped(interrupts.signal)
            result.status, result.signal = "interrupted", interrupts.signal
        with self._timed("saving"), interrupts.patiently():
            export.save(model, tokenizer, self.folder)
        result.tokens, result.trained_tokens = sum(meter.tokens), sum(meter.trained)
        result.tokens_per_s = meter.rate(meter.tokens)
        result.trained_tokens_per_s = meter.rate(meter.trained)
        result.first_step_s, result.median_step_s = meter.seconds[0], meter.median_step()
        result.history = [e for e in trainer.state.log_history if "loss" in e or "eval_loss" in e]
        losses = [e["loss"] for e in result.history if "loss" in e]
        if losses:
            result.loss_first, result.loss_last = losses[0], losses[-1]

    def _explain(self, model: Any) -> None:
        """Report what was rewritten in the graphs that trained."""
        if self.recipe.optimize:
            from ..pipeline import explain

            found = explain(model)
            self.result.optimize = found.to_dict()
            self._say(str(found))

    def _after(
        self,
        model: Any,
        tokenizer: Any,
        packs: list[Pack],
        validation: list[dict[str, torch.Tensor]],
    ) -> None:
        """Validate, check the saved adapter, answer."""
        recipe, result = self.recipe, self.result
        if validation:
            self._say("validating again")
            with self._timed("validation after"):
                result.val_loss_after = validation_loss(model, validation)
        if recipe.adapter:
            with self._timed("adapter check"):
                probe = batches(packs[:1], recipe, export.pad_token(tokenizer))[0]
                model, check = export.check_adapter(model, recipe.optimize, self.folder, probe)
            result.adapter_check = asdict(check)
        if result.sample:
            with self._timed("answer after"):
                text = export.answer(
                    model, tokenizer, result.sample["question"], recipe.sample_max_tokens
                )
            result.sample["after"] = text

    def _finish(self) -> None:
        """The files and lines that sum it up."""
        result = self.result
        for step, loss in ((0, result.val_loss_before), (result.steps, result.val_loss_after)):
            if loss is not None and not self._logged(step):
                result.history.append({"step": step, "eval_loss": loss})
        result.history.sort(key=lambda entry: entry["step"])
        export.plot(result.history, self.folder / "loss.png")
        result.peak_rss_mb = report.peak_rss_mb()
        if torch.cuda.is_available():
            result.peak_cuda_mb = torch.cuda.max_memory_allocated() / 2**20
        result.write()
        page.write(result, self.folder)
        card.write(result, self.folder)
        result.print(self.console)
        if result.status == "interrupted":
            kind = "adapter" if self.recipe.adapter else "model"
            self._say(
                f"\nStopped at step {result.steps} of {result.steps_planned}; the {kind} of that "
                f"step is in {self.folder}"
            )

    # --- small help ------------------------------------------------------------------------------

    def _logged(self, step: int) -> bool:
        return any(e["step"] == step and "eval_loss" in e for e in self.result.history)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.result.seconds[part] = time.perf_counter() - begun


def run(recipe: Recipe, console: Console | None = None) -> RunResult:
    """Run ``recipe``; see ``fusewright.train.train``."""
    return Run(recipe, console or Console()).run()
