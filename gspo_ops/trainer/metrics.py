"""The numbers of a step: from its mini-batches, and from all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Row = dict[str, float]

_SUMS = {"refilled_groups", "failed_rewards", "tokens_per_s"}
# Of a clock, the slowest process's: the others wait for it.
_LARGEST = {
    "first_ratio_error", "rollout_s", "old_log_probs_s", "update_s", "step_s",
}  # fmt: skip


def combine(parts: Sequence[Mapping[str, Tensor | float]]) -> Row:
    """One row of several: sums of counts, extremes of extremes, means of the rest.

    Args:
        parts: of equally many sequences each, with the same names; numbers or 0-dim tensors.

    Returns:
        Numbers by these names.
    """
    row = {}
    for name in parts[0] if parts else ():
        values = torch.stack([torch.as_tensor(part[name], dtype=torch.float64) for part in parts])
        if name in _SUMS:
            value = values.sum()
        elif name == "ratio_min":
            value = values.min()
        elif name in _LARGEST or name.endswith("_max"):
            value = values.max()
        else:
            value = values.mean()
        row[name] = value.item()
    return row


def in_words(row: Row) -> str:
    """A step in a line."""
    if "ratio_min" not in row:
        return f"reward {row['reward']:.2f}, all updates skipped"
    return (
        f"reward {row['reward']:.2f}, clip {row['clip_frac_sequences']:.0%}, "
        f"s {row['ratio_min']:.3f}..{row['ratio_max']:.3f}, {row['tokens_per_s']:.0f} tokens/s"
    )
