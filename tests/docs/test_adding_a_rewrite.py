"""docs/adding-a-rewrite.md: its code is examples/adding_a_rewrite.py, and that works.

``pytest tests/docs --update-goldens`` puts the code into the page anew.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import pathlib
import re
import textwrap
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from fusewright import optimize
from fusewright.passes import PIPELINE
from tests.explained import explain
from tests.kernels.test_conformance import check_all

from ..capturing import capture, rewrite, rewritten
from ..kernels.util import assert_parity, saved_tensors
from . import notebooks

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "adding_a_rewrite.py"
PAGE = ROOT / "docs" / "adding-a-rewrite.md"
IDS = torch.arange(22).reshape(2, 11)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("adding_a_rewrite", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _sections() -> dict[str, str]:
    found = re.findall(r"^ *# \[(\w+)\]\n(.*?)^ *# \[end\]", EXAMPLE.read_text(), re.M | re.S)
    return {name: textwrap.dedent(code).strip() for name, code in found if name != "end"}


def test_the_code_of_the_page_is_the_example(request: pytest.FixtureRequest) -> None:
    sections, text = _sections(), PAGE.read_text()
    if request.config.getoption("--update-goldens"):
        for name, code in sections.items():
            block = f"<!-- {name} -->\n```python\n{code}\n```\n"
            text = re.sub(
                rf"<!-- {name} -->\n(```python\n.*?\n```\n)?",
                lambda _, b=block: b,
                text,
                flags=re.S,
            )
        PAGE.write_text(text)
    blocks = dict(re.findall(r"<!-- (\w+) -->\n```python\n(.*?)\n```\n", text, re.S))
    assert blocks == sections
    assert text.count("```") == 2 * len(sections), (
        "other code is indented, so that none is untested"
    )


def test_the_notebook_has_the_rule_of_the_page() -> None:
    (path,) = (p for p in notebooks.NOTEBOOKS if p.stem == "adding_a_rewrite")
    assert _sections()["rule"] in notebooks.code(json.loads(path.read_text(encoding="utf-8")))


def test_the_files_that_the_page_names_are_there() -> None:
    named = re.findall(r"`((?:src|tests|docs|examples|graph|kernels)/[\w/.-]+)`", PAGE.read_text())
    assert len(named) > 12
    for name in named:
        path = name if name.split("/")[0] in ("src", "tests", "docs", "examples") else f"src/{name}"
        assert (ROOT / path).exists(), name


def test_the_op_of_the_page_keeps_what_ops_promise(example: ModuleType) -> None:
    check_all(example.OP)


def _step(model: nn.Module) -> tuple[Tensor, list[Tensor | None]]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def _assert_rewritten(model: nn.Module, passes: object, rule: str, sites: int) -> None:
    eager = copy.deepcopy(model)
    ours = optimize(model, passes=passes, codegen="eager")
    for mine, theirs in zip(*(_flat(_step(m)) for m in (ours, eager)), strict=True):
        torch.testing.assert_close(mine, theirs)
    report = explain(ours)
    assert report.by_rule()[rule] == sites, str(report)
    assert not report.gaps(), str(report)


def _flat(step: tuple[Tensor, list[Tensor | None]]) -> list[Tensor | None]:
    return [step[0], *step[1]]


def test_the_spelling_gets_what_was_missed(example: ModuleType) -> None:
    gated, _ = example.models()
    missed = explain(optimize(copy.deepcopy(gated), codegen="eager")).gaps()
    assert [(s.rule, s.status) for s in missed] == [("glu", "missed")] * 2
    assert missed[0].reason in " ".join(PAGE.read_text().split()), "the page quotes the report"
    _assert_rewritten(gated, example.with_my_glu, "glu", 2)


def test_the_spelling_keeps_those_that_are_built_in(example: ModuleType) -> None:
    gate, up = (torch.randn(2, 5, 12, requires_grad=True) for _ in range(2))
    for act in (torch.sigmoid, nn.functional.silu, nn.functional.gelu):
        graph = capture(lambda g, u, act=act: act(g) * u, gate, up)
        assert rewritten(rewrite(graph, example.with_my_glu)) == ["glu"]


@pytest.mark.parametrize("rule", ["QuickGELU", "QuickGELUOp"])
def test_the_rule_rewrites(example: ModuleType, rule: str) -> None:
    _, quick = example.models()
    assert not explain(optimize(copy.deepcopy(quick), codegen="eager")).by_rule().get("quick_gelu")
    _assert_rewritten(quick, [*PIPELINE, getattr(example, rule)()], "quick_gelu", 2)


def test_the_rule_is_short_and_declines_with_reasons(example: ModuleType) -> None:
    assert len(_sections()["rule"].split("def suspects")[0].strip().splitlines()) <= 20

    def near(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * torch.sigmoid(x * y), x * torch.sigmoid(1 - x)

    x, y = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
    findings = rewrite(capture(near, x, y), [example.QuickGELU()])
    assert [(f.status, f.reason.split(";")[0]) for f in findings] == [
        ("refused", "the scale is not a constant"),
        ("missed", "a sigmoid that looks like a quick GELU"),
    ]


def test_the_op_has_the_right_gradient(example: ModuleType) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: example.quick_gelu(x, 1.702), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 5, 33), (1, 0, 4)], ids=str)
def test_the_op_is_its_reference(
    example: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    strided = torch.stack((dense, dense), -1)[..., 0]
    for x in (dense.requires_grad_(), strided.requires_grad_()):
        assert_parity(
            lambda x: example.quick_gelu(x, 1.702), lambda x: example.OP.reference(x, 1.702), x
        )


def test_the_op_keeps_less_and_backward_runs_twice(example: ModuleType) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    with saved_tensors() as kept:
        y = example.quick_gelu(x, 1.702)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert example.OP.cost(x, 1.702).bytes_saved == x.nbytes
    assert example.OP.unsupported(x, 1.702) == []
    assert example.OP.unsupported(x.int(), 1.702)


@pytest.mark.long
def test_the_example_runs(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    said = capsys.readouterr().out
    assert said.count("fusewright: ") == 4
    assert said.count("missed: glu") == 1
