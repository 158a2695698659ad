"""docs/kernels.md says what the launched kernels' machine code is, and none of them spills."""

from __future__ import annotations

import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion

from fusewright.kernels.choice import triton_version

from .util import needs_triton

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels.md"
CARDS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")

F32 = torch.float32

pytestmark = needs_triton


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    """The benchmark's module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("kernel_code")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def _page() -> tuple[str, dict[str, dict[str, set[str]]]]:
    """The version of Triton, and for each kernel and card the cells of the table."""
    text = PAGE.read_text(encoding="utf-8").partition("<!-- kernels:end -->")[0]
    version = re.search(r"Triton (\S+), ", text)
    assert version is not None
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for line in text.splitlines():
        if line.startswith("| `"):
            name, _, _, *cells = (c.strip() for c in line.strip("|").split("|"))
            for card, cell in zip(CARDS, cells, strict=True):
                found[name.strip("`")][card].add(cell)
    return version[1], found


def _check(kernels: Any, ops: tuple[str, ...], cards: tuple[str, ...]) -> None:
    import triton

    chosen = [c for c in kernels.CARDS if c.name in cards]
    made = kernels.variants(chosen, ops)
    assert made
    assert list(kernels.problems(made, chosen)) == []
    version, page = _page()
    if version != triton.__version__:
        return  # another compiler allocates registers in another way
    for variant in made:
        for card in chosen:
            cell = kernels._cell(variant.code[card.name])
            assert cell in page[variant.name][card.name], f"{variant.name} on {card.name}"


def test_the_page_has_every_kernel(kernels: Any) -> None:
    _, page = _page()
    assert len(page) > 15
    assert all(set(cards) == set(CARDS) for cards in page.values())


@pytest.mark.long("add_rms_norm", "lora_linear")
@pytest.mark.parametrize("op", ["add_rms_norm", "glu", "lora_linear", "quant_linear"])
def test_code_of_an_op_on_hopper(op: str, kernels: Any) -> None:
    _check(kernels, (op,), ("sm_90",))


def test_dequantization_reads_bytes_together_and_scales_once(kernels: Any) -> None:
    """A thread's 8 bytes by one access, four for the scale, 16 of the table, 2 to store."""
    hopper = next(c for c in kernels.CARDS if c.name == "sm_90")
    made = [v for v in kernels.variants([hopper], ("quant_linear",)) if "dequantize" in v.name]
    widths = dict(made[0].code["sm_90"].widths)
    assert widths[64] == 1  # the bytes
    assert widths[8] == 1  # the block's own scale
    assert sum(widths.values()) <= 1 + 4 + 16 + 2


@pytest.mark.long
def test_a_spill_is_what_goes_to_memory(kernels: Any) -> None:
    """On AMD's cards scalar registers may go to lanes of vector registers, which are none."""
    machine_code, launches = (importlib.import_module(n) for n in ("machine_code", "launches"))
    card = next(c for c in kernels.CARDS if c.name == "gfx942")

    def backward(op: str, **options: int) -> Any:
        maker = next(iter(kernels._cases([op])))[2][1]
        launch = launches.launches_of(op, maker, card.gpu)[-1]
        assert launch.backward
        launch = replace(launch, options=launch.options | options)
        return machine_code.compiled(launch, card)

    to_lanes = backward("selective_scan")
    assert re.search(r"\.sgpr_spill_count: *[1-9]", to_lanes.asm["amdgcn"])
    code = machine_code.read(to_lanes, card)
    assert (code.spills, code.stack) == (0, 0)
    code = machine_code.read(backward("rms_norm", BLOCK=1 << 14, num_warps=1), card)
    assert code.spills > 0
    assert code.stack > 0


@pytest.mark.slow
def test_code_of_every_op_on_every_card(kernels: Any) -> None:
    _check(kernels, (), CARDS)


def _of_the_matrix(
    kernels: Any, op: str, shape: str, dtype: torch.dtype, card: str
) -> tuple[list[Any], list[str]]:
    """The variants of an op, and what is wrong with them."""
    chosen = [c for c in kernels.CARDS if c.name == card]
    made = kernels.variants(chosen, (op,), {shape: kernels.MATRIX[shape]}, (dtype,))
    return made, list(kernels.problems(made, chosen))


def test_a_sample_of_the_matrix(kernels: Any) -> None:
    made, wrong = _of_the_matrix(kernels, "glu", "rows of 16,384", torch.float16, "sm_75")
    assert {v.launch.name for v in made} == {"forward", "backward"}
    assert wrong == []
    made, wrong = _of_the_matrix(kernels, "attention-packed", "heads of 64", F32, "sm_86")
    assert {v.launch.name for v in made} == {"table", "forward", "queries", "keys"}
    old = "attention_backward.keys (heads of 64) on sm_86: 3 instructions move registers to or from"
    assert wrong == ([f"{old} memory"] if TorchVersion(triton_version()) < "3.7" else [])


def test_what_is_refused_by_name_is_not_launched(kernels: Any) -> None:
    for dtype, card in ((F32, "sm_90"), (torch.float16, "sm_75")):
        made, _ = _of_the_matrix(kernels, "attention-packed", "heads of 128", dtype, card)
        assert made == []


def test_what_must_not_be_is_said(kernels: Any) -> None:
    made, wrong = _of_the_matrix(kernels, "glu", "heads of 64", torch.bfloat16, "sm_90")
    assert wrong == []
    code = replace(made[0].code["sm_90"], spills=3, shared=1 << 20, narrowest=16)
    bad = replace(made[0], code={"sm_90": code}, programs={"sm_90": 131})
    hopper = [c for c in kernels.CARDS if c.name == "sm_90"]
    wrong = list(kernels.problems([bad], hopper))
    assert [line.split(": ", 1)[1] for line in wrong] == [
        "3 instructions move registers to or from memory",
        "1048576 bytes of shared memory, of 232448",
        "products of 16 columns",
        "131 programs for 132 multiprocessors",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("card", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
def test_the_whole_matrix(card: str, dtype: torch.dtype, kernels: Any) -> None:
    chosen = [c for c in kernels.CARDS if c.name == card]
    made = kernels.variants(chosen, (), kernels.MATRIX, (dtype,))
    assert list(kernels.problems(made, chosen)) == []


@pytest.mark.long
def test_what_a_t4_launches(kernels: Any) -> None:
    """All of it compiles in seconds, multiplies no tiles, and is on the page."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    budget = importlib.import_module("layer_budget")
    made = budget.on_a_t4()
    assert not [k.name for k in made if k.multiplies or k.spills]
    page = PAGE.read_text(encoding="utf-8")
    begin, end = (page.index(f"<!-- t4:{which} -->") for which in ("start", "end"))
    rows = re.findall(r"^\| `(\S+)` \| ([^|]+) \|", page[begin:end], re.M)
    assert {name: setups for name, setups in rows} == {k.name: "; ".join(k.setups) for k in made}


@pytest.mark.long("lora, autocast-90", "lora-80", "qlora, autocast-100")
@pytest.mark.parametrize(
    ("setup", "most"), [("lora", 80), ("lora, autocast", 90), ("qlora, autocast", 100)]
)
def test_launches_of_a_layer(setup: str, most: int, kernels: Any) -> None:
    """What the page says; more of them would make the host the bottleneck."""
    if setup.startswith("qlora"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    budget = importlib.import_module("layer_budget")
    found = sum(budget.of_a_layer(setup, optimized=True).values())
    assert found <= most
    row = re.search(rf"^\| {setup} \| \d+ \| (\d+) ", PAGE.read_text(encoding="utf-8"), re.M)
    assert row is not None
    assert abs(int(row[1]) - found) <= 4  # versions of PyTorch differ a little


def test_a_modelled_step_is_the_sum_of_what_its_kernels_move_and_multiply(kernels: Any) -> None:
    roofline = importlib.import_module("roofline")
    times = roofline.Times()
    a, b = (torch.ones(256, 256, dtype=torch.bfloat16) for _ in range(2))
    with times:
        a + b
        narrow = a @ b
        a.float() @ b.float()
        narrow.view(-1)
    size = 256 * 256
    moved = [3 * 2 * size, 3 * 2 * size, 6 * size, 6 * size, 3 * 4 * size]
    assert times.total.launches == len(moved)
    assert times.total.bytes == sum(moved)
    assert times.flops == 2 * 2 * 256**3
    slow = max(2 * 256**3 / 15e12, moved[-1] / (0.85 * 3.0e12))
    expected = sum(n / (0.85 * 3.0e12) for n in moved[:-1]) + slow
    assert times.total.seconds == pytest.approx(expected)
    assert not bool(narrow.any())  # products are not computed


@pytest.mark.long
def test_the_model_of_a_step_knows_the_products_inside_of_ops(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    roofline = importlib.import_module("roofline")
    # so few tokens do not hide the issue of instructions, which only our kernels' code tells
    monkeypatch.setattr(importlib.import_module("issue"), "seconds", lambda launch: 0.0)
    (eager, rest), (ours, our_rest) = (
        roofline.parts("tiny-llama", "lora, autocast", optimized, 64) for optimized in (False, True)
    )
    assert ours.launches < eager.launches / 2
    assert ours.bytes < eager.bytes
    assert ours.seconds < eager.seconds
    assert our_rest.bytes < rest.bytes  # no logits


@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(2048, 4096, 16), (2048, 4096, 48), (2048, 14336, 16), (4096, 2048, 16), (1024, 2048, 16)],
)
def test_wide_products_have_two_programs_for_each_multiprocessor(
    rows: int, inner: int, columns: int, kernels: Any
) -> None:
    """Of an 8B layer at 2,048 tokens; one alone would wait for its own results."""
    triton_twin = importlib.import_module("fusewright.kernels.linear.lora_linear_triton")
    for card in kernels.CARDS[:5]:
        grid, share, config = triton_twin._wide_config(rows, columns, inner, card.gpu)
        assert grid[0] * grid[1] >= 2 * 128
        assert share % config["BLOCK_K"] == 0
        assert share * (grid[1] - 1) < inner <= share * grid[1]
        (tiles, shares), _, _ = triton_twin._wide_config(1 << 14, columns, inner, card.gpu)
        assert tiles >= 256
        assert shares == 1  # nothing to add up


def test_wide_products_issue_fewer_instructions_than_they_wait_for_bytes(kernels: Any) -> None:
    issue, launches = (importlib.import_module(n) for n in ("issue", "launches"))
    twin = importlib.import_module("fusewright.kernels.linear.lora_linear_triton")
    hopper = next(c for c in kernels.CARDS if c.name == "sm_90")
    for inner in (4096, 14336):
        with launches.as_on_a_gpu(hopper.gpu) as found, FakeTensorMode():
            wide = torch.empty(2048, inner, dtype=torch.bfloat16)
            twin.wide_product(wide, torch.empty(inner, 16), 1.0, False)
        _, (loop,), warps, resident = issue._code(issue._Once(found[0]))
        assert warps * loop <= 130 * 64 * 64 * 2 / 1024  # of a KiB of the wide factor
        assert warps * resident >= 16
        assert issue.seconds(found[0]) < 0.6 * wide.nbytes / 2.55e12
        few = replace(found[0], grid=(32, 1), args=_with(found[0], share=inner))
        assert issue.seconds(few) > 3 * issue.seconds(found[0])


def _with(launch: Any, **values: int) -> tuple[Any, ...]:
    names = launch.kernel.arg_names
    return tuple(values.get(name, a) for name, a in zip(names, launch.args, strict=False))


def test_issue_is_that_of_the_fullest_multiprocessor(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    issue = importlib.import_module("issue")
    monkeypatch.setattr(issue, "_code", lambda once: (100, (10, 7), 8, 2))
    launch = mock.Mock(
        args=(64, 16), options={"HEADS": 8}, grid=(1,),
        kernel=mock.Mock(arg_names=["q_heads", "k_heads", "HEADS"]),
    )  # fmt: skip
    launch.name = "rope"
    of_warp = 100 + 8 * 10 + 2 * 7
    assert issue.cycles(launch, 132) == of_warp * 2.5  # two warps a scheduler hide less
    assert issue.cycles(launch, 264) == of_warp * 4  # two programs at once
    assert issue.cycles(launch, 265) == of_warp * (4 + 2.5)  # and a third after them
    launch.name = "unknown"
    with pytest.raises(ValueError, match="2 loops, and 0 are known"):
        issue.cycles(launch, 1)
