"""Kernels compiled for GPUs that are not present, and what their binaries reveal."""

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


# registers, spills by kind, loops, and the text from which they were read
Reading = tuple[int, dict[str, int], list["Loop"], str]


class TargetOnlyDriver:
    """The part of a driver that compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.arch}"

    def get_current_stream(self, device: object) -> int:
        return 0


class Loop(NamedTuple):
    """An innermost loop: its instructions, bytes of each access to global memory, and barriers."""

    instructions: int
    loads: list[int]
    stores: list[int]
    barriers: int


class Reduction(NamedTuple):
    """A reduction of a tensor along an axis by an operation such as arith.addf."""

    operation: str
    axis: int
    elements: int
    operand: str  # type of the operand, with its layout spelt out

    def is_one_order(self) -> bool:
        """Return whether the result is the same in every layout.

        Sums of two elements commute, as do integer sums and maxima of any number. Elements within a
        thread are added up in the order of its registers: `ReduceOpConversion` of Triton appends
        them one by one, and a blocked layout numbers them so that elements along an axis ascend.
        """
        if self.elements <= 2 or self.operation != "arith.addf":
            return True
        lanes, warps = (self._along_axis(of) for of in ("threadsPerWarp", "warpsPerCTA"))
        return (lanes, warps) == (1, 1)

    def _along_axis(self, name: str) -> int | None:
        """Return an entry of a blocked layout, or of its slices; None for other layouts."""
        found = re.search(rf"#ttg\.blocked<{{.*\b{name} = \[([\d, ]+)\]", self.operand)
        if not found:
            return None
        numbers = [int(n) for n in found.group(1).split(",")]
        for dim in reversed(re.findall(r"#ttg\.slice<{dim = (\d+)", self.operand)):
            del numbers[int(dim)]
        return numbers[self.axis]


class Compiled(NamedTuple):
    registers: int
    spills: str  # empty if there are none
    shared: int
    loops: list[Loop]
    has_f64: bool
    matrix_instructions: int  # those of the target's fast kind
    narrow_products: list[list[str]]  # products of integers: `read_narrow_products`
    reductions: list[Reduction]
    fused: list[str]  # additions that may be fused with a product: `read_fusions`
    handed_over: int  # stores that the last program may rely on: `read_handover`
    instructions: int  # of all threads of a program, if it has no loop
    boxes_loaded: int  # instructions that copy boxes from and to global memory
    boxes_stored: int

    def orders(self) -> set[Reduction]:
        """Return the reductions whose order of addition is not decided by the kernel alone."""
        return {of for of in self.reductions if not of.is_one_order()}


@contextmanager
def compiling(target: str) -> Iterator[list[tuple[str, Any]]]:
    """Compile launches inside for a target without running them; yield each name and binary.

    Kernels that would be tuned by timing take their first configuration.
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
        # launchers may look at this to distinguish the machines
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
        read_reductions(binary.asm["ttgir"]),
        read_fusions(binary.asm["ttgir"]),
        read_handover(binary.asm),
        count_instructions(text) * binary.metadata.num_warps * TARGETS[target].warp_size,
        len(re.findall(r"\bUTMALDG", text)),
        len(re.findall(r"\bUTMASTG", text)),
    )  # fmt: skip


def count_instructions(text: str) -> int:
    """Count the instructions of a disassembly, SASS or amdgcn."""
    sass, amdgcn = r"/\*[0-9a-f]{4,}\*/\s+\S.*;", r"^\t(?:s|v|ds|global|buffer|flat)_"
    return len(re.findall(f"{sass}|{amdgcn}", text, re.MULTILINE))


def read_narrow_products(ttir: str) -> list[list[str]]:
    """Return the factors of each 32-bit integer product that are not constants."""
    constants = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    product = re.compile(
        r"arith\.muli (%\S+), (%\S+?)(?: \{.*\})? : (?:i32|tensor<[\dx]+xi32>)(?: |$)", re.M
    )
    return [[x for x in factors if x not in constants] for factors in product.findall(ttir)]


def read_reductions(ttgir: str) -> list[Reduction]:
    layouts = dict(re.findall(r"^(#\w+) = (#?.*)$", ttgir, re.M))
    found = re.findall(
        r'"tt\.reduce"\([^)]*\) <{axis = (\d+) : i32[^}]*}> \({(.*?)}\) : \(([^)]*)\)', ttgir, re.S
    )
    assert len(found) == ttgir.count('"tt.reduce"'), "the reductions can't be read"

    def spelt_out(operand: str) -> str:
        return re.sub(r"#\w+", lambda name: layouts.get(name.group(), name.group()), operand)

    def reduction(axis: str, region: str, operand: str) -> Reduction:
        (operation,) = re.findall(r"= (arith\.\w+)", region)
        (shape,) = re.findall(r"tensor<((?:\d+x)+)", operand)
        elements = int(shape.split("x")[int(axis)])
        return Reduction(operation, int(axis), elements, spelt_out(spelt_out(operand)))

    return [reduction(*of) for of in found]


def read_fusions(ttgir: str) -> list[str]:
    """Return additions that follow a product of tensors, in a thread or in a sum over elements.

    Whether a compiler rounds in between depends on which instructions it finds side by side.
    """
    products: set[str] = set()
    additions = []
    reduced = ""
    for line in ttgir.splitlines():
        if arguments := re.search(r"\^bb0\((.*)\):", line):
            names, operation, operands = re.findall(r"(%\w+):", arguments.group(1)), "", [reduced]
        elif found := re.search(r'(%\w+)(?::\d+)? = "?([\w.]+)"?(.*)', line):
            names, operation = [found.group(1)], found.group(2)
            operands = re.findall(r"%\w+", found.group(3))
        else:
            continue
        behind = not products.isdisjoint(operands)
        reduced = operands[0] if operation == "tt.reduce" else ""
        # other blocks reuse names
        products.difference_update(names)
        if operation in ("arith.addf", "arith.subf") and behind:
            additions.append(line.strip())
        if operation == "arith.mulf" and ": tensor" in line:
            products.update(names)
        if operation in ("", "tt.reshape", "ttg.convert_layout") and behind:
            products.update(names)
    return additions


# An atomic that releases what its thread has stored before, and acquires what others have stored.
# Nothing is read until a barrier has synchronised the other threads.
PTX_HANDOVER = r"""
    @(%p\d+) \s atom\.global\.gpu\.acq_rel\.add (?: (?! ld\.global) .)*? bar\.sync
"""
AMD_HANDOVER = r"""
    buffer_wbl2 \s sc1 \s+ s_waitcnt \s vmcnt\(0\) [^\n]* \s+ global_atomic_add \s [^\n]* \s+
    s_waitcnt \s vmcnt\(0\) [^\n]* \s+ buffer_inv \s sc1
    (?: (?! (?: global|buffer)_load) .)*? s_barrier
"""


def read_handover(asm: dict[str, Any]) -> int:
    """Count the stores that the program with the last ticket sees from the others.

    Only stores of the thread that takes the ticket count, because its release covers them. Those of
    other threads (of other waves on AMD) may not have arrived by then.
    """
    is_ptx = "ptx" in asm
    pattern, text = (PTX_HANDOVER, asm["ptx"]) if is_ptx else (AMD_HANDOVER, asm["amdgcn"])
    handover = re.search(pattern, text, re.X | re.S)
    if not handover:
        return 0
    if is_ptx:
        return text[: handover.start()].count(f"@{handover.group(1)} st.global")
    # in LLVM's text, the blocks that are entered under the same condition as the atomic's block
    parts = re.split(r"^([\w.]+):.*$", asm["llir"].partition(" atomicrmw ")[0], flags=re.M)
    blocks = dict(zip(parts[1::2], parts[2::2], strict=True))
    (condition,) = re.findall(rf"br i1 (%\d+), label %{re.escape(parts[-2])}\b", parts[-3])
    entered = re.findall(rf"br i1 {condition}, label %([\w.]+)", asm["llir"])
    return sum(blocks.get(name, "").count("  store ") for name in entered)


def measure(
    body: list[str], load: str, store: str, width: Callable[[str], int], barrier: str
) -> Loop:
    """Describe a loop from its instructions and the patterns of its machine."""
    accesses: dict[str, list[int]] = {"load": [], "store": []}
    for line in body:
        for kind, pattern in (("load", load), ("store", store)):
            if found := re.search(pattern, line):
                accesses[kind].append(width(found.group(1)))
    barriers = sum(re.search(barrier, line) is not None for line in body)
    return Loop(len(body), accesses["load"], accesses["store"], barriers)


def read_cubin(asm: dict[str, Any]) -> Reading:
    """Read a cubin; a loop runs from a label to the last branch back to it."""
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
    """Read amdgcn, in which the compiler marks loops in comments."""
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
    """Return the loops that read logits."""
    return [] if name.startswith("loss") else [loop for loop in compiled.loops if loop.loads]


def instructions_per_logit(itemsize: int, loops: list[Loop]) -> float:
    return sum(loop.instructions * itemsize / sum(loop.loads) for loop in loops)
