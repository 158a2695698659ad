"""The sizes of an Oddity."""

from transformers import PretrainedConfig


class OddityConfig(PretrainedConfig):
    model_type = "oddity_of_the_tests"

    def __init__(
        self,
        n_words=211,
        size=64,
        n_stages=2,
        n_eyes=4,
        eye_size=16,
        turned=8,
        inner=96,
        loudness=0.25,
        ceiling=20.0,
        **kwargs,
    ):
        self.n_words, self.size, self.n_stages, self.inner = n_words, size, n_stages, inner
        self.n_eyes, self.eye_size, self.turned = n_eyes, eye_size, turned
        self.loudness, self.ceiling = loudness, ceiling
        super().__init__(**kwargs)
