"""The vector instructions that Inductor may use, found with one trial and not with one of each."""

from __future__ import annotations

from typing import Any

import pytest
from torch._inductor import config, cpu_vec_isa

from fusewright.compiler import codegen


class _Kind:
    def __init__(self, name: str, works: bool, tried: list[str]) -> None:
        self.name, self.works, self.tried = name, works, tried

    def __str__(self) -> str:
        return self.name

    def __bool__(self) -> bool:
        self.tried.append(self.name)
        return self.works


@pytest.mark.parametrize(
    ("working", "tried", "assumed"),
    [
        ("best good plain", ["best"], True),
        ("good plain", ["best", "good"], True),
        ("", ["best", "good", "plain"], None),  # Inductor finds out for itself
    ],
)
def test_what_comes_after_one_that_works_is_not_tried(
    working: str, tried: list[str], assumed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    names = ("of another CPU", "best", "good", "plain")
    kinds = [_Kind(name, name in working.split(), seen) for name in names]
    picked: list[Any] = []
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", kinds)
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["best", "good", "plain"])
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: picked.append(config.cpp.vec_isa_ok))
    before = config.cpp.vec_isa_ok
    codegen._find_vector_instructions()
    assert seen == tried
    assert picked == [assumed]
    assert config.cpp.vec_isa_ok == before
