"""Write the README's tables from the results files that its markers name.

python -m gspo_ops.benchmarks.report [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def render(report: dict) -> str:
    """A results file as Markdown with its provenance."""
    lines = TABLES[report.get("benchmark", "logits")](report)
    peers = [f"{name} {version}" for name, version in report.get("peers", {}).items()]
    where = "; ".join([*report["environment"], *peers])
    last = f"{where}; {report['threads']} threads; commit {report['commit']}, {report['date']}."
    return "\n".join([*lines, "", last, ""])


def logits_table(report: dict) -> list[str]:
    """Of `benchmarks/logits.py`."""
    first = report["results"][0]
    lines = [
        f"Forward and backward of GSPO from logits, N={first['N']}, V={first['V']}, against eager "
        f"PyTorch (`log_softmax` in fp32); medians of {report['rounds']} interleaved rounds, "
        f"ratios round by round. f is the fraction of rows with a gradient.",
        "",
        "| logits | f | eager, ms | gspo_ops, ms | time ratio | extra memory, eager "
        "| extra memory, gspo_ops | gradient error, eager | gradient error, gspo_ops |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["results"]:
        ms, peak, error = row["median_ms"], row["peak_bytes"], row["grad_error_rel_l2"]
        lines.append(
            f"| {row['dtype']} | {row['f']:g} | {ms['eager']:.0f} | {ms['gspo_ops']:.0f} "
            f"| {row['time_ratio']['median']:.2f} "
            f"| {peak['eager'] / row['dlogits_bytes']:.1f} x dlogits "
            f"| {peak['gspo_ops'] / row['dlogits_bytes']:.2f} x dlogits "
            f"| {error['eager']:.0e} | {error['gspo_ops']:.0e} |"
        )
    return lines


def hidden_table(report: dict) -> list[str]:
    """Of `benchmarks/hidden.py`."""
    rows = report["results"]
    names = list(rows[0]["providers"])
    rounds = " to ".join(str(n) for n in sorted({row["rounds"] for row in rows}))
    lines = [
        f"Forward and backward of GSPO from hidden states (N, H) and a head (V, H). Eager is "
        f"PyTorch with fp32 logits: time / extra memory beyond the returned gradients. The others: "
        f"both as fractions of eager's; medians of {rounds} interleaved rounds, ratios round by "
        f"round. Below them the larger of the two gradients' relative errors against float64. "
        f"f is the fraction of rows with a gradient.",
        "",
        f"| N, V, H | dtype | f | {' | '.join(names)} |",
        f"|{'---|' * (3 + len(names))}",
    ]
    for row in rows:
        cells = [_hidden_cell(row["providers"][name], name == names[0]) for name in names]
        lines.append(
            f"| {row['N']}, {row['V']}, {row['H']} | {row['dtype']} | {row['f']:g} "
            f"| {' | '.join(cells)} |"
        )
    return lines


def _hidden_cell(of: dict, is_baseline: bool) -> str:
    if "missing" in of:
        return of["missing"]
    cell = f"{of['time_ratio']['median']:.2f} / {of['memory_ratio']:.2f}"
    if is_baseline:
        cell = f"{of['median_ms']:.0f} ms / {of['extra_bytes'] / 2**20:.0f} MiB"
    return f"{cell}<br>{max(of['grad_error'].values()):.0e}"


def clip_error_table(report: dict) -> list[str]:
    """Of `benchmarks/clip_error.py`."""
    lengths = list(report["log_ratio_rms"])
    lines = [
        f"Error of the ratio s_i against float64 (root mean square) and share of clip decisions "
        f"flipped, by length of the response. bf16 hidden states and a bf16 head: "
        f"{report['sequences']} responses of {report['length']} tokens sampled from "
        f"{report['model']}, whole and in pieces. Exact log-ratios are spread (standard deviation "
        f"{report['spread']:.1e}) such that the clip range, 3e-4 below 1 to 4e-4 above, clips 15% "
        f"of the sequences. Log-probs are averaged in float64.",
        "",
        f"| old log-probs | method | {' | '.join(lengths)} |",
        f"|{'---|' * (2 + len(lengths))}",
    ]
    for case, title in (("exact", "exact"), ("same", "by the same method")):
        for name, of in report["methods"].items():
            points = [of["missing"]] * len(lengths) if "missing" in of else [
                f"{at['rms_error']:.1e}, {at['flipped']:.1%}" for at in of[case].values()
            ]  # fmt: skip
            lines.append(f"| {title} | {name} | {' | '.join(points)} |")
    return lines


def memory_table(report: dict) -> list[str]:
    """Of `benchmarks/memory.py`."""
    first = report["results"][0]
    lines = [
        f"Peak memory beside the returned gradients, V={first['V']}, H={first['H']}, "
        f"{first['dtype']}: measured, and what the plan predicts, MiB.",
        "",
        "| plan | N | measured | predicted | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in report["results"]:
        peak, predicted = row["peak_bytes"], row["predicted_bytes"]
        lines.append(
            f"| {row['plan']} | {row['N']} | {peak / 2**20:.0f} | {predicted / 2**20:.0f} "
            f"| {peak / predicted:.2f} |"
        )
    return lines


TABLES: dict[str, Callable[[dict], list[str]]] = {
    "logits": logits_table,
    "hidden": hidden_table,
    "clip_error": clip_error_table,
    "memory": memory_table,
}


def updated(readme: str) -> str:
    """The README with every marked block written anew."""

    def block(match: re.Match[str]) -> str:
        report = json.loads((ROOT / match[2]).read_text())
        return match[1] + render(report) + match[3]

    return BLOCK.sub(block, readme)


def main() -> int:
    path = ROOT / "README.md"
    readme = path.read_text()
    if "--check" in sys.argv[1:]:
        return int(updated(readme) != readme)
    path.write_text(updated(readme))
    return 0


if __name__ == "__main__":
    sys.exit(main())
