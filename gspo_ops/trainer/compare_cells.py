"""The plan of `gspo-ops compare`: cells of the map, arms, learning rates and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ARMS = {
    "GSPO": ["objective.name=gspo"],
    "GSPO-token": ["objective.name=gspo-token", "task.graded=true"],
    "GRPO": ["objective.name=grpo"],
    "GRPO, Routing Replay": ["objective.name=grpo", "update.routing_replay=true"],
}
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Cell:
    """A place on the map.

    Attributes:
        kind: of model.
        tokens: of an answer.
        mini_batches: updates per pass over a rollout.
        epochs: passes.
        engine: sample in bf16, and take old log-probs from there, as from an inference engine.
    """

    kind: Literal["dense", "moe"]
    tokens: int
    mini_batches: int
    epochs: int = 1
    engine: bool = False

    @property
    def name(self) -> str:
        updates = f"{self.mini_batches} x {self.epochs}" if self.epochs > 1 else self.mini_batches
        engine = ", bf16 engine" if self.engine else ""
        return f"{self.kind}, {self.tokens} tokens, {updates} updates{engine}"

    @property
    def model(self) -> str:
        return f"recurrence-{self.kind}-{self.tokens}"

    @property
    def arms(self) -> list[str]:
        """Routing Replay is for experts, and records the forward that an engine spares."""
        no_replay = self.kind == "dense" or self.engine
        return [arm for arm in ARMS if not (no_replay and arm.endswith("Routing Replay"))]

    def overrides(self) -> list[str]:
        engine = ["rollout.dtype=bfloat16", "update.old_log_probs=rollout"] * self.engine
        return [
            f"model.name={self.model}", f"task.options.digits={self.tokens}",
            f"rollout.max_new_tokens={self.tokens}", f"update.mini_batches={self.mini_batches}",
            f"update.epochs={self.epochs}", *engine,
            f"logging.expert_churn={str(self.kind == 'moe').lower()}",
        ]  # fmt: skip


MAP = (
    *(Cell(kind, tokens, parts) for kind in ("dense", "moe") for tokens in (8, 32, 128)
      for parts in (4, 16)),
    Cell("moe", 32, 8), Cell("moe", 32, 4, epochs=3), Cell("moe", 32, 16, engine=True),
)  # fmt: skip
SUBSET = (Cell("moe", 32, 16),)


@dataclass(frozen=True)
class Run:
    """One training run."""

    cell: Cell
    arm: str
    rate: float
    seed: int

    def overrides(self, common: Sequence[str]) -> list[str]:
        return [
            *self.cell.overrides(), *ARMS[self.arm], f"update.learning_rate={self.rate}",
            f"seed={self.seed}", *common,
        ]  # fmt: skip

    def file(self, out: Path) -> Path:
        cell, arm = (
            name.replace(", ", "-").replace(" ", "-") for name in (self.cell.name, self.arm)
        )
        return out / "runs" / cell / arm / f"rate-{self.rate:g}-seed-{self.seed}.json"
