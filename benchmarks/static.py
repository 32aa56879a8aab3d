"""What compilers make of the kernels, ours and the peers', for GPUs that are not there.

    python -m gspo_ops.benchmarks.static --out NAME.json

Launchers run on meta tensors under a driver that only names a target, so that the kernels compile
with the very specialisation that a launch would give them; registers, spills, shared memory, access
widths, instruction counts and matrix instructions are read from the result. Times are predictions:
bytes and FLOPs from formulas, at a given bandwidth and a given rate of products.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from gspo_ops import head, log_probs, logit_tiles, policy_loss
from gspo_ops.layout import resolve_layout
from gspo_ops.objective import GRPO, GSPO, GSPOToken

from .measure import provenance, write
from .providers import versions

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# more than 2 GiB of logits: below that, AMD's compiler assumes 32-bit offsets
B, T, V = 8, 4096, 49152
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def empty(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def rows(dtype=FP32):
    return empty(B * T, dtype=dtype)


def make_logits(dtype, V, row_stride=None):
    return empty(B, T, row_stride or V, dtype=dtype)[:, :, :V]


def group_of(part):
    return "ranks" if part else None


def launch_fwd(dtype, V=V, row_stride=None, softcap=None, entropy=False, mask=True, part=False):
    logits, targets = make_logits(dtype, V, row_stride), rows(torch.int64)
    mask = rows(torch.uint8) if mask else None
    out = log_probs.RowStats(*(rows() for _ in range(5)))
    log_probs._triton_fwd(logits, targets, mask, 1.0, softcap, entropy, group_of(part), out)


def launch_bwd(
    dtype, V=V, softcap=None, entropy=False, recompute=False, mask=True, loss=True, part=False
):
    targets, mask = rows(torch.int64), rows(torch.uint8) if mask else None
    row_max, row_sum = (None, None) if recompute else (rows(), rows())
    entropy, grad_entropy = (rows(), rows()) if entropy else (None, None)
    grad_loss, inv_denominator = (empty(), empty()) if loss else (None, None)
    log_probs._triton_bwd(
        make_logits(dtype, V), targets, mask, row_max, row_sum, entropy,
        rows() if part else None, rows(), grad_entropy,
        grad_loss, inv_denominator, 1.0, softcap, group_of(part), empty(B, T, V, dtype=dtype),
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
        None,
    )  # fmt: skip
    policy_loss._triton_policy_loss(rows() if old or ref else None, inputs)


FWD, BWD, LOSS = launch_fwd, launch_bwd, launch_loss
# shown for every target: a launch, and its options
VARIANTS = {
    "fwd bf16": (FWD, {"dtype": BF16}),
    "fwd fp16": (FWD, {"dtype": FP16}),
    "fwd fp32": (FWD, {"dtype": FP32}),
    "fwd bf16 V%8": (FWD, {"dtype": BF16, "V": V + 8}),
    "fwd bf16 V odd stride%16": (FWD, {"dtype": BF16, "V": V + 1, "row_stride": V + 16}),
    "fwd bf16 V odd": (FWD, {"dtype": BF16, "V": V + 1}),
    "fwd bf16 entropy": (FWD, {"dtype": BF16, "entropy": True}),
    "fwd bf16 softcap": (FWD, {"dtype": BF16, "softcap": 30.0}),
    "fwd bf16 part": (FWD, {"dtype": BF16, "part": True}),  # of the vocabulary
    "fwd bf16 part entropy": (FWD, {"dtype": BF16, "part": True, "entropy": True}),
    "bwd bf16": (BWD, {"dtype": BF16}),
    "bwd fp32": (BWD, {"dtype": FP32}),
    "bwd bf16 part": (BWD, {"dtype": BF16, "part": True}),
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
    options = logit_tiles.Options(1.0, softcap, entropy, products, False, None)
    with mock.patch.object(head, "use_triton", return_value=True):
        return logit_tiles.make_tiles(operands, empty(N, dtype=torch.int64), rows, options)


def make_kept(tiles, columns=HEAD_V):
    return logit_tiles.Kept(empty(N, HEAD_V + 64, dtype=tiles.grad_dtype), columns)


def launch_product_fwd(dtype, kept=True, keep=True, **options):
    tiles = make_tiles(dtype, **options)
    keep = empty(N, dtype=torch.bool) if keep else None
    tiles.exponentials(empty(N), make_kept(tiles, HEAD_V if kept else 0), keep)


def wanted(slope):
    return logit_tiles.Exponentials(empty(N), *[empty(N) if slope else None] * 2)


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
    tiles.rescale(make_kept(tiles), empty(HEAD_V // tiles.SUMS + 1, N))


def launch_add_targets(dtype):
    out = empty(HEAD_V, H, dtype=dtype)
    make_tiles(BF16, "mm")._add_targets_to_columns(out, empty(N, H, dtype=BF16), empty(N))


def launch_target_logits(**options):
    make_tiles(BF16, "mm", **options).target_logits()


PRODUCT_FWD, PRODUCT_WEIGH = launch_product_fwd, launch_product_weigh
DHIDDEN, DWEIGHT = launch_dhidden, launch_dweight
FOLD, WEIGH = launch_fold, launch_weigh
RESCALE, TARGET, ADD_TARGETS = launch_rescale, launch_target_logits, launch_add_targets
# shown for every target
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
    "add targets": (ADD_TARGETS, {"dtype": BF16}),
    "add targets fp32": (ADD_TARGETS, {"dtype": FP32}),
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
    narrow_products: list[list[str]]  # of integers: `read_narrow_products`


ALL = VARIANTS | COMBINATIONS | PRODUCTS | EPILOGUES | PRODUCT_COMBINATIONS


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


@cache
def compile_variant(name: str, target: str) -> Compiled:
    """One of ours."""
    launch: Callable[..., None]
    options: dict[str, Any]
    launch, options = ALL[name]  # type: ignore[assignment]
    with compiling(target) as binaries:
        launch(**options)
    ((_, binary),) = binaries
    return read_binary(binary, target)


def read_binary(binary: Any, target: str) -> Compiled:
    read = read_amdgcn if target == "gfx942" else read_cubin
    registers, spills, loops, text = read(binary.asm)
    has_f64 = re.search(r"\bf64\b", binary.asm["ttgir"]) is not None
    shown = " ".join(f"{kind}:{n}" for kind, n in spills.items() if n)
    matrix_instructions = len(re.findall(rf"\b{TENSOR_CORES[target]}", text))
    return Compiled(
        registers, shown, binary.metadata.shared, loops, has_f64, matrix_instructions,
        read_narrow_products(binary.asm["ttir"]),
    )  # fmt: skip


def read_narrow_products(ttir: str) -> list[list[str]]:
    """Of each product of integers in 32 bits, the factors that are no constants."""
    constants = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    product = re.compile(
        r"arith\.muli (%\S+), (%\S+?)(?: \{.*\})? : (?:i32|tensor<[\dx]+xi32>)(?: |$)", re.M
    )
    return [[x for x in factors if x not in constants] for factors in product.findall(ttir)]


def measure(body, load, store, width, barrier):
    """A loop from its instructions and the patterns of its machine."""
    accesses: dict[str, list[int]] = {"load": [], "store": []}
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


def sass_width(suffix):
    return next((b // 8 for b in (128, 64, 16, 8) if re.search(rf"[.US]{b}\b", suffix)), 4)


def read_amdgcn(asm):
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


def amd_width(suffix):
    words = re.match(r"dword(?:x(\d))?$", suffix)
    if words:
        return 4 * int(words.group(1) or 1)
    return 1 if "byte" in suffix else 2


def main_loops(name: str, compiled: Compiled) -> list[Loop]:
    """The loops that read logits."""
    return [] if name.startswith("loss") else [loop for loop in compiled.loops if loop.loads]


def instructions_per_logit(itemsize: int, loops: list[Loop]) -> float:
    return sum(loop.instructions * itemsize / sum(loop.loads) for loop in loops)


# The peers' kernels


def _liger() -> None:
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    logits, ids = empty(B, T + 1, V, dtype=BF16), empty(B, T, dtype=torch.int64)
    mask = empty(B, T, dtype=torch.int32)
    ctx = mock.MagicMock()
    GrpoLossFunction.forward(
        ctx, logits, empty(B, T), None, ids, empty(B), mask, 1.0, 0.0, 3e-4, 4e-4, False,
        "grpo", T, True, "sequence",
    )  # fmt: skip
    (ctx.saved_tensors,) = (call.args for call in ctx.save_for_backward.call_args_list[-1:])
    GrpoLossFunction.backward(ctx, empty(), empty(), empty())


def _trl() -> None:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    logits = make_logits(BF16, V).requires_grad_()
    log_prob, _ = selective_log_softmax_and_entropy(logits, empty(B, T, dtype=torch.int64))
    log_prob.sum().backward()


def _trl_chunked() -> None:
    from trl.kernels import chunked_logprob

    operands = empty(N, H, dtype=BF16), empty(HEAD_V, H, dtype=BF16)
    hidden, weight = (x.requires_grad_() for x in operands)
    with mock.patch.object(chunked_logprob, "_use_triton", return_value=True):
        out = chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, None, empty(N, dtype=torch.int64), 1.0, 8192, None, 1.0, ()
        )
        (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()


def _verl() -> None:
    from verl.utils.kernel import kernels

    with mock.patch.object(torch.Tensor, "is_cuda", True):
        hidden, weight = empty(N, H, dtype=BF16), empty(HEAD_V, H, dtype=BF16)
        labels = empty(N, dtype=torch.int64)
        found = kernels.efficient_entropy_forward(hidden, weight, labels, 2, 1.0, None)
        _, _, maximum, accumulate, entropy_b = found
        kernels.efficient_entropy_backward(
            empty(N), empty(N), hidden, weight, labels, maximum, accumulate, entropy_b, 2, False,
            1.0, None,
        )  # fmt: skip


def _cut_cross_entropy() -> None:
    from cut_cross_entropy.cce_backward import cce_backward_kernel
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel

    e, c = empty(N, H, dtype=BF16), empty(HEAD_V, H, dtype=BF16)
    cce_lse_forward_kernel(e, c)
    cce_backward_kernel(
        empty(N), e, c, empty(N), None, None, None, targets=empty(N, dtype=torch.int64)
    )


# package, launches: bf16, the shapes of ours; for logits, the bytes of one
PEERS: dict[str, tuple[str, Callable[[], None]]] = {
    "Liger GRPO, sequence level": ("liger_kernel", _liger),
    "TRL log-prob and entropy": ("trl", _trl),
    "TRL ChunkedLogProbFunction": ("trl", _trl_chunked),
    "verl fused linear": ("verl", _verl),
    "cut-cross-entropy": ("cut_cross_entropy", _cut_cross_entropy),
}


def compile_peer(name: str, target: str) -> tuple[dict[str, Compiled], str | None]:
    """Kernels of a peer by name, as far as they compile, and why not all do."""
    package, launch = PEERS[name]
    if importlib.util.find_spec(package) is None:
        return {}, "not installed"
    why = None
    with compiling(target) as binaries:
        try:
            launch()
        except Exception as error:  # whatever a peer raises is its row of the table
            first = str(error).strip().splitlines() or [""]
            why = f"{type(error).__name__}: {first[0][:120]}"
    found: dict[str, Compiled] = {}
    for kernel, binary in binaries:
        found.setdefault(kernel, read_binary(binary, target))
    return found, why


# Predictions


def predictions(bandwidth: float, matmul: float, fractions: tuple[float, ...]) -> list[dict]:
    """Least time of each op from its bytes or FLOPs.

    Args:
        bandwidth: bytes per second.
        matmul: FLOPs per second.
        fractions: f, of rows with a gradient.

    Returns:
        Rows with op, f, bytes or FLOPs, and milliseconds.

    Formulas, bf16: from logits 2 bytes read forward; in the backward 2 f read and 2 written. From
    hidden states (2 + 4f) N V H FLOPs with exponentials kept or in chunks, (2 + 6f) recomputed.
    Peers: Liger reads logits twice forward and once backward for every row, and writes; TRL's
    log-prob is as ours at f=1; verl, cut-cross-entropy and TRL's chunks take 8 N V H.
    """
    logits = N * HEAD_V
    unit = N * HEAD_V * H
    of_bytes: dict[str, Callable[[float], float]] = {
        "gspo_ops from logits": lambda f: (2 + 2 * f + 2) * logits,
        "Liger GRPO, sequence level": lambda f: 8 * logits,
        "TRL log-prob": lambda f: 6 * logits,
    }
    of_flops: dict[str, Callable[[float], float]] = {
        "gspo_ops from hidden, keep or chunk": lambda f: (2 + 4 * f) * unit,
        "gspo_ops from hidden, recompute": lambda f: (2 + 6 * f) * unit,
        "verl, cut-cross-entropy, TRL chunks": lambda f: 8 * unit,
    }
    rows = []
    for f in fractions:
        for op, nbytes in of_bytes.items():
            rows.append({"op": op, "f": f, "bytes": nbytes(f), "ms": 1e3 * nbytes(f) / bandwidth})
        for op, flops in of_flops.items():
            rows.append({"op": op, "f": f, "flops": flops(f), "ms": 1e3 * flops(f) / matmul})
    return rows


# The command

SHOWN = (
    "fwd bf16", "fwd fp32", "bwd bf16", "bwd fp32", "bwd bf16 recompute", "loss sequence packed",
    *PRODUCTS, "fold", "weigh",
)  # fmt: skip


def row(kernel: str, target: str, compiled: Compiled, itemsize: int, per_logit: bool) -> dict:
    loops = [loop for loop in compiled.loops if loop.loads] if per_logit else []
    return {
        "kernel": kernel, "target": target, "registers": compiled.registers,
        "spills": compiled.spills, "shared": compiled.shared,
        "load_bits": sorted({8 * width for loop in loops for width in loop.loads}),
        "per_logit": instructions_per_logit(itemsize, loops) if loops else None,
        "matrix_instructions": compiled.matrix_instructions,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--targets", nargs="+", choices=TARGETS, default=["sm_90", "sm_100", "gfx942"])
    add("--bandwidth", type=float, default=3000, help="GB/s, for the predictions")
    add("--matmul", type=float, default=790, help="TFLOP/s, for the predictions")
    add("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    report: dict = {
        "benchmark": "static", **provenance(), "peers": versions(), "ours": [], "others": [],
        "given": {"bandwidth": args.bandwidth, "matmul": args.matmul}, "N": N, "V": HEAD_V, "H": H,
        "predictions": predictions(1e9 * args.bandwidth, 1e12 * args.matmul, (1, 0.6, 0.35, 0.1)),
    }  # fmt: skip
    for target in args.targets:
        for name in SHOWN:
            itemsize = 4 if "fp32" in name else 2
            compiled = compile_variant(name, target)
            report["ours"].append(
                row(name, target, compiled, itemsize, name.startswith(("fwd", "bwd")))
            )
        for peer in PEERS:
            kernels, why = compile_peer(peer, target)
            on_logits = peer in ("Liger GRPO, sequence level", "TRL log-prob and entropy")
            for kernel, compiled in kernels.items():
                of = row(kernel, target, compiled, 2, on_logits)
                report["others"].append({"peer": peer, **of})
            if why is not None:
                report["others"].append({"peer": peer, "target": target, "missing": why})
        print(f"{target}: done", flush=True)
    for of in report["ours"] + report["others"]:
        print({key: value for key, value in of.items() if value not in (None, "", [])})
    if args.out:
        write(args.out, report)


if __name__ == "__main__":
    main()
