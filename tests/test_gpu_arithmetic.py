"""Contracts under the arithmetic of a GPU, in Triton's interpreter.

Operations that a GPU approximates are off here by as much as its documentation allows, with either
sign or by chance: exp2 by 2 ulp (ex2.approx), log by 1 ulp, `/` by 2 ulp (div.full). Products of
16-bit matrices are summed as tensor cores do. Sums, other products and `div_rn` round to nearest
on a GPU as well.
"""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from gspo_ops import (
    GRPO,
    GSPO,
    GSPOToken,
    log_probs_from_hidden,
    log_probs_from_logits,
    policy_loss_from_log_probs,
    reference,
)
from gspo_ops.kernels.common import soft_cap
from gspo_ops.testing import (
    ALLOWED,
    BOUNDS,
    grad_errors,
    make_case,
    measure,
    relative,
    synthetic_head,
    synthetic_logits,
    worst,
)
from gspo_ops.testing.bounds import log_prob_from_hidden
from gspo_ops.testing.cases import sample, upstream

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter only"
    ),
]
ULP = 2.0**-23
GROUP, EXTRA_BITS = 16, 2  # of a tensor core's sum


def by_chance(*operands: np.ndarray) -> np.ndarray:
    """Return numbers in [-1, 1) that depend on the operands alone, as a GPU's errors do."""
    mixed = np.zeros((), np.uint32)
    for x in operands:
        mixed = (mixed ^ x.astype(np.float32).view(np.uint32)) * np.uint32(2654435761)
        mixed = mixed ^ (mixed >> np.uint32(15))
    return mixed.astype(np.int32) / 2.0**31


def off(exact: np.ndarray, ulps: float, direction: str, *operands: np.ndarray) -> np.ndarray:
    sign = {"above": 1.0, "below": -1.0}.get(direction)
    if sign is None:
        sign = by_chance(*operands)
    return (exact.astype(np.float64) * (1 + sign * ulps * ULP)).astype(exact.dtype)


def tensor_core_dot(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return a @ b + c of 16-bit numbers in float32, as tensor cores add (arXiv 2512.07004).

    16 products and the accumulator are shifted to the largest exponent among them, truncated 2
    bits below the last one of fp32, and added exactly; the sum is truncated to fp32.
    """
    # rows and columns of padding stay as they are
    rows, columns = a.any(1).nonzero()[:, 0], b.any(0).nonzero()[:, 0]
    out, a, b, acc = c.clone(), a[rows], b[:, columns], c[rows][:, columns]
    of_a, of_b = power(a), power(b)
    for start in range(0, a.shape[1], GROUP):
        group = range(start, min(start + GROUP, a.shape[1]))
        top = power(acc)
        for k in group:
            top = torch.maximum(top, of_a[:, k, None] * of_b[k])
        unit = torch.where(top == 0, 1.0, top) / 2.0 ** (23 + EXTRA_BITS)
        total = torch.zeros_like(acc, dtype=torch.int32)
        for k in group:
            total += (a[:, k, None] * b[k] / unit).int()
        exact = (total + (acc / unit).trunc().double()) * unit
        acc = exact.float()
        acc = torch.where(acc.abs() > exact.abs(), torch.nextafter(acc, torch.zeros(())), acc)
    out[rows[:, None], columns] = acc
    return out


def power(x: torch.Tensor) -> torch.Tensor:
    """Return the power of two at or below abs(x), and 0 for 0."""
    return torch.where(x == 0, 0.0, 2.0 ** (torch.frexp(x)[1] - 1))


@pytest.fixture
def compute_as_gpus(monkeypatch):
    """Provide `compute_as_gpus(direction)`: approximations err "above", "below" or "by chance"."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    exact_dot = InterpreterBuilder.create_dot

    def unary(function, ulps, exact_at, direction):
        @np.errstate(all="ignore")
        def create(self, x):
            exact = function(x.data)
            moved = np.where(x.data == exact_at, exact, off(exact, ulps, direction, x.data))
            return TensorHandle(moved.astype(exact.dtype), x.dtype.scalar)

        return create

    def create_dot(self, a, b, d, *options):
        if a.dtype.scalar.primitive_bitwidth != 16:
            return exact_dot(self, a, b, d, *options)
        operands = (torch.from_numpy(self.cast_impl(x, d.dtype).data) for x in (a, b))
        total = tensor_core_dot(*operands, torch.from_numpy(d.data))
        return TensorHandle(total.numpy(), d.dtype.scalar)

    def matmul_fp32(a, b, *, out=None, add=False):
        zeros = torch.zeros(len(a), b.shape[1])
        is_narrow = a.dtype.itemsize == 2
        total = tensor_core_dot(a.float(), b.float(), zeros) if is_narrow else a @ b
        if out is None:
            return total
        return out.add_(total) if add else out.copy_(total)

    def start(direction):
        @np.errstate(all="ignore")
        def create_fdiv(self, a, b):
            exact = a.data / b.data
            moved = exact if (b.data == 1).all() else off(exact, 2, direction, a.data, b.data)
            return TensorHandle(moved.astype(exact.dtype), a.dtype.scalar)

        methods = {
            "create_exp2": unary(np.exp2, 2, 0, direction),
            "create_exp": unary(np.exp, 2, 0, direction),
            "create_log": unary(np.log, 1, 1, direction),
            "create_fdiv": create_fdiv,
            "create_dot": create_dot,
        }
        for name, method in methods.items():
            monkeypatch.setattr(InterpreterBuilder, name, method)
        monkeypatch.setattr("gspo_ops.tiles_gpu.matmul_fp32", matmul_fp32)

    return start


DIRECTIONS = ("above", "below", "by chance")


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("likely", [True, False], ids=["sampled", "unlikely"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_log_probs(compute_as_gpus, device, direction, likely, temperature, softcap):
    """The contract's bounds hold for abs(logits) / temperature of up to 32."""
    compute_as_gpus(direction)
    logits = synthetic_logits(6, 2, 1000, device=device).flatten(0, 1)
    logits = (logits * (32 * temperature / logits.abs().amax())).clamp(-32, 32)
    random = torch.Generator().manual_seed(0)
    targets = sample(logits / temperature, random) if likely else logits.argmin(-1)
    options = {"temperature": temperature, "softcap": softcap}
    g, h = upstream(targets, 1), upstream(targets, 2)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    log_probs, entropy = log_probs_from_logits(ours, targets, return_entropy=True, **options)
    (log_probs * g + entropy * h).sum().backward()
    log_probs64 = reference.log_probs_from_logits(exact, targets, **options)
    entropy64 = reference.entropy_from_logits(exact, targets, **options)
    (log_probs64 * g + entropy64 * h).sum().backward()
    # the contract's bound, or the rounding of a difference of logits and of the result where these
    # are so large that it exceeds the bound
    steps = torch.from_numpy(np.spacing(log_probs64.detach().abs().float().cpu().numpy()))
    allowed = (2 * steps).to(device).clamp(min=BOUNDS["log_prob"])
    assert ((log_probs - log_probs64).abs() <= allowed).all()
    assert worst(entropy - entropy64) <= BOUNDS["entropy"]
    for name, error in grad_errors(ours.grad, exact.grad, targets).items():
        assert error <= BOUNDS[name], name


@triton.jit
def soft_cap_kernel(x_ptr, capped_ptr, derivative_ptr, cap, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    capped, derivative = soft_cap(tl.load(x_ptr + at), cap)
    tl.store(capped_ptr + at, capped)
    tl.store(derivative_ptr + at, derivative)


@pytest.mark.parametrize("cap", [15.0, 30.0, 50.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_soft_cap(compute_as_gpus, direction, cap):
    compute_as_gpus(direction)
    x = cap * torch.linspace(-8, 8, 1 << 17)
    x[:2] = torch.tensor([-torch.inf, torch.inf])
    capped, derivative = torch.empty_like(x), torch.empty_like(x)
    soft_cap_kernel[(1,)](x, capped, derivative, cap, len(x))
    u = x.double() / cap
    assert worst(capped - cap * u.tanh()) <= 1.8e-7 * cap
    assert worst((derivative * u.cosh() ** 2 - 1)[2:]) <= 2e-6
    assert derivative[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("direction", "dtype", "objective", "packed"),
    [
        ("above", torch.float32, GSPOToken(), False),
        ("below", torch.bfloat16, GSPO(), True),
        ("by chance", torch.float32, GSPO(), False),
        ("by chance", torch.bfloat16, GRPO(), True),
    ],
)
def test_contracts_from_logits(compute_as_gpus, device, direction, dtype, objective, packed):
    """Log-probs, ratios, gradients and clip decisions meet the contract; on-policy ratios are 1."""
    compute_as_gpus(direction)
    logits = synthetic_logits(9, 5, 1000, device=device).to(dtype)
    measured = list(measure(make_case(logits, objective, packed=packed)))
    assert not [m for m in measured if not m.ok]


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl(compute_as_gpus, device, direction, kl_estimator):
    compute_as_gpus(direction)
    objective = GRPO(kl_coef=0.1, kl_estimator=kl_estimator)
    case = make_case(synthetic_logits(9, 8, 100, device=device), objective, packed=False)
    log_probs = reference.log_probs_from_logits(case.double().logits, case.targets).float()
    ref_log_probs = log_probs + upstream(log_probs, 6)
    losses, leaves = [], []
    for op, dtype in (
        (policy_loss_from_log_probs, torch.float32),
        (reference.policy_loss_from_log_probs, torch.float64),
    ):
        leaves.append(log_probs.detach().to(dtype).requires_grad_())
        loss, _ = op(
            leaves[-1], case.old_log_probs.to(dtype), case.advantages.to(dtype),
            ref_log_probs=ref_log_probs.to(dtype), mask=case.mask, objective=objective,
        )  # fmt: skip
        loss.backward()
        losses.append(loss)
    assert worst(losses[0] - losses[1]) <= BOUNDS["loss"]
    assert relative(leaves[0].grad, leaves[1].grad) <= BOUNDS["grad of log_probs, rel L2"]


def head_and_targets(H, device, tokens=48, V=512):
    head = synthetic_head(1, tokens, H, V, device=device)
    head = head._replace(hidden=head.hidden[0], bias=None).to(torch.bfloat16)
    return head, sample(head.logits(), torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("H", "products"), [(64, "triton"), (896, "triton"), (896, "mm"), (4096, "triton")]
)
def test_from_hidden(compute_as_gpus, device, H, products):
    """Truncated sums shift all logits of a row, so that its target's has to shift with them."""
    compute_as_gpus("by chance")
    head, targets = head_and_targets(H, device)
    g = upstream(targets, 1)

    def through(leaves, log_probs_of):
        leaves = leaves.map(lambda x: x.clone().requires_grad_())
        log_probs = log_probs_of(leaves)
        (log_probs * g).sum().backward()
        return log_probs.detach(), (leaves.hidden.grad, leaves.weight.grad)

    def of_op(leaves):
        return log_probs_from_hidden(leaves.hidden, leaves.weight, targets, products=products)

    def of_logits(leaves):
        logits = leaves.logits(leaves.hidden.dtype)
        return reference.log_probs_from_logits(logits, targets)

    log_probs, grads = through(head, of_op)
    exact, exact_grads = through(head.to(torch.float64), of_logits)
    _, eager_grads = through(head.to(torch.float32), of_logits)
    error = log_probs - exact
    assert worst(error) <= log_prob_from_hidden(H)
    for ours, eager, of in zip(grads, eager_grads, exact_grads, strict=True):
        assert relative(ours, of) <= ALLOWED * relative(eager.to(ours.dtype), of)
    assert worst(error.mean()) <= 1e-6


def test_ratios_from_hidden(compute_as_gpus, device):
    """Ratios are accurate, as the errors of an op's old and new log-probs nearly cancel."""
    compute_as_gpus("by chance")
    head, targets = head_and_targets(4096, device)
    moved = head.hidden + 3e-3 * upstream(head.hidden, 2)
    heads = [head, head._replace(hidden=moved.bfloat16())]
    old, new = (
        log_probs_from_hidden(x.hidden, x.weight, targets, products="triton").double()
        for x in heads
    )
    old64, new64 = (reference.log_probs_from_logits(x.logits(), targets) for x in heads)
    # of two sequences
    ratios, exact = ((x.view(2, -1).mean(1)).exp() for x in (new - old, new64 - old64))
    assert worst(exact - 1) > 1e-4
    assert worst(ratios - exact) <= BOUNDS["ratio"]
