"""The numbers of a step: from its mini-batches, and from all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Row = dict[str, float]

# of responses that are not left out
_OF_COMPUTED = {
    "ratio_mean", "approx_kl", "approx_kl_k3", "effective_sample_size", "ref_kl",
    "mismatch_token_mean", "mismatch_sequence_mean", "log_ratio_rms",
}  # fmt: skip
_SUMS = {"refilled_groups", "failed_rewards", "tokens_per_s"}
# Of a clock, the slowest process's: the others wait for it.
_LARGEST = {
    "first_ratio_error", "rollout_s", "old_log_probs_s", "update_s", "step_s",
}  # fmt: skip


def combine(parts: Sequence[Mapping[str, Tensor | float]]) -> Row:
    """One row of several: sums of counts, extremes of extremes, means of the rest.

    What is of the responses for which something was computed counts as many of them as there are;
    a part without any does not count, unless none has any.

    Args:
        parts: of equally many responses each, with the same names; numbers or 0-dim tensors.

    Returns:
        Numbers by these names.
    """
    row = {}
    weights = torch.stack([_number(1 - part.get("left_out_frac", 0.0)) for part in parts or [{}]])
    if not weights.any():
        weights = torch.ones_like(weights)
    for name in parts[0] if parts else ():
        values = torch.stack([_number(part[name]) for part in parts])
        computed = values[weights > 0]
        if name in _SUMS:
            value = values.sum()
        elif name == "ratio_min":
            value = computed.min()
        elif name in _LARGEST:
            value = values.max()
        elif name.endswith("_max"):
            value = computed.max()
        elif name in _OF_COMPUTED:
            value = (computed * weights[weights > 0]).sum() / weights.sum()
        else:
            value = values.mean()
        row[name] = value.item()
    return row


def _number(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def in_words(row: Row) -> str:
    """A step in a line."""
    if "ratio_min" not in row:
        return f"reward {row['reward']:.2f}, all updates skipped"
    return (
        f"reward {row['reward']:.2f}, clip {row['clip_frac_sequences']:.0%}, "
        f"s {row['ratio_min']:.3f}..{row['ratio_max']:.3f}, {row['tokens_per_s']:.0f} tokens/s"
    )
