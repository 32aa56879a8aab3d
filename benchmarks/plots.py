"""Pictures of results files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from gspo_ops import GSPO

CASES = {
    "exact": "exact old log-probs",
    "same": "old log-probs from the same method",
}
# names in older results files, and those that they have now
_LABELS = {
    "eager, softmax as the logits": "eager, softmax in input dtype",
    "eager, logits as the inputs": "eager, logits in input dtype",
    'gspo_ops, products="triton", without': 'gspo_ops, products="triton", without TMA',
}


def shown(name: str) -> str:
    """Return the name under which tables and pictures show one of a results file."""
    return _LABELS.get(name, name)


def groups(report: dict) -> dict[str, list[dict]]:
    """Group rows of `gspo-ops bench` that differ only in f, under a title for each group."""
    found: dict[str, list[dict]] = {}
    for row in report["results"]:
        sizes = ", ".join(f"{k}={row[k]}" for k in "NVH" if k in row)
        extras = [row["lengths"]] * (row["lengths"] != "square")
        extras += ["frozen head"] * row["frozen_head"]
        key = ", ".join([f"from {row['path']}", sizes, row["dtype"], *extras])
        found.setdefault(key, []).append(row)
    return found


MARKERS = "ov^Dsx*P<>h+d18p"
_OURS = "red"
_COLORS = (
    "black", "tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink",
    "tab:olive", "tab:cyan", "navy", "gold", "darkgreen", "tab:gray", "salmon", "teal", "indigo",
)  # fmt: skip


def bench(report: dict, path: Path) -> None:
    """Draw time, memory and fraction of the best rate against f, and errors with the clip range."""
    tables = groups(report)
    figure, axes = pyplot().subplots(
        len(tables), 4, figsize=(16, 4.4 * len(tables)), layout="constrained", squeeze=False
    )
    for row, (title, rows) in zip(axes, tables.items(), strict=True):
        names = [n for n in rows[0]["providers"] if _points(rows, n, "of_roof")]
        for axis, (what, label) in zip(row, _PANELS.items(), strict=False):
            for place, name in enumerate(names):
                points = _points(rows, name, what)
                axis.plot(*zip(*points, strict=True), **_style(name, place))
            axis.set(xlabel="f, fraction of sequences with a gradient", ylabel=label)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        row[0].axhline(1, color="grey", lw=0.8)
        row[0].set_title(title, loc="left", fontsize=10)
        errors = [max(e for _, e in _points(rows, n, "error", "ratio")) for n in names]
        colors = [_style(name, place)["color"] for place, name in enumerate(names)]
        # these bars are also the legend of the lines
        row[3].barh([*map(shown, names)], errors, color=colors, height=0.6)
        row[3].axvline(GSPO().clip_low, color="black", ls="--", label="clip range, lower side")
        row[3].set(xscale="log", xlabel="error of $s_i$ against float64")
        row[3].invert_yaxis()
        row[3].legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


_PANELS = {
    "time_ratio": "time relative to eager",
    "memory_ratio": "extra memory relative to eager",
    "of_roof": "fraction of the machine's best rate",
}


def _points(rows: list[dict], name: str, *keys: str) -> list[tuple[float, float]]:
    """Return (f, value) of a provider wherever it was measured."""
    found = []
    for row in rows:
        value = row["providers"][name]
        for key in keys:
            value = None if value is None else value.get(key)
        if isinstance(value, dict):
            value = value["median"]
        if value is not None:
            found.append((row["f"], value))
    return found


def _style(name: str, place: int) -> dict:
    color, width = (_OURS, 2.5) if name == "gspo_ops" else (_COLORS[place % len(_COLORS)], 1.0)
    return {
        "marker": MARKERS[place % len(MARKERS)], "mfc": "none", "color": color, "lw": width
    }  # fmt: skip


def memory(report: dict, path: Path) -> None:
    """Draw the peak memory of each plan against N, measured and predicted."""
    figure, axis = pyplot().subplots(figsize=(6.4, 4.2), layout="constrained")
    plans = dict.fromkeys(row["plan"] for row in report["results"])
    for place, plan in enumerate(plans):
        rows = [row for row in report["results"] if row["plan"] == plan]
        N = [row["N"] for row in rows]
        measured, predicted = (
            [row[key] / 2**20 for row in rows] for key in ("peak_bytes", "predicted_bytes")
        )
        axis.plot(N, measured, "o", color=f"C{place}", mfc="none", label=f"{plan}, measured")
        axis.plot(N, predicted, "-", color=f"C{place}", lw=1, label=f"{plan}, predicted")
    axis.set(
        xlabel="N", ylabel="extra memory, MiB", xscale="log", yscale="log",
        title=f"V={report['results'][0]['V']}, {report['results'][0]['dtype']}",
    )  # fmt: skip
    axis.set_xticks(N, map(str, N), minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc=(0.62, 0.25))  # between the curves
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def clip_error(report: dict, path: Path) -> None:
    """Draw the error of s_i against the length, with the clip range's narrower side as a line."""
    methods = {n: of for n, of in report["methods"].items() if "exact" in of}
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for axis, (case, title) in zip(axes, CASES.items(), strict=True):
        for place, (name, of) in enumerate(methods.items()):
            lengths = [int(n) for n in of[case]]
            errors = [point["rms_error"] for point in of[case].values()]
            # markers shrink because methods that round alike lie on top of each other
            size = 13 - 1.5 * place
            axis.plot(lengths, errors, "ov^Dsx*"[place % 7] + "-", ms=size, mfc="none", label=name)
        axis.axhline(GSPO().clip_low, color="black", linestyle="--", label="clip range, lower side")
        axis.set(title=title, xscale="log", yscale="log", xlabel="length of the response, tokens")
        axis.set_xticks(lengths, [str(n) for n in lengths], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error of the ratio $s_i$, rms")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def mismatch(report: dict, path: Path) -> None:
    """Draw the noise of s_i by source and length, for each dtype of the body."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    names = dict.fromkeys(name for of in report["bodies"].values() for name in of)
    for axis, (dtype, sources) in zip(axes, report["bodies"].items(), strict=True):
        for place, name in enumerate(names):
            if name not in sources:
                continue
            points = sources[name]["by_length"]
            lengths = [int(n) for n in points]
            errors = [of["rms"] or float("nan") for of in points.values()]
            style = MARKERS[place] + "-"
            label = name if max(of["rms"] for of in points.values()) else f"{name}: 0"
            axis.plot(lengths, errors, style, color=f"C{place}", mfc="none", label=label)
        axis.axhline(GSPO().clip_low, color="black", ls="--", label="clip range, lower side")
        axis.set(
            title=f"body in {dtype}", xscale="log", yscale="log",
            xlabel="length of the response, tokens",
        )  # fmt: skip
        axis.set_xticks(lengths, [str(n) for n in lengths], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error of the ratio $s_i$, rms")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def pyplot() -> ModuleType:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
