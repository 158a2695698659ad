"""What ``audit`` finds in tiny models, and that it leaves them as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from fusewright import audit
from fusewright.auditing.by_hand import causal_lm
from fusewright.auditing.checks import CHECKS
from fusewright.auditing.fresh import exchanged_names, fresh_sources
from fusewright.auditing.losses import of_model
from fusewright.auditing.reference import PlainModel, _checkpointed, _StaysWide, step_bytes
from fusewright.auditing.slices import samples_of, slice_of

from ..versions import transformers_before
from . import tiny as families
from . import zoo

PAD, END = 0, 1


def tiny(dtype: torch.dtype = torch.float32, lora: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=100, eos_token_id=END, pad_token_id=PAD, use_cache=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(dtype).train()
    if lora:
        model = get_peft_model(
            model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
        )
    return model


def batch(rows: int = 3, length: int = 24) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 100, (rows, length))
    ids[:, -4] = END
    labels = ids.clone()
    labels[:, :6] = labels[:, -3:] = -100
    return {"input_ids": ids, "labels": labels}


def failed(result: Any) -> list[str]:
    return [finding.check for finding in result.failed]


class Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Any) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.change(gradient), None


def first_row(gradient: Tensor) -> Tensor:
    return torch.cat([gradient[:1], torch.zeros_like(gradient[1:])])


def first_tokens(gradient: Tensor) -> Tensor:
    return torch.cat([gradient[:, :8], 0.5 * gradient[:, 8:]], 1)


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("gradient-scale", lambda g: 2 * g),
        ("gradient-rows", first_row),
        *(
            pytest.param(check, change, marks=pytest.mark.long)
            for check, change in (
                ("gradient-sign", lambda g: -g),
                ("gradient-zero", lambda g: 0 * g),
                ("gradient-rows", first_tokens),
                ("gradient-finite", lambda g: g * torch.nan),
                ("gradient-value", lambda g: g.roll(1, -1)),
            )
        ),
    ],
)
def test_names_what_a_patched_class_does_to_gradients(
    check: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate = Changed.apply(self.gate_proj(x), change)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    result = audit(tiny(lora=True), batch())
    assert failed(result) == [check]
    assert "layers.1.mlp.gate_proj" in next(result.failed).subjects[0]


def test_finds_a_detached_path_behind_a_module_level_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Norm(modeling_llama.LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return x * scale * self.weight.detach()

    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", Norm)
    result = audit(tiny(), batch())
    assert failed(result) == ["gradient-missing"]
    assert len(next(result.failed).subjects) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_a_healthy_model_passes_and_is_as_before(dtype: torch.dtype, lora: bool) -> None:
    model = tiny(dtype, lora)
    held = next(p for p in model.parameters() if p.requires_grad)
    held.grad = grad = torch.ones_like(held)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    given = batch()
    state = torch.get_rng_state()
    result = audit(model, given)
    assert result.passed, str(result)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert [p for p in model.parameters() if p.grad is not None] == [held]
    assert held.grad is grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    json.dumps(result.to_dict())


def test_says_where_a_fault_begins_and_what_may_follow_from_it() -> None:
    model = tiny()
    model.model.layers[1].mlp.down_proj.weight.register_hook(lambda g: 2 * g)
    result = audit(model, batch())
    assert failed(result) == ["gradient-scale"]
    text = str(result)
    assert text.index("FAIL  gradient-scale") < text.index("passed")
    assert "model.layers.1.mlp.down_proj.weight" in text
    assert "do    others do not have it, so that the number of tokens is right" in text


def test_a_loss_over_other_tokens_is_named() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    assert failed(audit(tiny(), batch(), loss=loss)) == ["loss-scale"]


def test_tokens_that_are_not_trained_are_named() -> None:
    given = batch()
    given["labels"][given["input_ids"] == END] = -100
    assert failed(audit(tiny(), given)) == ["end-of-turn"]
    given["labels"][:] = -100
    assert failed(audit(tiny(), given)) == ["trained-tokens"]


def test_a_pack_without_masks_leaks() -> None:
    given = batch(1) | {"position_ids": torch.arange(12).repeat(1, 2)}
    assert [s.start for s in samples_of(given)] == [0, 12]
    assert audit(tiny(), given).passed
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    assert failed(audit(tiny(), given)) == ["packing"]


def test_dropout_and_checkpointing_are_in_force() -> None:
    model = tiny(lora=True, lora_dropout=0.2)
    model.gradient_checkpointing_enable()
    assert audit(model, batch()).passed
    model.eval()
    assert failed(audit(model, batch())) == ["dropout", "checkpointing"]


def test_adapters_that_the_forward_leaves_out_are_named() -> None:
    model = tiny(lora=True)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.forward = layer.base_layer.forward
    assert failed(audit(model, batch())) == ["adapter-reach"]


def test_a_patch_is_named_and_what_it_hides_is_not_called_right() -> None:
    def fast_mlp(x: Tensor) -> Tensor:
        up = F.linear(x, mlp.up_proj.base_layer.weight)
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up)  # type: ignore[no-any-return]

    model = tiny(lora=True)
    decoder = model.base_model.model.model
    mlp = decoder.layers[1].mlp
    mlp.forward = fast_mlp
    doubled = decoder.layers[1].self_attn.v_proj.lora_B["default"].weight
    doubled.register_hook(lambda g: 2 * g)
    result = audit(model, batch())
    assert failed(result) == ["adapter-reach", "gradient-scale"]
    text = str(result)
    line = fast_mlp.__code__.co_firstlineno
    assert f"fast_mlp, test_audit.py:{line}) leaves them out" in text
    backward = "the backward pass of base_model.model.model.layers.1.self_attn.v_proj.lora_B"
    assert f"{backward}.default.weight for a gradient that" in text
    assert "audit again when that is right" in text
    assert "the other 0" not in text


def test_the_trainable_set_is_the_configured_one() -> None:
    model = tiny(lora=True)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    result = audit(model, batch())
    assert failed(result) == ["trainable-set"]
    assert audit(model, batch(), expected=["lora_", r"model\.norm"]).passed


def test_a_model_without_a_modeling_file_is_judged_by_itself() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Embedding(100, 100)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.inner(input_ids)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    result = audit(Plain(), batch())
    assert result.passed
    skipped = {f.check: f.reason for f in result.findings if f.verdict == "skipped"}
    assert "Plain is not a class of transformers" in skipped["gradient-value"]


def test_patched_functions_of_library_modules_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    assert list(exchanged_names(masking_utils)) == []
    monkeypatch.setattr(masking_utils, "create_causal_mask", lambda **kwargs: None)
    assert list(exchanged_names(masking_utils)) == ["transformers.masking_utils.create_causal_mask"]
    with fresh_sources() as sources:
        twin = sources.twin(LlamaForCausalLM)
        assert twin is not LlamaForCausalLM
        assert twin.__name__ == "LlamaForCausalLM"


def test_a_reference_that_does_not_fit_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusewright.memory.meter.Meter.capacity", lambda self: self.used() + 1024)
    result = audit(tiny(), batch())
    reasons = {f.check: f.reason for f in result.findings if f.verdict == "skipped"}
    assert "GiB for these 72 tokens" in reasons["gradient-value"]
    assert result.passed


def test_a_slice_has_the_rows_that_differ_most() -> None:
    given = batch(8, 100)
    given["labels"][5, :90] = -100
    part, facts = slice_of(given, 64)
    assert part["input_ids"].shape == (2, 32)
    assert facts["slice"].startswith("tokens 65 to 97 of row 5")


def test_the_kernel_of_the_loss_has_errors_that_are_eagers() -> None:
    """In float32 those of PyTorch's cross entropy grow with the vocabulary, on one side of zero."""
    torch.manual_seed(0)
    logits, labels = 4 * torch.randn(1, 33, 60_000), torch.randint(60_000, (1, 33))
    logits[0, :-1].scatter_add_(1, labels[0, 1:, None], torch.full((32, 1), 40.0))  # nearly sure
    eager = F.cross_entropy(logits[0, :-1], labels[0, 1:])
    exact = F.cross_entropy(logits[0, :-1].double(), labels[0, 1:])
    ours = causal_lm(logits, labels, 60_000)
    assert abs(float(ours - eager)) <= 2e-7 * float(eager)
    assert abs(float(causal_lm(logits.double(), labels, 60_000) - exact)) <= 1e-12


def test_a_part_of_a_pack_has_a_border_of_trained_samples() -> None:
    """Not that of the padding, which is a sample of its own."""
    given = batch(1, 240)
    given["labels"][:, :] = given["input_ids"]
    given["labels"][:, 200:] = -100
    lengths = torch.tensor([0, 60, 130, 200, 240], dtype=torch.int32)
    pack = {**given, "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 70,
            "max_length_k": 70, "num_items_in_batch": torch.tensor(199)}  # fmt: skip
    part, facts = slice_of(pack, 64)
    assert facts["slice"].startswith("tokens 98 to 162 of row 0")
    assert part["cu_seq_lens_q"].tolist() == part["cu_seq_lens_k"].tolist() == [0, 32, 64]
    assert part["max_length_q"] == 32
    assert int(part["num_items_in_batch"]) == 63  # as many as the part trains


def test_a_loss_that_calls_the_model_with_parts() -> None:
    def halves(model: Any, given: Any) -> Tensor:
        parts = [{k: v[rows] for k, v in given.items()} for rows in (slice(1), slice(1, None))]
        losses: list[Tensor] = [model(**part).loss for part in parts]
        return (losses[0] + 2 * losses[1]) / 3

    result = audit(tiny(), batch(), loss=halves)
    assert failed(result) == []
    nothing = {**batch(), "num_items_in_batch": torch.tensor(5)}
    nothing["labels"] = torch.full_like(nothing["labels"], -100)
    assert failed(audit(tiny(), nothing)) == ["trained-tokens"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("musicgen", "plain"), ("musicgen", "bf16"), ("xglm", "plain"), ("zaya", "bf16")],
)
def test_a_healthy_model_that_was_called_wrong(name: str, kind: str) -> None:
    """Codebooks of one sample, no reference, one in fp32, an expert that rounding empties."""
    row = zoo.measure(name, kind)
    if "not_built" in row and transformers_before("5.24"):
        pytest.skip(f"this version of transformers builds no tiny one: {row['not_built']}")
    assert row["passed"]
    assert row["fails"] == []


@pytest.mark.long
def test_the_command_audits_what_a_script_builds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusewright.errors import DataError, RecipeError
    from fusewright.train.proof.audit import of_function, show

    script = tmp_path / "mine.py"
    script.write_text(
        "from tests.auditing.test_audit import batch, tiny\n"
        "def healthy(): return tiny(), [batch()]\n"
        "def untrained():\n"
        "    model = tiny()\n"
        "    model.lm_head.weight.register_hook(lambda g: g * 0)\n"
        "    return model, [batch()]\n"
        "def nothing(): return 3\n"
        "def broken(): return [][1]\n",
        encoding="utf-8",
    )
    assert show(of_function(f"{script}:healthy", 64), as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert show(of_function(f"{script}:untrained", 64), as_json=False) == 1
    assert "FAIL  gradient-zero" in capsys.readouterr().out
    with pytest.raises(DataError, match="a model and its batches"):
        of_function(f"{script}:nothing", 64)
    with pytest.raises(RecipeError, match=r"broken failed: IndexError: .*mine.py, line 8\)"):
        of_function(f"{script}:broken", 64)
    with pytest.raises(RecipeError, match="no function"):
        of_function(f"{script}:missing", 64)


def test_the_docs_list_every_check() -> None:
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")
    for check in CHECKS.values():
        assert f"| `{check.name}` | {check.question} | {check.advice} |" in page


def test_a_reference_in_fp64_stays_there_where_code_casts_to_fp32() -> None:
    x = torch.linspace(-1, 1, 7, dtype=torch.float64, requires_grad=True)

    def in_fp32(t: Tensor) -> Tensor:
        state = torch.zeros(7, 1, dtype=torch.float32)
        scores = F.softmax(t.float() / 3, dim=-1, dtype=torch.float32)
        return (scores[None] @ (state + t.to(torch.float32)[:, None])).square().sum()

    with _StaysWide():
        value = in_fp32(x)
        (gradient,) = torch.autograd.grad(value, x)
        assert torch.arange(3).float().dtype is torch.float32
        angles = x[None, :, None] @ torch.arange(3).float()[None, None]  # as of rotary embeddings
        torch.manual_seed(0)
        drawn = torch.rand(3, dtype=torch.float32)
    truth = (F.softmax(x / 3, -1) @ x).square()
    assert value.dtype is gradient.dtype is angles.dtype is torch.float64
    assert torch.equal(angles[0], torch.outer(x, torch.arange(3).double()))
    assert torch.allclose(value, truth, rtol=1e-14, atol=0)
    assert torch.allclose(gradient, torch.autograd.grad(truth, x)[0], rtol=1e-13, atol=1e-16)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.long
def test_a_form_more_exact_than_eager_mode_is_no_fault() -> None:
    """Of strong decays: eager mode, and its code in fp64, round sums of gradients in fp32."""
    assert zoo.measure("qwen3_5_text", "optimized")["fails"] == []


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("family", [name for name in families.NAMES if name != "mamba2"])
def test_blocks_that_run_again_in_the_plain_model(family: str, cache: bool) -> None:
    """All numbers stay; without a cache, some models compute them by other formulas."""
    model = families.model(family, num_hidden_layers=2, use_cache=cache)
    steps, runs = [], {False: 0, True: 0}

    def count(module: nn.Module, inputs: Any) -> None:
        runs[recompute] += 1

    for recompute in (False, True):
        with fresh_sources() as sources:
            plain = PlainModel(model, sources, recompute=recompute)
            for block in _checkpointed(plain.model):
                next(block.children()).register_forward_pre_hook(count)
            steps.append(plain.step(families.chat(), of_model, "exact"))
    whole, again = steps
    assert runs == {False: 2, True: 4}
    assert again.loss == pytest.approx(whole.loss, rel=1e-12)
    assert again.order == whole.order
    assert again.gradients.keys() == whole.gradients.keys()
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(again.gradients[name], gradient, rtol=1e-9, atol=1e-12)


def test_the_memory_of_blocks_that_run_again() -> None:
    model = tiny()
    assert step_bytes(model, torch.float32, 4096, True) < step_bytes(model, torch.float32, 4096)
    other = nn.Linear(8, 8)  # nothing there that runs again
    assert step_bytes(other, torch.float32, 64, True) == step_bytes(other, torch.float32, 64)
