"""`make gpu`: all that is worth doing on a GPU, in one run of at most nine minutes.

    python -m gspo_ops.benchmarks.gpu [--limit SECONDS] [--out NAME.json]

Each step has a process and a time limit of its own: one that fails or hangs is written down, and
the next begins. The results file is whole after every step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from gspo_ops.environment import provenance

LIMIT = 540.0  # seconds in all
_TAIL = 3000  # characters of a step's output that are kept


class Step(NamedTuple):
    """A command, and the seconds it may take."""

    name: str
    command: Sequence[str]
    limit: float


def run_steps(
    steps: Sequence[Step], limit: float, done: Callable[[dict], None], *, least: float = 3.0
) -> None:
    """Run one after the other.

    Args:
        steps: what to run.
        limit: seconds for all of them; a step gets what is left, if that is less than its own.
        done: is told the name, result, status, seconds and last output of each step.
        least: seconds below which a step is not begun.
    """
    start = time.monotonic()
    for step in steps:
        left = limit - (time.monotonic() - start)
        if left < least:
            done({"name": step.name, "result": "not reached", "seconds": 0.0})
            continue
        done({"name": step.name, **_run(step.command, min(step.limit, left))})


def _run(command: Sequence[str], limit: float) -> dict:
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit)
            result = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # and what it has started
            process.wait()
            status, result = None, f"cut off after {limit:.0f} s"
        output.seek(0)
        text = output.read()
    return {
        "result": result, "status": status, "seconds": time.monotonic() - start,
        "output": text[-_TAIL:],
    }  # fmt: skip


def plan(folder: Path) -> list[Step]:
    """What is run on a GPU, the most important first; benchmarks write into the folder."""
    python = sys.executable
    bench = [python, "-m", "gspo_ops.cli", "bench", "--rounds", "10"]

    def timed(name: str, limit: float, *options: str) -> Step:
        out = str(folder / f"{name}.json")
        return Step(f"bench {name}", [*bench, *options, "--out", out], limit)

    steps = [
        Step(
            "tests",
            [python, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "--maxfail=30",
             "-n", "4", "--timeout=150"],
            200,
        ),
        Step("verify", [python, "-m", "gspo_ops.cli", "verify"], 60),
        timed(
            "logits-bf16", 60, "--path", "logits", "--shape", "8192,151936",
            "--f", "1", "0.5", "0.1",
        ),
        timed(
            "hidden-bf16", 90, "--path", "hidden", "--shape", "8192,151936,4096", "--f", "1", "0.5",
            "--against", "compile", "TRL", "Liger", "verl", "cut", "plan=", "products=",
        ),
        Step("profile", [python, "-m", __name__, "--profile", str(folder / "profile.json")], 60),
        timed(
            "logits-fp32", 40, "--path", "logits", "--shape", "4096,151936", "--dtype", "float32",
            "--f", "1", "0.5",
        ),
        timed(
            "hidden-frozen", 60, "--path", "hidden", "--shape", "8192,151936,4096", "--f", "1",
            "0.5", "--frozen-head", "--against", "compile", "plan=", "products=",
        ),
        timed(
            "small-vocabulary", 40, "--shape", "8192,32768,4096", "--f", "1", "0.5",
            "--against", "compile", "Liger", "products=",
        ),
    ]  # fmt: skip
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        few = "test_a_row_does_not_depend_on_the_batch or test_masked_rows"
        command = [sanitizer, "--error-exitcode", "9", python, "-m", "pytest", "-q", "-m", "gpu"]
        steps.insert(2, Step("memcheck", [*command, "tests/test_gpu.py", "-k", few], 90))
    return steps


def profile(out: Path) -> None:
    """Achieved GB/s and TFLOP/s of our kernels, and which products are faster."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from gspo_ops.kernels.logits import logits_bwd_kernel, logits_fwd_kernel

    from .bench import step
    from .measure import synchronize, write
    from .providers import LOSSES
    from .workloads import make_workload

    device = torch.device("cuda")
    found: dict[str, dict] = {}
    # these read or write 2 bytes per logit and pass
    passes_over_logits = {logits_fwd_kernel.__name__: 1, logits_bwd_kernel.__name__: 2}
    for path, name in (
        ("logits", "gspo_ops"), ("hidden", "gspo_ops"), ("hidden", "gspo_ops, products=triton"),
    ):  # fmt: skip
        N, V, H = 8192, 151936, 4096
        workload = make_workload(path, (N, V, H), torch.bfloat16, 1.0, device)  # type: ignore[arg-type]
        loss = LOSSES[path][name].compute
        step(loss, workload)
        synchronize(device)
        with profiler(activities=[ProfilerActivity.CUDA]) as seen:
            step(loss, workload)
            synchronize(device)
        kernels = {
            event.key[:80]: {"ms": event.self_device_time_total / 1e3, "calls": event.count}
            for event in seen.key_averages()
            if event.self_device_time_total > 10
        }
        for key, of in kernels.items():
            passes = passes_over_logits.get(key)
            if passes:
                of["GB/s"] = passes * 2 * N * V / of["ms"] / 1e6
        total = sum(of["ms"] for of in kernels.values())
        found[f"{path}, {name}"] = {"kernels": kernels, "ms": total}
        if path == "hidden":
            found[f"{path}, {name}"]["TFLOP/s at 6NVH"] = 6 * N * V * H / total / 1e9
    times = {name: of["ms"] for name, of in found.items() if name.startswith("hidden")}
    write(out, {"profiles": found, "faster_products": min(times, key=lambda name: times[name])})
    print(json.dumps(found, indent=1))


def write_whole(path: Path, report: dict) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all steps; returns 0 if all passed, 1 if one did not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-DEVICE.json")
    parser.add_argument("--profile", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA or ROCm device, and torch sees none here", file=sys.stderr)
        return 2
    if args.profile is not None:
        profile(args.profile)
        return 0
    device = torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    out = args.out or Path(f"benchmarks/results/gpu-{slug}.json")
    report: dict = {
        "benchmark": "gpu", **provenance(), "device": device, "driver": _driver(), "steps": [],
        "benchmarks": [], "profiles": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def done(step: dict) -> None:
            print(f"{step['name']}: {step['result']}, {step['seconds']:.0f} s", flush=True)
            report["steps"].append(step)
            files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
            found = [json.loads(path.read_text()) for path in files]
            report["benchmarks"] = [x for x in found if x.get("benchmark") == "bench"]
            for x in found:
                report["profiles"] = x if "profiles" in x else report["profiles"]
            write_whole(out, report)

        run_steps(plan(folder), args.limit, done)
    print(out)
    return 0 if all(step["result"] == "passed" for step in report["steps"]) else 1


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
