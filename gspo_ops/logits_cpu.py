"""Log-probs from logits, and their gradient, in torch: on a CPU, and in float64 on any device.

Rows are processed in chunks that fit the cache. The derivation is in `kernels/logits.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import compute_dtype
from .checks import checked_targets
from .softmax import LogOdds, Softmax, Upstream, sum_with_error, times_exp

_CHUNK_ELEMENTS = 1 << 20  # 4 MiB of fp32
_LOG_OF_ZERO = -2048.0  # its exponential is 0 in all dtypes; 0 * log(0) must be 0


class LogitStats(NamedTuple):
    """The results of the forward, (N,) each; 0 for rows that are left out."""

    log_probs: Tensor
    row_max: Tensor  # maximum of the others' logits, or of all, before the temperature
    row_sum: Tensor  # sum of the others' exponentials, relative to row_max
    entropy: Tensor  # (0,) unless requested
    target_logit: Tensor  # (0,) unless the vocabulary is sharded


class LogitPart(NamedTuple):
    """The contribution of a shard of the vocabulary to each row, (N,) each."""

    row_max: Tensor
    row_sum: Tensor
    target_logit: Tensor  # 0 if another part has it
    log_sum: Tensor | None  # sum of e * log2(e), if the entropy is requested


class SavedLogits(NamedTuple):
    """The record that the backward reads: the logits, and results of their rows, (N,) each.

    Attributes:
        row_max, row_sum: None if the forward has not read the logits.
        entropy: None if it has no gradient.
        target_logit: None if it is among the logits, as in a vocabulary that is not sharded.
    """

    logits: Tensor
    targets: Tensor
    mask: Tensor | None
    row_max: Tensor | None
    row_sum: Tensor | None
    entropy: Tensor | None
    target_logit: Tensor | None


def torch_fwd(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    softmax: Softmax,
    out: LogitStats | LogitPart,
) -> None:
    """Fill `out` for rows with a non-zero mask, and with 0 elsewhere."""
    for x in out:
        if x is not None:
            x.zero_()
    live = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask != 0
    targets = _checked_or_local(targets, live, logits.shape[-1], softmax)
    buffer = _buffer(logits)
    for index, rows in _row_chunks(logits, live):
        y = targets[index]
        z = _load(rows, softmax.softcap, buffer)
        row_max, x_target = z.amax(1), _target_logits(z, y)
        log_e = _log_exp(z, row_max, softmax.temperature) if softmax.return_entropy else None
        p, total = _softmax(z, row_max, softmax.temperature, buffer[: len(y)])
        others = _others(p, y, buffer)
        log_sum = None if log_e is None else log_e.mul_(p).sum(1)
        if isinstance(out, LogitPart):
            if log_sum is not None:
                log_sum = total * log_sum / math.log(2.0)
            _put_part(out, index, LogitPart(row_max, others * total, x_target, log_sum))
            continue
        row_sum = others * total
        odds = log_odds(row_max, row_sum, x_target, softmax)
        log_prob = odds.log_p()
        out.log_probs[index] = log_prob
        out.row_max[index] = row_max
        out.row_sum[index] = row_sum
        if log_sum is not None:
            out.entropy[index] = odds.entropy(log_prob, row_sum, log_sum / others)


def _put_part(out: LogitPart, index: Tensor, part: LogitPart) -> None:
    """Write a chunk's results for a part of the vocabulary, which may hold nothing but -inf."""
    empty = part.row_max == -math.inf
    out.row_max[index] = part.row_max.masked_fill(empty, 0.0)
    out.row_sum[index] = part.row_sum.masked_fill(empty, 0.0)
    out.target_logit[index] = part.target_logit
    if out.log_sum is not None and part.log_sum is not None:
        out.log_sum[index] = part.log_sum.masked_fill(empty, 0.0)


class _Rows(NamedTuple):
    """The numbers that determine the gradient of each row, (R,) each; see `SavedLogits`."""

    targets: Tensor
    row_max: Tensor | None
    row_sum: Tensor | None
    entropy: Tensor | None
    target_logit: Tensor | None
    g: Tensor
    h: Tensor | None

    def take(self, index: Tensor) -> _Rows:
        return _Rows(*[None if x is None else x[index] for x in self])  # type: ignore[arg-type]


def torch_bwd(saved: SavedLogits, upstream: Upstream, softmax: Softmax, out: Tensor) -> None:
    """Write d loss / d logits to `out` (..., V)."""
    logits, targets = saved.logits, saved.targets
    g, h = upstream.log_probs.to(compute_dtype(logits.dtype)), upstream.entropy
    live = g != 0
    if (scale := upstream.scale()) is not None:
        g = g * scale
        live &= g != 0
    if h is not None:
        live |= h != 0
    if saved.mask is not None:
        live &= saved.mask != 0
    if saved.row_max is None:  # otherwise, the forward has checked them
        targets = _checked_or_local(targets, live, logits.shape[-1], softmax)
    else:
        targets = torch.where(live, targets, 0).long()
    known = _Rows(targets, saved.row_max, saved.row_sum, saved.entropy, saved.target_logit, g, h)
    out = out.view(-1, out.shape[-1])
    buffer = _buffer(logits)
    done = 0
    for index, rows in _row_chunks(logits, live):
        first, last = int(index[0]), int(index[-1]) + 1
        out[done:first] = 0
        done = last
        chunk = out[first:last]
        is_whole = len(chunk) == len(index)
        to = chunk if is_whole and out.dtype == buffer.dtype else buffer[: len(index)]
        z = _load(rows, softmax.softcap, buffer)
        _chunk_grad(z, known.take(index), softmax, buffer, to)
        if not is_whole:
            chunk.zero_()
            out.index_copy_(0, index, to.to(out.dtype))
        elif to is not chunk:
            chunk.copy_(to)
    out[done:] = 0


def _chunk_grad(z: Tensor, rows: _Rows, softmax: Softmax, buffer: Tensor, out: Tensor) -> None:
    """Write d loss / d logits of loaded rows z to `out`.

    z may lie in the buffer, or be the logits themselves; `out` may be the buffer's first rows.
    """
    softcap, temperature = softmax.softcap, softmax.temperature
    derivative = None if softcap is None else 1.0 - (z / softcap).square()
    e = _exponentials(z, rows, softmax, buffer, out)
    q = e.odds.q()
    coef = torch.where(e.row_sum == 0, 0.0, q * e.total / e.row_sum)
    at_target = rows.g * q
    if e.log is None or rows.entropy is None or rows.h is None:
        torch.mul(e.p, (-rows.g * coef)[:, None], out=out)
    else:
        log_p, h = e.odds.log_p(), rows.h
        at_target = at_target - h * times_exp(log_p, log_p + rows.entropy)
        # -p_v * (g + h * (log p_v + entropy)), with log p_v = log_e_v + log q - log(row_sum)
        log_coef = torch.where(coef > 0, e.odds.log_q() - e.row_sum.log(), 0.0)
        factor = e.log.add_((log_coef + rows.entropy)[:, None])
        factor = factor.mul_(h[:, None]).add_(rows.g[:, None])
        torch.mul(factor.mul_(e.p), -coef[:, None], out=out)
    _put(out, rows.targets, at_target)
    if temperature != 1.0:
        out.div_(temperature)
    if derivative is not None:
        out.mul_(derivative)


class _Exponentials(NamedTuple):
    """Exponentials e = exp((z - row_max) / temperature) = p * total of rows, and their odds."""

    p: Tensor  # (R, V)
    total: Tensor
    row_sum: Tensor
    odds: LogOdds
    log: Tensor | None  # (R, V) log(e), where the entropy has a gradient


def _exponentials(
    z: Tensor, rows: _Rows, softmax: Softmax, buffer: Tensor, out: Tensor
) -> _Exponentials:
    """Compute those of loaded rows z; p is in `out`, or in the buffer if row_sum is unknown."""
    temperature = softmax.temperature
    if rows.row_max is None or rows.row_sum is None:
        row_max, x_target = z.amax(1), _target_logits(z, rows.targets)
        p, total = _softmax(z, row_max, temperature, buffer[: len(z)])
        row_sum = _others(p, rows.targets, buffer) * total
        return _Exponentials(p, total, row_sum, log_odds(row_max, row_sum, x_target, softmax), None)
    own_max = None
    if rows.target_logit is None:
        x_target = _target_logits(z, rows.targets)
    else:  # a part, whose own maximum may be less than that of the row
        x_target, own_max = rows.target_logit, z.amax(1)
        empty = own_max == -math.inf
        z = z.masked_fill(empty[:, None], 0.0) if empty.any() else z
    log_e = None if rows.h is None else _log_exp(z, rows.row_max, temperature)
    p, total = _softmax(z, rows.row_max, temperature, out)
    if own_max is not None:
        total = total * ((own_max - rows.row_max) / temperature).exp()
    odds = log_odds(rows.row_max, rows.row_sum, x_target, softmax)
    return _Exponentials(p, total, rows.row_sum, odds, log_e)


def log_odds(row_max: Tensor, row_sum: Tensor, x_target: Tensor, softmax: Softmax) -> LogOdds:
    """Return the log-odds of the other tokens against the target."""
    return sum_with_error((row_max - x_target) / softmax.temperature, row_sum.log())


# Chunks


def _row_chunks(logits: Tensor, live: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of live rows: their indices (R,), and the rows themselves (R, V).

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


def _buffer(logits: Tensor) -> Tensor:
    """Return room for a chunk, at least two rows. Rows beyond those of a chunk must not be NaN."""
    V = logits.shape[-1]
    size = max(min(_CHUNK_ELEMENTS // V, logits.numel() // V), 2)
    return torch.zeros(size, V, dtype=compute_dtype(logits.dtype), device=logits.device)


def _load(rows: Tensor, softcap: float | None, buffer: Tensor) -> Tensor:
    """Return z: rows in the compute dtype, soft-capped; in the buffer unless they are unchanged."""
    if softcap is None and rows.dtype == buffer.dtype:
        return rows
    z = buffer[: len(rows)].copy_(rows)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _shift(z: Tensor, row_max: Tensor, temperature: float) -> Tensor:
    """Return (z - max) / temperature."""
    return (z - row_max[:, None]).div_(temperature)


def _log_exp(z: Tensor, row_max: Tensor, temperature: float) -> Tensor:
    """Return log(e), finite where e is 0."""
    return _shift(z, row_max, temperature).clamp_(min=_LOG_OF_ZERO)


def _softmax(z: Tensor, row_max: Tensor, temperature: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return p and total, such that p * total = e = exp((z - max) / temperature).

    torch.softmax is the fastest exponential on a CPU. Its own normaliser is too coarse for a large
    vocabulary, so it is divided out again: the largest e is 1.
    """
    # shifted before it is scaled, because z / temperature would round large logits
    x = z if temperature == 1.0 else _shift(z, row_max, temperature)
    # z may be in out: each element is read before it is written
    p = torch.softmax(x, 1, out=out)
    return p, 1.0 / p.amax(1)


def _others(p: Tensor, y: Tensor, buffer: Tensor) -> Tensor:
    """Sum p without p_y, which is set to 0, for p in the first rows of the buffer.

    A reduction of a single row may be split among threads, which never happens with several rows.
    At least two are summed, so that a row's result does not depend on the number of rows.
    """
    _put(p, y, torch.zeros_like(p[:, 0]))
    return buffer[: max(len(p), 2)].sum(1)[: len(p)]


def _put(x: Tensor, y: Tensor, value: Tensor) -> None:
    """Set x[i, y[i]] = value[i], except for a negative y[i]."""
    at = y.clamp(min=0)[:, None]
    x.scatter_(1, at, torch.where(y[:, None] < 0, x.gather(1, at), value[:, None]))


def _target_logits(z: Tensor, y: Tensor) -> Tensor:
    """Return z[i, y[i]]; 0 for a negative y[i]."""
    return torch.where(y < 0, 0.0, z.gather(1, y.clamp(min=0)[:, None]).squeeze(1))


def _checked_or_local(targets: Tensor, live: Tensor, V: int, softmax: Softmax) -> Tensor:
    """Return the targets of live rows; all ranks together have checked local ones."""
    if softmax.vocab_group is not None:
        return targets
    return checked_targets(torch.where(live, targets, 0), V)
