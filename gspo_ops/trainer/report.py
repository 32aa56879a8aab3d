"""What a run leaves behind: a metrics file, a summary and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

_SMOOTHING = 5  # steps in the running mean drawn over noisy points

Row = dict[str, float]


class MetricsFile:
    """A JSON-lines file that is complete up to the last step, whenever the run ends.

    Attributes:
        rows: what was appended so far, with `step` counted from 1.
    """

    def __init__(self, path: Path) -> None:
        """Start an empty file at `path`."""
        self.rows: list[Row] = []
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, row: Row) -> None:
        """Write one step's metrics."""
        self.rows.append({"step": len(self.rows) + 1} | row)
        self._file.write(json.dumps(self.rows[-1]) + "\n")
        self._file.flush()


@dataclass(frozen=True)
class Summary:
    """Held-out accuracy before and after: of sampled responses to the same problems.

    Attributes:
        problems: held-out problems, n; each has an accuracy, over the responses sampled to it.
        before: mean accuracy before training.
        before_se: its standard error, that of a mean over n problems.
        after: mean accuracy after training.
        after_se: its standard error.
        gain: after - before.
        gain_se: standard error of the gain: of the mean of the n differences, one per problem.
        seconds: the whole run, both evaluations included.
    """

    problems: int
    before: float
    before_se: float
    after: float
    after_se: float
    gain: float
    gain_se: float
    seconds: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor, *, seconds: float) -> Summary:
        """Summarise (n,) accuracies before and after, problem by problem."""
        gain = after - before
        return cls(
            problems=len(before),
            before=before.mean().item(),
            before_se=_standard_error(before),
            after=after.mean().item(),
            after_se=_standard_error(after),
            gain=gain.mean().item(),
            gain_se=_standard_error(gain),
            seconds=seconds,
        )

    def __str__(self) -> str:
        sigmas = f" ({self.gain / self.gain_se:.1f} standard errors)" if self.gain_se else ""
        return (
            f"held-out accuracy, {self.problems} problems: "
            f"{self.before:.3f} ± {self.before_se:.3f} before, "
            f"{self.after:.3f} ± {self.after_se:.3f} after, "
            f"gain {self.gain:+.3f} ± {self.gain_se:.3f}{sigmas}"
        )


def _standard_error(values: Tensor) -> float:
    return (values.std() / math.sqrt(len(values))).item()


def write_summary(summary: Summary, path: Path) -> None:
    """Write the summary as JSON."""
    path.write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")


def plot(rows: Sequence[Row], summary: Summary, path: Path) -> None:
    """Draw reward, clip fraction, spread of s_i and live fraction over the steps.

    Args:
        rows: metrics of each step.
        summary: goes into the title.
        path: of the PNG.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    (reward, clip), (ratio, live) = axes
    steps = [row["step"] for row in rows]

    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    _points_and_mean(reward, steps, column("reward"), "C0")
    reward.set(title="Reward of the sampled responses", ylabel="fraction right")
    reward.legend(frameon=False, loc="lower right")
    _points_and_mean(clip, steps, column("clip_frac_sequences"), "C1")
    clip.set(title="Clip fraction", ylabel="fraction of sequences")
    clip.legend(frameon=False, loc="upper right")
    _points_and_mean(live, steps, column("active_token_frac"), "C2")
    live.set(title="Live fraction", ylabel="fraction of tokens with gradient")
    live.legend(frameon=False, loc="upper right")
    for axis in (reward, clip, live):
        axis.set_ylim(-0.02, 1.02)

    ratio.fill_between(steps, column("ratio_min"), column("ratio_max"), color="C3", alpha=0.2)
    ratio.plot(steps, column("ratio_min"), color="C3", lw=0.8, label="min, max")
    ratio.plot(steps, column("ratio_max"), color="C3", lw=0.8)
    ratio.plot(steps, column("ratio_mean"), color="black", lw=1.5, label="mean")
    ratio.set(title="Sequence ratio $s_i$", ylabel="$s_i$ (log scale)", yscale="log")
    ratio.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ratio.yaxis.set_major_formatter("{x:g}")
    ratio.yaxis.set_minor_formatter("")
    ratio.legend(frameon=False)

    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step (rollout batch)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(str(summary).replace(": ", ":\n", 1))
    figure.savefig(path, dpi=120)


def _points_and_mean(
    axis: Axes, steps: Sequence[float], values: Sequence[float], color: str
) -> None:
    """Each step as a faint point, and a running mean over the last few as a line."""
    axis.plot(steps, values, ".", color=color, alpha=0.4, label="step")
    smooth = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - _SMOOTHING) : end]
        smooth.append(sum(window) / len(window))
    axis.plot(steps, smooth, color=color, lw=2, label=f"mean of last {_SMOOTHING}")
