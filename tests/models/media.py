"""Batches for tiny models that read pictures or sound beside text.

What a model takes is read from its signature and configuration: the shapes of pictures from the
encoder's sizes, the number of placeholder tokens from the model's own ``get_image_features`` and
``get_audio_features``. What single families insist on stands in ``OTHER_MEDIA``, ``BESIDE`` and
``INSTEAD``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

BATCH = 2
FIRST_ID, LAST_ID = 3, 200
BEFORE, AFTER = 4, 14  # tokens of text around a picture or a sound
FRAMES = 96
NOT_TRAINED = -100


def batch(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments with which the output of a model of several media has a loss."""
    generator = torch.Generator().manual_seed(0)
    kind = model.config.model_type
    if kind in INSTEAD:
        return INSTEAD[kind](model.config, generator)
    takes = frozenset(inspect.signature(model.forward).parameters)
    media = _media(model.config, takes, generator)
    if kind in OTHER_MEDIA:
        media |= OTHER_MEDIA[kind](model.config, media, generator)
        media = {name: value for name, value in media.items() if value is not None}
    ids, special = _ids(list(_placeholders(model, media)), generator)
    inputs = {"input_ids": ids, "labels": ids.masked_fill(special > 0, NOT_TRAINED), **media}
    for name in takes & {"mm_token_type_ids", "token_type_ids"}:
        inputs[name] = special
    if model.config.is_encoder_decoder:  # the encoder reads all, the decoder writes text
        inputs["labels"] = torch.randint(FIRST_ID, LAST_ID, (BATCH, AFTER), generator=generator)
    if kind in BESIDE:
        inputs |= BESIDE[kind](model.config, inputs, generator)
    return inputs


class Run(NamedTuple):
    """Placeholders of one medium: its number in types of tokens, their id, how many in each row."""

    medium: int
    token: int
    numbers: Sequence[int]


def _ids(runs: Sequence[Run], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of text with runs of placeholders; and the medium of each position, 0 for text."""
    longest = max(sum(run.numbers[row] for run in runs) for row in range(BATCH))
    length = BEFORE * max(1, len(runs)) + longest + AFTER
    ids = torch.randint(FIRST_ID, LAST_ID, (BATCH, length), generator=generator)
    media = torch.zeros_like(ids)
    for row in range(BATCH):
        at = BEFORE
        for run in runs:
            end = at + run.numbers[row]
            ids[row, at:end], media[row, at:end] = run.token, run.medium
            at = end + BEFORE
    return ids, media


def _placeholders(model: nn.Module, media: Mapping[str, Any]) -> Iterator[Run]:
    """As many placeholders as the model's own encoders have features for."""
    for number, medium in ((1, "image"), (3, "audio")):
        token = _token(model.config, medium)
        features = _method(model, f"get_{medium}_features")
        if token is None or features is None:
            continue
        takes = inspect.signature(features).parameters
        called = {name.removesuffix("_images"): value for name, value in media.items()}
        given = {name: value for name, value in called.items() if name in takes}
        if not given:
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            output = features(**given, return_dict=True)
        yield Run(number, token, _rows(output))


def _token(config: PreTrainedConfig, medium: str) -> int | None:
    names = (f"{medium}_token_id", f"{medium}_token_index", f"{medium}_patch_id")
    return next((t for n in names if isinstance(t := getattr(config, n, None), int)), None)


def _method(model: nn.Module, name: str) -> Callable[..., Any] | None:
    """The method of the innermost model that has it: outer ones take any arguments."""
    inner = getattr(model, "model", None)
    return getattr(inner, name, None) or getattr(model, name, None)


def _rows(output: Any) -> list[int]:
    """How many rows of features each sample has."""
    features = getattr(output, "pooler_output", None)
    if features is None:
        features = getattr(output, "last_hidden_state", None)
    if features is None:  # features for several layers: as many for each
        features = output.deepstack_features[0][-1]
    if isinstance(features, Tensor) and features.dim() > 2:
        features = features.flatten(1, -2)
    if isinstance(features, Tensor) and features.dim() == 2:
        features = features.chunk(BATCH)
    rows = [part.numel() // part.shape[-1] for part in features]
    return [sum(part) for part in _split(rows)]


def _split(rows: list[int]) -> list[list[int]]:
    each = len(rows) // BATCH
    return [rows[i * each : (i + 1) * each] for i in range(BATCH)]


def language_parts(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that read and write text: decoder, output head, and text encoder."""
    parts = [model.get_decoder(), model.get_output_embeddings()]
    if model.config.is_encoder_decoder:
        encoder = model.get_encoder()
        text = getattr(encoder, "text_model", encoder)
        parts += [text] if hasattr(text, "embed_tokens") else []
    return [part for part in parts if part is not None]


def encoder(config: PreTrainedConfig, *fields: str) -> PreTrainedConfig:
    """The first configuration in ``config``, itself last, that has all the fields."""
    for name in ("vision_config", "audio_config", "encoder_config", "vq_config"):
        part = vars(config).get(name)
        if isinstance(part, PreTrainedConfig) and all(hasattr(part, f) for f in fields):
            return part
        if isinstance(part, PreTrainedConfig):
            inner = encoder(part, *fields)
            if inner is not part:
                return inner
    return config


def _first(config: PreTrainedConfig, *names: str, default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, int) and value:
            return value
    return default


def _media(
    config: PreTrainedConfig, takes: frozenset[str], generator: torch.Generator
) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if "pixel_values" in takes:
        given |= _pictures(config, takes, generator)
    if "input_features" in takes or "input_values" in takes:
        given |= _sounds(config, takes, generator)
    return given


def _pictures(
    config: PreTrainedConfig, takes: frozenset[str], generator: torch.Generator
) -> dict[str, Any]:
    vision = encoder(config, "patch_size")
    channels = _first(vision, "num_channels", "in_channels", "in_chans", default=3)
    patch = _first(vision, "patch_size", default=8)
    size = _first(vision, "image_size", default=32)
    if "image_grid_thw" in takes:
        merge = _first(
            vision, "spatial_merge_size", "merge_kernel_size", "merge_size",
            default=_first(config, "spatial_merge_size", default=2),
        )  # fmt: skip
        frames = _first(vision, "temporal_patch_size", "patch_temporal", default=1)
        grid = torch.tensor([[1, 2 * merge, 2 * merge], [1, 2 * merge, 4 * merge]])
        shape = (int(grid.prod(1).sum()), channels * frames * patch * patch)
        given = {"pixel_values": _noise(generator, *shape), "image_grid_thw": grid}
        if "image_merge_sizes" in takes:
            given["image_merge_sizes"] = torch.full((BATCH,), merge)
        return given
    if "spatial_shapes" in takes:  # rows of patches, padded to the most
        shapes = torch.tensor([[4, 4], [4, 2]])
        mask = torch.arange(16)[None] < shapes.prod(1)[:, None]
        return {
            "pixel_values": _noise(generator, BATCH, 16, channels * patch * patch),
            "spatial_shapes": shapes, "pixel_attention_mask": mask.long(),
        }  # fmt: skip
    if "image_position_ids" in takes:
        at = torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(BATCH, -1, -1)
        width = _first(vision, "model_patch_size", default=patch) ** 2 * channels
        return {
            "pixel_values": _noise(generator, BATCH, 36, width).sigmoid(),
            "image_position_ids": at,
        }
    if "pixel_attention_mask" in takes:  # several pictures a row
        return {
            "pixel_values": _noise(generator, BATCH, 1, channels, size, size),
            "pixel_attention_mask": torch.ones(BATCH, 1, size, size, dtype=torch.bool),
        }
    if "image_sizes" in takes and hasattr(config, "image_grid_pinpoints"):
        sizes = torch.tensor([[size, 2 * size]]).expand(BATCH, -1)
        return {
            "pixel_values": _noise(generator, BATCH, 3, channels, size, size),
            "image_sizes": sizes,
        }
    given = {"pixel_values": _noise(generator, BATCH, channels, size, size)}
    if "image_sizes" in takes and vision.model_type == "pixtral":
        given["image_sizes"] = torch.full((BATCH, 2), size)
    if "pixel_mask" in takes:
        given["pixel_mask"] = torch.ones(BATCH, size, size, dtype=torch.bool)
    return given


def _sounds(
    config: PreTrainedConfig, takes: frozenset[str], generator: torch.Generator
) -> dict[str, Any]:
    audio = encoder(config, "num_mel_bins")
    if "input_values" in takes:
        shape = (BATCH, 1, 640) if config.model_type == "omniasr" else (BATCH, 640)
        return {"input_values": _noise(generator, *shape)}
    bins = _first(audio, "num_mel_bins", "input_size", "input_dim", default=80)
    # an encoder with learned positions wants exactly as many frames as it has of them, halved once
    frames = 2 * _first(audio, "max_source_positions", default=FRAMES // 2)
    if hasattr(audio, "n_window"):  # pieces of that length, and each its own attention
        frames = 4 * audio.n_window
    mel_last = not hasattr(audio, "num_mel_bins")
    shape = (BATCH, frames, bins) if mel_last else (BATCH, bins, frames)
    given = {"input_features": _noise(generator, *shape)}
    for name in takes & {"input_features_mask", "feature_attention_mask"}:
        given[name] = torch.ones(BATCH, frames, dtype=torch.long)
    return given


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _grids(config: PreTrainedConfig, media: Any, generator: torch.Generator) -> dict[str, Any]:
    """Patches as squares of pixels."""
    vision = encoder(config, "patch_size")
    patch, rows = vision.patch_size, media["pixel_values"].shape[0]
    return {"pixel_values": _noise(generator, rows, 3, patch, patch)}


def _merged_squares(
    config: PreTrainedConfig, media: Any, generator: torch.Generator
) -> dict[str, Any]:
    """Squares of the pixels that become one row of features, with the channels last."""
    vision = encoder(config, "patch_size")
    side = vision.spatial_merge_size * vision.patch_size
    grid = media["image_grid_thw"] // torch.tensor([1, 2, 2])  # in rows of features
    rows = int(grid.prod(1).sum())
    pixels = _noise(generator, rows, side, side, vision.num_channels)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def _target_sizes(
    config: PreTrainedConfig, media: Any, generator: torch.Generator
) -> dict[str, Any]:
    """Pictures of several sizes behind each other in a strip one patch high."""
    vision = encoder(config, "patch_size")
    sizes = torch.tensor([[4, 4], [4, 8]])
    patch, patches = vision.patch_size, int(sizes.prod(1).sum())
    strip = _noise(generator, 1, vision.num_channels, patch, patches * patch)
    return {"pixel_values": strip, "target_sizes": sizes}


def _high_resolution(
    config: PreTrainedConfig, media: Any, generator: torch.Generator
) -> dict[str, Any]:
    size = config.high_res_vision_config.image_size
    return {"high_res_pixel_values": _noise(generator, BATCH, 3, size, size)}


def _tiles(config: PreTrainedConfig, media: Any, generator: torch.Generator) -> dict[str, Any]:
    size = config.vision_config.image_size
    return {
        "pixel_values": _noise(generator, BATCH, 1, 3, size, size),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
    }


def _patches(config: PreTrainedConfig, media: Any, generator: torch.Generator) -> dict[str, Any]:
    width = config.patch_size**2 * config.num_channels
    return {"pixel_values": _noise(generator, BATCH, 9, width)}


def _words_of_the_question(
    config: PreTrainedConfig, media: Any, generator: torch.Generator
) -> dict[str, Any]:
    return {"qformer_input_ids": torch.randint(FIRST_ID, LAST_ID, (BATCH, 5), generator=generator)}


def _padding(config: PreTrainedConfig, media: Any, generator: torch.Generator) -> dict[str, Any]:
    return {"padding_mask": torch.ones(BATCH, 480, dtype=torch.long)}


def _pooled(config: PreTrainedConfig, media: Any, generator: torch.Generator) -> dict[str, Any]:
    """Patches in rows, and which four of them make one token."""
    vision = config.vision_config
    width = 3 * vision.patch_size**2
    first = torch.arange(0, 16 * BATCH, 4)
    return {
        "pixel_values": _noise(generator, BATCH, 16, width),
        "image_token_pooling": first[:, None] + torch.arange(4),
        "image_grids": torch.tensor([[2, 2, 0, 0]]).expand(BATCH, -1),
    }


def _heights_and_widths(
    config: PreTrainedConfig, media: Any, generator: torch.Generator
) -> dict[str, Any]:
    width = 3 * config.vision_config.patch_size**2
    grid = torch.tensor([[4, 4], [4, 2]])
    pixels = _noise(generator, int(grid.prod(1).sum()), width)
    return {"pixel_values": pixels, "image_grid_hw": grid, **_pictures_only(config, {}, generator)}


def _pictures_only(
    config: PreTrainedConfig, media: Any, generator: torch.Generator
) -> dict[str, Any]:
    return dict.fromkeys(
        ("input_features", "input_features_mask", "feature_attention_mask", "input_values")
    )


def _of_its_name(
    config: PreTrainedConfig, media: Any, generator: torch.Generator
) -> dict[str, Any]:
    return {"pixel_values": None, "pixel_values_images": media["pixel_values"]}


def _sized(config: PreTrainedConfig, media: Any, generator: torch.Generator) -> dict[str, Any]:
    sizes = torch.tensor([media["pixel_values"].shape[-2:]]).expand(BATCH, -1)
    return {"image_sizes": sizes, "input_values": None}


def _waves(config: PreTrainedConfig, media: Any, generator: torch.Generator) -> dict[str, Any]:
    return {"input_values": _noise(generator, BATCH, 1, 64)}


def _few_bins(config: Any, media: Any, generator: torch.Generator) -> dict[str, Any]:
    bins = config.audio_config.subsampling_conv_channels[0]
    return {
        "input_features": _noise(generator, BATCH, 40, bins),
        "input_features_mask": torch.ones(BATCH, 40, dtype=torch.bool),
    }


def _waves_in_rows(config: Any, media: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        "input_features": _noise(generator, BATCH, 6, 640),
        "input_features_mask": torch.ones(BATCH, 6, dtype=torch.bool),
    }


def _frames(config: PreTrainedConfig, media: Any, generator: torch.Generator) -> dict[str, Any]:
    size = config.vision_config.image_size
    return {
        **_words_of_the_question(config, media, generator),
        "pixel_values": _noise(generator, BATCH, 2, 3, size, size),
    }


def _sound_of_rows(
    config: PreTrainedConfig, media: Any, generator: torch.Generator
) -> dict[str, Any]:
    """Sound with the bins of a frame behind each other."""
    audio = getattr(config, "audio_config", None) or config.encoder_config
    audio = getattr(audio, "asr_config", audio)
    bins = _first(audio, "input_dim", "input_size", "num_mel_bins", default=0)
    masked = hasattr(config, "audio_config")
    return {
        "input_features": _noise(generator, BATCH, 32, bins),
        "input_features_mask": torch.ones(BATCH, 32, dtype=torch.long) if masked else None,
    }


def _with_columns(config: Any, media: Any, generator: torch.Generator) -> dict[str, Any]:
    """Patches that begin with their row and column."""
    vision = config.vision_config
    width = vision.patch_embed_hidden_size
    place = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).expand(BATCH, -1, -1)
    return {"flattened_patches": torch.cat((place, _noise(generator, BATCH, 16, width)), -1)}


OTHER_MEDIA: dict[str, Callable[..., dict[str, Any]]] = {
    "apertus1p5": _sized,
    "deepseek_vl_hybrid": _high_resolution,
    "dots3_note": _pictures_only,
    "emu3": _sized,
    "fuyu": _patches,
    "gemma4": _few_bins,
    "gemma4_unified": _waves_in_rows,
    "granite_docling": _tiles,
    "fun_asr_nano": _sound_of_rows,
    "granite_speech": _sound_of_rows,
    "granite_speech_plus": _sound_of_rows,
    "inkling2": _merged_squares,
    "inkling2_loop": _merged_squares,
    "instructblip": _words_of_the_question,
    "instructblipvideo": _frames,
    "kimi_k25": _grids,
    "kosmos-2.5": _with_columns,
    "minicpm_ocr": _target_sizes,
    "minicpmv4_6": _target_sizes,
    "minicpmv4_7": _target_sizes,
    "moss_transcribe_diarize": _padding,
    "molmo2": _pooled,
    "muse_spark": _pictures_only,
    "nemo_speechlm": _sound_of_rows,
    "nemotron_h_omni": _heights_and_widths,
    "paddleocr_vl": _grids,
    "vibevoice_asr": _waves,
    "video_llava": _of_its_name,
}
"""What encoders take other than their arguments' names say."""


def _suffix(config: Any, inputs: Any, generator: torch.Generator) -> dict[str, Any]:
    """All behind the picture is to be written, not read both ways."""
    ids = inputs["input_ids"]
    written = torch.arange(ids.shape[1]) >= ids.shape[1] - AFTER
    return {"token_type_ids": written.expand_as(ids).long()}


def _behind_tiles(config: Any, inputs: Any, generator: torch.Generator) -> dict[str, Any]:
    vision, length = config.vision_config, inputs["input_ids"].shape[1]
    tiles, size = vision.max_num_tiles, vision.image_size
    present = torch.arange(tiles) < torch.tensor([[1], [2]])
    return {
        "pixel_values": _noise(generator, BATCH, 1, tiles, vision.num_channels, size, size),
        "aspect_ratio_ids": torch.tensor([[1], [2]]),
        "aspect_ratio_mask": present[:, None].long(),
        "cross_attention_mask": present[:, None, None].expand(-1, length, 1, -1).long(),
        "attention_mask": torch.ones_like(inputs["input_ids"]),
    }


def _seen_pictures(config: Any, inputs: Any, generator: torch.Generator) -> dict[str, Any]:
    size, length = config.vision_config.image_size, inputs["input_ids"].shape[1]
    return {
        "pixel_values": _noise(generator, BATCH, 2, 3, size, size),
        "image_attention_mask": torch.ones(BATCH, length, 2, dtype=torch.long),
        "attention_mask": torch.ones_like(inputs["input_ids"]),
    }


def _positions_of_pictures(config: Any, inputs: Any, generator: torch.Generator) -> dict[str, Any]:
    numbers = config.latent_query_num
    ids, at = _ids([Run(1, FIRST_ID, [numbers] * BATCH)], generator)
    labels = ids.masked_fill(at > 0, NOT_TRAINED)
    return {"input_ids": ids, "labels": labels, "image_embeds_position_mask": at}


def _boxes(config: Any, inputs: Any, generator: torch.Generator) -> dict[str, Any]:
    corners = torch.rand((*inputs["input_ids"].shape, 2), generator=generator) / 2
    return {
        "bbox": torch.cat((corners, corners + 0.3), -1),
        "attention_mask": torch.ones_like(inputs["input_ids"]),
    }


def _heard(config: Any, inputs: Any, generator: torch.Generator) -> dict[str, Any]:
    """As many placeholders as the tower's two strides leave of the frames."""
    number = inputs["input_features"].shape[-1] // 4
    ids, special = _ids([Run(3, config.audio_token_id, [number] * BATCH)], generator)
    return {
        "input_ids": ids, "labels": ids.masked_fill(special > 0, NOT_TRAINED),
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip


def _crops(config: Any, inputs: Any, generator: torch.Generator) -> dict[str, Any]:
    """A whole picture and one crop of it; two by two features of each, and ends of their lines."""
    vision = config.vision_config
    size, patches = vision.crop_size, vision.crop_size // vision.patch_size
    side = patches // 2
    number = 2 * side * (side + 1) + 1
    ids, special = _ids([Run(1, vision.image_token_id, [number] * BATCH)], generator)
    return {
        "input_ids": ids, "labels": ids.masked_fill(special > 0, NOT_TRAINED),
        "image_pixel_values": _noise(generator, BATCH, 2, 3, size, size),
        "image_sizes": torch.full((BATCH, 2), size),
        "image_attention_mask": torch.ones(BATCH, 2, patches, patches, dtype=torch.bool),
    }  # fmt: skip


def _protein(config: Any, inputs: Any, generator: torch.Generator) -> dict[str, Any]:
    acids = torch.randint(5, 20, (BATCH, 10), generator=generator)
    return {
        "protein_input_ids": acids, "protein_attention_mask": torch.ones_like(acids),
        "attention_mask": torch.ones_like(inputs["input_ids"]),
    }  # fmt: skip


BESIDE: dict[str, Callable[..., dict[str, Any]]] = {
    "evolla": _protein,
    "phi4_multimodal": _crops,
    "idefics": _seen_pictures,
    "kosmos-2": _positions_of_pictures,
    "kosmos-2.5": _positions_of_pictures,
    "mllama": _behind_tiles,
    "paligemma": _suffix,
    "qwen2_audio": _heard,
    "udop": _boxes,
}
"""What a family takes beside the usual batch."""


def _target_alone(config: Any, generator: torch.Generator) -> dict[str, Any]:
    """A picture, and the text that a decoder writes."""
    vision = encoder(config, "image_size")
    size = _first(vision, "image_size", default=32)
    channels = _first(vision, "num_channels", default=3)
    return {
        "pixel_values": _noise(generator, BATCH, channels, size, size),
        "labels": torch.randint(FIRST_ID, LAST_ID, (BATCH, AFTER), generator=generator),
    }


def _read_and_written(config: Any, generator: torch.Generator) -> dict[str, Any]:
    given = _target_alone(config, generator)
    return {**given, "decoder_input_ids": given["labels"].roll(1, -1)}


def _text_with_codes(config: Any, generator: torch.Generator) -> dict[str, Any]:
    """A column of text tokens, and beside it one for each codebook of the sound."""
    text = torch.randint(FIRST_ID, 60, (BATCH, BEFORE + AFTER, 1), generator=generator)
    shape = (BATCH, BEFORE + AFTER, config.num_codebooks)
    codes = torch.randint(0, config.codebook_vocab_size - 1, shape, generator=generator)
    return {"input_ids": torch.cat((text, codes), -1), "labels": text[..., 0]}


def _actions(config: Any, generator: torch.Generator) -> dict[str, Any]:
    """What a robot sees, is told, and does."""
    vision = config.vlm_config.vision_config
    size = vision.image_size
    seen = (size // vision.patch_size) ** 2
    ids, _ = _ids([Run(1, config.vlm_config.image_token_id, [seen] * BATCH)], generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _noise(generator, BATCH, 1, 3, size, size),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
        "state": _noise(generator, BATCH, config.max_state_dim),
        "actions": _noise(generator, BATCH, config.chunk_size, config.max_action_dim),
    }


def _sound_added(config: Any, generator: torch.Generator) -> dict[str, Any]:
    """Text as long as the sound's features, which are added to it."""
    ids = torch.randint(FIRST_ID, LAST_ID, (BATCH, 12), generator=generator)
    sound = _noise(generator, BATCH, config.audio_config.num_mel_bins, FRAMES)
    return {"input_ids": ids, "labels": ids.clone(), "input_features": sound}


def _patches_alone(config: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        **_with_columns(config, {}, generator),
        "labels": torch.randint(FIRST_ID, LAST_ID, (BATCH, AFTER), generator=generator),
    }


INSTEAD: dict[str, Callable[..., dict[str, Any]]] = {
    "kyutai_speech_to_text": _text_with_codes,
    "pi0": _actions,
    "pix2struct": _patches_alone,
    "pp_formulanet": _read_and_written,
    "vision-encoder-decoder": _target_alone,
    "voxtral_realtime": _sound_added,
}
"""Batches of families that do not read text with placeholders in it."""
