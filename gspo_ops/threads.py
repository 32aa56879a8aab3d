"""Work on a CPU, in pieces, by threads that take the next piece when they have finished one.

torch splits each operation into equal parts, one per thread, and waits for the slowest. If the
machine does other work, this means hundreds of waits per loss. Here each thread computes its pieces
on its own, and there is one wait at the end. A piece's result does not depend on the thread.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .backend import use_triton

T = TypeVar("T")


def for_each(function: Callable[[T], None], pieces: Iterable[T], x: Tensor) -> None:
    """Call function(piece) for all pieces of work on x, in any order if x is on a CPU."""
    pieces = list(pieces)
    threads = min(torch.get_num_threads(), len(pieces))
    # Triton's interpreter runs one kernel at a time
    if x.device.type != "cpu" or use_triton(x) or threads <= 1 or not _limits():
        for piece in pieces:
            function(piece)
        return
    is_inference = torch.is_inference_mode_enabled()

    def alone(piece: T) -> None:
        # both settings belong to a thread, and the caller's may differ
        with torch.inference_mode(is_inference), torch.no_grad():
            function(piece)

    for _ in _pool(threads).map(alone, pieces):
        pass


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that stay alive: a new one spends milliseconds on buffers for products."""
    return ThreadPoolExecutor(threads, "gspo_ops", initializer=_compute_alone)


# a fork has no threads but the one that forked
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _compute_alone() -> None:
    """Make torch use one thread in the thread that calls this.

    torch.set_num_threads would also change the number that other new threads start with.
    """
    torch.get_num_threads()  # torch sets the number once in each thread: let it come first
    for limit in _limits():
        limit(1)


@cache
def _limits() -> tuple[Callable[[int], object], ...]:
    """Return functions that set the calling thread's number of threads; none if torch has none.

    They are OpenMP's and, if torch was built with it, MKL's.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        limits = [library.omp_set_num_threads]
    except (OSError, AttributeError):
        return ()
    if torch.backends.mkl.is_available():
        if not hasattr(library, "MKL_Set_Num_Threads_Local"):
            return ()
        limits.append(library.MKL_Set_Num_Threads_Local)
    return tuple(limits)
