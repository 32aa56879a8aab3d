"""The output of a run: metrics, samples, a summary and a plot."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

from .config import TrainConfig, to_tables
from .files import numbers_of, to_json, write, writing
from .metrics import Row

_SMOOTHING = 5  # steps in the running mean that is drawn over the noisy points


class Board(NamedTuple):
    """A service that shows metrics while a run goes on."""

    log: Callable[[Row, int], object]
    close: Callable[[], object]


def _tensorboard(config: TrainConfig, done: int) -> Board:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "logging.tensorboard: tensorboard is not installed: pip install tensorboard"
        ) from None
    writer = SummaryWriter(str(config.out / "tensorboard"), purge_step=done + 1)

    def log(row: Row, step: int) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)

    return Board(log, writer.close)


def _wandb(config: TrainConfig, done: int) -> Board:
    try:
        import wandb
    except ImportError:
        raise ValueError("logging.wandb: wandb is not installed: pip install wandb") from None
    run = wandb.init(
        project=config.logging.wandb, name=config.out.name, dir=config.out,
        config=to_tables(config),
    )  # fmt: skip
    return Board(lambda row, step: run.log(row, step=step), run.finish)


# Each key is the setting under `logging` that enables the board.
_BOARDS = {"tensorboard": _tensorboard, "wandb": _wandb}


class RunFiles:
    """The files that grow with a run: complete up to the last step, whenever it ends.

    Attributes:
        rows: metrics of each step so far.
    """

    def __init__(self, config: TrainConfig, rows: list[Row], mode: str) -> None:
        out = config.out
        self.rows = rows
        self._out = out
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            self._metrics = (out / "metrics.jsonl").open(mode, encoding="utf-8")
            self._samples = (out / "samples.jsonl").open(mode, encoding="utf-8")
        write(out / "config.json", to_json(to_tables(config), indent=2) + "\n")
        self._boards = [
            make(config, len(rows))
            for name, make in _BOARDS.items()
            if getattr(config.logging, name)
        ]

    @classmethod
    def create(cls, config: TrainConfig) -> RunFiles:
        """Create empty files in `config.out`."""
        return cls(config, [], "w")

    @classmethod
    def reopen(cls, config: TrainConfig, state: dict[str, Any], step: int) -> RunFiles:
        """Reopen the files as they were when `state_dict` was called; later steps are repeated.

        Args:
            config: the settings.
            state: what `state_dict` returned.
            step: the step after which it was called.

        Raises:
            ValueError: the metrics of an earlier step are lost.
        """
        with writing(config.out):
            rows = _cut_metrics(config.out / "metrics.jsonl", step)
            _cut_samples(config.out / "samples.jsonl", state["sizes"]["samples.jsonl"])
        return cls(config, rows, "a")

    def state_dict(self) -> dict[str, Any]:
        """Flush the files and return their sizes."""
        with writing(self._out):
            for file in (self._metrics, self._samples):
                os.fsync(file.fileno())
        sizes = {n: (self._out / n).stat().st_size for n in ("metrics.jsonl", "samples.jsonl")}
        return {"sizes": sizes}

    def __enter__(self) -> RunFiles:
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self._out), ExitStack() as all_of_them:  # even if one fails
            all_of_them.callback(self._metrics.close)
            all_of_them.callback(self._samples.close)
            for board in self._boards:
                all_of_them.callback(board.close)

    def append(self, row: Row, samples: Sequence[dict[str, Any]]) -> None:
        """Write one step's metrics and some of its responses."""
        self.rows.append(row)
        with writing(self._out):
            self._metrics.write(to_json(row) + "\n")
            self._metrics.flush()
            for sample in samples:
                self._samples.write(to_json({"step": row["step"]} | sample) + "\n")
            self._samples.flush()
        for board in self._boards:
            board.log({name: x for name, x in row.items() if name != "step"}, int(row["step"]))

    def finish(self, summary: Summary) -> None:
        """Write the summary."""
        write(self._out / "summary.json", to_json(asdict(summary), indent=2) + "\n")


def read_metrics(run: Path) -> list[Row]:
    """Read the metrics of each step of the run in a directory.

    An incomplete last line is left out.

    Raises:
        ValueError: there is no run, or its metrics are damaged.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"no run in {run}: {path.name} is missing")
    lines = path.read_bytes().splitlines(keepends=True)
    rows = _whole(lines)
    if len(rows) < len(lines) - 1 or (len(rows) < len(lines) and lines[-1].endswith(b"\n")):
        raise ValueError(f"{path}: line {len(rows) + 1} is damaged")
    if not rows:
        raise ValueError(f"{path} is empty: no step was finished")
    return rows


def _whole(lines: Iterable[bytes]) -> list[Row]:
    """Return the rows before the first line that is damaged or incomplete."""
    rows: list[Row] = []
    for line in lines:
        try:
            rows.append(numbers_of(line))
        except ValueError:
            break
    return rows


def _cut_metrics(path: Path, step: int) -> list[Row]:
    """Cut the metrics to those of the first steps, and return these."""
    lines = path.read_bytes().splitlines()[:step] if path.exists() else []
    rows = _whole(lines)
    if len(rows) < step:
        raise ValueError(
            f"{path}: the metrics of step {len(rows) + 1} are damaged or lost, but the checkpoint "
            f"is from step {step}. Restore the file; or remove the checkpoints after step "
            f"{len(rows)}, and --resume repeats the steps since then"
        )
    write(path, b"".join(line + b"\n" for line in lines).decode())
    return rows


def _cut_samples(path: Path, size: int) -> None:
    """Cut the samples to this size; as nothing depends on them, losing some is no error."""
    path.touch()
    if path.stat().st_size < size:
        size = path.read_bytes().rfind(b"\n") + 1
        warnings.warn(f"{path} is shorter than before: some samples are lost", stacklevel=2)
    os.truncate(path, size)


@dataclass(frozen=True)
class Summary:
    """Held-out accuracy before and after training, from sampled responses to the same problems.

    Attributes:
        problems: number of held-out problems, n; each has an accuracy over its sampled responses.
        before: mean accuracy before training.
        before_se: its standard error, that of a mean over n problems.
        after: mean accuracy after training.
        after_se: its standard error.
        gain: after - before.
        gain_se: standard error of the gain, the mean of n differences, one per problem.
        seconds: duration of the whole run, including both evaluations.
        pass_at: k of the next two attributes; 0 without them.
        pass_before: probability that at least one of k responses is right, before training.
        pass_after: the same after training.
    """

    problems: int
    before: float
    before_se: float
    after: float
    after_se: float
    gain: float
    gain_se: float
    seconds: float
    pass_at: int = 0
    pass_before: float = 0.0
    pass_after: float = 0.0

    @classmethod
    def of(cls, before: Tensor, after: Tensor, *, seconds: float, pass_at: int = 0) -> Summary:
        """Summarize (n, samples) rewards before and after training, problem by problem."""
        passed = [pass_at_k(x, pass_at) if pass_at else 0.0 for x in (before, after)]
        before, after = before.mean(1), after.mean(1)
        gain = after - before
        return cls(
            pass_at=pass_at,
            pass_before=passed[0],
            pass_after=passed[1],
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
            + (
                f"; at least one of {self.pass_at} right: {self.pass_before:.3f} before, "
                f"{self.pass_after:.3f} after"
                if self.pass_at
                else ""
            )
        )


def pass_at_k(rewards: Tensor, k: int) -> float:
    """Return the mean probability that at least one of k responses is right (a reward >= 1).

        1 - C(wrong, k) / C(n, k)

    Args:
        rewards: (problems, n) rewards of n responses to each problem.
        k: number of responses, from 1 to n.

    Source: arXiv 2107.03374, equation 1.
    """
    n = rewards.shape[1]
    wrong = (rewards < 1).sum(1).tolist()
    return 1.0 - sum(math.comb(w, k) for w in wrong) / math.comb(n, k) / len(wrong)


def _standard_error(values: Tensor) -> float:
    return (values.std() / math.sqrt(len(values))).item()


def plot(runs: Mapping[str, Sequence[Row]], path: Path, *, title: str = "") -> None:
    """Plot reward, clip fraction, spread of the ratio and live fraction over the steps.

    Args:
        runs: metrics of each step of one or several runs, by the run's name.
        path: path of the PNG file.
        title: title of the figure.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    (reward, clip), (ratio, live) = axes
    several = len(runs) > 1
    panels = {
        reward: ("reward", "Reward of the sampled responses", "mean reward"),
        clip: ("clip_frac_tokens", "Clip fraction", "fraction of tokens"),
        live: ("active_token_frac", "Live fraction", "fraction of tokens with a gradient"),
    }
    for place, (name, rows) in enumerate(runs.items()):
        # a step whose updates were all skipped has no statistics
        rows = [row for row in rows if "ratio_min" in row]
        steps = [row["step"] for row in rows]
        for number, (axis, (key, *_)) in enumerate(panels.items()):
            color = f"C{place}" if several else f"C{number}"
            values = [row.get(key, math.nan) for row in rows]  # the eager loss has fewer statistics
            _points_and_mean(axis, steps, values, color, name if several else None)
        low, high, mean = ([r[f"ratio_{k}"] for r in rows] for k in ("min", "max", "mean"))
        color = f"C{place}" if several else "C3"
        ratio.fill_between(steps, low, high, color=color, alpha=0.2)
        ratio.plot(steps, low, color=color, lw=0.8, label=None if several else "min, max")
        ratio.plot(steps, high, color=color, lw=0.8)
        if not several:
            ratio.plot(steps, mean, color="black", lw=1.5, label="mean")
    for axis, (_, heading, label) in panels.items():
        axis.set(title=heading, ylabel=label)
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, -0.02), max(high, 1.02))
    ratio.set(title="Smallest and largest ratio", ylabel="ratio (log scale)", yscale="log")
    low, high = ratio.get_ylim()
    # within a decade, a logarithmic axis would have only one or two ticks
    ratio.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(6))
    ratio.yaxis.set_major_formatter("{x:g}")
    ratio.yaxis.set_minor_formatter("")
    if several:
        handles, labels = reward.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    else:
        for axis, corner in ((reward, "lower right"), (clip, "upper right"), (ratio, "best")):
            axis.legend(frameon=False, loc=corner)
        live.legend(frameon=False, loc="upper right")

    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step (rollout batch)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title.replace(": ", ":\n", 1))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def _points_and_mean(
    axis: Axes, steps: Sequence[float], values: Sequence[float], color: str, name: str | None
) -> None:
    """Draw each step as a faint point, and a running mean over the last few as a line."""
    axis.plot(steps, values, ".", color=color, alpha=0.4, label=None if name else "step")
    smooth = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - _SMOOTHING) : end]
        smooth.append(sum(window) / len(window))
    axis.plot(steps, smooth, color=color, lw=2, label=name or f"mean of last {_SMOOTHING}")
