"""Which tokens are trained: padding, placeholders, ends of turns, first and last tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .findings import AuditFinding
from .reference import Batch, core_of

TOKEN_CHECKS = ("trained-tokens", "end-of-turn", "row-ends")

_PLACEHOLDER = re.compile(r"(image|video|audio|vision|speech)\w*_token_(id|index)$")


class TokenRows(NamedTuple):
    """A batch's tokens (rows, length) on the CPU: which are trained, and which are no padding."""

    ids: Tensor
    trained: Tensor
    there: Tensor


def findings(model: nn.Module, batch: Batch, tokenizer: Any = None) -> Iterator[AuditFinding]:
    """Answer the questions about single tokens."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.shape != labels.shape:
        reason = "the batch has no input_ids and labels (rows, tokens)"
        yield from (AuditFinding(check, "skipped", reason) for check in TOKEN_CHECKS)
        return
    mask = batch.get("attention_mask")
    there = torch.ones_like(ids, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        there = mask.bool()
    rows = TokenRows(ids.cpu(), (labels != -100).cpu(), there.cpu())
    if not isinstance(mask, Tensor):
        rows = rows._replace(there=~_trailing(rows.ids, _pad_of(model, tokenizer)))
    yield _trained(rows, labels.cpu(), core_of(model))
    yield _ends(rows, _end_tokens(model, tokenizer), tokenizer)
    answers = batch.get("assistant_masks")
    if isinstance(answers, Tensor) and answers.shape == ids.shape:
        yield _by_mask(rows, answers.cpu().bool())
    else:
        yield _first_tokens(rows, tokenizer)


NOT_OF_THE_MODEL = ("assistant_masks", "seq_lengths")
"""What collators leave in a batch for themselves."""


def _by_mask(rows: TokenRows, answers: Tensor) -> AuditFinding:
    """Compare what is trained with the answers that a collator has marked."""
    check, (ids, trained, there) = "row-ends", rows
    spans = [(row, begin, stop) for row, begin, stop in _spans(answers & there)]
    wrong = [
        (row, at)
        for row, begin, stop in spans
        for at in (begin, stop - 1)
        if at and bool(trained[row, begin:stop].any()) and not bool(trained[row, at])
    ]
    if wrong:
        row, at = wrong[0]
        return AuditFinding(
            check, "fail",
            f"{len(wrong)} first or last tokens of {len(spans)} answers are not trained (first in "
            f"row {row}, token {at}: {int(ids[row, at])})",
            tuple(f"row {row}, token {at}" for row, at in wrong),
        )  # fmt: skip
    return AuditFinding(
        check, "pass", f"the first and last tokens of {len(spans)} answers are trained"
    )


def _trained(rows: TokenRows, labels: Tensor, core: Any) -> AuditFinding:
    check, (ids, trained, there) = "trained-tokens", rows
    count, all_there = int(trained.sum()), int(there.sum())
    if not count:
        return AuditFinding(check, "fail", f"none of {all_there} tokens is trained")
    clauses, subjects = [], []
    if empty := (~trained[:, 1:].any(1)).nonzero().flatten().tolist():
        clauses.append(f"{len(empty)} of {len(ids)} rows have no trained token")
        subjects += [f"row {row}" for row in empty]
    if padding := int((trained & ~there).sum()):
        clauses.append(f"{padding} tokens of padding are trained")
    for name, token in _placeholders(core).items():
        if number := int((trained & (ids == token)).sum()):
            at = (trained & (ids == token)).nonzero()
            clauses.append(
                f"{number} placeholders for other media ({name} is {token}) have labels, which "
                "should be -100"
            )
            subjects += [f"row {row}, token {place}" for row, place in at.tolist()]
    same = int((labels == ids)[trained].sum())
    shifted = trained[:, :-1] & (labels[:, :-1] == ids[:, 1:])
    if same < count / 2 and int(shifted.sum()) > 0.9 * int(trained[:, :-1].sum()):
        clauses.append(
            "the labels are shifted by one token already, and the model shifts them again: give it "
            "labels that are equal to input_ids"
        )
    if clauses:
        return AuditFinding(check, "fail", "; ".join(clauses), tuple(subjects))
    return AuditFinding(
        check, "pass", f"{count} of {all_there} tokens in {len(ids)} rows are trained",
        figures={"trained": count, "tokens": all_there, "rows": len(ids)},
    )  # fmt: skip


def _placeholders(core: Any) -> dict[str, int]:
    """Tokens that stand for other media, by the name in the configuration."""
    config = getattr(core, "config", None)
    values = vars(config) if config is not None else {}
    return {
        name: value
        for name, value in values.items()
        if _PLACEHOLDER.search(name) and isinstance(value, int) and value >= 0
    }


def _pad_of(model: nn.Module, tokenizer: Any) -> int | None:
    config = getattr(core_of(model), "config", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    return getattr(config, "pad_token_id", None) if pad is None else pad


def _trailing(ids: Tensor, pad: int | None) -> Tensor:
    """Padding at the ends of rows, by its token; one alone may be an end of turn."""
    if pad is None:
        return torch.zeros_like(ids, dtype=torch.bool)
    tail = (ids == pad).flip(1).cumprod(1).flip(1).bool()
    first = tail & ~torch.nn.functional.pad(tail[:, :-1], (1, 0))
    return tail & ~first


# --- ends of turns --------------------------------------------------------------------------------


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: of the tokenizer, and where generation stops."""
    core: Any = core_of(model)
    found: set[int] = set()
    for source in (tokenizer, getattr(core, "generation_config", None), _text_config(core)):
        ends = getattr(source, "eos_token_id", None)
        found |= {
            end for end in (ends if isinstance(ends, list | tuple) else [ends]) if end is not None
        }
    for token, content in _special(tokenizer).items():
        if re.search(r"end|eot|eos|</s>", content, re.IGNORECASE):
            found.add(token)
    return found


def _text_config(core: Any) -> Any:
    config = getattr(core, "config", None)
    inner = getattr(config, "get_text_config", None)
    return inner() if callable(inner) else config


def _special(tokenizer: Any) -> dict[int, str]:
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if not isinstance(added, dict):
        return {}
    return {token: str(each.content) for token, each in added.items() if each.special}


def _ends(rows: TokenRows, ends: set[int], tokenizer: Any) -> AuditFinding:
    check, (ids, trained, there) = "end-of-turn", rows
    if not ends:
        return AuditFinding(
            check, "skipped", "neither tokenizer nor configuration names an end token"
        )
    is_end = torch.isin(ids, torch.tensor(sorted(ends))) & there
    answers = good = 0
    untrained: list[tuple[int, int]] = []
    without: list[int] = []
    for row, begin, stop in _spans(trained):
        length = int(there[row].nonzero()[-1]) + 1 if bool(there[row].any()) else 0
        answers += 1
        if bool(is_end[row, max(begin, stop - 2) : stop].any()):
            good += 1  # a line break may follow it
        elif stop < length and bool(is_end[row, stop : stop + 2].any()):
            untrained.append((row, stop if bool(is_end[row, stop]) else stop + 1))
        elif stop < ids.shape[1] and length and begin > int(there[row].nonzero()[0]):
            without.append(row)
    if untrained:
        row, at = untrained[0]
        return AuditFinding(
            check, "fail",
            f"the token that ends the answer is not trained in {len(untrained)} of {answers} "
            f"answers (first in row {row}, token {at}: {_word(int(ids[row, at]), tokenizer)})",
            tuple(f"row {row}, token {at}" for row, at in untrained),
        )  # fmt: skip
    if without and not good:
        return AuditFinding(
            check, "fail",
            f"{len(without)} of {answers} answers end without a token that ends them (first in row "
            f"{without[0]})", tuple(f"row {row}" for row in without),
            "end each answer with the template's end of turn, or with eos_token",
        )  # fmt: skip
    if not good:
        return AuditFinding(check, "skipped", f"none of {answers} answers ends within its row")
    return AuditFinding(check, "pass", f"{good} of {answers} answers end with a trained end token")


def _spans(trained: Tensor) -> Iterator[tuple[int, int, int]]:
    """The answers: row, first token, and the one after the last."""
    for row, line in enumerate(trained.tolist()):
        begin = None
        for at, on in enumerate([*line, False]):
            if on and begin is None:
                begin = at
            elif not on and begin is not None:
                yield row, begin, at
                begin = None


def _word(token: int, tokenizer: Any) -> str:
    if tokenizer is None:
        return str(token)
    return f"{token}, {tokenizer.decode([token])!r}"


def _first_tokens(rows: TokenRows, tokenizer: Any) -> AuditFinding:
    check, (ids, trained, there) = "row-ends", rows
    header = _header(tokenizer)
    if not header:
        return AuditFinding(
            check, "skipped", "where answers begin is known from a tokenizer with a chat template "
            "alone: give tokenizer=",
        )  # fmt: skip
    late, early, answers = [], [], 0
    for row, line in enumerate(ids.tolist()):
        on = trained[row].tolist()
        for at in range(len(line) - len(header)):
            if line[at : at + len(header)] != header:
                continue
            first = at + len(header)
            if not any(on[first : first + 4]) or not bool(there[row, first]):
                continue
            answers += 1
            if not on[first]:
                late.append((row, first))
            elif on[first - 1] and not on[at - 1 if at else 0] and not all(on[at:first]):
                early.append((row, first - 1))
    if late or early:
        where, words = (late, "the first token of the answer is not trained") if late else (
            early, "the last token before the answer is trained",
        )  # fmt: skip
        row, at = where[0]
        return AuditFinding(
            check, "fail",
            f"{words} in {len(where)} of {answers} answers (first in row {row}, token {at}: "
            f"{_word(int(ids[row, at]), tokenizer)})",
            tuple(f"row {row}, token {at}" for row, at in where),
        )  # fmt: skip
    if not answers:
        return AuditFinding(check, "skipped", "no answer of the chat template begins in the batch")
    return AuditFinding(check, "pass", f"the first tokens of {answers} answers are trained")


def _header(tokenizer: Any) -> list[int]:
    """The tokens that the chat template puts before an answer."""
    if getattr(tokenizer, "chat_template", None) is None:
        return []
    turn = [{"role": "user", "content": "a"}]

    def tokens(add: bool) -> list[int]:
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=add, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    without, header = tokens(False), tokens(True)
    return header[len(without) :] if header[: len(without)] == without else []
