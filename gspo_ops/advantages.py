"""Group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_number, check_tensor


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of each response relative to its group.

        A_i = (r_i - mean(group)) / (std(group) + eps)

    with the unbiased standard deviation. In a group whose rewards are all equal, and in a group of
    one, every advantage is exactly 0, so that the loss ops skip it.

    Args:
        rewards: (B,) floating point or integer.
        group_size: responses per group, if groups are consecutive; must divide B.
        group_ids: (B,) integers, equal within a group, in any order; replaces group_size.
        normalize: divide by the standard deviation; False leaves r_i - mean (Dr. GRPO).
        eps: added to the standard deviation, >= 0.

    Returns:
        (B,) float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Source: arXiv 2402.03300, section 4.1.
    """
    check_tensor("rewards", rewards)
    if rewards.ndim != 1 or rewards.dtype.is_complex:
        raise ValueError(
            f"rewards must be real, of shape (B,), got {rewards.dtype} {tuple(rewards.shape)}"
        )
    check_number("eps", eps, minimum=0.0)
    ids = _group_index(rewards, group_size, group_ids)
    order = ids.argsort(stable=True)
    sorted_rewards = rewards.detach()[order].double()
    sizes = torch.zeros_like(ids).scatter_add_(0, ids, torch.ones_like(ids))

    def per_group(reduce: str, x: Tensor) -> Tensor:
        # sizes has an entry per row: with fewer groups than rows, the last segments are empty
        return torch.segment_reduce(x, reduce, lengths=sizes, unsafe=True, initial=0)[ids[order]]

    def group_max(x: Tensor) -> Tensor:
        reduced = torch.segment_reduce(x, "max", lengths=sizes, unsafe=True)
        return reduced[ids[order]]

    size = sizes[ids[order]]
    centred = sorted_rewards - per_group("sum", sorted_rewards) / size
    advantages = centred
    if normalize:
        variance = per_group("sum", centred.square()) / (size - 1).clamp(min=1)
        advantages = centred / (variance.sqrt() + eps)
    equal = group_max(sorted_rewards) == -group_max(-sorted_rewards)
    advantages = torch.where(equal, 0.0, advantages)
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return torch.empty_like(advantages).scatter_(0, order, advantages).to(dtype)


def _group_index(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> Tensor:
    """Return the group number of each response, (B,) int64 below B."""
    if (group_size is None) == (group_ids is None):
        raise ValueError("exactly one of group_size and group_ids must be given")
    batch = len(rewards)
    if group_size is not None:
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise TypeError(f"group_size must be an int, got {type(group_size).__name__}")
        if group_size < 1 or batch % group_size:
            raise ValueError(
                f"group_size must be positive and divide the {batch} rewards, got {group_size}"
            )
        return torch.arange(batch, device=rewards.device) // group_size
    check_tensor("group_ids", group_ids)
    assert group_ids is not None
    if group_ids.is_floating_point() or group_ids.is_complex():
        raise TypeError(f"group_ids must be integers, got {group_ids.dtype}")
    if group_ids.shape != rewards.shape or group_ids.device != rewards.device:
        raise ValueError(
            f"group_ids must have shape {tuple(rewards.shape)} on {rewards.device} like rewards, "
            f"got {tuple(group_ids.shape)} on {group_ids.device}"
        )
    ids, order = group_ids.long().sort(stable=True)
    rank = torch.zeros_like(ids)
    rank[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    return torch.empty_like(rank).scatter_(0, order, rank)
