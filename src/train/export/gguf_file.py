"""Writes GGUF by llama.cpp's own converter and quantizer, and reads it back."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ...errors import ModelError, RecipeError, first_line
from ...kernels.tolerance import FACTOR
from ...packages import install
from ..consent import CODE_SWITCH, Consent
from ..inference.load_run import load_model_of
from ..inference.run_folder import open_run
from ..model.files import read_object
from ..model.from_pretrained import pretrained
from ..model.multimodal import towers
from ..model.rounding import gguf_roundtrip
from ..recipe.export_formats import Format
from .options import LlamaCpp, has_llama_cpp_python
from .reading import Compared, TokenizerRead, compared, meta_model_of
from .scores import Logits


def write_gguf(
    source: Path, folder: Path, format: Format, tools: LlamaCpp, with_towers: bool = False
) -> Path:
    """Convert the model in ``source`` to one file in ``folder``, and return its path.

    ``with_towers`` writes what a multimodal model has outside its language model, too, to a file
    whose name begins with ``mmproj-``. Raises a ModelError if llama.cpp does not know the model.
    """
    target = folder / f"model-{format.name}.gguf"
    if with_towers:
        _convert(tools, source, folder / "mmproj-model.gguf", "f16", "--mmproj")
    if format.type:
        _convert(tools, source, target, format.name)
        return target
    plain = folder / ".plain.gguf"
    _convert(tools, source, plain, _plain_type(source))
    try:
        _quantize(tools, plain, target, format)
    finally:
        plain.unlink(missing_ok=True)
    return target


def _plain_type(source: Path) -> str:
    """The type of GGUF that holds all values of a model as they are."""
    from safetensors import safe_open

    kinds = set()
    for path in source.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            kinds |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return "bf16" if kinds == {"BF16"} else "f16" if kinds == {"F16"} else "f32"


def _convert(tools: LlamaCpp, source: Path, target: Path, type: str, *options: str) -> None:
    _run(
        [*tools.converter, str(source), "--outfile", str(target), "--outtype", type, *options],
        target, f"llama.cpp's converter could not convert {source.name}",
    )  # fmt: skip


def _quantize(tools: LlamaCpp, plain: Path, target: Path, format: Format) -> None:
    what = f"llama.cpp's quantizer could not write {format.name}"
    if tools.quantizer is not None:
        _run([tools.quantizer, str(plain), str(target), format.name.upper()], target, what)
        return
    import gguf

    type = gguf.LlamaFileType[f"MOSTLY_{format.name.upper()}"].value
    # in a process of its own: the library writes a thousand lines to standard error
    _run([sys.executable, "-c", _QUANTIZE, str(plain), str(target), str(type)], target, what)


_QUANTIZE = """
import sys
import llama_cpp

parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = int(sys.argv[3])
source, target = (name.encode() for name in sys.argv[1:3])
sys.exit(llama_cpp.llama_model_quantize(source, target, parameters))
"""


def _run(command: Sequence[str], target: Path, what: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, check=False
    )
    if ended.returncode or not target.is_file():
        lines = [line for line in (ended.stderr or ended.stdout).splitlines() if line.strip()]
        last = lines[-1].strip() if lines else f"exit code {ended.returncode}"
        lacking = re.search(r"No module named '([\w-]+)", last)
        hint = f": {install(lacking[1])}" if lacking else ""
        raise ModelError(f"{what}: {last}{hint}{_no_room(target)}")


def _no_room(target: Path) -> str:
    free = shutil.disk_usage(target.parent).free
    return f"; the disk has {free / 1e6:,.0f} MB left" if free < 1e8 else ""


# --- reading it back -----------------------------------------------------------------------------


class GgufWriter:
    """Exports to GGUF by llama.cpp.

    Attributes:
        with_towers: whether there is more than a language model to write.
    """

    def __init__(self, format: Format, tools: LlamaCpp, consent: Consent) -> None:
        self.format, self.tools, self.consent = format, tools, consent
        self.with_towers = False
        self._errors: dict[str, float] = {}

    @property
    def name(self) -> str:
        """The name of the file that is written."""
        return f"model-{self.format.name}.gguf"

    def write(self, source: Path, folder: Path) -> None:
        """Convert the plain model in ``source``.

        Raises a RecipeError if that names code, which the converter would run unasked.
        """
        if not self.consent.trust_remote_code:
            for name in ("config.json", "tokenizer_config.json"):
                if (source / name).is_file() and "auto_map" in read_object(source / name):
                    raise RecipeError(
                        f"{source / name} names Python code (auto_map), which llama.cpp's "
                        f"converter may run: {CODE_SWITCH} allows it"
                    )
        model = meta_model_of(open_run(source, consent=self.consent))
        self.with_towers = bool(towers(model))
        write_gguf(source, folder, self.format, self.tools, self.with_towers)

    def compare(self, source: Path, folder: Path) -> Iterator[Compared]:
        """Compare each tensor with the plain model's, rounded to one of the types in the file.

        The rounding is that of ``gguf``, or ggml's; where neither is there for a type, a tensor may
        be 1.5 times as far from the plain one as that of the model compared before, the base, was.
        Raises a ValueError if transformers cannot read GGUF of this architecture.
        """
        path = folder / self.name
        model = load_model_of(open_run(source, consent=self.consent), dtype=None)
        read, kinds = tensors(path, model), types(path)
        before, self._errors = self._errors, {}
        for name, plain in model.state_dict().items():
            if name not in read and any(other in read for other in tied_to(model, name)):
                continue
            allowed = FACTOR * before[name] if name in before else None
            result = compared(name, plain, roundings(plain, kinds), read.get(name), allowed)
            self._errors[name] = result.error or 0.0
            yield result

    def load(self, folder: Path) -> Any:
        """The model as transformers reads it, in float32."""
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            model = pretrained(AutoModelForCausalLM, str(folder / self.name), dtype=torch.float32)
        return model.eval()

    def tokenizer(self, folder: Path, ours: Any) -> TokenizerRead:
        """The tokenizer in the file, as llama.cpp uses it; without that, by its list of tokens.

        ``ours`` is that of the run: without llama.cpp, a text's tokens are looked up by name.
        """
        path = folder / self.name
        template, end = (
            field(path, f"tokenizer.{n}") for n in ("chat_template", "ggml.eos_token_id")
        )
        if has_llama_cpp_python():
            import llama_cpp

            model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

            def encode(text: str) -> list[int]:
                ids: list[int] = model.tokenize(text.encode(), add_bos=False, special=True)
                return ids

        else:
            places = {token: i for i, token in enumerate(field(path, "tokenizer.ggml.tokens"))}

            def encode(text: str) -> list[int]:
                ids = ours(text, add_special_tokens=False)["input_ids"]
                return [places.get(token, -1) for token in ours.convert_ids_to_tokens(ids)]

        return TokenizerRead(encode, template, None if end is None else int(end))

    def other_reader(self, folder: Path, length: int) -> Logits | str:
        """What llama.cpp computes from the file, for texts of up to ``length`` tokens."""
        if not has_llama_cpp_python():
            return "llama-cpp-python is not installed"
        import llama_cpp

        size = max(length, 64)
        model = llama_cpp.Llama(
            str(folder / self.name), n_ctx=size, n_batch=size, logits_all=True, verbose=False,
            n_gpu_layers=0,
        )  # fmt: skip

        def logits(ids: list[int]) -> Tensor:
            model.reset()
            model.eval(ids)
            return torch.from_numpy(np.array(model.scores[: len(ids)]))

        return logits


def tensors(path: Path, model: Any) -> dict[str, Tensor]:
    """The tensors of a file as transformers reads them: in float32, by their names in ``model``.

    ``model`` may be on the meta device. Raises a ValueError if transformers does not read GGUF of
    this architecture.
    """
    from transformers import modeling_gguf_pytorch_utils

    read: Any = modeling_gguf_pytorch_utils.load_gguf_checkpoint
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            content = read(str(path), return_tensors=True, model_to_load=model)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise ValueError(f"transformers cannot read it: {first_line(error).rstrip('.')}") from error
    result: dict[str, Tensor] = content["tensors"]
    return result


def tied_to(model: Any, name: str) -> list[str]:
    """The other names of a tensor of a model."""
    state = model.state_dict()
    address = state[name].data_ptr()
    return [n for n, t in state.items() if n != name and t.data_ptr() == address]


def types(path: Path) -> list[str]:
    """The types of a file's tensors, the most frequent first."""
    import gguf

    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors]
    return sorted(set(kinds), key=lambda name: -kinds.count(name))


def roundings(weight: Tensor, kinds: Sequence[str]) -> dict[str, Tensor | None]:
    """``weight`` rounded to those of ``kinds`` that fit; None where no library here writes one."""
    result: dict[str, Tensor | None] = {}
    for kind in kinds:
        try:
            result[kind] = gguf_roundtrip(weight, kind)
        except NotImplementedError:
            result[kind] = None
        except ValueError:  # its blocks do not divide the rows
            continue
    return result


def field(path: Path, name: str) -> Any:
    """A field of a file's metadata, or None."""
    import gguf

    value = gguf.GGUFReader(path).get_field(name)
    return None if value is None else value.contents()
