"""The parts of the tests beside the core, each of which takes at most 40 minutes on 2 cores.

``pytest`` without arguments runs the core: what is marked neither ``long`` nor ``slow`` nor
``zoo``. Each other test belongs to one part, which ``.ci/nightly NAME`` and
``pytest --part NAME`` run.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection

SHARES = {"zoo": 2, "slow": 4, "long": 1}
"""The markers that keep a test out of the core, and the number of parts that share their tests."""

PARTS = tuple(f"{marker}-{i + 1}" for marker, number in SHARES.items() for i in range(number))
"""The names of all parts."""

LIMIT_OF_PARTS = 1800.0
"""Seconds for one test of a part; pyproject.toml has those for one of the core."""


def part_of(nodeid: str, markers: Collection[str]) -> str | None:
    """Return the part that a test belongs to, or None for a test of the core.

    The tests of one file and marker stay together, since they share fixtures and compiled code;
    those of ``zoo``, one model each, are spread.

    Args:
        nodeid: ``path::name`` of the test.
        markers: the names of its markers.
    """
    for marker, number in SHARES.items():
        if marker in markers:
            shared = nodeid if marker == "zoo" else nodeid.partition("::")[0]
            return f"{marker}-{1 + zlib.crc32(shared.encode()) % number}"
    return None
