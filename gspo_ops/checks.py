"""Checks of arguments: each error names the argument, its value, and what is expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .constants import IGNORED


def check_number(
    name: str,
    value: object,
    *,
    minimum: float,
    exclusive: bool = False,
    may_be_infinite: bool = False,
) -> None:
    """Refuse anything but a finite number that is >= minimum (> minimum if exclusive)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    low = value <= minimum if exclusive else value < minimum
    # not math.isfinite, which torch.compile cannot trace for a symbolic float
    is_number = value == value if may_be_infinite else -math.inf < value < math.inf
    if low or not is_number:
        sign, kind = ">" if exclusive else ">=", "" if may_be_infinite else "finite and "
        raise ValueError(f"{name} must be {kind}{sign} {minimum:g}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def check_tensor(name: str, x: object, device: torch.device | None = None) -> None:
    """Refuse anything but a dense tensor, on this device if one is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if is_dtensor(x):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor with placements {tuple(x.placements)}: "  # type: ignore[attr-defined]
            f"pass {name}.full_tensor(), or this rank's part as {name}.to_local()"
        )
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device} like the input, got {x.device}")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {x.layout}")


def is_dtensor(x: object) -> bool:
    return isinstance(x, Tensor) and hasattr(x, "device_mesh")


def check_constant(name: str, x: Tensor) -> None:
    """Refuse a tensor that requires a gradient, which nothing computes, or holds no numbers."""
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, but is a constant of the loss: detach it")
    if x.dtype == torch.bool or x.dtype.is_complex:
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}")


def check_log_probs(name: str, x: Tensor) -> None:
    """Refuse log-probs that are too coarse to take a ratio of."""
    check_tensor(name, x)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64, got {x.dtype}: rounding log-probs to 16 bits "
            "moves a sequence's ratio by more than the clip range of GSPO (3e-4)"
        )


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_float(name: str, x: Tensor) -> None:
    """Refuse a tensor whose dtype is not one of the floating-point dtypes of operands."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_cu_seqlens(boundaries: list[int], rows: int) -> None:
    """Refuse sequences that do not follow one another from the first row to the last."""
    if boundaries[0] != 0 or boundaries[-1] != rows or boundaries != sorted(boundaries):
        raise ValueError(f"cu_seqlens must be non-decreasing from 0 to N={rows}, got {boundaries}")


def check_targets(targets: Tensor, name: str, x: Tensor) -> None:
    """Refuse targets that are not one token per row of x, which the caller knows as `name`."""
    check_tensor("targets", targets, x.device)
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets must be int32 or int64, got {targets.dtype}")
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"targets must have shape {tuple(x.shape[:-1])}, one per row of {name}, got "
            f"{tuple(targets.shape)}"
        )


def checked_targets(targets: Tensor, V: int, rows: Tensor | None = None) -> Tensor:
    """Return targets as int64; refuse one outside [0, V), and report its position in `rows`."""
    targets = targets.long()
    wrong = ((targets < 0) | (targets >= V)).nonzero().squeeze(1)
    if len(wrong):
        first = int(wrong[0])
        row = first if rows is None else int(rows[first])
        raise IndexError(
            f"targets must lie in [0, {V}) where they count, got {int(targets[first])} at row "
            f"{row} ({len(wrong)} such rows); mask rows out, or mark them with {IGNORED}"
        )
    return targets
