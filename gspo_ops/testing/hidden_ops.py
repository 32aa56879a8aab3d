"""Measurements of the ops that start from hidden states, with every plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import (
    GSPO,
    log_probs_from_hidden,
    plan_from_hidden,
    policy_loss_from_hidden,
    policy_loss_from_logits,
    reference,
)
from ..backend import use_triton
from .bounds import ALLOWED, BOUNDS, FEW, Measured
from .cases import Case, HeadTensors, upstream
from .errors import (
    differing,
    largest,
    non_zeros,
    on_policy_errors,
    ratio_of,
    relative,
    statistic_errors,
    worst,
)
from .exact import exact_loss

_Options = dict[str, Any]  # options of an op
_OfPlan = Callable[[_Options], dict[str, float]]  # errors of a plan by name
_Outcome = tuple[Tensor, dict[str, Tensor]]  # a scalar with a gradient, and values by name

PLANS = ("keep", "keep part", "recompute", "chunk", "chunk part")


def head_plans(head: HeadTensors) -> dict[str, _Options]:
    """Return options of every plan by name, with all the memory that it needs and with less."""
    on_triton = use_triton(head.hidden)
    multipliers = ["auto"] if not on_triton else ["mm", "triton"]
    if on_triton and head.lora_a is not None:  # Triton's products have no low-rank part
        multipliers.remove("triton")
    plans: dict[str, _Options] = {}
    for products, name in product(multipliers, PLANS):
        kind, _, part = name.partition(" ")
        options: _Options = {"plan": kind, "products": products}
        if part:
            whole = plan_from_hidden(head.hidden, head.weight, plan=options["plan"])
            options["memory_budget"] = whole.kept_bytes // 2
            if kind == "keep":  # "keep" would keep everything
                options["plan"] = "auto"
        plans[f"{name}, {products}" if on_triton else name] = options
    return plans


def measure_from_hidden(case: Case, head: HeadTensors) -> Iterator[Measured]:
    """Measure both ops with every plan, each against float64 and against the first plan."""
    plans = head_plans(head)
    if case.objective.entropy_coef > 0:
        plans = {n: plan for n, plan in plans.items() if plan["plan"] in ("auto", "recompute")}
    parts = [
        ("policy_loss_from_hidden", plans, _of_loss(case, head)),
        ("policy_loss_from_hidden", plans, _of_loss_on_policy(case, head)),
    ]
    if case.objective == GSPO():  # log-probs have no objective
        for with_entropy, kinds in ((False, ("keep", "auto", "recompute")), (True, ("recompute",))):
            chosen = {name: plan for name, plan in plans.items() if plan["plan"] in kinds}
            of_plan = _of_log_probs(case, head, with_entropy)
            parts.append(("log_probs_from_hidden", chosen, of_plan))
    for op, chosen, of_plan in parts:
        for name, options in chosen.items():
            for quantity, value in of_plan(options).items():
                yield Measured(op, case.dtype, f"{case.name}, {name}", quantity, value)


def _of_log_probs(case: Case, head: HeadTensors, with_entropy: bool) -> _OfPlan:
    g, h = upstream(case.targets, 1), upstream(case.targets, 2)
    dead = torch.rand(g.shape, generator=torch.Generator().manual_seed(5)).to(g.device) < 0.3
    g, h = g.masked_fill(dead, 0.0), h.masked_fill(dead, 0.0)
    expected = _expected(case, head, g, h if with_entropy else None)
    first: list[_Result] = []

    def of_plan(options: _Options) -> dict[str, float]:
        def function(leaves: HeadTensors) -> _Outcome:
            arguments = (leaves.hidden, leaves.weight, case.targets)
            further = {**leaves.options(), **case.softmax(), **options}
            if not with_entropy:
                log_probs = log_probs_from_hidden(*arguments, **further)
                return (log_probs * g).sum(), {"log_prob": log_probs}
            log_probs, entropy = log_probs_from_hidden(*arguments, return_entropy=True, **further)
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


def _of_loss(case: Case, head: HeadTensors) -> _OfPlan:
    of_loss = upstream(torch.zeros(()), 4).to(case.logits.device)
    exact = exact_loss(case, case.double().old_log_probs, of_loss)
    exact_ratios = _ratios(case, exact.stats)
    expected = _expected(case, head, exact.g, exact.h)
    is_dead = exact.g == 0 if exact.h is None else (exact.g == 0) & (exact.h == 0)
    alive = _any_in_row(expected.exact.grads["dhidden"].to(case.dtype))

    def from_logits(leaves: HeadTensors) -> _Outcome:
        out = policy_loss_from_logits(
            leaves.logits(torch.float32), case.targets, case.old_log_probs, case.advantages,
            **case.softmax(), **case.options(),
        )  # fmt: skip
        return out.loss * of_loss, _ratios(case, out.stats)

    is_fp32 = case.dtype == torch.float32
    logits_op = _through(_clean(case, head), from_logits) if is_fp32 else None
    first: list[_Result] = []

    def of_plan(options: _Options) -> dict[str, float]:
        def function(leaves: HeadTensors) -> _Outcome:
            out = policy_loss_from_hidden(
                leaves.hidden, leaves.weight, case.targets, case.old_log_probs, case.advantages,
                **leaves.options(), **case.softmax(), **case.options(), **options,
            )  # fmt: skip
            return out.loss * of_loss, {"loss": out.loss} | out.stats | _ratios(case, out.stats)

        ours = _through(head, function)
        first.append(ours)
        dhidden = ours.grads["dhidden"]
        ratio_errors = {n: worst(ours.values[n] - ratio) for n, ratio in exact_ratios.items()}
        quantities = {
            "loss": worst(ours.values["loss"] - exact.loss),
            **_as_allowed(case, ratio_errors, "ratio of a few tokens"),
            **_statistic_errors(case, ours.values, exact.stats),
            "clip decisions flipped": float((_any_in_row(dhidden) != alive).sum()),
            **expected.errors(ours.grads, expected.exact.grads),
            **_plans_apart(expected, ours, first[0]),
            "non-zeros in dead rows": non_zeros(dhidden[is_dead]),
            "bits that differ on repeat": _all_differing(ours, _through(head, function)),
        }
        if logits_op is None:
            return quantities
        errors = expected.errors(ours.grads, logits_op.grads)
        return quantities | {
            "ratio, logits op apart": worst(ours.values["ratio"] - logits_op.values["ratio"]),
            f"logits op apart{_kind(errors)}": largest(errors.values()),
        }

    return of_plan


def _of_loss_on_policy(case: Case, head: HeadTensors) -> _OfPlan:
    """Measure with old_log_probs=None, and with old log-probs that the same plan returned."""
    exact = exact_loss(case, None, torch.ones(()))
    expected = _expected(case, head, exact.g, exact.h)

    def of_plan(options: _Options) -> dict[str, float]:
        olds: list[Tensor | None] = [None]
        if options["plan"] != "chunk":
            with torch.no_grad():
                old_log_probs = log_probs_from_hidden(
                    head.hidden, head.weight, case.targets,
                    **head.options(), **case.softmax(), **options,
                )  # fmt: skip
            olds.append(old_log_probs)
        found = []
        for old in olds:

            def function(leaves: HeadTensors, old: Tensor | None = old) -> _Outcome:
                out = policy_loss_from_hidden(
                    leaves.hidden, leaves.weight, case.targets, old, case.advantages,
                    **leaves.options(), **case.softmax(), **case.options(), **options,
                )  # fmt: skip
                return out.loss, out.stats

            ours = _through(head, function)
            errors = expected.errors(ours.grads, expected.exact.grads)
            of_stats = _statistic_errors(case, ours.values, exact.stats)
            found.append(on_policy_errors(ours.values) | of_stats | errors)
        return {q: largest(errors[q] for errors in found) for q in found[0]}

    return of_plan


class _Result(NamedTuple):
    """Detached values, and gradients with respect to the head's tensors."""

    values: dict[str, Tensor]
    grads: dict[str, Tensor]


class _Exact(NamedTuple):
    """The results that another one is compared with."""

    exact: _Result
    eager: _Result  # from fp32 logits, gradients rounded to the dtype of their tensors
    is_real: bool

    def errors(self, grads: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, float]:
        """Return the distances between gradients, in the contract's measure for the dtypes."""
        errors = {name: relative(grads[name], others[name].double()) for name in grads}
        is_fp32 = all(grad.dtype == torch.float32 for grad in grads.values())
        if is_fp32 and not self.is_real:
            return {f"{name}, rel L2": error for name, error in errors.items()}
        factor = 2 if is_fp32 else ALLOWED
        of_eager = {n: relative(self.eager.grads[n], self.exact.grads[n]) for n in grads}
        allowed = {n: max(BOUNDS[f"{n}, rel L2"], factor * error) for n, error in of_eager.items()}
        return {f"{name} / allowed": error / allowed[name] for name, error in errors.items()}


def _through(head: HeadTensors, function: Callable[[HeadTensors], _Outcome]) -> _Result:
    """Return values of a function of a head, and gradients of the scalar that it returns first."""
    leaves = head.map(lambda x: x.clone().requires_grad_())
    leaves.weight.requires_grad_(leaves.lora_a is None)
    total, values = function(leaves)
    total.backward()
    named = [(name, x) for name, x in leaves._asdict().items() if x is not None]
    grads = {f"d{name}": x.grad for name, x in named if x.requires_grad}
    return _Result({name: value.detach() for name, value in values.items()}, grads)


def _expected(case: Case, head: HeadTensors, g: Tensor, h: Tensor | None = None) -> _Exact:
    """Compute log-probs, and the gradients of sums of log-probs times g and entropies times h."""
    clean = _clean(case, head)

    def plain(dtype: torch.dtype) -> Callable[[HeadTensors], _Outcome]:
        def function(leaves: HeadTensors) -> _Outcome:
            logits = leaves.logits(dtype)
            log_probs = reference.log_probs_from_logits(logits, case.targets, **case.softmax())
            if h is None:
                return (log_probs * g.to(dtype)).sum(), {"log_prob": log_probs}
            entropy = reference.entropy_from_logits(logits, case.targets, **case.softmax())
            values = {"log_prob": log_probs, "entropy": entropy}
            return (log_probs * g.to(dtype) + entropy * h.to(dtype)).sum(), values

        return function

    return _Exact(
        _through(clean.to(torch.float64), plain(torch.float64)),
        _through(clean, plain(torch.float32)),
        case.allowed is not None,
    )


def _clean(case: Case, head: HeadTensors) -> HeadTensors:
    """Replace the NaN of padding by 0: a plain product would carry it into dweight."""
    return head._replace(hidden=torch.where(case.valid.unsqueeze(-1), head.hidden, 0.0))


def _as_allowed(case: Case, errors: dict[str, float], name: str) -> dict[str, float]:
    """Replace the error of this name by its ratio to the allowed one, if the case has one."""
    if case.allowed is None:
        return errors
    others = {other: error for other, error in errors.items() if other != name}
    return {f"{name} / allowed": errors[name] / case.allowed} | others


def _statistic_errors(
    case: Case, stats: dict[str, Tensor], exact: dict[str, Tensor]
) -> dict[str, float]:
    errors = statistic_errors(stats, exact, " from hidden")
    return _as_allowed(case, errors, "statistics from hidden")


def _plans_apart(expected: _Exact, ours: _Result, first: _Result) -> dict[str, float]:
    errors = expected.errors(ours.grads, first.grads)
    apart = {f"plans apart{_kind(errors)}": largest(errors.values())}
    if "ratio" in ours.values:
        apart["ratio, plans apart"] = worst(ours.values["ratio"] - first.values["ratio"])
    return apart


def _kind(errors: dict[str, float]) -> str:
    """Return how gradients were compared, from the names of their errors."""
    return next(iter(errors)).removeprefix("dhidden")


def _ratios(case: Case, stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `ratio_of` of sequences, by the name of the bound that applies to their length."""
    ratio, has_few = ratio_of(stats), case.lengths < FEW
    return {"ratio": ratio[~has_few], "ratio of a few tokens": ratio[has_few]}


def _any_in_row(x: Tensor) -> Tensor:
    return (x != 0).any(-1)


def _all_differing(x: _Result, y: _Result) -> float:
    pairs = [*zip(x.values.values(), y.values.values(), strict=True)]
    pairs += zip(x.grads.values(), y.grads.values(), strict=True)
    return sum(differing(a, b) for a, b in pairs)
