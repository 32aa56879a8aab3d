"""verl: the settings that turn the fused loss and the fused forward on.

Every worker has to register them before it builds its model. `external_lib` names a module that
verl imports there, and this file is such a module:

    PYTHONPATH=examples python -m verl.trainer.main_ppo $(python examples/verl_settings.py) ...

Run by itself, it prints the settings. It also calls the loss that is registered, which needs no
verl, and compares loss and gradient with the definition in float64.
"""

import sys
from types import SimpleNamespace

import torch

from gspo_ops import GSPOToken, reference
from gspo_ops.integrations import verl
from gspo_ops.testing import relative

CLIP_LOW, CLIP_HIGH, AVERAGE = 3e-4, 4e-4, "seq-mean-token-mean"  # those of the GSPO paper
SETTINGS = {
    "algorithm.adv_estimator": "grpo",
    "actor_rollout_ref.model.external_lib": "verl_settings",
    "actor_rollout_ref.model.use_fused_kernels": True,
    "actor_rollout_ref.model.fused_kernel_options.impl_backend": verl.NAME,
    "actor_rollout_ref.actor.policy_loss.loss_mode": verl.NAME,
    "actor_rollout_ref.actor.loss_agg_mode": AVERAGE,
    "actor_rollout_ref.actor.clip_ratio_low": CLIP_LOW,
    "actor_rollout_ref.actor.clip_ratio_high": CLIP_HIGH,
}


def check_loss() -> tuple[float, float]:
    """Return the relative errors of the registered loss and its gradient against float64."""
    torch.manual_seed(0)
    mask = torch.arange(12) < torch.tensor([[12], [5], [9], [12]])
    old = -3 * torch.rand(4, 12)
    log_probs = (old + torch.tensor([[1e-4], [2e-3], [-2e-4], [-2e-3]])).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None].expand(4, 12)
    # the fields of verl's ActorConfig that GSPO reads
    config = SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=CLIP_LOW, clip_ratio_high=CLIP_HIGH, global_batch_info={}
    )
    loss, metrics = verl.policy_loss(
        old, log_probs, advantages, mask, loss_agg_mode=AVERAGE, config=config
    )
    loss.backward()
    exact = log_probs.detach().double().requires_grad_()
    expected, _ = reference.policy_loss_from_log_probs(
        exact, old.double(), advantages.double(), mask=mask, objective=GSPOToken()
    )
    expected.backward()
    print(f"actor/pg_clipfrac {metrics['actor/pg_clipfrac']:.3f}", file=sys.stderr)
    return relative(loss.detach(), expected.detach()), relative(log_probs.grad, exact.grad)


if __name__ == "__main__":
    print("\n".join(f"{key}={value}" for key, value in SETTINGS.items()))
    of_loss, of_gradient = check_loss()
    print(f"loss off by {of_loss:.1e}, gradient by {of_gradient:.1e}", file=sys.stderr)
else:  # imported by a worker of verl
    verl.register()
    verl.skip_zero_advantages()
