"""Tables and plots from results files: `make report` writes those of README.md and docs/.

python -m gspo_ops.benchmarks.report [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev

from gspo_ops import GSPO
from gspo_ops.integrations import trl_settings
from gspo_ops.trainer import compare_plot, compare_report

from . import left_out, plots, updates

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = re.compile(r"(<!-- settings of TRL -->\n).*?(<!-- end of settings -->)", re.DOTALL)
BLOCK = re.compile(
    r"(<!-- results: (\S+)(?: as (\w+))? -->\n).*?(<!-- end of results -->)", re.DOTALL
)


def render(report: dict, table: str | None = None) -> str:
    """A results file as Markdown with its provenance; as a table other than its own on demand."""
    lines = TABLES[table or report["benchmark"]](report)
    peers = [f"{name} {version}" for name, version in report.get("peers", {}).items()]
    where = "; ".join([*report["environment"], *peers])
    last = f"{where}; {report['threads']} threads; commit {report['commit']}, {report['date']}."
    return "\n".join([*lines, "", last, ""])


def bench_table(report: dict) -> list[str]:
    """Of `gspo-ops bench`: one table for every path, shape and dtype."""
    rounds = sorted({row["rounds"] for row in report["results"]})
    lines = [
        f"Forward and backward of GSPO, each provider against eager PyTorch with fp32 logits: "
        f"time, and peak memory beyond the returned gradients. Medians of "
        f"{' to '.join(map(str, rounds))} interleaved rounds, ratios round by round. f is the "
        f"fraction of sequences with a gradient; % is the share of what this machine can do, the "
        f"least possible bytes (logits) or FLOPs (hidden) at the rate of a copy or a product "
        f"measured in the same rounds. Errors against float64: of s_i as the loss shows it (bold: "
        f"beyond the clip range, 3e-4), and of the gradients, relative L2.",
    ]
    for key, rows in plots.groups(report).items():
        fs = [f"f={row['f']:g}" for row in rows]
        lines += [
            "",
            f"**{key}**",
            "",
            f"| | {' | '.join(fs)} | % | s_i | gradient |",
            f"|{'---|' * (len(fs) + 4)}",
        ]
        lines += [_bench_line(name, rows) for name in rows[0]["providers"]]
    return lines


def _bench_line(name: str, rows: list[dict]) -> str:
    cells, of_roof, ratio, grad = [], [], [], []
    for row in rows:
        of = row["providers"][name]
        if "median_ms" not in of:
            cells.append(of.get("missing") or f"refused: {of['refused']}")
            continue
        memory, share = "-", "-"
        if of["extra_bytes"] is not None:
            memory, share = f"{of['extra_bytes'] / 2**20:.0f} MiB", f"{of['memory_ratio']:.2f}"
        is_baseline = name == next(iter(row["providers"]))
        cells.append(
            f"{of['median_ms']['both']:.0f} ms, {memory}"
            if is_baseline else f"{of['time_ratio']['median']:.2f}, {share}"
        )  # fmt: skip
        of_roof.append(of["of_roof"])
        ratio.append(of["error"]["ratio"])
        grad.append(of["error"]["grad"])
    if not of_roof:
        return f"| {name} | {cells[0]} |{' |' * (len(cells) + 2)}"
    roof = "-".join(dict.fromkeys(f"{100 * x:.0f}" for x in (min(of_roof), max(of_roof))))
    bold = "**" if max(ratio) > GSPO().clip_low else ""
    return (
        f"| {name} | {' | '.join(cells)} | {roof} | {bold}{max(ratio):.0e}{bold} "
        f"| {max(grad):.0e} |"
    )


def bench_summary(report: dict) -> list[str]:
    """Of `gspo-ops bench`: one line for each input, with the fastest provider beside ours."""
    groups = plots.groups(report)
    first, *_ = groups.values()
    fs = [first[0]["f"], first[len(first) // 2]["f"]]
    columns = [f"{name}, f={f:g}" for name in ("gspo_ops", "fastest of the others") for f in fs]
    lines = [
        "Forward and backward of GSPO: time, and extra memory, relative to eager PyTorch with fp32 "
        "logits, at a fraction f of responses with a gradient. In parentheses: the error of s_i "
        "against float64, in bold if it exceeds the clip range of 3e-4.",
        "",
        f"| | {' | '.join(columns)} |",
        f"|{'---|' * (1 + len(columns))}",
    ]
    for key, rows in groups.items():
        shown = [row["providers"] for row in rows if row["f"] in fs]
        ours = [_summary_cell("gspo_ops", of, rows) for of in shown]
        names = [_fastest_other(of) for of in shown]
        others = [
            f"{name}: {_summary_cell(name, of, rows)}"
            for name, of in zip(names, shown, strict=True)
        ]
        lines.append(f"| {key} | {' | '.join([*ours, *others])} |")
    return lines


def _fastest_other(providers: dict[str, dict]) -> str:
    times = {
        name: of["time_ratio"]["median"]
        for name, of in providers.items()
        if "median_ms" in of and not name.startswith("gspo_ops")
    }
    return min(times, key=lambda name: times[name])


def _summary_cell(name: str, providers: dict[str, dict], rows: list[dict]) -> str:
    of = providers[name]
    memory = "-" if of["extra_bytes"] is None else f"{of['memory_ratio']:.2f}"
    error = max(row["providers"][name]["error"]["ratio"] for row in rows)
    bold = "**" if error > GSPO().clip_low else ""
    return f"{of['time_ratio']['median']:.2f}, {memory} ({bold}{error:.0e}{bold})"


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
        f"{first['dtype']}: of tensors, and what the plan predicts, MiB.",
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


def static_table(report: dict) -> list[str]:
    """Of `benchmarks/static.py`."""
    targets = list(dict.fromkeys(row["target"] for row in report["ours"]))
    given = report["given"]
    lines = [
        f"For {', '.join(targets)}: registers / spills / shared memory in KB; for kernels on "
        f"logits bits of a load and instructions per logit, for products instructions that "
        f"multiply matrices and that copy boxes. Compiled, not run.",
        "",
        f"| | kernel | {' | '.join(targets)} |",
        f"|{'---|' * (2 + len(targets))}",
    ]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in [{"peer": "gspo_ops", **row} for row in report["ours"]] + report["others"]:
        key = row["peer"], row.get("kernel", "the others" if _compiles(report, row) else "")
        cells.setdefault(key, {})[row["target"]] = _static_cell(row)
    for (peer, kernel), of in cells.items():
        lines.append(f"| {peer} | {kernel} | {' | '.join(of.get(t, '') for t in targets)} |")
    fs = list(dict.fromkeys(row["f"] for row in report["predictions"]))
    lines += [
        "",
        f"**Predicted, not measured**: milliseconds of forward and backward, N={report['N']}, "
        f"V={report['V']}, H={report['H']}, bf16, if nothing but {given['bandwidth']:g} GB/s (from "
        f"logits) or {given['matmul']:g} TFLOP/s (from hidden states) held it up.",
        "",
        f"| | bytes or FLOPs, f=1 | {' | '.join(f'f={f:g}' for f in fs)} |",
        f"|{'---|' * (2 + len(fs))}",
    ]
    for op in dict.fromkeys(row["op"] for row in report["predictions"]):
        rows = [row for row in report["predictions"] if row["op"] == op]
        much = (
            f"{rows[0]['bytes'] / 1e9:.1f} GB" if "bytes" in rows[0]
            else f"{rows[0]['flops'] / 1e12:.1f} TFLOP"
        )  # fmt: skip
        lines.append(f"| {op} | {much} | {' | '.join(format(r['ms'], '.2f') for r in rows)} |")
    lines += [
        "",
        "**Predicted, not measured**: milliseconds of each way from hidden states to gradients, "
        "from the rates that `designs` in `benchmarks/static.py` assumes.",
        "",
        f"| | {' | '.join(f'f={f:g}' for f in fs)} |",
        f"|{'---|' * (1 + len(fs))}",
    ]
    for way in dict.fromkeys(row["way"] for row in report["designs"]):
        times = [format(row["ms"], ".1f") for row in report["designs"] if row["way"] == way]
        lines.append(f"| {way} | {' | '.join(times)} |")
    lines += [
        "",
        "Kernels that a call from hidden states launches, forward and backward, and the host time "
        "of Python and of torch's dispatcher, on meta tensors and without the driver's share.",
        "",
        "| products | N | H | Triton | torch | host, ms |",
        f"|{'---|' * 6}",
    ]
    for row in report["launches"]:
        lines.append(
            f"| {row['products']} | {row['N']} | {row['H']} | {row['triton']} | {row['torch']} | "
            f"{row['ms']:.1f} |"
        )
    return lines


def _compiles(report: dict, row: dict) -> bool:
    return any(of["peer"] == row["peer"] and "kernel" in of for of in report["others"])


def _static_cell(row: dict) -> str:
    if "missing" in row:
        return row["missing"].replace("|", "/")
    text = f"{row['registers']} / {row['spills'] or 'none'} / {row['shared'] / 1024:.3g}"
    if row["per_logit"] is not None:
        bits = f"{'+'.join(map(str, row['load_bits']))} bits, " if row["load_bits"] else ""
        text += f"; {bits}{row['per_logit']:.1f}"
    elif row["matrix_instructions"]:
        text += f"; {row['matrix_instructions']}"
        if row["boxes"]:
            text += f" and {row['boxes']} TMA"
    return text


def mismatch_table(report: dict) -> list[str]:
    """Of `benchmarks/mismatch.py`."""
    lengths = list(next(iter(report["bodies"]["float32"].values()))["by_length"])
    lines = [
        f"{report['sequences']} responses of {report['length']} tokens sampled from "
        f"{report['model']}, whole and in pieces. Error of s_i (root mean square), and share of "
        f"clip decisions that it flips, by length; then the share of tokens whose ratio leaves "
        f"GRPO's clip range by noise alone.",
        "",
        f"| body | source | {' | '.join(lengths)} | GRPO |",
        f"|{'---|' * (3 + len(lengths))}",
    ]
    for dtype, sources in report["bodies"].items():
        for name, of in sources.items():
            cells = [f"{x['rms']:.0e}, {x['flipped']:.0%}" for x in of["by_length"].values()]
            lines.append(
                f"| {dtype} | {name} | {' | '.join(cells)} | {of['tokens_clipped_by_noise']:.2%} |"
            )
    return lines


def trainer_table(report: dict) -> list[str]:
    """Of `benchmarks/trainer.py`."""
    seeds = len(report["seeds"])
    lines = [
        f"Runs from {seeds} seeds, interleaved seed by seed; medians over steps, the "
        f"first left out, and seeds, the ratio to eager seed by seed. Peak memory is that of the "
        f"whole process, model, optimizer and libraries included. Reward by step, mean over seeds.",
        "",
        "| | loss from | updates of a step, s | to eager | old log-probs, s | peak, MiB "
        "| reward by step |",
        f"|{'---|' * 7}",
    ]
    for case, of in report["results"].items():
        lines += _trainer_lines(case, of)
    lines += [
        "",
        f"Sampling in bf16, training in fp32, medians over 2 steps of {seeds} seeds. Absolute "
        "difference of the two log-probs of a token, and of a response's mean; tokens that the "
        "difference alone clips; tokens clipped in all updates; largest error of a ratio before "
        "the first update.",
        "",
        "| objective | old log-probs from | token, mean | token, max | response, mean "
        "| response, max | clipped by it | clipped | first ratios |",
        f"|{'---|' * 9}",
    ]
    for row in report["engine"]:
        apart = " | ".join(
            f"{row[f'mismatch_{key}']:.1e}"
            for key in ("token_mean", "token_max", "sequence_mean", "sequence_max")
        )
        lines.append(
            f"| {row['objective']} | {row['old_log_probs']} | {apart} "
            f"| {row['mismatch_clip_frac']:.1%} | {row['clip_frac_tokens']:.1%} "
            f"| {row['first_ratio_error']:.1e} |"
        )
    return lines


def _trainer_lines(case: str, of: dict[str, list[dict]]) -> list[str]:
    """A line per loss, and what tells their rewards apart."""
    lines = []
    for loss, runs in of.items():
        pairs = zip(runs, of["eager"], strict=True)
        ratio = median(run["update_s"] / eager["update_s"] for run, eager in pairs)
        update, old, peak = (
            median(run[key] for run in runs)
            for key in ("update_s", "old_log_probs_s", "peak_bytes")
        )
        rewards = zip(*(run["reward"] for run in runs), strict=True)
        curve = " ".join(f"{mean(at):.3f}" for at in rewards)
        lines.append(
            f"| {case} | {loss} | {update:.2f} | {ratio:.2f} | {old:.2f} | {peak / 2**20:.0f} "
            f"| {curve} |"
        )
    pairs = zip(of["hidden"], of["eager"], strict=True)
    apart = [mean(ours["reward"]) - mean(eager["reward"]) for ours, eager in pairs]
    error = stdev(apart) / len(apart) ** 0.5
    lines.append(f"| | difference | | | | | {mean(apart):+.4f} ± {error:.4f} over all steps |")
    return lines


def trl_table(report: dict) -> list[str]:
    """Of `benchmarks/trl_run.py`."""
    of = report["settings"]
    lines = [
        f"{report['model']} in fp32: {of['max_steps']} steps, {of['num_iterations']} updates of "
        f"each {of['per_device_train_batch_size']} responses of at most "
        f"{of['max_completion_length']} tokens. Between the two runs from one seed: whether all "
        f"sampled tokens are the same, the largest difference of a step's loss, and of its "
        f"gradient's norm, relative. Then one gradient, at the weights after the last update: the "
        f"share that is clipped, the range of the importance weights, and the distances (relative "
        f"L2) of both trainers from TRL's loss in float64, and from each other.",
        "",
        "| | same tokens | loss | norm | clipped | weights | TRL from float64 | ours from float64 "
        "| ours from TRL |",
        f"|{'---|' * 9}",
    ]
    for case, at in report["results"].items():
        gradient = at["gradient"]
        same = "yes" if at["same_responses"] else "no"
        clipped = f"{gradient['clipped']:.0%}{'' if gradient['same_clipped'] else ', not the same'}"
        errors = (*gradient["errors"].values(), gradient["between"])
        far = " | ".join(f"{error['gradient']:.1e}" for error in errors)
        lines.append(
            f"| {case} | {same}, {sum(at['lengths'])} | {at['loss']:.0e} | {at['grad_norm']:.0e} "
            f"| {clipped} | {'-'.join(f'{x:.3g}' for x in dict.fromkeys(gradient['weights']))} "
            f"| {far} |"
        )
    lines += [
        "",
        f"Seconds of a step, of one that only updates, and of the whole process its peak memory. "
        f"{report['rounds']} runs of each, in turns: medians, and medians of the ratios step by "
        f"step.",
        "",
        "| | step, TRL | ours / TRL | update, TRL | ours / TRL | peak, TRL, MiB | ours / TRL |",
        f"|{'---|' * 7}",
    ]
    for case, at in report["results"].items():
        times = [f"{at[key]['TRL']:.2f} | {at[key]['ratio']:.2f}" for key in ("step", "update")]
        peak = {name: median(of) for name, of in at["peak_bytes"].items()}
        lines.append(
            f"| {case} | {' | '.join(times)} | {peak['TRL'] / 2**20:.0f} "
            f"| {peak['ours'] / peak['TRL']:.2f} |"
        )
    return lines


def updates_table(report: dict) -> list[str]:
    """Of `gspo-ops bench --path model`."""
    lines = [
        f"Updates of {report['model']} in {report['dtype']}: loss, backward with activation "
        f"checkpointing, clipping of the gradient, AdamW; {report['sequences']} responses of "
        f"{report['tokens']} tokens, sampled by the model after a prompt of {report['prompt']}. A "
        f"fraction f of them has a gradient; the others have no advantage, or are clipped. Medians "
        f"of {report['rounds']} rounds, in which a contender's updates follow each other: seconds, "
        f"the time relative to f=1 of the same contender and to the first contender at the same f, "
        f"both round by round, "
        f"peak memory beyond what stands there before, and the distance (relative L2) of the "
        f"gradient from that of the reference trainer's fused loss with nothing left out.",
        "",
        "| the others | | f | s | to its f=1 | to the first | MiB | gradient |",
        f"|{'---|' * 8}",
    ]
    for dead in updates.DEAD:
        rows = [row for row in report["results"] if row["dead"] == dead]
        first = next(iter(rows[0]["contenders"]))
        for name in rows[0]["contenders"]:
            for row in rows:
                of = row["contenders"][name]
                lines.append(
                    f"| {dead} | {name} | {row['f']:g} | {median(of['seconds']):.2f} "
                    f"| {updates.ratio(row, name, rows[0], name):.2f} "
                    f"| {updates.ratio(row, name, row, first):.2f} "
                    f"| {of['peak_bytes'] / 2**20:.0f} | {of['gradient']:.1e} |"
                )
    return lines


def left_out_table(report: dict) -> list[str]:
    """Of `benchmarks/left_out.py`."""
    lines = [
        f"The demo's training from {len(report['seeds'])} seeds, with groups that have no gradient "
        f"left out of body and head, and without. Held-out accuracy and its standard error; then "
        f"seconds of old log-probs and updates over the run, mean over seeds.",
        "",
        "| groups without a gradient | accuracy before | after | old log-probs, s | updates, s |",
        f"|{'---|' * 5}",
    ]
    for arm, runs in report["runs"].items():
        summaries = [run["summary"] for run in runs]
        before, after = (
            " ".join(f"{of[key]:.3f} ± {of[f'{key}_se']:.3f}" for of in summaries)
            for key in ("before", "after")
        )
        old, update = (mean(sum(run[f"{k}_s"]) for run in runs) for k in _STAGES)
        lines.append(f"| {arm} | {before} | {after} | {old:.0f} | {update:.0f} |")
    saved = left_out.saved(report["runs"])
    share = [
        mean(of)
        for of in zip(*(r["left_out_frac"] for r in report["runs"]["left out"]), strict=True)
    ]
    lines += [
        "",
        f"Left out: {share[0]:.0%} of the responses in the first step, {share[-1]:.0%} in the last "
        f"one, {mean(share):.0%} on average; saved are {saved[0]:.1f} s, {saved[-1]:.1f} s and "
        f"{sum(saved):.0f} s in all.",
    ]
    return lines


def compare_repeat_table(report: dict) -> list[str]:
    """Return the gains of `gspo-ops compare` beside those of an earlier measurement."""
    earlier = ROOT / "benchmarks/results/cpu-compare-earlier.json"
    return compare_report.repeated(report, json.loads(earlier.read_text()))


_STAGES = ("old_log_probs", "update")


def gpu_table(report: dict) -> list[str]:
    """Of `make gpu`: what each step came to."""
    lines = ["| step | | s |", "|---|---|---|"]
    for step in report["steps"]:
        lines.append(f"| {step['name']} | {step['result']} | {step['seconds']:.0f} |")
    for benchmark in report["benchmarks"]:
        lines += ["", *bench_table(benchmark)]
    return lines


TABLES: dict[str, Callable[[dict], list[str]]] = {
    "bench": bench_table,
    "bench_summary": bench_summary,
    "clip_error": clip_error_table,
    "compare": compare_report.report,
    "compare_repeat": compare_repeat_table,
    "gpu": gpu_table,
    "left_out": left_out_table,
    "memory": memory_table,
    "mismatch": mismatch_table,
    "static": static_table,
    "trainer": trainer_table,
    "trl_run": trl_table,
    "updates": updates_table,
}


# What is generated from what


def pictures() -> dict[Path, tuple[Path, Callable[[dict, Path], None]]]:
    """Pictures in docs/, with the results file and the function that they are made from."""
    drawn = {
        "bench.png": ("cpu-bench.json", plots.bench),
        "memory.png": ("cpu-memory.json", plots.memory),
        "clip_error.png": ("cpu-clip-error.json", plots.clip_error),
        "compare.png": ("cpu-compare.json", compare_plot.draw),
        "mismatch.png": ("cpu-mismatch.json", plots.mismatch),
        "updates.png": ("cpu-updates.json", updates.draw),
        "left_out.png": ("cpu-left-out.json", left_out.draw),
    }
    return {
        ROOT / "docs" / name: (ROOT / "benchmarks/results" / source, draw)
        for name, (source, draw) in drawn.items()
    }


def updated(text: str) -> str:
    """A document with every marked block written anew."""

    def block(match: re.Match[str]) -> str:
        report = json.loads((ROOT / match[2]).read_text())
        if report.get("dry_run"):
            raise SystemExit(f"{match[2]} is of a dry run: nothing was measured")
        return match[1] + render(report, match[3]) + match[4]

    text = SETTINGS.sub(lambda match: f"{match[1]}{trl_settings.table()}\n\n{match[2]}", text)
    return BLOCK.sub(block, text)


def documents() -> list[Path]:
    """What may have marked blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    texts = {path: path.read_text() for path in documents()}
    if "--check" in sys.argv[1:]:
        stale = [path for path, text in texts.items() if updated(text) != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what its results files say: run make report")
        return len(stale)
    for path, text in texts.items():
        path.write_text(updated(text))
    for path, (source, draw) in pictures().items():
        draw(json.loads(source.read_text()), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
