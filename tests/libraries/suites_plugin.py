"""A pytest plugin for other libraries' suites: each model is optimized when it is first called.

    pytest -p suites_plugin --optimize eager        # with this folder on PYTHONPATH

``--stand-ins DIR`` gives tests that load tiny models from the hub random ones of the same
architecture, where the hub cannot be reached. Without ``--optimize`` nothing else is changed.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import torch
from torch import nn

_KNOWN = "_optimized_by_suites_plugin"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two options."""
    parser.addoption("--optimize", choices=("eager", "inductor"), default=None)
    parser.addoption("--stand-ins", metavar="DIR", default=None)


def pytest_configure(config: pytest.Config) -> None:
    """Change the libraries before any test is collected."""
    folder, codegen = config.getoption("--stand-ins"), config.getoption("--optimize")
    if folder is not None:
        _stand_in(pathlib.Path(folder))
    if codegen is not None:
        config._optimized = []  # type: ignore[attr-defined]
        _optimize_at_first_call(codegen, config._optimized)  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how many models were optimized: a suite that called none proves nothing."""
    made = getattr(config, "_optimized", None)
    if made is not None:
        terminalreporter.write_line(f"fusewright optimized {len(made)} models")


def _optimize_at_first_call(codegen: str, made: list[str]) -> None:
    from fusewright import optimize

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _KNOWN not in self.__dict__:
            for module in self.modules():
                module.__dict__[_KNOWN] = True
            optimize(self, codegen=codegen)
            made.append(type(self).__name__)
        return nn.Module.__call__(self, *args, **kwargs)

    for kind in _outermost_classes():
        kind.__call__ = call


def _outermost_classes() -> list[Any]:
    """The classes whose instances users call: those of transformers, and PEFT's around them."""
    from transformers import PreTrainedModel

    try:
        from peft import PeftModel
    except ImportError:
        return [PreTrainedModel]
    return [PreTrainedModel, PeftModel]


_SIZES = {
    "vocab_size": 1000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
_ARCHITECTURES = {
    "opt": ("OPTForCausalLM", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1000}),
    "gptj": (
        "GPTJForCausalLM",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 1000},
    ),
    "llama": ("LlamaForCausalLM", _SIZES),
    "qwen2": ("Qwen2ForCausalLM", {**_SIZES, "num_key_value_heads": 2}),
    "mistral": ("MistralForCausalLM", {**_SIZES, "num_key_value_heads": 2}),
    "gemma3": ("Gemma3ForCausalLM", {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}),
}


_TINY = re.compile(rf"^[\w-]+/tiny-.*?({'|'.join(_ARCHITECTURES)})")


def _stand_in(folder: pathlib.Path) -> None:
    """Redirect ``from_pretrained`` of a tiny hub model to a random one, saved in ``folder``."""
    import transformers

    def local(name: Any) -> Any:
        found = re.search(
            r"^[\w-]+/tiny-.*?(opt|gpt2|gptj|llama|qwen2|mistral|gemma3)", str(name).lower()
        )
        if found is None:
            return name
        path = folder / found[1]
        if not path.exists():
            model, sizes = _ARCHITECTURES[found[1]]
            kind = getattr(transformers, model)
            torch.manual_seed(0)
            special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
            kind(kind.config_class(**sizes, **special)).save_pretrained(path)
        return str(path)

    def redirect(kind: Any) -> None:
        original = kind.from_pretrained.__func__

        def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
            return original(cls, local(name), *args, **kwargs)

        kind.from_pretrained = classmethod(from_pretrained)

    for kind in (
        transformers.AutoModelForCausalLM,
        transformers.AutoConfig,
        transformers.PreTrainedModel,
        transformers.PreTrainedConfig,
    ):
        redirect(kind)
