"""One run under observation: what is kept of it, for plain functions without a graph."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright.rewrite.verify import Outcome, VerifySettings, copied, runs

from .faults import with_gradient

S = (3, 4)


def _seen(
    fn: Callable[..., Any], *inputs: Any, needs: bool | list[bool] = True, **settings: Any
) -> Outcome:
    """One run of ``fn``."""
    differentiable = [needs] * len(inputs) if isinstance(needs, bool) else needs
    return runs(
        fn, [inputs], VerifySettings(differentiable, settings.pop("fixed", frozenset()), **settings)
    )


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape or S, generator=torch.Generator().manual_seed(0))


def test_nothing_stays_of_a_run_that_failed() -> None:
    """A softmax saves its own output, and where backward does not run, nothing frees that."""
    made: list[weakref.ref[Tensor]] = []

    def fails(x: Tensor) -> Any:
        made.append(weakref.ref(x.softmax(-1)))
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        _seen(fails, _x())
    gc.collect()
    assert [m() for m in made] == [None]


# -------------------------------------------------------------------------------------- the values


def test_outputs_and_gradients() -> None:
    x, y = _x(), _x()
    found = _seen(lambda a, b: (a * 2, a + b * 3, "no tensor"), x, y)
    outputs, grads, again, written = found.results
    assert [torch.equal(o, v) for o, v in zip(outputs, (x * 2, x + y * 3), strict=True)] == [
        True, True
    ]  # fmt: skip
    assert [g.shape for g in grads] == [S, S]
    assert torch.equal(torch.stack(grads), torch.stack(again))
    # the upstream is one for all runs, uneven, and another for each output
    up, other = _seen(lambda a, b: (a * 1, b * 1), x, y).results[1]
    assert torch.equal(grads[1], 3 * other)
    assert torch.allclose(grads[0], 2 * up + other)
    assert up.unique().numel() == up.numel()
    assert not torch.equal(up, other)
    assert written == [None, None]
    assert (found.draws, found.saved) == (1, 0)


def test_how_large_the_gradients_from_behind_are() -> None:
    (unit,), (small,) = (
        _seen(lambda a: (a * 3,), _x(), upstream=size).results[1] for size in (1.0, 0.25)
    )
    assert torch.equal(small, unit / 4)


def test_constants_are_handed_on() -> None:
    found = _seen(lambda a, n: (a * n,), _x(), 3)
    assert torch.equal(found.results[0][0], _x() * 3)
    assert len(found.results[1]) == 1


def test_gradients_of_those_that_need_one() -> None:
    found = _seen(lambda a, b: (a * b,), _x(), _x(), needs=[False, True])
    assert [g is not None for g in found.results[1]] == [True]
    assert "output 0 alone gives a gradient of input 1" in found.traits
    assert "output 0 alone gives a gradient of input 0" not in found.traits


def test_no_gradient_where_none_is_needed_or_there_is_none() -> None:
    assert _seen(lambda a: (a * 2,), _x(), needs=False).results[1:3] == ([], [])
    found = _seen(lambda a: (a.detach() * 2,), _x())
    assert found.results[1:3] == ([None], [None])
    found = _seen(lambda a, b: (a * 2,), _x(), _x())
    assert [g is None for g in found.results[1]] == [False, True]
    assert [g is None for g in found.results[2]] == [False, True]


def test_where_gradients_are_off_inputs_still_need_one() -> None:
    needed = []

    def fn(a: Tensor, b: Tensor) -> tuple[Tensor]:
        needed.extend([a.requires_grad, b.requires_grad, torch.is_grad_enabled()])
        return (a * b,)

    found = _seen(fn, _x(), _x(), needs=[True, False], grad=False)
    assert needed == [True, False, False]
    assert found.results[1:3] == ([None], [None])
    needed.clear()
    _seen(fn, _x(), _x(), needs=[True, False])
    assert needed == [True, False, True]


def test_a_backward_that_writes_over_the_gradient_that_it_gave() -> None:
    given: list[Tensor] = []

    def once(grad: Tensor) -> Tensor:
        for before in given:
            before.zero_()
        given.append(grad.clone())
        return given[-1]

    found = _seen(lambda a: (with_gradient(a * 1, once),), _x())
    assert bool(found.results[1][0].all())


def test_the_second_backward_has_another_layout_and_sign() -> None:
    for shape in ((), (4,), (3, 4), (2, 3, 4)):
        ups: list[Tensor] = []

        def note(grad: Tensor, ups: list[Tensor] = ups) -> Tensor:
            ups.append(grad.detach())
            return grad

        found = _seen(lambda a, note=note: (with_gradient(a, note),), torch.ones(shape))
        first, second = ups[0], ups[-1]
        assert len(ups) == 2
        assert torch.equal(first, -second)
        assert first.is_contiguous()
        assert second.is_contiguous() is (shape == ())
        assert torch.equal(found.results[1][0], found.results[2][0])


def test_each_output_has_a_backward_of_its_own() -> None:
    found = _seen(lambda a, b: (a * 2, b * 2, a * b), _x(), _x())
    reached = {t for t in found.traits if "alone" in t}
    assert reached == {
        f"output {i} alone gives a gradient of input {j}"
        for i, j in ((0, 0), (1, 1), (2, 0), (2, 1))
    }


def test_outputs_without_a_gradient_do_not_move_the_upstream_of_others() -> None:
    both = _seen(lambda a: (a * 1, a * 2), _x()).results[1][0]
    one = _seen(lambda a: (a.detach() * 1, a * 2), _x()).results[1][0]
    other = _seen(lambda a: (a * 1, a.detach() * 2), _x()).results[1][0]
    assert torch.allclose(both, one + other)


def test_a_gradient_that_a_backward_does_not_give() -> None:
    found = _seen(lambda a: (with_gradient(a, lambda grad: None),), _x())
    assert found.results[1:3] == ([None], [None])


def test_a_missing_upstream_stays_missing() -> None:
    seen: list[Any] = []

    class Two(torch.autograd.Function):
        """Two values, of which only the first is used."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 1, x * 2

        @staticmethod
        def backward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
            return first

    def fn(a: Tensor, b: Tensor) -> tuple[Tensor]:
        b.register_hook(seen.append)
        return (Two.apply(a)[0],)

    found = _seen(fn, _x(), _x())
    assert [g is None for g in found.results[1]] == [False, True]
    assert seen == []


# ---------------------------------------------------------------------------------- several draws


def test_results_of_several_draws_are_stacked() -> None:
    x, y = _x(), _x() + 1
    setting = VerifySettings([True], frozenset())
    found = runs(lambda a: (a.exp(),), [[x], [y]], setting)
    assert found.draws == 2
    assert torch.equal(found.results[0][0], torch.stack([x.exp(), y.exp()]))
    grads = found.results[1][0]
    assert grads.shape == (2, *S)
    assert not torch.allclose(grads[0] / x.exp(), grads[1] / y.exp())  # each has its own upstream
    assert found.results[3] == [None]
    assert found.saved == 2 * runs(lambda a: (a.exp(),), [[x]], setting).saved == 2 * 12 * 4
    assert len(found.random) == 2
    assert (
        runs(lambda a: (a,), [[x]], setting).traits
        == runs(lambda a: (a,), [[x]] * 2, setting).traits
    )


def test_a_result_that_only_some_draws_have() -> None:
    def fn(a: Tensor) -> tuple[Tensor]:
        return (a.add_(1) if float(a.detach()[0, 0]) > 0 else a * 1,)

    setting = VerifySettings([False], frozenset())
    draws = [[torch.ones(S)], [-torch.ones(S)]]
    with pytest.raises(RuntimeError, match="in some of the draws only"):
        runs(fn, draws, setting)
    assert runs(fn, draws[:1] * 2, setting).results[3][0].shape == (2, *S)


# ----------------------------------------------------------------------------------------- effects


def test_what_is_written_into() -> None:
    def fn(a: Tensor, b: Tensor, n: int) -> tuple[Tensor]:
        b[0] += 1
        return (a * n,)

    written = _seen(fn, _x(), _x(), 2, needs=False).results[3]
    assert [w is None for w in written] == [True, False, True]
    assert torch.equal(written[1][0], _x()[0] + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.int8, torch.int64])
def test_what_is_not_a_number_is_no_write(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, torch.nan if dtype.is_floating_point else 2.0, 3.0]).to(dtype)

    def fn(a: Tensor) -> tuple[Tensor]:
        a.view(torch.uint8)[0] = 0x55
        return (a.view(-1),)

    assert _seen(lambda a: (a.view(-1),), x, needs=False).results[3] == [None]
    assert _seen(fn, x, needs=False).results[3][0] is not None
    turned = x.repeat(2, 1).T  # its rows lie apart
    assert _seen(lambda a: (a[0],), turned, needs=False).results[3] == [None]


def test_a_number_in_place_of_none_is_a_write() -> None:
    x = torch.tensor([1.0, torch.nan])
    for at in (0, 1):
        written = _seen(lambda a, at=at: (a.index_fill_(0, torch.tensor(at), 5.0),), x, needs=False)
        assert written.results[3][0][at] == 5
    lost = _seen(lambda a: (a.index_fill_(0, torch.tensor(0), torch.nan),), x, needs=False)
    assert lost.results[3][0].isnan().all()


def test_random_draws() -> None:
    setting = VerifySettings([False], frozenset())
    calm = runs(lambda a: (a * 1,), [[_x()]], setting)
    draw = runs(lambda a: (torch.rand_like(a),), [[_x()]] * 2, setting)
    assert draw.random[0] != calm.random[0]
    again = runs(lambda a: (torch.rand_like(a),), [[_x()]] * 2, setting)
    assert torch.equal(draw.results[0][0], again.results[0][0])
    first, second = draw.results[0][0]
    assert not torch.equal(first, second)


def test_a_copy_lies_as_the_original_does() -> None:
    base = torch.randn(4, 6)
    for t in (base, base[1:, 2:], base.T, base[:1].expand(3, 6), base[:, ::2], base[:0]):
        copy = copied(t)
        assert (copy.shape, copy.stride()) == (t.shape, t.stride())
        assert copy.storage_offset() == t.storage_offset()
        assert torch.equal(copy, t)
        assert copy.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


# -------------------------------------------------------------------------------- kept for backward


def test_bytes_that_are_kept() -> None:
    def kept(fn: Callable[..., Any], *inputs: Tensor, **settings: Any) -> int:
        return _seen(fn, *inputs, **settings).saved

    assert kept(lambda a: (a.exp(),), _x()) == 12 * 4
    assert kept(lambda a: (a.exp().exp(),), _x()) == 2 * 12 * 4
    assert kept(lambda a: (a.sin(),), _x()) == 0  # what it keeps is its input
    assert kept(lambda a: (e := a.exp(), e.sin()), _x()) == 12 * 4  # one tensor, kept twice
    assert kept(lambda a: (a.exp(),), _x(), fixed=frozenset({S})) == 0
    assert kept(lambda a: (a.exp(),), _x(), fixed=frozenset({(4, 3)})) == 12 * 4
    assert kept(lambda a: (a.exp(),), _x(), grad=False) == 0


# ------------------------------------------------------------------------------------------- traits


def _traits(fn: Callable[..., Any], *inputs: Tensor, **settings: Any) -> set[str]:
    found = _seen(fn, *inputs, **settings).traits
    return {t for t in found if "alone" not in t and "is a Tensor" not in t}


def test_nothing_but_values_where_it_is_not_thorough() -> None:
    found = _seen(lambda a, b: (a.exp(), a), _x(), _x(), thorough=False)
    assert found.traits == frozenset()
    assert [g is None for g in found.results[1]] == [False, True]
    assert found.results[2] == [None, None]


def test_class_and_device() -> None:
    found = _seen(lambda a: (a * 1, torch.nn.Parameter(a.detach() * 1)), _x(), needs=False)
    assert "output 0 is a Tensor on cpu" in found.traits
    assert "output 1 is a Parameter on cpu" in found.traits


def test_which_outputs_require_a_gradient() -> None:
    assert _traits(lambda a: (a * 1, a.detach() * 1), _x()) == {"output 0 requires a gradient"}


def test_memory_that_is_shared() -> None:
    def traits(fn: Callable[..., Any], *inputs: Tensor) -> set[str]:
        return _traits(fn, *inputs, needs=False)

    own = lambda a: (a * 1, a + 1)  # noqa: E731
    assert traits(own, _x()) == set()
    assert traits(lambda a, b: (b[1:],), _x(), _x()) == {"output 0 shares memory with input 1"}
    two = lambda a: (e := a.exp(), e.mT)  # noqa: E731
    assert traits(two, _x()) == {"output 1 shares memory with output 0"}
    # parts of one memory
    halves = lambda a: (a * 1).chunk(2, -1)  # noqa: E731
    assert traits(halves, _x()) == set()
    overlapping = lambda a: ((e := a * 1)[:, :3], e[:, 2:])  # noqa: E731
    assert traits(overlapping, _x()) == {"output 1 shares memory with output 0"}
    empty = lambda a: ((e := a * 1)[:0], e, e[:0])  # noqa: E731
    assert traits(empty, _x()) == set()
    nothing = lambda a: (e := a * 1, e.view(torch.int16)[:0])  # noqa: E731
    assert traits(nothing, _x()) == traits(lambda a: nothing(a)[::-1], _x()) == set()
    other = lambda a: (e := a * 1, e.view(torch.int16))  # noqa: E731
    assert traits(other, _x()) == {"output 1 shares memory with output 0"}
    wide = lambda a: (e := a[:1].clone().expand(5, 4), e[2:])  # noqa: E731
    assert "output 1 shares memory with output 0" in traits(wide, _x())


def test_strides_that_are_read() -> None:
    def strides(fn: Callable[..., Any], *laid_out: str, shape: tuple[int, ...] = S) -> set[str]:
        found = _traits(fn, _x(*shape), needs=False, laid_out=laid_out)
        return {t for t in found if "strides" in t}

    turned = lambda a: (a.T.contiguous().T * 1, a * 1)  # noqa: E731
    assert strides(turned) == strides(turned, "", "") == set()
    assert strides(turned, "for views") == {"output 0 has strides (1, 3)"}
    assert strides(turned, "for views", "for views") == {"output 0 has strides (1, 3)"}
    both = {"output 0 has strides (1, 3)", "output 1 has strides (4, 1)"}
    assert strides(turned, "exactly", "exactly") == both
    # of one element in a row, the stride says nothing
    flat = lambda a: (a.as_strided((2, 1, 2), (2, 7, 1)),)  # noqa: E731
    assert strides(flat, "exactly") == {"output 0 has strides (2, 1)"}


def test_what_cannot_be_written_to() -> None:
    def fixed(fn: Callable[..., Any], **settings: Any) -> set[str]:
        return {t for t in _traits(fn, _x(), **settings) if "in place" in t}

    said = {"output 1 cannot be written in place"}
    assert fixed(lambda a: (a.argmax(-1), a.exp()[:1].expand(3, 4))) == said
    split = lambda a: (a.argmax(-1), *(a * 1).unbind())  # noqa: E731
    assert len(fixed(split)) == 3  # views of several are made at once
    assert fixed(split, grad=False) == set()
    assert fixed(lambda a: (a * 1, a.argmax(-1))) == set()


def test_trying_to_write_changes_no_result() -> None:
    for scale in (1.0, 3.0):
        x = _x() * scale
        found = _seen(lambda a: (a.view(-1), a * 2), x, needs=False)
        assert torch.equal(found.results[0][0], x.view(-1))
        assert found.results[3] == [None]
