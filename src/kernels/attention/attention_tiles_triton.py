"""Which tiles of the scores a mask leaves, and what it hides inside of a tile.

A mask is read once for a table of its tiles of GRAIN x GRAIN: nothing is seen, something is, or
everything is and nothing is added. A kernel looks up which of its tiles there are between the
first and the last that are not hidden, visits these alone, and reads the mask where it must. So
the work grows with what is seen, and for a pack with the squares of its samples' lengths.

Of first keys (``first_keys.py``) nothing needs to be looked up: they never fall, so the first and
the last position of a tile say what it sees.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launcher import launched

STEP = 256
"""Keys that a program of ``table_kernel`` reads at once."""

FAR = tl.constexpr(1 << 30)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@launched
@triton.jit
def table_kernel(
    mask, table, rows, keys, blocks, heads, mask_batch, mask_head, mask_row, mask_key, smallest,
    ADDITIVE: tl.constexpr, GRAIN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Tiles (B, H, row blocks, key blocks + 1) of a mask (B, H, rows, keys), in int8.

    0 is hidden, 1 partly seen, 2 seen with nothing to add. The last column says whether no tile of
    these rows may be left out: a row whose keys are all hidden by the same finite number sees them
    all. What libraries add to hide a key is the smallest number of the dtype, or -inf.
    """
    row_blocks = tl.cdiv(rows, GRAIN)
    block, outer = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    row = block * GRAIN + tl.arange(0, GRAIN)
    mask += (outer // heads).to(tl.int64) * mask_batch + (outer % heads).to(tl.int64) * mask_head
    mask += row.to(tl.int64)[:, None] * mask_row
    table += tl.program_id(0).to(tl.int64) * (blocks + 1)
    alive, finite = tl.zeros((GRAIN,), tl.int32), tl.zeros((GRAIN,), tl.int32)
    for start in range(0, keys, STEP):
        key = start + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (key < keys)[None, :]
        value = tl.load(mask + key.to(tl.int64)[None, :] * mask_key, mask=inside, other=0)
        if ADDITIVE:
            value = value.to(tl.float32)
            seen = inside & ((value < smallest / 2) == 0)  # nan counts
            free = value == 0
            alive = tl.maximum(alive, tl.max((inside & (value > smallest / 4)).to(tl.int32), 1))
            finite |= tl.max((inside & (value > float("-inf"))).to(tl.int32), 1)
        else:
            seen = inside & (value != 0)
            free = seen
        free = (free | (row >= rows)[:, None]) & (key < keys)[None, :]
        some = tl.max(tl.reshape(tl.max(seen.to(tl.int32), 0), (STEP // GRAIN, GRAIN)), 1)
        every = tl.min(tl.reshape(tl.min(free.to(tl.int32), 0), (STEP // GRAIN, GRAIN)), 1)
        place = start // GRAIN + tl.arange(0, STEP // GRAIN)
        tl.store(table + place, (some + every).to(tl.int8), mask=place < blocks)
    tl.store(table + blocks, tl.max(finite * (1 - alive), 0).to(tl.int8))


@triton.jit
def _of_table(
    table, row_blocks, key_blocks, start, count,
    BY_KEY: tl.constexpr, FLAGS: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
    GRAIN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``span`` of a mask."""
    this = start // GRAIN + tl.arange(0, COUNT // GRAIN)[:, None]
    first, end, free, free_end = FAR, 0, FAR, FAR
    for begin in range(0, tl.cdiv(count, GRAIN), CHUNK):
        other = begin + tl.arange(0, CHUNK)[None, :]
        inside = other < tl.cdiv(count, GRAIN)
        # a mask may have one row for all, and the last tile may reach beyond the end
        if BY_KEY:
            row, key = tl.minimum(other, row_blocks - 1), tl.minimum(this, key_blocks - 1)
        else:
            row, key = tl.minimum(this, row_blocks - 1), tl.minimum(other, key_blocks - 1)
        line = table + row * (key_blocks + 1)
        code = tl.load(line + key, mask=inside, other=0).to(tl.int32)
        some, every = tl.max(code, 0), tl.min(code, 0)
        if FLAGS:
            flags = tl.load(line + key_blocks + tl.zeros_like(key), mask=inside, other=0)
            some = tl.maximum(some, tl.max(flags.to(tl.int32), 0))
        if BY_KEY:  # rows beyond the end do no harm; keys would be seen
            every = tl.where(begin + tl.arange(0, CHUNK) < tl.cdiv(count, GRAIN), every, 2)
        some = tl.max(tl.reshape(some, (CHUNK * GRAIN // TILE, TILE // GRAIN)), 1) > 0
        every = tl.min(tl.reshape(every, (CHUNK * GRAIN // TILE, TILE // GRAIN)), 1) == 2
        place = begin * GRAIN // TILE + tl.arange(0, CHUNK * GRAIN // TILE)
        first = tl.minimum(first, tl.min(tl.where(some, place, FAR)))
        end = tl.maximum(end, tl.max(tl.where(some, place + 1, 0)))
        free = tl.minimum(free, tl.min(tl.where(every, place, FAR)))
        after = (every == 0) & (place > free)
        free_end = tl.minimum(free_end, tl.min(tl.where(after, place, FAR)))
    return first, end, free, free_end


@triton.jit
def span(
    mask, table, row_blocks, key_blocks, start, time, keys, window, mask_row,
    MODE: tl.constexpr, BY_KEY: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
    GRAIN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Which tiles COUNT positions (or keys, BY_KEY) from ``start`` on must visit.

    Returns:
        The first tile of keys (or positions), the first and the end of those where all is seen,
        and the end. Between the second and the third no score is hidden or changed.
    """
    if MODE == "causal":
        if BY_KEY:
            first, end = start // TILE, tl.cdiv(tl.minimum(time, start + COUNT + window - 1), TILE)
            free, free_end = tl.cdiv(start + COUNT - 1, TILE), (start + window) // TILE
        else:
            first = tl.maximum(0, start - window + 1) // TILE
            end = tl.cdiv(tl.minimum(time, start + COUNT), TILE)
            free = tl.cdiv(tl.maximum(0, start + COUNT - window), TILE)
            free_end = (start + 1) // TILE
    elif MODE == "none":
        first, free = 0, 0
        if BY_KEY:
            end = tl.cdiv(time, TILE)
            free_end = end
        else:
            end, free_end = tl.cdiv(keys, TILE), keys // TILE
    elif MODE == "samples":
        if BY_KEY:  # the table has the last position that sees each key
            last = tl.load(table + tl.minimum(start + COUNT, keys) - 1)
            first, end = start // TILE, tl.cdiv(last + 1, TILE)
            free, free_end = tl.cdiv(start + COUNT - 1, TILE), (tl.load(table + start) + 1) // TILE
        else:  # the mask has the first key that each position sees
            last = tl.minimum(start + COUNT, time) - 1
            first = tl.load(mask + start.to(tl.int64) * mask_row) // TILE
            end = tl.cdiv(last + 1, TILE)
            free = tl.cdiv(tl.load(mask + last.to(tl.int64) * mask_row), TILE)
            free_end = (start + 1) // TILE
    elif BY_KEY:
        first, end, free, free_end = _of_table(
            table, row_blocks, key_blocks, start, time,
            BY_KEY, MODE == "additive", COUNT, TILE, GRAIN, CHUNK,
        )  # fmt: skip
    else:
        first, end, free, free_end = _of_table(
            table, row_blocks, key_blocks, start, keys,
            BY_KEY, MODE == "additive", COUNT, TILE, GRAIN, CHUNK,
        )  # fmt: skip
    free = tl.minimum(free, end)
    return tl.minimum(first, end), free, tl.maximum(tl.minimum(free_end, end), free), end


@triton.jit
def capped(scores, cap, CAPPED: tl.constexpr):
    """``cap * tanh(scores / cap)``, scores and cap in base 2, if CAPPED."""
    if CAPPED:
        return cap * (2 * tl.sigmoid(2 * (scores / cap)) - 1)
    return scores


@triton.jit
def hide(
    scores, mask, row, key, rows, columns, time, keys, mask_row, mask_key, window,
    MODE: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 with the mask applied.

    They are of the positions ``row + rows`` and the keys ``key + columns``: (n, 1) and (1, n), or
    BY_KEY the other way round.
    """
    if MODE == "causal":
        distance = row - key + (rows - columns)
        return tl.where((distance >= 0) & (distance < window), scores, float("-inf"))
    if MODE == "samples":
        # beyond the last position nothing is seen
        place = mask + row.to(tl.int64) * mask_row + rows * mask_row
        first = tl.load(place, mask=rows < time - row, other=FAR)
        seen = (key + columns >= first) & (row - key + (rows - columns) >= 0)
        return tl.where(seen, scores, float("-inf"))
    inside = (rows < time - row) & (columns < keys - key)
    if MODE == "none":
        return tl.where(inside, scores, float("-inf"))
    mask += row.to(tl.int64) * mask_row + key.to(tl.int64) * mask_key
    place = mask + rows * mask_row + columns * mask_key
    if MODE == "boolean":
        seen = tl.load(place, mask=inside, other=0)
        if BY_KEY:  # on AMD's cards, Triton 3.9 cannot make operands of products from single bits
            return scores + tl.log2(seen.to(tl.float32))  # 0 or -inf
        return tl.where(seen != 0, scores, float("-inf"))
    bias = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
    # the smallest number stays one in base 2: where it hides all keys, they are equal
    low = (bias * LOG2E == float("-inf")) & (bias > float("-inf"))
    return scores + tl.where(low, LOWEST, bias * LOG2E)


@triton.jit
def positions_of(time, heads, share, M: tl.constexpr):
    """A program's first position, its sample and head in one number, sample, head and group."""
    blocks = tl.cdiv(time, M)
    row, outer = tl.program_id(0) % blocks * M, tl.program_id(0) // blocks
    head = outer % heads
    sample, group = (outer // heads).to(tl.int64), (head // share).to(tl.int64)
    return row, outer, sample, head.to(tl.int64), group


@triton.jit
def rows_of(
    ptr, start, rows, columns, stride, count, WIDTH: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """A tile of rows of a matrix whose columns are adjacent, zero outside."""
    inside = (rows < count - start)[:, None]
    if WIDTH != PADDED:
        inside &= (columns < WIDTH)[None, :]
    ptr += start.to(tl.int64) * stride
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, tile, start, rows, columns, stride, count, WIDTH: tl.constexpr):
    """Write what ``rows_of`` reads, in the dtype of ``ptr``."""
    inside = (rows < count - start)[:, None] & (columns < WIDTH)[None, :]
    place = ptr + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    tl.store(place, tile.to(ptr.dtype.element_ty), mask=inside)
