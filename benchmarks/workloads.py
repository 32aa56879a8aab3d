"""What is timed: operands, a batch around them, exact results, and the least work they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gspo_ops import reference

Path = Literal["logits", "hidden"]
Lengths = Literal["square", "ragged"]
SEQUENCES = 16


class Batch(NamedTuple):
    """Attributes:
    targets: (B, T) tokens.
    mask: (B, T) bool, True at tokens of a response.
    old: (B, T) fp32 log-probs of the policy that sampled them.
    advantages: (B,) fp32.
    """

    targets: Tensor
    mask: Tensor
    old: Tensor
    advantages: Tensor

    def of(self, sequence: int) -> Batch:
        """One sequence as a batch."""
        return Batch(*(x[sequence : sequence + 1] for x in self))


class Workload(NamedTuple):
    """Attributes:
    operands: logits (B, T, V) alone; or hidden states (B, T, H) and the head's weight (V, H).
    batch: what else the loss takes.
    live: (B,) bool, which sequences have a gradient.
    """

    operands: tuple[Tensor, ...]
    batch: Batch
    live: Tensor

    @property
    def rows(self) -> tuple[int, int, int]:
        """All, those of a response, and those with a gradient."""
        lengths = self.batch.mask.sum(1)
        return self.batch.mask.numel(), int(lengths.sum()), int(lengths[self.live].sum())

    def leaves(self) -> tuple[Tensor, ...]:
        """The operands, each that had a gradient with a new one."""
        return tuple(x.detach().requires_grad_(x.requires_grad) for x in self.operands)

    def one(self, sequence: int) -> tuple[Tensor, ...]:
        """The operands of one sequence, in float64."""
        x, *rest = self.operands
        parts = x[sequence : sequence + 1], *rest
        return tuple(
            part.detach().double().requires_grad_(x.requires_grad)
            for part, x in zip(parts, self.operands, strict=True)
        )


def make_workload(
    path: Path,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    f: float,
    device: torch.device,
    *,
    lengths: Lengths = "square",
    frozen_head: bool = False,
) -> Workload:
    """16 sequences of sampled tokens, a fraction f of which have a gradient.

    The others have no advantage, or are clipped, in turn. Ratios are far on either side of the clip
    range: whatever the rounding of a provider, all have the same live rows.

    Args:
        path: what the operands are.
        shape: N, V and H; N is a multiple of 16, and H of no account from logits.
        dtype: of the operands.
        f: fraction of the sequences.
        device: where they are.
        lengths: `"square"`, or `"ragged"`: log-normal lengths with a long tail, padded.
        frozen_head: the weight has no gradient.
    """
    N, V, H = shape
    T = N // SEQUENCES
    generator = torch.Generator().manual_seed(0)
    if path == "logits":
        x = 3 * torch.randn(SEQUENCES, T, V, generator=generator)
        operands: tuple[Tensor, ...] = (x.to(device, dtype).requires_grad_(),)
    else:
        x = torch.randn(SEQUENCES, T, H, generator=generator)
        weight = torch.randn(V, H, generator=generator) * 3 / H**0.5
        operands = (
            x.to(device, dtype).requires_grad_(),
            weight.to(device, dtype).requires_grad_(not frozen_head),
        )
    targets, new = _sample(operands, generator)
    advantages = torch.randn(SEQUENCES, generator=generator)
    live = torch.zeros(SEQUENCES, dtype=torch.bool)
    live[: round(SEQUENCES * f)] = True
    dead = (~live).nonzero().squeeze(1)
    advantages[dead[0::2]] = 0
    # a positive advantage is clipped above 1, a negative one below
    log_ratio = 0.1 * torch.where(live, -advantages.sign(), advantages.sign())
    mask = torch.ones(SEQUENCES, T, dtype=torch.bool)
    if lengths == "ragged":
        of = (T / 4 * torch.randn(SEQUENCES, generator=generator).exp()).clamp(1, T).int()
        mask = torch.arange(T) < of[:, None]
    old = new - log_ratio.to(device)[:, None]
    return Workload(
        operands,
        Batch(targets, mask.to(device), old, advantages.to(device)),
        live.to(device),
    )


@torch.no_grad()
def _sample(operands: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) drawn from the operands' distributions, and their log-probs in fp32."""
    x, *head = (x.detach() for x in operands)
    targets = torch.empty(x.shape[:-1], dtype=torch.long, device=x.device)
    new = torch.empty(x.shape[:-1], device=x.device)
    noise_generator = torch.Generator(x.device).manual_seed(generator.initial_seed())
    for b, rows in enumerate(x):
        logits = rows.float() if not head else rows.float() @ head[0].float().mT
        log_p = logits.log_softmax(-1)
        noise = torch.empty_like(log_p).exponential_(generator=noise_generator)
        targets[b] = (log_p - noise.log_()).argmax(-1)
        new[b] = log_p.gather(-1, targets[b, :, None]).squeeze(-1)
    return targets, new


class Exact(NamedTuple):
    """Attributes:
    loss: in float64.
    grads: of the operands, in float64; None where there is none.
    noise: standard deviation of the loss when each ratio has an independent error of 1.
    """

    loss: float
    grads: tuple[Tensor | None, ...]
    noise: float


def exact(workload: Workload) -> Exact:
    """In float64, sequence after sequence."""
    from_logits = len(workload.operands) == 1
    of: Callable[..., tuple[Tensor, dict]] = (
        reference.policy_loss_from_logits if from_logits else reference.policy_loss_from_hidden
    )
    grads = [
        torch.zeros(x.shape, dtype=torch.float64, device=x.device) if x.requires_grad else None
        for x in workload.operands
    ]
    total = 0.0
    for b in workload.batch.advantages.nonzero().flatten().tolist():
        operands, batch = workload.one(b), workload.batch.of(b)
        loss, _ = of(
            *operands, batch.targets, batch.old.double(), batch.advantages.double(),
            mask=batch.mask, denominator=float(len(workload.live)),
        )  # fmt: skip
        total += loss.item()
        if not workload.live[b]:
            continue
        loss.backward()
        for to, x in zip(grads, operands, strict=True):
            if to is not None and x.grad is not None:
                (to[b : b + 1] if x is operands[0] else to).add_(x.grad)
    weight = workload.batch.advantages[workload.live].double()
    return Exact(total, tuple(grads), (weight.square().sum().sqrt() / len(workload.live)).item())


class Floor(NamedTuple):
    """The least that any implementation does: bytes of logits moved, or FLOPs of products."""

    bytes: float
    flops: float

    def seconds(self, bandwidth: float, rate: float) -> float:
        """At so many bytes and FLOPs per second."""
        return max(self.bytes / bandwidth, self.flops / rate)


def floor(workload: Workload) -> Floor:
    """From logits: the forward reads them, the backward reads those of live rows and writes all.

    From hidden states: 2 N V H for the logits, as much for each gradient of live rows.
    """
    every, valid, live = workload.rows
    if len(workload.operands) == 1:
        (logits,) = workload.operands
        return Floor((valid + live + every) * logits.shape[-1] * logits.itemsize, 0.0)
    V, H = workload.operands[1].shape
    gradients = sum(x.requires_grad for x in workload.operands)
    return Floor(0.0, 2.0 * V * H * (valid + gradients * live))
