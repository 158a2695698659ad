"""The tensors that a model takes beside its tokens, for the pictures of a batch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ....errors import DataError, first_line
from ..sample import Sample
from .picture import Picture, Resizing, load

if TYPE_CHECKING:
    from torch import Tensor

_TEXT = ("input_ids", "attention_mask", "text_replacement_offsets")
"""What the processor makes of the text, which the prepared rows have already."""


def written(text: str, pictures: Sequence[Picture], where: str) -> str:
    """What a sample keeps of its pictures (``Sample.extra``)."""
    if not pictures:
        return ""
    return json.dumps({"where": where, "text": text, "pictures": [asdict(p) for p in pictures]})


@dataclass(frozen=True)
class Illustrated:
    """A sample with pictures.

    Attributes:
        text: its conversation, rendered, with a placeholder for each picture.
    """

    where: str
    text: str
    pictures: tuple[Picture, ...]
    ids: list[int]

    @classmethod
    def of(cls, sample: Sample) -> Illustrated | None:
        """What ``written`` says of a sample; None: it has no pictures."""
        if not sample.extra:
            return None
        content = json.loads(sample.extra)
        pictures = tuple(
            Picture(p["path"], p["digest"], (p["size"][0], p["size"][1]))
            for p in content["pictures"]
        )
        return cls(content["where"], content["text"], pictures, sample.input_ids)


@dataclass
class Featurizer:
    """Loads the pictures of a batch and has the processor make features of them.

    It can be pickled: the workers of a data loader have it.
    """

    processor: Any
    resizing: Resizing = Resizing()
    options: dict[str, Any] = field(default_factory=dict)

    def features(
        self, packs: Iterable[Sequence[Sample]], width: int
    ) -> dict[str, Tensor]:
        """The features of a batch's pictures, in the order of their placeholders.

        Args:
            packs: for each row of the batch the samples in it, one after the other.
            width: tokens of a row, with its padding.

        Returns:
            As the processor names them: of the pictures, as it stacks them, and of the tokens
            (such as ``token_type_ids``) (B, width), with zeros for text and padding. Empty if no
            sample has a picture.

        Raises:
            DataError: a picture has changed, or the processor makes other tokens of a row.
        """
        import torch

        rows = [[(sample, Illustrated.of(sample)) for sample in pack] for pack in packs]
        illustrated = [i for row in rows for _, i in row if i is not None]
        if not illustrated:
            return {}
        made = self._processed(illustrated)
        of_tokens = self._of_tokens(made, illustrated)
        result: dict[str, Any] = {
            name: torch.as_tensor(value)
            for name, value in made.items()
            if name not in _TEXT and name not in of_tokens
        }
        for name, by_sample in of_tokens.items():
            values = iter(by_sample)
            filled = torch.zeros(len(rows), width, dtype=torch.long)
            for b, row in enumerate(rows):
                at = 0
                for sample, pictures in row:
                    end = at + len(sample.input_ids)
                    if pictures is not None:
                        filled[b, at:end] = torch.tensor(next(values))
                    at = end
            result[name] = filled
        return result

    def _processed(self, illustrated: Sequence[Illustrated]) -> Any:
        images = [[load(p, self.resizing, i.where) for p in i.pictures] for i in illustrated]
        try:
            return self.processor(
                text=[i.text for i in illustrated], images=images, padding=True,
                padding_side="right", add_special_tokens=False, return_tensors="pt",
                **self.options,
            )  # fmt: skip
        except Exception as error:  # a processor's code raises anything
            wheres = ", ".join(i.where for i in illustrated[:3])
            raise DataError(
                f"{wheres}: {type(self.processor).__name__} refuses the pictures: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from None

    def _of_tokens(
        self, made: Any, illustrated: Sequence[Illustrated]
    ) -> dict[str, list[list[int]]]:
        """The values that belong to tokens, by sample; the tokens must be those that are trained."""
        ids = made["input_ids"]
        for row, (one, mask) in enumerate(zip(illustrated, made["attention_mask"], strict=True)):
            if ids[row][mask.bool()].tolist() != one.ids:
                raise DataError(
                    f"{one.where}: the processor makes other tokens of this row than were "
                    "prepared: is it of another version? Delete dataset_prepared_path"
                )
        names = [
            name for name, value in made.items()
            if name not in _TEXT and getattr(value, "shape", None) == ids.shape
        ]  # fmt: skip
        return {
            name: [
                made[name][row][: len(one.ids)].tolist() for row, one in enumerate(illustrated)
            ]
            for name in names
        }
