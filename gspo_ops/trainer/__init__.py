"""The reference trainer: GSPO on a real model with verifiable rewards, in one small package.

It needs the `train` extra. Importing this package is cheap: transformers, reasoning-gym and
matplotlib are imported only when a run starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import compare
from .command import main, plot_main, sample_main
from .config import TrainConfig, load_config

if TYPE_CHECKING:
    from .report import Summary

__all__ = ["COMMANDS", "TrainConfig", "load_config", "train"]

COMMANDS = {
    "train": main, "plot": plot_main, "sample": sample_main, "compare": compare.main
}  # fmt: skip


def train(config: TrainConfig, *, resume: bool = False) -> Summary:
    """Train a model; see `gspo_ops.trainer.loop.train`."""
    from . import loop

    return loop.train(config, resume=resume)
