"""What a block keeps for backward: from unpacked weights down to its input, or nothing.

A level below ``"all"`` puts the block's whole graph into one checkpoint (Chen et al., "Training
deep nets with sublinear memory cost", 2016), which computes again in backward what it did not keep.
The graph says so in PyTorch's own terms, so that eager mode, AOTAutograd and Inductor all know it.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Literal, get_args

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..graph import facts
from ..graph.effects import CHECKPOINT, Effects
from ..kernels.linear.linear import quant_linear
from ..kernels.linear.projections import Linear
from ..kernels.linear.quantized import FORMATS, Quantized, is_record, unpacked
from ..kernels.mlp.mlp_block import mlp_block

Level = Literal["weights", "all", "products", "input", "tiles", "offload", "offload_tiles"]
"""From the fastest to the leanest: what is kept of a block between forward and backward.

``weights`` is the next level with the weights by formula unpacked once, and kept, as eager mode
keeps them; a block without any has no such level. The last two are ``input`` and ``tiles`` with the
input in the memory of the host.
"""

LEVELS: tuple[Level, ...] = get_args(Level)

HOSTED: dict[Level, Level] = {"offload": "input", "offload_tiles": "tiles"}
"""The levels that keep nothing on the device, and whose graphs they run."""


def allowed(choice: str, host: bool = False, formulas: bool = False) -> tuple[Level, ...]:
    """The levels of a graph that ``"eager"`` or ``"inductor"`` runs, the fastest first.

    With ``host``, inputs may go to a host: not from a device that is the host. With ``formulas``
    there may be weights by formula, which can be kept unpacked. Compiled, what lies
    between two products is computed again in no time (measured), so that keeping it is of no use.
    In eager mode it would take time, and PyTorch's selective checkpoints neither allow a second
    backward nor see every write in place.
    """
    first: Level = "products" if choice == "inductor" else "all"
    unpacked: tuple[Level, ...] = ("weights",) if formulas else ()
    return (*unpacked, first, "input", "tiles", *(HOSTED if host else ()))


def keep(module: fx.GraphModule, level: Level, choice: str = "eager") -> fx.GraphModule:
    """The graph that keeps for backward what ``level`` says; ``module`` itself for ``"all"``.

    ``module``, a block's graph, becomes the body of the new one. A checkpoint that the model has
    around the whole block, as ``gradient_checkpointing_enable`` puts it there, is replaced.
    ``choice`` is what will run the graph: see ``allowed``.
    """
    if level == "weights":
        _unpack_once(module)
        level = allowed(choice)[0]
    if level == "all":
        return module
    level = HOSTED.get(level, level)
    unwrap(module)
    if level == "tiles":
        _in_tiles(module)
    if level == "products":
        contexts: Any = functools.partial(create_selective_checkpoint_contexts, _keeps_products)
        contexts.cache_hash = level  # without one, AOTAutograd's cache is not asked
        module.meta["_checkpoint_context_fn"] = contexts
    graph, env = fx.Graph(), {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.placeholder(node.target, type_expr=node.type)
            env[node].meta = dict(node.meta)
    body = graph.get_attr("body")
    result = graph.call_function(
        CHECKPOINT,
        (body, *env.values()),
        {"use_reentrant": False, "preserve_rng_state": True},
    )
    outputs: Any = module.graph.output_node().args[0]
    items = [graph.call_function(operator.getitem, (result, i)) for i in range(len(outputs))]
    graph.output(tuple(items))
    return fx.GraphModule({"body": module}, graph)


def _in_tiles(module: fx.GraphModule) -> None:
    """Let gated MLPs run in tiles of tokens, so that gate and up never exist as a whole."""
    for inner in facts.nested(module):
        for node in inner.graph.nodes:
            if node.target is mlp_block:
                node.kwargs = {**node.kwargs, "keep": "input"}
        inner.recompile()


def has_formulas(module: fx.GraphModule) -> bool:
    """Whether a graph, or one nested in it, has products with weights by formula."""
    return any(_by_formula(n) for inner in facts.nested(module) for n in inner.graph.nodes)


def _by_formula(node: fx.Node) -> list[Quantized]:
    # The weights of an op, all of which are such that eager mode would keep their unpacked values.
    weights: list[Quantized] = []
    pending: list[Any] = [*node.args, *node.kwargs.values()]
    while pending:
        value = pending.pop()
        if is_record(value):
            weights.append(Quantized(*value))
        elif isinstance(value, (tuple, list)):
            pending += value
    return weights if all(FORMATS[w.kind].is_formula for w in weights) else []


def _unpack_once(module: fx.GraphModule) -> None:
    """Let weights by formula be unpacked before their products, which take them as plain ones."""
    for inner in facts.nested(module):
        for node in list(inner.graph.nodes):
            if not _by_formula(node):
                continue
            # in the dtype of the products: the op's, or that of the linear's record
            of_op = node.args[3] if node.target is quant_linear and len(node.args) > 3 else None
            with inner.graph.inserting_before(node):
                node.args = _plain(node.args, node.args[0], of_op)
        inner.recompile()


def _plain(value: Any, x: Any, compute: Any) -> Any:
    if is_record(value):
        return x.graph.call_function(unpacked, (*value, x, compute))
    if isinstance(value, Linear):
        compute = value.compute
    if isinstance(value, (tuple, list)):
        parts = [_plain(part, x, compute) for part in value]
        is_named = hasattr(value, "_fields")
        return type(value)(*parts) if is_named else type(value)(parts)
    return value


_PRODUCTS = {
    "aten": ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "convolution", "_scaled_dot_product"),
    "fusewright": (
        "lora_", "attention_", "segment_attention_", "selective_scan", "ssd_", "moe_",
        "rms_norm_linear", "quant_",
    ),
}  # fmt: skip
"""Operations, by the beginnings of their names, that cost far more to compute than to keep."""


def _keeps_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what matrix products, attention and scans give; nothing else."""
    return CheckpointPolicy.MUST_SAVE if is_product(op) else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def is_product(op: Any) -> bool:
    """Whether an ATen operation, or one of ours, is a product of matrices or made of such."""
    schema = getattr(op, "_schema", None)
    if schema is None:  # a higher-order operation
        return False
    namespace, name = schema.name.split("::")
    return bool(name.startswith(_PRODUCTS.get(namespace, ("\0",))))


def unwrap(module: fx.GraphModule) -> bool:
    """Put the body of each checkpoint in ``module``'s graph in its place; whether there was one."""
    checkpoints = [n for n in module.graph.nodes if n.target is CHECKPOINT]
    for node in checkpoints:
        holder = node.args[0]
        body = getattr(module, holder.target)
        unwrap(body)
        env = dict(zip([n for n in body.graph.nodes if n.op == "placeholder"], node.args[1:],
                       strict=True))  # fmt: skip
        with module.graph.inserting_before(node):
            results = _copy(body, module, env)
        for user in list(node.users):  # each takes one of the outputs
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        if not holder.users:  # no general removal of dead code: writes have no users either
            module.graph.erase_node(holder)
    if checkpoints:
        module.recompile()
    return bool(checkpoints)


def why_not(effects: Effects) -> str | None:
    """Why a graph must not run twice: it writes into what it was given; None if it does not."""
    if effects.opaque:
        return f"it is not known what {effects.opaque[0].name} does besides giving its value"
    for node, _ in effects.lasting_writes:
        return f"{node.name} writes into an input of the block, or into its buffers"
    return None


def _copy(body: fx.GraphModule, into: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
    """Copy the nodes of ``body`` to where ``into`` is being written; returns its outputs."""
    for node in body.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return fx.map_arg(node.args[0], lambda n: env[n])
        new_node = into.graph.node_copy(node, lambda n: env[n])
        if node.op in ("get_attr", "call_module"):
            new_node.target = f"{into._get_name()}_{len(dict(into.named_children()))}_{node.target}"
            setattr(into, new_node.target, getattr(body, node.target))
        env[node] = new_node
    raise ValueError("a graph without an output")
