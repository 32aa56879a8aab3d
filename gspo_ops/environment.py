"""Versions and devices of this machine."""

from __future__ import annotations

import os
import platform
import subprocess
import time

import torch

from . import __version__
from .backend import has_bf16

ISSUES = "https://github.com/gspo-ops/gspo-ops/issues"


def environment() -> str:
    """Return versions and devices, as every results file should state them."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    bf16 = "with" if has_bf16(torch.device("cpu")) else "without"
    lines = [
        f"gspo_ops {__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, triton {triton_version}",
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()} {bf16} bfloat16",
    ]
    if not torch.cuda.is_available():
        lines.append("no GPU: ops run on their chunked CPU path")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return "\n".join(lines)


def provenance() -> dict:
    """Return where, when and at which commit results are made; "-dirty" if the tree is changed."""
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    return {
        "environment": environment().splitlines(), "threads": torch.get_num_threads(),
        "commit": commit, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
