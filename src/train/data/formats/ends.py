"""That a model which is trained on these rows learns to stop."""

from __future__ import annotations

from typing import Any

from ....errors import DataError
from ..chat.encoder import ChatEncoder
from ..chat.mask import Rules


def require_ends(
    path: str, tokenizer: Any, chats: ChatEncoder | None, ends: set[int], trained: set[int]
) -> None:
    """See that the tokens that end turns are trained.

    Args:
        path: the dataset, for messages.
        tokenizer: whose tokens they are.
        chats: what has encoded its conversations; None: it has none.
        ends: tokens that end a trained turn.
        trained: those of them, and of those that are watched, that are trained.

    Raises:
        DataError: one is never trained; the message names it.
    """
    rules = chats.rules if chats else Rules()
    if rules.everything:
        return
    eos = tokenizer.eos_token_id
    wanted = set(chats.masker.eot if chats else ()) | ends
    if chats and not wanted and eos is not None:
        wanted = {eos}
    policies = {t: rules.eos if t == eos else rules.eot for t in wanted}
    for token in sorted(wanted - trained):
        if policies[token] == "none":
            continue
        text = tokenizer.convert_ids_to_tokens(token)
        where = "that follows answers" if token in ends else "that should end answers"
        raise DataError(
            f"{path}: no row trains {text!r}, the token {where}, so the model would never "
            "learn to stop: let the chat template write it right after the answer (and in its "
            "generation marks, if it has any), name the token that ends turns in eot_tokens, "
            "or set train_on_eos: none for this dataset"
        )
