"""Padded or packed, masked or ragged, sliced or expanded: the layout must not change the result."""

import math
import os
import warnings
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gspo_ops
from gspo_ops import GRPO, GSPO, GSPOToken, Objective, PolicyLoss, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_LENGTH = 4 if INTERPRETED else 7  # the interpreter takes 20 ms for each row
pytestmark = pytest.mark.kernels


def examples(number: int) -> settings:
    # shrinking a failure in the interpreter takes minutes
    phases = set(Phase) - {Phase.shrink, Phase.explain} if INTERPRETED else set(Phase)
    return settings(
        phases=phases,
        max_examples=number // 4 if INTERPRETED else number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


VOCABULARIES = [1, 2, 127, 129, 300]
AGGREGATIONS = ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "token-sum"]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # GSPO with token-mean is not the paper's
    OBJECTIVES = [
        objective(aggregation=aggregation, **kl)
        for objective in (GSPO, GSPOToken, GRPO)
        for aggregation in AGGREGATIONS
        for kl in ({}, {"kl_coef": 0.1, "kl_estimator": "k1"}, {"kl_coef": 0.1})
    ]
MASK_DTYPES = [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16]
# memory layouts of logits (B, T, V)
VIEWS = {
    "contiguous": lambda x: x,
    "shifted": lambda x: padded_by(x, 1, dim=1)[:, :-1],
    "every_other": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "part_of_vocabulary": lambda x: padded_by(x, 3, dim=2)[..., :-3],
    "time_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand(x.shape),
}
GARBAGE = [None, math.nan, math.inf, -math.inf]
GARBAGE_TARGETS = [0, -100, -1, 2**31 - 1]


def padded_by(x: Tensor, size: int, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return torch.cat([x, x.new_full(shape, math.nan)], dim)


@dataclass(frozen=True)
class Layout:
    """The description of a batch, which `build` makes."""

    lengths: list[int]
    padding: int
    V: int
    view: str
    holes: bool
    mask_dtype: torch.dtype
    target_dtype: torch.dtype
    garbage: float | None
    garbage_target: int
    objective: Objective
    on_policy: bool
    weights: str | None
    per_token: bool
    temperature: float
    softcap: float | None
    seed: int


layouts = st.builds(
    Layout,
    lengths=st.lists(st.integers(0, MAX_LENGTH), max_size=3 if INTERPRETED else 5),
    padding=st.integers(0, 2),
    V=st.sampled_from(VOCABULARIES),
    view=st.sampled_from(sorted(VIEWS)),
    holes=st.booleans(),
    mask_dtype=st.sampled_from(MASK_DTYPES),
    target_dtype=st.sampled_from([torch.int32, torch.int64]),
    garbage=st.sampled_from(GARBAGE),
    garbage_target=st.sampled_from(GARBAGE_TARGETS),
    objective=st.sampled_from(OBJECTIVES),
    on_policy=st.booleans(),
    weights=st.sampled_from([None, "sequence", "token"]),
    per_token=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7]),
    softcap=st.sampled_from([None, 8.0]),
    seed=st.integers(0, 2**16),
)
EVERYTHING = {
    "padding": 1, "V": 129, "view": "shifted", "mask_dtype": torch.bool, "garbage": math.nan,
    "target_dtype": torch.int64, "garbage_target": -100, "objective": GSPO(), "on_policy": False,
    "weights": None, "per_token": False, "temperature": 1.0, "softcap": None, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """The same sequences twice: padded (B, T) and packed (N,)."""

    padded: dict
    packed: dict
    rows: Tensor  # (N,) index into the B * T padded rows


def build(layout: Layout, device: torch.device) -> Batch:
    """Build a batch, with log-ratios well inside or well outside every clip range."""
    generator = torch.Generator().manual_seed(layout.seed)
    B, V = len(layout.lengths), layout.V
    T = max(layout.lengths, default=0) + layout.padding

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def pick(values: list[float], *shape: int) -> Tensor:
        index = torch.randint(len(values), shape, generator=generator)
        return torch.tensor(values, dtype=torch.float64)[index]

    logits = VIEWS[layout.view]((3 * randn(B, T, V)).float())
    targets = torch.randint(V, (B, T), generator=generator)
    exact = reference.log_probs_from_logits(
        logits.double(), targets, temperature=layout.temperature, softcap=layout.softcap
    )
    log_ratio = pick([0, 1e-4, -1e-4, 2e-3, -2e-3, 0.5, -0.5], B, 1)
    noise = 2e-5 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    old = exact - log_ratio - noise
    ref = exact + pick([1.0, -0.7, 0.4], B, T)

    in_sequence = torch.arange(T) < torch.tensor(layout.lengths, dtype=torch.int64).view(B, 1)
    valid = in_sequence.clone()
    if layout.holes:
        valid &= torch.rand(B, T, generator=generator) > 0.4
    # if N equals B, packed values (N,) would be read as (B,)
    ambiguous = sum(layout.lengths) == B
    per_token = layout.per_token and layout.objective.ratio_level != "sequence" and not ambiguous
    shape = (B, T) if per_token else (B,)
    tensors = {
        "targets": targets,
        "old_log_probs": old.float(),
        "advantages": pick([0.0, 1.3, -0.7], *shape).float(),
        "ref_log_probs": ref.float() if layout.objective.kl_coef else None,
        "rollout_weights": {
            None: None,
            "sequence": pick([0.5, 1.7], B).float(),
            "token": pick([0.0, 0.5, 1.7], B, T).float(),
        }[None if ambiguous else layout.weights],
    }
    if layout.garbage is not None:
        if layout.view != "expanded":
            logits[~valid] = layout.garbage
        for x in tensors.values():
            if x is not None and x.shape == (B, T) and x.is_floating_point():
                x[~valid] = layout.garbage
    targets[~valid] = layout.garbage_target
    tensors["targets"] = targets.to(layout.target_dtype)
    if layout.on_policy:
        tensors["old_log_probs"] = None

    mask = valid.to(layout.mask_dtype)
    everywhere = {
        "objective": layout.objective,
        "temperature": layout.temperature,
        "softcap": layout.softcap,
    }
    padded = everywhere | tensors | {"logits": logits, "mask": None if valid.all() else mask}
    packed = everywhere | {
        name: x[in_sequence] if isinstance(x, Tensor) and x.shape[:2] == (B, T) else x
        for name, x in padded.items()
    }
    packed["cu_seqlens"] = torch.tensor([0, *accumulate(layout.lengths)], dtype=torch.int32)
    if not layout.holes:
        packed["mask"] = None
    return Batch(
        {k: v.to(device) if isinstance(v, Tensor) else v for k, v in padded.items()},
        {k: v.to(device) if isinstance(v, Tensor) else v for k, v in packed.items()},
        in_sequence.flatten().nonzero().squeeze(1).to(device),
    )


def run(call, args: dict) -> tuple[PolicyLoss, Tensor]:
    """Return the loss, and its gradient with respect to the logits in their memory layout."""
    leaf = args["logits"].detach().requires_grad_()
    result = PolicyLoss(*call(**(args | {"logits": leaf})))
    if not result.loss.requires_grad:  # the reference, without a single valid token
        return result, torch.zeros_like(leaf)
    return result, torch.autograd.grad(result.loss, leaf)[0]


def exact(args: dict) -> dict:
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in args.items()
    }


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    error, norm = (actual.double() - expected).norm().item(), expected.norm().item()
    return error / norm if norm else error


@given(layout=layouts)
@example(layout=Layout(lengths=[], holes=False, **EVERYTHING))
@example(layout=Layout(lengths=[0, 0], holes=False, **EVERYTHING))
@example(layout=Layout(lengths=[0, 1, 4, 2], holes=True, **EVERYTHING))
@example(layout=Layout(lengths=[3, 4], holes=True, **(EVERYTHING | {"on_policy": True})))
@examples(80)
def test_padded_and_packed_agree_with_the_definition(layout, device):
    batch = build(layout, device)
    expected, expected_grad = run(reference.policy_loss_from_logits, exact(batch.padded))
    padded, padded_grad = run(gspo_ops.policy_loss_from_logits, batch.padded)
    packed, packed_grad = run(gspo_ops.policy_loss_from_logits, batch.packed)

    assert_close(padded.loss, expected.loss, 2e-5)
    assert relative_l2(padded_grad, expected_grad) <= 2e-6
    assert expected.stats.keys() <= padded.stats.keys() == packed.stats.keys()
    for name, value in expected.stats.items():
        tolerance = 1e-7 if name.startswith("clip_frac") else 2e-5
        assert_close(padded.stats[name], value, tolerance)

    # gradients that are zero by definition are exactly zero
    skipped = (expected_grad == 0).all(-1)
    assert padded_grad[skipped].count_nonzero() == 0

    # a row's gradient has the same bits; sums over the batch may be added in another order
    flat = padded_grad.flatten(0, 1)
    assert torch.equal(packed_grad, flat[batch.rows])
    assert flat.count_nonzero() == packed_grad.count_nonzero()
    assert_close(packed.loss, padded.loss, 1e-6)
    assert torch.equal(packed.stats["log_ratio"], padded.stats["log_ratio"])
    for name, value in padded.stats.items():
        assert_close(packed.stats[name], value, 1e-6)


@given(
    layout=layouts,
    plan=st.sampled_from(["auto", "keep", "chunk", "recompute"]),
    budget=st.sampled_from([None, 0, 1 << 12, 1 << 14]),
    products=st.sampled_from(["mm", "triton"]),
)
@example(
    layout=Layout(lengths=[], holes=False, **EVERYTHING), plan="chunk", budget=0, products="mm"
)
@example(
    layout=Layout(lengths=[0, 0], holes=False, **EVERYTHING), plan="chunk", budget=0, products="mm"
)
@example(
    layout=Layout(lengths=[0, 1, 4, 2], holes=True, **EVERYTHING),
    plan="chunk",
    budget=0,
    products="triton",
)
@example(
    layout=Layout(lengths=[0, 1, 4, 2], holes=True, **EVERYTHING),
    plan="keep",
    budget=None,
    products="triton",
)
@examples(60)
def test_hidden_states_agree_with_the_definition(layout, plan, budget, products, device):
    """With the identity as weight, hidden states are logits, and so are their gradients."""
    batch = build(layout, device)
    expected, expected_grad = run(reference.policy_loss_from_logits, exact(batch.padded))

    def from_hidden(logits: Tensor, **rest) -> PolicyLoss:
        return gspo_ops.policy_loss_from_hidden(
            logits, torch.eye(layout.V, device=device), plan=plan, memory_budget=budget,
            products=products, **rest,
        )  # fmt: skip

    padded, padded_grad = run(from_hidden, batch.padded)
    packed, packed_grad = run(from_hidden, batch.packed)
    assert_close(padded.loss, expected.loss, 2e-5)
    assert relative_l2(padded_grad, expected_grad) <= 5e-6
    assert relative_l2(packed_grad, expected_grad.flatten(0, 1)[batch.rows]) <= 5e-6
    assert expected.stats.keys() <= padded.stats.keys() == packed.stats.keys()
    for name, value in expected.stats.items():
        tolerance = 1e-7 if name.startswith("clip_frac") else 2e-5
        assert_close(padded.stats[name], value, tolerance)
        assert_close(packed.stats[name], value, tolerance)
    skipped = (expected_grad == 0).all(-1)
    assert padded_grad[skipped].count_nonzero() == 0
    assert packed_grad[skipped.flatten()[batch.rows]].count_nonzero() == 0


@given(layout=layouts)
@examples(40)
def test_log_probs_door_gives_the_same_bits(layout, device):
    """Log-probs and then the loss give the result of one step, up to the denominator's rounding."""
    args = build(layout, device).padded
    result, grad = run(gspo_ops.policy_loss_from_logits, args)

    def in_two_steps(logits, targets, temperature, softcap, **options):
        if options["mask"] is not None:
            targets = targets.masked_fill(options["mask"] == 0, -100)
        log_probs = gspo_ops.log_probs_from_logits(
            logits, targets, temperature=temperature, softcap=softcap
        )
        return gspo_ops.policy_loss_from_log_probs(log_probs, **options)

    again, again_grad = run(in_two_steps, args)
    assert torch.equal(again.loss, result.loss)
    for name, value in result.stats.items():
        assert torch.equal(again.stats[name], value), name
    assert relative_l2(again_grad, grad.double()) <= 1e-6


@given(
    rows=st.integers(1, 4 if INTERPRETED else 9),
    V=st.sampled_from(VOCABULARIES),
    view=st.sampled_from(sorted(set(VIEWS) - {"expanded"})),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    softcap=st.sampled_from([None, 8.0]),
    with_entropy=st.booleans(),
    seed=st.integers(0, 2**16),
)
@examples(60)
def test_row_does_not_depend_on_its_neighbours(
    rows, V, view, dtype, softcap, with_entropy, seed, device
):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(rows, V, generator=generator)).to(device, dtype)
    targets = torch.randint(V, (rows,), generator=generator).to(device)
    upstream = torch.randn(2, rows, generator=generator).to(device)

    def results(logits: Tensor, targets: Tensor, upstream: Tensor) -> list[Tensor]:
        """Return each row's log_prob, entropy (if asked for) and gradient."""
        leaf = logits.detach().requires_grad_()
        y = gspo_ops.log_probs_from_logits(
            leaf, targets, softcap=softcap, return_entropy=with_entropy
        )
        y = y if with_entropy else (y,)
        total = sum((a * b.view(a.shape)).sum() for a, b in zip(y, upstream, strict=False))
        grad = torch.autograd.grad(total, leaf)[0]
        return [*(a.detach().flatten() for a in y), grad.reshape(-1, V)]

    together = results(logits, targets, upstream)

    def check(rows: Tensor | slice, logits: Tensor, targets: Tensor) -> None:
        for a, b in zip(results(logits, targets, upstream[:, rows]), together, strict=True):
            assert torch.equal(a, b[rows])

    for row in range(rows):
        here = slice(row, row + 1)
        check(here, logits[here], targets[here])
    order = torch.randperm(rows, generator=generator).to(device)
    check(order, logits[order], targets[order])
    everything = slice(None)
    check(everything, VIEWS[view](logits[None]), targets[None])
    check(everything, VIEWS[view](logits[:, None]), targets[:, None])


@given(
    lengths=st.lists(st.integers(0, 2500), min_size=1, max_size=4),
    objective=st.sampled_from([o for o in OBJECTIVES if not o.kl_coef]),
    holes=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(lengths=[70_000, 3, 40_000], objective=GSPO(), holes=True, seed=0)
@examples(40)
def test_sequence_does_not_depend_on_the_others(lengths, objective, holes, seed, device):
    generator = torch.Generator().manual_seed(seed)
    bounds = [0, *accumulate(lengths)]
    N = bounds[-1]
    log_probs = -3 * torch.rand(N, generator=generator)
    old = log_probs + 1e-3 * torch.randn(N, generator=generator)
    mask = torch.rand(N, generator=generator) > (0.3 if holes else -1)
    advantages = torch.randn(len(lengths), generator=generator)
    log_probs, old, mask, advantages = (x.to(device) for x in (log_probs, old, mask, advantages))

    def results(log_probs, old, mask, advantages, **layout) -> tuple[Tensor, Tensor]:
        leaf = log_probs.detach().requires_grad_()
        loss, stats = gspo_ops.policy_loss_from_log_probs(
            leaf, old, advantages, mask=mask, objective=objective, denominator=8.0, **layout
        )
        return torch.autograd.grad(loss, leaf)[0].flatten(), stats["log_ratio"]

    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    g, log_ratio = results(log_probs, old, mask, advantages, cu_seqlens=cu_seqlens)
    for b, n in enumerate(lengths):
        rows = slice(bounds[b], bounds[b + 1])
        here = (log_probs[rows], old[rows], mask[rows], advantages[b : b + 1])
        alone = results(*here, cu_seqlens=torch.tensor([0, n], device=device))
        padded = results(*(x.view(1, -1) for x in here[:3]), here[3])
        for g_b, log_ratio_b in (alone, padded):
            assert torch.equal(g_b, g[rows])
            assert torch.equal(log_ratio_b, log_ratio[b : b + 1])
