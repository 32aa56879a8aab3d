import pytest
import torch

from gspo_ops import group_advantages

pytestmark = pytest.mark.kernels


def test_formula(device):
    rewards = torch.rand(12, device=device, dtype=torch.float64)
    groups = rewards.view(3, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(group_advantages(rewards, 4), expected.flatten())
    centred = groups - groups.mean(1, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards, 4, normalize=False), centred.flatten())


def test_group_ids_in_any_order(device):
    rewards = torch.rand(12, device=device)
    order = torch.randperm(12, device=device)
    ids = torch.tensor([7, -3, 10**12], device=device).repeat_interleave(4)
    expected = group_advantages(rewards, 4)
    torch.testing.assert_close(
        group_advantages(rewards[order], group_ids=ids[order]), expected[order]
    )


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.3, 0.0])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_equal_rewards_give_exact_zeros(device, value, size):
    """Equal rewards give zeros, not rounding errors over eps, though mean(8 * [0.1]) != 0.1."""
    rewards = torch.full((2 * size,), value, device=device)
    assert (group_advantages(rewards, size) == 0).all()


def test_integers_empty_and_nan(device):
    advantages = group_advantages(torch.tensor([0, 1, 1, 1], device=device), 2)
    torch.testing.assert_close(
        advantages, torch.tensor([-1.0, 1.0, 0.0, 0.0], device=device) * 0.5**0.5, atol=1e-5, rtol=0
    )
    assert group_advantages(torch.zeros(0, device=device), 4).shape == (0,)
    with_nan = torch.tensor([0.0, float("nan"), 1.0, 0.0], device=device)
    assert group_advantages(with_nan, 2).isnan().tolist() == [True, True, False, False]
