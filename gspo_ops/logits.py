"""Log-probs from logits: the source, its operators, and their Triton path.

The kernels are in `kernels/logits.py`, the CPU path in `logits_cpu.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import Forward
from .backend import compute_dtype, device_guard, loadable, use_triton
from .checks import check_float, check_targets
from .logits_cpu import LogitPart, LogitStats, SavedLogits, log_odds, torch_bwd, torch_fwd
from .operators import operator
from .parallel import NOWHERE, Vocabulary, gathered, sum_in_order
from .policy import Policy
from .softmax import Softmax, TargetRows, Upstream

THREADS = 128  # per program; each one has 8 of 1024 columns to itself


def check_logits(logits: Tensor, targets: Tensor) -> None:
    """Refuse logits and targets that the operators do not support; the error names them."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a torch.Tensor, got {type(logits).__name__}")
    check_float("logits", logits)
    if logits.ndim not in (2, 3):
        raise ValueError(f"logits must have shape (B, T, V) or (N, V), got {tuple(logits.shape)}")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have a non-empty vocabulary, got {tuple(logits.shape)}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            "logits must be contiguous along the vocabulary, got strides "
            f"{logits.stride()}: call .contiguous() (this copies them)"
        )
    check_targets(targets, "logits", logits)


def vocabulary_of_logits(logits: Tensor, softmax: Softmax) -> Vocabulary:
    """Return the vocabulary, with the facts that must be the same on all of its ranks."""
    return Vocabulary.of(
        softmax.vocab_group,
        columns=logits.shape[-1],
        checks_range=not use_triton(logits),
        facts={
            "the number of rows of logits": math.prod(logits.shape[:-1]),
            "the precision of log-probs, in bytes,": compute_dtype(logits.dtype).itemsize,
            "return_entropy": int(softmax.return_entropy),
        },
    )


class LogitsSource(NamedTuple):
    """Log-probs from logits (..., V), the one operand."""

    softmax: Softmax

    def returns_entropy(self) -> bool:
        return self.softmax.return_entropy

    def forward(self, rows: TargetRows, policy: Policy | None, *operands: Any) -> Forward:
        (logits,) = operands
        is_read = (
            policy is None
            or policy.reads_log_probs()
            or self.returns_entropy()
            or self.softmax.vocab_group is not None
        )
        if not is_read:  # g is known beforehand, and the backward reads the rows that have one
            saved = SavedLogits(logits, *rows, None, None, None, None)
            return Forward(None, logits.new_empty(0), saved)
        stats = logits_fwd(logits, rows, self.softmax)
        saved = SavedLogits(
            logits, *rows, stats.row_max, stats.row_sum, stats.entropy, stats.target_logit
        )
        return Forward(stats.log_probs, stats.entropy, saved)

    def backward(
        self, saved: tuple[Any, ...], upstream: Upstream, wanted: tuple[bool, ...]
    ) -> tuple[Tensor]:
        return (logits_bwd(SavedLogits(*saved), upstream, self.softmax),)


# Operators


def _fwd_fake(logits: Tensor, rows: TargetRows, softmax: Softmax) -> LogitStats:
    n, dtype = rows.targets.numel(), compute_dtype(logits.dtype)
    log_probs, row_max, row_sum = (rows.targets.new_empty(n, dtype=dtype) for _ in range(3))
    entropy = rows.targets.new_empty(n if softmax.return_entropy else 0, dtype=dtype)
    is_shared = softmax.vocab_group is not None
    target_logit = rows.targets.new_empty(n if is_shared else 0, dtype=dtype)
    return LogitStats(log_probs, row_max, row_sum, entropy, target_logit)


@operator(_fwd_fake)
def logits_fwd(logits: Tensor, rows: TargetRows, softmax: Softmax) -> LogitStats:
    """Compute LogitStats of every row with a non-zero mask; return 0 elsewhere.

    With a vocab_group, targets are local.
    """
    forward = triton_fwd if use_triton(logits) else torch_fwd
    out = _fwd_fake(logits, rows, softmax)
    targets = rows.targets.reshape(-1).contiguous()
    mask = None if rows.mask is None else loadable(rows.mask.reshape(-1))
    if not targets.numel():
        return out
    if softmax.vocab_group is None:
        forward(logits, targets, mask, softmax, out)
        return out
    log_sum = torch.empty_like(out.row_sum) if softmax.return_entropy else None
    part = LogitPart(out.row_max, out.row_sum, out.target_logit, log_sum)
    forward(logits, targets, mask, softmax, part)
    return _combined(part, targets, mask, softmax, out.entropy)


def _combined(
    part: LogitPart, targets: Tensor, mask: Tensor | None, softmax: Softmax, entropy: Tensor
) -> LogitStats:
    """Combine the parts of the vocabulary from all ranks into LogitStats of whole rows."""
    group, temperature = softmax.vocab_group, softmax.temperature
    assert group is not None
    # one part has the target's logit, and the others have 0
    target_logit = part.target_logit.masked_fill(targets == NOWHERE, math.nan)
    own = part._replace(target_logit=target_logit)
    parts = gathered(torch.stack([x for x in own if x is not None]), group).unbind(1)
    row_max, row_sum, target_logit, *log_sum = parts
    top = torch.where(row_sum == 0, -math.inf, row_max).amax(0)
    top = top.masked_fill(top == -math.inf, 0.0)
    step = torch.where(row_sum == 0, 0.0, (row_max - top) / temperature)
    shrink = step.exp()
    total = sum_in_order(row_sum * shrink)
    x_target = sum_in_order(target_logit)
    odds = log_odds(top, total, x_target, softmax)
    log_prob = odds.log_p()
    if softmax.return_entropy:
        logs = sum_in_order(shrink * (log_sum[0] + row_sum * (step * math.log2(math.e))))
        entropy = odds.entropy(log_prob, total, logs / total * math.log(2.0))
    if mask is not None:
        log_prob = torch.where(mask != 0, log_prob, 0.0)
        entropy = torch.where(mask != 0, entropy, 0.0) if softmax.return_entropy else entropy
    return LogitStats(log_prob, top, total, entropy, x_target)


def _bwd_fake(saved: SavedLogits, upstream: Upstream, softmax: Softmax) -> Tensor:
    return torch.empty_like(saved.logits, memory_format=torch.contiguous_format)


@operator(_bwd_fake)
def logits_bwd(saved: SavedLogits, upstream: Upstream, softmax: Softmax) -> Tensor:
    """Compute d loss / d logits, contiguous.

    If row_max and row_sum are missing, they are computed here for the rows that need them.
    """
    out = _bwd_fake(saved, upstream, softmax)
    if out.numel():
        backward = triton_bwd if use_triton(saved.logits) else torch_bwd
        logits, targets, mask, row_max, row_sum, entropy, target_logit = saved
        saved = SavedLogits(
            logits,
            targets.reshape(-1).contiguous(),
            None if mask is None else loadable(mask.reshape(-1)),
            row_max,
            row_sum,
            None if upstream.entropy is None else entropy,
            None if softmax.vocab_group is None else target_logit,
        )
        backward(saved, upstream.flat(), softmax, out)
    return out


# Triton path


def row_strides(logits: Tensor) -> dict[str, int]:
    """Return the strides of row b * T + t, and the largest power of two <= 16 that divides them."""
    if logits.ndim == 2:
        T, stride_b, stride_t = max(logits.shape[0], 1), 0, logits.stride(0)
    else:
        T, stride_b, stride_t = logits.shape[1], logits.stride(0), logits.stride(1)
    align = math.gcd(16, stride_b, stride_t)
    return {"T": T, "stride_b": stride_b, "stride_t": stride_t, "ALIGN": align}


def block_shape(V: int, rows: int) -> dict[str, int]:
    """Return [ROWS, COLS] of a block, from V alone, so that a row's result never depends on N."""
    cols = min(1024, 1 << max(V - 1, 0).bit_length())
    warp = 32
    if torch.version.hip:
        # warps are wider, and with more than half as many elements, scalar registers spill
        warp, rows = 64, rows // 2
    rows = min(rows, 1 << (-(-V // cols) - 1).bit_length())
    return {"ROWS": rows, "COLS": cols, "num_warps": THREADS // warp}


def fwd_block(V: int, softmax: Softmax) -> dict[str, int]:
    return block_shape(V, rows=8 if softmax.softcap is None else 4)


def bwd_block(V: int, softmax: Softmax, has_entropy: bool) -> dict[str, int]:
    # entropy and soft cap together need twice the registers per element
    return block_shape(V, rows=2 if has_entropy and softmax.softcap is not None else 4)


def triton_fwd(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    softmax: Softmax,
    out: LogitStats | LogitPart,
) -> None:
    from .kernels.logits import logits_fwd_kernel

    V = logits.shape[-1]
    if isinstance(out, LogitPart):
        results = {"target_logit_ptr": out.target_logit, "log_sum_ptr": out.log_sum}
        results |= {"log_probs_ptr": None, "entropy_ptr": None}
    else:
        results = {"target_logit_ptr": None, "log_sum_ptr": None, "log_probs_ptr": out.log_probs}
        results["entropy_ptr"] = out.entropy if softmax.return_entropy else None
    with device_guard(logits):
        logits_fwd_kernel[(targets.numel(),)](
            logits_ptr=logits,
            targets_ptr=targets,
            mask_ptr=mask,
            row_max_ptr=out.row_max,
            row_sum_ptr=out.row_sum,
            **results,
            V=V,
            temperature=softmax.temperature,
            scale=softmax.scale,
            softcap=softmax.softcap,
            **row_strides(logits),
            **fwd_block(V, softmax),
        )


def triton_bwd(saved: SavedLogits, upstream: Upstream, softmax: Softmax, out: Tensor) -> None:
    from .kernels.logits import logits_bwd_kernel

    V = saved.logits.shape[-1]
    with device_guard(saved.logits):
        logits_bwd_kernel[(saved.targets.numel(),)](
            logits_ptr=saved.logits,
            targets_ptr=saved.targets,
            mask_ptr=saved.mask,
            row_max_ptr=saved.row_max,
            row_sum_ptr=saved.row_sum,
            entropy_ptr=saved.entropy,
            target_logit_ptr=saved.target_logit,
            grad_log_probs_ptr=upstream.log_probs,
            grad_entropy_ptr=upstream.entropy,
            grad_loss_ptr=upstream.grad_loss,
            inv_denominator_ptr=upstream.inv_denominator,
            grad_logits_ptr=out,
            V=V,
            temperature=softmax.temperature,
            scale=softmax.scale,
            softcap=softmax.softcap,
            OUT_ALIGN=math.gcd(16, V),
            **row_strides(saved.logits),
            **bwd_block(V, softmax, upstream.entropy is not None),
        )
