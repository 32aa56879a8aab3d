"""Compiled kernels, checked without a GPU: registers, spills, access widths, instructions.

The kernels are launched by `benchmarks/launches.py`, and read by `benchmarks/binaries.py`.
"""

import math
import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
pytest.importorskip("triton")

from gspo_ops.benchmarks import binaries, launches, static
from gspo_ops.benchmarks.binaries import TARGETS, TENSOR_CORES, main_loops
from gspo_ops.benchmarks.launches import (
    BWD,
    COMBINATIONS,
    EPILOGUES,
    FP32,
    FURTHER_LOSSES,
    FWD,
    LOSS,
    PRODUCT_COMBINATIONS,
    PRODUCTS,
    TMA,
    VARIANTS,
)
from gspo_ops.benchmarks.static import compile_variant
from gspo_ops.kernels.policy_loss import NUM_PARTIALS

SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KB per block
REGISTERS = {FWD: 184, BWD: 128, LOSS: 192}  # the most seen, rounded up to a multiple of 8
GSPO_ALONE = [("sm_90", 46, 1034240), ("sm_100", 52, 1015808), ("gfx942", 36, 1266176)]
INSTRUCTIONS = {("fwd bf16", "sm_90"), ("fwd fp16", "sm_90"), ("fwd fp32", "sm_90")}


def instructions_per_logit(name, compiled):
    itemsize = VARIANTS[name][1].get("dtype", FP32).itemsize
    return binaries.instructions_per_logit(itemsize, main_loops(name, compiled))


def common_problems(compiled):
    if compiled.spills:
        yield f"spills {compiled.spills}"
    if compiled.has_f64:
        yield "float64 arithmetic"
    if overflows := [factors for factors in compiled.narrow_products if len(factors) > 1]:
        yield f"int32 products, such as of an index and a stride: {overflows}"


def problems(name, target):
    compiled = compile_variant(name, target)
    pair = VARIANTS[name][0]
    yield from common_problems(compiled)
    if compiled.registers > REGISTERS[pair]:
        yield f"{compiled.registers} registers, at most {REGISTERS[pair]}"
    if compiled.shared > SHARED_LIMIT[target] * 1024:
        yield f"{compiled.shared} bytes of shared memory, at most {SHARED_LIMIT[target]} KB"
    if pair is LOSS:
        yield from loss_problems(compiled, has_dual_clip=False)
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


def loss_problems(compiled, has_dual_clip):
    if compiled.narrow_products:
        yield f"int32 products: {compiled.narrow_products}"
    # every partial sum, that of a dual clip only where there is one, and the sequence's log-ratio
    if compiled.handed_over != NUM_PARTIALS.value + has_dual_clip:
        yield f"{compiled.handed_over} numbers that are sure to reach the last program"


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


@pytest.mark.parametrize("name", FURTHER_LOSSES)
def test_further_objectives(name):
    for target in ("sm_90", "gfx942"):
        compiled = compile_variant(name, target)
        has_dual_clip = FURTHER_LOSSES[name][1]["objective"].dual_clip < math.inf
        found = [*common_problems(compiled), *loss_problems(compiled, has_dual_clip)]
        assert not found, target


@pytest.mark.parametrize(("target", "registers", "most"), GSPO_ALONE)
def test_further_objectives_cost_gspo_nothing(target, registers, most):
    """GSPO takes no more registers and instructions than when it had no options."""
    compiled = compile_variant("loss sequence packed", target)
    assert compiled.registers <= registers
    assert compiled.instructions <= most


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


HAVE_TMA = ("sm_90", "sm_100")  # the latter without a soft cap


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, target) for name in TMA for target in HAVE_TMA[: 1 if "softcap" in name else None]],
)
def test_tma_products(name, target, table):
    """TMA loads the operands and stores the exponentials; threads store the rest."""
    compiled = compile_variant(name, target)
    table.append(product_row(name, target))
    assert not list(product_problems(name, target))
    assert compiled.boxes_loaded
    stores_tile = name.startswith(("tma fwd", "tma recompute")) and "no kept" not in name
    assert bool(compiled.boxes_stored) == stores_tile


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["row sums", "row sums entropy", "row sums N%4", "fold"])
def test_sums_of_rows_do_not_depend_on_alignment(name, target):
    compiled = compile_variant(name, target)
    assert not compiled.orders()
    assert not compiled.fused


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name, target):
    assert not list(common_problems(compile_variant(name, target)))


@pytest.mark.parametrize("name", COMBINATIONS | PRODUCT_COMBINATIONS)
def test_optional_arguments_compile(name):
    assert not list(common_problems(compile_variant(name, "sm_90")))


def test_a_peer_that_fails_says_why(monkeypatch):
    def launch():
        launches.launch_bwd(launches.BF16)
        raise ValueError("no such shape\nand more")

    monkeypatch.setitem(static.PEERS, "some", ("torch", launch))
    monkeypatch.setitem(static.PEERS, "absent", ("no_such_package", launch))
    kernels, why = static.compile_peer("some", "sm_90")
    assert why == "ValueError: no such shape"
    assert list(kernels) == ["logits_bwd_kernel"]  # what had compiled before is shown
    assert kernels["logits_bwd_kernel"] == compile_variant("bwd bf16", "sm_90")
    assert static.compile_peer("absent", "sm_90") == ({}, "not installed")


def test_predictions():
    rows = {(row["op"], row["f"]): row for row in static.predictions(3e12, 790e12, (1, 0.5))}
    logits, unit = 8192 * 151936, 8192 * 151936 * 4096
    ours = rows["gspo_ops from logits", 1]
    assert ours["bytes"] == 6 * logits
    assert ours["ms"] == pytest.approx(2.49, abs=0.005)
    assert rows["gspo_ops from logits", 0.5]["bytes"] == 5 * logits
    assert rows["gspo_ops from hidden, keep or chunk", 0.5]["flops"] == 4 * unit
    assert rows["gspo_ops from hidden, recompute", 1]["ms"] == pytest.approx(51.6, abs=0.1)


@pytest.mark.parametrize(("products", "most"), [("mm", 90), ("triton", 45)])
def test_small_batches_launch_few_kernels(products, most):
    """At N=512 and H=896, a GPU is faster than its host; 236 and 165 kernels were launched once."""
    launched = static.launches_from_hidden(products, 512, 896, calls=1)
    assert launched["triton"] + launched["torch"] <= most


def test_the_fold_reads_a_tile_once():
    compiled = compile_variant("fold", "sm_90")
    assert not compiled.loops
    assert static.row("fold", "sm_90", compiled, 4, False)["per_logit"] < 20


# Variants that must give the same bits for the same rows: a training forward, a call under no_grad,
# a masked batch; rows that begin at multiples of 16 bytes, or anywhere; padded and packed
SAME_BITS = {
    "logits": (
        "fwd bf16", "fwd bf16 V odd", "fwd bf16 V odd stride%16", "fwd V%4 first row apart",
        "fwd no mask", "fwd bf16 entropy", "fwd bf16 softcap", "bwd bf16 recompute",
    ),
    "loss": ("loss sequence packed", "loss token padded kl weights"),
    "epilogue": ("fold", "fold no kept", "fold live", "fold entropy"),
    "product bf16": ("hidden fwd bf16", "hidden fwd no kept", "hidden fwd entropy"),
    "tma": ("tma fwd", "tma fwd no kept", "tma fwd entropy", "tma fwd bias entropy"),
    "tma softcap": ("tma fwd softcap", "tma fwd softcap no kept", "tma fwd bias softcap entropy"),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", SAME_BITS)
def test_additions_have_one_order(kernel, target):
    """Variants add in the same order, which a compiler's layout decides where kernels do not."""
    if target not in {"tma": HAVE_TMA, "tma softcap": HAVE_TMA[:1]}.get(kernel, TARGETS):
        pytest.skip("has no TMA")
    first, *others = SAME_BITS[kernel]
    expected = compile_variant(first, target).orders()
    for other in others:
        assert compile_variant(other, target).orders() == expected, f"{other} differs from {first}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["bwd bf16", "bwd bf16 entropy"])
def test_gradients_are_rounded_alike(name, target):
    assert not compile_variant(name, target).fused


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SAME_BITS["logits"])
def test_log_probs_do_not_depend_on_alignment(name, target):
    """No layout decides the order of additions: odd rows and slices have their own layouts."""
    compiled = compile_variant(name, target)
    assert any(of.operation == "arith.addf" for of in compiled.reductions)
    assert not compiled.orders()
    assert not compiled.fused
