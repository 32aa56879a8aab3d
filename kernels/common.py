"""Helpers shared by the kernels.

Letters: `N` rows (response tokens), `V` vocabulary, `B` sequences. A row of logits is walked in
blocks of [ROWS, COLS] elements: reductions run over ROWS, inside a thread, and only the last one
crosses threads.
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
    """A maximum that may be -inf, as a reference point that can be subtracted."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def log1p(w):
    """log(1 + w) for w >= 0, exact to rounding for small w (Kahan's correction)."""
    u = 1.0 + w
    exact = u == 1.0
    return tl.where(exact, w, tl.log(u) * (w / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def two_sum(a, b):
    """a + b, and the rounding error of that sum (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation near zero."""
    near = tl.abs(x) < 0.25
    t = tl.where(near, x, 0.0)
    series = 1.0 + t * (
        1 / 2 + t * (1 / 6 + t * (1 / 24 + t * (1 / 120 + t * (1 / 720 + t / 5040))))
    )
    return tl.where(near, t * series, tl.exp(x) - 1.0)


@triton.jit
def tanh(u):
    """tanh; the polynomial near zero has the coefficients of Cephes' tanhf."""
    a = tl.abs(u)
    z = tl.minimum(a, 0.625) * tl.minimum(a, 0.625)
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, u * (1.0 + z * near), tl.where(u < 0, -far, far))


@triton.jit
def row_offset(row, T, stride_b, stride_t, ALIGN: tl.constexpr):
    """Offset of logits row `row` = b * T + t, in elements; int64 before it meets a stride."""
    row = row.to(tl.int64)
    return tl.multiple_of((row // T) * stride_b + (row % T) * stride_t, ALIGN)
