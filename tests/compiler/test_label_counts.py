"""An optimized model sends its labels to the host before its backbone runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fusewright import optimize
from fusewright.compiler.calls import heads
from fusewright.kernels import label_counts


def test_labels_are_sent_before_the_backbone_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    counts: list[int] = []
    send, note = label_counts.send, heads.Replay.note

    def sending(labels: Any) -> None:
        order.append("labels")
        send(labels)

    def noting(self: Any, *given: Any) -> None:
        order.append("backbone")
        counts.append(label_counts.expected(9 * 2, -100))
        note(self, *given)

    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = optimize(transformers.LlamaForCausalLM(config).train(), codegen="eager")
    labels = torch.randint(40, (2, 9))
    labels[:, :4] = -100
    model(input_ids=labels.clamp(min=0), labels=labels)
    monkeypatch.setattr(label_counts, "send", sending)
    monkeypatch.setattr(heads.Replay, "note", noting)
    model(input_ids=labels.clamp(min=0), labels=labels)
    assert order == ["labels", "backbone"]
    assert counts == [10]
    assert label_counts.expected(labels.numel(), -100) == 0  # nothing is kept between steps
