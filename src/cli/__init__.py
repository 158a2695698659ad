"""The commands. Each imports what it needs when it runs."""

import importlib.util
import sys

from ..packages import install_extra

# what each command imports; what training needs besides, it says itself
_EXTRA = ("psutil", "pydantic", "rich", "typer", "yaml")

if missing := [name for name in _EXTRA if importlib.util.find_spec(name) is None]:
    print(f"fusewright: {', '.join(missing)} missing; {install_extra('train')}", file=sys.stderr)
    raise SystemExit(2)

from .main import main  # noqa: E402  # 2026-12-01: after the check of what it imports

__all__ = ["main"]
