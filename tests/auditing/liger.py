"""Models patched by the real Liger-Kernel, whose Triton kernels run in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.auditing.liger

prints what the audit finds, as JSON. A process of its own: Liger patches classes for all models.
"""

from __future__ import annotations

import json
from typing import Any

from fusewright.auditing.audit import audit

from . import tiny

# what remains is rope and the fused loss; these kernels read a float as a tensor of Triton, which
# it is not in the interpreter
OPTIONS = {"rms_norm": False, "swiglu": False}


def instance() -> Any:
    """One model, patched as it is."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    model = tiny.model("llama")
    apply_liger_kernel_to_llama(model=model, **OPTIONS)
    return model


def classes() -> Any:
    """A model of classes that were patched before."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3

    apply_liger_kernel_to_qwen3(**OPTIONS)
    return tiny.model("qwen3")


def router() -> Any:
    """Experts with a router's loss."""
    from liger_kernel.transformers import apply_liger_kernel_to_mixtral

    model = tiny.model("mixtral", output_router_logits=True, router_aux_loss_coef=0.1)
    apply_liger_kernel_to_mixtral(model=model, **OPTIONS)
    return model


def adapter_of_the_head() -> Any:
    """An adapter of the head, which Liger's loss does not call (huggingface/trl#4612)."""
    return tiny.lora(instance(), target_modules=["q_proj", "lm_head"])


MODELS = (instance, classes, router, adapter_of_the_head)


if __name__ == "__main__":
    found = {make.__name__: audit(make(), tiny.chat()).to_dict() for make in MODELS}
    print(json.dumps(found))
