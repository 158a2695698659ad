"""Generation with a cache: attention of one position by the op, in the given instance only."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as imported

from fusewright import explain, optimize, restore
from fusewright.compiler.copies import decoding
from fusewright.compiler.copies.decoding import Decoding
from fusewright.kernels.attention import decode_attention as op
from fusewright.kernels.tolerance import exceeded


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take few keys, too, on every CPU: float16 is taken on all of them."""
    monkeypatch.setattr(op, "LEAST", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the keys in each call of the op."""
    seen: list[tuple[int, ...]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(k.shape))
        return op.decode_attention(q, k, v, *rest)

    monkeypatch.setattr(decoding, "decode_attention", spy)
    return seen


def _llama(dtype: torch.dtype = torch.float16, attention: str = "sdpa") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def _step(model: Any, mask: Tensor | None = None) -> Tensor:
    """The logits after a prompt, of the next token with a cache."""
    ids = torch.arange(48).reshape(2, 24) % 97
    first = model(input_ids=ids[:, :-1], attention_mask=None if mask is None else mask[:, :-1])
    given = {"past_key_values": first.past_key_values, "use_cache": True}
    logits: Tensor = model(input_ids=ids[:, -1:], attention_mask=mask, **given).logits
    return logits


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_of_generation(padded: bool, calls: list[tuple[int, ...]]) -> None:
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :3] = not padded
    model = _llama()
    eager, exact = _step(model, mask), _step(_llama().double(), mask)
    assert not calls
    ours = _step(optimize(model, codegen="eager"), mask)
    assert exceeded(ours, eager, exact) is None
    assert len(calls) == 1 + 2  # to verify it, and in each layer; the prompt is no single position
    assert all(shape[2] == 24 for shape in calls)
    sites = [s for s in explain(model).sites if s.rule == "decode_attention"]
    assert [s.module for s in sites] == ["model.layers.0", "model.layers.1"]
    assert all(s.status == "rewritten" and s.error is not None for s in sites)


@torch.no_grad()
def test_whole_texts_and_restore(calls: list[tuple[int, ...]]) -> None:
    model = _llama()
    ids = torch.arange(1, 13).reshape(2, 6)
    wanted = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **wanted)
    optimize(model, codegen="eager")
    assert torch.equal(model.generate(ids, **wanted), plain)
    assert len(calls) == 1 + 2 * 4
    assert all("forward" not in vars(layer.self_attn) for layer in model.model.layers)
    restore(model)
    model.generate(ids, **wanted)
    assert len(calls) == 1 + 2 * 4


@torch.no_grad()
def test_only_the_given_instance(calls: list[tuple[int, ...]]) -> None:
    """Another model runs as it was, even while the optimized one is in a call."""
    other, model = _llama(), optimize(_llama(), codegen="eager")
    inside: list[int] = []

    def hook(*_: Any) -> None:
        before = len(calls)
        _step(other)
        inside.append(len(calls) - before)

    model.model.layers[1].self_attn.register_forward_hook(hook)
    _step(model)
    assert inside == [0, 0]  # a hook on a submodule of a region runs where it stands, too


def test_not_with_gradients_nor_where_the_rule_is_off(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _step(optimize(_llama(), codegen="eager"))
    with torch.no_grad():
        _step(optimize(_llama(), codegen="eager", passes=[]))
        monkeypatch.setenv("FUSEWRIGHT_DISABLE", "attention")
        _step(optimize(_llama(), codegen="eager"))
        monkeypatch.delenv("FUSEWRIGHT_DISABLE")
        _step(optimize(_llama(attention="eager"), codegen="eager"))
    assert not calls


@torch.no_grad()
def test_what_is_not_verified_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama()
    eager = _step(model)

    def wrong(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return op.decode_attention(q, k, v, *rest) * 1.01

    monkeypatch.setattr(decoding, "decode_attention", wrong)
    optimize(model, codegen="eager")
    assert torch.equal(_step(model), eager)
    sites = [s for s in explain(model).sites if s.rule == "decode_attention"]
    assert [s.status for s in sites] == ["refused", "refused"]
    assert "exceeds" in sites[0].reason
    assert not torch.equal(_step(optimize(model, codegen="eager", verify="off")), eager)


class _ThroughTorch(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert isinstance(q, torch.Tensor)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class _ThroughFunctional(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query=q, key=k, value=v, enable_gqa=True)


class _ThroughName(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return imported(q, k, v, None, 0.0, False, scale=0.25, enable_gqa=True)


def _helper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class _ThroughHelper(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _helper(q, k, v)


class _Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *qkv: Tensor) -> Tensor:
        out: Tensor = self.attention(*qkv)
        return out


def _qkv(time: int = 1, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 4, time, 16, generator=generator).to(dtype),
        torch.randn(2, 2, 30, 16, generator=generator).to(dtype),
        torch.randn(2, 2, 30, 16, generator=generator).to(dtype),
    )


SPELLINGS = [_ThroughTorch, _ThroughFunctional, _ThroughName, _ThroughHelper]


@torch.no_grad()
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.__name__)
def test_ways_to_call_it(spelling: type[nn.Module], calls: list[tuple[int, ...]]) -> None:
    block, qkv = _Block(spelling()), _qkv()
    plain, exact = block(*qkv), block(*(t.double() for t in qkv))
    with Decoding()(block):
        ours = block(*qkv)
    assert len(calls) == 2  # once to verify it
    assert exceeded(ours, plain, exact) is None
    assert "forward" not in vars(block.attention)


@torch.no_grad()
def test_a_function_that_was_put_in_meanwhile_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    block, decode = _Block(_ThroughHelper()), Decoding()
    with decode(block):
        block(*_qkv())
    monkeypatch.setitem(globals(), "_helper", lambda q, k, v: q * 0)
    with decode(block):
        assert torch.equal(block(*_qkv()), torch.zeros(2, 4, 1, 16, dtype=torch.float16))


class _Unusual(nn.Module):
    """Calls that the op has no meaning for."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        attend = functional.scaled_dot_product_attention
        keys, values = (t.repeat_interleave(2, 1) for t in (k, v))
        return [
            attend(q, keys, values, is_causal=True),
            attend(q, keys, values, dropout_p=0.5),
            attend(q[0], keys[0], values[0]),
            attend(q, k[:, :1], v[:, :1]),  # broadcasts
            attend(q.float(), keys.float(), values.float()),
        ]


@torch.no_grad()
def test_other_calls_run_as_they_were(calls: list[tuple[int, ...]]) -> None:
    block = _Block(_Unusual())
    torch.manual_seed(0)
    plain = block(*_qkv())
    torch.manual_seed(0)
    with Decoding()(block):
        ours = block(*_qkv())
    assert not calls
    assert all(map(torch.equal, ours, plain))


@torch.no_grad()
def test_autocast_decides_the_dtype(calls: list[tuple[int, ...]]) -> None:
    block = _Block(_ThroughFunctional())
    with torch.autocast("cpu", torch.bfloat16):
        plain = block(*_qkv())
        with Decoding()(block):
            assert torch.equal(block(*_qkv()), plain)
    assert not calls


@torch.no_grad()
def test_errors_and_threads_leave_nothing_behind(calls: list[tuple[int, ...]]) -> None:
    block, decode = _Block(_ThroughFunctional()), Decoding()
    with pytest.raises(RuntimeError), decode(block):
        block(*(t[..., :7] if i else t for i, t in enumerate(_qkv())))
    assert "forward" not in vars(block.attention)
    calls.clear()

    def generate() -> None:
        with torch.no_grad(), decode(block):
            found.append("forward" in vars(block.attention))

    found: list[bool] = []
    with decode(block):
        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()
        block(*_qkv())
    assert calls
    assert found == [True]  # the other thread's call changed nothing
    assert "forward" not in vars(block.attention)


@torch.no_grad()
def test_where_the_op_is_of_no_use_no_token_pays_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    attention = Decoding._attention

    def spy(self: Decoding, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(self._region)
        return attention(self, *args, **kwargs)

    monkeypatch.setattr(Decoding, "_attention", spy)
    model = optimize(_llama(torch.float32), codegen="eager")
    before = _step(restore(_llama(torch.float32)))
    assert torch.equal(_step(model), before)
    first = len(asked)  # the prompt, and the first token: PyTorch's kernel is as fast in float32
    assert first > 0
    assert torch.equal(_step(model), before)
    assert len(asked) == first
    model.half()  # another precision is asked about anew
    _step(model)
    assert len(asked) > first
