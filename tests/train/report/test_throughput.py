"""What the steps took: rates, and the estimate of the operations that a model needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from fusewright.train.report import throughput as meter
from fusewright.train.report.throughput import (
    ThroughputMeter,
    flops_per_token,
    mean_context,
    peak_flops,
)

from ..conftest import make_model


def counted(model: Any, tokens: int) -> float:
    """Operations per token of a forward and backward, as PyTorch counts them."""
    ids = torch.randint(5, 200, (2, tokens), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops() / ids.numel()


def test_operations_of_full_training_are_those_that_run() -> None:
    model = make_model(attn_implementation="eager")
    model.train()
    # eager attention multiplies all pairs of T tokens, twice as many as the causal ones
    assert flops_per_token(model, context=2 * 48) == pytest.approx(counted(model, 48), rel=0.01)


def test_operations_with_adapters_are_those_that_run() -> None:
    base = make_model(attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["o_proj", "down_proj"]))
    estimate = flops_per_token(model, context=2 * 48)
    # the scores of the first block come before everything that is trained: they have no backward
    first = (6 - 2) * 32 * (2 * 48)
    assert estimate - first == pytest.approx(counted(model, 48), rel=0.01)


def test_what_comes_before_the_first_trained_weight_only_runs_forward() -> None:
    model = make_model()
    everything = flops_per_token(model)
    for p in model.model.parameters():
        p.requires_grad_(False)
    head = model.lm_head.weight.numel()
    assert flops_per_token(model) == (everything - 6 * head) / 3 + 6 * head


def test_only_the_experts_that_a_token_is_sent_to_count() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 8,
    }  # fmt: skip
    one, two = (
        flops_per_token(MixtralForCausalLM(MixtralConfig(**sizes, num_experts_per_tok=n)))
        for n in (1, 2)
    )
    assert two - one == 6 * 3 * 16 * 32


def test_a_packed_weight_counts_as_what_it_stands_for() -> None:
    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 64, 32
            self.weight = torch.nn.Parameter(torch.zeros(1024, 1, dtype=torch.uint8), False)

    assert flops_per_token(Packed()) == 2 * 64 * 32


def test_the_context_of_an_average_token() -> None:
    assert mean_context([10, 30]) == 25.0
    assert mean_context([]) == 0.0


def test_rates_leave_the_first_step_out() -> None:
    taken = ThroughputMeter()
    for seconds, tokens in ((10.0, 100), (1.0, 100), (3.0, 100)):
        taken.add(tokens, tokens // 2)
        taken.seconds.append(seconds)
    assert taken.rate(taken.tokens) == 50.0
    assert taken.rate(taken.trained, last=1) == pytest.approx(50 / 3)
    assert taken.median_step() == 2.0
    assert taken.median_step(last=1) == 3.0
    assert taken.utilization() is None
    taken.flops, taken.peak = 10.0, 1000.0
    assert taken.utilization() == 0.5


def test_the_meter_owns_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([5.0, 7.5, 10.0, 11.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(times))
    taken = ThroughputMeter()
    for _ in range(2):
        taken.start_step()
        taken.end_step()
    assert taken.seconds == [2.5, 1.0]
    assert set(taken.state_dict()) == {"seconds", "tokens", "trained", "compiling"}


def test_the_first_step_after_a_resumption_is_left_out_too() -> None:
    """A resumed run compiles again. Its rates are those of the run that was not stopped."""
    stopped = ThroughputMeter()
    resumed = ThroughputMeter(flops=10.0, peak=1000.0)
    for taken, times in ((stopped, (10.0, 2.0)), (resumed, (30.0, 2.0, 2.0))):
        if taken is resumed:
            stopped.add(7, 7)  # a step that is not finished
            resumed.load_state_dict(stopped.state_dict())
        for seconds in times:
            taken.add(100, 50)
            taken.seconds.append(seconds)
    assert resumed.compiling == [0, 2]
    assert (stopped.resumed_step(), resumed.resumed_step()) == (None, 30.0)
    for last in (None, 3, 10):
        assert resumed.rate(resumed.trained, last) == 25.0
        assert resumed.median_step(last) == 2.0
    assert resumed.utilization(last=4) == 0.5
    old = ThroughputMeter()  # of a checkpoint from before it was noted
    old.load_state_dict({"seconds": [9.0, 2.0], "tokens": [1, 1], "trained": [1, 1]})
    assert old.compiling == [0, 2]


def test_the_peak_is_measured_without_touching_the_random_numbers() -> None:
    state = torch.get_rng_state()
    peak = peak_flops(torch.device("cpu"), torch.float32, seconds=0.05)
    assert peak is not None
    assert 1e9 < peak < 1e14
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gpu_is_known_by_its_longest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(meter.GPU_PEAKS)
    for i, name in enumerate(names):  # the first that fits is taken
        assert not any(earlier in name for earlier in names[:i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 PCIe")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == 756e12


def test_attention_counts_each_layer_with_its_own_heads() -> None:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    sizes = {
        "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    widths = []
    for full in (8, 32):
        config = Gemma4TextConfig(**sizes, global_head_dim=full)
        with torch.device("meta"):
            model = Gemma4ForCausalLM(config)
        widths.append(flops_per_token(model, 1.0) - flops_per_token(model))
    assert widths == [6 * 2 * (8 + 8), 6 * 2 * (8 + 32)]
