"""Time, peak memory and provenance, measured in the same way by every benchmark."""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from gspo_ops.backend import IS_INTERPRETED
from gspo_ops.environment import provenance as provenance
from gspo_ops.testing import patch_interpreter

Step = Callable[[], object]
T = TypeVar("T")


def as_a_gpu_computes() -> None:
    """Patch Triton's interpreter, if kernels run in it, because it has no bfloat16 products."""
    if IS_INTERPRETED:
        patch_interpreter()


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(step: Step, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(step: Step, device: torch.device) -> int:
    """Measure the peak of one step's extra memory, including what it returns."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    # the allocator keeps no peak, but the kernel has a high-water mark of the resident set
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water_mark()
    step()
    return _high_water_mark() - before


def peak_tensor_bytes(step: Step, device: torch.device) -> int:
    """Measure the same for tensors alone, without what libraries take for themselves."""
    if device.type == "cuda":
        return peak_bytes(step, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))


def plausible(peak: int, returned_bytes: int) -> bool:
    """Return whether a peak is plausible; below what is returned, pages were taken meanwhile."""
    return peak > 0.99 * returned_bytes


def release_memory() -> None:
    """Return what the C allocator has kept from earlier steps, which would hide a peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _high_water_mark() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def interleaved(
    measurements: dict[str, Callable[[], T]],
    rounds: int,
    after: Callable[[dict[str, list[T]]], object] = lambda taken: None,
) -> dict[str, list[T]]:
    """Measure everything once per round, in alternating order; call `after` after each round."""
    taken: dict[str, list[T]] = {name: [] for name in measurements}
    order = list(measurements.items())
    for _ in range(rounds):
        for name, take in order:
            taken[name].append(take())
        order.reverse()  # so that none always pays for what another has left behind
        after(taken)
    return taken


def in_a_process(module: str, arguments: list[str]) -> dict:
    """Run a module in a process with its own peak memory; return the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def process_peak_bytes() -> int:
    """Return the peak memory of this process so far, including libraries."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write(path: Path, report: dict) -> None:
    """Write a report atomically: a reader never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


# What only a GPU has, and its substitutes elsewhere


def device_properties(device: torch.device) -> dict[str, object]:
    """Return name, multiprocessors, and bytes of the L2 cache and of the memory."""
    if device.type != "cuda":
        return {"name": "none, this is a dry run", "multiprocessors": 1, "l2": 1 << 25, "bytes": 0}
    of = torch.cuda.get_device_properties(device)
    return {
        "name": of.name, "multiprocessors": of.multi_processor_count, "l2": of.L2_cache_size,
        "bytes": of.total_memory, "capability": torch.cuda.get_device_capability(device),
    }  # fmt: skip


def seconds_each(step: Step, device: torch.device, calls: int = 10) -> float:
    """Time a step by the device's clock: the median of three runs of `calls` calls each."""
    if device.type != "cuda":
        return seconds(step, device)
    for _ in range(2):
        step()
    times = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls / 1e3)
    return sorted(times)[1]


def kernel_seconds(step: Step, device: torch.device) -> dict[str, tuple[float, int]]:
    """Profile a step and return seconds and calls of each kernel."""
    is_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        step()
        synchronize(device)
    name = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    return {event.key: (getattr(event, name) / 1e6, event.count) for event in seen.key_averages()}
