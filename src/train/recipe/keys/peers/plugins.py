"""The keys of Axolotl's plugins, of images, and what Axolotl records in its own files."""

from __future__ import annotations

from typing import Any

from ..base import Float, Int, Keys, Reasons, not_applicable, not_yet
from .compression import EXPORT, PRUNED, CompressionKeys, ExportKeys
from .diffusion import DIFFUSION
from .services import (
    ELSEWHERE,
    IMAGES,
    MORA,
    PUBLISH,
    CoreWeaveKeys,
    HatcheryKeys,
    MoraKeys,
    RoleBoundaryKeys,
)

_LABEL = "models are compiled from their graphs, whatever they are derived from"
_COUNTED = "counted when the rows are prepared"
_NOTE = "Axolotl records it for its own use"
_BENCHMARK = "use a benchmark harness on the saved model"
_FILTER = "leave it out: gradients are not filtered"
_DENSE = "leave it out: routers only receive gradients from the experts that they chose"
_ROUTED = "use adapter: lora with lora_target_parameters, which adapts the model's own experts"
_GYM = "only NeMo Gym's plugin reads it, with a reinforcement learning method (key rl)"
_EXPERTS = "use fsdp_config, which also shards the weights of experts"


KERNEL_PLUGINS = (
    "axolotl.integrations.liger.LigerPlugin",
    "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
    "axolotl.integrations.kernels.KernelsPlugin",
    "axolotl.integrations.fla_sm120_shim.FlaSm120ShimPlugin",
)
"""The plugins that do not change results."""

_PLUGINS: Reasons = {
    **{name: ("subsumed", "fusewright's rewrites (key optimize)") for name in KERNEL_PLUGINS},
    "axolotl.integrations.swanlab.SwanLabPlugin": ("subsumed", "the keys swanlab_*"),
    "axolotl.integrations.kd.KDPlugin": ("subsumed", "the keys kd_*"),
    "axolotl.integrations.context_parallel.ContextParallelPlugin": (
        "subsumed", "torch's own ring attention (key context_parallel_size)",
    ),
    **{
        f"axolotl.integrations.{name}": ("not yet available", instead)
        for name, instead in {
            "expert_parallel.ExpertParallelPlugin": _EXPERTS,
            "spectrum.SpectrumPlugin": "use unfrozen_parameters",
            "lm_eval.LMEvalPlugin": _BENCHMARK,
            "llm_compressor.LLMCompressorPlugin": PRUNED,
            "grokfast.GrokfastPlugin": _FILTER,
            "densemixer.DenseMixerPlugin": _DENSE,
            "mixlora.MixLoraPlugin": _ROUTED,
            "mora.MoraPlugin": MORA,
            "hatchery.HatcheryPlugin": ELSEWHERE,
            "coreweave.CoreWeavePlugin": PUBLISH,
            "nebius.NebiusCompletionPlugin": ELSEWHERE,
            "nemo_gym.NemoGymPlugin": "only supervised training so far",
            "diffusion.DiffusionPlugin": DIFFUSION,
            "diffusion_decision.DiffusionDecisionPlugin": DIFFUSION,
        }.items()
    },
}  # fmt: skip
"""What to do instead of loading each plugin."""


class PluginKeys(Keys):
    """Keys that Axolotl's plugins read, and what Axolotl records in its own files."""

    plugins: list[str] | None = not_yet("plugins are not loaded: remove it", values=_PLUGINS)
    """Python classes that extend Axolotl. Those that only add kernels are subsumed. Unset: none."""

    spectrum_top_fraction: Float | None = not_yet("use unfrozen_parameters")
    """Fraction of the layers to train, those with the highest signal-to-noise ratio. Unset: all."""

    spectrum_model_name: str | None = not_applicable("only spectrum_top_fraction reads it")
    """The model whose signal-to-noise ratios are used. Unset: ``base_model``."""

    lm_eval_tasks: list[str] | None = not_yet(_BENCHMARK)
    """Benchmarks to run after training. Unset: none."""

    lm_eval_batch_size: Int | None = not_applicable("only lm_eval_tasks reads it")
    """Batch size of the benchmarks. Unset: 8."""

    lm_eval_model: str | None = not_applicable("only lm_eval_tasks reads it")
    """The model to run the benchmarks on. Unset: the trained model."""

    lm_eval_post_train: bool | None = not_applicable("only lm_eval_tasks reads it")
    """Run the benchmarks right after training. Unset: yes."""

    llmcompressor: CompressionKeys | None = not_yet(PRUNED)
    """Train sparse weights with LLM Compressor. Unset: no."""

    export: ExportKeys | None = not_applicable(EXPORT)
    """Settings for exporting the trained model to llama.cpp. Unset: it is not exported."""

    mora: MoraKeys | None = not_yet(MORA)
    """Settings for MoRA adapters, which have a square matrix. Unset: none."""

    hatchery: HatcheryKeys | None = not_yet(ELSEWHERE)
    """Settings for training on a remote service. Unset: none."""

    coreweave: CoreWeaveKeys | None = not_yet(PUBLISH)
    """Settings for serving checkpoints on CoreWeave. Unset: none."""

    grokfast_alpha: Float | None = not_applicable("only Grokfast's plugin reads it")
    """Decay of the moving average of the gradients (Grokfast). Unset: 0.98."""

    grokfast_lamb: Float | None = not_applicable("only Grokfast's plugin reads it")
    """Factor by which that average is amplified. Unset: 2."""

    dense_mixer: bool | None = not_applicable("only DenseMixer's plugin reads it")
    """Let the router receive gradients from all experts. Unset: yes, with the plugin."""

    nemo_gym_auto_clone: bool | None = not_applicable(_GYM)
    """Clone the repository of NeMo Gym. Unset: no."""

    nemo_gym_auto_start: bool | None = not_applicable(_GYM)
    """Start the servers of NeMo Gym. Unset: yes."""

    nemo_gym_config_paths: list[str] | None = not_applicable(_GYM)
    """Configuration files of the servers. Unset: none."""

    nemo_gym_datasets: list[dict[str, Any]] | None = not_applicable(_GYM)
    """Datasets of NeMo Gym. Unset: none."""

    nemo_gym_dir: str | None = not_applicable(_GYM)
    """Folder of NeMo Gym. Unset: ``~/Gym``."""

    nemo_gym_enabled: bool | None = not_applicable(_GYM)
    """Compute rewards with NeMo Gym. Unset: yes, with the plugin."""

    nemo_gym_head_port: Int | None = not_applicable(_GYM)
    """Port of the head server. Unset: 11000."""

    nemo_gym_max_turns: Int | None = not_applicable(_GYM)
    """Maximum number of turns of a conversation. Unset: 10."""

    nemo_gym_model_name: str | None = not_applicable(_GYM)
    """Name under which the servers address the model. Unset: ``base_model``."""

    nemo_gym_multi_turn: bool | None = not_applicable(_GYM)
    """Run conversations of several turns. Unset: no."""

    nemo_gym_run_timeout: Int | None = not_applicable(_GYM)
    """Timeout of a conversation, in seconds. Unset: 300."""

    nemo_gym_server_timeout: Int | None = not_applicable(_GYM)
    """Timeout for starting the servers, in seconds. Unset: 360."""

    nemo_gym_verify_timeout: Int | None = not_applicable(_GYM)
    """Timeout for scoring an answer, in seconds. Unset: 30."""

    is_llama_derived_model: bool | None = not_applicable(_LABEL)
    """Whether the model is derived from Llama. Unset: detected."""

    is_mistral_derived_model: bool | None = not_applicable(_LABEL)
    """Whether the model is derived from Mistral. Unset: detected."""

    is_falcon_derived_model: bool | None = not_applicable(_LABEL)
    """Whether the model is derived from Falcon. Unset: detected."""

    is_qwen_derived_model: bool | None = not_applicable(_LABEL)
    """Whether the model is derived from Qwen. Unset: detected."""

    freeze_mm_modules: bool | None = not_applicable("only the language model is loaded")
    """Freeze the vision and audio modules. Unset: no."""

    is_multimodal: bool | None = not_yet("images are not supported: train on text only")
    """Whether the model also takes images. Unset: no."""

    processor_type: str | None = not_yet("images are not supported: train on text only")
    """The transformers class that preprocesses images. Unset: none."""

    image_size: Int | list[Int] | None = not_applicable(IMAGES)
    """The size that images are resized to, in pixels. Unset: they are not resized."""

    image_resize_algorithm: str | None = not_applicable(IMAGES)
    """The algorithm that images are resized with. Unset: bilinear."""

    axolotl_config_path: Any = not_applicable(_NOTE)
    """Path of the recipe, as recorded by Axolotl. Unset: not recorded."""

    total_num_tokens: Int | None = not_applicable(_COUNTED)
    """Number of tokens in the dataset. Unset: counted."""

    total_supervised_tokens: Int | None = not_applicable(_COUNTED)
    """Number of trained tokens in the dataset. Unset: counted."""

    sample_packing_eff_est: Float | None = not_applicable("sequences are packed before training")
    """Estimated fraction of each packed sequence that is filled. Unset: known exactly."""

    role_boundaries: list[RoleBoundaryKeys] | None = not_applicable(IMAGES)
    """The tokens that begin and end each role's turns in chats with images. Unset: those of the
    chat template."""

    processor_kwargs: dict[str, Any] | None = not_applicable("only processor_type reads it")
    """Arguments for the class that preprocesses images. Unset: none."""

    capabilities: Any = not_applicable(_NOTE)
    """Properties of the GPU, as recorded by Axolotl. Unset: not recorded."""

    env_capabilities: Any = not_applicable(_NOTE)
    """Versions of packages, as recorded by Axolotl. Unset: not recorded."""
