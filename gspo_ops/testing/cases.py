"""Deliberately hard batches: ragged, masked, and with ratios next to the clip edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import CISPO, GMPO, GRPO, GSPO, SAPO, GSPOToken, LoRA, Objective, reference
from ..constants import IGNORED
from .bounds import BOUNDS, log_prob_from_hidden
from .errors import worst

# Rounding of old log-probs to fp32, half a step of numbers within +-32
OLD_ROUNDING = 1e-6
# Distance of the test ratios from the edges: as neither that nor the error of an op's log-probs
# reaches an edge, each clip decision must be that of float64.
EDGE_OFFSET = BOUNDS["log_prob from hidden"] + OLD_ROUNDING
LORA_SCALE = 0.5
OBJECTIVES = (GSPO(), GSPOToken(), GRPO())
# all other choices of an objective, each at least once
FURTHER_OBJECTIVES = (
    GRPO(dual_clip=1.5, aggregation="token-mean"),
    Objective(ratio_level="sequence_shared", clip_low=3e-4, clip_high=4e-4, dual_clip=1.001),
    CISPO(),
    CISPO(ratio_level="sequence_shared", clip_low=3e-4, clip_high=4e-4),
    Objective(ratio_level="sequence", surrogate="weighted"),  # REINFORCE with importance weights
    SAPO(),
    SAPO(ratio_level="sequence", aggregation="seq-mean-token-sum"),
    SAPO(ratio_level="sequence_shared", soft_temperature_neg=2.0),
    GMPO(),
    GSPO(kl_coef=0.1, kl_weight="ratio"),
    GSPO(kl_coef=0.1, kl_estimator="k1+", kl_weight="ratio_detached"),
    GSPOToken(kl_coef=0.1, kl_estimator="abs", kl_weight="ratio", kl_input_clamp=0.2),
    GRPO(kl_coef=0.1, kl_weight="ratio", kl_input_clamp=0.4, kl_output_clamp=0.05),
    GRPO(kl_coef=0.1, kl_estimator="k3+", aggregation="token-sum"),
    Objective(ratio_level="sequence_shared", kl_coef=0.1, kl_estimator="k2", kl_weight="ratio"),
    GSPO(entropy_coef=0.01),
    GRPO(entropy_coef=0.01, kl_coef=0.1, kl_estimator="k1", aggregation="token-mean"),
)


class Setting(NamedTuple):
    """Options of the softmax and the loss, and a factor for logits within +-32.

    The bounds apply to logits / temperature within +-32. A soft cap adds twice the error of capped
    values, 1.8e-7 * softcap / temperature at most, to that of a log-prob. Where the cap is so small
    that this is about 1e-6, the roundings of small logits leave room for it within the bounds. The
    factor also keeps logits within 1.6 times the cap, beyond which its derivative, 1 - tanh^2,
    loses digits.
    """

    factor: float
    options: dict[str, Any]


SETTINGS = (
    Setting(0.7, {"temperature": 0.7, "denominator": 5.0}),
    Setting(0.2, {"temperature": 1.3, "softcap": 4.0}),
)


class HeadTensors(NamedTuple):
    """Hidden states (B, T, H) or (N, H), and the head: weight (V, H), bias (V,), LoRA factors."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None

    def options(self) -> dict[str, Any]:
        """Return the options of an op besides hidden states and weight."""
        lora = None
        if self.lora_a is not None and self.lora_b is not None:
            lora = LoRA(self.lora_a, self.lora_b, LORA_SCALE)
        return {"bias": self.bias, "lora": lora}

    def logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        head = self.to(dtype)
        return reference.logits_from_hidden(head.hidden, head.weight, **head.options())

    def scaled(self, factor: float) -> HeadTensors:
        """Return a head whose logits are those of this one times a factor."""
        bias = None if self.bias is None else self.bias * factor
        return self._replace(hidden=self.hidden * factor, bias=bias)

    def to(self, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> HeadTensors:
        """Return hidden states in one dtype, and weight and bias in the same or another one."""
        head = self.map(lambda x: x.to(weight_dtype or dtype))
        return head._replace(hidden=self.hidden.to(dtype))

    def map(self, function: Callable[[Tensor], Tensor]) -> HeadTensors:
        return HeadTensors(*[None if x is None else function(x) for x in self])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """One batch. Per-token tensors are (B, T) padded or (N,) packed; logits have a last axis V.

    If it starts from a head, its logits are exact, in float64. For a real model's head, `allowed`
    is twice the error of log-probs from fp32 logits; None if the contract's bound applies.
    """

    logits: Tensor
    targets: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    rollout_weights: Tensor
    ref_log_probs: Tensor | None
    objective: Objective
    temperature: float = 1.0
    softcap: float | None = None
    denominator: float | None = None
    head: HeadTensors | None = None
    allowed: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.logits.dtype if self.head is None else self.head.hidden.dtype

    @property
    def name(self) -> str:
        name = f"{said(self.objective)} {self.layout}"
        if self.head is not None and self.head.weight.dtype != self.dtype:
            name += f", {str(self.head.weight.dtype)[6:]} weight"
        if self.head is not None and self.head.lora_a is not None:
            name += ", LoRA"
        options = self.softmax() | {"denominator": self.denominator}
        return name + "".join(f", {n} {x:g}" for n, x in options.items() if x not in (None, 1.0))

    @property
    def valid(self) -> Tensor:
        if self.mask is None:
            return torch.ones_like(self.targets, dtype=torch.bool)
        return self.mask != 0

    @property
    def lengths(self) -> Tensor:
        """The number of valid tokens of each sequence, (B,)."""
        if self.cu_seqlens is None:
            return self.valid.sum(1)
        before = torch.nn.functional.pad(self.valid.cumsum(0), (1, 0))
        return before[self.cu_seqlens.long()].diff()

    @property
    def layout(self) -> str:
        return "padded" if self.cu_seqlens is None else "packed"

    def softmax(self) -> dict[str, Any]:
        """Return the options of log-probs."""
        return {"temperature": self.temperature, "softcap": self.softcap}

    def options(self) -> dict[str, Any]:
        """Return the options of a loss besides those of log-probs."""
        return {
            "mask": self.mask,
            "cu_seqlens": self.cu_seqlens,
            "rollout_weights": self.rollout_weights,
            "ref_log_probs": self.ref_log_probs,
            "denominator": self.denominator,
            "objective": self.objective,
        }

    def double(self) -> Case:
        """Return the same numbers in float64, with logits at masked positions replaced by 0."""
        logits = torch.where(self.valid.unsqueeze(-1), self.logits, 0.0)
        return replace(
            self,
            logits=logits.double(),
            old_log_probs=self.old_log_probs.double(),
            advantages=self.advantages.double(),
            rollout_weights=self.rollout_weights.double(),
            ref_log_probs=None if self.ref_log_probs is None else self.ref_log_probs.double(),
        )


def said(objective: Objective) -> str:
    """Describe an objective briefly: its class, and its options that differ from the default."""
    given = []
    for x in fields(objective):
        value = getattr(objective, x.name)
        if x.init and value != x.default:
            given.append(value if isinstance(value, str) else f"{x.name}={value:g}")
    return type(objective).__name__ + (f"({', '.join(given)})" if given else "")


def synthetic_logits(B: int, T: int, V: int, *, device: torch.device, seed: int = 0) -> Tensor:
    """Draw (B, T, V) float32 logits within +-32: some rows flat, some as peaked as a model's."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=generator) * 3
    peak = torch.rand(B, T, 1, generator=generator) * 24
    index = torch.randint(V, (B, T, 1), generator=generator)
    return logits.scatter_add_(-1, index, peak).clamp_(-32, 32).to(device)


def synthetic_head(
    B: int, T: int, H: int, V: int, *, device: torch.device, seed: int = 0
) -> HeadTensors:
    """Draw a head in float32 with logits within +-32: some rows flat, some sharply peaked."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = randn(V, H) / math.sqrt(H)
    bias = randn(V)
    spread, peak = 3 * torch.rand(2, B, T, 1, generator=generator)
    aligned = weight[torch.randint(V, (B, T), generator=generator)]
    hidden = spread * randn(B, T, H) + 6 * peak * aligned / aligned.norm(dim=-1, keepdim=True)
    largest = (hidden @ weight.mT).abs().amax(-1, keepdim=True).clamp(min=26)
    return HeadTensors(hidden * (26 / largest), weight, bias).map(lambda x: x.to(device))


def with_lora(head: HeadTensors, rank: int, *, seed: int = 0) -> HeadTensors:
    """Return the head with a low-rank update, which changes its logits by a few units."""
    generator = torch.Generator().manual_seed(seed)
    V, H = head.weight.shape
    a, b = (torch.randn(*shape, generator=generator) for shape in ((rank, H), (V, rank)))
    return head._replace(
        lora_a=(a / math.sqrt(H)).to(head.weight), lora_b=(b / math.sqrt(rank)).to(head.weight)
    )


def make_case(
    source: Tensor | HeadTensors,
    objective: Objective,
    *,
    packed: bool,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    denominator: float | None = None,
    seed: int = 0,
) -> Case:
    """Make a case from logits (B, T, V) or a head.

    Lengths are ragged, 0 and 1 among them, and tool tokens are masked. Padding holds targets of
    -100, and NaN in logits and hidden states. If targets are given, as for a real model, the error
    that its head is allowed is measured.
    """
    head = source if isinstance(source, HeadTensors) else None
    logits = source.logits() if isinstance(source, HeadTensors) else source
    device = logits.device
    generator = torch.Generator().manual_seed(seed)
    B, T, _ = logits.shape
    lengths, in_sequence, mask = _ragged(B, T, generator)
    padding = ~mask.to(device)
    is_real = targets is not None
    if targets is None:
        capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        targets = sample(capped / temperature, generator)
    targets = targets.masked_fill(padding, IGNORED)
    clean = logits.masked_fill(padding.unsqueeze(-1), 0.0).double()
    softmax: dict[str, Any] = {"temperature": temperature, "softcap": softcap}
    log_probs = reference.log_probs_from_logits(clean, targets, **softmax).cpu()
    allowed = _allowed(head, targets, log_probs, softmax) if head is not None and is_real else None
    offset = EDGE_OFFSET if allowed is None else allowed + OLD_ROUNDING
    log_ratio = log_ratios(objective, mask, generator, offset)
    advantages = _advantages(objective, log_ratio, mask, generator)
    if head is not None:
        head = head._replace(hidden=head.hidden.masked_fill(padding.unsqueeze(-1), math.nan))
    case = Case(
        logits=logits.masked_fill(padding.unsqueeze(-1), math.nan),
        targets=targets,
        old_log_probs=(log_probs - log_ratio).float().to(device),
        advantages=advantages.to(device),
        mask=~padding,
        cu_seqlens=None,
        rollout_weights=(0.5 + torch.rand(B, T, generator=generator)).to(device),
        ref_log_probs=_ref_log_probs(objective, log_probs, generator, device),
        objective=objective,
        temperature=temperature,
        softcap=softcap,
        denominator=denominator,
        head=head,
        allowed=allowed,
    )
    return _pack(case, in_sequence, lengths) if packed else case


def _ragged(B: int, T: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw lengths (B,), a mask (B, T) of tokens within them, and one without a tool's tokens."""
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[0] = T
    lengths[1 % B : 3 % B] = torch.tensor([0, 1])[: max(3 % B - 1 % B, 0)]
    in_sequence = torch.arange(T) < lengths[:, None]
    mask = in_sequence & (torch.rand(B, T, generator=generator) < 0.9)
    mask[torch.arange(B), 0] = lengths > 0
    return lengths, in_sequence, mask


def _allowed(
    head: HeadTensors, targets: Tensor, log_probs: Tensor, softmax: dict[str, Any]
) -> float:
    """Return twice the error of log-probs from fp32 logits, or the contract's bound if larger."""
    logits = head.logits(torch.float32)
    eager = reference.log_probs_from_logits(logits, targets, **softmax).cpu()
    contract = BOUNDS["log_prob from hidden"]
    on_tensor_cores = head.hidden.is_cuda and head.hidden.dtype.itemsize == 2
    least = log_prob_from_hidden(head.hidden.shape[-1]) if on_tensor_cores else contract
    return max(least, 2 * worst(eager - log_probs))


def _advantages(
    objective: Objective, log_ratio: Tensor, mask: Tensor, generator: torch.Generator
) -> Tensor:
    """Draw advantages, mostly of the sign that lets the ratio be clipped; the last are 0."""
    B, T = mask.shape
    per_token = objective.ratio_level in ("sequence_token", "sequence_shared")
    advantages = torch.randn((B, T) if per_token else (B,), generator=generator)
    if objective.ratio_level not in ("token", "geometric"):
        side = torch.where((log_ratio * mask).sum(1) < 0, -1.0, 1.0)
        side[7:] *= -1
        if per_token:
            side = side[:, None] * torch.where(torch.arange(T) % 4 == 3, -1.0, 1.0)
        advantages = advantages.abs() * side
    advantages[-1] = 0.0
    return advantages


def _ref_log_probs(
    objective: Objective, log_probs: Tensor, generator: torch.Generator, device: torch.device
) -> Tensor | None:
    """Draw reference log-probs at distances on both sides of the KL estimate's input clamp."""
    if objective.kl_coef == 0:
        return None
    sign = torch.randn(log_probs.shape, generator=generator, dtype=torch.float64).sign()
    edge = min(objective.kl_input_clamp, 0.3)
    offsets = torch.tensor([-0.15, -1e-4, 1e-4, 0.2], dtype=torch.float64)
    size = edge + offsets[torch.randint(4, log_probs.shape, generator=generator)]
    return (log_probs - sign * size).float().to(device)


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
        ref_log_probs=None if case.ref_log_probs is None else case.ref_log_probs[keep],
        head=case.head and case.head._replace(hidden=case.head.hidden[keep]),
    )


def upstream(like: Tensor, seed: int) -> Tensor:
    """Draw an upstream gradient in float32, in the shape of `like`."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)


def sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sample one token per row from softmax(logits), by the Gumbel-max trick."""
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
    return (logits.double() - (-uniform.clamp_min(1e-300).log()).log()).argmax(-1)


def log_ratios(
    objective: Objective, mask: Tensor, generator: torch.Generator, offset: float = EDGE_OFFSET
) -> Tensor:
    """Draw (B, T) log-ratios that straddle all clip edges, per sequence or per token."""
    edges = [math.log1p(objective.clip_high), math.log(objective.dual_clip)]
    if objective.clip_low < 1:
        edges.append(math.log1p(-objective.clip_low))
    edges = [x for x in edges if x < math.inf] or [0.3, -0.3]
    around = [0.0, *[3 * edge for edge in edges]]
    around += [edge + side for edge in edges for side in (-offset, offset)]
    choices = torch.tensor(around, dtype=torch.float64)
    B, T = mask.shape
    if objective.ratio_level in ("token", "geometric"):
        return choices[torch.randint(len(around), (B, T), generator=generator)]
    noise = 0.05 * torch.randn(B, T, generator=generator, dtype=torch.float64) * mask
    noise -= noise.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return noise + choices[torch.arange(B) % len(around)][:, None]
