"""Log-probabilities of target tokens from logits: checks, operators, autograd.Function, CPU path.

The kernels stand in `kernels/log_probs.py`, whose header has the derivation that both paths use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .backend import compute_dtype, device_guard, operator, use_triton
from .layout import IGNORED, check_tensor, checked_targets
from .objective import check_number
from .parallel import (
    NOWHERE,
    Facts,
    ProcessGroup,
    SharedChecks,
    agree,
    checksum,
    gathered,
    group_name,
    local_targets,
    sum_in_order,
    vocab_part,
)

THREADS = 128  # per program: with 8 columns each they read 1024, and keep columns to themselves
_CHUNK_ELEMENTS = 1 << 20  # of the CPU path: 4 MiB of fp32, so that a chunk stays in cache


@overload
def log_probs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_group: ProcessGroup | None = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...
@overload
def log_probs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_group: ProcessGroup | None = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def log_probs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_group: ProcessGroup | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each row's target.

        log_prob[t] = log_softmax(softcap(logits[t]) / temperature)[targets[t]]
        entropy[t]  = -sum_v p[t, v] * log p[t, v],    softcap(x) = softcap * tanh(x / softcap)

    Logits are read once and never copied; the backward reads them once and writes dlogits once, and
    rows whose incoming gradient is zero are not read at all.

    Args:
        logits: (B, T, V) or (N, V), float16, bfloat16, float32 or float64; any strides, as long as
            the vocabulary is contiguous.
        targets: (B, T) or (N,) int32 or int64: the token that each row predicts (already shifted);
            -100 marks a row that is left out: its results and its gradient are 0.
        temperature: sampling temperature, > 0.
        softcap: soft cap of the logits, > 0, as in Gemma; None for none.
        vocab_group: ranks that share the vocabulary: each passes the same targets and its own part
            of the logits, of any size, in the order of the ranks, or a DTensor. The results are the
            same on all; 3 numbers per row (4 with the entropy) are exchanged, and nothing in the
            backward.
        return_entropy: also return the entropy in nats, differentiable.

    Returns:
        log_probs with the shape of `targets`, float32 (float64 for float64 logits); with
        `return_entropy` the pair (log_probs, entropy).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        IndexError: a target outside [0, V), on CPU. On GPU its log_prob is NaN.
    """
    with SharedChecks(logits, targets, vocab_group=vocab_group):
        logits = vocab_part("logits", logits, -1, vocab_group)
        check_logits(logits, targets)
        check_softmax_options(temperature, softcap, return_entropy)
        ranks = group_name("vocab_group", vocab_group)
    mask = targets != IGNORED
    if ranks is not None:
        facts = facts_of_logits(logits, return_entropy)
        targets = agreed_targets(
            targets, mask, logits.shape[-1], not use_triton(logits), facts, ranks
        )
    log_probs, entropy = LogProbs.apply(
        logits, targets, mask, temperature, softcap, return_entropy, ranks
    )
    return (log_probs, entropy) if return_entropy else log_probs


class RowStats(NamedTuple):
    """What the forward keeps of each row, all (N,): see `kernels/log_probs.py`."""

    log_probs: Tensor
    row_max: Tensor
    row_sum: Tensor
    entropy: Tensor  # (0,) unless asked for
    target_logit: Tensor  # (0,) unless the vocabulary is shared


class LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, logits, targets, mask, temperature, softcap, return_entropy, vocab_group
    ):
        stats = RowStats(
            *log_probs_fwd(logits, targets, mask, temperature, softcap, return_entropy, vocab_group)
        )
        ctx.save_for_backward(logits, targets, mask, *stats[1:])
        ctx.options = temperature, softcap, return_entropy, vocab_group
        if not return_entropy:
            ctx.mark_non_differentiable(stats.entropy)
            return stats.log_probs.view(targets.shape), stats.entropy
        return stats.log_probs.view(targets.shape), stats.entropy.view(targets.shape)

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy):  # type: ignore[override]
        logits, targets, mask, row_max, row_sum, entropy, target_logit = ctx.saved_tensors
        temperature, softcap, return_entropy, vocab_group = ctx.options
        grad_logits = log_probs_bwd(
            logits, targets, mask, row_max, row_sum,
            entropy if return_entropy else None, target_logit,
            grad_log_probs, grad_entropy if return_entropy else None,
            None, None, temperature, softcap, vocab_group,
        )  # fmt: skip
        return (grad_logits, *(None for _ in range(6)))


def check_logits(logits: Tensor, targets: Tensor) -> None:
    """Refuse logits and targets that the operators can't take, by name."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a torch.Tensor, got {type(logits).__name__}")
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if logits.ndim not in (2, 3):
        raise ValueError(f"logits must have shape (B, T, V) or (N, V), got {tuple(logits.shape)}")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have a vocabulary, got {tuple(logits.shape)}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            "logits must be contiguous along the vocabulary, got strides "
            f"{logits.stride()}: call .contiguous() (this copies them)"
        )
    check_tensor("targets", targets, logits.device)
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets must be int32 or int64, got {targets.dtype}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets must have shape {tuple(logits.shape[:-1])}, one per row of logits, got "
            f"{tuple(targets.shape)}"
        )


def check_softmax_options(temperature: float, softcap: float | None, return_entropy: bool) -> None:
    """Refuse a temperature or a soft cap outside its range."""
    check_number("temperature", temperature, minimum=0.0, exclusive=True)
    if softcap is not None:
        check_number("softcap", softcap, minimum=0.0, exclusive=True)
    if not isinstance(return_entropy, bool):
        raise TypeError(f"return_entropy must be a bool, got {type(return_entropy).__name__}")


# Operators


def facts_of_logits(logits: Tensor, return_entropy: bool) -> dict[str, int]:
    """What ranks that share a vocabulary must have in common, to exchange the same."""
    return {
        "the number of rows of logits": math.prod(logits.shape[:-1]),
        "the precision of log-probs, in bytes,": compute_dtype(logits.dtype).itemsize,
        "return_entropy": int(return_entropy),
    }


def agreed_targets(
    targets: Tensor, mask: Tensor, columns: int, checks_range: bool, facts: Facts, group: str
) -> Tensor:
    return agree_on_targets(
        targets, mask, columns, checks_range, list(facts), list(facts.values()), group
    )


@operator(
    "agree_on_targets(Tensor targets, Tensor mask, SymInt columns, bool checks_range, "
    "str[] names, SymInt[] facts, str vocab_group) -> Tensor",
    lambda targets, *_: targets.new_empty(targets.shape, dtype=torch.int64),
)
def agree_on_targets(targets, mask, columns, checks_range, names, facts, vocab_group):
    """Targets as `local_targets` counts them, if all ranks can go on."""
    sizes = None
    if targets.device.type == "cpu":
        counted = torch.where(mask, targets.long(), 0)
        shared = dict(zip(names, facts, strict=True)) | {
            "the checksum of targets": checksum([counted])
        }
        sizes = agree(
            {"vocab_group": (vocab_group, shared)}, None,
            counted.view(-1) if checks_range else None, columns,
        )  # fmt: skip
    return local_targets(targets, columns, vocab_group, sizes)


def _fwd_fake(logits, targets, mask, temperature, softcap, return_entropy, vocab_group):
    rows = targets.new_empty(targets.numel(), dtype=compute_dtype(logits.dtype))

    def rows_if(condition: bool) -> Tensor:
        return torch.empty_like(rows) if condition else rows.new_empty(0)

    return (
        rows, torch.empty_like(rows), torch.empty_like(rows), rows_if(return_entropy),
        rows_if(vocab_group is not None),
    )  # fmt: skip


@operator(
    "log_probs_fwd(Tensor logits, Tensor targets, Tensor? mask, float temperature, float? softcap, "
    "bool return_entropy, str? vocab_group) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
def log_probs_fwd(logits, targets, mask, temperature, softcap, return_entropy, vocab_group):
    """RowStats of every row where mask is non-zero; 0 elsewhere.

    With a vocab_group, targets are local ones.
    """
    forward = _triton_fwd if use_triton(logits) else _torch_fwd
    options = temperature, softcap, return_entropy, vocab_group
    out = RowStats(*_fwd_fake(logits, targets, mask, *options))
    targets = targets.reshape(-1).contiguous()
    mask = None if mask is None else loadable(mask.reshape(-1))
    if targets.numel():
        forward(logits, targets, mask, *options, out)
        if vocab_group is not None:
            out = _combined(out, vocab_group, targets, mask, temperature)
    return tuple(out)


def _combined(
    part: RowStats, vocab_group: str, targets: Tensor, mask: Tensor | None, temperature: float
) -> RowStats:
    """RowStats of whole rows, from those of every part of the vocabulary.

    Of a part, `entropy` holds the sum of e * log2(e).
    """
    # one part has the target's logit, the others 0
    target_logit = part.target_logit.masked_fill(targets == NOWHERE, math.nan)
    own = torch.stack([part.row_max, part.row_sum, target_logit])
    if return_entropy := part.entropy.numel() > 0:
        own = torch.cat([own, part.entropy[None]])
    row_max, row_sum, target_logit, *log_sum = gathered(own, vocab_group).unbind(1)
    top = torch.where(row_sum == 0, -math.inf, row_max).amax(0)
    top = top.masked_fill(top == -math.inf, 0.0)
    step = torch.where(row_sum == 0, 0.0, (row_max - top) / temperature)
    shrink = step.exp()
    total = sum_in_order(row_sum * shrink)
    x_target = sum_in_order(target_logit)
    d, error = _log_odds(top, total, x_target, temperature)
    log_prob = minus_softplus(d, error)
    entropy = part.entropy
    if return_entropy:
        logs = sum_in_order(shrink * (log_sum[0] + row_sum * (step * math.log2(math.e))))
        entropy = entropy_of(d, log_prob, total, logs, error)
    if mask is not None:
        log_prob = torch.where(mask != 0, log_prob, 0.0)
        entropy = torch.where(mask != 0, entropy, 0.0) if return_entropy else entropy
    return RowStats(log_prob, top, total, entropy, x_target)


def entropy_of(
    d: Tensor, log_p: Tensor, row_sum: Tensor, log_sum: Tensor, error: Tensor | None = None
) -> Tensor:
    """Entropy from log-odds d + error against the target, and the others' sum of e * log2(e)."""
    log_q = minus_softplus(-d, None if error is None else -error)
    others = row_sum.log() - log_sum / row_sum * math.log(2.0) - log_q
    return times_exp(log_q, others) - times_exp(log_p, log_p)


def _bwd_fake(
    logits, targets, mask, row_max, row_sum, entropy, target_logit, grad_log_probs, grad_entropy,
    grad_loss, inv_denominator, temperature, softcap, vocab_group,
):  # fmt: skip
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@operator(
    "log_probs_bwd(Tensor logits, Tensor targets, Tensor? mask, Tensor? row_max, Tensor? row_sum, "
    "Tensor? entropy, Tensor? target_logit, Tensor grad_log_probs, Tensor? grad_entropy, "
    "Tensor? grad_loss, Tensor? inv_denominator, float temperature, float? softcap, "
    "str? vocab_group) -> Tensor",
    _bwd_fake,
)
def log_probs_bwd(
    logits, targets, mask, row_max, row_sum, entropy, target_logit, grad_log_probs, grad_entropy,
    grad_loss, inv_denominator, temperature, softcap, vocab_group,
):  # fmt: skip
    """dlogits for d loss / d log_prob = grad_log_probs * grad_loss * inv_denominator.

    Without row_max and row_sum they are computed on the way, for the rows that need them. The
    target's logit is read from `target_logit` where the vocabulary is shared.
    """
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if grad_logits.numel():
        backward = _triton_bwd if use_triton(logits) else _torch_bwd
        backward(
            logits, targets.reshape(-1).contiguous(),
            None if mask is None else loadable(mask.reshape(-1)),
            row_max, row_sum, entropy, None if vocab_group is None else target_logit,
            grad_log_probs.reshape(-1).contiguous(),
            None if grad_entropy is None else grad_entropy.reshape(-1).contiguous(),
            grad_loss, inv_denominator, temperature, softcap, vocab_group, grad_logits,
        )  # fmt: skip
    return grad_logits


def loadable(mask: Tensor) -> Tensor:
    """A contiguous mask whose dtype a kernel can load."""
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


# Triton path


def row_strides(logits: Tensor) -> tuple[int, int, int, int]:
    """T, stride_b, stride_t of row b * T + t, and the power of two <= 16 that divides them."""
    if logits.ndim == 2:
        T, stride_b, stride_t = max(logits.shape[0], 1), 0, logits.stride(0)
    else:
        T, stride_b, stride_t = logits.shape[1], logits.stride(0), logits.stride(1)
    return T, stride_b, stride_t, math.gcd(16, stride_b, stride_t)


def block_shape(V: int, rows: int) -> dict[str, int]:
    """[ROWS, COLS] of a block. It depends on V alone, so a row's result never depends on N."""
    cols = min(1024, 1 << max(V - 1, 0).bit_length())
    warp = 32
    if torch.version.hip:
        # wider warps; and registers for half as many elements, before scalars spill
        warp, rows = 64, rows // 2
    rows = min(rows, 1 << (-(-V // cols) - 1).bit_length())
    return {"ROWS": rows, "COLS": cols, "num_warps": THREADS // warp}


def _triton_fwd(
    logits, targets, mask, temperature, softcap, return_entropy, vocab_group, out: RowStats
):
    from .kernels.log_probs import log_probs_fwd_kernel

    V = logits.shape[-1]
    T, stride_b, stride_t, align = row_strides(logits)
    with device_guard(logits):
        log_probs_fwd_kernel[(targets.numel(),)](
            logits, targets, mask,
            out.log_probs, out.row_max, out.row_sum, out.entropy if return_entropy else None,
            None if vocab_group is None else out.target_logit,
            T, V, stride_b, stride_t,
            temperature, math.log2(math.e) / temperature, softcap,
            ALIGN=align, **block_shape(V, rows=8 if softcap is None else 4),
        )  # fmt: skip


def _triton_bwd(
    logits, targets, mask, row_max, row_sum, entropy, target_logit, grad_log_probs, grad_entropy,
    grad_loss, inv_denominator, temperature, softcap, vocab_group, grad_logits,
):  # fmt: skip
    from .kernels.log_probs import log_probs_bwd_kernel

    V = logits.shape[-1]
    T, stride_b, stride_t, align = row_strides(logits)
    # entropy and soft cap together need twice the registers per element
    rows = 2 if grad_entropy is not None and softcap is not None else 4
    with device_guard(logits):
        log_probs_bwd_kernel[(targets.numel(),)](
            logits, targets, mask, row_max, row_sum, entropy, target_logit,
            grad_log_probs, grad_entropy, grad_loss, inv_denominator,
            grad_logits,
            T, V, stride_b, stride_t,
            temperature, math.log2(math.e) / temperature, softcap,
            ALIGN=align, OUT_ALIGN=math.gcd(16, V), **block_shape(V, rows),
        )  # fmt: skip


# CPU path (also float64 on any device): row chunks that stay in cache


def _row_chunks(logits: Tensor, live: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of live rows: their indices (R,), and the rows themselves (R, V).

    Where logits are not contiguous, a chunk is a part of one sequence or several whole ones.
    """
    V = logits.shape[-1]
    x = logits.unsqueeze(0) if logits.ndim == 2 else logits
    if x.is_contiguous():
        x = x.view(1, -1, V)
    T = x.shape[1]
    size = max(_CHUNK_ELEMENTS // V, 2)
    sequences = max(size // T, 1)
    for b in range(0, x.shape[0], sequences):
        for t in range(0, T, size):
            block = x[b : b + sequences, t : t + size]
            first, count = b * T + t, block.shape[:2].numel()
            index = live[first : first + count].nonzero().squeeze(1)
            if len(index):
                rows = block.flatten(0, 1)
                yield index + first, rows if len(index) == count else rows.index_select(0, index)


def _load(rows: Tensor, softcap: float | None, buffer: Tensor) -> Tensor:
    """z: rows in the compute dtype, soft-capped; in the buffer unless they are that already."""
    if softcap is None and rows.dtype == buffer.dtype:
        return rows
    z = buffer[: len(rows)].copy_(rows)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _buffer(logits: Tensor) -> Tensor:
    """Room for a chunk, of two rows or more."""
    V = logits.shape[-1]
    size = max(min(_CHUNK_ELEMENTS // V, logits.numel() // V), 2)
    return torch.zeros(size, V, dtype=compute_dtype(logits.dtype), device=logits.device)


def _shift(z: Tensor, row_max: Tensor, temperature: float) -> Tensor:
    """(z - max) / temperature."""
    return (z - row_max[:, None]).div_(temperature)


def _softmax(z: Tensor, row_max: Tensor, temperature: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """p and total, such that p * total = e = exp((z - max) / temperature).

    torch.softmax is the fastest exponential there is on a CPU. Its own normaliser is too coarse for
    a large vocabulary, so it is taken out again: the largest e is 1.
    """
    # shifted before it is scaled: z / temperature would round large logits
    x = z if temperature == 1.0 else _shift(z, row_max, temperature)
    # in place when z stands in out: each element is read before it is written
    p = torch.softmax(x, 1, out=out)
    return p, 1.0 / p.amax(1)


def _others(p: Tensor, y: Tensor, buffer: Tensor) -> Tensor:
    """Sum of p without p_y, which becomes 0, for p in the first rows of the buffer.

    A reduction over a single row may be split among threads, over several never: so that a row's
    result does not depend on how many stand beside it, two are summed at least.
    """
    _put(p, y, torch.zeros_like(p[:, 0]))
    return buffer[: max(len(p), 2)].sum(1)[: len(p)]


def _put(x: Tensor, y: Tensor, value: Tensor) -> None:
    """x[i, y[i]] = value[i], but for a negative y."""
    at = y.clamp(min=0)[:, None]
    x.scatter_(1, at, torch.where(y[:, None] < 0, x.gather(1, at), value[:, None]))


def _target_logits(z: Tensor, y: Tensor) -> Tensor:
    """z[i, y[i]]; 0 for a negative y."""
    return torch.where(y < 0, 0.0, z.gather(1, y.clamp(min=0)[:, None]).squeeze(1))


def _times_log(p: Tensor, log_e: Tensor) -> Tensor:
    """p * log_e, 0 where p is 0; overwrites log_e."""
    return log_e.mul_(p).masked_fill_(p == 0, 0.0)


def _log_odds(
    row_max: Tensor, row_sum: Tensor, x_target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """d, and the rounding error of the sum that makes it (Knuth)."""
    a, b = (row_max - x_target) / temperature, row_sum.log()
    d = a + b
    b_part = d - a
    return d, (a - (d - b_part)) + (b - b_part)


def minus_softplus(d: Tensor, error: Tensor | None = None) -> Tensor:
    """-softplus(d + error): of log-odds against, the log-probability."""
    y = d.abs().neg().exp().log1p()
    if error is not None:
        y = y + torch.where((d > 0) & (error.abs() < 1), error, 0.0)
    return 0.0 - (d.clamp(min=0) + y)


def sigmoid(d: Tensor) -> Tensor:
    """1 / (1 + exp(-d)); torch.sigmoid on a CPU rounds by an element's place in the tensor."""
    return (1.0 + (-d).exp()).reciprocal()


def _all_or(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask != 0


def _checked_or_local(targets: Tensor, live: Tensor, V: int, vocab_group: str | None) -> Tensor:
    """Targets of live rows; local ones have been checked by all ranks together."""
    if vocab_group is not None:
        return targets
    return checked_targets(torch.where(live, targets, 0), V)


def _torch_fwd(
    logits, targets, mask, temperature, softcap, return_entropy, vocab_group, out: RowStats
):
    live = _all_or(mask, targets)
    targets = _checked_or_local(targets, live, logits.shape[-1], vocab_group)
    for x in out:
        x.zero_()
    buffer = _buffer(logits)
    for index, rows in _row_chunks(logits, live):
        y = targets[index]
        z = _load(rows, softcap, buffer)
        row_max = z.amax(1)
        x_target = _target_logits(z, y)
        log_e = _shift(z, row_max, temperature) if return_entropy else None
        p, total = _softmax(z, row_max, temperature, buffer[: len(y)])
        others = _others(p, y, buffer)
        row_sum = others * total
        if vocab_group is not None:
            log_sum = None if log_e is None else total * _times_log(p, log_e).sum(1) / math.log(2.0)
            _put_part(out, index, row_max, row_sum, x_target, log_sum)
            continue
        d, error = _log_odds(row_max, row_sum, x_target, temperature)
        log_prob = minus_softplus(d, error)
        out.log_probs[index] = log_prob
        out.row_max[index] = row_max
        out.row_sum[index] = row_sum
        if log_e is not None:
            log_q = minus_softplus(-d, -error)
            rest = row_sum.log() - _times_log(p, log_e).sum(1) / others - log_q
            out.entropy[index] = times_exp(log_q, rest) - times_exp(log_prob, log_prob)


def _put_part(out: RowStats, index, row_max, row_sum, x_target, log_sum) -> None:
    """What a part of the vocabulary contributes to rows. It may hold nothing but -inf."""
    empty = row_max == -math.inf
    out.row_max[index] = row_max.masked_fill(empty, 0.0)
    out.row_sum[index] = row_sum.masked_fill(empty, 0.0)
    out.target_logit[index] = x_target
    if log_sum is not None:
        out.entropy[index] = log_sum.masked_fill(empty, 0.0)


def _torch_bwd(
    logits, targets, mask, row_max, row_sum, entropy, target_logit, grad_log_probs, grad_entropy,
    grad_loss, inv_denominator, temperature, softcap, vocab_group, grad_logits,
):  # fmt: skip
    g = grad_log_probs.to(compute_dtype(logits.dtype))
    live = g != 0
    if grad_loss is not None:
        g = g * (grad_loss * inv_denominator)
        live &= g != 0
    if grad_entropy is not None:
        live |= grad_entropy != 0
    live &= _all_or(mask, targets)
    targets = _checked_or_local(targets, live, logits.shape[-1], vocab_group)
    out = grad_logits.view(-1, grad_logits.shape[-1])
    buffer = _buffer(logits)
    done = 0
    for index, rows in _row_chunks(logits, live):
        first, last = int(index[0]), int(index[-1]) + 1
        out[done:first] = 0
        done = last
        chunk = out[first:last]
        is_whole = len(chunk) == len(index)
        grad = _chunk_grad(
            _load(rows, softcap, buffer), targets[index],
            None if row_max is None else (row_max[index], row_sum[index]),
            None if target_logit is None else target_logit[index],
            g[index],
            None if grad_entropy is None else (entropy[index], grad_entropy[index]),
            temperature, softcap, buffer,
            chunk if is_whole and out.dtype == buffer.dtype else buffer[: len(index)],
        )  # fmt: skip
        if is_whole:
            if grad is not chunk:
                chunk.copy_(grad)
        else:
            chunk.zero_()
            out.index_copy_(0, index, grad.to(out.dtype))
    out[done:] = 0


def _chunk_grad(z, y, known, x_target, g, with_entropy, temperature, softcap, buffer, out):
    """dlogits of a chunk of loaded rows z, written to out. `known`: (row_max, row_sum) or None.

    x_target is given for a part of the vocabulary, whose own maximum may be less than row_max.
    """
    derivative = None if softcap is None else 1.0 - (z / softcap).square()
    is_part = x_target is not None
    if is_part:
        own_max = z.amax(1)
        empty = own_max == -math.inf
        z = z.masked_fill(empty[:, None], 0.0) if empty.any() else z
    else:
        x_target = _target_logits(z, y)
    row_max = z.amax(1) if known is None else known[0]
    log_e = _shift(z, row_max, temperature) if with_entropy is not None else None
    if known is None:
        p, total = _softmax(z, row_max, temperature, buffer[: len(y)])
        row_sum = _others(p, y, buffer) * total
    else:
        p, total = _softmax(z, row_max, temperature, out)
        row_sum = known[1]
        if is_part:
            total = total * ((own_max - row_max) / temperature).exp()
    d, error = _log_odds(row_max, row_sum, x_target, temperature)
    q = sigmoid(d)
    coef = torch.where(row_sum == 0, 0.0, q * total / row_sum)
    at_target = g * q
    if with_entropy is None or log_e is None:
        grad = torch.mul(p, (-g * coef)[:, None], out=out)
    else:
        entropy, h = with_entropy
        log_p = minus_softplus(d, error)
        at_target = at_target - h * times_exp(log_p, log_p + entropy)
        # -p_v * (g + h * (log p_v + entropy)), with log p_v = log_e_v + log q - log(row_sum)
        log_coef = torch.where(coef > 0, minus_softplus(-d, -error) - row_sum.log(), 0.0)
        factor = log_e.add_((log_coef + entropy)[:, None]).mul_(h[:, None]).add_(g[:, None])
        grad = torch.mul(_times_log(p, factor), -coef[:, None], out=out)
    _put(grad, y, at_target)
    if temperature != 1.0:
        grad.div_(temperature)
    return grad if derivative is None else grad.mul_(derivative)


def times_exp(log_p: Tensor, x: Tensor) -> Tensor:
    """exp(log_p) * x, 0 where log_p is -inf."""
    return (log_p.exp() * x).masked_fill(log_p == -math.inf, 0.0)
