"""Unknown models, odd calls, other people's wrappers: never worse than eager, never silent."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import fusewright
from fusewright import optimize, restore
from fusewright.errors import OptimizeError
from fusewright.passes import PIPELINE
from fusewright.passes.glu import GLU
from fusewright.rewrite.pattern import Builder, Pattern
from fusewright.rewrite.rule import Match, Rule
from tests.explained import explain

from ..models.zoo import FAMILIES, build

LLAMA = FAMILIES[0]
IDS = torch.randint(3, 200, (2, 13), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _step(model: nn.Module) -> tuple[Tensor, list[Tensor | None]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def _assert_same_step(ours: nn.Module, eager: nn.Module) -> None:
    (loss, grads), (eager_loss, eager_grads) = _step(ours), _step(eager)
    torch.testing.assert_close(loss, eager_loss)
    for mine, theirs in zip(grads, eager_grads, strict=True):
        torch.testing.assert_close(mine, theirs)


class Uncapturable(nn.Module):
    """An MLP that no graph can hold: it looks at the values."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) * (2.0 if float(x.sum()) > 1e9 else 1.0)


class Unknown(nn.Module):
    """A gated MLP with an activation that no spelling has."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.sin(self.gate_proj(x)) * self.up_proj(x))


def _with_mlp(kind: type[nn.Module]) -> nn.Module:
    model = build(LLAMA, lora=False)
    for layer in model.model.layers:
        layer.mlp = kind(layer.mlp)
    return model


def test_a_block_that_cannot_be_captured_trains_and_is_reported() -> None:
    model = _with_mlp(Uncapturable)
    eager = copy.deepcopy(model)
    _assert_same_step(optimize(model), eager)
    report = explain(model)
    failed = [b for b in report.bypasses if "could not be captured" in b.reason]
    layers = ["model.layers.0", "model.layers.1"]
    assert sorted(b.module for b in failed) == sorted([*layers, *(f"{x}.mlp" for x in layers)])
    assert "runs as it was: model.layers.1" in str(report)
    assert "a block that is made alike could not be captured" in str(report)
    # the parts that can be captured are: all but the three adds and the one function
    done = {"rms_norm": 5, "rope": 2, "glu": 2, "mlp_block": 2, "linear_cross_entropy": 1}
    assert report.by_rule() == done
    assert [s.module for s in report.sites if s.rule == "glu"] == [f"{x}.mlp.mlp" for x in layers]
    restore(model)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_head_that_passes_use_cache_on_makes_no_cache() -> None:
    config = tf.GraniteMoeConfig(
        vocab_size=211, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = optimize(tf.GraniteMoeForCausalLM(config))
    _step(model)
    assert not [b for b in explain(model).bypasses if "cache" in b.reason]
    assert explain(model).by_rule()["rope"] == 2


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Not by PyTorch either, whose 2.11 met an exception of its own in each capture of a head."""
    _step(optimize(build(LLAMA, lora=False), codegen="eager"))
    assert [r.message for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_an_unknown_formula_trains_and_is_reported() -> None:
    model = _with_mlp(Unknown)
    eager = copy.deepcopy(model)
    _assert_same_step(optimize(model), eager)
    report = explain(model)
    missed = [s for s in report.sites if s.status == "missed"]
    assert [(s.module, s.rule) for s in missed] == [
        ("model.layers.0.mlp", "glu"), ("model.layers.1.mlp", "glu"),
    ]  # fmt: skip
    assert "sin" in missed[0].reason
    assert report.by_rule()["rms_norm"] == 5


def test_strict_raises_what_could_not_be_captured() -> None:
    model = optimize(_with_mlp(Uncapturable), strict=True)
    with pytest.raises(OptimizeError, match="could not be captured"):
        _step(model)


def test_strict_needs_blocks() -> None:
    with pytest.raises(OptimizeError, match="no repeated decoder blocks were found in Linear"):
        optimize(nn.Linear(3, 3), strict=True)


def test_a_wrong_rewrite_is_refused_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusewright.passes.glu import GLU

    class Wrong(GLU):
        def rewrite(self, m, ops):
            return ops.call(torch.mul, m.gate, m.up)

    model = build(LLAMA, lora=False)
    eager = copy.deepcopy(model)
    _assert_same_step(optimize(model, passes=[Wrong()]), eager)
    sites = explain(model).sites
    assert [s.status for s in sites] == ["refused", "refused"]
    assert "exceeds 1.5 x eager's" in sites[0].reason


def test_a_module_without_blocks_is_left_alone() -> None:
    model = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="no repeated decoder blocks were found in Linear"):
        assert optimize(model) is model
    assert explain(model).by_rule() == {}
    assert "no repeated decoder blocks" in str(explain(model))
    for verb in (optimize, explain, restore):
        with pytest.raises(TypeError, match=f"{verb.__name__} takes a torch.nn.Module, not int"):
            verb(3)


def test_public_names_are_listed_before_they_are_loaded() -> None:
    assert {*fusewright.__all__} <= {*dir(fusewright)}


def test_a_backbone_without_a_loss_is_explained_all_the_same() -> None:
    model = optimize(build(LLAMA, lora=False).model)
    assert explain(model).by_rule()["rms_norm"] == 5
    model(input_ids=IDS).last_hidden_state.sum().backward()
    assert explain(model).by_rule()["rms_norm"] == 5


def test_positional_and_surplus_arguments_of_a_head() -> None:
    model = build(LLAMA, lora=False)
    eager = copy.deepcopy(model)
    optimize(model)
    torch.testing.assert_close(model(IDS, labels=IDS).loss, eager(IDS, labels=IDS).loss)
    for wrong in (lambda: model(IDS, input_ids=IDS), lambda: model(*[IDS] * 30)):
        with pytest.raises(TypeError):
            wrong()


def test_bad_options_say_what_is_right() -> None:
    model = build(LLAMA, lora=False)
    with pytest.raises(ValueError, match="'eager', 'inductor'"):
        optimize(model, codegen="fast")
    with pytest.raises(ValueError, match="'speed', 'auto', 'min' or a size in GB as in '8GB'"):
        optimize(model, memory="8MB")
    with pytest.raises(ValueError, match="strict='yes' is not one of False, True"):
        optimize(model, strict="yes")


def test_a_cache_passes_by_and_says_so() -> None:
    model = optimize(build(LLAMA, lora=False))
    _step(model)
    model(input_ids=IDS, past_key_values=tf.DynamicCache())
    assert any("cache" in b.reason for b in explain(model).bypasses)


def test_hooks_on_submodules_are_called() -> None:
    model = optimize(build(LLAMA, lora=False))
    _step(model)
    seen: list[int] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    _step(model)
    assert seen == [1]
    assert any("hook" in b.reason for b in explain(model).bypasses)
    handle.remove()


@pytest.mark.parametrize("after", [False, True], ids=["first", "after a step"])
def test_labels_that_eager_refuses_are_refused(after: bool) -> None:
    eager = build(LLAMA, lora=False)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    if after:
        _step(ours)
    with pytest.raises(RuntimeError) as theirs:
        eager(input_ids=IDS, labels=IDS.int())
    with pytest.raises(RuntimeError) as mine:
        ours(input_ids=IDS, labels=IDS.int())
    assert str(mine.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_hidden_states_can_be_asked_for() -> None:
    model = build(LLAMA, lora=False)
    eager = copy.deepcopy(model)
    optimize(model)
    ours, theirs = (m(input_ids=IDS, output_hidden_states=True) for m in (model, eager))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a, b)


def test_an_outer_compile_runs_the_original_and_warns() -> None:
    model = build(LLAMA, lora=False)
    eager = copy.deepcopy(model)
    optimize(model)
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = compiled(input_ids=IDS, labels=IDS).loss
    assert any("torch.compile was put around" in str(w.message) for w in caught)
    torch.testing.assert_close(loss, eager(input_ids=IDS, labels=IDS).loss)


def test_another_threads_compilation_is_not_one_around_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(LLAMA, lora=False)
    optimize(model)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # all threads see it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert not [w for w in caught if "torch.compile was put around" in str(w.message)]
    report = explain(model)
    assert report.by_rule()["linear_cross_entropy"] == 1
    assert report.by_rule()["mlp_block"] == 2
    assert not [b for b in report.bypasses if "torch.compile" in b.reason]


@pytest.mark.long
def test_peft_may_come_after() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        optimize(build(LLAMA, lora=False)), LoraConfig(r=4, target_modules="all-linear")
    )
    assert explain(model).by_rule()["lora_linear"] == 14
    assert restore(model) is model


def test_optimizing_twice_replaces_the_first() -> None:
    model = build(LLAMA, lora=False)
    optimize(model)
    optimize(model, logits="always")
    assert type(model(input_ids=IDS, labels=IDS).logits) is Tensor
    restore(model)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_only_the_given_model_changes() -> None:
    other = build(LLAMA, lora=False)
    before = {m: dict(m.__dict__) for m in other.modules()}
    classes = {type(m): type(m).forward for m in other.modules()}
    silu = F.silu
    _step(optimize(build(LLAMA, lora=False)))
    assert all(dict(m.__dict__).keys() == before[m].keys() for m in other.modules())
    assert all(c.forward is f for c, f in classes.items())
    assert F.silu is silu


def test_a_second_backward_over_a_retained_graph() -> None:
    model = optimize(build(LLAMA, lora=True))
    wanted = [p for p in model.parameters() if p.requires_grad]
    loss = model(input_ids=IDS, labels=IDS).loss
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss * 3, wanted)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a * 3, b)


def test_the_environment_variables(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("FUSEWRIGHT_DISABLE", "rope,glu")
    monkeypatch.setenv("FUSEWRIGHT_DUMP", str(tmp_path))
    monkeypatch.setenv("FUSEWRIGHT_FUEL", "3")
    report = explain(optimize(build(LLAMA, lora=False)))
    assert (
        1 <= sum(report.by_rule().values()) <= 3 * 2
    )  # three rewrites, in graphs that blocks share
    assert not {"rope", "glu"} & set(report.by_rule())
    names = sorted(p.name for p in tmp_path.iterdir())
    stages = {n.split("-", 1)[1] for n in names}
    assert {"block-captured.py", "block-fused.py", "block-rewritten.py"} <= stages
    assert "block-open-writes.py" not in stages  # Llama writes nothing in place


def test_the_report_is_plain_data() -> None:
    import json

    report = explain(optimize(build(LLAMA, lora=True)))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["by_rule"]["lora_linear"] == 14
    assert {"module", "rule", "op", "status", "reason", "error", "grad_error"} <= set(
        data["sites"][0]
    )
    assert fusewright.Report is type(report)


class Unspellable(Rule):
    name = op = "unspellable"

    def patterns(self, p: Builder, x: Pattern) -> Any:
        yield p.no_such_operation(x)


class Thoughtless(GLU):
    name = "thoughtless"

    def check(self, m: Match) -> None:
        raise KeyError("a mistake")


def test_a_mistake_in_a_rule_is_said_at_once() -> None:
    model = build(LLAMA, lora=False)
    with pytest.raises(TypeError, match="no instance of Rule"):
        optimize(model, passes=[Unspellable])
    with pytest.raises(AttributeError, match="no_such_operation"):
        optimize(model, passes=[Unspellable()])
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_check_that_fails_costs_its_own_rewrite_only() -> None:
    model = optimize(build(LLAMA, lora=False), passes=[Thoughtless(), *PIPELINE], codegen="eager")
    _step(model)
    report = explain(model)
    assert report.by_rule()["glu"] == 2
    assert {s.reason for s in report.sites if s.rule == "thoughtless"} == {
        "the rule's check failed: KeyError: 'a mistake'"
    }


def test_an_error_of_pytorch_s_own_in_a_capture_ends_no_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards are made outside of TorchDynamo's package, with errors of any class."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def broken(*_: Any, **__: Any) -> Any:
        raise IndexError("list index out of range")

    eager = build(LLAMA, lora=False)
    ours = optimize(copy.deepcopy(eager))
    expected = _step(eager)
    monkeypatch.setattr(ShapeEnv, "produce_guards_verbose", broken)
    found = _step(ours)
    torch.testing.assert_close(found, expected)
    assert any("list index out of range" in b.reason for b in explain(ours).bypasses)


_calls: list[bool] = []


@torch.library.custom_op("fusewright_tests::may_fail", mutates_args=())
def _may_fail(x: Tensor) -> Tensor:
    """Fails when it runs: in a file of TorchDynamo's, by its traceback."""
    _calls.append(True)
    if x.shape[0] == 3:
        place = torch._dynamo.convert_frame.__file__
        exec(compile("raise ValueError('of the data')", place, "exec"))
    return x.clone()


_may_fail.register_fake(torch.empty_like)
_may_fail.register_autograd(lambda ctx, grad: grad)


class _MayFail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return _may_fail(self.linear(x))  # type: ignore[no-any-return]


def test_an_error_of_a_graph_that_runs_is_no_failed_capture() -> None:
    """The block would run twice, and be left as it was."""
    blocks = nn.ModuleList([_MayFail(), _MayFail()])
    model = optimize(nn.ModuleDict({"layers": blocks}), codegen="eager")
    model["layers"][0](torch.randn(2, 5, 4))
    _calls.clear()
    with pytest.raises(ValueError, match="of the data"):
        model["layers"][0](torch.randn(3, 5, 4))
    assert len(_calls) == 1
    assert not explain(model).bypasses


def test_an_error_before_a_graph_runs_comes_from_the_original(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TorchDynamo looks for a graph outside of any capture, and may fail at that."""

    class Broken:
        callback = staticmethod(lambda *_: None)

        def __call__(self, function: Any) -> Any:
            def run(*_: Any) -> Any:
                raise IndexError("no such guard")

            return run

    monkeypatch.setattr(torch._dynamo, "optimize", lambda *_, **__: Broken())
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))])
    model = optimize(nn.ModuleDict({"layers": blocks}), codegen="eager")
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(model["layers"][0](x), F.linear(x, *blocks[0][0].parameters()))
    assert any("IndexError: no such guard" in b.reason for b in explain(model).bypasses)


def test_a_symbolic_trace_sees_the_original_and_captures_go_on() -> None:
    blocks = nn.ModuleList([_Normed(), _Normed()])
    model = optimize(nn.ModuleDict({"layers": blocks}), codegen="eager")
    traced = torch.fx.Tracer().trace(nn.Sequential(model["layers"][0]))
    assert any(n.target is torch.rsqrt for n in traced.nodes)
    model["layers"][0](torch.randn(2, 3, 8))
    assert "rms_norm" in explain(model).by_rule()


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x + self.linear(self.weight * y)  # type: ignore[no-any-return]
