"""What is measured: the models of ``train_step.py`` and the op shapes of ``ops.py``.

A model is either the real SmolLM2 or a Llama of a published shape with random weights: speed and
memory depend on the shape, not on the values. An op shape is one decoder layer's worth of sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """A decoder model's sizes.

    Attributes:
        layers: decoder blocks.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads.
        ffn: width of the MLP.
        vocab: rows of the embedding and of the output head.
        head_dim: width of one head.
        tied: whether the output head is the embedding.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head_dim: int
    tied: bool = False

    def llama_config(self) -> Any:
        """The transformers config of a Llama of these sizes."""
        from transformers import LlamaConfig

        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.ffn,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=16384,
            rope_theta=500000.0,
        )


MODELS: dict[str, ModelShape] = {
    "tiny-llama": ModelShape(2, 64, 4, 2, 176, 512, 16),
    "smollm2-shape": ModelShape(30, 576, 9, 3, 1536, 49152, 64, tied=True),
    "qwen3-0.6b": ModelShape(28, 1024, 16, 8, 3072, 151936, 128, tied=True),
    "llama-1b": ModelShape(16, 2048, 32, 8, 8192, 128256, 64, tied=True),
    "llama-8b-4layers": ModelShape(4, 4096, 32, 8, 14336, 128256, 128),
    "llama-8b": ModelShape(32, 4096, 32, 8, 14336, 128256, 128),
    "qwen3-8b": ModelShape(36, 4096, 32, 8, 12288, 151936, 128),
    "gemma-2-9b": ModelShape(42, 3584, 16, 8, 14336, 256000, 256, tied=True),
    "gpt2-vocabulary": ModelShape(12, 768, 12, 12, 3072, 50257, 64, tied=True),
}
"""Random-weight Llamas by name. ``llama-1b`` and ``llama-8b`` are Llama 3.2's and 3.1's shapes;
``llama-8b-4layers`` is the latter cut to four blocks, to fit the time of a short GPU run."""


def model_shape(name: str) -> ModelShape:
    """A model of ``MODELS``, or one with other sizes: ``smollm2-shape,layers=8,vocab=32000``.

    Raises:
        ValueError: there is no such model or size.
    """
    base, *changes = name.split(",")
    if base not in MODELS:
        raise ValueError(f"unknown model {base!r}; known: {', '.join(MODELS)}")
    sizes = dict(change.partition("=")[::2] for change in changes)
    known = {"layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "head_dim"}
    if not sizes.keys() <= known or not all(value.isdecimal() for value in sizes.values()):
        raise ValueError(f"{name!r}: sizes are {', '.join(sorted(known))}, each SIZE=NUMBER")
    return replace(MODELS[base], **{size: int(value) for size, value in sizes.items()})


@dataclass(frozen=True)
class OpShape:
    """The sizes one op is measured at: ``batch * seq`` tokens through a layer of ``model``.

    Attributes:
        batch: sequences.
        seq: tokens per sequence.
        model: the layer's sizes.
        rank: LoRA rank.
    """

    batch: int
    seq: int
    model: ModelShape
    rank: int = 16

    def label(self, name: str) -> str:
        """The row's name in tables and CSV files."""
        return f"{name}-{self.batch}x{self.seq}"


def op_shapes(device: str, quick: bool, smallest: bool = False) -> dict[str, OpShape]:
    """The op shapes for a kind of device, by label.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        quick: one shape in place of the whole range.
        smallest: one that takes no time, to try the program.
    """
    small, middle, large = MODELS["smollm2-shape"], MODELS["llama-1b"], MODELS["llama-8b"]
    odd = ModelShape(1, 252, 6, 2, 507, 1231, 42)
    if smallest:
        tiny = OpShape(2, 16, MODELS["tiny-llama"])
        return {tiny.label("tiny"): tiny}
    if device == "cpu":
        few = [("smollm2", OpShape(2, 128, small))]
        more = [("odd", OpShape(3, 123, odd))]
        more += [("smollm2", OpShape(4, 256, small)), ("smollm2", OpShape(8, 512, small))]
    else:
        few = [("llama-8b", OpShape(2, 2048, large))]
        more = [("odd", OpShape(3, 123, odd)), ("smollm2", OpShape(8, 512, small))]
        more += [("llama-1b", OpShape(2, 2048, middle)), ("llama-8b", OpShape(1, 8192, large))]
    named = few if quick else few + more
    return {shape.label(name): shape for name, shape in named}
