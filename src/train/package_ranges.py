"""The packages that fusewright names as its own needs, their versions, and how to install them."""

from __future__ import annotations

import importlib.metadata

PLAIN_EXTRAS = ("", "train")
"""The extras without which ``fusewright train`` does not start."""

PURPOSES = {
    "rl": "preferences and rewards (key rl)",
    "quant": "4-bit and 8-bit weights (adapter: qlora, load_in_8bit), 8-bit optimizers",
    "distributed": "DeepSpeed (key deepspeed)",
    "evaluation": "the tasks of lm-evaluation-harness (eval --tasks)",
}
"""The purposes of the other extras."""


def install(name: str) -> str:
    """The command that installs a package, in the versions that fusewright supports."""
    return install_command(name, package_ranges().get(name, ("", ""))[0])


def install_command(name: str, versions: str) -> str:
    """The command that installs a package in a range of versions."""
    return f"pip install '{name}{versions}'" if versions else f"pip install {name}"


def package_ranges() -> dict[str, tuple[str, str]]:
    """Each package that fusewright needs here, with the range of versions and the extra."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # transformers needs it, too, and fails without it
        return {name: ("", "") for name in ("torch", "transformers", "peft", "accelerate")}
    requirements: dict[str, tuple[str, str]] = {}
    for line in importlib.metadata.requires("fusewright") or ():
        one = Requirement(line)
        for extra in (*PLAIN_EXTRAS, *PURPOSES):
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                requirements.setdefault(one.name, (str(one.specifier), extra))
    return requirements
