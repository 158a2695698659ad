"""The keys of the file that Axolotl's ``--cloud`` reads: where a service trains, and in what."""

from __future__ import annotations

from typing import Any

from pydantic import SecretStr

from ..base import Int, Keys, UnreadKeys, not_yet, unread
from .services import ELSEWHERE

_KEY = unread("not yet available", ELSEWHERE)


class ImageBuildKeys(UnreadKeys):
    """``image_build``: a container image that is built first."""

    build_args: Any = _KEY
    context: Any = _KEY
    dockerfile: Any = _KEY
    platform: Any = _KEY
    tag: Any = _KEY


class ImageRegistryKeys(UnreadKeys):
    """``image_registry``: where Modal gets a private image."""

    provider: Any = _KEY
    secret: SecretStr | None = _KEY


class VolumeKeys(UnreadKeys):
    """An entry of ``volumes``: storage that Nebius mounts."""

    mode: Any = _KEY
    mount: Any = _KEY
    source: Any = _KEY


class CloudKeys(Keys):
    """Training by a cloud service."""

    provider: str | None = not_yet(ELSEWHERE)
    """The service that trains: ``baseten``, ``modal`` or ``nebius``. Unset: none."""

    image: str | None = not_yet(ELSEWHERE)
    """The container image to train in. Unset: the service's default."""

    image_build: ImageBuildKeys | None = not_yet(ELSEWHERE)
    """How to build the container image. Unset: it is not built."""

    image_registry: ImageRegistryKeys | None = not_yet(ELSEWHERE)
    """Credentials with which Modal downloads a private image. Unset: none."""

    docker_auth: dict[str, Any] | None = not_yet(ELSEWHERE)
    """Credentials with which Baseten downloads a private image. Unset: none."""

    platform: str | None = not_yet(ELSEWHERE)
    """The type of machine at Nebius. Unset: none."""

    preset: str | None = not_yet(ELSEWHERE)
    """The number of GPUs, CPUs and so on of the machine at Nebius. Unset: none."""

    profile: str | None = not_yet(ELSEWHERE)
    """The profile of the Nebius command line. Unset: its default."""

    parent_id: str | None = not_yet(ELSEWHERE)
    """The project at Nebius. Unset: that of the profile."""

    subnet_id: str | None = not_yet(ELSEWHERE)
    """The subnet at Nebius. Unset: its default."""

    disk_size: str | None = not_yet(ELSEWHERE)
    """The size of the machine's disk at Nebius. Unset: its default."""

    output: str | None = not_yet(ELSEWHERE)
    """Where Nebius stores the results. Unset: its default."""

    timeout: Int | None = not_yet(ELSEWHERE)
    """The longest time that a run may take at Nebius, in seconds. Unset: 86400."""

    show_context: bool | None = not_yet(ELSEWHERE)
    """Show which account at Nebius would be used, without training. Unset: no."""

    dry_run: bool | None = not_yet("use the option: fusewright train RECIPE --dry-run")
    """Show what would be sent to the service, without training. Unset: no."""

    volumes: list[VolumeKeys] | None = not_yet(ELSEWHERE)
    """Storage that Nebius mounts. Unset: none."""

    env: dict[str, str] | None = not_yet("set environment variables in your shell")
    """Environment variables of the run at Nebius. Unset: none."""

    env_secret: dict[str, str] | None = not_yet("set environment variables in your shell")
    """The same with values that are names of secrets at Nebius. Unset: none."""
