"""Kernels compiled for GPUs that are not there, and what their binaries tell."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_CORES = {
    "sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32"
}  # fmt: skip


# registers, spills by their kind, loops, and the text that they were read in
Reading = tuple[int, dict[str, int], list["Loop"], str]


class TargetOnlyDriver:
    """As much of a driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.arch}"

    def get_current_stream(self, device: object) -> int:
        return 0


class Loop(NamedTuple):
    """An innermost loop: instructions, bytes of each access to global memory, barriers."""

    instructions: int
    loads: list[int]
    stores: list[int]
    barriers: int


class Compiled(NamedTuple):
    registers: int
    spills: str  # empty when there are none
    shared: int
    loops: list[Loop]
    has_f64: bool
    matrix_instructions: int  # of the kind that the target is fast with
    narrow_products: list[list[str]]  # of integers: `read_narrow_products`
    reductions: set[tuple[str, str]]
    instructions: int  # of all threads of a program, if it has no loop


@contextmanager
def compiling(target: str) -> Iterator[list[tuple[str, Any]]]:
    """Launches inside compile for a target and run nothing: name and binary of each kernel.

    Of what would be tuned by timing, the first configuration is taken.
    """
    binaries: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        binaries.append((self.__name__, run(self, *args, warmup=True, **kwargs)))

    def first(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.fn.run(*args, **(kwargs | self.configs[0].all_kwargs()))

    hip = "6.4" if TARGETS[target].backend == "hip" else None
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(Autotuner, "run", first),
        mock.patch.object(driver, "_active", TargetOnlyDriver(TARGETS[target])),
        # what a launcher may look at to tell the machines apart
        mock.patch.object(torch.version, "hip", hip),
    ):
        yield binaries


def read_binary(binary: Any, target: str) -> Compiled:
    read = read_amdgcn if target == "gfx942" else read_cubin
    registers, spills, loops, text = read(binary.asm)
    has_f64 = re.search(r"\bf64\b", binary.asm["ttgir"]) is not None
    shown = " ".join(f"{kind}:{n}" for kind, n in spills.items() if n)
    matrix_instructions = len(re.findall(rf"\b{TENSOR_CORES[target]}", text))
    return Compiled(
        registers, shown, binary.metadata.shared, loops, has_f64, matrix_instructions,
        read_narrow_products(binary.asm["ttir"]),
        reductions(binary.asm["ttgir"]),
        count_instructions(text) * binary.metadata.num_warps * TARGETS[target].warp_size,
    )  # fmt: skip


def count_instructions(text: str) -> int:
    """Of a disassembly, SASS or amdgcn."""
    sass, amdgcn = r"/\*[0-9a-f]{4,}\*/\s+\S.*;", r"^\t(?:s|v|ds|global|buffer|flat)_"
    return len(re.findall(f"{sass}|{amdgcn}", text, re.MULTILINE))


def read_narrow_products(ttir: str) -> list[list[str]]:
    """Of each product of integers in 32 bits, the factors that are no constants."""
    constants = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    product = re.compile(
        r"arith\.muli (%\S+), (%\S+?)(?: \{.*\})? : (?:i32|tensor<[\dx]+xi32>)(?: |$)", re.M
    )
    return [[x for x in factors if x not in constants] for factors in product.findall(ttir)]


def reductions(ttgir: str) -> set[tuple[str, str]]:
    """Axis and operands of each reduction, with their layouts: what the order of additions is."""
    layouts = dict(re.findall(r"^(#\w+) = (#?.*)$", ttgir, re.M))
    found = re.findall(
        r'"tt\.reduce"\([^)]*\) <\{axis = (\d+) : i32[^}]*\}> .*?\}\) : \(([^)]*)\)', ttgir, re.S
    )

    def spelt_out(operands: str) -> str:
        return re.sub(r"#\w+", lambda name: layouts.get(name.group(), name.group()), operands)

    return {(axis, spelt_out(spelt_out(operands))) for axis, operands in found}


def measure(
    body: list[str], load: str, store: str, width: Callable[[str], int], barrier: str
) -> Loop:
    """A loop from its instructions and the patterns of its machine."""
    accesses: dict[str, list[int]] = {"load": [], "store": []}
    for line in body:
        for kind, pattern in (("load", load), ("store", store)):
            if found := re.search(pattern, line):
                accesses[kind].append(width(found.group(1)))
    barriers = sum(re.search(barrier, line) is not None for line in body)
    return Loop(len(body), accesses["load"], accesses["store"], barriers)


def read_cubin(asm: dict[str, Any]) -> Reading:
    """Registers, spills, loops, text; a loop runs from a label to the last branch back to it."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [*map(str, command), file.name], capture_output=True, text=True, check=True
            ).stdout
            for command in ([tools / "cuobjdump", "-res-usage"], [tools / "nvdisasm", "-c"])
        )
    code: list[str] = []
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction.group(1))
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if branch and branch.group(1) in labels:
                ends[labels[branch.group(1)]] = len(code)
    assert any("EXIT" in line for line in code), "the disassembly can't be read"
    spans = [(start, end) for start, end in ends.items() if end > start + 1]
    inner = [
        (start, end)
        for start, end in spans
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in spans)
    ]
    loops = [
        measure(code[start:end], r"\bLDG(\S*)", r"\bSTG(\S*)", sass_width, r"\bBAR\b")
        for start, end in inner
    ]
    used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    local = sum(re.search(r"\b(STL|LDL)\b", line) is not None for line in code)
    registers = used.pop("REG")
    return registers, used | {"STL+LDL": local}, loops, sass


def sass_width(suffix: str) -> int:
    return next((b // 8 for b in (128, 64, 16, 8) if re.search(rf"[.US]{b}\b", suffix)), 4)


def read_amdgcn(asm: dict[str, Any]) -> Reading:
    """Registers, spills, loops, which the compiler marks in comments, and text."""
    text = asm["amdgcn"]
    bodies: dict[str, list[str]] = {}
    loop = None
    for line in text.splitlines():
        if block := re.match(r"\.L(BB\w+):|; %bb", line):
            inside = re.search(r"in Loop: Header=(BB\w+)", line)
            loop = inside.group(1) if inside else block.group(1)
        elif loop and re.match(r"\t[a-z]", line):
            bodies.setdefault(loop, []).append(line)
    headers = re.findall(r"^\.L(BB\w+):(?:.*\n\s*;)*.*This Inner Loop Header", text, re.MULTILINE)
    assert "s_endpgm" in text, "the assembly can't be read"
    memory = r"^\t(?:global|buffer|flat)"
    loops = [
        measure(
            bodies[h], memory + r"_load_(\w+)", memory + r"_store_(\w+)", amd_width, "s_barrier"
        )
        for h in headers
    ]
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    used = {name: int(re.findall(rf"\.{name}:\s+(\d+)", text)[0]) for name in names}
    registers = used.pop("vgpr_count")
    return registers, used, loops, text


def amd_width(suffix: str) -> int:
    words = re.match(r"dword(?:x(\d))?$", suffix)
    if words:
        return 4 * int(words.group(1) or 1)
    return 1 if "byte" in suffix else 2


def main_loops(name: str, compiled: Compiled) -> list[Loop]:
    """The loops that read logits."""
    return [] if name.startswith("loss") else [loop for loop in compiled.loops if loop.loads]


def instructions_per_logit(itemsize: int, loops: list[Loop]) -> float:
    return sum(loop.instructions * itemsize / sum(loop.loads) for loop in loops)
