"""The sizes of a Weaver, under names that nobody else uses."""

from transformers import PretrainedConfig


class WeaverConfig(PretrainedConfig):
    model_type = "weaver_of_the_tests"

    def __init__(
        self,
        lexicon=211,
        width=64,
        spread=112,
        depth=2,
        lanes=4,
        shared_lanes=2,
        tiny=1e-6,
        turn=10000.0,
        **kwargs,
    ):
        self.lexicon, self.width, self.spread, self.depth = lexicon, width, spread, depth
        self.lanes, self.shared_lanes, self.tiny, self.turn = lanes, shared_lanes, tiny, turn
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
