"""Keys of Axolotl that fusewright has no use for: other engines' kernels, plugins and methods.

All but ``plugins`` are in ``unread_keys.txt``.
"""

from __future__ import annotations

from .base import Keys, Reasons, not_yet

_ELSEWHERE = "fusewright trains on this machine: remove it"
_DIFFUSION = "only causal language models can be trained so far"


class SubsumedKeys(Keys):
    """Kernels and patches of other engines."""


class MethodKeys(Keys):
    """Other methods."""


_KERNEL_PLUGINS = (
    "axolotl.integrations.liger.LigerPlugin",
    "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
    "axolotl.integrations.kernels.KernelsPlugin",
    "axolotl.integrations.fla_sm120_shim.FlaSm120ShimPlugin",
)
"""The plugins that do not change results."""

_PLUGINS: Reasons = {
    **{name: ("subsumed", "fusewright's rewrites (key optimize)") for name in _KERNEL_PLUGINS},
    "axolotl.integrations.swanlab.SwanLabPlugin": ("subsumed", "the keys swanlab_*"),
    "axolotl.integrations.kd.KDPlugin": ("subsumed", "the keys kd_*"),
    "axolotl.integrations.expert_parallel.ExpertParallelPlugin": (
        "subsumed", "FSDP, which shards the weights of experts, too (key expert_parallel_size)",
    ),
    "axolotl.integrations.context_parallel.ContextParallelPlugin": (
        "subsumed", "torch's own ring attention (key context_parallel_size)",
    ),
    **{
        f"axolotl.integrations.{name}": ("not yet available", instead)
        for name, instead in {
            "spectrum.SpectrumPlugin": "use unfrozen_parameters",
            "lm_eval.LMEvalPlugin": "use a benchmark harness on the saved model",
            "llm_compressor.LLMCompressorPlugin": (
                "prune or compress the saved model with LLM Compressor itself"
            ),
            "grokfast.GrokfastPlugin": "leave it out: gradients are not filtered",
            "densemixer.DenseMixerPlugin": (
                "leave it out: routers only receive gradients from the experts that they chose"
            ),
            "mixlora.MixLoraPlugin": (
                "use adapter: lora with lora_target_parameters, which adapts the model's own "
                "experts"
            ),
            "mora.MoraPlugin": "use adapter: lora",
            "hatchery.HatcheryPlugin": _ELSEWHERE,
            "coreweave.CoreWeavePlugin": "upload output_dir yourself, or use hub_model_id",
            "nebius.NebiusCompletionPlugin": _ELSEWHERE,
            "nemo_gym.NemoGymPlugin": "only supervised training so far",
            "diffusion.DiffusionPlugin": _DIFFUSION,
            "diffusion_decision.DiffusionDecisionPlugin": _DIFFUSION,
        }.items()
    },
}  # fmt: skip
"""What to do instead of loading each plugin."""


class PluginKeys(Keys):
    """Keys that Axolotl's plugins read, and what Axolotl records in its own files."""

    plugins: list[str] | None = not_yet("plugins are not loaded: remove it", values=_PLUGINS)
    """Python classes that extend Axolotl. Those that only add kernels are subsumed. Unset: none."""


class CloudKeys(Keys):
    """Training by a cloud service."""
