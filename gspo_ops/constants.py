"""Numbers that several files share; the kernels wrap them."""

IGNORED = -100  # a target that doesn't count
LOG_RATIO_CAP = 80.0  # log-ratios are capped at +- this, so that sums of their exp stay finite
ESS_RATIO_CAP = 1e15  # cap of a ratio and of its inverse: fp32 can hold sums of their squares
SHIFT_LIMIT = 64.0  # exponent of two: sums of exponentials up to it stay finite in fp32

# statistics of a loss: the kernel has a column for each, in this order
STATS = (
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "clip_frac_sequences",
    "clip_frac_tokens",
    "clip_frac_low",
    "clip_frac_high",
    "approx_kl",
    "approx_kl_k3",
    "effective_sample_size",
    "active_token_frac",
    "ref_kl",
    "clip_frac_dual",
)
