"""A model on a machine where no kernel of ours can be launched, and libraries' can."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fusewright import optimize
from fusewright.kernels import choice
from tests.explained import explain

from ..kernels.failing_launches import ERRORS, as_on_a_gpu
from ..kernels.own_choices import own_choices
from ..kernels.stand_ins import norms
from ..kernels.util import needs_triton

pytestmark = needs_triton


def test_norms_are_a_library_s_where_ours_cannot_be_launched(
    tmp_path: Path,
) -> None:
    """The candidates are verified, measured at the sizes of the step, and shown."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    eager = LlamaForCausalLM(config).train()
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    ids = torch.arange(22).reshape(2, 11)
    with own_choices(tmp_path), as_on_a_gpu(ERRORS["driver"]), norms(), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*plain PyTorch.*")
        for model in (ours, eager.double()):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for mine, exact in zip(ours.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, exact.grad.float())
        report = explain(ours)
        saved = choice.records()
    sites = [site for site in report.sites if site.rule == "rms_norm"]
    assert sites
    assert all(site.status == "rewritten" for site in sites), str(report)
    chosen = [line for line in report.choices if line.startswith("rms_norm")]
    assert len(chosen) == 2
    for line in chosen:
        assert "(float32[2x16x32], " in line
        assert "own refused: 0 active drivers" in line
        assert " us" in line
    assert {record["bucket"].split("(")[0] for record in saved} >= {
        "rms_norm_forward", "rms_norm_backward"
    }  # fmt: skip
