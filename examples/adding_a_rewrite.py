"""A spelling, a rule and an op of one's own: the code of docs/adding-a-rewrite.md, which tests run.

FUSEWRIGHT_SMALL=optimize python examples/adding_a_rewrite.py
"""

# [imports]
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusewright import explain, optimize
from fusewright.graph import facts
from fusewright.kernels.op import Maker, Op, not_floating
from fusewright.kernels.second_order import differentiable, double_backward
from fusewright.passes import PIPELINE
from fusewright.passes.glu import GLU
from fusewright.rewrite.pattern import Builder, Pattern
from fusewright.rewrite.rule import Emit, Match, Rule

# [end]


# [spelling]
class MyGLU(GLU):
    """The gated units that are built in, and one whose gelu is written out ("gelu_fast")."""

    def patterns(self, p: Builder, gate: Pattern, up: Pattern, both: Pattern) -> Iterable[Any]:
        """One more activation."""
        yield from super().patterns(p, gate, up, both)
        tanh = p.tanh(gate * 0.7978845608 * (1.0 + gate * 0.044715 * gate))
        yield "gelu_tanh", 0.5 * gate * (1.0 + tanh) * up


with_my_glu = [MyGLU() if type(rule) is GLU else rule for rule in PIPELINE]
# [end]


# [rule]
class QuickGELU(Rule):
    """``x * sigmoid(1.702 * x)``, an approximation of GELU, is silu(1.702 x) / 1.702."""

    name = op = "quick_gelu"

    def patterns(self, p: Builder, x: Pattern, scale: Pattern) -> Iterable[Any]:
        """Products match in either order."""
        yield x * p.sigmoid(x * scale)

    def check(self, m: Match) -> None:
        """Decline with a reason."""
        m.require(isinstance(m.scale, float), "the scale is not a constant", m.root)
        m.require(facts.dtype(m.x) == facts.dtype(m.root), "returns another dtype", m.root)

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """Add the new nodes; return the one whose value replaces the formula's."""
        inner = ops.call(torch.mul, m.x, m.scale)
        return ops.call(torch.div, ops.call(F.silu, inner), m.scale)

    def suspects(self, graph: fx.Graph) -> Iterable[tuple[fx.Node, str]]:
        """Point at what is left and looks alike."""
        for node in graph.nodes:
            if node.target is torch.sigmoid:
                yield node, "a sigmoid that looks like a quick GELU"


with_quick_gelu = [*PIPELINE, QuickGELU()]
# [end]


# [op]
def reference(x: Tensor, scale: float) -> Tensor:
    """Define the op: plain PyTorch, rounding included."""
    return x * torch.sigmoid(x * scale)


class _QuickGELU(torch.autograd.Function):
    """Keeps x alone; eager keeps x, the sigmoid, and what it was computed from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.options = (scale,)
        return reference(x, scale)

    @staticmethod
    @differentiable(double_backward(reference, 1))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,), (scale,) = ctx.saved_tensors, ctx.options
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # fp64 stays fp64
        gate = torch.sigmoid(wide * scale)
        slope = gate * (1 + scale * wide * (1 - gate))
        return (grad * slope).to(x.dtype), None


def quick_gelu(x: Tensor, scale: float) -> Tensor:
    """``x * sigmoid(scale * x)`` for x (...) of any floating-point dtype."""
    return _QuickGELU.apply(x, scale)


def unsupported(x: Tensor, scale: float) -> list[str]:
    """Say why x cannot be taken; here, nothing but its dtype could be the reason."""
    return not_floating("x", x)


def example(m: Maker) -> tuple[Any, ...]:
    """Make the arguments of a typical call."""
    return m.x(m.sizes.inner), 1.702


OP = Op("quick_gelu", reference, quick_gelu, unsupported, example=example)


class QuickGELUOp(QuickGELU):
    """The same formula, and our op in its place."""

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One call."""
        return ops.call(OP, m.x, m.scale)


# [end]


def models() -> tuple[nn.Module, nn.Module]:
    """Two tiny models with formulas that are not built in: fast, and quick GELUs."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4}
    llama = LlamaConfig(**sizes, intermediate_size=48, num_hidden_layers=2, hidden_act="gelu_fast")
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    gpt = GPT2Config(**sizes, **rates, **ends, n_layer=2, activation_function="quick_gelu")
    return LlamaForCausalLM(llama).train(), GPT2LMHeadModel(gpt).train()


def main() -> None:
    """Show what each of the three does."""
    gated, quick = models()
    # [use]
    ids = torch.arange(22).view(2, 11)
    for model, rules in (
        (gated, PIPELINE),
        (gated, with_my_glu),
        (quick, with_quick_gelu),
        (quick, [*PIPELINE, QuickGELUOp()]),
    ):
        optimize(model, passes=rules)
        model(input_ids=ids, labels=ids).loss.backward()
        print(explain(model))
    # [end]


if __name__ == "__main__":
    main()
