"""The products of `hidden.py` in bf16, on GPUs that copy boxes by themselves (TMA: sm_90, sm_100).

One program per multiprocessor goes through tiles of 128 x 256, in an order in which neighbours
share operands in the L2 cache; the copies of a tile's operands run ahead of its products.
Epilogues work on PART columns at a time, so that their results fit into registers beside the sums.
With a soft cap, whose derivative takes as many again, a tile has no more columns than that. A box
holds consecutive rows, so rows that count are not gathered: in the forward, they come first
(`count_ptr`), and the backward goes through a list of the blocks that contain a row with a gradient
(`blocks_ptr`). The other rows of these blocks are 0, both in the exponentials and in x.
"""

import triton
import triton.language as tl

from .hidden import fold_tile, swizzled, weigh_tile

PART = tl.constexpr(128)


@triton.jit
def live_blocks_kernel(
    # input: non-zero where a row has a gradient [n]
    live_ptr,
    # outputs: blocks with such a row, in their order, and one more entry; the number of blocks
    blocks_ptr, count_ptr,
    n,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """List the blocks that have a live row, in one program for all rows."""
    places, rows = tl.arange(0, BLOCKS), tl.arange(0, ROWS)
    count = 0
    for start in range(0, tl.cdiv(n, ROWS), BLOCKS):
        at = (start + places)[:, None] * ROWS + rows[None, :]
        live = tl.load(live_ptr + at, mask=at < n, other=0) != 0
        has_live = tl.max(live.to(tl.int32), axis=1)
        to = count + tl.cumsum(has_live, axis=0) - 1
        tl.store(blocks_ptr + to, start + places, mask=has_live != 0)
        count += tl.sum(has_live, axis=0)
    tl.store(blocks_ptr + count, 0)
    tl.store(count_ptr, count)


@triton.jit
def number(tiles_m, tiles_n):
    """Return the number of tiles, which fits into 32 bits: each has thousands of elements."""
    return (tiles_m.to(tl.int64) * tiles_n).to(tl.int32)


@triton.jit
def product_of_rows(
    a_desc, b_desc, row_a, row_b, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute sum_k a[m, k] * b[n, k] in fp32, [BLOCK_M, BLOCK_N]."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a_desc.load([row_a, k]), b_desc.load([row_b, k]).T, acc)
    return acc


@triton.jit
def part_of(x, index: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the PART columns of x from index * PART on; BLOCK_N is PART or twice that."""
    if BLOCK_N > PART:
        left, right = tl.split(tl.permute(tl.reshape(x, [BLOCK_M, 2, PART]), [0, 2, 1]))
        x = left if index == 0 else right
    return x


@triton.jit
def tma_fwd_kernel(
    # inputs: x [n, H], weight [C, H], bias [C] or None; targets, base [n]; keep [n] or None
    x_desc, weight_desc, bias_ptr, targets_ptr, base_ptr, keep_ptr, count_ptr,
    # outputs: exponentials [n, kept] or None; [J, n] sums, log_sum is None unless requested; [n]
    # the target's logit
    e_desc, shift_ptr, sum_ptr, log_sum_ptr, target_logit_ptr,
    n, C, H,
    scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Compute the product, exponentials and their sums."""
    count = tl.load(count_ptr)
    tiles_n, tiles_v = tl.cdiv(count, BLOCK_N), tl.cdiv(C, BLOCK_V)
    for tile in range(tl.program_id(0), number(tiles_n, tiles_v), PROGRAMS):
        tile_v, tile_n = swizzled(tile, tiles_v, tiles_n, GROUP)
        row, col = tile_n * BLOCK_N, tile_v * BLOCK_V
        z = product_of_rows(x_desc, weight_desc, row, col, H, BLOCK_N, BLOCK_V, BLOCK_H)
        for i in tl.static_range(BLOCK_V // PART):
            part = part_of(z, i, BLOCK_N, BLOCK_V)
            first = col + i * PART
            if first < C:
                rows, cols = row + tl.arange(0, BLOCK_N), first + tl.arange(0, PART)
                if bias_ptr is not None:
                    bias = tl.load(bias_ptr + cols, mask=cols < C, other=0.0)
                    part += bias.to(tl.float32)[None, :]
                e = fold_tile(
                    part, rows, cols, n, C, first // PART, targets_ptr, base_ptr,
                    shift_ptr, sum_ptr, log_sum_ptr, target_logit_ptr, scale, softcap,
                )  # fmt: skip
                if e_desc is not None:
                    wanted = rows < count
                    if keep_ptr is not None:
                        wanted = wanted & (tl.load(keep_ptr + rows, mask=wanted, other=0) != 0)
                    # a row without a gradient may hold NaN, and is multiplied by 0 later; the NaN
                    # of a row with one reaches all that it should through the row's factor
                    e = tl.where(wanted[:, None] & (e == e), e, 0.0)
                    e_desc.store([row, first], e.to(e_desc.dtype))


@triton.jit
def tma_weigh_kernel(
    # inputs: x [n, H], weight [C, H], bias [C] or None; the rest [n]; constant, slope may be None
    x_desc, weight_desc, bias_ptr, targets_ptr, base_ptr, shift_ptr, constant_ptr, slope_ptr,
    live_ptr, blocks_ptr, count_ptr,
    # output [n, C]
    out_desc,
    n, C, H, first_col,
    scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Recompute the logits of live blocks, and turn them into what the row's factor multiplies."""
    tiles_n, tiles_v = tl.load(count_ptr), tl.cdiv(C, BLOCK_V)
    for tile in range(tl.program_id(0), number(tiles_n, tiles_v), PROGRAMS):
        tile_v, tile_n = swizzled(tile, tiles_v, tiles_n, GROUP)
        row, col = tl.load(blocks_ptr + tile_n) * BLOCK_N, tile_v * BLOCK_V
        z = product_of_rows(x_desc, weight_desc, row, col, H, BLOCK_N, BLOCK_V, BLOCK_H)
        rows = row + tl.arange(0, BLOCK_N)
        live = tl.load(live_ptr + rows, mask=rows < n, other=0) != 0
        for i in tl.static_range(BLOCK_V // PART):
            part = part_of(z, i, BLOCK_N, BLOCK_V)
            first = col + i * PART
            cols = first + tl.arange(0, PART)
            if bias_ptr is not None:
                part += tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
            out = weigh_tile(
                part, rows, cols, n, C, first_col, targets_ptr, base_ptr, shift_ptr, constant_ptr,
                slope_ptr, scale, softcap,
            )  # fmt: skip
            out = tl.where(live[:, None], out, 0.0)
            out_desc.store([row, first], out.to(out_desc.dtype))


@triton.jit
def put(out_ptr, x, rows, cols, n, C, stride_out, ADD: tl.constexpr):
    """Store a tile of a gradient [n, C], or add it."""
    at = out_ptr + rows.to(tl.int64)[:, None] * stride_out + cols[None, :]
    inside = (rows < n)[:, None] & (cols < C)[None, :]
    if ADD:
        x += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tma_dhidden_kernel(
    # inputs: e [n, C], weight [C, H]; the blocks of rows to process
    e_desc, weight_desc, blocks_ptr, count_ptr,
    # output [n, H]
    out_ptr,
    n, C, H, stride_on,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Compute out = (or +=) e weight, in live blocks of BLOCK_N rows."""
    tiles_n, tiles_h = tl.load(count_ptr), tl.cdiv(H, BLOCK_H)
    for tile in range(tl.program_id(0), number(tiles_n, tiles_h), PROGRAMS):
        tile_n, tile_h = swizzled(tile, tiles_n, tiles_h, GROUP)
        row, col = tl.load(blocks_ptr + tile_n) * BLOCK_N, tile_h * BLOCK_H
        acc = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        for v in range(0, C, BLOCK_V):
            acc = tl.dot(e_desc.load([row, v]), weight_desc.load([v, col]), acc)
        rows, cols = row + tl.arange(0, BLOCK_N), col + tl.arange(0, PART)
        for i in tl.static_range(BLOCK_H // PART):
            part = part_of(acc, i, BLOCK_N, BLOCK_H)
            put(out_ptr, part, rows, cols + i * PART, n, H, stride_on, ADD)


@triton.jit
def tma_dweight_kernel(
    # inputs: e [n, C], x [n, H], already weighted; the blocks of rows to process
    e_desc, x_desc, blocks_ptr, count_ptr,
    # output [C, H]
    out_ptr,
    C, H, stride_ov,
    ADD: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Compute out = (or +=) e^T x, over live blocks of BLOCK_N rows."""
    count = tl.load(count_ptr)
    tiles_v, tiles_h = tl.cdiv(C, BLOCK_V), tl.cdiv(H, BLOCK_H)
    for tile in range(tl.program_id(0), number(tiles_v, tiles_h), PROGRAMS):
        tile_v, tile_h = swizzled(tile, tiles_v, tiles_h, GROUP)
        v, col = tile_v * BLOCK_V, tile_h * BLOCK_H
        acc = tl.zeros([BLOCK_V, BLOCK_H], tl.float32)
        # the list is read one entry ahead, so that no copy waits for its position
        row = tl.load(blocks_ptr) * BLOCK_N
        for i in range(0, count):
            e, x = e_desc.load([row, v]), x_desc.load([row, col])
            row = tl.load(blocks_ptr + i + 1) * BLOCK_N
            acc = tl.dot(e.T, x, acc)
        rows, cols = v + tl.arange(0, BLOCK_V), col + tl.arange(0, PART)
        for i in tl.static_range(BLOCK_H // PART):
            part = part_of(acc, i, BLOCK_V, BLOCK_H)
            put(out_ptr, part, rows, cols + i * PART, C, H, stride_ov, ADD)
