"""The day for chat templates that ask for it with ``strftime_now``.

All rows of a run have the day it started: those that are prepared after midnight, streamed for days
or prepared again by a resumed run have the same date in them.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from string import ascii_letters

_NAME = "strftime_now"
_MACRO = (
    "{%- macro strftime_now(format) -%}{%- set codes = CODES -%}"
    "{%- for piece in format.split('%%') -%}{{ '' if loop.first else '%' }}"
    "{%- for part in piece.split('%') -%}"
    "{%- if loop.first -%}{{ part }}"
    "{%- elif part[:2] in codes -%}{{ codes[part[:2]] + part[2:] }}"
    "{%- else -%}{{ codes.get(part[:1], '%' + part[:1]) + part[1:] }}"
    "{%- endif -%}{%- endfor -%}{%- endfor -%}{%- endmacro %}\n"
)
"""``strftime`` in Jinja: transformers lets no function into a template; its own reads the clock.
``trim_blocks`` drops the line break at the end. It is there for ``lstrip_blocks``, so that blanks
before the template's first tag are at the beginning of a line, as they were."""


def today() -> str:
    """The date as ``2026-10-05``, in UTC, so that a run may resume in another time zone."""
    return datetime.now(UTC).date().isoformat()


def asks_for_day(source: str) -> bool:
    """Whether a template uses ``strftime_now``, and does not only mention it in a comment or text.

    One that asks on some condition counts: what its rows do is known only after rendering them.
    """
    from jinja2 import Environment, TemplateSyntaxError

    if _NAME not in source:
        return False
    try:
        return any(kind == "name" and word == _NAME for _, kind, word in Environment().lex(source))
    except TemplateSyntaxError:
        return False  # rendering says what is wrong


def with_day(source: str, day: str) -> str:
    """The template with ``strftime_now`` telling ``day``, one line longer; or as it is.

    ``day`` is as ``today`` returns it, its time midnight: cached rows serve the whole day.
    """
    if not asks_for_day(source):
        return source
    codes = json.dumps(_codes(datetime.fromisoformat(day)))
    return _MACRO.replace("CODES", codes) + source


def _codes(moment: datetime) -> dict[str, str]:
    """The value of each ``strftime`` code, by the code without its percent sign."""
    values = {}
    for code in (flag + letter for flag in ("", *"-_0^#") for letter in ascii_letters):
        try:
            values[code] = moment.strftime(f"%{code}")
        except ValueError:  # some platforms refuse what they do not know
            continue
    return values
