"""Keys of preference methods in a recipe without such a method, which reads none of them.

Recipes are often made from others, and keep their keys. A value that no method could take is no
mistake then: there is nothing that would take it.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, create_model

from ..base import Float, Int, Keys, UnreadKeys

METHOD_KEYS = ("rl", "reward_model", "process_reward_model")
"""The keys that ask for a method; each of them is read whatever the others say."""


def has_method(values: Any) -> bool:
    """Whether any of these keys asks for a method.

    Args:
        values: a mapping of a recipe's keys.
    """
    return any(values.get(key) for key in METHOD_KEYS)


def loose_types(*groups: type[Keys]) -> dict[str, TypeAdapter[Any]]:
    """What values must be where nothing reads them, by key: of the right type, within no limits.

    A key that has no limits is left out.

    Args:
        groups: the classes of ``trl`` and of ``vllm``, whose keys may have any value.
    """
    number = TypeAdapter[Any](Float | None)
    found = dict.fromkeys(_NUMBERS, number)
    found["num_labels"] = TypeAdapter(Int | None)
    found["dpo_loss_type"] = TypeAdapter(list[str] | str | None)
    found["dpo_loss_weights"] = TypeAdapter(list[Float] | None)
    for name, group in zip(("trl", "vllm"), groups, strict=True):
        fields: Any = {key: (Any, None) for key in group.model_fields}
        unread: Any = create_model(group.__name__, __base__=UnreadKeys, **fields)
        found[name] = TypeAdapter(unread | None)
    return found


_NUMBERS = (
    "rl_beta", "center_rewards_coefficient", "dpo_label_smoothing", "dpo_ld_alpha", "orpo_alpha",
    "cpo_alpha", "simpo_gamma", "kto_desirable_weight", "kto_undesirable_weight",
)  # fmt: skip
