"""The devices that a run may be planned for: memory, speed, and connections."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ...errors import RecipeError, did_you_mean
from ...memory.budget import GB

_GB_S = 10**9
"""Bytes in a GB/s, which is decimal in data sheets; 1 GB of memory is ``memory.budget.GB``."""


@dataclass(frozen=True)
class Card:
    """One device.

    Attributes:
        memory: in bytes.
        flops: peak of dense matrix products in bfloat16 (float16 where there is none), per second.
        bandwidth: of its memory, in bytes per second.
        link: to the other cards of a machine, in bytes per second and direction.
        network: to other machines, for each card, in bytes per second and direction.
        assumed: whether the name is unknown, so that only the memory is known.
        bfloat16: whether it has instructions for it.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float
    assumed: bool = False
    bfloat16: bool = True


def _card(
    name: str, memory: int, tflops: float, bandwidth: float, link: float, network: float = 50,
    bfloat16: bool = True,
) -> Card:  # fmt: skip
    return Card(
        name, memory * GB, tflops * 1e12, bandwidth * _GB_S, link * _GB_S, network * _GB_S,
        bfloat16=bfloat16,
    )  # fmt: skip


CARDS = {
    card.name: card
    for card in (
        # sold as 16, of which a part is for correcting errors
        _card("T4", 15, 65, 320, 12, 3, bfloat16=False),
        _card("V100", 32, 125, 900, 150, 12, bfloat16=False),
        _card("A10", 24, 125, 600, 25, 12),
        _card("L4", 24, 121, 300, 25, 12),
        _card("RTX3090", 24, 71, 936, 25, 3),
        _card("RTX4090", 24, 165, 1008, 25, 3),
        _card("RTX5090", 32, 210, 1792, 50, 3),
        _card("A6000", 48, 155, 768, 25, 12),
        _card("L40S", 48, 362, 864, 25, 12),
        _card("A100-40GB", 40, 312, 1555, 300, 25),
        _card("A100", 80, 312, 2039, 300, 25),
        _card("H100", 80, 989, 3350, 450),
        _card("H200", 141, 989, 4800, 450),
        _card("B200", 180, 2250, 8000, 900),
        _card("MI300X", 192, 1307, 5300, 448),
    )
}
"""Peaks of the vendors' data sheets, without sparsity."""

CARDS_OF_A_MACHINE = 8


@dataclass(frozen=True)
class Devices:
    """The devices of a run: ``count`` of the same card."""

    count: int
    card: Card

    def __str__(self) -> str:
        """As on the command line."""
        return f"{self.count}x{self.card.name}"


_WRITTEN = re.compile(r"(?:(\d+)\s*[xX*]\s*)?(.+)")
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)", re.IGNORECASE)


def parse_devices(text: str, custom: Card | None = None) -> Devices:
    """Read ``8xH100``, ``8x80GB`` or ``24GB``; ``custom`` is a card that the user has defined.

    Raises a RecipeError if there is no such card.
    """
    match = _WRITTEN.fullmatch(text.strip())
    count, name = (match.group(1), match.group(2).strip()) if match else (None, text)
    number = int(count or 1)
    if number < 1:
        raise RecipeError(f"--gpus {text}: a run needs at least one device")
    if custom is not None and name == custom.name:
        return Devices(number, custom)
    memory = _MEMORY.fullmatch(name)
    if memory is not None:
        return Devices(number, of_size(int(float(memory.group(1)) * GB), name))
    cards = {key.lower(): card for key, card in CARDS.items()}
    plain = name.lower().replace(" ", "").replace("_", "-").replace("rtx-", "rtx")
    by_size = next((c for c in CARDS.values() if plain == f"{c.name.lower()}-{_size(c)}gb"), None)
    card = cards.get(plain) or cards.get(f"rtx{plain}") or by_size
    if card is None:
        hint = did_you_mean(name, list(CARDS)) or f"there are {', '.join(CARDS)}"
        raise RecipeError(
            f"--gpus {text}: the card {name!r} is not known here; write its memory, as in 8x80GB, "
            f"or describe it with --card; {hint}"
        )
    return Devices(number, card)


def _size(card: Card) -> int:
    return card.memory // GB


def of_size(memory: int, name: str) -> Card:
    """A card of which only the memory is known: as fast as the slowest that has as much."""
    enough = [c for c in CARDS.values() if c.memory >= memory] or list(CARDS.values())
    like = min(enough, key=lambda c: (c.memory, c.flops))
    return replace(like, name=name, memory=memory, assumed=True, bfloat16=True)


_FIELDS = ("name", "memory", "tflops", "bandwidth", "link", "network")


def parse_card(text: str) -> Card:
    """Read ``name=X,memory=48,tflops=100,bandwidth=900,link=50,network=12`` (GB, GB/s).

    Raises a RecipeError if a field is missing, unknown, or no number.
    """
    fields = dict(part.partition("=")[::2] for part in text.split(",") if part.strip())
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    unknown = [key for key in fields if key not in _FIELDS]
    missing = [key for key in _FIELDS[:3] if key not in fields]
    if unknown or missing:
        problem = f"has no field {unknown[0]!r}" if unknown else f"needs {', '.join(missing)}"
        raise RecipeError(f"--card: {problem}; it is written as {_EXAMPLE}")
    try:
        sizes = [float(fields.get(key, default)) for key, default in _DEFAULTS.items()]
    except ValueError as error:
        raise RecipeError(f"--card: {error}; it is written as {_EXAMPLE}") from None
    if min(sizes) <= 0:
        raise RecipeError(f"--card: numbers must be positive; it is written as {_EXAMPLE}")
    memory, tflops, bandwidth, link, network = sizes
    return Card(
        fields["name"], int(memory * GB), tflops * 1e12, bandwidth * _GB_S, link * _GB_S,
        network * _GB_S,
    )  # fmt: skip


_DEFAULTS: dict[str, float | str] = {
    "memory": "", "tflops": "", "bandwidth": 900, "link": 25, "network": 12,
}  # fmt: skip
_EXAMPLE = "name=X,memory=48,tflops=100,bandwidth=900,link=50,network=12 (GB, TFLOP/s, GB/s)"
