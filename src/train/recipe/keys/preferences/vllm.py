"""The keys of ``vllm``: what generates completions, as a server or beside the trainer."""

from __future__ import annotations

from ..base import Int, Keys, PositiveFloat, PositiveInt, key, not_applicable

_SERVER = "it sets up a server, which is started apart, with vllm serve"


class VllmKeys(Keys):
    """``vllm``: settings for vLLM, which generates completions for GRPO."""

    host: str | None = None
    """Host of the server. Unset: ``trl.vllm_server_host``."""

    port: Int | None = key(gt=0, lt=65536)
    """Port of the server. Unset: ``trl.vllm_server_port``."""

    gpu_memory_utilization: PositiveFloat | None = key(le=1)
    """Fraction of a GPU's memory that vLLM beside the trainer takes. Unset: 0.3."""

    tensor_parallel_size: PositiveInt | None = None
    """Processes that share each layer of vLLM beside the trainer. Unset: 1."""

    max_model_len: PositiveInt | None = None
    """Longest prompt and completion, in tokens. Unset: what the model was made for."""

    data_parallel_size: PositiveInt | None = not_applicable(_SERVER)
    """Copies of the model in the server. Unset: 1."""

    device: str | None = not_applicable(_SERVER)
    """Device of the server. Unset: ``auto``."""

    dtype: str | None = not_applicable(_SERVER)
    """Dtype of the server's weights. Unset: ``auto``."""

    enable_prefix_caching: bool | None = not_applicable(_SERVER)
    """Keep the keys and values of prompts that begin alike. Unset: vLLM's choice."""

    enable_reasoning: bool | None = not_applicable(_SERVER)
    """Separate thoughts from answers. Unset: no."""

    reasoning_parser: str | None = not_applicable(_SERVER)
    """What separates thoughts from answers. Unset: none."""

    enforce_eager: bool | None = not_applicable(_SERVER)
    """Capture no CUDA graphs. Unset: vLLM's choice."""

    serve_module: str | None = not_applicable(_SERVER)
    """A Python module that is run as the server. Unset: vLLM's own server."""

    worker_extension_cls: str | None = not_applicable(_SERVER)
    """A class that extends the server's workers. Unset: none."""
