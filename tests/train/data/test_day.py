"""The date in chat templates: it is the run's, not the clock's, and part of a cache's name."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from fusewright.errors import RecipeError
from fusewright.train.data.chat.date import asks_for_day, today
from fusewright.train.data.chat.template import Template
from fusewright.train.data.formats.registry import Encoder
from fusewright.train.recipe.recipe import Dataset, Recipe

from ..conftest import CHATML, chat, make_tokenizer

DAY = "2026-10-05"
MESSAGES = chat("q", "a")["messages"]
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


class Fifth(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> Fifth:
        return cls(2026, 10, 5, tzinfo=tz)


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }}",
        "{{ strftime_now(format='%Y-%m-%d, %-d %B, %A %H:%M:%S') + '|' }}",
        "{{ strftime_now('100%%d %%%d%% %Q %') }}",
        "{{ strftime_now('no code') }}{{ strftime_now('') }}",
        "\n{{ strftime_now('%x') }}\n",  # its line breaks stay
        "  {% set a = strftime_now('%y') %}\n  {% if a %}\n  [{{ a }}]\n  {% endif %}\n",
        "{% set d = '%' ~ 'd' %}{{ strftime_now(d) | upper }}",
        "{% if strftime_now is defined %}{% set s = strftime_now('%j') %}{{ s }}{% endif %}",
        "{% macro m() %}{{ 'on ' + strftime_now('%F') }}{% endmacro %}{{ m() }}",
        "{% for m in messages %}{{ strftime_now('%u') }}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}",
    ],
)
def test_the_date_is_written_as_transformers_writes_it(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Template(template, {}, DAY).render_all([MESSAGES], None, [""])
    monkeypatch.setattr(chat_template_utils, "datetime", Fifth)
    assert ours == Template(template, {}).render_all([MESSAGES], None, [""])


def test_a_mistake_is_in_the_line_where_it_was_written() -> None:
    text = "{{ strftime_now('%d') }}\n{% if %}"
    with pytest.raises(RecipeError, match="line 2 of it is not valid Jinja"):
        Template(text, {}, DAY).render(MESSAGES)


@pytest.mark.parametrize(
    ("template", "asks"),
    [
        (DATED, True),
        ("{# strftime_now('%d') #}" + CHATML, False),
        ("{{ 'strftime_now' }}" + CHATML, False),
        ("{% raw %}strftime_now{% endraw %}" + CHATML, False),
        (CHATML, False),
    ],
)
def test_the_day_counts_where_it_is_asked_for(template: str, asks: bool) -> None:
    assert asks_for_day(template) == asks

    def settings(day: str | None, **keys: Any) -> dict[str, Any]:
        dataset = Dataset(path="x", **keys)
        recipe = Recipe(base_model="x", datasets=[dataset])
        return Encoder(dataset, recipe, make_tokenizer(template), day=day).settings

    assert settings(DAY)["day"] == (DAY if asks else None)
    assert (settings(DAY) == settings("2026-10-06")) != asks
    assert settings(None) == settings(today())
    for kind in ("alpaca", "completion"):  # which have no use for the template
        assert settings(DAY, type=kind) == settings("2026-10-06", type=kind)


def test_today_is_a_date() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", today())
