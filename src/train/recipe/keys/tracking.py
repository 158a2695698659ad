"""The keys of experiment trackers. An empty key is unset, and none of these is a need."""

from __future__ import annotations

from typing import Literal

from pydantic import SecretStr

from .base import Keys

_NOT_SERVED = "figures are not served while training; use one of the trackers above"
_COMPLETIONS = "completions of rl: grpo are in run.json and the report"
_CHAT = "chatting is a command: fusewright chat RUN"


class TrackingKeys(Keys):
    """Where the figures of a run go besides its own report."""

    resumable = True

    use_wandb: bool | None = None
    """Log to Weights & Biases. Unset: if ``wandb_project`` is set."""

    wandb_project: str | None = None
    """The project there. Unset: no logging, or its default project."""

    wandb_entity: str | None = None
    """The user or team there. Unset: one's own."""

    wandb_name: str | None = None
    """The name of the run. Unset: a random one."""

    wandb_run_id: str | None = None
    """The id of the run, to continue it. Unset: a new run."""

    wandb_mode: Literal["online", "offline", "disabled", "shared"] | None = None
    """``offline`` keeps the log here, ``disabled`` logs nothing. Unset: ``online``."""

    wandb_watch: Literal["false", "gradients", "all", "parameters"] | bool | None = None
    """What of the model is logged: ``gradients``, ``parameters`` or ``all``. Unset: nothing."""

    wandb_log_model: Literal["false", "end", "checkpoint"] | bool | None = None
    """Upload the model at the ``end`` or every ``checkpoint``. Unset: no."""

    use_mlflow: bool | None = None
    """Log to MLflow. Unset: if ``mlflow_experiment_name`` or ``mlflow_tracking_uri`` is set."""

    mlflow_tracking_uri: str | None = None
    """Where MLflow is. Unset: a folder ``mlruns``."""

    mlflow_experiment_name: str | None = None
    """The experiment there. Unset: its default experiment."""

    mlflow_run_name: str | None = None
    """The name of the run. Unset: a random one."""

    hf_mlflow_log_artifacts: bool = False
    """Upload every checkpoint to MLflow."""

    use_comet: bool | None = None
    """Log to Comet. Unset: if ``comet_project_name`` is set."""

    comet_api_key: SecretStr | None = None
    """Your API key; ``comet login`` is the better place for it. Unset: from there."""

    comet_workspace: str | None = None
    """The workspace there. Unset: one's own."""

    comet_project_name: str | None = None
    """The project there. Unset: its default."""

    comet_experiment_key: str | None = None
    """The id of the experiment, to continue it. Unset: a new one."""

    comet_mode: Literal["create", "get", "get_or_create"] | None = None
    """A new experiment, or one that is there. Unset: ``get_or_create``."""

    comet_online: bool | None = None
    """False keeps the log here. Unset: online."""

    use_tensorboard: bool = False
    """Log for TensorBoard, in ``output_dir/runs``."""

    use_trackio: bool | None = None
    """Log to Trackio. Unset: if ``trackio_project_name`` is set."""

    trackio_project_name: str | None = None
    """The project there. Unset: its default."""

    trackio_run_name: str | None = None
    """The name of the run. Unset: a random one."""

    trackio_space_id: str | None = None
    """The space on the hub that shows the log. Unset: only here."""

    use_swanlab: bool | None = None
    """Log to SwanLab. Unset: if ``swanlab_project`` is set."""

    swanlab_project: str | None = None
    """The project there. Unset: its default."""

    swanlab_experiment_name: str | None = None
    """The name of the run. Unset: a random one."""

    swanlab_workspace: str | None = None
    """The user or team there. Unset: one's own."""

    swanlab_mode: Literal["cloud", "local", "offline", "disabled"] | None = None
    """``local`` and ``offline`` keep the log here, ``disabled`` logs nothing. Unset: ``cloud``."""

    swanlab_api_key: SecretStr | None = None
    """Your API key; ``swanlab login`` is the better place for it. Unset: from there."""

    swanlab_web_host: str | None = None
    """The address of a server of one's own, for browsers. Unset: SwanLab's."""

    swanlab_api_host: str | None = None
    """The same for programs. Unset: SwanLab's."""
