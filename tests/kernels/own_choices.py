"""Choose candidates on the CPU, as on a GPU, with choices of this test alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusewright.kernels import choice


@contextmanager
def own_choices(folder: Path) -> Iterator[None]:
    """Choose on the CPU, without earlier choices; ``folder`` keeps the files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "DEVICES", ("cpu",))
        patch.setattr(choice, "_CHOICES", {})
        patch.setattr(choice, "kept_folder", lambda: folder)
        for op in choice._OPS.values():
            patch.setattr(op, "_orders", {})
        yield
