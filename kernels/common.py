"""Helpers shared by the kernels.

Letters: `N` rows (response tokens), `V` vocabulary, `B` sequences. A row of logits is walked in
blocks of [ROWS, COLS] elements: reductions run over ROWS, inside a thread, and only the last one
crosses threads.

The compiler chooses which thread has which elements. Its choice depends on the width of the loads,
and so on the alignment of rows and of the pointer, but must not change a bit of the results. Sums
that cross threads therefore use `sum_pairs`, and a product that is added to something uses `tl.fma`
or `rounded_product`.
"""

import triton
import triton.language as tl

from .. import constants

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOG_RATIO_CAP = tl.constexpr(constants.LOG_RATIO_CAP)
ESS_RATIO_CAP = tl.constexpr(constants.ESS_RATIO_CAP)
SHIFT_LIMIT = tl.constexpr(constants.SHIFT_LIMIT)


@triton.jit
def finite_or_zero(m):
    """Return a maximum that may be -inf as a reference point that can be subtracted."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def sum_pairs(x):
    """Sum a vector, neighbours first: a sum of two commutes, so that no layout changes it."""
    for _ in tl.static_range(11):  # enough for 4096 elements, the most there are
        if x.shape[0] > 2:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def sum_halves(x):
    """Sum the columns of [ROWS, COLS], again in one order for every layout."""
    for _ in tl.static_range(4):  # enough for 32 rows, the most there are
        if x.shape[0] > 2:
            x = tl.sum(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), axis=0)
    return tl.sum(x, axis=0)


@triton.jit
def rounded_product(a, b):
    """Return a * b, rounded even if a compiler could fuse it with an addition in one thread."""
    return tl.fma(a, b, 0.0)


@triton.jit
def log1p(w):
    """Return log(1 + w) for w >= 0, exact to rounding for small w (Kahan's correction)."""
    u = 1.0 + w
    exact = u == 1.0
    return tl.where(exact, w, tl.log(u) * (w / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def two_sum(a, b):
    """Return a + b, and the rounding error of that sum (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit
def expm1(x):
    """Return exp(x) - 1 without cancellation near zero."""
    near = tl.abs(x) < 0.25
    t = tl.where(near, x, 0.0)
    series = 1.0 + t * (
        1 / 2 + t * (1 / 6 + t * (1 / 24 + t * (1 / 120 + t * (1 / 720 + t / 5040))))
    )
    return tl.where(near, t * series, tl.exp(x) - 1.0)


@triton.jit
def soft_cap(x, cap):
    """Return cap * tanh(x / cap), and its derivative with a small relative error.

    Below the cap, the value is x plus a polynomial correction. Beyond it, the value is the cap less
    a part of at most a quarter, and only this part has the errors of a GPU's exp and division.
    """
    a = tl.abs(x)
    u = tl.minimum(a, cap) * tl.math.div_rn(1.0, cap)
    z = u * u
    # tanh(u) / u = 1 + z * near, within 3e-9 up to u = 1
    near = tl.fma(z, -3.4082023e-4, 2.23721564e-3)
    near = tl.fma(near, z, -7.85376411e-3)
    near = tl.fma(near, z, 2.14201696e-2)
    near = tl.fma(near, z, -5.38549945e-2)
    near = tl.fma(near, z, 1.3331902e-1)
    near = tl.fma(near, z, -3.33332658e-1)
    correction = z * near
    share = 2.0 / (tl.exp2(a * tl.math.div_rn(2.0 * LOG2_E, cap)) + 1.0)
    far = tl.fma(-cap, share, cap)
    capped = tl.where(a < cap, tl.fma(x, correction, x), tl.where(x < 0, -far, far))
    rest = tl.where(a < cap, tl.fma(-u, correction + 1.0, 1.0), share)  # 1 - tanh(|u|)
    return capped, rest * (2.0 - rest)


@triton.jit
def row_offset(row, T, stride_b, stride_t, ALIGN: tl.constexpr):
    """Return the offset of logits row `row` = b * T + t in elements, computed in int64."""
    row = row.to(tl.int64)
    return tl.multiple_of((row // T) * stride_b + (row % T) * stride_t, ALIGN)
