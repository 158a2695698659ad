"""Reads back a merged model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..consent import Consent
from ..inference.load_run import load_model_of
from ..inference.run_folder import open_run
from .reading import Compared, TokenizerRead, folder_tokenizer
from .scores import Logits


class MergedWriter:
    """The export that ``fusewright merge`` writes: nothing is left to do but to read it."""

    def __init__(self, consent: Consent) -> None:
        self.consent = consent

    def write(self, source: Path, folder: Path) -> None:
        """Nothing: the plain model is the export."""

    def compare(self, source: Path, folder: Path) -> Iterator[Compared]:
        """Nothing, likewise."""
        yield from ()

    def load(self, folder: Path) -> Any:
        """The model in float32."""
        return nn.Module.float(load_model_of(open_run(folder, consent=self.consent))).eval()

    def tokenizer(self, folder: Path, ours: Any) -> TokenizerRead:
        """The tokenizer that is in the folder."""
        return folder_tokenizer(folder, self.consent)

    def other_reader(self, folder: Path, length: int) -> Logits | str:
        """Nothing."""
        return ""
