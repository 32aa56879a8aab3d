"""Write the README's tables from the results files that its markers name.

python benchmarks/report.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def render(report: dict) -> str:
    """A results file of `benchmarks/logits.py` as a Markdown table with its provenance."""
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
    return "\n".join(
        [*lines, "", f"{'; '.join(report['environment'])}; {report['threads']} threads; commit "
         f"{report['commit']}, {report['date']}.", ""]
    )  # fmt: skip


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
