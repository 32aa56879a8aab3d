"""Tests that need a GPU, run by `make gpu`. Accuracy bounds are those of gspo_ops.testing."""

import gc

import pytest
import torch

import gspo_ops
from gspo_ops import GSPO, reference, testing
from gspo_ops.benchmarks.workloads import make_workload

HAS_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA or ROCm device"),
]
DEVICE = torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
PLANS = ("keep", "chunk", "recompute")
PRODUCTS = ("mm", "triton")

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
plans = pytest.mark.parametrize("plan", PLANS)
products = pytest.mark.parametrize("products", PRODUCTS)


def assert_all_ok(measured):
    over = [m for m in measured if not m.ok]
    assert not over, testing.table(over)


SHAPE = 272, 4099, 200


def loss_of(workload, **options):
    """Return loss, statistics and gradients of a workload, from logits or hidden states."""
    from_hidden = len(workload.operands) == 2
    op = gspo_ops.policy_loss_from_hidden if from_hidden else gspo_ops.policy_loss_from_logits
    batch = workload.batch
    operands = workload.leaves()
    loss, stats = op(
        *operands, batch.targets, batch.old, batch.advantages, mask=batch.mask, **options
    )
    loss.backward()
    return [loss.detach(), *(stats[k] for k in sorted(stats)), *(x.grad for x in operands)]


WAYS = {
    "logits": ("logits", {}),
    **{
        f"hidden {p} {plan}": ("hidden", {"products": p, "plan": plan})
        for p in PRODUCTS
        for plan in PLANS
    },
}
ways = pytest.mark.parametrize("way", WAYS)


def make(way, *, dtype=BF16, f=0.5):
    path, options = WAYS[way]
    return make_workload(path, SHAPE, dtype, f, DEVICE), options


@dtypes
@pytest.mark.parametrize("V", VOCABULARIES)
def test_accuracy_from_logits(V, dtype):
    assert_all_ok(testing.verify(DEVICE, dtypes=[dtype], shapes=[(5, 7, V)], head_shapes=[]))


@dtypes
@pytest.mark.parametrize("V", [32000, 50257])
@pytest.mark.parametrize("H", [64, 37])
def test_accuracy_from_hidden(V, H, dtype):
    """Every plan and both products are accurate, with and without a sync for the live rows."""
    assert_all_ok(
        testing.verify(DEVICE, dtypes=[dtype], shapes=[], head_shapes=[(5, 7, H, V)], quick=True)
    )


@pytest.mark.parametrize("rows", [(0, 1, 2), (-3, -2, -1)])
def test_more_logits_than_int32(rows):
    """The first and the last rows of 2.5e9 logits have the results of a small batch."""
    N, V = 16384, 151936
    if torch.cuda.mem_get_info()[0] < 2.4 * 2 * N * V:
        pytest.skip(f"needs {2.4 * 2 * N * V / 2**30:.0f} GiB of free GPU memory")
    logits = torch.zeros(N, V, dtype=BF16, device=DEVICE)
    index = torch.tensor(rows, device=DEVICE) % N
    few = torch.randn(len(rows), V, device=DEVICE).to(BF16)
    logits[index] = few
    targets = torch.randint(V, (N,), device=DEVICE)
    upstream = torch.zeros(N, device=DEVICE)
    upstream[index] = torch.tensor([0.3, -1.0, 2.0], device=DEVICE)
    logits.requires_grad_()
    few.requires_grad_()
    got = gspo_ops.log_probs_from_logits(logits, targets)
    alone = gspo_ops.log_probs_from_logits(few, targets[index])
    got.backward(upstream)
    alone.backward(upstream[index])
    exact = reference.log_probs_from_logits(few.detach().double(), targets[index])
    assert (alone - exact).abs().max() <= 2e-6
    assert torch.equal(got[index], alone)
    assert torch.equal(logits.grad[index], few.grad)
    dead = (index[1] + 5) % N if rows[0] == 0 else index[1] - 5
    assert not logits.grad[dead].any()


@ways
def test_repeats_are_bitwise_equal(way):
    workload, options = make(way)
    first = loss_of(workload, **options)
    for _ in range(250):
        assert all(map(torch.equal, loss_of(workload, **options), first))


@pytest.mark.parametrize("way", ["logits", "hidden triton keep"])
def test_a_row_does_not_depend_on_the_batch(way):
    workload, _ = make(way)
    hidden = len(workload.operands) == 2
    op = gspo_ops.log_probs_from_hidden if hidden else gspo_ops.log_probs_from_logits
    rows = workload.operands[0].detach().flatten(0, 1)
    rest = [x.detach() for x in workload.operands[1:]]
    more = {"products": "triton"} if hidden else {}
    targets = workload.batch.targets.flatten()
    whole = op(rows, *rest, targets, **more)
    for n in (1, 3, 17, 129):
        assert torch.equal(op(rows[-n:], *rest, targets[-n:], **more), whole[-n:])


@ways
def test_graphs_are_captured_and_replayed(way):
    """A replay with new inputs copied in has the results of these inputs."""
    workload, options = make(way)
    other, _ = make(way, f=1.0)
    halved = tuple((0.5 * x.detach()).requires_grad_() for x in other.operands)
    other = other._replace(operands=halved)
    expected = loss_of(other, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            loss_of(workload, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_of(workload, **options)
    with torch.no_grad():
        for mine, its in zip(workload.operands, other.operands, strict=True):
            mine.copy_(its)
        for mine, its in zip(workload.batch, other.batch, strict=True):
            mine.copy_(its)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))


@ways
def test_a_side_stream_gives_the_same(way):
    workload, options = make(way)
    expected = loss_of(workload, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = loss_of(workload, **options)
    side.synchronize()
    assert all(map(torch.equal, got, expected))


@ways
def test_the_default_does_not_synchronise(way):
    workload, options = make(way)
    loss_of(workload, **options)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(workload, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_allow_sync_synchronises():
    """The check of the test above does notice a synchronisation; otherwise, it could not fail."""
    workload, _ = make("hidden mm keep")
    loss_of(workload, allow_sync=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            loss_of(workload, allow_sync=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("overflows", [False, True])
def test_grad_scaler_with_fp16(overflows):
    """A scale that overflows skips the step; another gives the unscaled gradient."""
    workload, _ = make("logits", dtype=FP16, f=1.0)
    batch = workload.batch
    x = torch.nn.Parameter(workload.operands[0].detach().float())
    optimizer = torch.optim.SGD([x], lr=1.0)
    scale = 2.0**30 if overflows else 2.0**10
    scaler = torch.amp.GradScaler("cuda", init_scale=scale)
    loss = gspo_ops.policy_loss_from_logits(
        x.half(), batch.targets, batch.old, batch.advantages, mask=batch.mask
    ).loss
    before = x.detach().clone()
    scaler.scale(loss * (1e4 if overflows else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(x, before) == overflows
    assert x.isfinite().all()
    assert (scaler.get_scale() < scale) == overflows


@ways
def test_nothing_stays_allocated(way):
    workload, options = make(way)
    loss_of(workload, **options)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        loss_of(workload, **options)
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@plans
def test_peak_memory_is_what_the_plan_says(plan):
    N, V, H = 8192, 65536, 128
    workload = make_workload("hidden", (N, V, H), BF16, 1.0, DEVICE)
    options = {"plan": plan, "memory_budget": 3 * 1024 * V * 2}
    predicted = gspo_ops.plan_from_hidden(*workload.leaves(), **options).bytes
    returned = sum(x.nbytes for x in workload.operands)
    loss_of(workload, **options)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_of(workload, **options)
    extra = torch.cuda.max_memory_allocated() - before - returned
    assert extra <= 1.1 * predicted + (32 << 20)


def test_masked_rows_may_hold_anything():
    workload, _ = make("logits")
    logits = workload.operands[0].detach().clone()
    mask = workload.batch.mask.clone()
    mask[:, -2:] = 0
    logits[:, -2] = float("nan")
    logits[:, -1] = float("inf")
    logits.requires_grad_()
    batch = workload.batch
    loss = gspo_ops.policy_loss_from_logits(
        logits, batch.targets, batch.old, batch.advantages, mask=mask
    ).loss
    loss.backward()
    assert loss.isfinite()
    assert not logits.grad[:, -2:].any()
    assert logits.grad.isfinite().all()


@ways
def test_compiled_without_breaks(way):
    workload, options = make(way)
    expected = loss_of(workload, **options)
    op = WAYS[way][0]
    function = getattr(gspo_ops, f"policy_loss_from_{op}")
    batch = workload.batch

    @torch.compile(fullgraph=True)
    def compiled(*operands):
        return function(
            *operands, batch.targets, batch.old, batch.advantages, mask=batch.mask,
            objective=GSPO(), **options,
        ).loss  # fmt: skip

    operands = workload.leaves()
    loss = compiled(*operands)
    loss.backward()
    assert torch.equal(loss.detach(), expected[0])
    grads = expected[-len(operands) :]
    assert all(map(torch.equal, (x.grad for x in operands), grads))


def test_the_tensor_s_device_is_used():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    workload = make_workload("logits", SHAPE, BF16, 0.5, torch.device("cuda:1"))
    with torch.cuda.device(0):
        got = loss_of(workload)
    assert got[0].device.index == 1
    assert got[0].isfinite()
