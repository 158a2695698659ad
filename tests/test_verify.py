"""Verification: what it samples, and what it lets through."""

from __future__ import annotations

import pytest
import torch

from fusewright import optimize, verify
from fusewright.budget import errors, exceeded

from .models.zoo import FAMILIES, build


def test_small_sizes_fit_every_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    # falling back to the real sizes runs the loss in fp64 over the whole batch: gigabytes
    failures: list[str] = []
    check = verify._check

    def watched(candidate: object, inputs: object) -> object:
        try:
            return check(candidate, inputs)
        except Exception as error:
            failures.append(f"{candidate.rule.name}: {error}")
            raise

    monkeypatch.setattr(verify, "_check", watched)
    torch._dynamo.reset()
    model = optimize(build(FAMILIES[0], lora=True), codegen="eager")
    ids = torch.randint(0, 200, (4, 96))
    model(input_ids=ids, labels=ids).loss.backward()
    assert failures == []


def test_values_that_are_not_finite_count_by_where_they_are() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert errors(nan, nan).rms == 0.0
    assert errors(torch.ones(2), nan).rms == float("inf")
    assert exceeded(torch.ones(2), nan, nan) is not None
    assert exceeded(nan, nan, nan) is None
    assert exceeded(nan * 2, nan, nan) is not None
