"""Tables and plots of results files; `make report` writes those of README.md and docs/.

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
    """Return a results file as Markdown with its provenance, as its own table or a named one."""
    lines = TABLES[table or report["benchmark"]](report)
    peers = [f"{name} {version}" for name, version in report.get("peers", {}).items()]
    where = "; ".join([*report["environment"], *peers])
    threads = f"{report['threads']} thread{'s' * (report['threads'] != 1)}"
    last = f"{where}; {threads}; commit {report['commit']}, {report['date']}."
    return "\n".join([*lines, "", last, ""])


def bench_table(report: dict) -> list[str]:
    """Build the tables of `gspo-ops bench`, one for every path, shape and dtype."""
    rounds = sorted({row["rounds"] for row in report["results"]})
    lines = [
        f"The first columns give the time of forward and backward of GSPO's loss and the peak "
        f"memory beyond the returned gradients, when a fraction f of the sequences has a gradient. "
        f"The first row has those of eager PyTorch with fp32 logits, and the other rows are "
        f"relative to it. Numbers are medians over {' to '.join(map(str, rounds))} interleaved "
        f"rounds, and ratios of times are taken within a round. The last three columns cover all "
        f"f. % is the least possible time as a percentage of the measured time: the least possible "
        f"time is that of the bytes (from logits) or FLOPs (from hidden states) that no "
        f"implementation can avoid, at the rate of a copy or a matrix product measured in the same "
        f"rounds. It can exceed 100, because the rate itself is a measurement. s_i is the largest "
        f"error of the ratio s_i against float64, inferred from the "
        f"loss, in bold if it exceeds the clip range of 3e-4. The last column is the largest "
        f"relative L2 error of a gradient against float64.",
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
        return f"| {plots.shown(name)} | {cells[0]} |{' |' * (len(cells) + 2)}"
    roof = "-".join(dict.fromkeys(f"{100 * x:.0f}" for x in (min(of_roof), max(of_roof))))
    bold = "**" if max(ratio) > GSPO().clip_low else ""
    return (
        f"| {plots.shown(name)} | {' | '.join(cells)} | {roof} | {bold}{max(ratio):.0e}{bold} "
        f"| {max(grad):.0e} |"
    )


def bench_summary(report: dict) -> list[str]:
    """Build a table of `gspo-ops bench`: a line per input, ours and the fastest other provider."""
    groups = plots.groups(report)
    first, *_ = groups.values()
    fs = [first[0]["f"], first[len(first) // 2]["f"]]
    columns = [f"{name}, f={f:g}" for name in ("gspo_ops", "fastest other provider") for f in fs]
    lines = [
        "Each cell gives the time and the extra memory of forward and backward, both relative to "
        "eager PyTorch with fp32 logits, when a fraction f of the responses has a gradient. The "
        "number in parentheses is the error of the ratio s_i against float64, in bold if it "
        "exceeds the clip range of 3e-4. N is the number of tokens, V the vocabulary size and H "
        "the hidden size.",
        "",
        f"| | {' | '.join(columns)} |",
        f"|{'---|' * (1 + len(columns))}",
    ]
    for key, rows in groups.items():
        shown = [row["providers"] for row in rows if row["f"] in fs]
        ours = [_summary_cell("gspo_ops", of, rows) for of in shown]
        names = [_fastest_other(of) for of in shown]
        others = [
            f"{plots.shown(name)}: {_summary_cell(name, of, rows)}"
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
    """Build the table of `benchmarks/clip_error.py`."""
    lengths = list(report["log_ratio_rms"])
    lines = [
        f"Each cell gives the error of the ratio s_i against float64 (root mean square) and the "
        f"percentage of clip decisions that this error flips, for responses of the length that "
        f"the column names. Every method gets the same bf16 hidden states and bf16 head, for "
        f"{report['sequences']} responses of {report['length']} tokens sampled from "
        f"{report['model']}, whole and cut into shorter pieces. The old log-probs are exact, or "
        f"come from the same method as the new ones. Decisions are counted for normally "
        f"distributed log-ratios with a standard deviation of {report['spread']:.1e}, of which the "
        f"clip range, from 3e-4 below 1 to 4e-4 above, clips 15%. Log-probs are averaged in "
        f"float64.",
        "",
        f"| old log-probs | method | {' | '.join(lengths)} |",
        f"|{'---|' * (2 + len(lengths))}",
    ]
    for case, title in (("exact", "exact"), ("same", "from the same method")):
        for name, of in report["methods"].items():
            points = [of["missing"]] * len(lengths) if "missing" in of else [
                f"{at['rms_error']:.1e}, {at['flipped']:.1%}" for at in of[case].values()
            ]  # fmt: skip
            lines.append(f"| {title} | {name} | {' | '.join(points)} |")
    return lines


def memory_table(report: dict) -> list[str]:
    """Build the table of `benchmarks/memory.py`."""
    first = report["results"][0]
    lines = [
        f"The table compares the measured peak memory of all tensors with the plan's prediction, "
        f"in MiB beyond the returned gradients, for N rows, V={first['V']}, H={first['H']} and "
        f"{first['dtype']}.",
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
    """Build the tables of `benchmarks/static.py`."""
    targets = list(dict.fromkeys(row["target"] for row in report["ours"]))
    given = report["given"]
    lines = [
        "The kernels were compiled for each architecture, but not run. Each cell gives registers "
        "per thread / spills / shared memory in KiB. Kernels that process logits add the width of "
        "the loads in their loops, if they have any, and the number of instructions per logit. "
        "Matrix products add the number of matrix instructions and, if there are any, of TMA "
        "instructions, which copy boxes of a tensor. An error message replaces the numbers of "
        "kernels that do not compile, and an empty cell means that the kernel does not exist for "
        "that architecture.",
        "",
        f"| | kernel | {' | '.join(targets)} |",
        f"|{'---|' * (2 + len(targets))}",
    ]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in [{"peer": "gspo_ops", **row} for row in report["ours"]] + report["others"]:
        key = row["peer"], row.get("kernel", "its other kernels" if _compiles(report, row) else "")
        cells.setdefault(key, {})[row["target"]] = _static_cell(row)
    for (peer, kernel), of in cells.items():
        lines.append(f"| {peer} | {kernel} | {' | '.join(of.get(t, '') for t in targets)} |")
    fs = list(dict.fromkeys(row["f"] for row in report["predictions"]))
    lines += [
        "",
        f"**Predicted, not measured**: forward and backward would take these milliseconds for "
        f"N={report['N']}, V={report['V']}, H={report['H']} and bf16, when a fraction f of the "
        f"rows has a gradient, if the only limit were {given['bandwidth']:g} GB/s (from logits) or "
        f"{given['matmul']:g} TFLOP/s (from hidden states).",
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
        "**Predicted, not measured**: each way to compute gradients from hidden states would take "
        "these milliseconds at the rates that `designs` in `benchmarks/static.py` assumes.",
        "",
        f"| | {' | '.join(f'f={f:g}' for f in fs)} |",
        f"|{'---|' * (1 + len(fs))}",
    ]
    for way in dict.fromkeys(row["way"] for row in report["designs"]):
        times = [format(row["ms"], ".1f") for row in report["designs"] if row["way"] == way]
        lines.append(f"| {plots.shown(way)} | {' | '.join(times)} |")
    lines += [
        "",
        "The table counts the kernels of Triton and of torch that one forward and backward from "
        "hidden states launches, and gives the host time of Python and of torch's dispatcher. That "
        "time was measured on meta tensors and does not include the driver's.",
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
    """Build the table of `benchmarks/mismatch.py`."""
    lengths = list(next(iter(report["bodies"]["float32"].values()))["by_length"])
    lines = [
        f"The {report['sequences']} responses of {report['length']} tokens were sampled from "
        f"{report['model']}, and are taken whole and cut into shorter pieces. The body is the "
        f"model without its head, and the source is what changes between the two computations. "
        f"Each numbered column gives, for responses of that many tokens, the error of the ratio "
        f"s_i (root mean square) and the percentage of clip decisions that it flips. The last "
        f"column gives the percentage of tokens whose ratio leaves GRPO's clip range because of "
        f"the noise alone.",
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
    """Build the tables of `benchmarks/trainer.py`."""
    seeds = len(report["seeds"])
    lines = [
        f"Both losses ran from {seeds} seeds, in turns. Times are medians over all steps but the "
        f"first, and then over seeds; their ratio to eager is taken within a seed. Peak memory is "
        f"that of the whole process, including the model, the optimizer and libraries. Rewards are "
        f"means over seeds. The difference is the reward with hidden minus that with eager, with "
        f"its standard error over seeds.",
        "",
        "| | loss from | updates of a step, s | ratio to eager | old log-probs, s | peak, MiB "
        "| reward by step |",
        f"|{'---|' * 7}",
    ]
    for case, of in report["results"].items():
        lines += _trainer_lines(case, of)
    lines += [
        "",
        f"Here, sampling is in bf16 and training in fp32, and numbers are medians over 2 steps and "
        f"{seeds} seeds. The first four numbers of a row are the absolute difference between the "
        "log-probs of sampling and of training, for tokens and for the means over a response. The "
        "others are the percentage of tokens that this difference alone clips, the percentage that "
        "is clipped in all updates, and the largest error of a ratio before the first update.",
        "",
        "| objective | old log-probs from | token, mean | token, max | response, mean "
        "| response, max | clipped by difference | clipped in updates | error of first ratios |",
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
    """Build a line for each loss and one with the difference of their rewards."""
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
    """Build the tables of `benchmarks/trl_run.py`."""
    of = report["settings"]
    lines = [
        f"Each run trains {report['model']} in fp32 for {of['max_steps']} steps, with "
        f"{of['num_iterations']} updates on every {of['per_device_train_batch_size']} responses of "
        f"at most {of['max_completion_length']} tokens. The first three columns compare the two "
        f"trainers' runs from one seed: whether all sampled tokens are the same, and how many "
        f"there are; the largest difference between the losses of a step; and the largest relative "
        f"difference between the norms of its gradients. The other columns describe one gradient, "
        f"at the weights after the last update: the percentage of clipped ratios, the range of the "
        f"importance weights, and the relative L2 distances of both trainers' gradients from that "
        f"of TRL's loss in float64, and from each other.",
        "",
        "| | same tokens | loss | norm | clipped | weights | TRL to float64 | ours to float64 "
        "| ours to TRL |",
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
        f"The next table gives the seconds of a step, the seconds of a step that trains on "
        f"responses sampled before (an update), and the peak memory of the whole process. They are "
        f"medians over {report['rounds']} runs of each trainer, which take turns. Ratios of times "
        f"are taken step by step.",
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
    """Build the table of `gspo-ops bench --path model`."""
    lines = [
        f"Each update trains {report['model']} in {report['dtype']} on {report['sequences']} "
        f"responses of {report['tokens']} tokens that the model sampled after a prompt of "
        f"{report['prompt']}. It consists of the loss, its backward with activation checkpointing, "
        f"gradient clipping and a step of AdamW. A fraction f of the responses has a gradient, and "
        f"the first column says why the others have none: they have no advantage, or they are "
        f"clipped. Times and memory are medians over {report['rounds']} rounds, in each of which a "
        f"trainer's updates follow one another. The columns give the seconds of an update; its "
        f"time relative to the same trainer at f=1 and to the first trainer at the same f, both "
        f"taken within a round; the peak memory beyond what was in use before the update; and the "
        f"relative L2 distance of the gradient from that of the reference trainer's fused loss, "
        f"computed over every response.",
        "",
        "| why no gradient | trainer | f | s | relative to f=1 | relative to first trainer | MiB "
        "| gradient |",
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
    """Build the table of `benchmarks/left_out.py`."""
    lines = [
        f"The demo ran from {len(report['seeds'])} seeds, with groups that have no "
        f"gradient either left out of body and head, or computed. The accuracy is that on held-out "
        f"problems, with its standard error, before and after training from each seed. Times are "
        f"the seconds that old log-probs and updates took in the whole run, averaged over seeds.",
        "",
        "| groups without a gradient | accuracy before | accuracy after | old log-probs, s "
        "| updates, s |",
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
        f"In the first step, {share[0]:.0%} of the responses are left out; in the last one, "
        f"{share[-1]:.0%}; and on average, {mean(share):.0%}. This saves {saved[0]:.1f} s in the "
        f"first step, {saved[-1]:.1f} s in the last one and {sum(saved):.0f} s in the whole run.",
    ]
    return lines


def compare_repeat_table(report: dict) -> list[str]:
    """Return the gains of `gspo-ops compare` beside those of an earlier measurement."""
    earlier = ROOT / "benchmarks/results/cpu-compare-earlier.json"
    return compare_report.repeated(report, json.loads(earlier.read_text()))


_STAGES = ("old_log_probs", "update")


def gpu_table(report: dict) -> list[str]:
    """Build the tables of `make gpu`: the result of each step, then its benchmarks."""
    lines = ["| step | result | s |", "|---|---|---|"]
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


# Generated files and their sources


def pictures() -> dict[Path, tuple[Path, Callable[[dict, Path], None]]]:
    """Return the pictures in docs/, each with its results file and the function that draws it."""
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
    """Return a document with every marked block regenerated."""

    def block(match: re.Match[str]) -> str:
        report = json.loads((ROOT / match[2]).read_text())
        if report.get("dry_run"):
            raise SystemExit(f"{match[2]} comes from a dry run: nothing was measured")
        return match[1] + render(report, match[3]) + match[4]

    text = SETTINGS.sub(lambda match: f"{match[1]}{trl_settings.table()}\n\n{match[2]}", text)
    return BLOCK.sub(block, text)


def documents() -> list[Path]:
    """Return the paths of all documents that may have marked blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    texts = {path: path.read_text() for path in documents()}
    if "--check" in sys.argv[1:]:
        stale = [path for path, text in texts.items() if updated(text) != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} does not match its results files: run make report")
        return len(stale)
    for path, text in texts.items():
        path.write_text(updated(text))
    for path, (source, draw) in pictures().items():
        draw(json.loads(source.read_text()), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
