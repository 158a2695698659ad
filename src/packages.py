"""The packages that fusewright uses: their versions, those that were tested, how to install them.

All of it is declared in ``pyproject.toml``: the oldest versions with the dependencies, the newest
that the tests have run with in the extra ``tested``, and what is optional in the other extras.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator
from typing import Any

PLAIN_EXTRAS = ("", "train")
"""The extras without which ``fusewright train`` does not start."""

PURPOSES = {
    "rl": "preferences and rewards (key rl)",
    "quant": "4-bit and 8-bit weights (adapter: qlora, load_in_8bit), 8-bit optimizers",
    "distributed": "DeepSpeed (key deepspeed)",
    "evaluation": "the tasks of lm-evaluation-harness (eval --tasks)",
}
"""The purposes of the extras whose packages ``fusewright doctor`` lists."""

_NOT_OFFERED = ("all", "test", "dev", "tested")
_said: set[str] = set()


def install_extra(extra: str) -> str:
    """The command that installs what an extra names."""
    return f'pip install "fusewright[{extra}]"'


def install(name: str) -> str:
    """The command that installs a package: by its extra, or in the versions that are needed."""
    for extra in _extras():
        if extra not in _NOT_OFFERED and any(one.name == name for one in _requirements(extra)):
            return install_extra(extra)
    return install_command(name, package_ranges().get(name, ("", ""))[0])


def install_command(name: str, versions: str = "") -> str:
    """The command that installs a package in a range of versions."""
    return f'pip install "{name}{versions}"' if versions else f"pip install {name}"


def package_ranges() -> dict[str, tuple[str, str]]:
    """Each package that fusewright needs here, with the range of versions and the extra."""
    requirements: dict[str, tuple[str, str]] = {}
    for extra in (*PLAIN_EXTRAS, *PURPOSES):
        for one in _requirements(extra):
            requirements.setdefault(one.name, (str(one.specifier), extra))
    return requirements or {name: ("", "") for name in ("torch", "transformers", "peft")}


def untested() -> str | None:
    """Which packages are installed in versions that no test has run with; None: none is."""
    outside, ranges = [], []
    for newest in _requirements("tested"):
        oldest = [one.specifier for one in _requirements("") if one.name == newest.name]
        tested = functools.reduce(lambda a, b: a & b, oldest, newest.specifier)
        try:
            version = importlib.metadata.version(newest.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        ranges.append(f"{newest.name}{tested}")
        if not tested.contains(version, prereleases=True):
            outside.append(f"{newest.name} {version}")
    if not outside:
        return None
    return (
        f"no test of fusewright has run with {' and '.join(outside)} "
        f"(tested: {', '.join(ranges)}); "
        f"{install_extra('tested')} installs versions that were tested"
    )


def untested_once() -> str | None:
    """``untested()`` where this process has not been told yet; else None."""
    message = untested()
    if message is None or message in _said:
        return None
    _said.add(message)
    return message


def _extras() -> list[str]:
    try:
        about: Any = importlib.metadata.metadata("fusewright")
    except importlib.metadata.PackageNotFoundError:
        return []
    return about.get_all("Provides-Extra") or []


@functools.cache
def _requirements(extra: str) -> tuple[Any, ...]:
    """What an extra asks for in this environment; of ``""``: what every installation does."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # transformers needs it, too, and fails without it
        return ()
    found = []
    for one in _declared(Requirement):
        plain = one.marker is None or one.marker.evaluate({"extra": ""})
        if plain if extra == "" else not plain and one.marker.evaluate({"extra": extra}):
            found.append(one)
    return tuple(found)


def _declared(requirement: Any) -> Iterator[Any]:
    try:
        yield from map(requirement, importlib.metadata.requires("fusewright") or ())
    except importlib.metadata.PackageNotFoundError:  # its folder is on the path, and no more
        return
