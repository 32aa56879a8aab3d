"""The figure of `gspo-ops compare`."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .compare_report import Results, common_rate, mean_and_error
from .files import writing

_COLORS = {"GSPO": "C3", "GSPO-token": "C1", "GRPO": "C0", "GRPO, Routing Replay": "C2"}


def draw(found: dict[str, Any], path: Path) -> None:
    """Plot gains and ranges of rates by cell and kind of model, curves, and clip fractions."""
    results = Results(found)
    kinds = [k for k in ("dense", "moe") if any(c["kind"] == k for c in results.cells)]
    figure = Figure(figsize=(5.5 * (len(kinds) + 1), 9), layout="constrained")
    axes = figure.subplots(2, len(kinds) + 1, squeeze=False)
    for column, kind in enumerate(kinds):
        cells = sorted((c for c in results.cells if c["kind"] == kind), key=_order)
        _gains(results, cells, axes[0, column])
        _ranges(results, cells, axes[1, column])
        axes[0, column].set_title(f"{kind}: gain at the best rate")
        axes[1, column].set_title(f"{kind}: rates at which it learns (o) and does not (x)")
    axes[0, len(kinds) - 1].legend(frameon=False, fontsize=8)  # experts have one arm more
    _curves(results, axes[0, -1])
    _clipped(results, axes[1, -1])
    with writing(path):
        figure.savefig(path, dpi=110)


def _order(cell: dict[str, Any]) -> tuple[int, bool, int, int]:
    return cell["tokens"], cell["engine"], cell["epochs"], cell["mini_batches"]


def _places(cells: list[dict[str, Any]], axis: Axes) -> None:
    """Label the x axis with the cells."""
    names = [
        "{}\n{}{}{}".format(
            c["tokens"], c["mini_batches"], f" x {c['epochs']}" if c["epochs"] > 1 else "",
            "\nengine" if c["engine"] else "",
        )
        for c in cells
    ]  # fmt: skip
    axis.set_xticks(range(len(cells)), names, fontsize=8)
    is_engine = any(cell["engine"] for cell in cells)
    axis.set_xlabel(
        "tokens of an answer, updates per rollout" + ", bf16 engine for sampling" * is_engine
    )
    axis.grid(alpha=0.3)


def _shift(arm: str) -> float:
    return 0.16 * (list(_COLORS).index(arm) - 1.5)


def _gains(results: Results, cells: list[dict[str, Any]], axis: Axes) -> None:
    for arm, color in _COLORS.items():
        points = [
            (place + _shift(arm), *mean_and_error(results.gains(cell["name"], arm)))
            for place, cell in enumerate(cells) if arm in cell["arms"]
        ]  # fmt: skip
        if points:
            x, gains, errors = zip(*points, strict=True)
            axis.errorbar(x, gains, errors, color=color, fmt="o", ms=5, capsize=3, label=arm)
    axis.axhline(0, color="grey", lw=0.8)
    axis.set_ylabel("held-out accuracy, after - before")
    _places(cells, axis)


def _ranges(results: Results, cells: list[dict[str, Any]], axis: Axes) -> None:
    for place, cell in enumerate(cells):
        for arm in cell["arms"]:
            x, color = place + _shift(arm), _COLORS[arm]
            learns = results.learns(cell["name"], arm)
            axis.plot([x] * len(results.rates), results.rates, "x", color=color, ms=4, alpha=0.4)
            axis.plot([x] * len(learns), learns, "o-", color=color, lw=3, ms=6)
    axis.set(yscale="log", ylabel="learning rate")
    _places(cells, axis)


def _curves(results: Results, axis: Axes) -> None:
    telling = results.telling()
    (cell,) = [cell for cell in results.cells if cell["name"] == telling]
    for arm in cell["arms"]:
        rewards = [run["reward"] for run in results.final(telling, arm)]
        steps = range(1, len(rewards[0]) + 1)
        middle = [mean(at) for at in zip(*rewards, strict=True)]
        spread = [stdev(at) for at in zip(*rewards, strict=True)]
        axis.plot(
            steps, middle, color=_COLORS[arm], label=f"{arm} at {results.best(telling, arm):g}"
        )
        low, high = (
            [m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1)
        )
        axis.fill_between(steps, low, high, color=_COLORS[arm], alpha=0.15, lw=0)
    axis.set(title=f"Reward: {telling}", xlabel="rollout", ylabel="mean reward")
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)


def _clipped(results: Results, axis: Axes) -> None:
    """Plot the clip fractions of cells that differ only in length."""
    rate = common_rate(results)
    series: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for cell in results.cells:
        if cell["epochs"] == 1 and not cell["engine"]:
            series.setdefault((cell["kind"], cell["mini_batches"]), []).append(cell)
    for (kind, parts), cells in sorted(series.items()):
        if len(cells) == 1 < max(map(len, series.values())):
            continue  # no curve
        for arm in ("GSPO", "GRPO"):
            points = [
                (c["tokens"], results.mean_of("clip_frac_tokens", c["name"], arm, rate))
                for c in sorted(cells, key=lambda c: c["tokens"])
            ]
            axis.plot(
                *zip(*points, strict=True), color=_COLORS[arm], marker="o" if parts > 4 else "s",
                ls="-" if kind == "moe" else "--", mfc="none", label=f"{arm}, {kind}, {parts}",
            )  # fmt: skip
    axis.set(
        title=f"Clipped tokens at the learning rate {rate:g}", xlabel="tokens of an answer",
        ylabel="fraction", xscale="log", yscale="log",
    )  # fmt: skip
    ticks = sorted({cell["tokens"] for cell in results.cells})
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.legend(
        frameon=False, fontsize=7, title="objective, model, updates per rollout", title_fontsize=7,
        loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4,
    )  # fmt: skip
    axis.grid(alpha=0.3)
