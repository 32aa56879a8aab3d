"""The accuracy checks behind the tests, the benchmarks and `gspo-ops verify`.

Inputs are realistic: targets are sampled from the logits, and old log-probs stand so close to the
new ones that the ratios straddle both clip edges, a few 1e-6 to either side. Everything is compared
with `gspo_ops.reference` in float64 on identical inputs. The ops that start from hidden states are
measured with every plan, and 16-bit gradients of theirs against those of eager with fp32 logits.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import reference
from .backend import use_triton
from .layout import segment_sum
from .linear_log_probs import log_probs_from_hidden
from .linear_policy_loss import policy_loss_from_hidden
from .log_probs import log_probs_from_logits
from .objective import GRPO, GSPO, GSPOToken, Objective
from .plan import plan_from_hidden
from .policy_loss import policy_loss_from_log_probs, policy_loss_from_logits

CLIP_BAND = 1e-6  # half-width of the band around a clip edge where a decision may differ
EDGE_OFFSET = 5e-6  # where the test ratios stand beside the edges
OBJECTIVES = (GSPO(), GSPOToken(), GRPO())

# Worst allowed value of each quantity: the contract's, but for loss and entropy, which it leaves
# open. "ulp" counts steps of the gradient's dtype; "allowed" is `ALLOWED` times the error of eager
# with fp32 logits and products; in fp32, for a real model's head, twice that error: how far
# fp32 products are off depends on the size of hidden states and weight, not on the logits alone.
BOUNDS = {
    "log_prob": 2e-6,
    "entropy": 1e-5,
    "ratio": 1e-6,
    "loss": 4e-6,
    "clip decisions flipped": 0,
    "on-policy ratio - 1": 0,
    "on-policy clipped": 0,
    "grad at target, rel L2": 2e-6,
    "grad elsewhere, rel L2": 2e-6,
    "grad row sum / g": 1e-5,
    "grad, ulp": 1,
    "grad of log_probs, rel L2": 2e-6,
    "non-zeros in dead rows": 0,
    "bits that differ on repeat": 0,
    "log_prob from hidden": 4e-6,
    "log_prob from hidden / allowed": 1,
    "entropy from hidden": 2e-5,
    "ratio of a few tokens": 4e-6,  # of one token: that of its log_prob
    "ratio of a few tokens / allowed": 1,
    "dhidden, rel L2": 5e-6,
    "dweight, rel L2": 5e-6,
    "dbias, rel L2": 5e-6,
    "dhidden / allowed": 1,
    "dweight / allowed": 1,
    "dbias / allowed": 1,
    "ratio, plans apart": 1e-6,
    "plans apart, rel L2": 5e-6,
    "plans apart / allowed": 1,
    "ratio, logits op apart": 1e-6,
    "logits op apart, rel L2": 5e-6,
    "logits op apart / allowed": 1,
}
# Exponentials or hidden states, the products of a CPU, and the result are each rounded to 16 bits:
# sqrt(3) times one rounding, and some more where elements are few.
ALLOWED = 2.0
FEW = 4  # tokens, over which the errors of log-probs don't average out yet


class Head(NamedTuple):
    """Hidden states (B, T, H) or (N, H), and the weight (V, H) and bias (V,) that they meet."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        hidden, weight, bias = self.to(dtype)
        return reference.logits_from_hidden(hidden, weight, bias=bias)

    def to(self, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Head:
        """Hidden states in one dtype, weight and bias in the same or in another."""
        head = self.map(lambda x: x.to(weight_dtype or dtype))
        return head._replace(hidden=self.hidden.to(dtype))

    def map(self, function: Callable[[Tensor], Tensor]) -> Head:
        bias = None if self.bias is None else function(self.bias)
        return Head(function(self.hidden), function(self.weight), bias)


@dataclass(frozen=True)
class Case:
    """One batch. Per-token tensors are (B, T) padded or (N,) packed; logits have V behind.

    Where it starts from a head, its logits are the exact ones, in float64. `allowed` is, for a real
    model's head, twice the error of log-probs from fp32 logits; None where the contract's bound
    holds.
    """

    logits: Tensor
    targets: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    rollout_weights: Tensor
    objective: Objective
    head: Head | None = None
    allowed: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.logits.dtype if self.head is None else self.head.hidden.dtype

    @property
    def name(self) -> str:
        name = f"{type(self.objective).__name__} {self.layout}"
        if self.head is not None and self.head.weight.dtype != self.dtype:
            name += f", {str(self.head.weight.dtype)[6:]} weight"
        return name

    @property
    def valid(self) -> Tensor:
        if self.mask is None:
            return torch.ones_like(self.targets, dtype=torch.bool)
        return self.mask != 0

    @property
    def lengths(self) -> Tensor:
        """(B,) valid tokens of each sequence."""
        batch = len(self.targets) if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return segment_sum(self.valid.double().flatten(), batch, self.cu_seqlens)

    @property
    def layout(self) -> str:
        return "padded" if self.cu_seqlens is None else "packed"

    def options(self) -> dict:
        return {
            "mask": self.mask,
            "cu_seqlens": self.cu_seqlens,
            "rollout_weights": self.rollout_weights,
            "objective": self.objective,
        }

    def double(self) -> Case:
        """The same numbers in float64, with logits at masked positions replaced by 0."""
        logits = torch.where(self.valid.unsqueeze(-1), self.logits, 0.0)
        return replace(
            self,
            logits=logits.double(),
            old_log_probs=self.old_log_probs.double(),
            advantages=self.advantages.double(),
            rollout_weights=self.rollout_weights.double(),
        )


@dataclass(frozen=True)
class Measured:
    """One quantity of one op on one case, beside its bound."""

    op: str
    dtype: torch.dtype
    case: str
    quantity: str
    value: float

    @property
    def bound(self) -> float:
        return BOUNDS[self.quantity]

    @property
    def ok(self) -> bool:
        return self.value <= self.bound  # False for NaN


def synthetic_logits(B: int, T: int, V: int, *, device: torch.device, seed: int = 0) -> Tensor:
    """(B, T, V) float32 within +-32, some rows flat and some sharply peaked as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=generator) * 3
    peak = torch.rand(B, T, 1, generator=generator) * 24
    index = torch.randint(V, (B, T, 1), generator=generator)
    return logits.scatter_add_(-1, index, peak).clamp_(-32, 32).to(device)


def synthetic_head(B: int, T: int, H: int, V: int, *, device: torch.device, seed: int = 0) -> Head:
    """A head in float32 whose logits lie within +-32: some rows flat, some sharply peaked."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = randn(V, H) / math.sqrt(H)
    bias = randn(V)
    spread, peak = 3 * torch.rand(2, B, T, 1, generator=generator)
    aligned = weight[torch.randint(V, (B, T), generator=generator)]
    hidden = spread * randn(B, T, H) + 6 * peak * aligned / aligned.norm(dim=-1, keepdim=True)
    largest = (hidden @ weight.mT).abs().amax(-1, keepdim=True).clamp(min=26)
    return Head(hidden * (26 / largest), weight, bias).map(lambda x: x.to(device))


def make_case(
    source: Tensor | Head,
    objective: Objective,
    *,
    packed: bool,
    targets: Tensor | None = None,
    seed: int = 0,
) -> Case:
    """A case from logits (B, T, V) or a head: ragged lengths, 0 and 1 among them, with tool tokens
    masked.

    Padding holds targets of -100, and NaN in logits and hidden states. Targets are given for a real
    model; what its head may err is measured.
    """
    head = source if isinstance(source, Head) else None
    logits = source.logits() if isinstance(source, Head) else source
    generator = torch.Generator().manual_seed(seed)
    B, T, _ = logits.shape
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[0] = T
    lengths[1 % B : 3 % B] = torch.tensor([0, 1])[: max(3 % B - 1 % B, 0)]
    in_sequence = torch.arange(T) < lengths[:, None]
    mask = in_sequence & (torch.rand(B, T, generator=generator) < 0.9)
    mask[torch.arange(B), 0] = lengths > 0
    is_real = head is not None and targets is not None
    if targets is None:
        targets = sample(logits, generator)
    targets = targets.masked_fill(~mask.to(logits.device), -100)
    clean = torch.where(mask.to(logits.device).unsqueeze(-1), logits, 0.0).double()
    log_probs = reference.log_probs_from_logits(clean, targets).cpu()
    allowed = None
    if is_real and head is not None:
        eager = reference.log_probs_from_logits(head.logits(torch.float32), targets).cpu()
        allowed = max(BOUNDS["log_prob from hidden"], 2 * worst(eager - log_probs))
    log_ratio = log_ratios(objective, mask, generator, max(EDGE_OFFSET, allowed or 0.0))
    old = log_probs - log_ratio
    per_token = objective.ratio_level == "sequence_token"
    advantages = torch.randn((B, T) if per_token else (B,), generator=generator)
    if objective.ratio_level != "token":
        # mostly on the side where the sequence's ratio can be clipped
        side = torch.where((log_ratio * mask).sum(1) < 0, -1.0, 1.0)
        side[7:] *= -1
        if per_token:
            side = side[:, None] * torch.where(torch.arange(T) % 4 == 3, -1.0, 1.0)
        advantages = advantages.abs() * side
    advantages[-1] = 0.0
    padding = ~mask.to(logits.device).unsqueeze(-1)
    logits = logits.masked_fill(padding, math.nan)
    if head is not None:
        head = head._replace(hidden=head.hidden.masked_fill(padding, math.nan))
    case = Case(
        logits, targets, old.float().to(logits.device), advantages.to(logits.device),
        mask.to(logits.device), None,
        (0.5 + torch.rand(B, T, generator=generator)).to(logits.device), objective, head, allowed,
    )  # fmt: skip
    return _pack(case, in_sequence, lengths) if packed else case


def _pack(case: Case, in_sequence: Tensor, lengths: Tensor) -> Case:
    keep = in_sequence.to(case.logits.device)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return replace(
        case,
        logits=case.logits[keep],
        targets=case.targets[keep],
        old_log_probs=case.old_log_probs[keep],
        advantages=case.advantages if case.advantages.ndim == 1 else case.advantages[keep],
        mask=case.mask[keep] if case.mask is not None else None,
        cu_seqlens=cu_seqlens.to(case.logits.device),
        rollout_weights=case.rollout_weights[keep],
        head=case.head and case.head._replace(hidden=case.head.hidden[keep]),
    )


def sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row from softmax(logits), by the Gumbel-max trick."""
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
    return (logits.double() - (-uniform.clamp_min(1e-300).log()).log()).argmax(-1)


def log_ratios(
    objective: Objective, mask: Tensor, generator: torch.Generator, offset: float = EDGE_OFFSET
) -> Tensor:
    """(B, T) log-ratios that straddle both clip edges, per sequence or per token."""
    high = math.log1p(objective.clip_high)
    low = math.log1p(-objective.clip_low)
    around = [0.0, 3 * high, 3 * low]
    around += [edge + side for edge in (high, low) for side in (-offset, offset)]
    choices = torch.tensor(around, dtype=torch.float64)
    B, T = mask.shape
    if objective.ratio_level == "token":
        return choices[torch.randint(len(around), (B, T), generator=generator)]
    noise = 0.05 * torch.randn(B, T, generator=generator, dtype=torch.float64) * mask
    noise -= noise.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return noise + choices[torch.arange(B) % len(around)][:, None]


# What is measured


def measure(case: Case) -> Iterator[Measured]:
    """Every quantity of every op on one case."""
    if case.head is not None:
        yield from _measure_head(case, case.head)
        return

    def rows(op: str, quantities: dict[str, float]) -> Iterator[Measured]:
        for quantity, value in quantities.items():
            yield Measured(op, case.dtype, case.name, quantity, value)

    yield from rows("log_probs_from_logits", _measure_log_probs(case))
    if case.logits.dtype == torch.float32:
        yield from rows("policy_loss_from_log_probs", _measure_from_log_probs(case))
    yield from rows("policy_loss_from_logits", _measure_from_logits(case))
    yield from rows("policy_loss_from_logits", _measure_on_policy(case))


def _measure_log_probs(case: Case) -> dict[str, float]:
    exact = case.double()
    g, h = _upstream(case.targets, 1), _upstream(case.targets, 2)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        logits = case.logits.clone().requires_grad_()
        log_probs, entropy = log_probs_from_logits(logits, case.targets, return_entropy=True)
        (log_probs * g + entropy * h).sum().backward()
        assert logits.grad is not None
        return log_probs.detach(), entropy.detach(), logits.grad

    logits64 = exact.logits.requires_grad_()
    log_probs64 = reference.log_probs_from_logits(logits64, exact.targets)
    entropy64 = reference.entropy_from_logits(logits64, exact.targets)
    (log_probs64 * g + entropy64 * h).sum().backward()
    log_probs, entropy, grad = ours()
    return {
        "log_prob": worst(log_probs - log_probs64),
        "entropy": worst(entropy - entropy64),
        **grad_errors(grad, logits64.grad, case.targets),
        "non-zeros in dead rows": non_zeros(grad[~case.valid]),
        "bits that differ on repeat": differing(grad, ours()[2]),
    }


def _measure_from_log_probs(case: Case) -> dict[str, float]:
    exact = case.double()
    log_probs = reference.log_probs_from_logits(exact.logits, exact.targets).float()
    ours = torch.where(case.valid, log_probs, math.nan).requires_grad_()
    theirs = log_probs.double().requires_grad_()
    out = policy_loss_from_log_probs(ours, case.old_log_probs, case.advantages, **case.options())
    loss64, stats64 = reference.policy_loss_from_log_probs(
        theirs, exact.old_log_probs, exact.advantages, **exact.options()
    )
    upstream = torch.randn((), generator=torch.Generator().manual_seed(3)).to(loss64.device)
    (out.loss * upstream).backward()
    (loss64 * upstream).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    flipped = (ours.grad == 0) != (theirs.grad == 0)
    return {
        "loss": worst(out.loss - loss64),
        "ratio": worst(out.stats["log_ratio"].double().exp() - stats64["log_ratio"].exp()),
        "clip decisions flipped": float(flipped.sum()),
        "grad of log_probs, rel L2": relative(ours.grad, theirs.grad),
        "non-zeros in dead rows": non_zeros(ours.grad[~case.valid]),
    }


def _measure_from_logits(case: Case) -> dict[str, float]:
    exact = case.double()
    upstream = torch.randn((), generator=torch.Generator().manual_seed(4)).to(case.logits.device)

    def ours() -> tuple[Tensor, dict[str, Tensor], Tensor]:
        logits = case.logits.clone().requires_grad_()
        out = policy_loss_from_logits(
            logits, case.targets, case.old_log_probs, case.advantages, **case.options()
        )
        (out.loss * upstream).backward()
        assert logits.grad is not None
        return out.loss.detach(), out.stats, logits.grad

    logits64 = exact.logits.requires_grad_()
    loss64, stats64 = reference.policy_loss_from_logits(
        logits64, exact.targets, exact.old_log_probs, exact.advantages, **exact.options()
    )
    (loss64 * upstream).backward()
    assert logits64.grad is not None
    loss, stats, grad = ours()
    at_target = _at_target(logits64.grad, case.targets)
    flipped = (_at_target(grad, case.targets) == 0) != (at_target.to(grad.dtype) == 0)
    dead = (logits64.grad == 0).all(-1)
    return {
        "loss": worst(loss - loss64),
        "ratio": worst(stats["log_ratio"].double().exp() - stats64["log_ratio"].exp()),
        "clip decisions flipped": float(flipped.sum()),
        **grad_errors(grad, logits64.grad, case.targets),
        "non-zeros in dead rows": non_zeros(grad[dead]),
        "bits that differ on repeat": differing(grad, ours()[2]),
    }


def _measure_on_policy(case: Case) -> dict[str, float]:
    """Old log-probs that are bitwise the new ones, and old_log_probs=None."""
    with torch.no_grad():
        new = log_probs_from_logits(case.logits, case.targets)
    quantities = {"on-policy ratio - 1": 0.0, "on-policy clipped": 0.0}
    grads = []
    for old in (new, None):
        logits = case.logits.clone().requires_grad_()
        out = policy_loss_from_logits(
            logits, case.targets, old, case.advantages, **case.options()
        )  # fmt: skip
        out.loss.backward()
        grads.append(logits.grad)
        off = max(worst(out.stats[name] - 1) for name in ("ratio_mean", "ratio_min", "ratio_max"))
        quantities["on-policy ratio - 1"] = max(quantities["on-policy ratio - 1"], off)
        quantities["on-policy clipped"] += float(out.stats["clip_frac_tokens"])
    exact = case.double()
    logits64 = exact.logits.requires_grad_()
    reference.policy_loss_from_logits(
        logits64, exact.targets, None, exact.advantages, **exact.options()
    )[0].backward()
    errors = [grad_errors(grad, logits64.grad, case.targets) for grad in grads]
    return quantities | {q: max(e[q] for e in errors) for q in errors[0]}


# From hidden states


class _Result(NamedTuple):
    """Detached values, and the gradients by the head's tensors."""

    values: dict[str, Tensor]
    grads: dict[str, Tensor]


class _Exact(NamedTuple):
    """What a result is compared with."""

    exact: _Result
    eager: _Result  # from fp32 logits, gradients rounded to the dtype of their tensors
    is_real: bool

    def errors(self, grads: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, float]:
        """Distance of gradients to others, as the contract counts it for the dtypes."""
        errors = {name: relative(grads[name], others[name].double()) for name in grads}
        of_eager = {n: relative(self.eager.grads[n], self.exact.grads[n]) for n in grads}
        if any(grad.dtype != torch.float32 for grad in grads.values()):
            allowed = {
                n: max(BOUNDS[f"{n}, rel L2"], ALLOWED * error) for n, error in of_eager.items()
            }
        elif self.is_real:
            allowed = {n: max(BOUNDS[f"{n}, rel L2"], 2 * error) for n, error in of_eager.items()}
        else:
            return {f"{name}, rel L2": error for name, error in errors.items()}
        return {f"{name} / allowed": error / allowed[name] for name, error in errors.items()}


def _through(head: Head, function: Callable[[Head], tuple[Tensor, dict[str, Tensor]]]) -> _Result:
    """Values of a function of a head, and the gradients of the scalar that it returns first."""
    leaves = head.map(lambda x: x.clone().requires_grad_())
    total, values = function(leaves)
    total.backward()
    grads = {f"d{name}": x.grad for name, x in leaves._asdict().items() if x is not None}
    return _Result({name: value.detach() for name, value in values.items()}, grads)


def _expected(case: Case, head: Head, g: Tensor, h: Tensor | None = None) -> _Exact:
    """Log-probs, and gradients of their sum weighted by g, and that of entropies by h."""
    clean = head._replace(hidden=torch.where(case.valid.unsqueeze(-1), head.hidden, 0.0))

    def plain(dtype: torch.dtype) -> Callable[[Head], tuple[Tensor, dict[str, Tensor]]]:
        def function(leaves: Head) -> tuple[Tensor, dict[str, Tensor]]:
            logits = leaves.logits(dtype)
            log_probs = reference.log_probs_from_logits(logits, case.targets)
            if h is None:
                return (log_probs * g.to(dtype)).sum(), {"log_prob": log_probs}
            entropy = reference.entropy_from_logits(logits, case.targets)
            values = {"log_prob": log_probs, "entropy": entropy}
            return (log_probs * g.to(dtype) + entropy * h.to(dtype)).sum(), values

        return function

    return _Exact(
        _through(clean.to(torch.float64), plain(torch.float64)),
        _through(clean, plain(torch.float32)),
        case.allowed is not None,
    )


def _as_allowed(case: Case, errors: dict[str, float], *names: str) -> dict[str, float]:
    """Errors of log-probs by these names, as the contract counts them for the case."""
    if case.allowed is None:
        return errors
    return {
        f"{name} / allowed" if name in names else name: error / case.allowed
        if name in names
        else error
        for name, error in errors.items()
    }


def head_plans(head: Head) -> dict[str, dict]:
    """Options of every plan, with all the memory that it wants and with less, by its name."""
    on_triton = use_triton(head.hidden)
    plans: dict[str, dict] = {}
    for products, name in product(("mm", "triton") if on_triton else ("auto",), PLANS):
        kind, _, part = name.partition(" ")
        options: dict[str, Any] = {"plan": kind, "products": products}
        if part:
            whole = plan_from_hidden(head.hidden, head.weight, plan=options["plan"])
            options["memory_budget"] = whole.kept_bytes // 2
            if kind == "keep":  # by name it keeps everything
                options["plan"] = "auto"
        plans[f"{name}, {products}" if on_triton else name] = options
    return plans


PLANS = ("keep", "keep part", "recompute", "chunk", "chunk part")


def _measure_head(case: Case, head: Head) -> Iterator[Measured]:
    """Both ops with every plan, each against float64 and against the first plan."""
    plans = head_plans(head)
    parts = [
        ("policy_loss_from_hidden", plans, _measure_head_loss(case, head)),
        ("policy_loss_from_hidden", plans, _measure_head_on_policy(case, head)),
    ]
    if isinstance(case.objective, GSPO):  # log-probs have no objective
        for with_entropy, kinds in ((False, ("keep", "auto", "recompute")), (True, ("recompute",))):
            chosen = {name: plan for name, plan in plans.items() if plan["plan"] in kinds}
            of_plan = _measure_head_log_probs(case, head, with_entropy)
            parts.append(("log_probs_from_hidden", chosen, of_plan))
    for op, chosen, of_plan in parts:
        for name, options in chosen.items():
            for quantity, value in of_plan(options).items():
                yield Measured(op, case.dtype, f"{case.name}, {name}", quantity, value)


def _measure_head_log_probs(
    case: Case, head: Head, with_entropy: bool
) -> Callable[[dict], dict[str, float]]:
    g, h = _upstream(case.targets, 1), _upstream(case.targets, 2)
    dead = torch.rand(g.shape, generator=torch.Generator().manual_seed(5)).to(g.device) < 0.3
    g, h = g.masked_fill(dead, 0.0), h.masked_fill(dead, 0.0)
    expected = _expected(case, head, g, h if with_entropy else None)
    first: list[_Result] = []

    def of_plan(options: dict) -> dict[str, float]:
        def function(leaves: Head) -> tuple[Tensor, dict[str, Tensor]]:
            arguments = (leaves.hidden, leaves.weight, case.targets)
            if not with_entropy:
                log_probs = log_probs_from_hidden(*arguments, bias=leaves.bias, **options)
                return (log_probs * g).sum(), {"log_prob": log_probs}
            log_probs, entropy = log_probs_from_hidden(
                *arguments, bias=leaves.bias, return_entropy=True, **options
            )
            total = (log_probs * g + entropy * h).sum()
            return total, {"log_prob": log_probs, "entropy": entropy}

        ours, exact = _through(head, function), expected.exact
        first.append(ours)
        errors = {
            f"{name} from hidden": worst(value - exact.values[name])
            for name, value in ours.values.items()
        }
        return {
            **_as_allowed(case, errors, "log_prob from hidden"),
            **expected.errors(ours.grads, exact.grads),
            **_plans_apart(expected, ours, first[0]),
            "non-zeros in dead rows": non_zeros(ours.grads["dhidden"][dead | ~case.valid]),
            "bits that differ on repeat": _all_differing(ours, _through(head, function)),
        }

    return of_plan


def _measure_head_loss(case: Case, head: Head) -> Callable[[dict], dict[str, float]]:
    exact_case = case.double()
    upstream = torch.randn((), generator=torch.Generator().manual_seed(4)).to(case.logits.device)
    log_probs64 = reference.log_probs_from_logits(exact_case.logits, case.targets).requires_grad_()
    loss64, stats64 = reference.policy_loss_from_log_probs(
        log_probs64, exact_case.old_log_probs, exact_case.advantages, **exact_case.options()
    )
    (g,) = torch.autograd.grad(loss64 * upstream, log_probs64)
    exact_ratios = _ratios(case, stats64)
    expected = _expected(case, head, g)
    alive = _any_in_row(expected.exact.grads["dhidden"].to(case.dtype))

    def from_logits(leaves: Head) -> tuple[Tensor, dict[str, Tensor]]:
        out = policy_loss_from_logits(
            leaves.logits(torch.float32), case.targets, case.old_log_probs, case.advantages,
            **case.options(),
        )  # fmt: skip
        return out.loss * upstream, _ratios(case, out.stats)

    logits_op = _through(head, from_logits) if case.dtype == torch.float32 else None
    first: list[_Result] = []

    def of_plan(options: dict) -> dict[str, float]:
        def function(leaves: Head) -> tuple[Tensor, dict[str, Tensor]]:
            out = policy_loss_from_hidden(
                leaves.hidden, leaves.weight, case.targets, case.old_log_probs, case.advantages,
                bias=leaves.bias, **case.options(), **options,
            )  # fmt: skip
            return out.loss * upstream, {"loss": out.loss} | _ratios(case, out.stats)

        ours = _through(head, function)
        first.append(ours)
        dhidden = ours.grads["dhidden"]
        ratio_errors = {n: worst(ours.values[n] - exact) for n, exact in exact_ratios.items()}
        quantities = {
            "loss": worst(ours.values["loss"] - loss64),
            **_as_allowed(case, ratio_errors, "ratio of a few tokens"),
            "clip decisions flipped": float((_any_in_row(dhidden) != alive).sum()),
            **expected.errors(ours.grads, expected.exact.grads),
            **_plans_apart(expected, ours, first[0]),
            "non-zeros in dead rows": non_zeros(dhidden[g == 0]),
            "bits that differ on repeat": _all_differing(ours, _through(head, function)),
        }
        if logits_op is None:
            return quantities
        errors = expected.errors(ours.grads, logits_op.grads)
        return quantities | {
            "ratio, logits op apart": worst(ours.values["ratio"] - logits_op.values["ratio"]),
            f"logits op apart{_kind(errors)}": max(errors.values()),
        }

    return of_plan


def _measure_head_on_policy(case: Case, head: Head) -> Callable[[dict], dict[str, float]]:
    """old_log_probs=None, and old log-probs that the same plan has given before."""
    exact_case = case.double()
    log_probs64 = reference.log_probs_from_logits(exact_case.logits, case.targets).requires_grad_()
    loss64, _ = reference.policy_loss_from_log_probs(
        log_probs64, None, exact_case.advantages, **exact_case.options()
    )
    (g,) = torch.autograd.grad(loss64, log_probs64)
    expected = _expected(case, head, g)

    def of_plan(options: dict) -> dict[str, float]:
        olds: list[Tensor | None] = [None]
        if options["plan"] != "chunk":
            with torch.no_grad():
                olds.append(
                    log_probs_from_hidden(
                        head.hidden, head.weight, case.targets, bias=head.bias, **options
                    )
                )
        found = []
        for old in olds:

            def function(leaves: Head, old: Tensor | None = old) -> tuple[Tensor, dict]:
                out = policy_loss_from_hidden(
                    leaves.hidden, leaves.weight, case.targets, old, case.advantages,
                    bias=leaves.bias, **case.options(), **options,
                )  # fmt: skip
                return out.loss, out.stats

            ours = _through(head, function)
            names = ("ratio_mean", "ratio_min", "ratio_max")
            off = torch.stack([ours.values[name] - 1 for name in names])
            found.append(
                {
                    "on-policy ratio - 1": worst(off),
                    "on-policy clipped": float(ours.values["clip_frac_tokens"]),
                    **expected.errors(ours.grads, expected.exact.grads),
                }
            )
        return {q: worst(torch.tensor([x[q] for x in found])) for q in found[0]}

    return of_plan


def _plans_apart(expected: _Exact, ours: _Result, first: _Result) -> dict[str, float]:
    errors = expected.errors(ours.grads, first.grads)
    apart = {f"plans apart{_kind(errors)}": max(errors.values())}
    if "ratio" in ours.values:
        apart["ratio, plans apart"] = worst(ours.values["ratio"] - first.values["ratio"])
    return apart


def _kind(errors: dict[str, float]) -> str:
    """How gradients were compared."""
    return next(iter(errors)).removeprefix("dhidden")


def _ratios(case: Case, stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """s_i of sequences by name of the bound that holds for their length."""
    ratio, has_few = stats["log_ratio"].double().exp(), case.lengths < FEW
    return {"ratio": ratio[~has_few], "ratio of a few tokens": ratio[has_few]}


def _any_in_row(x: Tensor) -> Tensor:
    return (x != 0).any(-1)


def _all_differing(x: _Result, y: _Result) -> float:
    pairs = [*zip(x.values.values(), y.values.values(), strict=True)]
    pairs += zip(x.grads.values(), y.grads.values(), strict=True)
    return sum(differing(a, b) for a, b in pairs)


def grad_errors(grad: Tensor | None, exact: Tensor | None, targets: Tensor) -> dict[str, float]:
    """Errors of dlogits as the contract counts them for its dtype."""
    assert grad is not None
    assert exact is not None
    if grad.dtype in (torch.bfloat16, torch.float16):
        return {"grad, ulp": ulp_distance(grad, exact)}
    is_target = torch.zeros_like(grad, dtype=torch.bool)
    index = targets.clamp(min=0).long().unsqueeze(-1)
    is_target.scatter_(-1, index, (targets >= 0).unsqueeze(-1))
    g = exact.abs().amax(-1).clamp(min=1e-30)
    return {
        "grad at target, rel L2": relative(grad[is_target], exact[is_target]),
        "grad elsewhere, rel L2": relative(grad[~is_target], exact[~is_target]),
        "grad row sum / g": worst(grad.double().sum(-1) / g),
    }


def ulp_distance(x: Tensor, exact: Tensor) -> float:
    """Largest number of representable steps between x and exact, rounded to x's dtype."""
    if torch.isnan(x).any():
        return math.nan

    def ordered(y: Tensor) -> Tensor:
        bits = y.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return worst(ordered(x) - ordered(exact.to(x.dtype)))


def relative(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact||; 0 where both vanish."""
    error = (x.double() - exact).norm()
    return float(error / exact.norm()) if exact.norm() > 0 else float(error)


def worst(x: Tensor) -> float:
    """Largest absolute value; NaN if there is one."""
    return float(x.detach().abs().max()) if x.numel() else 0.0


def non_zeros(x: Tensor) -> float:
    return float((x != 0).sum())


def differing(x: Tensor, y: Tensor) -> float:
    return float((x != y).sum())


def _upstream(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)


def _at_target(x: Tensor, targets: Tensor) -> Tensor:
    return x.gather(-1, targets.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)


# Verification


def verify(
    device: torch.device,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    shapes: Sequence[tuple[int, int, int]] = ((9, 16, 4097), (8, 5, 32000)),
    head_shapes: Sequence[tuple[int, int, int, int]] = ((9, 8, 37, 4097),),
    logits: Tensor | None = None,
    head: Head | None = None,
    targets: Tensor | None = None,
    quick: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Check every op, dtype, layout, objective and plan on the device against float64.

    Args:
        device: where to run.
        dtypes: of the logits, or of hidden states and weight.
        shapes: (B, T, V) of the synthetic logits.
        head_shapes: (B, T, H, V) of the synthetic hidden states and weights.
        logits, head, targets: (B, T, V), (B, T, H) and (V, H), and (B, T) of a real model, instead
            of synthetic ones.
        quick: one case per dtype for each head, not each objective and layout.
        progress: called with one line per case.

    Returns:
        Every measured quantity; `worst_of` boils them down.
    """
    sources: list[Tensor | Head] = []
    if logits is None or head is None:
        sources += [synthetic_logits(*x, device=device, seed=i) for i, x in enumerate(shapes)]
        sources += [synthetic_head(*x, device=device, seed=i) for i, x in enumerate(head_shapes)]
    else:
        sources += [logits.to(device).float(), head.map(lambda x: x.to(device))]
    measured: list[Measured] = []
    for seed, source in enumerate(sources):
        for variant, objective, packed in _variants(source, dtypes, quick):
            case = make_case(variant, objective, packed=packed, targets=targets, seed=seed)
            shape = tuple(case.logits.shape)
            progress(f"{str(case.dtype)[6:]} {case.name} {shape} {'head' if case.head else ''}")
            measured += measure(case)
    return measured


def _variants(
    source: Tensor | Head, dtypes: Sequence[torch.dtype], quick: bool
) -> Iterator[tuple[Tensor | Head, Objective, bool]]:
    """A source in each dtype, with each objective, padded and packed."""
    combinations: Iterator = product(dtypes, OBJECTIVES, (False, True))
    if not isinstance(source, Head):
        yield from ((source.to(dtype), *rest) for dtype, *rest in combinations)
        return
    if quick:
        combinations = ((dtype, GSPO(), i % 2 == 0) for i, dtype in enumerate(dtypes))
    for dtype, objective, packed in combinations:
        # half of them without a bias
        yield (source if packed else source._replace(bias=None)).to(dtype), objective, packed
    if torch.bfloat16 in dtypes and not quick:
        yield source.to(torch.bfloat16, torch.float32), GSPO(), True


def worst_of(measured: list[Measured]) -> list[Measured]:
    """The worst case of each (op, dtype, quantity), in order of appearance; NaN is worst."""
    out: dict[tuple, Measured] = {}
    for m in measured:
        key = (m.op, m.dtype, m.quantity)
        if key not in out or math.isnan(m.value) or m.value > out[key].value:
            out[key] = m
    return list(out.values())


def table(measured: list[Measured]) -> str:
    """One line per (op, dtype, quantity): worst value, bound, and the case that gave it."""
    lines = [f"{'op':27} {'dtype':9} {'quantity':27} {'worst':>9} {'bound':>7}  worst case"]
    for m in worst_of(measured):
        mark = "" if m.ok else "  <-- over the bound"
        lines.append(
            f"{m.op:27} {str(m.dtype)[6:]:9} {m.quantity:27} {m.value:9.2g} {m.bound:7.0e}  "
            f"{m.case}{mark}"
        )
    return "\n".join(lines)


def patch_interpreter() -> None:
    """Make Triton's interpreter round and add up as GPUs do.

    It truncates float32 to bfloat16, and leaves `tl.dot` to the BLAS that NumPy has, which may
    round a row by its place among the others. NumPy's warnings about NaN and infinity, which are
    ordinary values here, are silenced.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    original = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(
        self: interpreter.InterpreterBuilder, src: interpreter.TensorHandle, dst_type: tl.dtype
    ) -> interpreter.TensorHandle:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return original(self, src, dst_type)
        bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16)
        return interpreter.TensorHandle(rounded, dst_type.scalar)

    @np.errstate(all="ignore")
    def create_dot(
        self: interpreter.InterpreterBuilder,
        a: interpreter.TensorHandle,
        b: interpreter.TensorHandle,
        d: interpreter.TensorHandle,
        input_precision: object,
        max_num_imprecise_acc: int,
    ) -> interpreter.TensorHandle:
        # bfloat16 stands in the interpreter as its bits
        a, b = (original(self, x, d.dtype).data for x in (a, b))
        # every element is a sum over k from the first to the last
        product = np.einsum("mk,kn->mn", a, b)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    _hasten_interpreter()


def _hasten_interpreter() -> None:
    """Halve its time: it patches the language anew for each launch and each call of a device
    function, makes a table of dtypes for each dtype, and computes overflows that it never reports.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    for_good = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: for_good

    of_scalar = functools.cache(interpreter._get_np_dtype)
    pointer = np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda dtype: (
        pointer if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)
    )
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
