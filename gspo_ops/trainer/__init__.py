"""The reference trainer: GSPO on a real model with verifiable rewards, in one small package.

Needs the `train` extra. Importing this package is cheap; transformers, reasoning-gym and
matplotlib are imported when a run starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .command import main
from .config import DEMO, TrainConfig

if TYPE_CHECKING:
    from .report import Summary

__all__ = ["DEMO", "TrainConfig", "main", "train"]


def train(config: TrainConfig) -> Summary:
    """Train a model; see `gspo_ops.trainer.loop.train`."""
    from . import loop

    return loop.train(config)
