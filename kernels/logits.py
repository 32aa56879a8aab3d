"""Log-probability of one target per row of logits, and its gradient.

A row is split into its target y and the others. With z = softcap(x) / temperature:

    m = max_{v != y} z_v,   S = sum_{v != y} exp(z_v - m)            (what the forward keeps)
    d = (m - z_y) + log(S)                                          log-odds against the target
    log_prob = -softplus(d),   q = 1 - p_y = sigmoid(d),   p_v = exp(z_v - m) * q / S

so that log_prob and 1 - p_y keep their relative accuracy when p_y is close to 1, where
log_softmax and softmax lose it. The kernels hold m before the division by the temperature. If the
vocabulary is sharded over ranks, m and S are first those of a shard, which need not contain y.
"""

import triton
import triton.language as tl

from .common import (
    LN_2,
    finite_or_zero,
    log1p,
    rounded_product,
    row_offset,
    soft_cap,
    sum_pairs,
    two_sum,
)


@triton.jit
def load_logits(x_ptr, cols, V, softcap, MASKED: tl.constexpr):
    """Load a block of logits in fp32, soft-capped if requested; -inf beyond V."""
    if MASKED:
        x = tl.load(x_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(x_ptr + cols).to(tl.float32)
    if softcap is not None:
        x, _ = soft_cap(x, softcap)
        if MASKED:
            # the cap has made values beyond V finite
            x = tl.where(cols < V, x, float("-inf"))
    return x


@triton.jit
def fold(x, m, s, t, scale, ENTROPY: tl.constexpr):
    """Fold a block x [ROWS, COLS] into the running max m, sum s and sum of e * log2(e), [COLS]."""
    m_new = tl.maximum(m, tl.max(x, axis=0))
    ref = finite_or_zero(m_new)
    e_log2 = (x - ref[None, :]) * scale
    e = tl.exp2(e_log2)
    step = (m - ref) * scale
    shrink = tl.exp2(step)
    if ENTROPY:
        moved = tl.fma(s, tl.where(m == float("-inf"), 0.0, step), t)
        t = tl.fma(shrink, moved, tl.sum(tl.where(e > 0, e * e_log2, 0.0), axis=0))
    return m_new, rounded_product(s, shrink) + tl.sum(e, axis=0), t


@triton.jit
def sum_over_others(
    x_ptr, target, V, scale, softcap,
    ENTROPY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Compute m, S and the sum of e * log2(e) over the row without its target.

    The block that holds the target comes after the other full blocks, so that the loop has neither
    a mask nor a comparison; the partial last block comes last.
    """
    BLOCK: tl.constexpr = ROWS * COLS
    cols = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]  # [ROWS, COLS]
    m = tl.full([COLS], float("-inf"), tl.float32)
    s = tl.zeros([COLS], tl.float32)
    t = tl.zeros([COLS], tl.float32)
    V_main = V // BLOCK * BLOCK
    target_start = target // BLOCK * BLOCK
    target_in_main = (target >= 0) & (target < V_main)
    others_end = tl.where(target_in_main, V_main - BLOCK, V_main)
    for i in range(0, others_end, BLOCK):
        start = tl.where(target_in_main & (i >= target_start), i + BLOCK, i)
        x = load_logits(x_ptr + start, cols, V, softcap, False)
        m, s, t = fold(x, m, s, t, scale, ENTROPY)
    if target_in_main:
        x = load_logits(x_ptr + target_start, cols, V, softcap, False)
        x = tl.where(cols == target - target_start, float("-inf"), x)
        m, s, t = fold(x, m, s, t, scale, ENTROPY)
    if V_main < V:
        x = load_logits(x_ptr + V_main, cols, V - V_main, softcap, True)
        x = tl.where(cols == target - V_main, float("-inf"), x)
        m, s, t = fold(x, m, s, t, scale, ENTROPY)

    row_max = finite_or_zero(tl.max(m, axis=0))
    step = (m - row_max) * scale
    shrink = tl.exp2(step)
    log_sum = 0.0
    if ENTROPY:
        moved = tl.fma(s, tl.where(m == float("-inf"), 0.0, step), t)
        log_sum = sum_pairs(rounded_product(shrink, moved))
    return row_max, sum_pairs(rounded_product(s, shrink)), log_sum


@triton.jit
def load_target_id(target_ptr, V):
    """Load the target as int32; -1 if it lies outside [0, V)."""
    target = tl.load(target_ptr)
    return tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)


@triton.jit
def load_target(x_ptr, target, softcap):
    """Load the target's logit; NaN for a target outside [0, V), so that it can't train silently."""
    x = tl.load(x_ptr + target, mask=target >= 0, other=float("nan")).to(tl.float32)
    if softcap is not None:
        x, _ = soft_cap(x, softcap)
    return x


@triton.jit
def log_odds(row_max, row_sum, x_target, temperature):
    """Return d, its rounding error, and w = exp(-|d|), which avoids cancellation in the rest."""
    # rounded to nearest: on a GPU, `/` may be off by 2 ulp, which is much if d is large
    d, error = two_sum(tl.math.div_rn(row_max - x_target, temperature), tl.log(row_sum))
    return d, error, tl.exp(-tl.abs(d))


@triton.jit
def minus_softplus(d, error, w):
    """Return -softplus(d + error), the log-probability for log-odds against; NaN and inf pass."""
    error = tl.where(tl.abs(error) < 1.0, error, 0.0)
    positive = tl.where(d > 0, d, 0.0)
    y = 0.0 - (positive + (log1p(w) + tl.where(d > 0, error, 0.0)))
    return tl.where(d == d, y, d)


@triton.jit
def logits_fwd_kernel(
    # inputs
    logits_ptr, targets_ptr, mask_ptr,
    # outputs [N]; entropy is None unless requested
    log_probs_ptr, row_max_ptr, row_sum_ptr, entropy_ptr,
    # for a part of the vocabulary, in place of log_probs and entropy
    target_logit_ptr, log_sum_ptr,
    # shapes and strides: row n = b * T + t starts at b * stride_b + t * stride_t
    T, V, stride_b, stride_t,
    # options
    temperature, scale, softcap,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    live = True
    if mask_ptr is not None:
        live = tl.load(mask_ptr + row) != 0
    PART: tl.constexpr = target_logit_ptr is not None
    ENTROPY: tl.constexpr = (entropy_ptr is not None) or (log_sum_ptr is not None)
    log_prob = 0.0
    target_logit = 0.0
    row_max = 0.0
    row_sum = 0.0
    log_sum = 0.0
    entropy = 0.0
    if live:
        x_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t, ALIGN)
        target = load_target_id(targets_ptr + row, V)
        x_target = load_target(x_ptr, target, softcap)
        row_max, row_sum, log_sum = sum_over_others(
            x_ptr, target, V, scale, softcap, ENTROPY, ROWS, COLS
        )
        if PART:
            # the log-prob and the entropy are computed once all parts are known
            target_logit = tl.where(target >= 0, x_target, 0.0)
        else:
            d, error, w = log_odds(row_max, row_sum, x_target, temperature)
            log_prob = minus_softplus(d, error, w)
            if ENTROPY:
                log_q = minus_softplus(-d, -error, w)
                q = tl.where(d >= 0, 1.0, w) / (1.0 + w)
                p = tl.where(d >= 0, w, 1.0) / (1.0 + w)
                others = tl.log(row_sum) - log_sum / row_sum * LN_2 - log_q
                entropy = tl.where(q > 0, q * others, 0.0) - tl.where(p > 0, p * log_prob, 0.0)
                entropy = tl.where(d == d, entropy, d)
    tl.store(row_max_ptr + row, row_max)
    tl.store(row_sum_ptr + row, row_sum)
    if PART:
        tl.store(target_logit_ptr + row, target_logit)
        if ENTROPY:
            tl.store(log_sum_ptr + row, log_sum)
    else:
        tl.store(log_probs_ptr + row, log_prob)
        if ENTROPY:
            tl.store(entropy_ptr + row, entropy)


@triton.jit
def logits_grad(
    x_ptr, cols, V, target, row_max, scale, softcap,
    at_others, at_target, entropy_at_others, log_coef,
    MASKED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Compute d loss / d logits for a block; the arguments at_* hold every per-row factor."""
    x = load_logits(x_ptr, cols, V, None, MASKED)
    if softcap is not None:
        x, derivative = soft_cap(x, softcap)
    e_log2 = (x - row_max) * scale
    e = tl.exp2(e_log2)
    grad = e * at_others
    if ENTROPY:
        share = e * tl.fma(e_log2, LN_2, log_coef) * entropy_at_others
        grad = tl.fma(e, at_others, tl.where(e > 0, share, 0.0))
    grad = tl.where(cols == target, at_target, grad)
    if softcap is not None:
        grad *= derivative
    return grad


@triton.jit
def logits_bwd_kernel(
    # inputs [N]; row_max and row_sum are None when the forward has not read the logits,
    # target_logit when it is among the logits
    logits_ptr, targets_ptr, mask_ptr, row_max_ptr, row_sum_ptr, entropy_ptr, target_logit_ptr,
    # upstream: d loss / d log_prob [N], d loss / d entropy [N] or None, two scalars or None
    grad_log_probs_ptr, grad_entropy_ptr, grad_loss_ptr, inv_denominator_ptr,
    # output [N, V], contiguous
    grad_logits_ptr,
    # shapes and strides
    T, V, stride_b, stride_t,
    # options
    temperature, scale, softcap,
    ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = ROWS * COLS
    ENTROPY: tl.constexpr = grad_entropy_ptr is not None
    row = tl.program_id(0)
    out_ptr = grad_logits_ptr + tl.multiple_of(row.to(tl.int64) * V, OUT_ALIGN)
    cols = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]  # [ROWS, COLS]
    V_main = V // BLOCK * BLOCK

    g = tl.load(grad_log_probs_ptr + row)
    live = g != 0
    if grad_loss_ptr is not None:
        g = g * (tl.load(grad_loss_ptr) * tl.load(inv_denominator_ptr))
        live = live & (g != 0)
    h = 0.0
    if ENTROPY:
        h = tl.load(grad_entropy_ptr + row)
        live = live | (h != 0)
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + row) != 0)

    if live:
        x_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t, ALIGN)
        target = load_target_id(targets_ptr + row, V)
        if target_logit_ptr is None:
            x_target = load_target(x_ptr, target, softcap)
        else:
            x_target = tl.load(target_logit_ptr + row)
        if row_max_ptr is None:
            row_max, row_sum, _ = sum_over_others(
                x_ptr, target, V, scale, softcap, False, ROWS, COLS
            )
        else:
            row_max = tl.load(row_max_ptr + row)
            row_sum = tl.load(row_sum_ptr + row)
        d, error, w = log_odds(row_max, row_sum, x_target, temperature)
        q = tl.where(d >= 0, 1.0, w) / (1.0 + w)
        coef = tl.where(row_sum == 0, 0.0, q / row_sum)
        # a target that is NaN or out of range poisons the row
        coef = tl.where(d == d, coef, d)
        q = tl.where(d == d, q, d)
        at_others = -g * coef / temperature
        at_target = g * q / temperature
        entropy_at_others = 0.0
        log_coef = 0.0
        if ENTROPY:
            p = tl.where(d >= 0, w, 1.0) / (1.0 + w)
            log_p = minus_softplus(d, error, w)
            entropy = tl.load(entropy_ptr + row)
            at_target -= tl.where(p > 0, p * (log_p + entropy), 0.0) * h / temperature
            entropy_at_others = -h * coef / temperature
            # log p_v + entropy = log2(e_v) * ln 2 + log_coef
            log_q = minus_softplus(-d, -error, w)
            log_coef = tl.where(coef > 0, log_q - tl.log(row_sum) + entropy, 0.0)

        for start in range(0, V_main, BLOCK):
            grad = logits_grad(
                x_ptr + start, cols, V, target - start, row_max, scale, softcap,
                at_others, at_target, entropy_at_others, log_coef, False, ENTROPY,
            )  # fmt: skip
            tl.store(out_ptr + start + cols, grad.to(grad_logits_ptr.dtype.element_ty))
        if V_main < V:
            grad = logits_grad(
                x_ptr + V_main, cols, V - V_main, target - V_main, row_max, scale, softcap,
                at_others, at_target, entropy_at_others, log_coef, True, ENTROPY,
            )  # fmt: skip
            out = grad.to(grad_logits_ptr.dtype.element_ty)
            tl.store(out_ptr + V_main + cols, out, mask=cols < V - V_main)
    else:
        zeros = tl.zeros([ROWS, COLS], grad_logits_ptr.dtype.element_ty)
        for start in range(0, V_main, BLOCK):
            tl.store(out_ptr + start + cols, zeros)
        if V_main < V:
            tl.store(out_ptr + V_main + cols, zeros, mask=cols < V - V_main)
