"""The groups of keys for remote services, and for adapters and images of Axolotl's plugins."""

from __future__ import annotations

from typing import Any

from pydantic import SecretStr

from ..base import UnreadKeys, unread

ELSEWHERE = "fusewright trains on this machine: remove it"
PUBLISH = "upload output_dir yourself, or use hub_model_id"
MORA = "use adapter: lora"
IMAGES = "only is_multimodal reads it"
_ELSEWHERE = unread("not yet available", ELSEWHERE)
_PUBLISHED = unread("not yet available", PUBLISH)
_MORA = unread("not yet available", MORA)
_IMAGES = unread("not applicable", IMAGES)


class HatcheryKeys(UnreadKeys):
    """``hatchery``: training on a remote service."""

    api_key: SecretStr | None = _ELSEWHERE
    backend: Any = _ELSEWHERE
    base_url: Any = _ELSEWHERE
    future_timeout: Any = _ELSEWHERE
    lora_rank: Any = _ELSEWHERE
    loss_fn: Any = _ELSEWHERE
    loss_fn_config: Any = _ELSEWHERE
    max_sample_tokens: Any = _ELSEWHERE
    num_samples: Any = _ELSEWHERE
    pipeline: Any = _ELSEWHERE
    project_id: Any = _ELSEWHERE
    reward_funcs: Any = _ELSEWHERE
    sample_temperature: Any = _ELSEWHERE
    save_name_prefix: Any = _ELSEWHERE
    save_steps: Any = _ELSEWHERE
    train_attn: Any = _ELSEWHERE
    train_mlp: Any = _ELSEWHERE
    train_unembed: Any = _ELSEWHERE


class CoreWeaveKeys(UnreadKeys):
    """``coreweave``: serving checkpoints on CoreWeave."""

    api_token_env: Any = _PUBLISHED
    api_url: Any = _PUBLISHED
    async_publish: Any = _PUBLISHED
    bucket: Any = _PUBLISHED
    deployment_id: Any = _PUBLISHED
    gateway_url: Any = _PUBLISHED
    max_deltas: Any = _PUBLISHED
    max_shard_size: Any = _PUBLISHED
    model: Any = _PUBLISHED
    path_prefix: Any = _PUBLISHED
    poll_interval: Any = _PUBLISHED
    rollouts: Any = _PUBLISHED
    s3_endpoint_url: Any = _PUBLISHED
    s3_profile: Any = _PUBLISHED
    timeout: Any = _PUBLISHED


class MoraKeys(UnreadKeys):
    """``mora``: adapters with a square matrix (MoRA)."""

    mora_type: Any = _MORA
    use_mora: Any = _MORA


class RoleBoundaryKeys(UnreadKeys):
    """An entry of ``role_boundaries``: the tokens around a role's turns in chats with images."""

    end: Any = _IMAGES
    include_end: Any = _IMAGES
    include_start: Any = _IMAGES
    role: Any = _IMAGES
    start: Any = _IMAGES
