"""The build backend: setuptools', but for what an editable installation puts into the environment.

Setuptools' finder of an editable package comes after the folders of ``sys.path``. Where the current
folder holds a clone called ``fusewright``, Python takes that folder for a package without files.
The finder here comes first, and leaves to the path what has files there: it works as if the
package were in site-packages.
"""

from __future__ import annotations

import base64
import hashlib
import tempfile
import zipfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  # 2026-12-01: the hooks that stay as they are
from setuptools.command import egg_info

# beside this file, since the top folder is for what people read
egg_info.manifest_maker.template = ".ci/manifest.in"

_SOURCE = Path(__file__).resolve().parents[1] / "src"

_FINDER = '''"""Finds the package fusewright, installed editable, as if it were in this folder."""

import importlib.machinery
import importlib.util
import os
import sys

SOURCE = {source!r}


class Finder:
    """Finds the package itself; its parts are found in its folder, as those of any package."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """The package, where no file of it is on the path; None for all other names."""
        if name != "fusewright":
            return None
        other = importlib.machinery.PathFinder.find_spec(name, path, target)
        init = os.path.join(SOURCE, "__init__.py")
        if other is not None and other.has_location or not os.path.exists(init):
            return None
        return importlib.util.spec_from_file_location(
            name, init, submodule_search_locations=[SOURCE]
        )


sys.meta_path.insert(0, Finder)
'''


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, str] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Write a wheel of the metadata and of what finds the package in this clone; its name."""
    with tempfile.TemporaryDirectory() as folder:
        if metadata_directory is None:
            name = build_meta.prepare_metadata_for_build_editable(folder, config_settings)
            metadata = Path(folder, name)
        else:
            metadata = Path(metadata_directory)
        info = metadata.name
        files = {
            f"{info}/{path.relative_to(metadata).as_posix()}": path.read_bytes()
            for path in sorted(metadata.rglob("*"))
            if path.is_file() and path.name not in ("RECORD", "WHEEL")
        }
    tag = "Wheel-Version: 1.0\nGenerator: fusewright\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files |= {  # no name that ends in _editable: griffe takes it for a file of scikit-build-core
        "_fusewright_finder.py": _FINDER.format(source=str(_SOURCE)).encode(),
        "_fusewright_finder.pth": b"import _fusewright_finder\n",
        f"{info}/WHEEL": tag.encode(),
    }
    lines = [f"{name},{_digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()
    wheel = f"{info.removesuffix('.dist-info')}-0.editable-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory, wheel), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


def _digest(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return f"sha256={digest.decode().rstrip('=')}"
