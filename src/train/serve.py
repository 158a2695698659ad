"""``fusewright serve RUN``: hand a run to a server of language models.

A server is an executable on PATH, which takes this process's place: vLLM takes folders of models,
llama.cpp's ``llama-server`` GGUF files.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from ..errors import ModelError, RecipeError
from ..packages import install
from .checkpoint.save_model import LEAVE_BASE
from .consent import CODE_SWITCH, Consent
from .inference.run_folder import RunFolder, open_run
from .merge import merge
from .model.files import adapter_weights, in_shards, read_object
from .recipe.locate import locate
from .terminal import Terminal, say

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's --max-lora-rank."""


@dataclass(frozen=True)
class ServeOptions:
    """The options of the command.

    Attributes:
        server: name of a ``Server``; None: one that is installed.
        lora: serve base and adapter, instead of merging them.
        name: by which requests name the model; None: the folder's.
        extra: arguments that are passed on.
    """

    server: str | None = None
    lora: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    extra: Sequence[str] = ()


def serve(
    path: str, base_model: str | None, consent: Consent, options: ServeOptions,
    console: Console | None = None,
) -> None:  # fmt: skip
    """Become a server of the run, adapter, model or GGUF file at ``path``.

    An adapter is merged first, where that has not been done.

    Raises:
        RecipeError: no server is installed (the message has the commands), or it cannot serve this.
        ModelError: there is nothing usable, or it cannot be merged.
    """
    console = console or Terminal(highlight=False)
    target = _Target(path, base_model, consent, options, console)
    if options.server is not None and options.server not in SERVERS:
        raise RecipeError(f"--server: must be one of {', '.join(SERVERS)}, not {options.server}")
    servers = [SERVERS[options.server]] if options.server else list(SERVERS.values())
    installed = [server for server in servers if shutil.which(server.executable)]
    if not installed:
        raise RecipeError(_how_to_install(target, servers))
    refusals = []
    for server in installed:
        if why := server.why_not(target):
            refusals.append(f"{server.name}: {why}")
            continue
        target.prepare(server)
        command = server.command(target)
        say(console, shlex.join(command))
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(str(shutil.which(server.executable)), command)
    raise RecipeError("\n  ".join(("serve: no installed server can serve this:", *refusals)))


def vllm_line(path: str | Path, consent: Consent | None = None) -> str | None:
    """The command by which vLLM serves a run, an adapter or a model; None for one that scores.

    Where vLLM does not take an adapter, the line says why, and merges it first. Raises a ModelError
    if there is nothing usable at ``path``.
    """
    options = ServeOptions(lora=True)
    target = _Target(str(path), None, consent or Consent(), options, Terminal(quiet=True))
    run = target.run
    if run is None or _scores(run):
        return None
    refusal = _no_lora(run) if run.adapter else None
    if run.adapter and refusal is None:
        return f"for vLLM: {shlex.join(_vllm(target))}"
    target.options = replace(options, lora=False)
    commands = [_vllm(target)]
    if target.must_merge():
        commands.insert(0, ["fusewright", "merge", target.path])
    elif (outdated := target.outdated(target.merged)) is not None:
        return f"for vLLM: {outdated}"
    because = f" (merged, because {refusal})" if refusal else ""
    return f"for vLLM: {' && '.join(map(shlex.join, commands))}{because}"


def _scores(run: RunFolder) -> bool:
    """Whether a model has a head that classifies, in place of one that writes."""
    config = read_object(run.folder / ("adapter_config.json" if run.adapter else "config.json"))
    kinds = [config.get("task_type"), *(config.get("architectures") or ())]
    return any(str(kind).endswith(("_CLS", "Classification")) for kind in kinds)


def _how_to_install(target: _Target, servers: Sequence[Server]) -> str:
    names = " and ".join(server.executable for server in servers)
    lines = [f"serve: not on PATH: {names}; install one, and run:"]
    for server in servers:
        lines.append(f"{server.name}: {server.install}")
        why = server.why_not(target)
        if why is not None:
            lines.append(f"  ({why})")
            continue
        if server is SERVERS["vllm"] and target.must_merge():
            lines.append(f"  {shlex.join(['fusewright', 'merge', target.path])}")
        lines.append(f"  {shlex.join(server.command(target))}")
    return "\n  ".join(lines)


# --- what is served ------------------------------------------------------------------------------


class _Target:
    """What the caller named: a run, or a GGUF file; and how it is to be served."""

    def __init__(
        self, path: str, base_model: str | None, consent: Consent, options: ServeOptions,
        console: Console,
    ) -> None:  # fmt: skip
        self.path, self.options, self.consent, self.console = path, options, consent, console
        place = Path(path).expanduser()
        self.run: RunFolder | None = None
        self.ggufs = [place.resolve()] if place.suffix == ".gguf" and place.is_file() else []
        if not self.ggufs:
            self.ggufs = _ggufs(place) if place.is_dir() else []
            try:
                self.run = open_run(path, base_model, consent)
            except ModelError:
                if not self.ggufs:
                    raise
        self.name = options.name or (place.stem if place.is_file() else place.resolve().name)

    @property
    def merged(self) -> Path:
        """The folder of the whole model."""
        assert self.run is not None
        folder = self.run.folder
        return folder / "merged" if self.run.adapter or in_shards(folder) else folder

    def must_merge(self) -> bool:
        """Whether the whole model is still to be made."""
        return not self.options.lora and not (self.merged / "config.json").is_file()

    def prepare(self, server: Server) -> None:
        """Make what the server reads."""
        if server is SERVERS["vllm"] and self.run is not None and self.must_merge():
            merge(self.run, console=self.console)

    def outdated(self, made: Path) -> str | None:
        """Why a file or folder is no longer the run's: its adapter is newer."""
        if self.run is None or not self.run.adapter:
            return None
        files = [*self.run.folder.glob("adapter_model.*")]
        newest = max((file.stat().st_mtime for file in files), default=0.0)
        if made.stat().st_mtime >= newest:
            return None
        return f"{made} is older than the run's adapter: remove it, and it is made anew"


def _ggufs(folder: Path) -> list[Path]:
    """The models in GGUF in a folder, or in folders of it; of several parts, the first."""
    files = sorted({*folder.glob("*.gguf"), *folder.glob("*/*.gguf")})
    part = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
    return [
        file.resolve()
        for file in files
        if not file.name.startswith((".", "mmproj")) and not part.search(file.name)
    ]


# --- servers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A server of language models.

    Attributes:
        name: for ``--server``.
        install: how one gets it.
        why_not: why it cannot serve a target; None: it can.
        command: its command line, for a target that it can serve.
    """

    name: str
    executable: str
    install: str
    why_not: Callable[[_Target], str | None]
    command: Callable[[_Target], list[str]]


def _not_by_vllm(target: _Target) -> str | None:
    run = target.run
    if run is None:
        return "it is given folders with safetensors here, and this is a GGUF file"
    if target.options.lora:
        refusal = _no_lora(run)
        return refusal and f"{refusal}: serve it without --lora"
    if (target.merged / "config.json").is_file():
        return target.outdated(target.merged)
    return None


def _no_lora(run: RunFolder) -> str | None:
    """Why vLLM cannot put the run's adapter on its base; None: it can."""
    if not run.adapter:
        return f"{run.folder} has no adapter"
    config = read_object(run.folder / "adapter_config.json")
    names = adapter_weights(str(run.folder))
    others = [n for n in names if not re.search(r"\.lora_[AB]\.weight$", n)]
    if config.get("peft_type") != "LORA" or config.get("target_parameters") or others:
        what = others[0] if others else config.get("target_parameters") or config.get("peft_type")
        return f"it takes plain LoRA only, and this adapter has {what}"
    if (unread := next(filter(config.get, _UNREAD), None)) is not None:
        return f"it does not read {unread}, which this adapter has"
    if (init := config.get("init_lora_weights")) not in LEAVE_BASE:
        return f"it would not change the base as init_lora_weights: {init} does"
    if locate(run.base_model, [Path.cwd(), run.folder]).gguf_file is not None:
        return "the base is a GGUF file"
    if _rank(config) > _LORA_RANKS[-1]:
        return f"its ranks end at {_LORA_RANKS[-1]}"
    return None


_UNREAD = ("rank_pattern", "alpha_pattern", "layer_replication")
"""Settings of adapters that vLLM passes over: it scales all layers alike, and answers otherwise."""


def _rank(config: dict[str, object]) -> int:
    return int(str(config["r"]))


def _vllm(target: _Target, *more: str) -> list[str]:
    """``vllm serve`` with the model of a target, and ``more``."""
    run, options = target.run, target.options
    assert run is not None
    if options.lora:
        rank = _rank(read_object(run.folder / "adapter_config.json"))
        base = locate(run.base_model, [Path.cwd(), run.folder]).name
        revision = run.recipe.get("revision_of_model")
        model = [
            base, "--enable-lora", "--lora-modules", f"{target.name}={run.folder}",
            "--max-lora-rank", str(next(r for r in _LORA_RANKS if r >= rank)),
            *(["--tokenizer", str(run.tokenizer)] if run.tokenizer else []),
            *(["--revision", str(revision)] if revision and not Path(base).exists() else []),
        ]  # fmt: skip
    else:
        model = [str(target.merged), "--served-model-name", target.name]
    code = [CODE_SWITCH] if target.consent.trust_remote_code else []
    return ["vllm", "serve", *model, *more, *code, *options.extra]


def _not_by_llama(target: _Target) -> str | None:
    if target.options.lora:
        return "it takes adapters in GGUF only: serve it without --lora"
    if not target.ggufs:
        return (
            "it takes GGUF files, and there is none: "
            f"{shlex.join(['fusewright', 'export', target.path, '--format', 'gguf'])}"
        )
    if len(target.ggufs) > 1:
        names = ", ".join(str(file) for file in target.ggufs)
        return f"there are several GGUF files, name the one to serve: {names}"
    return target.outdated(target.ggufs[0])


def _llama(target: _Target) -> list[str]:
    file, options = target.ggufs[0], target.options
    towers = sorted(file.parent.glob("mmproj*.gguf"))
    return [
        "llama-server", "--model", str(file), *(["--mmproj", str(towers[0])] if towers else []),
        "--alias", target.name, "--jinja", *_address(options), *options.extra,
    ]  # fmt: skip


def _address(options: ServeOptions) -> list[str]:
    return ["--host", options.host, "--port", str(options.port)]


SERVERS = {
    server.name: server
    for server in (
        Server(
            "vllm", "vllm", install("vllm"), _not_by_vllm,
            lambda target: _vllm(target, *_address(target.options)),
        ),
        Server(
            "llama.cpp", "llama-server",
            "brew install llama.cpp, or a release of https://github.com/ggml-org/llama.cpp",
            _not_by_llama, _llama,
        ),
    )
}  # fmt: skip
