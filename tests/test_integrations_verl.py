"""The registered loss beside verl's own, on the same tensors."""

import importlib.util

import pytest
import torch

from gspo_ops.integrations import verl as ours

if importlib.util.find_spec("verl") is None:
    pytest.skip("needs verl: pip install --no-deps verl, and what it imports",
                allow_module_level=True)  # fmt: skip
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
from verl.workers.config import ActorConfig, FSDPActorConfig, PolicyLossConfig  # noqa: E402

MODES = list(ours._AGGREGATIONS)
INFOS = {
    "counted here": {},
    "global": {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9},
    "scaled": {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9,
               "loss_scale_factor": 50},
}  # fmt: skip


def make_config(info, **options):
    config = FSDPActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=3e-4, clip_ratio_high=4e-4,
        policy_loss=PolicyLossConfig(loss_mode=ours.register()), **options,
    )  # fmt: skip
    assert isinstance(config, ActorConfig)
    config.global_batch_info.update(info)
    return config


def make_batch(dtype, per_token):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(6, 8, dtype=torch.long)
    mask[1, 3:] = 0
    mask[2] = 0  # no token at all
    mask[4, ::2] = 0
    old = -torch.rand(6, 8, generator=generator, dtype=torch.float64) * 5
    shift = torch.tensor([1e-4, 3.5e-4, 0.1, -2e-4, -5e-4, 5e-4], dtype=torch.float64)
    noise = torch.randn(6, 8, generator=generator, dtype=torch.float64) * 1e-4
    new = old + shift[:, None] + noise
    advantages = torch.randn(6, 8 if per_token else 1, generator=generator, dtype=torch.float64)
    weights = 0.5 + torch.rand(6, 8, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (old, new, advantages.expand(6, 8).contiguous(), weights)] + [mask]


def run(function, config, mode, dtype, per_token, weighted):
    old, new, advantages, weights, mask = make_batch(dtype, per_token)
    new.requires_grad_()
    loss, metrics = function(
        old, new, advantages, mask, mode, config, weights if weighted else None
    )
    (3.0 * loss).backward()
    return loss.detach(), new.grad, metrics


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_verl_s_own(dtype, mode, info, per_token, weighted):
    config = make_config(INFOS[info])
    theirs = run(core_algos.get_policy_loss_fn("gspo"), config, mode, dtype, per_token, weighted)
    name = config.policy_loss.loss_mode
    mine = run(core_algos.get_policy_loss_fn(name), config, mode, dtype, per_token, weighted)
    tolerance = 1e-7 if dtype == torch.float64 else 2e-6  # verl divides by a length plus 1e-8
    for a, b in zip(mine[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=tolerance)
    assert (mine[1] == 0).sum() == (theirs[1] == 0).sum() > 0
    for key, value in theirs[2].items():
        assert mine[2][key] == pytest.approx(value, abs=2e-7), key
    assert mine[2]["gspo_ops/active_token_frac"] < 1


def test_padding_may_hold_anything():
    config = make_config({})
    old, new, advantages, _, mask = make_batch(torch.float32, False)
    expected, _ = ours.policy_loss(old, new, advantages, mask, config=config)
    new = torch.where(mask == 0, torch.nan, new).requires_grad_()
    loss, _ = ours.policy_loss(old, new, advantages, mask, config=config)
    loss.backward()
    assert torch.equal(loss, expected)
    assert (new.grad[mask == 0] == 0).all()


def test_wrong_uses_are_refused():
    old, new, advantages, _, mask = make_batch(torch.float32, False)
    with pytest.raises(ValueError, match=r"loss_agg_mode must be one of 'token-mean'.*got 'mean'"):
        ours.policy_loss(old, new, advantages, mask, "mean", make_config({}))
    with pytest.raises(ValueError, match="config must be verl's ActorConfig"):
        ours.policy_loss(old, new, advantages, mask)
    with pytest.raises(ValueError, match="must have global_batch_size with dp_size=2"):
        ours.policy_loss(old, new, advantages, mask, config=make_config({"dp_size": 2}))
    wide = FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    with pytest.warns(UserWarning, match="clip_ratio_low=0.2 never clips"):
        ours.policy_loss(old, new, advantages, mask, config=wide)


def test_registering_twice_is_fine():
    assert ours.register() == ours.register() == "gspo_ops"
