"""The tensors that a model takes beside its tokens, for the pictures of a batch."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ....errors import DataError, first_line
from ..sample import IGNORED, Sample
from .picture import Picture, Resizing, load

if TYPE_CHECKING:
    from torch import Tensor

    Positions = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    """From tokens (1, T) and the features that belong to them to positions (axes, T)."""

_TEXT = ("input_ids", "attention_mask", "text_replacement_offsets")
"""What the processor makes of the text, which the prepared rows have already."""


def written(text: str, pictures: Sequence[Picture], where: str) -> str:
    """What a sample keeps of its pictures (``Sample.extra``)."""
    if not pictures:
        return ""
    return json.dumps({"where": where, "text": text, "pictures": [asdict(p) for p in pictures]})


def identity(extra: str) -> str:
    """What ``written`` says, without where the row and its images are."""
    content = json.loads(extra) if extra else {}
    return json.dumps([content.get("text"), [p["digest"] for p in content.get("pictures", ())]])


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
        if "pictures" not in content:  # a teacher's probabilities, or columns of a row
            return None
        pictures = tuple(
            Picture(p["path"], p["digest"], (p["size"][0], p["size"][1]))
            for p in content["pictures"]
        )
        return cls(content["where"], content["text"], pictures, sample.input_ids)


_BLANK = Picture("", "", (64, 64))


@dataclass
class Featurizer:
    """Loads the pictures of a batch and has the processor make features of them.

    It can be pickled: the workers of a data loader have it.
    """

    processor: Any
    resizing: Resizing = field(default_factory=Resizing)
    options: dict[str, Any] = field(default_factory=dict)
    positions: Positions | None = None
    """Of a model whose positions of images have several axes."""
    completes: bool = False
    """Whether a batch without an image gets a blank one: what reads images is then called for each
    batch, as processes need that share it, or average its gradients."""

    def sample(self, text: str) -> Sample:
        """A text with placeholders that stand for blank images; nothing of it is trained."""
        pictures = [_BLANK] * text.count(self.processor.image_token)
        only = Illustrated("a blank image", text, tuple(pictures), [])
        ids = self._processed([only])["input_ids"][0].tolist()
        return Sample(ids, [IGNORED] * len(ids), written(text, pictures, only.where))

    @functools.cached_property
    def _blank(self) -> Sample:
        return self.sample(self.processor.image_token)

    def lacks(self, packs: Sequence[Sequence[Sample]]) -> bool:
        """Whether the rows of a batch get a blank image."""
        return self.completes and not any(sample.extra for pack in packs for sample in pack)

    def completed(self, packs: Sequence[Sequence[Sample]]) -> Sequence[Sequence[Sample]]:
        """The rows of a batch, with one more for a blank image if they get one."""
        return [*packs, [self._blank]] if self.lacks(packs) else packs

    def features(
        self,
        packs: Iterable[Sequence[Sample]],
        batch: Mapping[str, Tensor],
        whole: bool = True,
        left: bool = False,
    ) -> dict[str, Tensor]:
        """The features of a batch's images, in the order of their placeholders.

        Args:
            packs: for each row of the batch the samples in it, one after the other.
            batch: that of their tokens, by ``collate``.
            whole: each sample has all tokens of its text; False: those that it begins with.
            left: shorter rows are filled up on the left, as prompts are.

        Returns:
            As the processor names them: of the images, as it stacks them, and of the tokens
            (such as ``token_type_ids``) (B, T), with zeros for text and padding. With
            ``positions``, for a batch of packs, also ``position_ids`` (1 + axes, B, T): those in
            the text first. Else empty if no sample has an image.

        Raises:
            DataError: a picture has changed, or the processor makes other tokens of a row.
        """
        import torch

        rows_of_tokens, width = batch["input_ids"].shape
        rows = [[(sample, Illustrated.of(sample)) for sample in pack] for pack in packs]
        illustrated = [i for row in rows for _, i in row if i is not None]
        plain = batch.get("position_ids") if self.positions is not None else None
        if not illustrated:
            return {} if plain is None else {"position_ids": plain.repeat(self._axes, 1, 1)}
        made = self._processed(illustrated)
        of_tokens = self._of_tokens(made, illustrated, whole)
        result: dict[str, Any] = {
            name: torch.as_tensor(value)
            for name, value in made.items()
            if name not in _TEXT and name not in of_tokens
        }
        for name, by_sample in of_tokens.items():
            values = iter(by_sample)
            filled = torch.zeros(rows_of_tokens, width, dtype=torch.long)
            for b, row in enumerate(rows):
                at = width - sum(len(sample.input_ids) for sample, _ in row) if left else 0
                for sample, pictures in row:
                    end = at + len(sample.input_ids)
                    if pictures is not None:
                        filled[b, at:end] = torch.tensor(next(values))
                    at = end
            result[name] = filled
        if plain is not None:
            result["position_ids"] = self._positions(rows, plain, result)
        return result

    @functools.cached_property
    def _axes(self) -> int:
        """How many positions a token of a pack has, with that in the text."""
        import torch

        ids = torch.tensor([self._blank.input_ids])
        batch = {"input_ids": ids, "position_ids": torch.zeros_like(ids)}
        return len(self.features([[self._blank]], batch)["position_ids"])

    def _positions(
        self,
        rows: Sequence[Sequence[tuple[Sample, Illustrated | None]]],
        plain: Tensor,
        features: Mapping[str, Tensor],
    ) -> Tensor:
        """The positions of packs: of each sample as the model has them where it is alone."""
        import torch

        assert self.positions is not None
        number = sum(len(i.pictures) for row in rows for _, i in row if i is not None)
        of_tokens = {k: v for k, v in features.items() if v.shape[:2] == plain.shape}
        of_images = {k: v for k, v in features.items() if k not in of_tokens and len(v) == number}
        result: Tensor | None = None
        first = 0
        for b, row in enumerate(rows):
            at = 0
            for sample, illustrated in row:
                end = at + len(sample.input_ids)
                if illustrated is not None:
                    last = first + len(illustrated.pictures)
                    found = self.positions(
                        torch.tensor([sample.input_ids]),
                        {
                            **{k: v[b : b + 1, at:end] for k, v in of_tokens.items()},
                            **{k: v[first:last] for k, v in of_images.items()},
                        },
                    )
                    if result is None:  # text has the same position on each axis
                        result = plain.repeat(1 + len(found), 1, 1)
                    result[1:, b, at:end] = found
                    first = last
                at = end
        assert result is not None
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
                f"{wheres}: {type(self.processor).__name__} refuses the images: {first_line(error)}"
            ) from None

    def _of_tokens(
        self, made: Any, illustrated: Sequence[Illustrated], whole: bool
    ) -> dict[str, list[list[int]]]:
        """The values that belong to tokens, by sample; the tokens must be the prepared ones."""
        ids = made["input_ids"]
        for row, (one, mask) in enumerate(zip(illustrated, made["attention_mask"], strict=True)):
            tokens = ids[row][mask.bool()].tolist()
            if tokens[: None if whole else len(one.ids)] != one.ids:
                raise DataError(
                    f"{one.where}: the processor makes other tokens of this row than were "
                    "prepared: is it of another version? Delete dataset_prepared_path"
                )
        names = [
            name for name, value in made.items()
            if name not in _TEXT and getattr(value, "shape", None) == ids.shape
        ]  # fmt: skip
        return {
            name: [made[name][row][: len(one.ids)].tolist() for row, one in enumerate(illustrated)]
            for name in names
        }
