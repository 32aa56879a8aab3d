"""What compiled kernels show without a GPU: registers, spills, access widths, instruction counts.

The launchers run on meta tensors under a driver that only names a target, so that the kernels
compile with the very specialisation that a launch would give them.
"""

import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from gspo_ops import head, log_probs, logit_tiles, policy_loss  # noqa: E402
from gspo_ops.kernels.linear_log_probs import (  # noqa: E402
    dhidden_kernel,
    dweight_kernel,
    fold_kernel,
    linear_log_probs_fwd_kernel,
    linear_weigh_kernel,
    rescale_kernel,
    target_logits_kernel,
    weigh_kernel,
)
from gspo_ops.kernels.log_probs import log_probs_bwd_kernel, log_probs_fwd_kernel  # noqa: E402
from gspo_ops.kernels.policy_loss import policy_loss_fwd_kernel  # noqa: E402
from gspo_ops.layout import resolve_layout  # noqa: E402
from gspo_ops.objective import GRPO, GSPO, GSPOToken  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KB per block
# more than 2 GiB of logits: below that, AMD's compiler assumes 32-bit offsets
B, T, V = 8, 4096, 49152
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def empty(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def rows(dtype=FP32):
    return empty(B * T, dtype=dtype)


def make_logits(dtype, V, row_stride=None):
    return empty(B, T, row_stride or V, dtype=dtype)[:, :, :V]


def launch_fwd(dtype, V=V, row_stride=None, softcap=None, entropy=False, mask=True):
    logits, targets = make_logits(dtype, V, row_stride), rows(torch.int64)
    mask = rows(torch.uint8) if mask else None
    out = log_probs.RowStats(rows(), rows(), rows(), rows())
    log_probs._triton_fwd(logits, targets, mask, 1.0, softcap, entropy, out)


def launch_bwd(dtype, V=V, softcap=None, entropy=False, recompute=False, mask=True, loss=True):
    targets, mask = rows(torch.int64), rows(torch.uint8) if mask else None
    row_max, row_sum = (None, None) if recompute else (rows(), rows())
    entropy, grad_entropy = (rows(), rows()) if entropy else (None, None)
    grad_loss, inv_denominator = (empty(), empty()) if loss else (None, None)
    log_probs._triton_bwd(
        make_logits(dtype, V), targets, mask, row_max, row_sum, entropy, rows(), grad_entropy,
        grad_loss, inv_denominator, 1.0, softcap, empty(B, T, V, dtype=dtype),
    )  # fmt: skip


def launch_loss(
    objective, packed=False, mask=False, old=True, ref=False, per_token=False, weights=None
):
    cu_seqlens = empty(B + 1, dtype=torch.int32) if packed else None
    shape = (B * T,) if packed else (B, T)
    mask = empty(*shape, dtype=torch.bool) if mask else None
    layout = resolve_layout(torch.Size(shape), torch.device("meta"), mask, cu_seqlens)
    inputs = policy_loss.policy_inputs(
        layout, FP32, objective, empty(*shape) if old else None,
        empty(*shape) if per_token else empty(B), empty(*shape) if ref else None,
        {"token": empty(*shape), "sequence": empty(B), None: None}[weights], None,
    )  # fmt: skip
    policy_loss._triton_policy_loss(rows() if old or ref else None, inputs)


FWD = log_probs_fwd_kernel, launch_fwd
BWD = log_probs_bwd_kernel, launch_bwd
LOSS = policy_loss_fwd_kernel, launch_loss
# gated and shown for every target: (kernel, launch), options of the launch
VARIANTS = {
    "fwd bf16": (FWD, {"dtype": BF16}),
    "fwd fp16": (FWD, {"dtype": FP16}),
    "fwd fp32": (FWD, {"dtype": FP32}),
    "fwd bf16 V%8": (FWD, {"dtype": BF16, "V": V + 8}),
    "fwd bf16 V odd stride%16": (FWD, {"dtype": BF16, "V": V + 1, "row_stride": V + 16}),
    "fwd bf16 V odd": (FWD, {"dtype": BF16, "V": V + 1}),
    "fwd bf16 entropy": (FWD, {"dtype": BF16, "entropy": True}),
    "fwd bf16 softcap": (FWD, {"dtype": BF16, "softcap": 30.0}),
    "bwd bf16": (BWD, {"dtype": BF16}),
    "bwd fp32": (BWD, {"dtype": FP32}),
    "bwd bf16 V%8": (BWD, {"dtype": BF16, "V": V + 8}),
    "bwd bf16 V odd": (BWD, {"dtype": BF16, "V": V + 1}),
    "bwd bf16 recompute": (BWD, {"dtype": BF16, "recompute": True}),
    "bwd bf16 entropy": (BWD, {"dtype": BF16, "entropy": True}),
    "bwd bf16 softcap": (BWD, {"dtype": BF16, "softcap": 30.0}),
    "loss sequence packed": (LOSS, {"objective": GSPO(), "packed": True}),
    "loss token padded kl weights": (
        LOSS,
        {"objective": GRPO(kl_coef=0.1), "mask": True, "ref": True, "weights": "token"},
    ),
}
# optional arguments change what is compiled, and the interpreter accepts more than the compiler
COMBINATIONS = {
    "fwd no mask": (FWD, {"dtype": BF16, "mask": False}),
    "fwd entropy softcap no mask": (
        FWD,
        {"dtype": FP32, "entropy": True, "softcap": 30.0, "mask": False},
    ),
    "bwd no mask no loss": (BWD, {"dtype": BF16, "mask": False, "loss": False}),
    "bwd recompute softcap": (BWD, {"dtype": FP32, "recompute": True, "softcap": 30.0}),
    "bwd entropy softcap no loss": (
        BWD,
        {"dtype": FP32, "entropy": True, "softcap": 30.0, "loss": False},
    ),
    "loss on-policy": (LOSS, {"objective": GSPO(), "old": False}),
    "loss on-policy packed mask": (
        LOSS,
        {"objective": GSPO(), "old": False, "packed": True, "mask": True},
    ),
    "loss on-policy ref k1": (
        LOSS,
        {"objective": GSPO(kl_coef=0.1, kl_estimator="k1"), "old": False, "ref": True},
    ),
    "loss token k2 token-mean": (
        LOSS,
        {
            "objective": GRPO(kl_coef=0.1, kl_estimator="k2", aggregation="token-mean"),
            "ref": True,
            "weights": "sequence",
        },
    ),
    "loss sequence weights": (LOSS, {"objective": GSPO(), "weights": "token"}),
    "loss sequence_token per token": (
        LOSS,
        {
            "objective": GSPOToken(aggregation="token-sum"),
            "packed": True,
            "per_token": True,
            "weights": "token",
        },
    ),
}


N, H, HEAD_V, COLUMNS = 8192, 4096, 151936, slice(8192, 16384)


def make_tiles(dtype, products="triton", bias=False, softcap=None, entropy=False, live=False):
    operands = logit_tiles.Head(
        empty(N, H, dtype=dtype), empty(HEAD_V, H, dtype=dtype),
        empty(HEAD_V, dtype=dtype) if bias else None, None, None,
    )  # fmt: skip
    count = empty(dtype=torch.int32) if products == "triton" else None
    rows = logit_tiles.Rows(None, count, empty(N, dtype=torch.bool) if live else None)
    options = logit_tiles.Options(1.0, softcap, entropy, products, False)
    with mock.patch.object(head, "use_triton", return_value=True):
        return logit_tiles.make_tiles(operands, empty(N, dtype=torch.int64), rows, options)


def make_kept(tiles, columns=HEAD_V):
    return logit_tiles.Kept(empty(N, HEAD_V + 64, dtype=tiles.grad_dtype), columns)


def launch_product_fwd(dtype, kept=True, keep=True, **options):
    tiles = make_tiles(dtype, **options)
    keep = empty(N, dtype=torch.bool) if keep else None
    tiles.exponentials(empty(N), make_kept(tiles, HEAD_V if kept else 0), keep)


def wanted(slope):
    return logit_tiles.Exponentials(empty(N), empty(N), *[empty(N) if slope else None] * 2)


def launch_product_weigh(dtype, slope=False, **options):
    tiles = make_tiles(dtype, **options)
    out = empty(N, 8192, dtype=tiles.grad_dtype)
    tiles._recompute(COLUMNS, empty(N), wanted(slope), out)


def live_tile(tiles, listed):
    e = make_kept(tiles).e[:, COLUMNS] if listed else empty(N, 8192, dtype=tiles.grad_dtype)
    return logit_tiles.Tile(e, empty(N, dtype=torch.int64) if listed else None)


def launch_dhidden(dtype, listed=True):
    tiles = make_tiles(dtype)
    tiles._add_to_rows(empty(N, H), live_tile(tiles, listed), tiles.weight[COLUMNS])


def launch_dweight(dtype, add=False, listed=True):
    tiles = make_tiles(dtype)
    out = empty(8192, H, dtype=FP32 if add else dtype)
    x = empty(N, H, dtype=tiles.grad_dtype)
    tiles._add_to_columns(out, live_tile(tiles, listed), x, add)


def launch_fold(kept=True, **options):
    tiles = make_tiles(BF16, "mm", **options)
    e = make_kept(tiles).e[: tiles.ROWS, COLUMNS] if kept else None
    r, log = slice(0, tiles.ROWS), empty(tiles.ROWS) if tiles.options.return_entropy else None
    z, row = empty(tiles.ROWS, 8192), empty(tiles.ROWS)
    tiles._fold(z, r, COLUMNS, row, e, None, row, row, log)


def launch_weigh(slope=False, **options):
    tiles = make_tiles(BF16, "mm", **options)
    z, out = empty(tiles.ROWS, 8192), empty(tiles.ROWS, 8192, dtype=BF16)
    tiles._weigh(z, slice(0, tiles.ROWS), COLUMNS, empty(N), wanted(slope), out)


def launch_rescale(products):
    tiles = make_tiles(BF16, products)
    tiles._rescale(make_kept(tiles), empty(HEAD_V // tiles.SUMS + 1, N))


def launch_target_logits(**options):
    make_tiles(BF16, "mm", **options).target_logits()


PRODUCT_FWD = linear_log_probs_fwd_kernel, launch_product_fwd
PRODUCT_WEIGH = linear_weigh_kernel, launch_product_weigh
DHIDDEN = dhidden_kernel, launch_dhidden
DWEIGHT = dweight_kernel, launch_dweight
FOLD = fold_kernel, launch_fold
WEIGH = weigh_kernel, launch_weigh
RESCALE = rescale_kernel, launch_rescale
TARGET = target_logits_kernel, launch_target_logits
# gated and shown for every target
PRODUCTS = {
    f"{name} {label}": (pair, options | {"dtype": dtype})
    for label, dtype in (("bf16", BF16), ("fp32", FP32))
    for name, pair, options in (
        ("hidden fwd", PRODUCT_FWD, {}),
        ("hidden recompute", PRODUCT_WEIGH, {}),
        ("dhidden", DHIDDEN, {}),
        ("dweight", DWEIGHT, {}),
        ("dweight add", DWEIGHT, {"add": True}),
    )
}
EPILOGUES = {
    "fold": (FOLD, {}),
    "fold entropy softcap no kept": (FOLD, {"entropy": True, "softcap": 30.0, "kept": False}),
    "fold softcap live": (FOLD, {"softcap": 30.0, "live": True}),
    "weigh": (WEIGH, {}),
    "weigh entropy softcap live": (WEIGH, {"slope": True, "softcap": 30.0, "live": True}),
    "rescale mm": (RESCALE, {"products": "mm"}),
    "rescale triton": (RESCALE, {"products": "triton"}),
    "target": (TARGET, {}),
    "target bias softcap live": (TARGET, {"bias": True, "softcap": 30.0, "live": True}),
}
PRODUCT_COMBINATIONS = {
    "hidden fwd no kept": (PRODUCT_FWD, {"dtype": BF16, "kept": False, "keep": False}),
    "hidden fwd fp16 bias softcap entropy": (
        PRODUCT_FWD,
        {"dtype": FP16, "bias": True, "softcap": 30.0, "entropy": True},
    ),
    "hidden recompute bias softcap entropy": (
        PRODUCT_WEIGH,
        {"dtype": BF16, "bias": True, "softcap": 30.0, "slope": True},
    ),
    "dhidden all rows": (DHIDDEN, {"dtype": BF16, "listed": False}),
    "dweight all rows": (DWEIGHT, {"dtype": BF16, "listed": False}),
}
TENSOR_CORES = {
    "sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32"
}  # fmt: skip


class TargetOnlyDriver:
    """As much of a driver as compiling needs."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return f"{self.target.arch}"

    def get_current_stream(self, device):
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


ALL = VARIANTS | COMBINATIONS | PRODUCTS | EPILOGUES | PRODUCT_COMBINATIONS


@cache
def compile_variant(name, target):
    (kernel, launch), options = ALL[name]
    binaries = []

    def compile_only(*args, warmup, **kwargs):
        binaries.append(run(*args, warmup=True, **kwargs))

    run = kernel.run
    hip = "6.4" if TARGETS[target].backend == "hip" else None
    with (
        mock.patch.object(kernel, "run", compile_only),
        mock.patch.object(driver, "_active", TargetOnlyDriver(TARGETS[target])),
        # what a launcher may look at to tell the machines apart
        mock.patch.object(torch.version, "hip", hip),
    ):
        launch(**options)
    (binary,) = binaries
    read = read_amdgcn if target == "gfx942" else read_cubin
    registers, spills, loops, text = read(binary.asm)
    has_f64 = re.search(r"\bf64\b", binary.asm["ttgir"]) is not None
    shown = " ".join(f"{kind}:{n}" for kind, n in spills.items() if n)
    matrix_instructions = len(re.findall(rf"\b{TENSOR_CORES[target]}", text))
    return Compiled(
        registers, shown, binary.metadata.shared, loops, has_f64, matrix_instructions
    )  # fmt: skip


def measure(body, load, store, width, barrier):
    """A loop from its instructions and the patterns of its machine."""
    accesses = {"load": [], "store": []}
    for line in body:
        for kind, pattern in (("load", load), ("store", store)):
            if found := re.search(pattern, line):
                accesses[kind].append(width(found.group(1)))
    barriers = sum(re.search(barrier, line) is not None for line in body)
    return Loop(len(body), accesses["load"], accesses["store"], barriers)


def read_cubin(asm):
    """Registers, spills, loops, text; a loop runs from a label to the last branch back to it."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in ([tools / "cuobjdump", "-res-usage"], [tools / "nvdisasm", "-c"])
        )
    code, labels, ends = [], {}, {}
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


def sass_width(suffix):
    return next((b // 8 for b in (128, 64, 16, 8) if re.search(rf"[.US]{b}\b", suffix)), 4)


def read_amdgcn(asm):
    """Registers, spills, loops, which the compiler marks in comments, and text."""
    text = asm["amdgcn"]
    bodies, loop = {}, None
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
    used = {name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1)) for name in names}
    registers = used.pop("vgpr_count")
    return registers, used, loops, text


def amd_width(suffix):
    words = re.match(r"dword(?:x(\d))?$", suffix)
    if words:
        return 4 * int(words.group(1) or 1)
    return 1 if "byte" in suffix else 2


REGISTERS = {FWD: 184, BWD: 128, LOSS: 192}  # the most seen, to the next 8
INSTRUCTIONS = {("fwd bf16", "sm_90"), ("fwd fp16", "sm_90"), ("fwd fp32", "sm_90")}


def main_loops(name, compiled):
    """The loops that read logits."""
    return [] if name.startswith("loss") else [loop for loop in compiled.loops if loop.loads]


def instructions_per_logit(name, compiled):
    itemsize = VARIANTS[name][1].get("dtype", FP32).itemsize
    return sum(
        loop.instructions * itemsize / sum(loop.loads) for loop in main_loops(name, compiled)
    )


def common_problems(compiled):
    if compiled.spills:
        yield f"spills {compiled.spills}"
    if compiled.has_f64:
        yield "float64 arithmetic"


def problems(name, target):
    compiled = compile_variant(name, target)
    pair = VARIANTS[name][0]
    yield from common_problems(compiled)
    if compiled.registers > REGISTERS[pair]:
        yield f"{compiled.registers} registers, at most {REGISTERS[pair]}"
    if compiled.shared > SHARED_LIMIT[target] * 1024:
        yield f"{compiled.shared} bytes of shared memory, at most {SHARED_LIMIT[target]} KB"
    if pair is LOSS:
        return
    loops = main_loops(name, compiled)
    if len(loops) != (2 if "recompute" in name else 1):
        yield f"{len(loops)} loops that read logits"
    stores = [width for loop in compiled.loops for width in loop.stores]
    if bool(stores) != (pair is BWD):
        yield f"stores {stores} in the loops"
    # rows of an odd number of elements begin anywhere: no hardware has a wide access for them
    if not name.endswith("V odd"):
        narrow = {width for loop in loops for width in loop.loads + stores} - {16}
        if narrow:
            yield f"accesses of {sorted(narrow)} bytes in a main loop"
    if barriers := sum(loop.barriers for loop in loops):
        yield f"{barriers} barriers in the main loop: its reduction leaves the thread"
    if (name, target) in INSTRUCTIONS and instructions_per_logit(name, compiled) > 8:
        yield f"{instructions_per_logit(name, compiled):.2f} instructions per logit, at most 8"


def table_row(name, target):
    compiled = compile_variant(name, target)
    loops = main_loops(name, compiled)
    widths = {width * 8 for loop in loops for width in loop.loads}
    per_logit = f"{instructions_per_logit(name, compiled):.2f}" if loops else "-"
    return (
        f"{name:30}{target:8}{compiled.registers:>9}  {compiled.spills or 'none':18}"
        f"{compiled.shared:>7}  {'/'.join(map(str, sorted(widths))) or '-':>9}{per_logit:>11}"
    )


@pytest.fixture(scope="module")
def table(request):
    lines = [
        f"{'kernel, variant':30}{'target':8}{'registers':>9}  {'spills':18}{'shared':>7}  "
        f"{'load bits':>9}{'per logit':>11}"
    ]
    yield lines
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join(lines))


# what these show depends little on the target, and a compilation takes a second
FEW_TARGETS = {"fwd fp16", "fwd bf16 V odd stride%16", "fwd bf16 V odd", "bwd bf16 V odd"}
CASES = [
    (name, target)
    for name in VARIANTS
    for target in TARGETS
    if name not in FEW_TARGETS or target in ("sm_90", "gfx942")
]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_gates(name, target, table):
    compile_variant(name, target)
    table.append(table_row(name, target))
    assert not list(problems(name, target))


def product_row(name, target):
    compiled = compile_variant(name, target)
    return (
        f"{name:30}{target:8}{compiled.registers:>9}  {compiled.spills or 'none':18}"
        f"{compiled.shared:>7}  {compiled.matrix_instructions:>9} matrix instructions"
    )


def product_problems(name, target):
    compiled = compile_variant(name, target)
    yield from common_problems(compiled)
    if compiled.shared > SHARED_LIMIT[target] * 1024:
        yield f"{compiled.shared} bytes of shared memory, at most {SHARED_LIMIT[target]} KB"
    # fp32 stays exact: NVIDIA has no matrix instructions for it
    if ("fp32" not in name or target == "gfx942") and not compiled.matrix_instructions:
        yield f"no {TENSOR_CORES[target]}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, target, table):
    compile_variant(name, target)
    table.append(product_row(name, target))
    assert not list(product_problems(name, target))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name, target):
    assert not list(common_problems(compile_variant(name, target)))


@pytest.mark.parametrize("name", COMBINATIONS | PRODUCT_COMBINATIONS)
def test_optional_arguments_compile(name):
    assert not list(common_problems(compile_variant(name, "sm_90")))
