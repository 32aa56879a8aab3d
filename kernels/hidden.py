"""Log-probabilities from hidden states [N, H] and a head's weight [V, H], and their gradients.

z = softcap(hidden . weight + bias), in fp32, lives for one tile of [BLOCK_N, BLOCK_V]. The target y
of a row is a sampled token, so its logit z_y, known from one dot product, is a safe reference for
the exponentials of the others, and no maximum has to be found first:

    a_v = (z_v - z_y) * scale - shift,  scale = log2(e) / temperature,  shift = 0
    P_v = 2^a_v  (P_y = 0),   S = sum_v P_v,   d = shift * ln 2 + log S   (log-odds against y)
    log_prob = -softplus(d),   q = 1 - p_y = sigmoid(d),   p_v = P_v * q / S

Tensor cores truncate their sums, so that all logits of a product are a little too close to zero.
The final z_y is therefore that of the product, like the other logits: d += (base - z_y) * scale *
ln 2, where base is the z_y of the dot product, to which the exponentials stay relative.

A tile in which a_v exceeds SHIFT_LIMIT, as with a target less likely than e^-44, has a shift of its
own; tiles with a shift that differs from the row's are corrected at the end. The gradient with
respect to a row's logits is one factor times P, with a number of its own at the target:

    d loss / d z_v = -(g * q / S / temperature) * P_v,   d loss / d z_y = g * q / temperature
    d loss / d hidden = diag(factor) P weight + diag(d loss / d z_y) weight[y]
    d loss / d weight = P^T diag(factor) hidden + the same for the rows of each target

Both products can therefore take P as it was stored. The target's number is as large as all others
of its row together, so it stays out of P, which may have 16 bits, and is added in fp32. Rows are
processed in an order that puts the live ones first (`count_ptr`); programs beyond them have nothing
to do.
"""

import triton
import triton.language as tl

from .common import LN_2, SHIFT_LIMIT, rounded_product, soft_cap, sum_halves, sum_pairs, two_sum
from .logits import minus_softplus


@triton.jit
def capped(z, softcap):
    """Return softcap(z) and its derivative; z and 1.0 without a soft cap."""
    derivative = 1.0
    if softcap is not None:
        z, derivative = soft_cap(z, softcap)
    return z, derivative


@triton.jit
def shifted(a, top):
    """Return a shift that keeps exponentials of at most 2^top finite, and 2^(a - shift)."""
    shift = tl.where(top > SHIFT_LIMIT, top, 0.0)
    return shift, tl.exp2(a - shift)


@triton.jit
def times_log2(e, exponent):
    """Return e * log2(e) for e = 2^exponent, 0 where e is 0."""
    return tl.where(e > 0, e * exponent, 0.0)


@triton.jit
def weighed(a, y, cols, derivative, constant, slope):
    """Return exp2(a) * (constant + slope * a) * derivative, 0 at the targets.

    constant is None for a constant of 1 and a slope of 0.
    """
    e = tl.exp2(a)
    if constant is not None:
        e = tl.where(e > 0, e * (constant[:, None] + slope[:, None] * a), 0.0)
    return tl.where(cols[None, :] == y[:, None], 0.0, e * derivative)


@triton.jit
def target_logits_kernel(
    # inputs: hidden [N, H], weight [V, H]; bias [V], low-rank part of z [N] and live [N] or None
    hidden_ptr, weight_ptr, bias_ptr, lora_ptr, targets_ptr, live_ptr,
    # output [N]
    target_logits_ptr,
    # shapes and strides
    H, V, stride_hn, stride_wv,
    softcap,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    live = True
    if live_ptr is not None:
        live = tl.load(live_ptr + row) != 0
    z = 0.0
    if live:
        target = tl.load(targets_ptr + row).to(tl.int64)
        known = (target >= 0) & (target < V)
        cols = tl.arange(0, BLOCK_H)
        total = tl.zeros([BLOCK_H], tl.float32)
        for start in range(0, H, BLOCK_H):
            at = start + cols
            x = tl.load(hidden_ptr + row * stride_hn + at, mask=at < H, other=0.0)
            w = tl.load(weight_ptr + target * stride_wv + at, mask=known & (at < H), other=0.0)
            total += x.to(tl.float32) * w.to(tl.float32)
        z = tl.sum(total, axis=0)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + target, mask=known, other=0.0).to(tl.float32)
        if lora_ptr is not None:
            z += tl.load(lora_ptr + row)
        z, _ = capped(z, softcap)
        # a target outside the vocabulary must not train silently
        z = tl.where(known, z, float("nan"))
    tl.store(target_logits_ptr + row, z)


@triton.jit
def fold_kernel(
    # inputs: a tile of logits [n, C], contiguous, from row first_row and column first_col on;
    # [N] targets, base; live or None
    z_ptr, targets_ptr, base_ptr, live_ptr,
    # outputs: exponentials [N, kept]; [J, N] sums, log_sum is None unless requested; [N] the
    # target's logit
    e_ptr, shift_ptr, sum_ptr, log_sum_ptr, target_logit_ptr,
    # shapes and strides
    C, N, kept, stride_en, first_row, first_col,
    # options
    scale, softcap,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Fold a tile of logits, with one program per row and block of columns, which it reads once."""
    blocks = tl.cdiv(C, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    z_ptr += row * C
    row += first_row
    at = block * BLOCK + tl.arange(0, BLOCK)  # in the tile
    inside = at < C
    live = True
    if live_ptr is not None:
        live = tl.load(live_ptr + row) != 0
    one = tl.zeros([1], tl.int32)
    shift = tl.zeros([1], tl.float32)
    total = tl.zeros([1], tl.float32)
    log_total = tl.zeros([1], tl.float32)
    e = tl.zeros([BLOCK], e_ptr.dtype.element_ty)
    if live:
        y = tl.load(targets_ptr + row) - first_col
        y = tl.where((y >= 0) & (y < C), y, -1).to(tl.int32)
        base = tl.load(base_ptr + row)
        z, derivative = capped(tl.load(z_ptr + at, mask=inside, other=0.0), softcap)
        if (y >= block * BLOCK) & (y < block * BLOCK + BLOCK):
            z_y, _ = capped(tl.load(z_ptr + y), softcap)
            tl.store(target_logit_ptr + row, z_y)
        a = tl.where(inside & (at != y), (z - base) * scale, float("-inf"))
        row_shift, power = shifted(a, tl.max(a, axis=0))
        shift += row_shift
        total += sum_pairs(power)
        if log_sum_ptr is not None:
            log_total += sum_pairs(times_log2(power, a - row_shift))
        e = (power * derivative).to(e_ptr.dtype.element_ty)
    out = (first_col // BLOCK + block).to(tl.int64) * N + row + one
    tl.store(shift_ptr + out, shift)
    tl.store(sum_ptr + out, total)
    if log_sum_ptr is not None:
        tl.store(log_sum_ptr + out, log_total)
    # stored even if nothing is kept: another layout would add in another order
    tl.store(e_ptr + row * stride_en + first_col + at, e, mask=inside & (first_col + at < kept))


@triton.jit
def weigh_kernel(
    # inputs: a tile of logits [n, C], contiguous, from row first_row and column first_col on; the
    # rest [N]; constant, slope, live may be None
    z_ptr, targets_ptr, base_ptr, shift_ptr, constant_ptr, slope_ptr, live_ptr,
    # output [N, ...], whose first column is the vocabulary's first_out
    out_ptr,
    # shapes and strides
    C, stride_on, first_row, first_col, first_out,
    # options
    scale, softcap,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn logits into what the row's factor multiplies, one program per row and block."""
    blocks = tl.cdiv(C, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], in the tile
    z_ptr += row * C
    row += first_row
    here = row + tl.zeros([1], tl.int32)
    live = True
    if live_ptr is not None:
        live = tl.load(live_ptr + row) != 0
    out = tl.zeros([1, BLOCK], out_ptr.dtype.element_ty)
    if live:
        z = tl.load(z_ptr + at, mask=at < C, other=0.0)[None, :]
        base, shift = tl.load(base_ptr + here), tl.load(shift_ptr + here)
        z, derivative = capped(z, softcap)
        a = (z - base[:, None]) * scale - shift[:, None]
        constant = None
        slope = None
        if constant_ptr is not None:
            constant = tl.load(constant_ptr + here)
            slope = tl.load(slope_ptr + here)
        y = tl.load(targets_ptr + here) - first_col
        y = tl.where((y >= 0) & (y < C), y, -1).to(tl.int32)
        out = weighed(a, y, at, derivative, constant, slope)
        out = out.to(out_ptr.dtype.element_ty)
    to = out_ptr + row * stride_on + (first_col - first_out) + at[None, :]
    tl.store(to, out, mask=(at < C)[None, :])


# Rows


@triton.jit
def odds(base, target_logit, shift, row_sum, scale):
    """Return log-odds d against the target with their rounding error, and exp(-abs(d))."""
    moved = tl.fma(base - target_logit, scale, shift)
    d, error = two_sum(rounded_product(moved, LN_2), tl.log(row_sum))
    return d, error, tl.exp(-tl.abs(d))


@triton.jit
def row_sums_kernel(
    # inputs: sums [J, N], log_sum is None unless requested; [N]
    shift_ptr, sum_ptr, log_sum_ptr, base_ptr, target_logit_ptr,
    # outputs [N]
    log_probs_ptr, row_shift_ptr, row_sum_ptr, entropy_ptr,
    J, N, scale,
    BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum whole rows, in an order that no other row changes, and compute what follows from it."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    places = tl.arange(0, BLOCK_J)
    shift = tl.zeros([BLOCK_J, BLOCK_N], tl.float32)
    for start in range(0, J, BLOCK_J):
        at = (start + places).to(tl.int64)[:, None] * N + rows[None, :]
        known = (start + places < J)[:, None] & inside[None, :]
        shift = tl.maximum(shift, tl.load(shift_ptr + at, mask=known, other=0.0))
    shift = tl.max(shift, axis=0)
    sums = tl.zeros([BLOCK_J, BLOCK_N], tl.float32)
    log_sums = tl.zeros([BLOCK_J, BLOCK_N], tl.float32)
    for start in range(0, J, BLOCK_J):
        at = (start + places).to(tl.int64)[:, None] * N + rows[None, :]
        known = (start + places < J)[:, None] & inside[None, :]
        moved = tl.load(shift_ptr + at, mask=known, other=0.0) - shift[None, :]
        shrink = tl.exp2(moved)
        part = tl.load(sum_ptr + at, mask=known, other=0.0)
        sums = tl.fma(shrink, part, sums)
        if log_sum_ptr is not None:
            log_part = tl.load(log_sum_ptr + at, mask=known, other=0.0)
            log_sums = tl.fma(shrink, tl.fma(part, moved, log_part), log_sums)
    row_sum = sum_halves(sums)
    base = tl.load(base_ptr + rows, mask=inside, other=0.0)
    target_logit = tl.load(target_logit_ptr + rows, mask=inside, other=0.0)
    d, error, w = odds(base, target_logit, shift, row_sum, scale)
    log_prob = minus_softplus(d, error, w)
    tl.store(log_probs_ptr + rows, log_prob, mask=inside)
    tl.store(row_shift_ptr + rows, shift, mask=inside)
    tl.store(row_sum_ptr + rows, row_sum, mask=inside)
    if log_sum_ptr is not None:
        log_q = minus_softplus(-d, -error, w)
        mean_log = rounded_product(sum_halves(log_sums) / row_sum, LN_2)
        others = tl.log(row_sum) - mean_log - log_q
        entropy = times_exp(log_q, others) - times_exp(log_prob, log_prob)
        tl.store(entropy_ptr + rows, entropy, mask=inside)


@triton.jit
def times_exp(log_p, x):
    """Return exp(log_p) * x, 0 where log_p is -inf."""
    return tl.where(log_p == float("-inf"), 0.0, rounded_product(tl.exp(log_p), x))


@triton.jit
def row_grads_kernel(
    # inputs [N]: what the forward kept, and d loss / d log_prob; entropy and d loss / d entropy, or
    # None for both
    base_ptr, target_logit_ptr, shift_ptr, row_sum_ptr, entropy_ptr, g_ptr, h_ptr,
    # non-zero where a row has a gradient [N]; positions of the processed rows [n], or None
    live_ptr, index_ptr,
    # outputs [n]: `RowGrads`; constant and slope are None without h
    factor_ptr, at_target_ptr, row_base_ptr, row_shift_ptr, constant_ptr, slope_ptr,
    n, temperature, scale, softcap,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute d loss / d logits of each row."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    at = rows
    if index_ptr is not None:
        at = tl.load(index_ptr + rows, mask=inside, other=0)
    live = tl.load(live_ptr + at, mask=inside, other=0) != 0
    base = tl.load(base_ptr + at, mask=inside, other=0.0)
    target_logit = tl.load(target_logit_ptr + at, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + at, mask=inside, other=0.0)
    row_sum = tl.load(row_sum_ptr + at, mask=inside, other=0.0)
    g = tl.load(g_ptr + at, mask=inside, other=0.0)
    d, error, w = odds(base, target_logit, shift, row_sum, scale)
    q = tl.where(d >= 0, 1.0, w) / (1.0 + w)
    q = tl.where(d == d, q, d)
    rho = tl.where(row_sum == 0, 0.0, q / row_sum)
    at_target = g * q / temperature
    if h_ptr is None:
        factor = -g * rho / temperature
    else:
        # -p_v * (g + h * (log p_v + entropy)), with log p_v = a_v * ln 2 + log q - log(row_sum)
        h = tl.load(h_ptr + at, mask=inside, other=0.0)
        entropy = tl.load(entropy_ptr + at, mask=inside, other=0.0)
        log_p = minus_softplus(d, error, w)
        log_q = minus_softplus(-d, -error, w)
        log_rho = tl.where(row_sum == 0, 0.0, log_q - tl.log(row_sum))
        factor = g * 0.0 - 1.0 / temperature
        tl.store(constant_ptr + rows, rho * (g + h * (log_rho + entropy)), mask=inside)
        tl.store(slope_ptr + rows, rho * h * LN_2, mask=inside)
        at_target -= h * times_exp(log_p, log_p + entropy) / temperature
    if softcap is not None:
        capped_target = target_logit / softcap
        at_target *= 1.0 - capped_target * capped_target
    tl.store(factor_ptr + rows, tl.where(live, factor, 0.0), mask=inside)
    tl.store(at_target_ptr + rows, tl.where(live, at_target, 0.0), mask=inside)
    tl.store(row_base_ptr + rows, base, mask=inside)
    tl.store(row_shift_ptr + rows, shift, mask=inside)


@triton.jit
def scale_rows_kernel(
    # [n, H] in fp32, changed in place
    out_ptr,
    # inputs: weight [V, H]; [n]
    weight_ptr, factor_ptr, at_target_ptr, targets_ptr,
    H, V, stride_on, stride_wv,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Set out[i] to factor[i] * out[i] + at_target[i] * weight[y_i], 0 where both are 0."""
    blocks = tl.cdiv(H, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr + row)
    at_target = tl.load(at_target_ptr + row)
    y = tl.load(targets_ptr + row).to(tl.int64)
    at = out_ptr + row * stride_on + h
    total = tl.zeros([BLOCK], tl.float32)
    if factor != 0:  # otherwise, the row may be uninitialised
        total = factor * tl.load(at, mask=h < H, other=0.0)
    if (y >= 0) & (y < V) & (at_target != 0):  # otherwise, another rank has it
        w = tl.load(weight_ptr + y * stride_wv + h, mask=h < H, other=0.0)
        total += at_target * w.to(tl.float32)
    tl.store(at, total, mask=h < H)


@triton.jit
def rescale_kernel(
    # kept exponentials [n, columns], the shift of each tile [J, n] and of each row [n]
    e_ptr, shift_ptr, row_shift_ptr,
    n, columns, stride_en,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bring a row's tiles to its shift, one program per row; they nearly always have it."""
    row = tl.program_id(0).to(tl.int64)
    row_shift = tl.load(row_shift_ptr + row)
    if row_shift > 0:
        shift_ptr += row
        for start in range(0, columns, TILE):
            shrink = tl.exp2(tl.load(shift_ptr) - row_shift)
            shift_ptr += n
            if shrink < 1:
                for first in range(start, tl.minimum(start + TILE, columns), BLOCK):
                    cols = first + tl.arange(0, BLOCK)
                    inside = cols < tl.minimum(start + TILE, columns)
                    at = e_ptr + row * stride_en + cols
                    e = tl.load(at, mask=inside, other=0.0).to(tl.float32) * shrink
                    tl.store(at, e.to(e_ptr.dtype.element_ty), mask=inside)


# Products


@triton.jit
def swizzled(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return this program's tile; GROUP rows of tiles at a time let neighbours share operands."""
    per_group = GROUP * tiles_n
    first = pid // per_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit
def product(
    a_ptr, b_ptr, rows_a, rows_b, known_a, known_b, K, stride_ak, stride_bk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute sum_k a[m, k] * b[n, k] in fp32; rows_* are offsets, known_* masks."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        at = (start + k).to(tl.int64)
        a = tl.load(
            a_ptr + rows_a[:, None] + at[None, :] * stride_ak,
            mask=known_a[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + rows_b[None, :] + at[:, None] * stride_bk,
            mask=known_b[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def logits_tile(
    x_ptr, weight_ptr, bias_ptr, rows, cols, n, C, H, stride_xn, stride_wv,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Compute [BLOCK_N, BLOCK_V] logits in fp32."""
    z = product(
        x_ptr, weight_ptr, rows.to(tl.int64) * stride_xn, cols.to(tl.int64) * stride_wv,
        rows < n, cols < C, H, 1, 1, BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def store_target_logits(target_logit_ptr, z, rows, cols, y, softcap):
    """Store the targets' logits in a tile z that is not capped yet; few tiles have any."""
    has_target = (y >= tl.min(cols, axis=0)) & (y <= tl.max(cols, axis=0))
    if tl.max(has_target.to(tl.int32), axis=0) > 0:
        z_y = tl.sum(tl.where(cols[None, :] == y[:, None], z, 0.0), axis=1)
        z_y, _ = capped(z_y, softcap)
        tl.store(target_logit_ptr + rows, z_y, mask=has_target)


@triton.jit
def fold_tile(
    # a tile of logits, in fp32, with its rows and columns
    z, rows, cols, n, C, entry,
    targets_ptr, base_ptr, shift_ptr, sum_ptr, log_sum_ptr, target_logit_ptr,
    scale, softcap,
):  # fmt: skip
    """Return the exponentials of a tile; store their sums as this entry of [J, n]."""
    inside = rows < n
    y = tl.load(targets_ptr + rows, mask=inside, other=-1)
    y = tl.where((y >= 0) & (y < C), y, -1).to(tl.int32)
    base = tl.load(base_ptr + rows, mask=inside, other=0.0)
    # done before the tile is capped, whose derivative would take registers meanwhile
    store_target_logits(target_logit_ptr, z, rows, cols, y, softcap)
    z, derivative = capped(z, softcap)
    a = (z - base[:, None]) * scale
    a = tl.where((cols < C)[None, :] & (cols[None, :] != y[:, None]), a, float("-inf"))
    shift, e = shifted(a, tl.max(a, axis=1, keep_dims=True))
    out = entry.to(tl.int64) * n + rows
    tl.store(shift_ptr + out[:, None], shift, mask=inside[:, None])
    tl.store(sum_ptr + out, tl.sum(e, axis=1), mask=inside)
    if log_sum_ptr is not None:
        tl.store(log_sum_ptr + out, tl.sum(times_log2(e, a - shift), axis=1), mask=inside)
    return e * derivative


@triton.jit
def weigh_tile(
    z, rows, cols, n, C, first_col,
    targets_ptr, base_ptr, shift_ptr, constant_ptr, slope_ptr,
    scale, softcap,
):  # fmt: skip
    """Turn a tile of logits into what the rows' factors multiply; cols count from first_col."""
    inside = rows < n
    y = tl.load(targets_ptr + rows, mask=inside, other=-1) - first_col
    y = tl.where((y >= 0) & (y < C), y, -1).to(tl.int32)
    base = tl.load(base_ptr + rows, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + rows, mask=inside, other=0.0)
    constant = None
    slope = None
    if constant_ptr is not None:
        constant = tl.load(constant_ptr + rows, mask=inside, other=0.0)
        slope = tl.load(slope_ptr + rows, mask=inside, other=0.0)
    z, derivative = capped(z, softcap)
    a = (z - base[:, None]) * scale - shift[:, None]
    return weighed(a, y, cols, derivative, constant, slope)


@triton.jit
def hidden_fwd_kernel(
    # inputs: x [n, H], weight [C, H], bias [C] or None; targets, base [n]; keep [n] or None
    x_ptr, weight_ptr, bias_ptr, targets_ptr, base_ptr, keep_ptr, count_ptr,
    # outputs: exponentials [n, kept]; [J, n] sums, log_sum is None unless requested; [n] the
    # target's logit
    e_ptr, shift_ptr, sum_ptr, log_sum_ptr, target_logit_ptr,
    # shapes and strides
    n, C, H, kept, stride_xn, stride_wv, stride_en,
    # options
    scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute the product, exponentials and their sums, one program per tile."""
    tiles_v = tl.cdiv(C, BLOCK_V)
    tile_v, tile_n = swizzled(tl.program_id(0), tiles_v, tl.cdiv(n, BLOCK_N), GROUP)
    count = n
    if count_ptr is not None:
        count = tl.load(count_ptr)
    if tile_n * BLOCK_N < count:
        rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        cols = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        z = logits_tile(
            x_ptr, weight_ptr, bias_ptr, rows, cols, n, C, H, stride_xn, stride_wv,
            BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        e = fold_tile(
            z, rows, cols, n, C, tile_v, targets_ptr, base_ptr,
            shift_ptr, sum_ptr, log_sum_ptr, target_logit_ptr, scale, softcap,
        )  # fmt: skip
        wanted = rows < n
        if keep_ptr is not None:
            wanted = wanted & (tl.load(keep_ptr + rows, mask=wanted, other=0) != 0)
        at = e_ptr + rows.to(tl.int64)[:, None] * stride_en + cols[None, :]
        e = e.to(e_ptr.dtype.element_ty)
        tl.store(at, e, mask=wanted[:, None] & (cols < kept)[None, :])


@triton.jit
def hidden_weigh_kernel(
    # inputs: x [n, H], weight [C, H], bias [C] or None; the rest [n]; constant, slope may be None
    x_ptr, weight_ptr, bias_ptr, targets_ptr, base_ptr, shift_ptr, constant_ptr, slope_ptr,
    count_ptr,
    # output [n, C]
    out_ptr,
    # shapes and strides
    n, C, H, first_col, stride_xn, stride_wv, stride_on,
    # options
    scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Recompute the logits, and turn them into what the row's factor multiplies."""
    tile_v, tile_n = swizzled(tl.program_id(0), tl.cdiv(C, BLOCK_V), tl.cdiv(n, BLOCK_N), GROUP)
    count = tl.load(count_ptr)
    if tile_n * BLOCK_N < count:
        rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        cols = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        z = logits_tile(
            x_ptr, weight_ptr, bias_ptr, rows, cols, n, C, H, stride_xn, stride_wv,
            BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        out = weigh_tile(
            z, rows, cols, n, C, first_col, targets_ptr, base_ptr, shift_ptr, constant_ptr,
            slope_ptr, scale, softcap,
        )  # fmt: skip
        at = out_ptr + rows.to(tl.int64)[:, None] * stride_on + cols[None, :]
        out = out.to(out_ptr.dtype.element_ty)
        tl.store(at, out, mask=(rows < n)[:, None] & (cols < C)[None, :])


@triton.jit
def dhidden_kernel(
    # inputs: e [*, C] with the places of its live rows [n] or None; weight [C, H]
    e_ptr, rows_ptr, count_ptr, weight_ptr,
    # output [n, H] in fp32
    out_ptr,
    # shapes and strides
    n, C, H, stride_en, stride_wv, stride_on,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute out[i] = (or +=) e[rows[i]] weight."""
    tile_n, tile_h = swizzled(tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(H, BLOCK_H), GROUP)
    count = tl.load(count_ptr)
    if tile_n * BLOCK_N < count:
        rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        cols = tile_h * BLOCK_H + tl.arange(0, BLOCK_H)
        places = rows
        if rows_ptr is not None:
            places = tl.load(rows_ptr + rows, mask=rows < count, other=0)
        acc = product(
            e_ptr, weight_ptr, places.to(tl.int64) * stride_en, cols,
            rows < count, cols < H, C, 1, stride_wv, BLOCK_N, BLOCK_H, BLOCK_V,
        )  # fmt: skip
        at = out_ptr + rows.to(tl.int64)[:, None] * stride_on + cols[None, :]
        inside = (rows < count)[:, None] & (cols < H)[None, :]
        if ADD:
            acc += tl.load(at, mask=inside, other=0.0)
        tl.store(at, acc, mask=inside)


@triton.jit
def dweight_kernel(
    # inputs: e [*, C] with the places of its live rows [n] or None; x [n, H], already weighted
    e_ptr, rows_ptr, count_ptr, x_ptr,
    # output [C, H]
    out_ptr,
    # shapes and strides
    C, H, stride_en, stride_xn, stride_ov,
    ADD: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute out = (or +=) sum over live rows i of e[rows[i]]^T x[i]."""
    tile_v, tile_h = swizzled(tl.program_id(0), tl.cdiv(C, BLOCK_V), tl.cdiv(H, BLOCK_H), GROUP)
    count = tl.load(count_ptr)
    v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    h = tile_h * BLOCK_H + tl.arange(0, BLOCK_H)
    at = out_ptr + v.to(tl.int64)[:, None] * stride_ov + h[None, :]
    in_out = (v < C)[:, None] & (h < H)[None, :]
    acc = tl.zeros([BLOCK_V, BLOCK_H], tl.float32)
    if ADD:
        acc = tl.load(at, mask=in_out, other=0.0).to(tl.float32)
    for start in range(0, count, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        inside = rows < count
        places = rows
        if rows_ptr is not None:
            places = tl.load(rows_ptr + rows, mask=inside, other=0)
        e = tl.load(
            e_ptr + places.to(tl.int64)[None, :] * stride_en + v[:, None],
            mask=inside[None, :] & (v < C)[:, None], other=0.0,
        )  # fmt: skip
        x = tl.load(
            x_ptr + rows.to(tl.int64)[:, None] * stride_xn + h[None, :],
            mask=inside[:, None] & (h < H)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(e, x, acc, input_precision="ieee")
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=in_out)


@triton.jit
def column_sums_kernel(
    # inputs: e [*, C] with the places of its live rows [n] or None; factor [n]
    e_ptr, rows_ptr, count_ptr, factor_ptr,
    # output [C]
    out_ptr,
    # shapes and strides
    n, C, stride_en, stride_o,
    ADD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Compute out = (or +=) sum over live rows i of factor[i] * e[rows[i]], in fp32."""
    v = tl.program_id(0) * COLS + tl.arange(0, COLS)
    count = n
    if count_ptr is not None:
        count = tl.load(count_ptr)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        factor = tl.load(factor_ptr + rows, mask=rows < count, other=0.0)
        places = rows
        if rows_ptr is not None:
            places = tl.load(rows_ptr + rows, mask=rows < count, other=0)
        at = e_ptr + places.to(tl.int64)[:, None] * stride_en + v[None, :]
        # rows that were not kept may hold NaN
        e = tl.load(at, mask=(factor != 0)[:, None] & (v < C)[None, :], other=0.0)
        acc += factor[:, None] * e.to(tl.float32)
    total = tl.sum(acc, axis=0)
    out_ptr += v.to(tl.int64) * stride_o
    if ADD:
        total += tl.load(out_ptr, mask=v < C, other=0.0).to(tl.float32)
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=v < C)


@triton.jit
def add_targets_kernel(
    # inputs: x [n, H], at_target [n]; [n] sorted targets, their rows, and the end of the run of
    # equal targets that each one is in
    x_ptr, at_target_ptr, targets_ptr, order_ptr, ends_ptr,
    # output [V, H], added to
    out_ptr,
    # shapes and strides
    H, V, stride_xn, stride_ov,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Compute out[v] += sum of at_target[i] * x[i] over the rows i with target v.

    There is one program per position in the order; the first one of equal targets does the work.
    """
    blocks = tl.cdiv(H, COLS)
    first = tl.program_id(0) // blocks
    h = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    y = tl.load(targets_ptr + first).to(tl.int64)
    before = tl.load(targets_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64)
    if (y >= 0) & (y < V) & (before != y):
        acc = tl.zeros([ROWS, COLS], tl.float32)
        end = tl.load(ends_ptr + first).to(tl.int32)
        for start in range(first, end, ROWS):
            places = start + tl.arange(0, ROWS)
            rows = tl.load(order_ptr + places, mask=places < end, other=0).to(tl.int64)
            share = tl.load(at_target_ptr + rows, mask=places < end, other=0.0)
            # a dead row may hold NaN
            inside = (share != 0)[:, None] & (h < H)[None, :]
            x = tl.load(x_ptr + rows[:, None] * stride_xn + h[None, :], mask=inside, other=0.0)
            acc += share[:, None] * x.to(tl.float32)
        at = out_ptr + y * stride_ov + h
        total = tl.sum(acc, axis=0) + tl.load(at, mask=h < H, other=0.0).to(tl.float32)
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask=h < H)
