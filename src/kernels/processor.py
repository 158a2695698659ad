"""Describe the CPU of this machine: ops choose their forms by this record.

A record decides what is *chosen*, never what is executed: PyTorch and oneDNN look at the CPU
themselves, and the C++ kernels are compiled for the one that is there. So any record is safe on any
CPU, and gives the same results in another form. Tests assume other processors than theirs.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import FusewrightError


@dataclass(frozen=True, slots=True)
class Processor:
    """The properties that decide which form of a computation is the fastest.

    ``vectors`` are the widest of PyTorch's own kernels, as it names them: ``"AVX512"``, ``"AVX2"``,
    ``"DEFAULT"``, or a name of another architecture's. ``slow_products`` are the 16-bit dtypes
    without instructions: PyTorch multiplies their matrices in plain loops, or oneDNN imitates the
    instructions on a CPU with AVX-512, at a fifth to an eighth of fp32's speed.
    """

    vectors: str
    bfloat16: bool  # whether instructions multiply bfloat16, whatever they are called
    avx512_bf16: bool  # whether those of AVX-512 do
    amx: bool  # whether there are tiles of bfloat16
    slow_products: tuple[torch.dtype, ...]

    def thin_factors_first(self) -> bool:
        """Whether thin times wide is faster than wide times thin; not so on all processors."""
        # Measured on Intel with AMX, 256 to 4,096 rows: wide first takes 1.1 (rank 64) to 3.6 times
        # (rank 8) as long in fp32, and 1.0 to 1.7 times in bf16. On AMD it is the other way round.
        # On Intel with AVX-512 alone (which AMD has with products of bf16 only), fp32, rank 8 and
        # 16, 256 to 2,048 rows of 256 to 2,048 features: wide first takes 1.2 to 3.2 times as long.
        return self.amx or (self.vectors == "AVX512" and not self.avx512_bf16)

    def instructions(self) -> list[str]:
        """Those that make matrix products fast, as people name them."""
        has = {
            "AVX2": self.vectors in ("AVX2", "AVX512"),
            "AVX-512": self.vectors == "AVX512",
            "AVX-512 bf16": self.avx512_bf16,
            "AMX": self.amx,
        }
        return [name for name, is_there in has.items() if is_there]


_BF16, _FP16 = torch.bfloat16, torch.float16

KINDS = {
    "avx2": Processor("AVX2", False, False, False, (_BF16, _FP16)),
    "avx512": Processor("AVX512", False, False, False, (_BF16, _FP16)),
    "avx512_bf16": Processor("AVX512", True, True, False, (_FP16,)),
    "amx": Processor("AVX512", True, True, True, ()),
}
"""The kinds of x86 processors that choices tell apart, by the names of ``FUSEWRIGHT_PROCESSOR``."""

_WITHOUT_BF16 = (
    "sse41",
    "avx",
    "avx2",
    "avx2_vnni",
    "avx2_vnni_2",
    "avx512_core",
    "avx512_core_vnni",
)
_WITHOUT_AMX = (
    *_WITHOUT_BF16,
    "avx512_core_bf16",
    "avx512_core_fp16",
    "avx10_1_512",
    "avx10_2_512",
)
"""Values of ``ONEDNN_MAX_CPU_ISA`` that keep oneDNN from these instructions."""


def this_machine() -> Processor:
    """What PyTorch and oneDNN find here, and may use.

    ``ATEN_CPU_CAPABILITY`` narrows the vectors (but no matrix products, which are oneDNN's), and
    ``ONEDNN_MAX_CPU_ISA`` the products.
    """
    limit = _onednn_limit()
    avx512_bf16 = torch.cpu._is_avx512_bf16_supported() and limit not in _WITHOUT_BF16
    amx = torch.cpu._is_amx_tile_supported() and limit not in _WITHOUT_AMX
    bfloat16 = avx512_bf16 or amx if _is_x86() else _onednn_multiplies(_BF16)
    fast = {_BF16: bfloat16, _FP16: _onednn_multiplies(_FP16)}
    slow = tuple(dtype for dtype, is_fast in fast.items() if not is_fast)
    vectors = torch.backends.cpu.get_cpu_capability()
    return Processor(vectors, bfloat16, avx512_bf16, amx, slow)


def limits() -> list[str]:
    """What keeps this process from what the CPU has, as in ``ATEN_CPU_CAPABILITY=avx2``."""
    names = (
        "FUSEWRIGHT_PROCESSOR",
        "ATEN_CPU_CAPABILITY",
        "ONEDNN_MAX_CPU_ISA",
        "DNNL_MAX_CPU_ISA",
    )
    return [f"{name}={value}" for name in names if (value := os.environ.get(name))]


def _onednn_limit() -> str:
    names = "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"  # the first that is set, as oneDNN has it
    return next((value for name in names if (value := os.environ.get(name))), "all").lower()


def _onednn_multiplies(dtype: torch.dtype) -> bool:
    name = {_BF16: "_is_mkldnn_bf16_supported", _FP16: "_is_mkldnn_fp16_supported"}[dtype]
    check = getattr(torch.ops.mkldnn, name, None)  # None: a PyTorch that was built without oneDNN
    return check is not None and bool(check())


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def _named(name: str) -> Processor:
    if name not in KINDS:
        raise FusewrightError(f"FUSEWRIGHT_PROCESSOR={name!r} is not one of {', '.join(KINDS)}")
    return KINDS[name]


# made at import: a compiler that traces an op cannot call PyTorch's checks
_name = os.environ.get("FUSEWRIGHT_PROCESSOR")
_current = _named(_name) if _name else this_machine()


def processor() -> Processor:
    """The processor that this process chooses for."""
    return _current


@contextlib.contextmanager
def assume(other: Processor) -> Iterator[None]:
    """Choose for another processor: for plans of runs elsewhere, and for tests.

    It holds for all threads. Graphs that were captured before keep their forms.
    """
    global _current
    before, _current = _current, other
    try:
        yield
    finally:
        _current = before


def model_name() -> str:
    """What the CPU is called."""
    names = (line for line in _cpuinfo() if line.startswith("model name"))
    name = next(names, "").partition(":")[2].strip()
    return name or platform.processor() or platform.machine()


def instruction_set() -> str:
    """All that decides which instructions there are, whatever is chosen: for compiled code."""
    kinds = ("flags", "features", "model name", "cpu part")
    lines = sorted({line for line in _cpuinfo() if line.lower().startswith(kinds)})
    return "\n".join([platform.machine(), *lines])


def _cpuinfo() -> list[str]:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text().splitlines()
    return []
