"""The accuracy checks behind the tests, the benchmarks and `gspo-ops verify`.

Inputs are realistic: targets are sampled from the logits, and old log-probs stand so close to the
new ones that the ratios straddle both clip edges, a few 1e-6 to either side. Everything is compared
with `gspo_ops.reference` in float64 on identical inputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from . import reference
from .log_probs import log_probs_from_logits
from .objective import GRPO, GSPO, GSPOToken, Objective
from .policy_loss import policy_loss_from_log_probs, policy_loss_from_logits

CLIP_BAND = 1e-6  # half-width of the band around a clip edge where a decision may differ
EDGE_OFFSET = 5e-6  # where the test ratios stand beside the edges
OBJECTIVES = (GSPO(), GSPOToken(), GRPO())

# Worst allowed value of each quantity: the contract's, but for loss and entropy, which it leaves
# open. "ulp" counts steps of the gradient's dtype.
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
}


@dataclass(frozen=True)
class Case:
    """One batch. Per-token tensors are (B, T) padded or (N,) packed; logits have V behind."""

    logits: Tensor
    targets: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    rollout_weights: Tensor
    objective: Objective

    @property
    def valid(self) -> Tensor:
        if self.mask is None:
            return torch.ones_like(self.targets, dtype=torch.bool)
        return self.mask != 0

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


def make_case(
    logits: Tensor,
    objective: Objective,
    *,
    packed: bool,
    targets: Tensor | None = None,
    seed: int = 0,
) -> Case:
    """A case from logits (B, T, V): ragged lengths with 0 and 1 among them, tool tokens masked.

    Padding holds NaN logits and targets of -100.
    """
    generator = torch.Generator().manual_seed(seed)
    B, T, _ = logits.shape
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[0] = T
    lengths[1 % B : 3 % B] = torch.tensor([0, 1])[: max(3 % B - 1 % B, 0)]
    in_sequence = torch.arange(T) < lengths[:, None]
    mask = in_sequence & (torch.rand(B, T, generator=generator) < 0.9)
    mask[torch.arange(B), 0] = lengths > 0
    if targets is None:
        targets = sample(logits, generator)
    targets = targets.masked_fill(~mask.to(logits.device), -100)
    clean = torch.where(mask.to(logits.device).unsqueeze(-1), logits, 0.0).double()
    log_probs = reference.log_probs_from_logits(clean, targets).cpu()
    log_ratio = log_ratios(objective, mask, generator)
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
    logits = logits.masked_fill(~mask.to(logits.device).unsqueeze(-1), math.nan)
    case = Case(
        logits, targets, old.float().to(logits.device), advantages.to(logits.device),
        mask.to(logits.device), None,
        (0.5 + torch.rand(B, T, generator=generator)).to(logits.device), objective,
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
    )


def sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row from softmax(logits), by the Gumbel-max trick."""
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
    return (logits.double() - (-uniform.clamp_min(1e-300).log()).log()).argmax(-1)


def log_ratios(objective: Objective, mask: Tensor, generator: torch.Generator) -> Tensor:
    """(B, T) log-ratios that straddle both clip edges, per sequence or per token."""
    high = math.log1p(objective.clip_high)
    low = math.log1p(-objective.clip_low)
    around = [0.0, 3 * high, 3 * low]
    around += [edge + side for edge in (high, low) for side in (-EDGE_OFFSET, EDGE_OFFSET)]
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
    name = f"{type(case.objective).__name__} {case.layout}"

    def rows(op: str, quantities: dict[str, float]) -> Iterator[Measured]:
        for quantity, value in quantities.items():
            yield Measured(op, case.logits.dtype, name, quantity, value)

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
    logits: Tensor | None = None,
    targets: Tensor | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Check every op, dtype, layout and objective on the device against float64.

    Args:
        device: where to run.
        dtypes: of the logits.
        shapes: (B, T, V) of the synthetic batches.
        logits, targets: (B, T, V) and (B, T) of a real model, instead of synthetic ones.
        progress: called with one line per case.

    Returns:
        Every measured quantity; `worst_of` boils them down.
    """
    if logits is None:
        sources = [
            synthetic_logits(*shape, device=device, seed=i) for i, shape in enumerate(shapes)
        ]
    else:
        sources = [logits.to(device).float()]
    measured: list[Measured] = []
    for i, source in enumerate(sources):
        for dtype in dtypes:
            for objective in OBJECTIVES:
                for packed in (False, True):
                    case = make_case(
                        source.to(dtype), objective, packed=packed, targets=targets, seed=i
                    )
                    progress(
                        f"{str(dtype)[6:]} {type(objective).__name__} {case.layout} "
                        f"{tuple(source.shape)}"
                    )
                    measured += measure(case)
    return measured


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
    """Make Triton's interpreter round float32 to bfloat16 as GPUs do; it truncates.

    NumPy's warnings about NaN and infinity, which are ordinary values here, are silenced.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    original = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return original(self, src, dst_type)
        bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16)
        return interpreter.TensorHandle(rounded, dst_type.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
