"""The timed workloads: operands, their batch, exact results, and the least possible work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gspo_ops import reference

Path = Literal["logits", "hidden"]
Lengths = Literal["square", "ragged"]
SEQUENCES = 16
_PART = 1 << 26  # number of elements that are drawn at a time


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
        """Return one sequence as a batch."""
        return Batch(*(x[sequence : sequence + 1] for x in self))


class Workload(NamedTuple):
    """Attributes:
    operands: logits (B, T, V) alone; or hidden states (B, T, H) and the head's weight (V, H).
    batch: further arguments of the loss.
    live: (B,) bool, True for sequences with a gradient.
    """

    operands: tuple[Tensor, ...]
    batch: Batch
    live: Tensor

    @property
    def rows(self) -> tuple[int, int, int]:
        """The numbers of all rows, of rows of responses, and of rows with a gradient."""
        lengths = self.batch.mask.sum(1)
        return self.batch.mask.numel(), int(lengths.sum()), int(lengths[self.live].sum())

    def leaves(self) -> tuple[Tensor, ...]:
        """Return the operands as new leaves, which require a gradient if the operands do."""
        return tuple(x.detach().requires_grad_(x.requires_grad) for x in self.operands)

    def one(self, sequence: int) -> tuple[Tensor, ...]:
        """Return the operands of one sequence in float64."""
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
    """Call `draw` and give a fraction f of the sequences a gradient."""
    return draw(path, shape, dtype, device, frozen_head=frozen_head).at(f, lengths)


class Drawn(NamedTuple):
    """Attributes:
    operands: operands of a `Workload`.
    targets: (B, T) tokens sampled from the operands' distributions.
    log_probs: (B, T) fp32 log-probs of the targets.
    """

    operands: tuple[Tensor, ...]
    targets: Tensor
    log_probs: Tensor

    def at(self, f: float, lengths: Lengths = "square") -> Workload:
        """Return a workload of these tensors in which a fraction f of the sequences has a gradient.

        The others alternately have no advantage and are clipped. Ratios are far outside the clip
        range, so that all providers have the same live rows, whatever their rounding.

        Args:
            f: fraction of sequences with a gradient.
            lengths: `"square"`, or `"ragged"` for log-normal lengths with a long tail, padded.
        """
        device, T = self.targets.device, self.targets.shape[1]
        generator = torch.Generator().manual_seed(1)
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
        old = self.log_probs - log_ratio.to(device)[:, None]
        batch = Batch(self.targets, mask.to(device), old, advantages.to(device))
        return Workload(self.operands, batch, live.to(device))


def draw(
    path: Path,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    frozen_head: bool = False,
) -> Drawn:
    """Draw 16 sequences of sampled tokens on the device that uses them.

    Args:
        path: kind of the operands.
        shape: N, V and H; N is a multiple of 16, and H is ignored for logits.
        dtype: dtype of the operands.
        device: device of the operands.
        frozen_head: whether the weight has no gradient.
    """
    N, V, H = shape
    T = N // SEQUENCES
    generator = torch.Generator(device).manual_seed(0)
    if path == "logits":
        logits = normal(SEQUENCES, T, V, scale=3.0, dtype=dtype, generator=generator)
        operands: tuple[Tensor, ...] = (logits.requires_grad_(),)
    else:
        weight = normal(V, H, scale=3 / H**0.5, dtype=dtype, generator=generator)
        hidden = normal(SEQUENCES, T, H, scale=1.0, dtype=dtype, generator=generator)
        operands = hidden.requires_grad_(), weight.requires_grad_(not frozen_head)
    return Drawn(operands, *_sample(operands, generator))


def normal(*size: int, scale: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw on the generator's device in parts: all of it in fp32 would double the memory."""
    out = torch.empty(size, dtype=dtype, device=generator.device)
    for part in out.split(max(_PART // out[0].numel(), 1)):
        part.copy_(torch.randn(part.shape, generator=generator, device=out.device) * scale)
    return out


@torch.no_grad()
def _sample(operands: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw tokens (B, T) from the operands' distributions; return them and their fp32 log-probs."""
    x, *head = (x.detach() for x in operands)
    targets = torch.empty(x.shape[:-1], dtype=torch.long, device=x.device)
    new = torch.empty(x.shape[:-1], device=x.device)
    for b, rows in enumerate(x):
        logits = rows.float() if not head else rows.float() @ head[0].float().mT
        log_p = logits.log_softmax(-1)
        noise = torch.empty_like(log_p).exponential_(generator=generator)
        targets[b] = (log_p - noise.log_()).argmax(-1)
        new[b] = log_p.gather(-1, targets[b, :, None]).squeeze(-1)
    return targets, new


class Exact(NamedTuple):
    """Attributes:
    loss: the loss in float64.
    grads: gradients of the operands in float64; None for an operand without one.
    noise: standard deviation of the loss when each ratio has an independent error of 1.
    """

    loss: float
    grads: tuple[Tensor | None, ...]
    noise: float


def exact(workload: Workload) -> Exact:
    """Compute the exact results in float64, one sequence after the other."""
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
        """Return the time at given rates, in bytes per second and FLOPs per second."""
        return max(self.bytes / bandwidth, self.flops / rate)


def floor(workload: Workload) -> Floor:
    """Return the least work of a workload.

    From logits, the forward reads those of responses, and the backward reads those of live rows and
    writes all gradients. From hidden states, the logits of responses take 2 N V H FLOPs, and each
    gradient takes as many over the live rows.
    """
    every, valid, live = workload.rows
    if len(workload.operands) == 1:
        (logits,) = workload.operands
        return Floor((valid + live + every) * logits.shape[-1] * logits.itemsize, 0.0)
    V, H = workload.operands[1].shape
    gradients = sum(x.requires_grad for x in workload.operands)
    return Floor(0.0, 2.0 * V * H * (valid + gradients * live))
