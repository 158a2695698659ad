"""The keys of the model: where it is, its tokenizer, its dtype, its attention."""

from __future__ import annotations

from typing import Any, Literal

from .base import Float, Int, Keys, key, not_applicable, not_yet, subsumed

_OWN_MEMORY = "fusewright's memory planner: it decides what each block keeps (key memory)"


class SpecialTokens(Keys):
    """``special_tokens``: the tokens that play a part, by the part that they play."""

    bos_token: str | None = None
    """The token at the beginning of a text. Unset: the tokenizer's own."""

    eos_token: str | None = None
    """The token at the end of a text and of an answer. Unset: the tokenizer's own."""

    pad_token: str | None = None
    """The padding token. Unset: the tokenizer's own, or one that no text contains."""

    unk_token: str | None = None
    """The token for what is not in the vocabulary. Unset: the tokenizer's own."""

    additional_special_tokens: list[str] | None = None
    """Further tokens that are never split. Unset: the tokenizer's own."""


class ModelKeys(Keys):
    """Where the model and the tokenizer come from, and how they are loaded."""

    base_model: str
    """A Hugging Face id, a folder, a ``.gguf`` file, or ``package:NAME`` for the model that an
    installed Python package ships."""

    base_model_config: str | None = None
    """Where the model's configuration is loaded from, like ``base_model``. Unset: with the
    weights."""

    revision_of_model: str | None = key(aliases=["model_revision"])
    """Branch, tag or commit of ``base_model`` on the hub. Unset: its main branch."""

    model_type: str | None = key(aliases=["type_of_model"])
    """The class of transformers that loads the model, e.g. ``LlamaForCausalLM``. Unset, or
    ``AutoModelForCausalLM``: the class that the model's configuration names."""

    cls_model_config: str | None = None
    """The class of transformers that reads the configuration, e.g. ``LlamaConfig``. Unset:
    ``AutoConfig``."""

    trust_remote_code: bool = False
    """The model or its tokenizer needs Python code that comes with it. It is run only with
    ``--trust-remote-code`` on the command line; otherwise transformers' own classes are used."""

    overrides_of_model_config: dict[str, Any] | None = key(aliases=["model_config"])
    """Values of the model's configuration that are set before it is built, e.g.
    ``{rope_theta: 1000000}``. Unset: none."""

    overrides_of_model_kwargs: dict[str, Any] | None = key(aliases=["model_kwargs"])
    """Further arguments for transformers' ``from_pretrained``. Unset: none."""

    # --- tokenizer -------------------------------------------------------------------------------

    tokenizer_config: str | None = None
    """Where the tokenizer is loaded from, like ``base_model``. Unset: with the model."""

    tokenizer_type: str | None = None
    """The class of transformers that loads the tokenizer. Unset: ``AutoTokenizer``."""

    tokenizer_use_fast: bool = True
    """Use the fast tokenizer (in Rust). Masks by offsets need it."""

    tokenizer_legacy: bool | None = None
    """The ``legacy`` argument of old Llama tokenizers. Unset: the tokenizer's own choice."""

    special_tokens: SpecialTokens | None = None
    """Tokens that replace the tokenizer's own ``bos_token``, ``eos_token``, ``pad_token`` and so
    on. Unset: none are replaced."""

    tokens: list[str] | None = None
    """Tokens to add to the vocabulary. Unset: none."""

    added_tokens_overrides: dict[int, str] | None = None
    """New texts for reserved tokens of the vocabulary, by their ids. Unset: none."""

    resize_token_embeddings_to_32x: bool = False
    """Round the number of embedding rows up to a multiple of 32 when it grows."""

    mean_resizing_embeddings: bool = False
    """Initialize new embedding rows with the mean of the old ones. False: randomly."""

    shrink_embeddings: bool = False
    """Remove embedding rows that belong to no token of the tokenizer."""

    chat_template: str | None = None
    """The chat template: ``tokenizer_default``, a name such as ``chatml`` or ``llama3``,
    ``tokenizer_default_fallback_NAME``, or ``jinja``. Unset: the tokenizer's own."""

    chat_template_jinja: str | None = None
    """The template itself, as Jinja text or as the path of a file. Unset: see
    ``chat_template``."""

    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the template, e.g. ``{enable_thinking: false}``, in training and in generation.
    Unset: none."""

    default_system_message: str | None = None
    """The system message of chats (and of questions to the trained model) that have none, for
    templates that use one. Unset: the template's own."""

    tokenizer_use_mistral_common: bool | None = not_yet(
        "leave it out: the tokenizer of transformers is used"
    )
    """Use the tokenizer of the package ``mistral-common``. Unset: no."""

    tokenizer_save_jinja_files: bool = not_applicable(
        "transformers keeps the template in a file of its own", True
    )
    """Save the chat template as a file of its own; false: inside ``tokenizer_config.json``."""

    # --- numbers ---------------------------------------------------------------------------------

    bf16: bool | Literal["auto", "full"] = "auto"
    """Weights and computation in bfloat16 (adapters stay in float32); false: see ``fp16``, else
    float32. ``auto``: bfloat16 where the GPU or CPU has instructions for it, else float32."""

    bfloat16: bool = False
    """The same as ``bf16: true``."""

    fp16: bool = False
    """Weights in float16, with loss scaling. Needs a GPU."""

    float16: bool = False
    """The same as ``fp16: true``."""

    float32: bool = False
    """Weights and computation in float32."""

    tf32: bool | Literal["auto"] = "auto"
    """TensorFloat-32 for float32 matrix products on GPUs of Ampere or later. ``auto``: torch's
    default. No effect on a CPU."""

    fp8: bool | None = not_yet("set bf16: true")
    """Matrix products in 8-bit floating point. Unset: no."""

    load_in_4bit: bool = False
    """Keep the frozen weights in 4 bits (bitsandbytes; NF4 with double quantization)."""

    load_in_8bit: bool = False
    """Keep the frozen weights in 8 bits (bitsandbytes LLM.int8())."""

    bnb_config_kwargs: dict[str, Any] | None = None
    """Arguments of transformers' ``BitsAndBytesConfig`` that replace ours, e.g.
    ``{bnb_4bit_quant_type: fp4}``; ``bnb_4bit_quant_storage`` is the dtype of the weights where
    FSDP or ZeRO-3 shards them. Unset: none."""

    gptq: bool | None = not_yet("use a base model that is not quantized, with adapter: qlora")
    """The base model is quantized by GPTQ. Unset: no."""

    gptq_groupsize: Int | None = not_applicable("only gptq reads it")
    """Weights of a GPTQ model that share a scale. Unset: the model's own."""

    gptq_model_v1: bool | None = not_applicable("only gptq reads it")
    """The GPTQ model is in the old format. Unset: no."""

    fp8_enable_fsdp_float8_all_gather: bool | None = not_applicable("only fp8 with FSDP reads it")
    """Send 8-bit weights between devices. Unset: no."""

    reinit_weights: bool | None = not_yet("save a model with random weights, and name its folder")
    """Initialize the weights randomly. Unset: no."""

    model_quantization_config: str | None = not_yet("use load_in_4bit or load_in_8bit")
    """Another quantization of transformers, e.g. ``Mxfp4Config``. Unset: none."""

    model_quantization_config_kwargs: dict[str, Any] | None = not_yet("use bnb_config_kwargs")
    """Arguments for ``model_quantization_config``. Unset: none."""

    # --- attention -------------------------------------------------------------------------------

    attn_implementation: str | None = None
    """The attention of transformers, e.g. ``sdpa``, ``eager`` or ``flash_attention_2``. Unset: the
    model's own choice, which is ``sdpa`` for nearly all."""

    sdp_attention: bool = False
    """The same as ``attn_implementation: sdpa``."""

    eager_attention: bool = False
    """The same as ``attn_implementation: eager``."""

    flex_attention: bool = False
    """The same as ``attn_implementation: flex_attention``."""

    flex_attn_compile_kwargs: dict[str, Any] | None = not_applicable(
        "whole blocks are compiled: see codegen"
    )
    """Arguments of ``torch.compile`` for flex attention. Unset: none."""

    flash_attention: bool | None = subsumed(
        "torch's scaled dot-product attention, which has a flash kernel on GPUs; "
        "attn_implementation: flash_attention_2 asks for the package itself"
    )
    """Flash attention, which never stores the matrix of scores. Unset: not requested."""

    xformers_attention: bool | None = subsumed("torch's scaled dot-product attention")
    """The attention of the package xFormers. Unset: not requested."""

    s2_attention: bool | None = not_yet("leave it out, and lower sequence_len if memory is short")
    """Shifted sparse attention (LongLoRA). Unset: no."""

    sage_attention: bool | None = not_yet("use sdp_attention: true")
    """Attention with quantized products (SageAttention). Unset: no."""

    gemma4_hybrid_attn_impl: bool | None = subsumed("torch's scaled dot-product attention")
    """Two kinds of attention in one model. Unset: no."""

    experts_implementation: str | None = not_yet(
        "set it in overrides_of_model_kwargs: {experts_implementation: ...}"
    )
    """The experts of transformers, e.g. ``grouped_mm``. Unset: the model's own choice."""

    quantize_moe_experts: bool = not_yet("leave it out: linear layers are quantized", False)
    """Quantize bare weights of experts, too."""

    scaling_softmax: bool | None = not_yet("leave it out")
    """Scale the scores by the logarithm of the length (SSMax). Unset: no."""

    scaling_softmax_factor: Float | None = not_applicable("only scaling_softmax reads it")
    """The factor of that scale. Unset: 0.43."""

    scaling_softmax_bias: Float | None = not_applicable("only scaling_softmax reads it")
    """The bias of that scale. Unset: 0."""

    # --- memory and place ------------------------------------------------------------------------

    gradient_checkpointing: bool | Literal["unsloth", "offload", "offload_disk"] = key(
        False,
        values={
            "unsloth": ("subsumed", _OWN_MEMORY),
            "offload": ("subsumed", _OWN_MEMORY),
            "offload_disk": ("subsumed", _OWN_MEMORY),
        },
    )
    """Gradient checkpointing: keep only the inputs of each block, and recompute the rest in
    backward. ``unsloth`` and ``offload`` are read as true."""

    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    """Arguments for torch's checkpointing, e.g. ``{use_reentrant: false}``. Unset:
    ``use_reentrant: false``."""

    activation_offloading: bool | Literal["legacy", "disk"] | None = subsumed(_OWN_MEMORY)
    """Keep activations in CPU memory. Unset: no."""

    layer_offloading: bool | None = not_yet("use adapter: qlora, which needs less memory")
    """Keep frozen layers in CPU memory until they are used. Unset: no."""

    low_cpu_mem_usage: bool | None = subsumed("transformers, which always loads shard by shard")
    """Load the weights without a second copy in CPU memory. Unset: yes."""

    device: Any = not_applicable("the trainer uses the GPU if there is one, else the CPU")
    """The device of the model. Unset: chosen by the machine."""

    device_map: Any = not_yet(
        "leave it out: a process trains on one device; fsdp_config or deepspeed shards the model "
        "over several",
        values={"auto": ("not applicable", "the whole model is on the training device")},
    )
    """Which layers are on which device, as in transformers. Unset: all on the training device."""

    max_memory: dict[int | Literal["cpu", "disk"], int | str] | None = not_yet(
        "use memory: 8GB for the whole budget of the process"
    )
    """The maximum memory for weights, by device. Unset: all that is free."""

    gpu_memory_limit: Int | str | None = not_yet("use memory: 8GB for the process")
    """The maximum memory for weights on each GPU. Unset: all that is free."""

    embeddings_skip_upcast: bool | None = not_applicable("embeddings keep the dtype of the weights")
    """Leave the embeddings in 16 bits where weights are quantized. Unset: yes."""

    use_kernels: bool | None = subsumed("fusewright's own kernels (key optimize)")
    """Kernels from the hub's package ``kernels``. Unset: no."""

    experimental_skip_move_to_device: bool | None = not_applicable(
        "weights are loaded onto the training device"
    )
    """Do not move the model before it is sharded. Unset: yes."""
