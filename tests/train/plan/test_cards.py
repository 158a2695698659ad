"""What a run gets, as written on the command line."""

from __future__ import annotations

import pytest

from fusewright.errors import RecipeError
from fusewright.memory.budget import GB
from fusewright.train.plan.cards import parse_card, parse_devices


@pytest.mark.parametrize(
    ("text", "count", "name", "gib"),
    [
        ("8xH100", 8, "H100", 80),
        ("h100", 1, "H100", 80),
        ("2 x A100-40gb", 2, "A100-40GB", 40),
        ("8x80GB", 8, "80GB", 80),
        ("24GB", 1, "24GB", 24),
        ("1024xB200", 1024, "B200", 180),
        ("2xA100-80GB", 2, "A100", 80),
        ("4090", 1, "RTX4090", 24),
    ],
)
def test_devices(text: str, count: int, name: str, gib: int) -> None:
    found = parse_devices(text)
    assert (found.count, found.card.name, found.card.memory) == (count, name, gib * GB)


def test_a_size_is_as_fast_as_the_slowest_card_that_has_it() -> None:
    card = parse_devices("8x80GB").card
    assert card.assumed
    assert card.flops == parse_devices("A100").card.flops


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8xH1000", "did you mean H100"),
        ("0xH100", "at least one device"),
        ("8xquantum", "there are T4"),
        ("", "is not known here"),
    ],
)
def test_mistakes(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_devices(text)


def test_a_card_of_ones_own() -> None:
    card = parse_card("name=X,memory=48,tflops=100,bandwidth=900,link=50,network=12")
    assert (card.memory, card.flops, card.link) == (48 * GB, 1e14, 50e9)
    assert parse_devices("4xX", card).card is card


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name=X,memory=48", "needs tflops"),
        ("name=X,memory=48,tflops=fast", "could not convert"),
        ("name=X,memory=48,tflops=100,speed=3", "no field 'speed'"),
        ("name=X,memory=-48,tflops=100", "must be positive"),
    ],
)
def test_mistakes_in_a_card(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_card(text)
