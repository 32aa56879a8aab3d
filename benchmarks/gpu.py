"""Run everything that needs a GPU, in at most nine minutes: `make gpu`.

    python -m gspo_ops.benchmarks.gpu [--limit SECONDS] [--out NAME.json] [--dry-run]

Each step runs in a process of its own, with a time limit. A step that fails or hangs is recorded,
and the next one begins. The results file is complete after every step, and includes what a step
had found before it was cut off. A dry run takes every step without a GPU, at tiny sizes and in
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from gspo_ops.environment import provenance
from gspo_ops.head import PRODUCTS_TABLE

from .experiments import faster
from .measure import write

MODULE = "gspo_ops.benchmarks.gpu"  # __name__ differs when this file is run as a program
LIMIT = 540.0  # seconds in all
_DRY = 4.0  # factor on all limits for an interpreter on two cores
SHAPES = {"logits": "8192,151936", "hidden": "8192,151936,4096"}
TINY = {"logits": "16,300", "hidden": "16,300,16"}  # sizes for a dry run
PEERS = ["TRL", "Liger", "verl", "cut"]
TESTS_PART = "GSPO_OPS_TESTS_PART"  # variable that says which tests a process runs, such as 0/4
_TAIL = 3000  # characters of a step's output that are kept


class Step(NamedTuple):
    """A command, and the seconds it may take."""

    name: str
    command: Sequence[str]
    limit: float


def run_steps(
    steps: Sequence[Step],
    limit: float,
    done: Callable[[dict], None],
    *,
    least: float = 3.0,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run the steps one after the other.

    Args:
        steps: steps to run.
        limit: seconds for all steps; a step gets the remaining time if its own limit is longer.
        done: called with the name, result, status, seconds and last output of each step.
        least: seconds below which a step is not begun.
        environment: additional environment variables of the steps.
    """
    start = time.monotonic()
    for step in steps:
        left = limit - (time.monotonic() - start)
        if left < least:
            done({"name": step.name, "result": "not reached", "seconds": 0.0})
            continue
        done({"name": step.name, **_run(step.command, min(step.limit, left), environment or {})})


def _run(command: Sequence[str], limit: float, environment: Mapping[str, str]) -> dict:
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        try:
            status: int | None = process.wait(limit)
            result = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # also kills the processes that it has started
            process.wait()
            status, result = None, f"cut off after {limit:.0f} s"
        output.seek(0)
        text = output.read()
    return {
        "result": result, "status": status, "seconds": time.monotonic() - start,
        "output": text[-_TAIL:],
    }  # fmt: skip


def plan(folder: Path, *, is_dry: bool = False) -> list[Step]:
    """Return the steps to run on a GPU, the most important first.

    Args:
        folder: folder into which the steps write their results.
        is_dry: whether sizes are those for the interpreter, and tests are only collected.
    """
    python, rounds = sys.executable, "1" if is_dry else "10"
    shapes = TINY if is_dry else SHAPES
    fractions = ["--f", "1", "0.5"]

    def part(name: str, limit: float) -> Step:
        command = [python, "-m", "gspo_ops.benchmarks.experiments", name]
        return Step(name, [*command, "--out", str(folder / "experiments.jsonl")], limit)

    def bench(name: str, limit: float, path: str, shape: str, *options: str) -> Step:
        command = [python, "-m", "gspo_ops.cli", "bench", "--rounds", rounds, "--path", path]
        out = ["--shape", shapes[shape], "--out", str(folder / f"{name}.json")]
        return Step(f"bench {name}", [*command, *out, *options], limit)

    ours = ["--against", "compile", "plan=", "products="]
    tests = [python, "-m", MODULE, "--tests", *(["--collect-only"] if is_dry else [])]
    steps = [
        part("probe", 20),
        Step("tests", tests, 120),
        part("accuracy", 25),
        part("whole", 45),
        Step("verify", [python, "-m", "gspo_ops.cli", "verify"], 50),
        Step("profile", [python, "-m", MODULE, "--profile", str(folder / "profile.json")], 30),
        bench("logits-bf16", 40, "logits", "logits", *fractions, "--against", "compile"),
        bench("hidden-bf16", 50, "hidden", "hidden", *fractions, *ours),
        part("products", 20),
        part("fold", 15),
        part("host", 15),
        bench("peers-logits", 30, "logits", "logits", *fractions, "--against", *PEERS),
        bench("peers-hidden", 40, "hidden", "hidden", *fractions, "--against", *PEERS),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        few = "test_masked_rows"
        command = [sanitizer, "--error-exitcode", "9", python, "-m", "pytest", "-q", "-m", "gpu"]
        steps.append(Step("memcheck", [*command, "tests/test_gpu.py", "-k", few], 30))
    return steps


def run_tests(options: Sequence[str], processes: int = 4) -> int:
    """Run the GPU tests in a few processes, with plain pytest; return the worst status."""
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed")
        return 1
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]

    def run(i: int) -> int:
        """Run one process and print its lines as they come, each one whole."""
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, TESTS_PART: f"{i}/{processes}"},
        )  # fmt: skip
        for line in process.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
        return process.wait()

    with ThreadPoolExecutor(processes) as pool:
        return max(pool.map(run, range(processes)))


def profile(out: Path) -> None:
    """Write the achieved GB/s and TFLOP/s of our kernels."""
    from gspo_ops.kernels.logits import logits_bwd_kernel, logits_fwd_kernel

    from .bench import step
    from .measure import as_a_gpu_computes, default_device, kernel_seconds, synchronize
    from .providers import LOSSES
    from .workloads import draw

    as_a_gpu_computes()
    device = default_device()
    found: dict[str, dict] = {}
    # number of times that they read or write 2 bytes per logit
    passes_over_logits = {logits_fwd_kernel.__name__: 1, logits_bwd_kernel.__name__: 2}
    for path, names in (
        ("logits", ["gspo_ops"]), ("hidden", ["gspo_ops", "gspo_ops, products=triton"]),
    ):  # fmt: skip
        shape = SHAPES if device.type == "cuda" else TINY
        N, V, H = (*map(int, shape[path].split(",")), 1)[:3]
        workload = draw(path, (N, V, H), torch.bfloat16, device).at(1.0)  # type: ignore[arg-type]
        for name in names:
            loss = LOSSES[path][name].compute
            step(loss, workload)
            synchronize(device)
            taken = kernel_seconds(partial(step, loss, workload), device)
            kernels: dict[str, dict] = {
                key[:80]: {"ms": 1e3 * seconds, "calls": calls}
                for key, (seconds, calls) in taken.items()
                if seconds > 1e-5
            }
            for key, of in kernels.items():
                if passes := passes_over_logits.get(key):
                    of["GB/s"] = passes * 2 * N * V / of["ms"] / 1e6
            total = sum(of["ms"] for of in kernels.values())
            found[f"{path}, {name}"] = {"kernels": kernels, "ms": total}
            if path == "hidden":
                found[f"{path}, {name}"]["TFLOP/s at 6NVH"] = 6 * N * V * H / total / 1e9
            write(out, {"profiles": found})
        del workload  # free it before the next one is made
    print(json.dumps(found, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Run all steps; return 0 if all passed, 1 if one did not, and 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all steps")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-DEVICE.json")
    parser.add_argument("--dry-run", action="store_true", help="take every step without a GPU")
    parser.add_argument("--profile", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tests", action="store_true", help=argparse.SUPPRESS)
    args, options = parser.parse_known_args(argv)
    if args.tests:
        return run_tests(options)
    if options:
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    if args.profile is not None:
        profile(args.profile)
        return 0
    if not (args.dry_run or torch.cuda.is_available()):
        print("make gpu needs a CUDA or ROCm device, but torch finds none", file=sys.stderr)
        return 2
    device = "dry run" if args.dry_run else torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder = Path("runs" if args.dry_run else "benchmarks/results")
    out = args.out or folder / f"gpu-{slug}.json"
    report: dict = {"benchmark": "gpu", **provenance(), "device": device, "steps": []}
    report |= {"dry_run": True} if args.dry_run else {"driver": _driver()}
    with tempfile.TemporaryDirectory() as name:
        found = Path(name)

        def done(step: dict) -> None:
            print(f"{step['name']}: {step['result']}, {step['seconds']:.0f} s", flush=True)
            report["steps"].append(step)
            write(out, report | collected(found))

        steps = plan(found, is_dry=args.dry_run)
        environment = {"TRITON_INTERPRET": "1"} if args.dry_run else {}
        if args.dry_run:
            steps = [step._replace(limit=_DRY * step.limit) for step in steps]
        limit = args.limit * (_DRY if args.dry_run else 1)
        run_steps(steps, limit, done, environment=environment)
        if not args.dry_run:
            remember(device, collected(found)["products"])
    print(out)
    return 0 if all(step["result"] == "passed" for step in report["steps"]) else 1


def remember(device: str, products: dict[str, str]) -> None:
    """Make the faster products the default on that device."""
    table = json.loads(PRODUCTS_TABLE.read_text())
    table.setdefault(device, {}).update(products)
    write(PRODUCTS_TABLE, table)


def collected(folder: Path) -> dict:
    """Collect what the steps have written so far."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    found = [json.loads(path.read_text()) for path in files]
    lines = folder / "experiments.jsonl"
    text = lines.read_text() if lines.exists() else ""
    # a step that was cut off may have left an incomplete line
    experiments = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    return {
        "experiments": experiments,
        "products": faster(experiments),
        "benchmarks": [x for x in found if x.get("benchmark") == "bench"],
        "profiles": next((x["profiles"] for x in found if "profiles" in x), {}),
    }


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
