"""The versions at a corner of the tested range, as constraints for pip, from pyproject.toml."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def limits(corner: str) -> list[str]:
    """A constraint for each package whose range is declared."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    newest = dict(line.split("<") for line in extras["tested"])
    if corner == "latest":
        return list(newest)
    if corner == "newest":
        return [f"{name}<{version}" for name, version in newest.items()]
    lines = (line.partition(";")[0] for line in [*project["dependencies"], *extras["rl"]])
    oldest = dict(line.strip().split(">=") for line in lines)
    # the interpreter of the Triton that this PyTorch brings needs an older NumPy
    return [*(f"{name}=={oldest[name]}.*" for name in newest), "numpy<2.4"]


if __name__ == "__main__":
    if sys.argv[1:] not in (["oldest"], ["newest"], ["latest"]):
        sys.exit("one of: oldest, newest, latest")
    print("\n".join(limits(sys.argv[1])))
