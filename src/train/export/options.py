"""What an export is to be: words, paths and programs, checked before anything is loaded."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import ModelError, RecipeError
from ...packages import install, install_extra
from ..inference.run_folder import RunFolder
from ..inference.run_recipe import recipe_for
from ..model.files import in_shards
from ..output_files import require_file_size, require_new
from ..recipe.export_formats import FORMATS, Format, format_named
from ..recipe.locate import nowhere
from ..recipe.preferences import head_of
from ..recipe.recipe import Recipe

_DEFAULTS = {"merged": None, "gguf": "q8_0", "ollama": "q8_0", "compressed-tensors": "fp8"}
"""What ``--format`` may be, and the quantization that it has by default."""


@dataclass(frozen=True)
class ExportOptions:
    """The options of the command.

    Attributes:
        kind: ``merged``, ``gguf``, ``compressed-tensors`` or ``ollama``.
        quantization: the name of a format of that kind; None: its default.
        output: the new folder; None: beside the run's files, named after the format.
        data: rows to judge on, in place of the run's.
        llama_cpp: where llama.cpp is.
        create: the name under which Ollama takes the model; None: it is not run.
        certify: read everything back and compare.
    """

    kind: str
    quantization: str | None = None
    output: Path | None = None
    data: Sequence[Path] = ()
    llama_cpp: Path | None = None
    create: str | None = None
    certify: bool = True
    max_shard_size: str = "5GB"
    dequantize: bool = False


@dataclass(frozen=True)
class ExportChoice:
    """What is written, by which programs, and where.

    Attributes:
        options: as asked; of a run that was trained for a format: that one, of the weights that it
            has seen.
        format: None: the merged model as it was trained.
        llama_cpp: of a format of GGUF.
    """

    options: ExportOptions
    format: Format | None
    llama_cpp: LlamaCpp | None
    output: Path


def choose(run: RunFolder, options: ExportOptions) -> ExportChoice:
    """Check the options, and that everything is there that they need; loads no model.

    Raises:
        RecipeError: an option is wrong, the folder is there already, or a program is missing.
        ModelError: the run is of no use for this format.
    """
    if options.kind not in _DEFAULTS:
        raise RecipeError(f"--format: {options.kind}: there are {', '.join(_DEFAULTS)}")
    if options.create and options.kind != "ollama":
        raise RecipeError("--create NAME goes with --format ollama")
    require_file_size(options.max_shard_size)
    recipe = recipe_for(run)
    if (head := head_of(recipe)).classifies:
        raise ModelError(
            f"{run.folder} holds a model that scores texts ({head.key}), and exports are for "
            "models that write; fusewright merge writes it for transformers"
        )
    options = _as_trained(options, recipe)
    named = options.quantization or _DEFAULTS[options.kind]
    writer = "gguf" if options.kind == "ollama" else options.kind
    format = format_named(named, writer) if named else None
    llama_cpp = None
    if writer == "merged" and not run.adapter and not in_shards(run.folder):
        raise ModelError(
            f"{run.folder} holds a whole model, which is merged already; export it to gguf or "
            "compressed-tensors"
        )
    if format is not None and writer == "gguf":
        llama_cpp = find_llama_cpp(format, options.llama_cpp)
    packed = format is not None and writer == "compressed-tensors"
    if packed and importlib.util.find_spec("compressed_tensors") is None:
        raise RecipeError(f"{named} needs compressed-tensors: {install_extra('export')}")
    if options.create:
        require_ollama()
    for path in options.data:
        if not path.expanduser().exists():
            raise RecipeError(f"--data: {nowhere(str(path), [Path.cwd()])}")
    name = format.name if format else "merged"
    name = f"ollama-{name}" if options.kind == "ollama" else name
    output = (options.output or run.folder / f"export-{name}").expanduser()
    require_new(output)
    return ExportChoice(options, format, llama_cpp, output)


def _as_trained(options: ExportOptions, recipe: Recipe) -> ExportOptions:
    """The options of a run that was trained for a format: that one, of the weights it has seen."""
    name, writer = recipe.rounds_as(), "gguf" if options.kind == "ollama" else options.kind
    if name is None or FORMATS[name].writer != writer:
        return options
    dequantize = options.dequantize or recipe.load_in_4bit or recipe.load_in_8bit
    return replace(options, quantization=options.quantization or name, dequantize=dequantize)


# --- programs ------------------------------------------------------------------------------------

VARIABLE = "FUSEWRIGHT_LLAMA_CPP"
_SCRIPT = "convert_hf_to_gguf"
_CONVERTERS = (f"{_SCRIPT}.py", "convert-hf-to-gguf")
_QUANTIZERS = ("llama-quantize", "build/bin/llama-quantize", "bin/llama-quantize")


@dataclass(frozen=True)
class LlamaCpp:
    """The programs of llama.cpp.

    Attributes:
        converter: the command that takes a folder of transformers.
        quantizer: the program that mixes types; None: llama-cpp-python's function does.
    """

    converter: tuple[str, ...]
    quantizer: str | None


def find_llama_cpp(format: Format, folder: Path | None = None) -> LlamaCpp:
    """Find what the format takes, in ``folder``, where ``FUSEWRIGHT_LLAMA_CPP`` says, or on PATH.

    Raises a RecipeError that names what is missing, and the command that brings it.
    """
    named = folder or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None and not named.expanduser().is_dir():
        raise RecipeError(f"{named} is not a folder; --llama-cpp names one with llama.cpp in it")
    found = _find(_CONVERTERS, named)
    if found is None:
        where = f"{named} has no {_SCRIPT}.py" if named else f"no {_SCRIPT}.py on PATH"
        raise RecipeError(
            f"GGUF is written by llama.cpp's converter, and there is {where}: git clone "
            f"https://github.com/ggml-org/llama.cpp, then --llama-cpp llama.cpp (or {VARIABLE})"
        )
    script = (sys.executable, found) if found.endswith(".py") else (found,)
    quantizer = None if format.type else _find(_QUANTIZERS, named)
    if not format.type and quantizer is None and not has_llama_cpp_python():
        raise RecipeError(
            f"{format.name} is made by llama.cpp's quantizer, and there is neither llama-quantize "
            f"{f'in {named}' if named else 'on PATH'} nor llama-cpp-python: "
            f"{install('llama-cpp-python')}"
        )
    return LlamaCpp(script, quantizer)


def _find(names: Sequence[str], folder: Path | None) -> str | None:
    if folder is not None:
        for path in (folder.expanduser() / name for name in names):
            if path.is_file():
                return str(path.resolve())
    return next((found for name in names if (found := shutil.which(name))), None)


def has_llama_cpp_python() -> bool:
    """Whether llama-cpp-python can be imported."""
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # not there, or for another processor
        return False
    return True


def require_ollama() -> str:
    """The path of ``ollama``; raises a RecipeError if it is not installed."""
    program = shutil.which("ollama")
    if program is None:
        raise RecipeError(
            "--create: there is no ollama on PATH; install it (https://ollama.com/download), or "
            "leave the option out"
        )
    return program
