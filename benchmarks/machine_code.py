"""Compiling a launch for a card that need not be there, and reading the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from fusewright.kernels.launch import Gpu
from launches import Launch, _Dtype
from stub_driver import StubDriver


@dataclass(frozen=True)
class Card:
    """An architecture and its limits.

    Attributes:
        name: as compilers call it.
        target: as Triton calls it.
        shared: bytes of shared memory that one block of threads may have.
        shared_of_all: bytes that those on one multiprocessor have together.
        threads: of one multiprocessor.
        blocks: of one multiprocessor.
        registers: of one multiprocessor, 32 bits each.
    """

    name: str
    target: GPUTarget
    shared: int
    shared_of_all: int
    threads: int
    blocks: int
    registers: int = 1 << 16

    @property
    def gpu(self) -> Gpu:
        """What configurations of kernels depend on."""
        hip = self.target.backend == "hip"
        return Gpu(9 if hip else self.target.arch // 10, self.shared, hip)


KB = 1024
CARDS = (  # CUDA C++ Programming Guide, technical specifications per compute capability
    Card("sm_75", GPUTarget("cuda", 75, 32), 64 * KB, 64 * KB, 1024, 16),
    Card("sm_80", GPUTarget("cuda", 80, 32), 163 * KB, 164 * KB, 2048, 32),
    Card("sm_86", GPUTarget("cuda", 86, 32), 99 * KB, 100 * KB, 1536, 16),
    Card("sm_89", GPUTarget("cuda", 89, 32), 99 * KB, 100 * KB, 1536, 24),
    Card("sm_90", GPUTarget("cuda", 90, 32), 227 * KB, 228 * KB, 2048, 32),
    Card("sm_100", GPUTarget("cuda", 100, 32), 227 * KB, 228 * KB, 2048, 32),
    Card("sm_120", GPUTarget("cuda", 120, 32), 99 * KB, 100 * KB, 1536, 32),
    # CDNA 3 and 4: 64 and 160 KB of LDS; waves of 64, 512 vector registers for each lane
    Card("gfx942", GPUTarget("hip", "gfx942", 64), 64 * KB, 64 * KB, 2048, 32, 4 * 64 * 512),
    Card("gfx950", GPUTarget("hip", "gfx950", 64), 160 * KB, 160 * KB, 2048, 32, 4 * 64 * 512),
)

H100 = next(c for c in CARDS if c.name == "sm_90")
T4 = CARDS[0]


@dataclass(frozen=True)
class Code:
    """What a kernel's machine code says.

    Attributes:
        key: equal for launches that run the same code.
        registers: of a thread.
        spills: instructions that store or load a register that did not fit.
        stack: bytes of a thread.
        shared: bytes of a block.
        warps: of a block.
        occupancy: share of a multiprocessor's threads that run at once.
        widths: bits of an access to global memory -> how many such instructions.
        tensor_cores: instructions of tensor cores.
    """

    key: str
    registers: int
    spills: int
    stack: int
    shared: int
    warps: int
    occupancy: float
    widths: tuple[tuple[int, int], ...]
    tensor_cores: int


def compiled(launch: Launch, card: Card) -> Any:
    """Triton's compiled kernel of a launch, specialized as the JIT specializes it."""
    driver.set_active(StubDriver(card.target, CARDS.index(card)))  # type: ignore[arg-type]
    try:
        return launch.kernel.run(
            *map(_mock, launch.args), grid=launch.grid, warmup=True,
            **{name: _mock(value) for name, value in launch.options.items()},
        )  # fmt: skip
    finally:
        driver._active = None


def read(made: Any, card: Card) -> Code:
    """Read the machine code that ``compiled`` returned."""
    found = _read_cuda(made) if card.target.backend == "cuda" else _read_hip(made)
    registers, spills, stack, shared, widths, tensor_cores = found
    warps = made.metadata.num_warps
    return Code(
        made.hash, registers, spills, stack, shared, warps,
        _occupancy(card, registers, shared, warps), tuple(sorted(widths.items(), reverse=True)),
        tensor_cores,
    )  # fmt: skip


def _mock(value: Any) -> Any:
    return MockTensor(value.dtype) if isinstance(value, _Dtype) else value


_Found = tuple[int, int, int, int, Counter[int], int]
_GLOBAL = re.compile(r"\b(?:LDG|STG|LDGSTS|RED|ATOMG)\.E\S*")
_BITS = re.compile(r"\.(32|64|128|U8|S8|U16|S16)(?:\.|$)")
_TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|IMMA|QMMA|UTC\w*MMA)\b")


def _read_cuda(made: Any) -> _Found:
    """Registers, spills, stack, shared memory, widths of access, tensor-core instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _run("-res-usage", file.name)
        code = _run("-sass", file.name)
    registers, stack = (int(re.findall(rf"{k}:(\d+)", usage)[-1]) for k in ("REG", "STACK"))
    widths: Counter[int] = Counter()
    for access in _GLOBAL.findall(code):
        bits = _BITS.findall(access)
        width = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}.get(bits[-1]) if bits else 32
        widths[width or int(bits[-1])] += 1
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    return registers, spills, stack, made.metadata.shared, widths, len(_TENSOR_CORES.findall(code))


def _run(option: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, file], capture_output=True, text=True, check=True)
    return done.stdout


_HIP_ACCESS = re.compile(
    r"\b(?:global|buffer)_(?:load|store|atomic)_\S*?(ubyte|byte|short|dword(?:x\d)?)"
)
_HIP_SPILL = re.compile(r"\bscratch_(?:load|store)_")
_HIP_BITS = {
    "ubyte": 8,
    "byte": 8,
    "short": 16,
    "dword": 32,
    "dwordx2": 64,
    "dwordx3": 96,
    "dwordx4": 128,
}


def _read_hip(made: Any) -> _Found:
    code = made.asm["amdgcn"]

    def of(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", code)[-1])

    widths = Counter(_HIP_BITS[kind] for kind in _HIP_ACCESS.findall(code))
    # registers that go to lanes of wider ones, or to those of the matrix cores, stay registers
    spills = len(_HIP_SPILL.findall(code))
    stack = of("private_segment_fixed_size")
    tensor_cores = len(re.findall(r"\bv_mfma_", code))
    return of("vgpr_count"), spills, stack, made.metadata.shared, widths, tensor_cores


def _occupancy(card: Card, registers: int, shared: int, warps: int) -> float:
    width = card.target.warp_size
    each = -(-registers // 8) * 8 * width  # registers are given to warps in groups of 8 a thread
    most = card.threads // width
    blocks = min(
        card.blocks,
        most // warps,
        card.registers // (each * warps),
        card.shared_of_all // (shared + KB) if card.target.backend == "cuda" and shared else most,
        card.shared_of_all // shared if card.target.backend == "hip" and shared else most,
    )
    return blocks * warps / most
