"""Optional libraries: each is imported, and used as training uses it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...packages import install
from .imports import broken
from .result import CheckResult, reason

_BITS = "4-bit and 8-bit weights (load_in_4bit, load_in_8bit, adapter: qlora), 8-bit optimizers"


def triton() -> list[CheckResult]:
    """Triton, and one of our kernels on a GPU (or in Triton's interpreter)."""
    import torch  # without what imports Triton itself

    gpu, interpreted = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        note = "no fused kernel runs on the GPU" if gpu else "only used on GPUs"
        state, mend = ("missing", install("triton")) if gpu else ("unused", "")
        return [CheckResult("Triton", "not installed", state, note, mend)]  # type: ignore[arg-type]
    try:
        version = str(importlib.import_module("triton").__version__)
    except Exception as error:  # a broken library raises anything
        return [_unusable("Triton", "triton", error, "its kernels cannot run")]
    if not gpu and not interpreted:
        note = "no GPU: its kernels are not used (TRITON_INTERPRET=1 is for tests)"
        return [CheckResult("Triton", version, "unused", note)]
    where = "the GPU" if gpu else "the CPU, in Triton's interpreter, which is slow"
    try:
        error_ = _kernel_error(torch.device("cuda" if gpu else "cpu"))
    except Exception as raised:  # of the driver, or the C compiler that Triton calls
        mend = "sudo apt-get install gcc python3-dev, which Triton needs to start kernels"
        return [CheckResult("Triton", f"{version}, fails", "broken", reason(raised), mend)]
    if error_ > 1e-4:
        mend = "pip install --force-reinstall triton"
        note = f"the result of a kernel is off by {error_:.1g}"
        return [CheckResult("Triton", f"{version}, fails", "broken", note, mend)]
    return [CheckResult("Triton", version, note=f"runs a kernel on {where}")]


def _kernel_error(device: Any) -> float:
    """The largest difference between a norm by Triton's kernel and by plain PyTorch."""
    import torch

    from ...kernels.norms.rms_norm import OP

    x, weight = torch.randn(8, 64, device=device), torch.randn(64, device=device)
    result, expected = OP.call(x, weight, 1e-6), OP.reference(x, weight, 1e-6)
    return float((result - expected).abs().max())


def bitsandbytes() -> list[CheckResult]:
    """Quantize a matrix to 4 and 8 bits, and multiply by it, on the training device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        note, mend = f"needed for {_BITS}", install("bitsandbytes")
        return [CheckResult("bitsandbytes", "not installed", "missing", note, mend)]
    try:
        module = importlib.import_module("bitsandbytes")
    except Exception as error:  # a broken library raises anything
        return [_unusable("bitsandbytes", "bitsandbytes", error, f"needed for {_BITS}")]
    version, failed = str(module.__version__), []
    for bits, error_of in (("4 bits", _error_of_4), ("8 bits", _error_of_8)):
        try:
            wrong = error_of(module)
            if wrong > 0.2:
                failed.append(f"{bits}: the result of a product is off by {wrong:.0%}")
        except Exception as raised:  # of a device that it was not built for
            failed.append(f"{bits}: {reason(raised)}")
    if failed:
        mend = "pip install --upgrade bitsandbytes, or train with adapter: lora"
        note = "; ".join(failed)
        return [CheckResult("bitsandbytes", f"{version}, fails", "broken", note, mend)]
    return [CheckResult("bitsandbytes", version, note="quantizes and multiplies in 4 and 8 bits")]


def _operands() -> tuple[Any, Any]:
    import torch

    from ..model.precision import device_for_training, dtype_for_training

    options: Any = {"device": device_for_training(), "dtype": dtype_for_training("auto")}
    return torch.randn(4, 64, **options), torch.randn(32, 64, **options)


def _error_of_4(module: Any) -> float:
    x, weight = _operands()
    packed, state = module.functional.quantize_4bit(weight, quant_type="nf4")
    return _relative(module.matmul_4bit(x, packed.t(), quant_state=state), x @ weight.t())


def _error_of_8(module: Any) -> float:
    x, weight = _operands()
    layer = module.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    layer.weight = module.nn.Int8Params(weight.cpu(), requires_grad=False)
    return _relative(layer.to(x.device)(x), x @ weight.t())


def _relative(actual: Any, expected: Any) -> float:
    return float((actual - expected).float().norm() / expected.float().norm())


def _unusable(name: str, package: str, error: Exception, note: str) -> CheckResult:
    result = broken(name, package, error)
    return replace(result, value="cannot be imported", note=f"{result.note}; {note}")


def attention() -> list[CheckResult]:
    """Which of PyTorch's attention kernels run here, and which packages provide others."""
    import torch

    works, gpu = [], torch.cuda.is_available()
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        with contextlib.suppress(Exception):  # then the kernel is not listed
            _attend(name)
            works.append(name.removesuffix("_ATTENTION").lower())
    state: Any = "ok" if works else "broken"
    mend = "" if works else "attn_implementation: eager"
    results = [CheckResult("sdpa", ", ".join(works) or "fails", state, mend=mend)]
    if not gpu:
        note = "needs a GPU; sdpa is used"
        return [
            *results,
            *(CheckResult(n, "not used", "unused", note) for n in ("flex", "flash-attn")),
        ]
    results.append(_imported("flex", "torch.nn.attention.flex_attention", "torch"))
    results.append(_imported("flash-attn", "flash_attn", "flash-attn"))
    return results


def _attend(name: str) -> None:
    """Run one kernel forward and backward; it raises if it does not run here."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from ..model.precision import device_for_training, dtype_for_training

    options: Any = {"device": device_for_training(), "dtype": dtype_for_training("auto")}
    q, k, v = (torch.randn(1, 2, 16, 64, requires_grad=True, **options) for _ in range(3))
    with sdpa_kernel(getattr(SDPBackend, name)):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()


def _imported(name: str, module: str, package: str) -> CheckResult:
    """A library that is only imported. If it is missing, that is no gap: sdpa takes its place."""
    try:
        if importlib.util.find_spec(module) is None:
            return CheckResult(name, "not installed", "unused", "sdpa is used")
        importlib.import_module(module)
    except Exception as error:  # a broken library raises anything
        return _unusable(name, package, error, "sdpa is used")
    return CheckResult(name, "works", note=f"attn_implementation: {_KEYS[name]}")


_KEYS = {"flex": "flex_attention", "flash-attn": "flash_attention_2"}


def communication() -> list[CheckResult]:
    """Whether processes can communicate: each backend runs an all-reduce in a group of one."""
    import torch
    from torch import distributed as dist

    if not dist.is_available():
        note, mend = "needed for several processes", "install torch from pytorch.org"
        return [CheckResult("gloo", "not built in", "missing", note, mend)]
    mend = "set GLOO_SOCKET_IFNAME to a network interface, e.g. lo"
    results = [_try("gloo", "cpu", mend)]
    if not torch.cuda.is_available():
        return [*results, CheckResult("nccl", "not used", "unused", "only used on GPUs")]
    if not dist.is_nccl_available():
        mend = "install a build of torch that has NCCL"
        return [
            *results,
            CheckResult("nccl", "not built in", "missing", "needed for several GPUs", mend),
        ]
    return [*results, _try("nccl", "cuda", "set NCCL_DEBUG=INFO to see what fails")]


def _try(backend: str, device: str, mend: str) -> CheckResult:
    import torch
    from torch import distributed as dist
    from torch._C._distributed_c10d import HashStore

    steps: list[Callable[[], Any]] = [
        lambda: dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1),
        lambda: dist.all_reduce(torch.ones(1, device=device)),
    ]
    try:
        for step in steps:
            step()
    except Exception as error:  # of the network, which differs between systems
        return CheckResult(backend, "fails", "broken", reason(error), mend)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    host = f"MASTER_ADDR={os.environ['MASTER_ADDR']}" if "MASTER_ADDR" in os.environ else ""
    return CheckResult(backend, "works", note=host)
