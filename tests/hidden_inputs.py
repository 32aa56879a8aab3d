"""Hidden states, a head and targets for tests, and the checks that all results must pass."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import gspo_ops
from gspo_ops import LoRA, log_probs_from_hidden, reference
from gspo_ops.testing import ALLOWED, BOUNDS, relative, synthetic_head, worst


class Inputs(NamedTuple):
    """The tensors with gradients: (N, H), (V, H), (V,), and (r, H) and (V, r) of a LoRA update."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        return Inputs(*(None if x is None else function(x) for x in self))

    def lora(self) -> LoRA | None:
        return None if self.a is None else LoRA(self.a, self.b, 0.5)

    def call(self, function, *args, **options):
        """Call a function of hidden and weight, with the other inputs as its options."""
        return function(
            self.hidden, self.weight, *args, bias=self.bias, lora=self.lora(), **options
        )

    def grads(self) -> dict[str, Tensor]:
        return {n: x.grad for n, x in self._asdict().items() if x is not None and x.requires_grad}


def make(N, H, V, device, *, bias=False, rank=0, seed=0) -> Inputs:
    hidden, weight, b = synthetic_head(1, N, H, V, device=device, seed=seed)[:3]
    generator = torch.Generator().manual_seed(seed)
    lora = [None, None]
    if rank:
        lora = [torch.randn(size, generator=generator) for size in ((rank, H), (V, rank))]
        lora = [(x / math.sqrt(H)).to(device) for x in lora]
    return Inputs(hidden[0], weight, b if bias else None, *lora)


def sample(inputs: Inputs) -> Tensor:
    logits = inputs.map(Tensor.double).call(reference.logits_from_hidden)
    return torch.distributions.Categorical(logits=logits).sample()


def with_budget(plan: str, inputs: Inputs) -> dict:
    """Return options for a plan; "part" fits at most half of the exponentials, and no chunk."""
    if plan != "part":
        return {"plan": plan}
    leaves = (x.detach().requires_grad_() for x in (inputs.hidden, inputs.weight))
    whole = gspo_ops.plan_from_hidden(*leaves, plan="keep")
    return {"memory_budget": int(whole.kept_bytes * min(0.5, 400 / max(whole.rows, 1)))}


def run(call, inputs: Inputs, upstream: Tensor | None = None, frozen=()):
    """Return values and gradients; upstream (2, N) is for log-probs and entropies, not losses."""
    leaves = Inputs(
        *(None if x is None else x.detach().clone().requires_grad_(name not in frozen)
          for name, x in inputs._asdict().items())
    )  # fmt: skip
    values = call(leaves)
    values = values if isinstance(values, tuple) else (values,)
    if upstream is None:
        values[0].backward()
    else:
        total = sum((value * up).sum() for value, up in zip(values, upstream, strict=False))
        total.backward()
    return [value.detach() for value in values], leaves.grads()


def plain(targets, dtype, entropy, **options):
    """Return a function that computes log-probs and entropies from logits in this dtype."""

    def call(leaves: Inputs):
        logits = leaves.map(lambda x: x.to(dtype)).call(reference.logits_from_hidden)
        log_probs = reference.log_probs_from_logits(logits, targets, **options)
        if not entropy:
            return log_probs
        return log_probs, reference.entropy_from_logits(logits, targets, **options)

    return call


def assert_grads(grads: dict, exact: dict, eager: dict) -> None:
    """Check the contract's bounds; with few rows, eager itself may exceed the bound of fp32."""
    low = any(grad.dtype.itemsize < 4 for grad in eager.values())
    for name, grad in grads.items():
        assert grad.dtype == eager[name].dtype
        error, of_eager = relative(grad, exact[name]), relative(eager[name], exact[name])
        bound = max(BOUNDS["dweight, rel L2"], 2 * of_eager)
        if low:
            bound = max(BOUNDS["dweight, rel L2"], ALLOWED * of_eager)
        assert error <= bound, (name, error, bound)


def assert_accurate(
    inputs: Inputs, targets: Tensor, softmax=None, entropies=(False, True), frozen=(), **options
):
    """Check log-probs, entropies, and gradients for random upstream gradients, some being zero."""
    softmax = softmax or {}
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, *targets.shape, generator=generator).to(targets.device)
    upstream[:, 1::3] = 0
    for entropy in entropies:
        values, grads = run(
            lambda leaves, entropy=entropy: leaves.call(
                log_probs_from_hidden, targets, return_entropy=entropy, **softmax, **options
            ),
            inputs, upstream, frozen,
        )  # fmt: skip
        exact_values, exact = run(
            plain(targets, torch.float64, entropy, **softmax), inputs.map(Tensor.double), upstream
        )
        _, eager = run(plain(targets, torch.float32, entropy, **softmax), inputs, upstream)
        assert values[0].dtype == torch.float32
        assert worst(values[0] - exact_values[0]) <= BOUNDS["log_prob from hidden"]
        if entropy:
            assert worst(values[1] - exact_values[1]) <= BOUNDS["entropy from hidden"]
        assert grads.keys() == exact.keys() - set(frozen)
        assert_grads(grads, exact, eager)
        if "hidden" in grads:
            assert (grads["hidden"][1::3] == 0).all()


def count_dots(monkeypatch) -> list[int]:
    """Return a list that gets the FLOPs of each `tl.dot` in Triton's interpreter from now on."""
    from triton.runtime.interpreter import InterpreterBuilder

    spent = []
    dot = InterpreterBuilder.create_dot

    def counting_dot(builder, a, b, *arguments):
        spent.append(2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return dot(builder, a, b, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting_dot)
    return spent
