"""Torch's contracts for operators: derivatives, compile, fakes, determinism, autocast, DDP."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import gspo_ops
from gspo_ops import autograd, backend, chunks, hidden, logits, operators, testing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiled_only = pytest.mark.skipif(
    INTERPRETED, reason="tests torch's machinery, which is the same for every implementation"
)
B, T, V, H = 3, 3, 11, 6


class Batch(NamedTuple):
    """The padded batch of tensors with which everything below is called."""

    logits: Tensor
    targets: Tensor
    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    hidden: Tensor
    weight: Tensor


def make_batch(dtype=torch.float32, device="cpu", T=T) -> Batch:
    """Make a sequence inside the clip range, one clipped, and one outside on the unclipped side."""
    generator = torch.Generator().manual_seed(T)
    hidden = torch.randn(B, T, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    logits = (hidden.double() @ weight.double().T).to(dtype)
    targets = torch.randint(0, V, (B, T), generator=generator)
    logits, targets = logits.to(device), targets.to(device)
    result = gspo_ops.log_probs_from_logits(logits, targets, **SOFTMAX)
    old = result - torch.tensor([[1e-4], [1e-2], [2e-2]], device=device)
    advantages = torch.tensor([0.7, 1.3, -0.9], device=device)
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    mask[0, -1] = mask[2, 1] = False
    return Batch(
        logits, targets, result, old.to(result.dtype), advantages, mask,
        hidden.to(device), weight.to(device),
    )  # fmt: skip


SOFTMAX = {"temperature": 1.3, "softcap": 8.0}
EVERY_TERM = gspo_ops.Objective(
    ratio_level="sequence_shared", clip_low=3e-4, clip_high=4e-4, dual_clip=1.01, kl_coef=0.1,
    kl_weight="ratio", kl_input_clamp=5.0, entropy_coef=0.01,
)  # fmt: skip


def packed(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def cu_seqlens(x: Batch) -> Tensor:
    N = x.mask.numel()
    return torch.tensor([0, 2, 2, N], dtype=torch.int32, device=x.mask.device)


def from_log_probs(x: Batch) -> tuple[Tensor, ...]:
    result = gspo_ops.policy_loss_from_log_probs(
        x.log_probs, x.old_log_probs, x.advantages, mask=x.mask
    )
    return result.loss, *result.stats.values()


def from_log_probs_packed(x: Batch) -> tuple[Tensor, ...]:
    result = gspo_ops.policy_loss_from_log_probs(
        packed(x.log_probs), packed(x.old_log_probs), x.advantages, cu_seqlens=cu_seqlens(x),
        objective=gspo_ops.GRPO(kl_coef=0.1), ref_log_probs=packed(x.old_log_probs) - 0.1,
    )  # fmt: skip
    return result.loss, *result.stats.values()


def from_log_probs_on_policy(x: Batch) -> tuple[Tensor, ...]:
    result = gspo_ops.policy_loss_from_log_probs(x.log_probs, None, x.advantages, mask=x.mask)
    return result.loss, *result.stats.values()


def from_logits(x: Batch) -> tuple[Tensor, ...]:
    result = gspo_ops.policy_loss_from_logits(
        x.logits, x.targets, x.old_log_probs, x.advantages, mask=x.mask, **SOFTMAX
    )
    return result.loss, *result.stats.values()


def from_logits_packed(x: Batch) -> tuple[Tensor, ...]:
    result = gspo_ops.policy_loss_from_logits(
        packed(x.logits), packed(x.targets), packed(x.old_log_probs), x.advantages,
        mask=packed(x.mask), cu_seqlens=cu_seqlens(x), return_entropy=True,
        denominator=torch.tensor(5.0, device=x.logits.device), **SOFTMAX,
    )  # fmt: skip
    return result.loss, *result.stats.values()


def from_logits_on_policy(x: Batch) -> tuple[Tensor, ...]:
    result = gspo_ops.policy_loss_from_logits(
        x.logits, x.targets, None, x.advantages, mask=x.mask, **SOFTMAX
    )
    return result.loss, *result.stats.values()


def token_loss(log_probs, old_log_probs, advantages, sequence_ids):
    return -torch.exp(log_probs - old_log_probs) * advantages


def clipped_token_loss(log_probs, old_log_probs, advantages, sequence_ids, *, mask, lengths):
    log_ratio = log_probs - old_log_probs
    clipped = mask & (log_ratio.abs() > 1e-3) & (lengths[sequence_ids] > 1)
    return torch.where(clipped, 0.0, -log_ratio.exp() * advantages), clipped


def everything_of_a_function(x: Batch, **options) -> tuple[Tensor, ...]:
    result = gspo_ops.policy_loss_from_logits(
        x.logits, x.targets, x.old_log_probs, x.advantages, mask=x.mask,
        objective=clipped_token_loss, return_entropy=True, **options,
    )  # fmt: skip
    return result.loss, *result.stats.values()


def with_every_term(x: Batch) -> tuple[Tensor, ...]:
    """Compute an objective with a shared ratio, a weighted KL term and an entropy bonus."""
    result = gspo_ops.policy_loss_from_logits(
        x.logits, x.targets, x.old_log_probs, x.advantages, mask=x.mask, objective=EVERY_TERM,
        ref_log_probs=x.old_log_probs - 0.1, **SOFTMAX,
    )  # fmt: skip
    return result.loss, *result.stats.values()


def with_every_term_from_hidden(x: Batch) -> tuple[Tensor, ...]:
    return from_hidden(x, plan="auto", objective=EVERY_TERM, ref_log_probs=x.old_log_probs - 0.1)


def own_objective(x: Batch) -> tuple[Tensor, ...]:
    result = gspo_ops.policy_loss_from_logits(
        x.logits, x.targets, x.old_log_probs, x.advantages, mask=x.mask, objective=token_loss
    )
    return result.loss, *result.stats.values()


def log_probs_only(x: Batch) -> tuple[Tensor, ...]:
    return (gspo_ops.log_probs_from_logits(x.logits, x.targets, **SOFTMAX),)


def log_probs_and_entropy(x: Batch) -> tuple[Tensor, ...]:
    targets = x.targets.masked_fill(~x.mask, -100)
    return gspo_ops.log_probs_from_logits(x.logits, targets, return_entropy=True, **SOFTMAX)


def from_hidden(x: Batch, **options) -> tuple[Tensor, ...]:
    result = gspo_ops.policy_loss_from_hidden(
        x.hidden, x.weight, x.targets, x.old_log_probs, x.advantages, mask=x.mask,
        **{**SOFTMAX, "plan": "keep", **options},
    )  # fmt: skip
    return result.loss, *result.stats.values()


def from_hidden_recomputed(x: Batch) -> tuple[Tensor, ...]:
    return from_hidden(x, plan="recompute", return_entropy=True)


def from_hidden_in_chunks(x: Batch) -> tuple[Tensor, ...]:
    return from_hidden(x, plan="chunk", memory_budget=0)


def from_hidden_packed(x: Batch) -> tuple[Tensor, ...]:
    result = gspo_ops.policy_loss_from_hidden(
        packed(x.hidden), x.weight, packed(x.targets), packed(x.old_log_probs), x.advantages,
        mask=packed(x.mask), cu_seqlens=cu_seqlens(x), return_entropy=True,
        denominator=torch.tensor(5.0, device=x.hidden.device), **SOFTMAX,
    )  # fmt: skip
    return result.loss, *result.stats.values()


def from_hidden_on_policy(x: Batch) -> tuple[Tensor, ...]:
    on_policy = Batch(
        x.logits, x.targets, x.log_probs, None, x.advantages, x.mask, x.hidden, x.weight
    )
    return from_hidden(on_policy)


def own_objective_from_hidden(x: Batch) -> tuple[Tensor, ...]:
    return from_hidden(x, objective=token_loss)


def hidden_log_probs(x: Batch) -> tuple[Tensor, ...]:
    return (gspo_ops.log_probs_from_hidden(x.hidden, x.weight, x.targets, **SOFTMAX),)


def hidden_log_probs_and_entropy(x: Batch) -> tuple[Tensor, ...]:
    targets = x.targets.masked_fill(~x.mask, -100)
    return gspo_ops.log_probs_from_hidden(
        x.hidden, x.weight, targets, return_entropy=True, **SOFTMAX
    )


def batch_results(x: Batch) -> tuple[Tensor, ...]:
    """Return what is computed from a batch before its loss."""
    token_mean = gspo_ops.GRPO(aggregation="token-mean")
    return (
        gspo_ops.group_advantages(x.targets.flatten(), T),
        gspo_ops.group_advantages(x.advantages, group_ids=x.targets[0]),
        gspo_ops.global_denominator([{"mask": x.mask}]),
        gspo_ops.global_denominator([{"cu_seqlens": cu_seqlens(x)}], objective=token_mean),
    )


def reference_results(x: Batch) -> tuple[Tensor, ...]:
    loss, stats = gspo_ops.reference.policy_loss_from_hidden(
        x.hidden, x.weight, x.targets, x.old_log_probs, x.advantages, mask=x.mask,
        objective=gspo_ops.GSPO(kl_coef=0.1), ref_log_probs=x.old_log_probs - 0.1,
        rollout_weights=x.advantages.abs(), return_entropy=True, **SOFTMAX,
    )  # fmt: skip
    return loss, *stats.values()


class Case(NamedTuple):
    call: Callable[[Batch], tuple[Tensor, ...]]
    leaf: str  # the field of Batch that is differentiated
    differentiable: int = 1  # how many of the results are

    def __repr__(self) -> str:
        return self.call.__name__ + ("_by_weight" if self.leaf == "weight" else "")

    def with_leaf(self, x: Batch, leaf: Tensor) -> Batch:
        return x._replace(**{self.leaf: leaf})

    def outputs(self, x: Batch, leaf: Tensor) -> tuple[Tensor, ...]:
        return self.call(self.with_leaf(x, leaf))

    def results(self, x: Batch) -> tuple[Tensor, ...]:
        """Return outputs and the gradient of their weighted sum."""
        leaf = getattr(x, self.leaf).detach().clone().requires_grad_()
        outputs = self.outputs(x, leaf)
        return (*(y.detach() for y in outputs), *torch.autograd.grad(self.total(outputs), leaf))

    def total(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """Return a scalar with a different derivative with respect to each output element."""
        total = outputs[0].new_zeros(())
        for y in outputs[: self.differentiable]:
            weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device)
            total = total + (y * weights.view(y.shape)).sum()
        return total


CASES = [
    Case(log_probs_only, "logits"),
    Case(log_probs_and_entropy, "logits", differentiable=2),
    Case(from_log_probs, "log_probs"),
    Case(from_log_probs_packed, "log_probs"),
    Case(from_log_probs_on_policy, "log_probs"),
    Case(from_logits, "logits"),
    Case(from_logits_packed, "logits"),
    Case(from_logits_on_policy, "logits"),
    Case(hidden_log_probs, "hidden"),
    Case(hidden_log_probs, "weight"),
    Case(hidden_log_probs_and_entropy, "hidden", differentiable=2),
    Case(hidden_log_probs_and_entropy, "weight", differentiable=2),
    Case(from_hidden, "hidden"),
    Case(from_hidden, "weight"),
    Case(from_hidden_recomputed, "weight"),
    Case(from_hidden_in_chunks, "hidden"),
    Case(from_hidden_in_chunks, "weight"),
    Case(from_hidden_packed, "hidden"),
    Case(from_hidden_on_policy, "hidden"),
    Case(with_every_term, "logits"),
    Case(with_every_term_from_hidden, "weight"),
]
all_cases = pytest.mark.parametrize("case", CASES, ids=repr)
WITH_OWN_OBJECTIVE = [
    *CASES,
    Case(own_objective, "logits"),
    Case(own_objective_from_hidden, "weight"),
]
with_own_objective = pytest.mark.parametrize("case", WITH_OWN_OBJECTIVE, ids=repr)


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=False)


# Derivatives


@compiled_only
@pytest.mark.parametrize("case", [c for c in CASES if "on_policy" not in repr(c)], ids=repr)
def test_gradcheck(case):
    x = make_batch(torch.float64)
    leaf = getattr(x, case.leaf).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda leaf: case.outputs(x, leaf)[: case.differentiable],
        (leaf,),
        check_undefined_grad=True,
    )


@compiled_only
@pytest.mark.parametrize("case", [c for c in CASES if "on_policy" in repr(c)], ids=repr)
def test_on_policy_gradient_is_that_at_ratio_one(case):
    """Gradients are those with a copy as old log-probs; gradcheck would see a constant value."""
    x = make_batch(torch.float64)
    off_policy = {
        from_log_probs_on_policy: from_log_probs,
        from_logits_on_policy: from_logits,
        from_hidden_on_policy: from_hidden,
    }
    twin = case._replace(call=off_policy[case.call])
    leaf = getattr(x, case.leaf).detach().requires_grad_()
    same_old = x._replace(old_log_probs=x.log_probs.clone())
    assert torch.autograd.gradcheck(lambda leaf: twin.outputs(same_old, leaf)[0], (leaf,))
    actual, expected = case.results(x), twin.results(same_old)
    torch.testing.assert_close(actual[-1], expected[-1], rtol=1e-12, atol=0)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-14, atol=0)


@with_own_objective
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "squared"])
def test_double_backward_raises(case, weighted, device):
    """Double backward raises, also where a gradient penalty would otherwise be dropped silently."""
    x = make_batch(device=device)
    leaf = getattr(x, case.leaf).detach().requires_grad_()
    total = case.total(case.outputs(x, leaf))
    total = total.square() if weighted else total
    (grad,) = torch.autograd.grad(total, leaf, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(grad.square().sum(), leaf, allow_unused=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        (total + grad.square().sum()).backward()


@with_own_objective
def test_forward_mode_raises(case, device):
    x = make_batch(device=device)
    leaf = getattr(x, case.leaf).detach()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        case.outputs(x, forward_ad.make_dual(leaf, torch.ones_like(leaf)))


@pytest.mark.kernels
@with_own_objective
def test_backward_twice_gives_the_same_bits(case, device):
    x = make_batch(device=device)
    leaf = getattr(x, case.leaf).detach().requires_grad_()
    total = case.total(case.outputs(x, leaf))
    first = torch.autograd.grad(total, leaf, retain_graph=True)
    assert first[0].count_nonzero() > 0
    assert_same_bits(torch.autograd.grad(total, leaf), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, leaf)


@pytest.mark.kernels
@with_own_objective
def test_repeated_runs_give_the_same_bits(case, device):
    x = make_batch(device=device)
    first = case.results(x)
    for _ in range(1 if INTERPRETED else 3):
        assert_same_bits(case.results(x), first)


@pytest.mark.kernels
@with_own_objective
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16] if INTERPRETED else [torch.bfloat16, torch.float32]
)
def test_inputs_stay_as_they_are(case, dtype, device):
    x = make_batch(dtype, device)
    leaf = getattr(x, case.leaf).detach().requires_grad_()
    x = case.with_leaf(x, leaf)
    before = [t.detach().clone() for t in x]
    versions = [t._version for t in x]
    case.total(case.call(x)).backward()
    assert [t._version for t in x] == versions
    assert_same_bits(tuple(t.detach() for t in x), tuple(before))


# No gradient that nobody asked for


@pytest.fixture
def backward_calls(monkeypatch):
    """Provide a list of the names of the backward operators that have run."""
    calls = []

    def record(module, name):
        op = getattr(module, name)

        def call(*args):
            calls.append(name)
            return op(*args)

        monkeypatch.setattr(module, name, call)

    record(logits, "logits_bwd")
    record(autograd, "policy_loss_bwd")
    record(hidden, "hidden_bwd")
    record(chunks, "_scaled")
    return calls


@with_own_objective
def test_frozen_inputs_cost_no_gradient(case, backward_calls, device):
    x = make_batch(device=device)
    other = torch.ones((), device=device, requires_grad=True)
    outputs = case.call(x)
    assert not any(y.requires_grad for y in outputs)
    (case.total(outputs) * other).backward()
    assert backward_calls == []
    assert other.grad is not None
    assert x.logits.grad is None

    leaf = getattr(x, case.leaf).detach().requires_grad_()
    with torch.no_grad():
        outputs = case.outputs(x, leaf)
    assert not any(y.requires_grad for y in outputs)
    assert_same_bits(outputs, case.call(x))
    with torch.inference_mode():
        assert_same_bits(case.call(x), outputs)

    assert case.total(case.outputs(x, leaf)).requires_grad
    assert backward_calls == []
    case.total(case.outputs(x, leaf)).backward()
    assert len(backward_calls) == 1


@with_own_objective
def test_stats_are_detached(case, device):
    x = make_batch(device=device)
    outputs = case.outputs(x, getattr(x, case.leaf).detach().requires_grad_())
    flags = [y.requires_grad for y in outputs]
    assert flags == [i < case.differentiable for i in range(len(outputs))]


# Operators


class Calls(TorchDispatchMode):
    """A record of the arguments of our operators, by name."""

    def __init__(self):
        super().__init__()
        self.of: dict[str, list[tuple]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gspo_ops":
            self.of.setdefault(func._opname, []).append(args)
        return func(*args, **(kwargs or {}))


def operator_calls() -> dict[str, list[tuple]]:
    """Return the arguments with which the public functions call each operator."""
    with Calls() as calls:
        for case in CASES:
            case.results(make_batch())
        for plan in ("keep", "chunk"):
            everything_from_hidden(make_batch(), plan)
        x, ranks = make_batch(), torch.distributed.group.WORLD
        gspo_ops.log_probs_from_logits(x.logits, x.targets, vocab_group=ranks)
        from_hidden(x, vocab_group=ranks, context_group=ranks)
        everything_of_a_function(x, context_group=ranks)
    return calls.of


def everything_from_hidden(x: Batch, plan: str) -> list[Tensor]:
    """Return the gradients of hidden states, of main_grad and bias, and of a LoRA update."""
    hidden, weight = (t.detach().requires_grad_() for t in (x.hidden, x.weight))
    bias = torch.zeros(V, requires_grad=True)
    main_grad = torch.zeros(V, H)
    from_hidden(
        x._replace(hidden=hidden, weight=weight), plan=plan, bias=bias, main_grad=main_grad
    )[0].backward()
    assert weight.grad is None
    a, b = (torch.full(shape, 0.1, requires_grad=True) for shape in ((2, H), (V, 2)))
    lora = gspo_ops.LoRA(a, b, 0.5)
    from_hidden(x._replace(hidden=hidden), plan=plan, lora=lora)[0].backward(retain_graph=True)
    return [hidden.grad, main_grad, bias.grad, a.grad, b.grad]


def opcheck_utilities(name: str, args: tuple) -> str | tuple[str, ...]:
    """Return all utilities, or fewer where the padding of exponentials may hold anything."""
    if name == "hidden_fwd" and args[-1] > 0:  # kept_columns
        return ("test_schema", "test_autograd_registration", "test_faketensor")
    return "ALL"


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@compiled_only
def test_opcheck(one_rank):
    calls = operator_calls()
    checked = set()
    for name, all_args in calls.items():
        packet = getattr(torch.ops.gspo_ops, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            checked.add(op.name())
            if overload == "variable":
                args = tuple(
                    operators.scalar(a) if isinstance(a, float) else a for a in all_args[0]
                )
                torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
                continue
            for args in all_args:
                detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
                torch.library.opcheck(op, detached, test_utils=opcheck_utilities(name, args))
            # an input that requires grad: the registered derivative raises an error
            torch.library.opcheck(op, all_args[0], test_utils=("test_schema", "test_faketensor"))
    ours = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("gspo_ops::")}
    assert checked == ours


@compiled_only
@with_own_objective
def test_fake_tensors_have_the_real_shapes_and_dtypes(case):
    for dtype in (torch.bfloat16, torch.float64):
        x = make_batch(dtype)
        real = case.results(x)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = case.results(Batch(*(mode.from_tensor(t) for t in x)))
        for r, f in zip(real, fake, strict=True):
            assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


# torch.compile


def check_compiled(case: Case, name: str, **options) -> None:
    """Check for the bits of eager mode, and for one compilation for all lengths."""
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend=name, **options)
    for length in (5, 7, 9):
        x = make_batch(T=length)
        if not options:
            for tensor in (x.logits, x.targets, x.log_probs, x.old_log_probs, x.mask, x.hidden):
                torch._dynamo.mark_dynamic(tensor, 1)
        leaf = getattr(x, case.leaf).requires_grad_()
        with torch.compiler.set_stance("default" if length == 5 else "fail_on_recompile"):
            outputs = compiled(x)
        grads = torch.autograd.grad(case.total(outputs), leaf)
        assert_same_bits((*(y.detach() for y in outputs), *grads), case.results(x))


@compiled_only
@with_own_objective
def test_compile(case):
    check_compiled(case, "aot_eager", dynamic=True)


@compiled_only
@pytest.mark.parametrize(
    "case",
    [Case(log_probs_only, "logits"), Case(from_logits, "logits"), Case(from_hidden, "hidden")],
    ids=repr,
)
def test_compile_with_marked_dimension(case):
    check_compiled(case, "aot_eager")


@compiled_only
@pytest.mark.parametrize(
    "case",
    [Case(from_logits, "logits"), Case(from_hidden, "weight"),
     Case(from_hidden_in_chunks, "hidden")],
    ids=repr,
)  # fmt: skip
def test_compile_inductor(case):
    check_compiled(case, "inductor", dynamic=True)


def with_every_plan(x: Batch) -> list[Tensor]:
    """Return log-probs and losses, padded and packed, each from its own hidden and weight."""
    operands = zip(x.hidden.unbind(), x.weight.unbind(), strict=True)
    results = [
        gspo_ops.log_probs_from_hidden(*next(operands), x.targets, plan=plan)
        for plan in ("auto", "keep", "recompute")
    ]
    for plan in ("auto", "recompute"):
        results.append(
            gspo_ops.policy_loss_from_hidden(
                *next(operands), x.targets, x.old_log_probs, x.advantages, mask=x.mask, plan=plan
            ).loss
        )
    for plan in ("keep", "chunk"):
        hidden, weight = next(operands)
        results.append(
            gspo_ops.policy_loss_from_hidden(
                packed(hidden), weight, packed(x.targets), packed(x.old_log_probs), x.advantages,
                mask=packed(x.mask), cu_seqlens=cu_seqlens(x), plan=plan,
            ).loss
        )  # fmt: skip
    return results


BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64


@compiled_only
@pytest.mark.parametrize(
    ("hidden", "weight", "has_bf16"),
    [(BF16, BF16, False), (BF16, BF16, True), (FP16, FP64, False)],
)
def test_compile_dtypes(hidden, weight, has_bf16, monkeypatch):
    """Compiled code has eager's bits on a CPU with and without instructions for bfloat16."""
    monkeypatch.setattr(backend, "CPU_HAS_BF16", has_bf16)
    torch._dynamo.reset()
    x = make_batch()
    found = []
    for call in (
        with_every_plan, torch.compile(with_every_plan, fullgraph=True, backend="aot_eager")
    ):  # fmt: skip
        leaves = [
            t.to(dtype).repeat(7, *(1 for _ in t.shape)).requires_grad_()
            for t, dtype in ((x.hidden, hidden), (x.weight, weight))
        ]
        results = call(x._replace(hidden=leaves[0], weight=leaves[1]))
        total = torch.stack([y.double().sum() for y in results]).sum()
        found.append((*(y.detach() for y in results), *torch.autograd.grad(total, leaves)))
    assert_same_bits(*found)


def loss_with_numbers(x: Batch, lora: gspo_ops.LoRA, **options) -> tuple[Tensor, ...]:
    return from_hidden(x, lora=lora, ref_log_probs=x.old_log_probs, **options)


def losses_with_numbers(x: Batch, clip_low: float, temperature: float, denominator: float):
    """Compute losses with an objective made inside, with a warning that can't be traced."""
    objective = gspo_ops.Objective(
        ratio_level="sequence", clip_low=clip_low, clip_high=0.1, aggregation="token-mean"
    )
    of_logits = gspo_ops.policy_loss_from_logits(
        x.logits, x.targets, x.old_log_probs, x.advantages, mask=x.mask, objective=objective,
        temperature=temperature, denominator=denominator,
    )  # fmt: skip
    log_probs = gspo_ops.log_probs_from_logits(x.logits, x.targets, temperature=temperature)
    return of_logits.loss, log_probs, *of_logits.stats.values()


@compiled_only
@pytest.mark.skipif(
    not hasattr(symbolic_shapes, "has_static_value"),
    reason="needs torch 2.8 or newer, which distinguishes variables from constants",
)
@pytest.mark.filterwarnings("ignore:aggregation")
def test_numbers_that_change_are_compiled_once_more():
    """The first value is taken for a constant, and the second makes it a variable."""
    x = make_batch()
    a, b = torch.full((2, H), 0.1), torch.full((V, 2), 0.1)

    def numbers_from_hidden(i: int) -> dict:
        return {
            "lora": gspo_ops.LoRA(a, b, 0.5 + i), "temperature": 1.0 + i / 8, "softcap": 8.0 + i,
            "objective": gspo_ops.GRPO(
                clip_low=0.01 * i, clip_high=0.02 * (1 + i), kl_coef=0.1 * (1 + i)
            ),
            "denominator": 2.5 + i, "memory_budget": 1000 * i, "plan": "auto",
        }  # fmt: skip

    def numbers_from_logits(i: int) -> dict:
        return {"clip_low": 0.01 * i, "temperature": 2 + i, "denominator": 3 + i}

    for call, leaf, differentiable, numbers in (
        (loss_with_numbers, "hidden", 1, numbers_from_hidden),
        (losses_with_numbers, "logits", 2, numbers_from_logits),
    ):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, fullgraph=True, backend=counter)
        for i in range(12):
            case = Case(partial(call, **numbers(i)), leaf, differentiable)
            expected = case.results(x)
            assert_same_bits(
                case._replace(call=partial(compiled, **numbers(i))).results(x), expected
            )
        assert counter.frame_count == 2


# Programs of torch.export and make_fx


def everything(x: Batch, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """Return the results of every public op."""
    layout = {"mask": x.mask, "cu_seqlens": cu_seqlens}
    policy = x.old_log_probs, x.advantages
    results = [
        gspo_ops.policy_loss_from_log_probs(x.log_probs, *policy, **layout).loss,
        *gspo_ops.log_probs_from_logits(x.logits, x.targets, return_entropy=True),
        *(
            gspo_ops.policy_loss_from_logits(
                x.logits, x.targets, *policy, objective=objective, **layout
            ).loss
            for objective in (gspo_ops.GSPO(), token_loss)
        ),
        *(
            gspo_ops.log_probs_from_hidden(x.hidden, x.weight, x.targets, plan=plan)
            for plan in ("auto", "recompute")
        ),
        *(
            gspo_ops.policy_loss_from_hidden(
                x.hidden, x.weight, x.targets, *policy, plan=plan, **layout
            ).loss
            for plan in ("auto", "chunk", "recompute")
        ),
    ]
    return tuple(results)


def everything_with_gradients(x: Batch, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    names = ("log_probs", "logits", "hidden", "weight")
    leaves = {name: getattr(x, name).detach().requires_grad_() for name in names}
    results = everything(x._replace(**leaves), cu_seqlens)
    total = torch.stack([y.sum() for y in results]).sum()
    return (*results, *torch.autograd.grad(total, [*leaves.values()]))


class Everything(nn.Module):
    def forward(self, x: Batch, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
        return everything(x, cu_seqlens)


def of_size(batch: int, T: int, is_packed: bool) -> tuple[Batch, Tensor | None]:
    x = make_batch(T=batch * T // B)
    shape = (batch * T,) if is_packed else (batch, T)
    per_row = {
        name: t.reshape(*shape, *t.shape[2:])
        for name, t in x._asdict().items()
        if t.shape[:2] == x.mask.shape
    }
    ends = torch.tensor([0, *range(1, batch * T - 1, T)[1:], batch * T]) if is_packed else None
    return x._replace(**per_row, advantages=torch.linspace(-1, 1, batch)), ends


@compiled_only
@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
def test_traced_programs_are_right_at_other_sizes(is_packed):
    """Programs of all public ops run at other B and T, or B and N; make_fx includes gradients."""
    arguments, others = of_size(3, 4, is_packed), of_size(6, 5, is_packed)
    program = make_fx(everything_with_gradients, tracing_mode="symbolic")(*arguments)
    assert_same_bits(program(*others), everything_with_gradients(*others))

    def sizes(t: Tensor | None) -> dict | None:
        """Return the dimensions that may change."""
        if t is None:
            return None
        return {i: Dim.DYNAMIC for i in range(t.ndim) if t.shape[i] not in (V, H)}

    x, ends = arguments
    dynamic_shapes = Batch(*map(sizes, x)), sizes(ends)
    exported = export(Everything(), arguments, dynamic_shapes=dynamic_shapes)
    assert_same_bits(exported.module()(*others), everything(*others))


# Determinism


@pytest.fixture
def nan_filled_empties():
    """Fill every empty() with NaN (or the largest integer) before it is written."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.kernels
@with_own_objective
@pytest.mark.parametrize(
    "dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.float32, torch.float64]
)
def test_every_output_is_written(case, dtype, device, nan_filled_empties):
    assert torch.empty(3, device=device).isnan().all()
    x = make_batch(dtype, device)
    for result in case.results(x):
        assert result.isfinite().all()
    x = x._replace(mask=torch.zeros_like(x.mask))
    for result in case.results(x):
        assert result.isfinite().all()


@pytest.mark.kernels
@pytest.mark.parametrize("cu", [[1, 6], [0, 5], [2, 4], [0, 0, 0], [3, 1]])
def test_rows_of_no_sequence_do_not_train(cu, device):
    """Kernels give such rows NaN as gradient; the CPU path refuses these cu_seqlens."""
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("refused on CPU")
    log_probs = torch.randn(6, device=device, requires_grad=True)
    batch = len(cu) - 1
    result = gspo_ops.policy_loss_from_log_probs(
        log_probs, None, torch.ones(batch, device=device),
        cu_seqlens=torch.tensor(cu, device=device),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(result.loss, log_probs)
    claimed = torch.zeros(6, dtype=torch.bool)
    for first, last in pairwise(cu):
        claimed[first:last] = True
    assert torch.equal(grad.isnan().cpu(), ~claimed)


# Precision regimes


@pytest.mark.kernels
@with_own_objective
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16] if INTERPRETED else [torch.bfloat16, torch.float32]
)
def test_autocast_changes_nothing(case, dtype, device):
    x = make_batch(dtype, device)
    expected = case.results(x)
    with torch.autocast(device.type, torch.bfloat16):
        assert_same_bits(case.results(x), expected)


@pytest.mark.kernels
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float64],
    ids=str,
)
def test_defaults_of_the_process_change_nothing(dtype, device):
    """Neither default dtype nor default device has an effect; tensors on `meta` can't be used."""
    x = make_batch(device=device)
    calls = [case.results for case in WITH_OWN_OBJECTIVE] + [batch_results, reference_results]
    expected = [call(x) for call in calls]
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            actual = [call(x) for call in calls]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


@pytest.mark.kernels
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.leaf == "logits" and c.call is not log_probs_and_entropy],
    ids=repr,
)
def test_loss_scale_is_applied_before_the_downcast(case, device):
    """Over 20% of the fp16 gradient would vanish if it were rounded before the scale."""
    scale, tiny = 65536.0, 1e-6
    x = make_batch(torch.float16, device)
    leaf = x.logits.clone().requires_grad_()
    (case.total(case.outputs(x, leaf)) * tiny * scale).backward()
    exact_x = Batch(*(t.double() if t.is_floating_point() else t for t in x))
    exact_leaf = exact_x.logits.requires_grad_()
    (case.total(case.outputs(exact_x, exact_leaf)) * tiny).backward()
    lost = (exact_leaf.grad != 0) & (exact_leaf.grad.abs() < 2**-25)
    assert lost.double().mean() > 0.2
    torch.testing.assert_close(
        leaf.grad.double(), exact_leaf.grad * scale, rtol=2**-10, atol=2**-24
    )


# Offsets beyond int32


def far_rows() -> None:
    """Check rows that are 2**30 elements apart in a buffer that is hardly touched."""
    if INTERPRETED:
        testing.patch_interpreter()
    V, stride = 5, 2**30
    buffer = torch.empty(2 * stride + V, dtype=torch.bfloat16)
    far = buffer.as_strided((3, V), (stride, 1))
    near = torch.randn(3, V, generator=torch.Generator().manual_seed(0)).bfloat16()
    far.copy_(near)
    for targets, call in (
        (torch.tensor([0, 4, 2]), gspo_ops.log_probs_from_logits),
        # as hidden states, and as the weight of three tokens
        (torch.tensor([0, 2, 1]), partial(hidden_by_weight, products="triton")),
    ):
        results = []
        for rows in (near, far):
            leaf = rows.detach().requires_grad_()
            result = call(leaf, targets)
            results.append((result.detach(), *torch.autograd.grad(result.sum(), leaf)))
        assert_same_bits(*results)


def hidden_by_weight(rows: Tensor, targets: Tensor, products: str) -> Tensor:
    return gspo_ops.log_probs_from_hidden(rows, rows, targets, products=products)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved lazily")
@pytest.mark.parametrize("interpret", ["0", "1"], ids=["torch", "interpreter"])
def test_row_offsets_are_64_bit(interpret):
    run_here("far_rows", env={"TRITON_INTERPRET": interpret})


def start_here(*args: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Start this file as a program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, __file__, *args], env=os.environ | (env or {}), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run_here(*args: str, env: dict[str, str] | None = None) -> None:
    process = start_here(*args, env=env)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


# Distributed data parallel


def tiny_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(V, 8), nn.Tanh(), nn.Linear(8, V))


def ddp_loss(model: nn.Module, rows: slice, world_size: int) -> Tensor:
    """Return the loss of some sequences over B / ranks, as DDP averages over ranks."""
    x = make_batch()
    tokens = x.targets.roll(1, dims=1)
    return gspo_ops.policy_loss_from_logits(
        model(tokens[rows]), x.targets[rows], x.old_log_probs[rows], x.advantages[rows],
        mask=x.mask[rows], denominator=B / world_size,
    ).loss  # fmt: skip


def ddp_worker(rank: str, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=2,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    model = nn.parallel.DistributedDataParallel(tiny_model())
    ddp_loss(model, slice(0, 1) if rank == "0" else slice(1, B), world_size=2).backward()
    alone = tiny_model()
    ddp_loss(alone, slice(0, B), world_size=1).backward()
    for ours, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert expected.grad.count_nonzero() > 0
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-5, atol=1e-8)
    torch.distributed.destroy_process_group()


@compiled_only
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_ddp_gradients_equal_those_of_one_process(tmp_path):
    processes = [start_here("ddp_worker", str(rank), str(tmp_path / "store")) for rank in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


if __name__ == "__main__":
    {"far_rows": far_rows, "ddp_worker": ddp_worker}[sys.argv[1]](*sys.argv[2:])
