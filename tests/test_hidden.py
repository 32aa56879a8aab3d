"""Log-probs and policy losses from hidden states: accuracy, and the work and memory they take."""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from hidden_inputs import (
    Inputs,
    assert_accurate,
    assert_grads,
    count_dots,
    make,
    plain,
    run,
    sample,
    with_budget,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import gspo_ops
from gspo_ops import GRPO, GSPO, GSPOToken, log_probs_from_hidden, reference
from gspo_ops.benchmarks.measure import peak_tensor_bytes
from gspo_ops.testing import BOUNDS, relative, worst

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_TRITON = INTERPRETED or torch.cuda.is_available()
compiled_only = pytest.mark.skipif(INTERPRETED, reason="measures the torch path")
kernels = pytest.mark.kernels
all_products = pytest.mark.parametrize("products", ["mm", "triton"] if ON_TRITON else ["auto"])
# for log_probs_from_hidden; "part" keeps exponentials of some columns if there are 1024 or more
all_plans = pytest.mark.parametrize("plan", ["keep", "part", "recompute"])
all_loss_plans = pytest.mark.parametrize("plan", ["keep", "part", "chunk", "recompute"])
all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


# Accuracy

# (N, H, V): single elements, odd sizes, and sizes just around the borders of tiles
SHAPES = [
    (0, 8, 5), (1, 1, 1), (3, 7, 1), (1, 5, 2), (5, 16, 127), (9, 33, 129), (65, 4, 33),
    (2, 63, 1023), (3, 64, 1024), (5, 65, 1025), (3, 100, 2049),
]  # fmt: skip
if not INTERPRETED:  # the interpreter takes seconds for these
    SHAPES += [(127, 4, 33), (129, 8, 130), (257, 7, 130), (3, 9, 8193), (5, 8, 17000)]


@kernels
@all_products
@all_plans
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(device, shape, plan, products):
    torch.manual_seed(0)
    inputs = make(*shape, device, bias=shape[0] % 2 == 1)
    targets = sample(inputs) if shape[0] else torch.zeros(0, dtype=torch.long, device=device)
    # with the entropy nothing is kept
    entropies = (False, True) if plan == "recompute" else (False,)
    options = with_budget(plan, inputs) | {"products": products, "entropies": entropies}
    assert_accurate(inputs, targets, **options)


@kernels
@all_products
@all_plans
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accuracy_in_16_bits(device, dtype, plan, products):
    torch.manual_seed(0)
    entropies = (False, True) if plan == "recompute" else (False,)
    for shape in [(5, 65, 1025), (7 if INTERPRETED else 130, 24, 130)]:
        inputs = make(*shape, device, bias=True).map(lambda x: x.to(dtype))
        options = with_budget(plan, inputs) | {"products": products, "entropies": entropies}
        assert_accurate(inputs, sample(inputs), **options)


class RoundedLogitGrads(torch.autograd.Function):
    """The product hidden @ weight^T in fp32; its backward rounds logit gradients to 16 bits."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return hidden.float() @ weight.float().mT

    @staticmethod
    def backward(ctx, grad_logits):
        hidden, weight = ctx.saved_tensors
        grad = grad_logits.to(hidden.dtype).float()
        return (grad @ weight.float()).to(hidden.dtype), (grad.mT @ hidden.float()).to(weight.dtype)


@kernels
@all_products
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bits_are_no_noisier_than_eager_s(device, dtype, products, monkeypatch):
    """The target's entry, by far the largest of its row, is the only one that is not rounded."""
    monkeypatch.setattr(gspo_ops.head, "has_bf16", lambda device: True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    N, H, V = (24, 32, 130) if INTERPRETED else (100, 64, 1100)
    for logit_size, plan in ((0.05, "keep"), (2.0, "recompute"), (8.0, "keep")):
        hidden = torch.randn(N, H, generator=generator)
        weight = torch.randn(V, H, generator=generator) * logit_size / math.sqrt(H)
        inputs = Inputs(hidden, weight).map(lambda x: x.to(device, dtype))
        targets = sample(inputs)
        if logit_size < 1:
            targets[::5] = targets[0]  # a token that occurs many times
        for upstream in (torch.ones(1, N), torch.randn(1, N, generator=generator)):
            upstream = upstream.to(device)

            def grads_of(call, inputs=inputs, upstream=upstream):
                return run(call, inputs, upstream)[1]

            exact = run(plain(targets, torch.float64, False), inputs.map(Tensor.double), upstream)
            ours = grads_of(
                lambda leaves, targets=targets, plan=plan: log_probs_from_hidden(
                    *leaves[:2], targets, plan=plan, products=products
                )
            )
            eager = grads_of(
                lambda leaves, targets=targets: reference.log_probs_from_logits(
                    RoundedLogitGrads.apply(*leaves[:2]), targets
                )
            )
            rounded_once = grads_of(plain(targets, torch.float32, False))
            for name, grad in ours.items():
                error = relative(grad, exact[1][name])
                assert error <= 1.1 * relative(eager[name], exact[1][name])
                if logit_size < 1:  # the other entries are small
                    assert error <= 1.1 * relative(rounded_once[name], exact[1][name])


@kernels
@all_products
@pytest.mark.parametrize("plan", ["keep", "recompute"])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
     (torch.float16, torch.bfloat16)],
    ids=str,
)  # fmt: skip
def test_mixed_dtypes(device, dtypes, plan, products):
    torch.manual_seed(0)
    inputs = make(9, 33, 300, device, bias=True)
    inputs = inputs._replace(hidden=inputs.hidden.to(dtypes[0]), weight=inputs.weight.to(dtypes[1]))
    assert_accurate(inputs, sample(inputs), plan=plan, products=products)


@kernels
@all_products
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_a_float64_operand_makes_the_result_float64(device, which, products):
    inputs = make(9, 33, 300, device)
    inputs = inputs._replace(**{which: getattr(inputs, which).double()})
    targets = sample(inputs)
    log_probs = log_probs_from_hidden(inputs.hidden, inputs.weight, targets, products=products)
    exact = plain(targets, torch.float64, False)(inputs.map(Tensor.double))
    torch.testing.assert_close(log_probs, exact, rtol=0, atol=1e-12)


@kernels
@all_products
@pytest.mark.parametrize("plan", ["keep", "recompute"])
@pytest.mark.parametrize(
    "softmax",
    [{"temperature": 0.6}, {"temperature": 1.7}, {"softcap": 30.0},
     {"softcap": 5.0, "temperature": 0.9}],
    ids=str,
)  # fmt: skip
def test_temperature_and_softcap(device, softmax, plan, products):
    torch.manual_seed(0)
    inputs = make(9, 33, 300, device, bias=True)
    # this keeps |log_prob| small: otherwise, the rounding of the logits themselves matters
    inputs = inputs._replace(hidden=inputs.hidden / 4)
    assert_accurate(inputs, sample(inputs), softmax, plan=plan, products=products)


@kernels
@all_plans
@pytest.mark.parametrize(
    ("rank", "dtype"), [(1, torch.float32), (8, torch.float32), (8, torch.bfloat16)], ids=str
)
def test_lora(device, rank, dtype, plan):
    """The weight is frozen: only a, b, the bias and the hidden states have gradients."""
    torch.manual_seed(0)
    inputs = make(5, 33, 1100, device, rank=rank, bias=True).map(lambda x: x.to(dtype))
    targets = sample(inputs)
    assert_accurate(inputs, targets, frozen=("weight",), **with_budget(plan, inputs))
    frozen = ("weight", "bias", "hidden")
    assert_accurate(inputs, targets, {"softcap": 20.0}, entropies=[False], frozen=frozen,
                    **with_budget(plan, inputs))  # fmt: skip


@compiled_only
@pytest.mark.parametrize("plan", ["keep", "recompute"])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("rank", [0, 2])
def test_gradcheck(plan, softcap, rank):
    inputs = make(5, 4, 9, torch.device("cpu"), bias=True, rank=rank).map(lambda x: x.double() / 4)
    targets = torch.tensor([0, 8, -100, 3, 3])
    constants = {"weight": inputs.weight} if rank else {"a": None, "b": None}
    names = [name for name in Inputs._fields if name not in constants]

    def call(*leaves: Tensor):
        return Inputs(**dict(zip(names, leaves, strict=True)), **constants).call(
            log_probs_from_hidden, targets, temperature=1.3, softcap=softcap, plan=plan,
            return_entropy=True,
        )  # fmt: skip

    leaves = [getattr(inputs, name).detach().requires_grad_() for name in names]
    assert call(*leaves)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(call, leaves, check_undefined_grad=True)


@kernels
@all_products
@all_plans
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_targets(device, plan, dtype, products):
    """Unlikely targets, with log-probs below -200, are accurate at sharp temperatures."""
    inputs = make(6, 32, 1200, device, bias=True)
    logits = inputs.map(Tensor.double).call(reference.logits_from_hidden)
    targets = torch.where(
        torch.arange(6, device=device) % 2 == 0, logits.argmin(1), logits.argmax(1)
    )
    for softmax in ({"temperature": 0.05}, {"temperature": 0.2}):
        low = inputs.map(lambda x: x.to(dtype))
        options = {"products": products} | softmax | with_budget(plan, low)
        values, grads = run(
            lambda leaves, options=options: leaves.call(log_probs_from_hidden, targets, **options),
            low, torch.ones(1, 6, device=device),
        )  # fmt: skip
        exact_values, exact = run(
            plain(targets, torch.float64, False, **softmax), low.map(Tensor.double),
            torch.ones(1, 6, device=device),
        )  # fmt: skip
        assert exact_values[0].min() < (-200 if softmax["temperature"] < 0.1 else -85)
        torch.testing.assert_close(values[0].double(), exact_values[0], rtol=1e-6, atol=1e-4)
        # the temperature multiplies the rounding of a logit by 20
        bound = 1e-4 if dtype == torch.float32 else 2**-7
        for name, grad in grads.items():
            assert relative(grad, exact[name]) <= bound, name


@kernels
@all_products
def test_large_hidden_states(device, products):
    """Logits of +-1000 do not overflow, even where the largest is not among the first."""
    inputs = make(4, 8, 1500, device).map(lambda x: x * 8)
    logits = inputs.map(Tensor.double).call(reference.logits_from_hidden)
    assert logits.abs().max() > 600
    targets = logits.argmax(1)
    targets[1] = logits[1].argmin()
    for plan in ("keep", "recompute"):
        values, grads = run(
            lambda leaves, plan=plan: leaves.call(
                log_probs_from_hidden, targets, plan=plan, products=products
            ),
            inputs, torch.ones(1, 4, device=device),
        )  # fmt: skip
        exact_values, exact = run(
            plain(targets, torch.float64, False), inputs.map(Tensor.double),
            torch.ones(1, 4, device=device),
        )  # fmt: skip
        torch.testing.assert_close(values[0].double(), exact_values[0], rtol=1e-6, atol=1e-3)
        for name, grad in grads.items():
            assert relative(grad, exact[name]) <= 1e-3, name


# Rows and layouts


@kernels
@all_products
@all_plans
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_are_zero_whatever_they_hold(device, dtype, plan, products):
    inputs = make(5, 16, 1100, device).map(lambda x: x.to(dtype))
    targets = torch.tensor([0, -100, -100, 1099, -100], device=device, dtype=torch.int32)
    dirty = inputs.hidden.clone()
    dirty[1], dirty[2], dirty[4] = math.nan, math.inf, -math.inf
    results = [
        run(
            lambda leaves: leaves.call(
                log_probs_from_hidden, targets, return_entropy=True, products=products,
                **with_budget(plan, inputs),
            ),
            inputs._replace(hidden=hidden), torch.ones(2, 5, device=device),
        )
        for hidden in (inputs.hidden, dirty)
    ]  # fmt: skip
    (values, grads), (dirty_values, dirty_grads) = results
    for x in (*dirty_values, dirty_grads["hidden"]):
        assert (x[targets < 0] == 0).all()
        assert (x[targets >= 0] != 0).any()
    for a, b in zip(
        (*values, *grads.values()), (*dirty_values, *dirty_grads.values()), strict=True
    ):
        assert torch.equal(a, b)


@kernels
@all_products
@all_plans
def test_a_row_without_gradient_is_not_used(device, plan, products):
    """A live NaN row shows in its log-prob, but not in dweight if it has no gradient."""
    if (plan, products) == ("keep", "mm"):
        pytest.skip("torch.mm multiplies what was kept of a dead row by zero")
    inputs = make(7, 16, 1100, device)
    inputs.hidden[3] = math.nan
    targets = torch.arange(7, device=device)
    upstream = torch.ones(1, 7, device=device)
    upstream[0, 3] = 0
    values, grads = run(
        lambda leaves: leaves.call(
            log_probs_from_hidden, targets, products=products, **with_budget(plan, inputs)
        ),
        inputs, upstream,
    )  # fmt: skip
    assert values[0].isnan().nonzero().tolist() == [[3]]
    assert (grads["hidden"][3] == 0).all()
    assert grads["hidden"].isfinite().all()
    assert grads["weight"].isfinite().all()


@kernels
@all_products
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_hidden_states_show_in_their_row_only(device, bad, products):
    inputs = make(3, 16, 300, device)
    clean = inputs.hidden.clone()
    inputs.hidden[1, 5] = bad
    targets = torch.tensor([0, 299, 3], device=device)
    values, grads = run(
        lambda leaves: leaves.call(log_probs_from_hidden, targets, products=products),
        inputs, torch.ones(1, 3, device=device),
    )  # fmt: skip
    assert values[0][1].isnan()
    assert grads["hidden"][1].isnan().any()
    assert grads["hidden"][::2].isfinite().all()
    expected = log_probs_from_hidden(clean, inputs.weight, targets, products=products)
    assert torch.equal(values[0][::2], expected[::2])


OUT_OF_RANGE = [300, 5000, -1, 2**31 + 1]


@kernels
@all_products
@pytest.mark.parametrize("value", OUT_OF_RANGE)
def test_targets_out_of_range(device, value, products):
    inputs = make(4, 16, 300, device)
    targets = torch.tensor([0, 1, value, 2], device=device)

    def call(leaves: Inputs):
        return leaves.call(log_probs_from_hidden, targets, products=products)

    if not ON_TRITON:
        with pytest.raises(IndexError, match=rf"targets must lie in \[0, 300\) .*got {value} at"):
            call(inputs)
        return
    values, grads = run(call, inputs, torch.ones(1, 4, device=device))
    assert values[0].isnan().nonzero().tolist() == [[2]]
    assert grads["hidden"][2].isnan().all()
    assert grads["hidden"][[0, 1, 3]].isfinite().all()


def views(x: Tensor) -> dict[str, Tensor]:
    """Return the same (N, H) numbers in several memory layouts."""
    wide = torch.cat([x, x.new_full((len(x), 3), math.nan)], 1)
    return {
        "part of a wider row": wide[:, :-3],
        "transposed": x.T.contiguous().T,
        "every other row": x.repeat_interleave(2, 0)[::2],
        "odd offset": torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    }


@kernels
@all_products
@pytest.mark.parametrize("name", list(views(torch.zeros(2, 2))))
@pytest.mark.parametrize("which", ["hidden", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(device, which, name, dtype, products):
    inputs = make(6, 17, 130, device).map(lambda x: x.to(dtype))
    targets = sample(inputs)
    upstream = torch.randn(6, device=device)
    strided = inputs._replace(**{which: views(getattr(inputs, which))[name]})
    results = []
    for x in (inputs, strided):
        leaves = x.map(lambda t: t.detach().requires_grad_())
        log_probs = leaves.call(log_probs_from_hidden, targets, products=products)
        log_probs.backward(upstream)
        results.append([log_probs.detach(), *leaves.grads().values()])
    for ours, expected in zip(*results, strict=True):
        # another memory layout changes the order of summation, by an ulp of 16 bits
        rtol = max(1e-5, torch.finfo(ours.dtype).eps)
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=1e-6)


@kernels
@all_products
@pytest.mark.parametrize("which", ["bias", "lora"])
def test_strided_bias_and_low_rank_part(device, which, products):
    if which == "lora" and products == "triton":
        pytest.skip("triton's products have no low-rank part")
    inputs = make(6, 17, 130, device, bias=True, rank=3 if which == "lora" else 0)
    targets, upstream = sample(inputs), torch.randn(6, device=device)
    assert inputs.bias is not None
    strided = inputs._replace(bias=inputs.bias.repeat_interleave(2)[::2])
    if inputs.b is not None:
        strided = strided._replace(b=inputs.b.T.contiguous().T)
    results = []
    for x in (inputs, strided):
        leaves = x.map(lambda t: t.detach().requires_grad_())
        leaves.weight.requires_grad_(which == "bias")
        log_probs = leaves.call(log_probs_from_hidden, targets, products=products)
        log_probs.backward(upstream)
        results.append([log_probs.detach(), *leaves.grads().values()])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@kernels
@all_products
def test_batched_hidden_states_are_rows(device, products):
    inputs = make(12, 17, 130, device)
    targets = sample(inputs)
    flat = log_probs_from_hidden(inputs.hidden, inputs.weight, targets, products=products)
    batched = log_probs_from_hidden(
        inputs.hidden.view(3, 4, 17), inputs.weight, targets.view(3, 4).int(), products=products
    )
    assert batched.shape == (3, 4)
    assert torch.equal(batched.flatten(), flat)
    empty = inputs.hidden.view(3, 4, 17)[:, :0].requires_grad_()
    log_probs = log_probs_from_hidden(empty, inputs.weight, targets.view(3, 4)[:, :0])
    assert log_probs.shape == (3, 0)
    log_probs.sum().backward()
    assert empty.grad.shape == (3, 0, 17)


@kernels
@pytest.mark.skipif(not ON_TRITON, reason="a BLAS product of one row rounds differently")
def test_triton_products_don_t_depend_on_the_batch(device):
    inputs = make(140, 33, 300, device)
    targets = sample(inputs)

    def log_probs(rows: Tensor) -> Tensor:
        return log_probs_from_hidden(
            inputs.hidden[rows], inputs.weight, targets[rows], products="triton"
        )

    together = log_probs(torch.arange(140, device=device))
    order = torch.randperm(140, device=device)
    assert torch.equal(log_probs(order), together[order])
    for row in (0, 64, 139):
        assert torch.equal(log_probs(torch.tensor([row], device=device)), together[row : row + 1])


@kernels
@all_products
@pytest.mark.skipif(not ON_TRITON, reason="tests kernels; on a CPU, dbias is a product in fp32")
@pytest.mark.parametrize("rows", [1, 40])
def test_factors_of_dbias_are_not_rounded(device, rows, products):
    """The only error of dbias is the rounding of exponentials to 16 bits."""
    inputs = make(rows, 64, 300, device, bias=True)
    inputs = inputs.map(Tensor.bfloat16)._replace(bias=inputs.bias)
    targets, upstream = sample(inputs), torch.randn(rows, device=device)
    bias = inputs.bias.clone().requires_grad_()
    of_rows = log_probs_from_hidden(
        inputs.hidden, inputs.weight, targets, bias=bias, products=products
    )
    of_rows.backward(upstream)
    z = inputs.map(Tensor.double).call(reference.logits_from_hidden)
    at_y = torch.arange(rows, device=device), targets
    e = (z - z[at_y][:, None]).exp()
    q = 1 - z.softmax(-1)[at_y]
    e[at_y] = 0
    factor = -upstream * q / e.sum(1)
    expected = (factor[:, None] * e.bfloat16().double()).sum(0)
    expected.index_add_(0, targets, upstream * q)
    assert relative(bias.grad, expected) < 2e-5


@compiled_only
@pytest.mark.parametrize("count", [1, 2, 3, 15])
def test_gradients_of_few_rows_are_as_accurate_as_those_of_many(count):
    """Embeddings have a large common part, which cancels in dhidden: a coarse sum would show."""
    inputs = make(40, 32, 9000, torch.device("cpu"))
    inputs = inputs._replace(weight=inputs.weight + 1.0)
    targets = sample(inputs)
    upstream = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    _, exact = run(plain(targets, torch.float64, False), inputs.map(Tensor.double), upstream)

    def error(rows: slice) -> float:
        _, grads = run(
            lambda leaves: leaves.call(log_probs_from_hidden, targets[rows], plan="keep"),
            inputs._replace(hidden=inputs.hidden[rows]), upstream[:, rows], frozen=("weight",),
        )  # fmt: skip
        few = slice(7 - rows.start, 7 + count - rows.start)
        return relative(grads["hidden"][few], exact["hidden"][7 : 7 + count])

    assert error(slice(7, 7 + count)) <= 1.5 * error(slice(0, 40))


@kernels
@all_products
def test_tied_embeddings(device, products):
    """A tensor that is both the embedding and the head gets the sum of both gradients."""
    weight = make(1, 16, 300, device).weight
    ids, targets = torch.arange(8, device=device), torch.arange(8, device=device) + 1
    grads = []
    for function, dtype in ((log_probs_from_hidden, torch.float32),
                            (reference.log_probs_from_hidden, torch.float64)):  # fmt: skip
        leaf = weight.to(dtype, copy=True).requires_grad_()
        options = {} if function is reference.log_probs_from_hidden else {"products": products}
        function(torch.tanh(leaf[ids]), leaf, targets, **options).sum().backward()
        grads.append(leaf.grad)
    assert relative(*grads) <= BOUNDS["dweight, rel L2"]


# Policy losses: whole sequences at a time


class Batch(NamedTuple):
    """Packed sequences."""

    inputs: Inputs
    targets: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    cu_seqlens: Tensor


def make_batch(lengths, device, *, H=16, V=130, seed=0, bias=False, spread=1.0) -> Batch:
    """Make sequences inside the clip range, clipped ones, and every fifth without an advantage.

    The default spread of the log-ratios suits the narrow clip ranges of sequences.
    """
    N = sum(lengths)
    inputs = make(N, H, V, device, seed=seed, bias=bias)
    torch.manual_seed(seed)
    targets = sample(inputs) if N else torch.zeros(0, dtype=torch.long, device=device)
    exact = inputs.map(Tensor.double).call(reference.log_probs_from_hidden, targets)
    kinds = spread * torch.tensor([1e-4, -1e-4, 2e-3, -2e-3, 1e-4])
    which = torch.arange(len(lengths)) % 5
    ids = torch.repeat_interleave(torch.tensor(lengths))
    old = exact - kinds[which][ids].to(device)
    advantages = torch.where(which == 4, 0.0, torch.where(which % 2 == 0, 1.3, -0.7))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return Batch(inputs, targets, old.float(), advantages.to(device), cu_seqlens.to(device))


def loss_of(batch: Batch, function=gspo_ops.policy_loss_from_hidden, **options):
    def call(leaves: Inputs):
        loss, stats = leaves.call(
            function, batch.targets, batch.old_log_probs, batch.advantages,
            **{"cu_seqlens": batch.cu_seqlens} | options,
        )  # fmt: skip
        return loss, *(stats[name] for name in ("log_ratio", "clip_frac_tokens"))

    return call


def assert_loss(batch: Batch, options: dict, frozen=(), **how) -> tuple[list, dict, dict]:
    """Check loss, log-ratios, clip fraction and gradients; return ours and the exact gradients."""

    def plainly(dtype: torch.dtype):
        def cast(x):
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        at = batch._replace(**{n: cast(x) for n, x in batch._asdict().items() if n != "inputs"})
        call = loss_of(
            at, reference.policy_loss_from_hidden, **{n: cast(x) for n, x in options.items()}
        )
        return lambda leaves: call(leaves.map(cast))

    exact_values, exact = run(plainly(torch.float64), batch.inputs.map(Tensor.double))
    _, eager = run(plainly(torch.float32), batch.inputs)
    values, grads = run(loss_of(batch, **options, **how), batch.inputs, frozen=frozen)
    torch.testing.assert_close(values[0].double(), exact_values[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values[1].double(), exact_values[1], rtol=0, atol=4e-6)
    torch.testing.assert_close(values[2].double(), exact_values[2], rtol=1e-6, atol=0)
    assert grads.keys() == exact.keys() - set(frozen)
    assert_grads(grads, exact, eager)
    dead = (exact["hidden"] == 0).all(-1)
    assert grads["hidden"][dead].count_nonzero() == 0
    return values, grads, exact


@kernels
@all_products
@pytest.mark.parametrize("objective", [GSPO(), GSPOToken(), GRPO()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("rows", [5, 12] if INTERPRETED else [1, 5, 12, 30, 1000])
def test_chunks_of_whole_sequences(device, rows, objective, products):
    """Budgets may cut anywhere: within a group, after an empty sequence, below one sequence."""
    spread = 200.0 if objective.ratio_level == "token" else 1.0
    batch = make_batch([3, 0, 1, 12, 4, 0, 7, 2, 5, 1], device, spread=spread)
    budget = rows * 130 * 4  # the bytes of these rows' exponentials
    values, _, exact = assert_loss(
        batch, {"objective": objective}, plan="chunk", memory_budget=budget, products=products
    )
    assert 0 < values[2] < 1
    assert (exact["hidden"] == 0).all(1).any()


@kernels
@all_products
@all_loss_plans
@pytest.mark.parametrize("objective", [GSPO(), GRPO(aggregation="token-mean")], ids=repr)
def test_padded_losses(device, plan, objective, products):
    """The denominator also counts what is in other chunks."""
    batch = make_batch([4] * 4, device, V=1100, bias=True)
    mask = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)).to(device) < 0.7
    mask[1] = False
    options = {"cu_seqlens": None, "mask": mask, "objective": objective}
    shaped = batch._replace(
        inputs=batch.inputs._replace(hidden=batch.inputs.hidden.view(4, 4, -1)),
        targets=batch.targets.view(4, 4), old_log_probs=batch.old_log_probs.view(4, 4),
    )  # fmt: skip
    _, grads, _ = assert_loss(
        shaped, options, products=products, **with_budget(plan, shaped.inputs)
    )
    assert grads["hidden"][~mask].count_nonzero() == 0


@kernels
@all_loss_plans
def test_lora_losses(device, plan):
    batch = make_batch([3, 1, 4, 2], device, V=1100)
    inputs = make(10, 16, 1100, device, rank=3)
    new = inputs.map(Tensor.double).call(reference.log_probs_from_hidden, batch.targets)
    batch = batch._replace(inputs=inputs, old_log_probs=new.float() - 1e-4)
    _, grads, _ = assert_loss(batch, {}, frozen=("weight",), **with_budget(plan, inputs))
    assert grads.keys() == {"hidden", "a", "b"}


@kernels
@all_products
@all_loss_plans
def test_loss_with_reference_and_entropy(device, plan, products):
    batch = make_batch([3, 1, 0, 4], device, V=1100)
    options = {"objective": GRPO(kl_coef=0.2), "ref_log_probs": batch.old_log_probs + 0.1,
               "return_entropy": True, "denominator": 7.0,
               "rollout_weights": torch.linspace(0.5, 1.5, 8, device=device)}  # fmt: skip
    how = {"products": products} | with_budget(plan, batch.inputs)
    assert_loss(batch, options, **how)
    args = (batch.targets, batch.old_log_probs, batch.advantages)
    stats, exact = (
        batch.inputs.call(function, *args, cu_seqlens=batch.cu_seqlens, **options, **more)[1]
        for function, more in ((gspo_ops.policy_loss_from_hidden, how),
                               (reference.policy_loss_from_hidden, {}))
    )  # fmt: skip
    for name, value in exact.items():
        torch.testing.assert_close(stats[name], value, rtol=2e-5, atol=2e-5)


@kernels
@all_products
@pytest.mark.parametrize("plan", ["keep", "part", "recompute"])
def test_function_as_objective(device, plan, products):
    batch = make_batch([3, 1, 0, 4], device, V=1100)

    def objective(log_probs, old_log_probs, advantages, sequence_ids):
        return -torch.exp(log_probs - old_log_probs) * advantages

    losses = []
    for chosen, how in (
        (objective, with_budget(plan, batch.inputs)),
        (GRPO(clip_low=1.0, clip_high=1e9), {"plan": plan.replace("part", "keep")}),
    ):

        def call(leaves: Inputs, chosen=chosen, how=how):
            return leaves.call(
                gspo_ops.policy_loss_from_hidden, batch.targets, batch.old_log_probs,
                batch.advantages, cu_seqlens=batch.cu_seqlens, objective=chosen,
                products=products, **how,
            ).loss  # fmt: skip

        losses.append(run(call, batch.inputs))
    (values, grads), (expected_values, expected) = losses
    torch.testing.assert_close(values, expected_values, rtol=1e-6, atol=1e-7)
    for name, grad in grads.items():
        assert relative(grad, expected[name].double()) <= BOUNDS["dweight, rel L2"]


# Gradients again, and elsewhere


def of_every_op(device, products="auto"):
    """Return inputs, and the losses of each op and plan as functions of Inputs, by name."""
    batch = make_batch([3, 1, 0, 2, 2], device, V=1100)
    calls = {}
    for plan in ("keep", "part", "chunk", "recompute"):
        options = with_budget(plan, batch.inputs) | {"products": products}
        calls[f"policy_loss {plan}"] = lambda leaves, options=options, **more: leaves.call(
            gspo_ops.policy_loss_from_hidden, batch.targets, batch.old_log_probs,
            batch.advantages, cu_seqlens=batch.cu_seqlens, **options, **more,
        ).loss  # fmt: skip
        if plan != "chunk":
            calls[f"log_probs {plan}"] = lambda leaves, options=options, **more: leaves.call(
                log_probs_from_hidden, batch.targets, **options, **more
            ).dot(torch.linspace(-1, 1, 8, device=device))
    return batch.inputs, calls


OPS = list(of_every_op(torch.device("cpu"))[1])
if INTERPRETED:  # the interpreter is slow
    OPS = ["policy_loss keep", "policy_loss chunk", "policy_loss recompute", "log_probs part"]
all_ops = pytest.mark.parametrize("op", OPS)


def leaves_of(inputs: Inputs, frozen=()) -> Inputs:
    named = inputs._asdict().items()
    return Inputs(
        *(None if x is None else x.detach().clone().requires_grad_(n not in frozen)
          for n, x in named)
    )  # fmt: skip


@kernels
@all_products
@all_ops
def test_second_backward_gives_the_same(device, op, products):
    inputs, calls = of_every_op(device, products)
    leaves = leaves_of(inputs)
    total = calls[op](leaves)
    params = (leaves.hidden, leaves.weight)
    first = torch.autograd.grad(total, params, retain_graph=True)
    scaled = torch.autograd.grad(3 * total, params, retain_graph=True)
    second = torch.autograd.grad(total, params)
    for a, b, c in zip(first, second, scaled, strict=True):
        assert a.count_nonzero() > 0
        assert torch.equal(a, b)
        assert relative(c, 3 * a.double()) <= 1e-6


@kernels
@all_products
@all_ops
def test_inputs_stay_as_they_are(device, op, products):
    inputs, calls = of_every_op(device, products)
    leaves = leaves_of(inputs)
    versions = [x._version for x in leaves if x is not None]
    calls[op](leaves).backward()
    assert [x._version for x in leaves if x is not None] == versions
    for x, y in zip(leaves, inputs, strict=True):
        assert x is y or torch.equal(x, y)


@kernels
@all_products
@all_ops
def test_main_grad(device, op, products):
    """Gradients are added to main_grad; the weight itself gets none."""
    inputs, calls = of_every_op(device, products)
    expected = leaves_of(inputs)
    calls[op](expected).backward()
    leaves = leaves_of(inputs)
    main_grad = torch.ones(inputs.weight.shape, device=device)
    total = calls[op](leaves, main_grad=main_grad)
    (2 * total).backward(retain_graph=True)
    assert leaves.weight.grad is None
    bound = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(main_grad, 1 + 2 * expected.weight.grad, **bound)
    torch.testing.assert_close(leaves.hidden.grad, 2 * expected.hidden.grad, **bound)
    total.backward()
    torch.testing.assert_close(main_grad, 1 + 3 * expected.weight.grad, **bound)


@kernels
@all_products
@all_ops
def test_main_grad_of_a_bf16_weight_is_not_rounded(device, op, products):
    inputs, calls = of_every_op(device, products)
    inputs = inputs.map(Tensor.bfloat16)
    leaves = leaves_of(inputs)
    main_grad = torch.zeros(inputs.weight.shape, device=device)
    calls[op](leaves, main_grad=main_grad).backward()
    rounded = leaves_of(inputs)
    calls[op](rounded).backward()
    assert (main_grad != main_grad.bfloat16()).any()
    torch.testing.assert_close(main_grad.bfloat16(), rounded.weight.grad, rtol=2**-7, atol=1e-7)


@kernels
@all_products
@all_ops
@pytest.mark.parametrize("frozen", [("weight",), ("hidden",)], ids=str)
def test_frozen_inputs_have_no_gradient(device, op, frozen, products):
    inputs, calls = of_every_op(device, products)
    expected = leaves_of(inputs)
    calls[op](expected).backward()
    leaves = leaves_of(inputs, frozen)
    calls[op](leaves).backward()
    for name, grad in leaves.grads().items():
        torch.testing.assert_close(grad, getattr(expected, name).grad, rtol=1e-5, atol=1e-8)
    assert leaves.grads().keys() == {"hidden", "weight"} - set(frozen)


@kernels
@all_products
@all_ops
def test_no_grad_gives_the_same_value(device, op, products):
    inputs, calls = of_every_op(device, products)
    leaves = leaves_of(inputs)
    with_graph = calls[op](leaves)
    with torch.no_grad():
        without = calls[op](leaves)
    assert not without.requires_grad
    torch.testing.assert_close(without, with_graph.detach(), rtol=1e-6, atol=1e-7)
    with torch.inference_mode():
        assert torch.equal(calls[op](inputs), without)


@compiled_only
@all_ops
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(device, op, reentrant):
    inputs, calls = of_every_op(device)
    expected = leaves_of(inputs)
    calls[op](expected).backward()
    leaves = leaves_of(inputs)

    def body(hidden: Tensor, weight: Tensor) -> Tensor:
        return calls[op](Inputs(hidden, weight))

    torch.utils.checkpoint.checkpoint(
        body, leaves.hidden, leaves.weight, use_reentrant=reentrant
    ).backward()
    for name, grad in leaves.grads().items():
        torch.testing.assert_close(grad, getattr(expected, name).grad, rtol=1e-5, atol=1e-8)


def settings() -> tuple:
    """Return the process's settings for products and its numbers of threads."""
    cuda = torch.backends.cuda.matmul
    with ThreadPoolExecutor(1) as pool:
        threads = pool.submit(torch.get_num_threads).result()
    return (
        torch.get_float32_matmul_precision(), cuda.allow_tf32,
        cuda.allow_bf16_reduced_precision_reduction, threads, torch.get_num_threads(),
    )  # fmt: skip


@pytest.fixture
def coarse_products() -> Iterator[None]:
    """Let fp32 be rounded to bfloat16 where the machine has instructions for it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@all_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_caller_s_precision_changes_nothing(device, op, dtype, request):
    """Neither autocast nor TF32-like products affect the logits."""
    inputs, calls = of_every_op(device)
    inputs = inputs.map(lambda x: x.to(dtype))
    values, grads = run(calls[op], inputs)
    request.getfixturevalue("coarse_products")
    with torch.autocast(device.type, torch.bfloat16):
        again, grads_again = run(calls[op], inputs)
    assert worst(values[0] - again[0]) <= BOUNDS["log_prob from hidden"]
    for name, grad in grads.items():
        bound = BOUNDS["dweight, rel L2"] if dtype == torch.float32 else 2**-9
        assert relative(grads_again[name], grad.double()) <= bound, name


@pytest.mark.parametrize(("precision", "is_rounded"), [("highest", False), ("medium", True)])
def test_tf32_before_torch_2_9(precision, is_rounded, monkeypatch):
    """There, any precision but the highest lets a GPU round to TF32, and backends have no own."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", None)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert gspo_ops.backend.rounds_fp32(torch.device("cuda")) == is_rounded


@compiled_only
@pytest.mark.parametrize("rank", [0, 3])
def test_products_that_the_process_would_round_are_exact(rank, monkeypatch):
    monkeypatch.setattr(gspo_ops.backend, "rounds_fp32", lambda device: True)
    monkeypatch.setattr(torch, "mm", refusing_fp32(torch.mm))
    monkeypatch.setattr(Tensor, "addmm_", refusing_fp32(Tensor.addmm_))
    inputs = make(5, 33, 1100, torch.device("cpu"), rank=rank, bias=True)
    frozen = ("weight",) if rank else ()
    assert_accurate(inputs, sample(inputs), frozen=frozen, plan="recompute")


def refusing_fp32(product: Callable) -> Callable:
    def checked(*args, **options):
        assert all(x.dtype != torch.float32 for x in args[-2:])
        return product(*args, **options)

    return checked


@compiled_only
def test_settings_of_the_process_are_left_alone(coarse_products):
    """Settings do not change, even where two threads work at once and one of them fails."""
    inputs, calls = of_every_op(torch.device("cpu"))
    before, seen = settings(), set()

    def work(fails: bool) -> None:
        for op in calls:
            run(calls[op], inputs)
            if fails:
                with pytest.raises(IndexError, match="targets"):
                    log_probs_from_hidden(*inputs[:2], torch.full((8,), 1 << 20))

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(work, fails) for fails in (False, True)]
        while not all(job.done() for job in jobs):
            seen.add(settings())
    for job in jobs:
        job.result()
    assert seen | {settings()} == {before}


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_do_not_depend_on_the_number_of_threads(dtype, monkeypatch):
    """Log-probs keep every bit; gradients don't, as torch's library splits products freely."""
    monkeypatch.setattr(gspo_ops.head, "has_bf16", lambda device: True)
    inputs = make(600, 16, 2100, torch.device("cpu"), bias=True).map(lambda x: x.to(dtype))
    targets = sample(inputs)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for plan in ("keep", "recompute"):

                def call(leaves, plan=plan):
                    return leaves.call(log_probs_from_hidden, targets, plan=plan)

                values, grads = run(call, inputs, torch.ones(1, 600))
                with torch.inference_mode():
                    values.append(call(inputs))
                results.append((values, grads))
    finally:
        torch.set_num_threads(before)
    for values, grads in results[1:]:
        assert all(map(torch.equal, values, results[0][0]))
        for name, grad in grads.items():
            bound = 5e-6 if dtype == torch.float32 else 5e-3
            assert relative(grad, results[0][1][name].double()) < bound


@kernels
@all_products
def test_tiles_of_kernels_are_not_made_by_several_threads_at_once(device, products):
    """Results are right with 3 threads, though Triton's interpreter has only one state."""
    inputs = make(16, 8, 3 * 8192, device)
    targets = sample(inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_accurate(inputs, targets, entropies=[False], plan="recompute", products=products)
    finally:
        torch.set_num_threads(before)


# Work


def product_flops(function) -> int:
    """Count the FLOPs of every matrix product, including those inside an operator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler does not see our own threads
    try:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            function()
    finally:
        torch.set_num_threads(before)
    total = 0
    for event in recorded.events():
        if event.name.removeprefix("aten::") in PRODUCTS:
            shapes = [shape for shape in event.input_shapes if len(shape) >= 2]
            a, b = shapes[1:3] if "addmm" in event.name else shapes[:2]
            total += 2 * math.prod(a) * b[-1]
    return total


PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "mv", "addmv", "addmv_", "baddbmm", "baddbmm_"}


def live_rows(N: int, f: float, device) -> Tensor:
    """Return an upstream gradient that leaves a random fraction f of the rows alive."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    upstream = torch.zeros(N)
    upstream[order[: round(f * N)]] = 1.0
    return upstream.to(device)


FRACTIONS = [1.0, 0.6, 0.35, 0.1, 0.0]
N_WORK, H_WORK, V_WORK = 1000, 24, 3000
TILE = 2.0 * 64 * H_WORK * V_WORK * 3  # the cost of 64 rows more than needed in three products


@compiled_only
@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",)], ids=str)
@pytest.mark.parametrize("plan", ["keep", "recompute"])
@pytest.mark.parametrize("f", FRACTIONS)
def test_flops_of_log_probs(plan, f, frozen):
    """FLOPs are (2 + 4f) NVH kept, (2 + 6f) NVH recomputed, and 2f NVH less for a frozen input."""
    device = torch.device("cpu")
    inputs = make(N_WORK, H_WORK, V_WORK, device)
    targets = torch.arange(N_WORK)
    leaves = leaves_of(inputs, frozen)
    upstream = live_rows(N_WORK, f, device)
    spent = product_flops(
        lambda: log_probs_from_hidden(*leaves[:2], targets, plan=plan).backward(upstream)
    )
    products = 1 + f * ((plan == "recompute") + 2 - len(frozen))
    expected = 2.0 * N_WORK * V_WORK * H_WORK * products
    assert abs(spent - expected) <= TILE, spent / expected
    assert gspo_ops.plan_from_hidden(*leaves[:2], plan=plan).flops(f) == pytest.approx(expected)


@compiled_only
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=str)
@all_loss_plans
@pytest.mark.parametrize("f", FRACTIONS)
def test_flops_of_losses(plan, f, frozen):
    device = torch.device("cpu")
    sequences, T = 20, N_WORK // 20
    inputs = make(N_WORK, H_WORK, V_WORK, device)
    leaves = leaves_of(inputs, frozen)
    targets = torch.arange(N_WORK).view(sequences, T)
    with torch.no_grad():
        old = log_probs_from_hidden(*inputs[:2], targets.flatten()).view(sequences, T)
    options = with_budget(plan, inputs)
    if plan == "chunk":
        options["memory_budget"] = 4 * V_WORK * (H_WORK + 330)
    args = (leaves.hidden.view(sequences, T, -1), leaves.weight, targets, old)

    def work(advantages) -> None:
        gspo_ops.policy_loss_from_hidden(*args, advantages, **options).loss.backward()

    spent = product_flops(lambda: work(live_rows(sequences, f, device)))
    plan_taken = gspo_ops.plan_from_hidden(*leaves[:2], **options)
    kept = {"keep": 1.0, "chunk": 1.0, "recompute": 0.0}.get(plan, plan_taken.kept_columns / V_WORK)
    expected = 2.0 * N_WORK * V_WORK * H_WORK * (1 + f * (2 - len(frozen) + 1 - kept))
    assert abs(spent - expected) <= TILE, spent / expected
    if plan != "chunk":  # for a loss only
        assert plan_taken.flops(f) == pytest.approx(expected)


@compiled_only
@all_loss_plans
def test_on_policy_rows_without_advantage_cost_nothing(plan):
    """Such rows' gradient is known before the forward, which needs nothing else from them."""
    device = torch.device("cpu")
    leaves = leaves_of(make(N_WORK, H_WORK, V_WORK, device))
    targets = torch.arange(N_WORK).view(20, -1)
    advantages = live_rows(20, 0.3, device)
    options = with_budget(plan, leaves)
    spent = product_flops(
        lambda: gspo_ops.policy_loss_from_hidden(
            leaves.hidden.view(20, -1, H_WORK), leaves.weight, targets, None, advantages, **options
        ).loss.backward()
    )
    taken = gspo_ops.plan_from_hidden(leaves.hidden, leaves.weight, **options)
    recomputed = 1 - taken.kept_columns / V_WORK
    expected = 2.0 * 0.3 * N_WORK * V_WORK * H_WORK * (3 + recomputed)
    assert abs(spent - expected) <= TILE, spent / expected


FORWARD_OF_8_ROWS = 2.0 * 16 * 1100 * 16  # products have a multiple of 16 rows


@compiled_only
@all_ops
def test_nothing_is_spent_on_what_nobody_asks_for(op):
    inputs, calls = of_every_op(torch.device("cpu"))

    def forward(frozen) -> Callable[[], object]:
        leaves = leaves_of(inputs, frozen)
        return lambda: calls[op](leaves)

    def without_graph() -> None:
        with torch.no_grad():
            calls[op](inputs)

    unit = product_flops(without_graph)
    assert unit == FORWARD_OF_8_ROWS
    assert product_flops(forward(("hidden", "weight"))) == unit
    if "chunk" not in op:
        assert product_flops(forward(())) == unit


@compiled_only
def test_checkpointed_forward_is_only_a_forward():
    """The first pass of a checkpoint runs without a graph and computes no gradient."""
    inputs, calls = of_every_op(torch.device("cpu"))
    leaves = leaves_of(inputs)
    for op in ("policy_loss chunk", "policy_loss keep", "log_probs keep"):
        first = product_flops(
            lambda op=op: torch.utils.checkpoint.checkpoint(
                lambda hidden, weight, op=op: calls[op](Inputs(hidden, weight)),
                leaves.hidden, leaves.weight, use_reentrant=True,
            )
        )  # fmt: skip
        assert first == FORWARD_OF_8_ROWS


# Memory


def peak_memory(function) -> int:
    return peak_tensor_bytes(function, torch.device("cpu"))


@compiled_only
def test_padding_of_what_is_kept_is_not_used(monkeypatch):
    """NaN in the padding has no effect, though oneDNN reads beyond its columns in bf16 with AMX."""
    inputs = make(64, 32, 1000, torch.device("cpu")).map(Tensor.bfloat16)
    targets = sample(inputs)

    def grads() -> dict[str, Tensor]:
        return run(lambda leaves: leaves.call(log_probs_from_hidden, targets).sum(), inputs)[1]

    expected, new_empty = grads(), Tensor.new_empty

    def poisoned(*arguments, **options):
        made = new_empty(*arguments, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    for name, grad in grads().items():
        assert torch.equal(grad, expected[name])


def test_peak_memory_sees_what_is_freed():
    def function() -> None:
        for _ in range(3):
            torch.empty(1 << 20)

    assert peak_memory(function) == 4 << 20


def assert_memory(inputs: Inputs, **options) -> None:
    """Check that a plan predicts its peak beside the returned gradients to within 10%."""
    (N, H), T = inputs.hidden.shape, 16
    targets = torch.arange(N).view(-1, T)
    with torch.no_grad():
        old = log_probs_from_hidden(*inputs[:2], targets.flatten()).view(-1, T)
    leaves = leaves_of(inputs)
    advantages = torch.ones(N // T)

    def work() -> None:
        gspo_ops.policy_loss_from_hidden(
            leaves.hidden.view(-1, T, H), leaves.weight, targets, old, advantages, **options
        ).loss.backward()

    predicted = gspo_ops.plan_from_hidden(*leaves[:2], **options)
    extra = peak_memory(work) - sum(grad.nbytes for grad in leaves.grads().values())
    assert extra == pytest.approx(predicted.bytes, rel=0.1), str(predicted)


@compiled_only
@all_loss_plans
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(plan, dtype):
    inputs = make(1024, 128, 32768, torch.device("cpu")).map(lambda x: x.to(dtype))
    assert_memory(inputs, **with_budget(plan, inputs))


@compiled_only
def test_memory_where_dweight_outweighs_the_chunks():
    inputs = make(64, 512, 8192, torch.device("cpu")).map(Tensor.bfloat16)
    assert_memory(inputs, plan="chunk", memory_budget=0)


@compiled_only
@pytest.mark.parametrize("plan", ["chunk", "recompute"])
def test_memory_is_flat_in_the_number_of_rows(plan):
    H, V, T = 16, 16384, 64
    peaks = []
    for N in (1024, 4096):
        leaves = leaves_of(make(N, H, V, torch.device("cpu")))
        targets = (torch.arange(N) % V).view(-1, T)

        def work(N=N, leaves=leaves, targets=targets) -> None:
            options = {"memory_budget": 16 << 20} if plan == "chunk" else {}
            gspo_ops.policy_loss_from_hidden(
                leaves.hidden.view(-1, T, H), leaves.weight, targets, torch.zeros(N // T, T),
                torch.ones(N // T), objective=GRPO(clip_high=1e9, clip_low=1.0), plan=plan,
                **options,
            ).loss.backward()  # fmt: skip

        peaks.append(peak_memory(work) - leaves.hidden.nbytes)
    per_row = (peaks[1] - peaks[0]) / 3072
    assert per_row <= 4 * (3 * H + 64), peaks  # rows of hidden size, and numbers per row


# Plans


def test_plan_says_what_it_does():
    inputs = leaves_of(make(64, 16, 4096, torch.device("cpu")))
    small = 64 * 4096 * 2
    for options, name in (
        ({}, "keep"), ({"plan": "keep"}, "keep"), ({"plan": "recompute"}, "recompute"),
        ({"memory_budget": 1}, "recompute"),
        ({"memory_budget": small}, "keep"),
    ):  # fmt: skip
        plan = gspo_ops.plan_from_hidden(*inputs[:2], **options)
        assert plan.name == name
        assert name in str(plan)
        assert plan.rows == 64
    half = gspo_ops.plan_from_hidden(*inputs[:2], memory_budget=small)
    assert half.kept_columns == 2048
    assert half.kept_bytes <= 1.05 * small  # rows of exponentials have some padding
    assert gspo_ops.plan_from_hidden(*inputs[:2]).flops(1.0) == 6.0 * 64 * 16 * 4096


def test_auto_goes_in_chunks_when_not_everything_fits():
    inputs = leaves_of(make(64, 16, 4096, torch.device("cpu")))

    def plan(rows: int, **options) -> gspo_ops.Plan:
        budget = rows * 4096 * 4
        hidden = inputs.hidden.repeat(64, 1)
        return gspo_ops.plan_from_hidden(hidden, inputs.weight, memory_budget=budget, **options)

    assert plan(4096).name == "keep"
    assert (plan(2048).name, plan(2048).chunk_rows) == ("chunk", 2048)
    assert plan(512).name == "chunk"
    assert (plan(511).name, plan(511).kept_columns) == ("recompute", 0)
    assert plan(2048, chunks=False).kept_columns == 2048


@kernels
@all_products
def test_plans_give_the_same_log_probs(device, products):
    inputs, calls = of_every_op(device, products)
    for kind in ("policy_loss", "log_probs"):
        results = [run(call, inputs) for name, call in calls.items() if name.startswith(kind)]
        for values, grads in results[1:]:
            torch.testing.assert_close(values[0], results[0][0][0], rtol=1e-6, atol=1e-6)
            for name, grad in grads.items():
                assert relative(grad, results[0][1][name].double()) <= 2 * 5e-6


def test_a_model_trains_to_the_same_weights():
    """Three steps of a body and a head give the same weights as from logits."""
    device = torch.device("cpu")
    batch = make_batch([5, 3, 4, 6], device, V=300)

    def train(loss_of_model) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 300))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of_model(model).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    rest = (batch.targets, None, batch.advantages)

    def from_hidden(model):
        hidden, head = model[:2](batch.inputs.hidden), model[2]
        return gspo_ops.policy_loss_from_hidden(
            hidden, head.weight, *rest, bias=head.bias, cu_seqlens=batch.cu_seqlens
        ).loss

    def from_logits(model):
        logits = model(batch.inputs.hidden)
        return gspo_ops.policy_loss_from_logits(logits, *rest, cu_seqlens=batch.cu_seqlens).loss

    for ours, theirs in zip(train(from_hidden), train(from_logits), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@kernels
@pytest.mark.skipif(not INTERPRETED, reason="dot products are counted in the interpreter")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("plan", ["keep", "recompute"])
def test_triton_products_leave_dead_rows_out(plan, frozen, monkeypatch):
    """FLOPs, as counted, are (2 + 4f) NVH etc., with live rows rounded up to whole tiles."""
    from gspo_ops.tiles_gpu import product_blocks

    spent = count_dots(monkeypatch)
    N, H, V, T = 256, 128, 256, 32
    blocks = product_blocks("N", "V", "H", torch.bfloat16)
    rows_of_a_sum = product_blocks("V", "H", "N", torch.bfloat16)["BLOCK_N"]
    inputs = make(N, H, V, "cpu").map(Tensor.bfloat16)
    targets = sample(inputs)
    for f in (1.0, 0.35, 0.0):
        hidden = inputs.hidden.detach().requires_grad_()
        weight = inputs.weight.detach().requires_grad_(not frozen)
        advantages = torch.zeros(N // T)
        advantages[: round(f * N / T)] = 1.0
        old = torch.zeros(N)  # far above the new ones: a positive advantage is not clipped
        cu_seqlens = torch.arange(0, N + 1, T, dtype=torch.int32)
        spent.clear()
        loss, _ = gspo_ops.policy_loss_from_hidden(
            hidden, weight, targets, old, advantages, cu_seqlens=cu_seqlens, plan=plan,
            products="triton",
        )  # fmt: skip
        loss.backward()

        def up_to(block: int, rows: int = round(f * N / T) * T) -> int:
            return math.ceil(rows / block) * block

        of_tiles = (2 if plan == "recompute" else 1) * up_to(blocks["BLOCK_N"])
        of_sums = 0 if frozen else up_to(rows_of_a_sum)
        expected = 2 * V * H * (N + of_tiles + of_sums)
        print(f"{plan} frozen={frozen} f={f}: {sum(spent) / (N * V * H):.2f} NVH")
        assert sum(spent) == expected
