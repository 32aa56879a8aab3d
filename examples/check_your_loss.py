"""Check your own trainer's loss against the reference, on inputs that show common mistakes.

`gspo_ops.testing` makes ragged batches whose ratios lie on both sides of the clip range, some of
them 5e-6 from its edges. `gspo_ops.reference` is the definition, here in float64. Replace
`your_loss`: it is right if its gradient is off by rounding only, as it is in the first line of the
table.

    python examples/check_your_loss.py
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gspo_ops import GSPO, reference
from gspo_ops.testing import make_case, relative, synthetic_logits

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
ROUNDING = 1e-5


def your_loss(
    logits: Tensor,
    targets: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    log_probs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    ratio = (((log_probs - old_log_probs) * mask).sum(1) / mask.sum(1)).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def by_length(advantages: Tensor, mask: Tensor) -> Tensor:
    """Scale advantages so that the mean over sequences becomes one over tokens."""
    lengths = mask.sum(1).float()
    return advantages * lengths / lengths.mean()


LOSSES: dict[str, Loss] = {
    "your loss": your_loss,
    "averaged over tokens": lambda x, y, old, a, m: your_loss(x, y, old, by_length(a, m), m),
    "clip range of PPO": lambda *batch: your_loss(*batch, clip_low=0.2, clip_high=0.2),
    "padding counted": lambda *batch: your_loss(*batch[:4], torch.ones_like(batch[4])),
    "logits in bfloat16": lambda x, *rest: your_loss(x.bfloat16().float(), *rest),
    "old log-probs in bfloat16": lambda x, y, old, *rest: your_loss(x, y, old.bfloat16(), *rest),
}


def gradient_error(loss: Loss) -> float:
    """Return the relative L2 distance of d loss / d logits from the reference in float64."""
    case = make_case(
        synthetic_logits(33, 24, 300, device=torch.device("cpu")), GSPO(), packed=False
    )
    kept = case.lengths > 0  # the case has a response without a token, which few trainers allow
    mask, advantages, old = case.mask[kept], case.advantages[kept], case.old_log_probs[kept]
    targets = case.targets[kept].clamp(min=0)
    exact = case.double().logits[kept].requires_grad_()  # 0 where masked; case.logits has NaN there
    logits = exact.detach().float().requires_grad_()
    loss(logits, targets, old, advantages, mask).backward()
    expected, _ = reference.policy_loss_from_logits(
        exact, targets, old.double(), advantages.double(), mask=mask, objective=GSPO()
    )
    expected.backward()
    return relative(logits.grad, exact.grad)


def main() -> None:
    for name, loss in LOSSES.items():
        error = gradient_error(loss)
        print(f"{name:26} {error:8.1e}  {'right' if error <= ROUNDING else 'WRONG'}")


if __name__ == "__main__":
    main()
