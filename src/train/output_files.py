"""Folders that no run may write to, and how some files are written."""

from __future__ import annotations

import contextlib
import stat
import sysconfig
from pathlib import Path
from typing import Any

from ..errors import RecipeError, first_line

GENERATION_SETTINGS = "generation_config.json"

_SYSTEM = tuple(
    Path(name)
    for name in (
        "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run",
        "/sbin", "/sys", "/usr", "/var", "/System", "/Library", "/private/etc", "/private/var",
    )
)  # fmt: skip
_FREE = tuple(
    Path(name)
    for name in (
        "/dev/shm", "/run/media", "/run/user", "/usr/src", "/var/tmp", "/private/var/tmp",
        "/private/var/folders",
    )
)  # fmt: skip
"""Folders for everybody within those of the system."""


def require_new(output: Path) -> None:
    """Raise a RecipeError unless a folder does not exist, or is empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"{output} is there already; name another folder: --output DIR")


def require_file_size(text: str) -> None:
    """Raise a RecipeError unless ``text`` is a size that the hub's library reads, such as 5GB."""
    from huggingface_hub import split_state_dict_into_shards_factory

    try:  # of no tensors
        split_state_dict_into_shards_factory(
            {}, get_storage_size=len, filename_pattern="{suffix}", max_shard_size=text
        )
    except ValueError as error:
        raise RecipeError(f"--max-shard-size: {first_line(error)}; say 500MB or 5GB") from None


def let_others_read(folder: Path) -> None:
    """Give the weights in ``folder`` the mode of other new files.

    safetensors (0.8) makes them readable for their owner alone, whatever the umask is.
    """
    with contextlib.suppress(OSError):  # of a file system without modes
        other = folder / ".mode"
        other.touch()
        mode = stat.S_IMODE(other.stat().st_mode)
        other.unlink()
        for path in folder.glob("*.safetensors"):
            path.chmod(mode)


def write_atomically(path: Path, text: str, errors: str = "strict") -> None:
    """Write ``text`` to ``path`` in UTF-8: the file is there completely, or as it was before.

    ``errors`` is that of ``str.encode``.
    """
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(text.encode("utf-8", errors))
    part.replace(path)


def write_generation_settings(settings: Any, folder: Path) -> None:
    """Write a ``GenerationConfig`` as it is, whatever its base was published with."""
    # its ``save_pretrained`` refuses what many are, such as a temperature without ``do_sample``:
    # all of them in transformers 5.17, later those that were changed since
    settings.to_json_file(folder / GENERATION_SETTINGS, keys_to_pop=["compile_config"])


def why_not_ours_to_write(folder: Path) -> str | None:
    """Why no run may write into ``folder``, which is absolute without links; None: it may."""
    home = Path.home().resolve()
    if folder == Path(folder.anchor) or folder == home or folder in home.parents:
        return f"{folder} is not a folder for one run; choose a new one in it"
    for place in map(Path, {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}):
        if folder.is_relative_to(place.resolve()):
            return f"{folder} is in {place}, where Python's modules are; choose another folder"
    if any(map(folder.is_relative_to, _FREE)) or _in_a_home(folder, home):
        return None
    system = next((place for place in _SYSTEM if folder.is_relative_to(place)), None)
    return None if system is None else f"{folder} is in {system}, a folder of the system"


def _in_a_home(folder: Path, home: Path) -> bool:
    """Whether it is in the home of this account, which may be below ``/var``; ``/`` is none."""
    return folder.is_relative_to(home) and home != Path(home.anchor) and home not in _SYSTEM
