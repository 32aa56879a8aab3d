"""An objective of your own: a function of log-probs, differentiated by autograd.

The example is TOPR (arXiv 2503.14286): sequences with a positive advantage have no importance
weight, and those with a negative one have their ratio, at most 1. A function gets flat tensors (N,)
of the tokens, and says which it clipped, for the statistics. It needs no kernel: logits, padding
and averaging are taken care of. Its gradient is compared with that of plain PyTorch.

    python examples/own_objective.py
"""

import torch
from torch import Tensor

from gspo_ops import policy_loss_from_logits
from gspo_ops.testing import relative

B, T, V = 8, 10, 100


def topr(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return -w_i A_i log_prob_t: w_i is min(pi(y_i) / pi_old(y_i), 1) for A_i < 0, else 1."""
    log_ratio = log_probs.new_zeros(len(lengths)).index_add(
        0, sequence_ids, (log_probs - old_log_probs).detach()
    )
    log_ratios = log_ratio[sequence_ids]
    is_negative = advantages < 0
    weights = torch.where(is_negative, log_ratios.clamp(max=0).exp(), 1.0)
    return -weights * advantages * log_probs, is_negative & (log_ratios > 0)


topr.aggregation = "seq-mean-token-sum"  # the log-prob of a sequence, averaged over sequences


def plain(logits: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Compute the same loss in plain PyTorch."""
    log_probs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    log_prob = (log_probs * mask).sum(1)
    ratio = (log_prob - (old * mask).sum(1)).exp().detach()
    weights = torch.where(advantages < 0, ratio.clamp(max=1), 1.0)
    return -(weights * advantages * log_prob).mean()


def main() -> None:
    torch.manual_seed(0)
    logits = torch.randn(B, T, V, requires_grad=True)
    targets = torch.randint(V, (B, T))
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
    log_probs = logits.detach().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    old = log_probs + 0.1 * torch.randn(B, T)
    advantages = torch.randn(B)

    loss, stats = policy_loss_from_logits(
        logits, targets, old, advantages, mask=mask, objective=topr
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    expected = plain(exact, targets, old.double(), advantages.double(), mask)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    print(f"loss {loss.item():+.6f}, in plain PyTorch {expected.item():+.6f}")
    print(f"gradient off by {relative(gradient, expected_gradient):.1e}")
    print(f"clipped sequences {stats['clip_frac_sequences']:.3f}")


if __name__ == "__main__":
    main()
