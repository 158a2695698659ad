"""The Triton kernels of attention under the interpreter: random sizes, layouts and masks."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.attention_masks import MASKS
from tests.kernels.interpreted import run
from tests.kernels.interpreted.attention import check, draw


def _laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "features apart":
        t = torch.stack((t.detach(), t.detach()), -1)[..., 0]
    elif layout == "heads first":
        t = t.detach().contiguous()
    elif layout == "part":
        t = torch.cat((t.detach(), t.detach()), -1)[..., : t.shape[-1]]
    return t.detach().requires_grad_()


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    heads=st.sampled_from(((1, 1), (2, 1), (3, 3), (4, 2), (9, 1))),
    time=st.sampled_from((1, 31, 32, 65, 130)),
    batch=st.integers(1, 2),
    dims=st.sampled_from(((16, 16), (24, 8), (48, 80), (5, 3))),
    form=st.sampled_from((None, *MASKS)),
    layout=st.sampled_from(("projected", "heads first", "features apart", "part")),
    window=st.sampled_from((None, 1, 40)),
    dtype=st.sampled_from((torch.float16, torch.bfloat16)),
)
def check_parity(
    heads: tuple[int, int], time: int, batch: int, dims: tuple[int, int],
    form: str | None, layout: str, window: int | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    mask = None if form is None else MASKS[form](batch, heads[0], time)

    def make() -> tuple[Tensor, ...]:
        made = draw(batch, *heads, time, time, *dims, dtype)
        return tuple(_laid_out(t, layout) for t in made)

    torch.manual_seed(time)
    check(mask, make, window if mask is None else None)


if __name__ == "__main__":
    run(check_parity)
