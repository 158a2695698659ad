"""Compiling Triton kernels ahead of time, for a GPU that need not be there.

The tests have cases that together cover each configuration that launchers can choose, and compile
all of them for every target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TARGETS = (("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32))
"""(backend, architecture, warp size) that every kernel must compile for."""


@dataclass(frozen=True)
class AotCase:
    """One kernel in one configuration.

    ``divisible`` are integer arguments that are multiples of 16 in this case, such as a row's
    length. Triton compiles another variant for them, with wide and asynchronous loads: the one that
    usually runs. Pointers are always taken as 16-byte aligned, as torch's are.
    """

    name: str  # shown in tests and errors
    kernel: Any  # the ``@triton.jit`` function
    signature: Mapping[str, str]  # argument -> "*bf16", "i32", "fp32", …; without constexpr
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    divisible: tuple[str, ...] = ()


def compile_case(case: AotCase, target: tuple[str, int, int]) -> Any:
    """Compile ``case`` for ``target`` without a GPU and return Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in case.constants else case.signature[name]
        for name in case.kernel.arg_names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in case.divisible
    }
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=dict(case.constants),
        attrs=attributes,
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget(*target), options=options)
