"""`gspo-ops bench`: time, memory and error on this machine, beside what you run now.

All providers get the same tensors. A provider's loss and gradients are compared with float64 before
it is timed: one that computes something else is refused, and one whose error of the ratio exceeds
the clip range is marked. Rounds are interleaved, and ratios are taken within a round, because the
speed of a machine drifts. The rates of a copy and of a matrix product, measured in the same rounds,
are taken as the most that the machine can do.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gspo_ops
from gspo_ops import GSPO
from gspo_ops.backend import has_bf16
from gspo_ops.environment import ISSUES
from gspo_ops.testing import relative

from .measure import (
    as_a_gpu_computes,
    default_device,
    interleaved,
    peak_bytes,
    plausible,
    provenance,
    release_memory,
    seconds,
    write,
)
from .providers import BASELINE, LOSSES, OURS, Loss, Provider, select, versions
from .workloads import SEQUENCES, Drawn, Exact, Workload, draw, exact, floor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# N, V, H by default: minutes on two cores, or seconds on a GPU
SHAPES = {"cpu": (512, 49152, 576), "cuda": (8192, 151936, 4096)}
FRACTIONS: dict[str, tuple[float, ...]] = {"cpu": (1, 0.5), "cuda": (1, 0.6, 0.35, 0.1)}
ROUNDS = {"cpu": 4, "cuda": 20}
# A provider computes something else if the relative L2 error of its gradient, or the error of its
# ratios, exceeds DIFFERENT. The gradient of ours must be within FP32_ERROR, or within 1.1 times
# eager's error plus an ulp of 16 bits if that is more.
DIFFERENT, FP32_ERROR, ULP = 0.05, 5e-6, {2: 2**-8, 4: 0.0}
MODEL = "model"  # given in place of a path
_EXAMPLES = """examples:
  gspo-ops bench                                                 default sizes, both paths
  gspo-ops bench --path hidden --shape 1024,151936,896 --f 1 0.5
  gspo-ops bench --against eager,liger --out bench.json --plot bench.png
  gspo-ops bench --path model                                    whole updates of a model
"""
_CACHE = 256 << 20  # bytes, larger than any machine's last-level cache
_COPY = {"cpu": 256 << 20, "cuda": 2 << 30}


class Sample(NamedTuple):
    """One step: seconds of its forward and of its backward, and its peak memory in bytes."""

    forward: float
    backward: float
    peak_bytes: int

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


class Errors(NamedTuple):
    """Attributes:
    ratio: error of s_i, inferred from the loss.
    grad: relative L2 error, the largest of all gradients.
    """

    ratio: float
    grad: float


# One step


def step(loss: Loss, workload: Workload) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Compute the loss and the gradients of the operands."""
    operands = workload.leaves()
    value = loss(operands, workload.batch)
    value.backward()
    return value.detach(), tuple(x.grad for x in operands)


def errors(loss: Loss, workload: Workload, truth: Exact) -> Errors:
    """Compare a provider with float64; this call also warms it up."""
    value, grads = step(loss, workload)
    off = [
        math.inf if got is None else relative(got, true)
        for got, true in zip(grads, truth.grads, strict=True)
        if true is not None
    ]
    return Errors(abs(value.item() - truth.loss) / truth.noise, max(off))


def refusal(name: str, found: Errors, baseline: Errors, dtype: torch.dtype) -> str | None:
    """Return the reason why a provider is not timed, or None."""
    bound = DIFFERENT
    if name.startswith(OURS):
        bound = max(FP32_ERROR, 1.1 * baseline.grad + ULP[dtype.itemsize])
    if not found.grad <= bound:
        return f"gradients are off by {found.grad:.1e}, more than {bound:.1e}"
    if not found.ratio <= DIFFERENT:
        return f"the loss shows ratios off by {found.ratio:.1e}, more than {DIFFERENT:g}"
    return None


def sample(loss: Loss, workloads: list[Workload]) -> Sample:
    """Measure one step; inputs take turns, so that none is still in a cache from its last step."""
    workloads.append(workloads.pop(0))
    workload = workloads[0]
    device = workload.batch.targets.device
    release_memory()
    operands = workload.leaves()
    values: list[Tensor] = []
    taken: list[float] = []

    def both() -> None:
        taken.append(seconds(lambda: values.append(loss(operands, workload.batch)), device))
        taken.append(seconds(lambda: values.pop().backward(), device))

    peak = peak_bytes(both, device)
    forward, backward = taken
    return Sample(forward, backward, peak)


def rotation(workload: Workload) -> list[Workload]:
    """Return a workload and copies, at most four in all, that together do not fit into a cache."""
    nbytes = sum(x.nbytes for x in workload.operands)
    copies = -(-_CACHE // nbytes) if nbytes < _CACHE else 1
    return [workload] + [
        workload._replace(operands=tuple(
            x.detach().clone().requires_grad_(x.requires_grad) for x in workload.operands
        ))
        for _ in range(min(copies, 4) - 1)
    ]  # fmt: skip


# What the machine can do


def copy_rate(device: torch.device) -> Callable[[], float]:
    """Return a function that measures the bytes per second that a copy reads and writes."""
    source = torch.ones(_COPY[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: 2 * source.nbytes / seconds(partial(target.copy_, source), device)


def matmul_rate(workload: Workload) -> Callable[[], float]:
    """Return a function that measures FLOPs per second of hidden @ weight^T, in their dtype."""
    hidden, weight = (x.detach() for x in workload.operands)
    hidden = hidden.flatten(0, 1)
    out = hidden.new_empty(len(hidden), len(weight))
    flops = 2 * out.numel() * hidden.shape[1]
    run = partial(torch.mm, hidden, weight.mT, out=out)
    return lambda: flops / seconds(run, hidden.device)


# One row of the results


def summary(samples: list[Sample], baseline: list[Sample], returned_bytes: int) -> dict:
    """Return medians over rounds; memory is counted beyond the returned gradients."""
    extra, extra_of_baseline = (
        [s.peak_bytes - returned_bytes for s in taken if plausible(s.peak_bytes, returned_bytes)]
        for taken in (samples, baseline)
    )
    ratios = [a.seconds / b.seconds for a, b in zip(samples, baseline, strict=True)]
    # on a CPU, the system may take back pages, which hides a peak, or all of a small baseline's
    memory_of_baseline = statistics.median(extra_of_baseline) if extra_of_baseline else 0
    memory = statistics.median(extra) if extra and memory_of_baseline else None
    return {
        "median_ms": {
            "forward": 1e3 * statistics.median(s.forward for s in samples),
            "backward": 1e3 * statistics.median(s.backward for s in samples),
            "both": 1e3 * statistics.median(s.seconds for s in samples),
        },
        "time_ratio": {
            "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)
        },
        "extra_bytes": memory,
        "memory_ratio": None if memory is None else memory / memory_of_baseline,
    }  # fmt: skip


class Case(NamedTuple):
    """Attributes:
    path: `"logits"` or `"hidden"`.
    shape: N, V, H.
    dtype: dtype of the operands.
    f: fraction of sequences with a gradient.
    lengths, frozen_head: as in `make_workload`.
    """

    path: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    f: float
    lengths: str = "square"
    frozen_head: bool = False

    def draw(self, device: torch.device) -> Drawn:
        """Draw the tensors, which are the same for every f."""
        return draw(self.path, self.shape, self.dtype, device, frozen_head=self.frozen_head)  # type: ignore[arg-type]


def measure(
    case: Case,
    drawn: Drawn,
    providers: dict[str, Provider],
    rounds: int,
    *,
    progress: Callable[[str], None] = lambda line: None,
    after: Callable[[dict], object] = lambda row: None,
) -> dict:
    """Return one row of the results: every provider on one case.

    Args:
        case: the case to measure.
        drawn: its tensors.
        providers: all providers, including the baseline and ours.
        rounds: number of interleaved measurements of each provider.
        progress: called with a line about the current stage.
        after: called with the current row after each round.

    Raises:
        SystemExit: the errors of ours are too large.
    """
    torch.compiler.reset()  # otherwise, a second shape would be compiled as a dynamic one
    device = default_device()
    path, shape, dtype, f = case[:4]
    progress(f"{path} {shape}: exact gradients in float64")
    workload = drawn.at(f, case.lengths)  # type: ignore[arg-type]
    truth, least = exact(workload), floor(workload)
    results: dict[str, dict] = {}
    found: dict[str, Errors] = {}
    for name, provider in providers.items():
        progress(f"{path} {shape}: checking {name}")
        if why := provider.missing(device):
            results[name] = {"missing": why}
            continue
        try:
            found[name] = errors(provider.compute, workload, truth)
        except Exception as error:  # peers have limits of their own on shapes, dtypes and memory
            if name.startswith(OURS) or name == BASELINE:
                raise
            results[name] = {"missing": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            continue
        if why := refusal(name, found[name], found[BASELINE], dtype):
            if name.startswith(OURS):
                raise SystemExit(f"not timed: {name}: {why}\nnext: report this at {ISSUES}")
            results[name] = {"refused": why}
    del truth
    timed = {n: providers[n].compute for n in found if n not in results}
    workloads = rotation(workload)
    measurements: dict[str, Callable[[], Any]] = {
        name: partial(sample, loss, workloads) for name, loss in timed.items()
    }
    rates: dict[str, Callable[[], Any]] = {"copy": copy_rate(device)}
    if path == "hidden":
        rates["matmul"] = matmul_rate(workload)
    progress(f"{path} {shape} {str(dtype)[6:]} f={f:g}: {rounds} rounds of {len(timed)} providers")

    def row(taken: dict[str, list[Any]]) -> dict:
        rate = {name: statistics.median(taken[name]) for name in rates}
        at_best = least.seconds(rate["copy"], rate.get("matmul", math.inf))
        returned = sum(x.nbytes for x in workload.operands if x.requires_grad)
        for name in timed:
            of = summary(taken[name], taken[BASELINE], returned)
            of["of_roof"] = 1e3 * at_best / of["median_ms"]["both"]
            of["error"] = found[name]._asdict()
            of["exact_enough"] = found[name].ratio <= GSPO().clip_low
            results[name] = of
        N, V, H = shape
        _, valid, live = workload.rows
        return {
            "path": path, "N": N, "V": V, **({"H": H} if path == "hidden" else {}),
            "dtype": str(dtype)[6:], "f": f, "lengths": case.lengths,
            "frozen_head": case.frozen_head, "valid_rows": valid, "live_rows": live,
            "rounds": len(taken[BASELINE]), "returned_bytes": returned, "least": least._asdict(),
            "rate": rate, "plan": _plan(workload),
            "providers": {name: results[name] for name in providers},
        }  # fmt: skip

    taken = interleaved({**measurements, **rates}, rounds, lambda taken: after(row(taken)))
    return row(taken)


def _plan(workload: Workload) -> str:
    if len(workload.operands) == 1:
        return "logits"
    return str(gspo_ops.plan_from_hidden(*workload.leaves()))


# The command


def lines(row: dict) -> list[str]:
    """Return a row of the results as a table for the terminal."""
    sizes = " ".join(f"{k}={row[k]}" for k in "NVH" if k in row)
    extras = [k for k in ("lengths", "frozen_head") if row.get(k) not in (None, "square", False)]
    rates = f"copy {row['rate']['copy'] / 1e9:.1f} GB/s"
    if "matmul" in row["rate"]:
        rates += f", matmul {row['rate']['matmul'] / 1e12:.3g} TFLOP/s"
    width = max(map(len, row["providers"]))
    table = [
        f"{row['path']} {sizes} {row['dtype']} f={row['f']:g} {' '.join(extras)} "
        f"({row['live_rows']} of {row['valid_rows']} rows live); {row['rounds']} rounds; {rates}",
        f"  {'':{width}} {'ms':>7} {'fwd':>7} {'bwd':>7}  {'vs. eager':18}{'of best':>8} "
        f"{'MiB':>7} {'vs. eager':>9}  {'error: s_i':>10} {'gradient':>9}",
    ]
    for name, of in row["providers"].items():
        if why := of.get("missing") or of.get("refused"):
            table.append(f"  {name:{width}} {'REFUSED: ' if 'refused' in of else ''}{why}")
            continue
        ms, ratio, error = of["median_ms"], of["time_ratio"], of["error"]
        memory = f"{'-':>7} {'-':>9}"
        if of["extra_bytes"] is not None:
            memory = f"{of['extra_bytes'] / 2**20:7.0f} {of['memory_ratio']:9.2f}"
        mark = "" if of["exact_enough"] else "  beyond the clip range"
        table.append(
            f"  {name:{width}} {ms['both']:7.1f} {ms['forward']:7.1f} {ms['backward']:7.1f}  "
            f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})  {of['of_roof']:8.0%} "
            f"{memory}  {error['ratio']:10.1e} {error['grad']:9.1e}{mark}"
        )
    return table


def next_step(rows: Sequence[dict]) -> str:
    """Return one line that says what to do after these results."""
    providers = [of for row in rows for of in row["providers"].values()]
    if any(of.get("missing") == "not installed" for of in providers):
        return "next: in a clone, pip install '.[bench]' adds missing peers, except for verl"
    if default_device().type == "cuda":
        return "next: make gpu, in a checkout, writes a results file to share (docs/gpu.md)"
    return "next: docs/integrations.md shows how to put the loss into your trainer"


def shape_of(text: str) -> tuple[int, int, int]:
    """Parse N,V,H or N,V."""
    try:
        N, V, H = (*map(int, text.split(",")), *([1] if text.count(",") == 1 else []))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected N,V,H or N,V, got {text!r}") from None
    if min(N, V, H) < 1 or N % SEQUENCES:
        raise argparse.ArgumentTypeError(f"N must be a multiple of {SEQUENCES}, and all positive")
    return N, V, H


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"f must lie in (0, 1], got {text}")
    return value


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    device = default_device().type
    dtype = "bfloat16" if has_bf16(default_device()) else "float32"
    names = "; ".join(dict.fromkeys(name for of in LOSSES.values() for name in of))
    found = argparse.ArgumentParser(
        prog="gspo-ops bench",
        description="Measure time, peak memory and error of GSPO's loss and gradient on this\n"
        "machine, for gspo_ops, eager PyTorch, torch.compile and peers. In a clone,\n"
        "pip install '.[bench]' installs the peers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add(
        "--path", choices=[*LOSSES, MODEL], nargs="+", default=list(LOSSES),
        help=f"what is timed (default: {' and '.join(LOSSES)}); {MODEL}, which cannot be combined "
        "with others, times whole updates of a model by each trainer",
    )  # fmt: skip
    add("--model", default="smollm2", help=f"for --path {MODEL}: smollm2 or a local directory")
    add(
        "--shape", type=shape_of, nargs="+", metavar="N,V,H", default=[SHAPES[device]],
        help="rows (a multiple of 16), vocabulary and, from hidden states, hidden size "
        f"(default here: {','.join(map(str, SHAPES[device]))})",
    )  # fmt: skip
    add("--dtype", choices=DTYPES, nargs="+", default=[dtype], help=f"default here: {dtype}")
    add(
        "--f", type=fraction, nargs="+",
        help="fractions of sequences with a gradient (default here: "
        f"{', '.join(map(str, FRACTIONS[device]))})",
    )  # fmt: skip
    add(
        "--lengths", choices=("square", "ragged"), default="square",
        help="whether all sequences have the same length (default: %(default)s)",
    )  # fmt: skip
    add("--frozen-head", action="store_true", help="no gradient for the head's weight")
    add(
        "--rounds", type=positive,
        help="measurements of each provider, which take turns (default here: "
        f"{ROUNDS[device]}, or 3 for models)",
    )  # fmt: skip
    add(
        "--against", nargs="+", metavar="NAME",
        help=f"time only the providers whose names contain one of these words: {names}",
    )  # fmt: skip
    add("--out", type=Path, help="JSON file to write")
    add("--plot", type=Path, help="PNG file to write")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gspo-ops bench` and return the exit status."""
    of = parser()
    args = of.parse_args(argv)
    is_terminal = sys.stderr.isatty()

    def progress(line: str) -> None:
        if is_terminal:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    if MODEL in args.path:
        if args.path != [MODEL]:
            of.error(f"--path {MODEL} cannot be combined with others")
        for name in ("shape", "dtype", "lengths", "frozen_head", "against"):
            if getattr(args, name) != of.get_default(name):
                of.error(f"--{name.replace('_', '-')} has no effect with --path {MODEL}")
        from . import updates

        fractions = args.f or updates.FRACTIONS
        updates.run(args.model, fractions, args.rounds or 3, args.out, args.plot, progress)
        print(next_step([]))
        return 0
    device = default_device().type
    rounds = args.rounds or ROUNDS[device]
    against = args.against and [word for text in args.against for word in text.split(",")]
    try:
        chosen = {path: select(path, against) for path in args.path}
    except ValueError as error:
        of.error(str(error))
    as_a_gpu_computes()
    report = {"benchmark": "bench", **provenance(), "peers": versions(), "results": []}
    print("\n".join(report["environment"]), flush=True)

    def keep(row: dict) -> None:
        """Write the results after every round, so that an interrupted run leaves what it has."""
        if args.out:
            write(args.out, report | {"results": [*report["results"], row]})

    for path, shape, dtype in product(args.path, args.shape, args.dtype):
        whole = Case(path, shape, DTYPES[dtype], 1.0, args.lengths, args.frozen_head)
        progress(f"{path} {shape}: inputs")
        drawn = whole.draw(default_device())
        for f in args.f or FRACTIONS[device]:
            row = measure(
                whole._replace(f=f), drawn, chosen[path], rounds,
                progress=progress, after=keep,
            )  # fmt: skip
            progress("")
            print("\n" + "\n".join(lines(row)), flush=True)
            report["results"].append(row)
        del drawn  # free these tensors before the next ones are made
    if args.plot:
        from . import plots

        plots.bench(report, args.plot)
    print(next_step(report["results"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
