"""What tests expect of the version of transformers that is installed."""

from __future__ import annotations

import transformers
from torch.torch_version import TorchVersion


def transformers_before(version: str) -> bool:
    """Whether the installed transformers is older than ``version``."""
    return TorchVersion(transformers.__version__) < version
