"""The keys of Axolotl's plugins, of images, and what Axolotl notes in its own files."""

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

_LABEL = "the model is read as a graph, whatever it derives from"
_COUNTED = "counted when the rows are prepared"
_NOTE = "Axolotl's own note"
_BENCHMARK = "use a benchmark harness on the saved model"
_FILTER = "leave it out: gradients are not filtered"
_DENSE = "leave it out: a router's gradient is that of the experts that it chose"
_ROUTED = "use adapter: lora with lora_target_parameters, which adapts the experts of the model"
_GYM = "only the plugin of NeMo Gym, with a preference method (key rl), reads it"
_EXPERTS = "use fsdp_config, which shares the weights of experts between devices, too"


KERNEL_PLUGINS = (
    "axolotl.integrations.liger.LigerPlugin",
    "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
    "axolotl.integrations.kernels.KernelsPlugin",
    "axolotl.integrations.fla_sm120_shim.FlaSm120ShimPlugin",
)
"""The plugins that change no result."""

_PLUGINS: Reasons = {
    **{name: ("subsumed", "fusewright's rewrites (key optimize)") for name in KERNEL_PLUGINS},
    "axolotl.integrations.swanlab.SwanLabPlugin": ("subsumed", "the keys swanlab_*"),
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
            "kd.KDPlugin": "train on the teacher's answers",
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
"""What to do in place of each plugin."""


class PluginKeys(Keys):
    """What extensions of Axolotl read, and what it notes by itself."""

    plugins: list[str] | None = not_yet("plugins are not loaded: remove it", values=_PLUGINS)
    """Python classes that extend Axolotl. Those that only bring kernels are subsumed. Unset:
    none."""

    spectrum_top_fraction: Float | None = not_yet("use unfrozen_parameters")
    """Share of the layers that are trained, by signal and noise. Unset: all."""

    spectrum_model_name: str | None = not_applicable("only spectrum_top_fraction reads it")
    """The model that the layers are chosen for. Unset: ``base_model``."""

    lm_eval_tasks: list[str] | None = not_yet(_BENCHMARK)
    """Benchmarks to run at the end. Unset: none."""

    lm_eval_batch_size: Int | None = not_applicable("only lm_eval_tasks reads it")
    """Batch size of these benchmarks. Unset: 8."""

    lm_eval_model: str | None = not_applicable("only lm_eval_tasks reads it")
    """The model that these benchmarks are run on. Unset: the result."""

    lm_eval_post_train: bool | None = not_applicable("only lm_eval_tasks reads it")
    """Run them after training. Unset: yes."""

    llmcompressor: CompressionKeys | None = not_yet(PRUNED)
    """Train sparse weights by LLM Compressor. Unset: no."""

    export: ExportKeys | None = not_applicable(EXPORT)
    """How the result is exported for llama.cpp. Unset: not at all."""

    mora: MoraKeys | None = not_yet(MORA)
    """Adapters with a square matrix (MoRA). Unset: none."""

    hatchery: HatcheryKeys | None = not_yet(ELSEWHERE)
    """A service that trains. Unset: none."""

    coreweave: CoreWeaveKeys | None = not_yet(PUBLISH)
    """A service that serves each checkpoint. Unset: none."""

    grokfast_alpha: Float | None = not_applicable("only Grokfast's plugin reads it")
    """Decay of the gradient's slow part (Grokfast). Unset: 0.98."""

    grokfast_lamb: Float | None = not_applicable("only Grokfast's plugin reads it")
    """How much that part is amplified. Unset: 2."""

    dense_mixer: bool | None = not_applicable("only DenseMixer's plugin reads it")
    """Let the router learn from all experts. Unset: yes, with the plugin."""

    nemo_gym_auto_clone: bool | None = not_applicable(_GYM)
    """Download NeMo Gym. Unset: no."""

    nemo_gym_auto_start: bool | None = not_applicable(_GYM)
    """Start its servers. Unset: yes."""

    nemo_gym_config_paths: list[str] | None = not_applicable(_GYM)
    """Configurations of its servers. Unset: none."""

    nemo_gym_datasets: list[dict[str, Any]] | None = not_applicable(_GYM)
    """Its datasets. Unset: none."""

    nemo_gym_dir: str | None = not_applicable(_GYM)
    """The folder of NeMo Gym. Unset: ``~/Gym``."""

    nemo_gym_enabled: bool | None = not_applicable(_GYM)
    """Take rewards from NeMo Gym. Unset: yes, with the plugin."""

    nemo_gym_head_port: Int | None = not_applicable(_GYM)
    """The port of its main server. Unset: 11000."""

    nemo_gym_max_turns: Int | None = not_applicable(_GYM)
    """Longest conversation, in turns. Unset: 10."""

    nemo_gym_model_name: str | None = not_applicable(_GYM)
    """The name that its servers have for the model. Unset: ``base_model``."""

    nemo_gym_multi_turn: bool | None = not_applicable(_GYM)
    """Let it hold whole conversations. Unset: no."""

    nemo_gym_run_timeout: Int | None = not_applicable(_GYM)
    """Longest conversation, in seconds. Unset: 300."""

    nemo_gym_server_timeout: Int | None = not_applicable(_GYM)
    """Longest wait for its servers, in seconds. Unset: 360."""

    nemo_gym_verify_timeout: Int | None = not_applicable(_GYM)
    """Longest judgement, in seconds. Unset: 30."""

    is_llama_derived_model: bool | None = not_applicable(_LABEL)
    """The model is built like Llama. Unset: seen by itself."""

    is_mistral_derived_model: bool | None = not_applicable(_LABEL)
    """The model is built like Mistral. Unset: seen by itself."""

    is_falcon_derived_model: bool | None = not_applicable(_LABEL)
    """The model is built like Falcon. Unset: seen by itself."""

    is_qwen_derived_model: bool | None = not_applicable(_LABEL)
    """The model is built like Qwen. Unset: seen by itself."""

    freeze_mm_modules: bool | None = not_applicable("only the language model is loaded")
    """Do not train the parts for images and sound. Unset: train them."""

    is_multimodal: bool | None = not_yet("train the language model by itself")
    """The model takes images, too. Unset: no."""

    processor_type: str | None = not_yet("train the language model by itself")
    """The class of transformers that prepares images. Unset: none."""

    image_size: Int | list[Int] | None = not_applicable(IMAGES)
    """The size that images are brought to, in pixels. Unset: as they are."""

    image_resize_algorithm: str | None = not_applicable(IMAGES)
    """How images are resized. Unset: bilinear."""

    axolotl_config_path: Any = not_applicable(_NOTE)
    """The path of an Axolotl recipe. Unset: none."""

    total_num_tokens: Int | None = not_applicable(_COUNTED)
    """Tokens of the rows, as counted before. Unset: counted."""

    total_supervised_tokens: Int | None = not_applicable(_COUNTED)
    """Trained tokens of the rows, as counted before. Unset: counted."""

    sample_packing_eff_est: Float | None = not_applicable("sequences are packed before training")
    """Estimate of how full packs are. Unset: known exactly."""

    role_boundaries: list[RoleBoundaryKeys] | None = not_applicable(IMAGES)
    """The marks of each role in a chat with images. Unset: those of the template's name."""

    processor_kwargs: dict[str, Any] | None = not_applicable("only processor_type reads it")
    """Arguments for the class that prepares images. Unset: none."""

    capabilities: Any = not_applicable(_NOTE)
    """What Axolotl has found of the GPU. Unset: not written."""

    env_capabilities: Any = not_applicable(_NOTE)
    """What Axolotl has found of the packages. Unset: not written."""
