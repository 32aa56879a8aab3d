"""Wrong calls and the errors that they raise. `pytest -s -k printed` prints the table."""

import math
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import gspo_ops
from gspo_ops import (
    GRPO,
    LoRA,
    log_probs_from_hidden,
    log_probs_from_logits,
    policy_loss_from_hidden,
    policy_loss_from_log_probs,
    policy_loss_from_logits,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
B, T, V, H = 2, 3, 5, 4
N = B * T

logits = torch.linspace(-2, 2, B * T * V).view(B, T, V)
hidden = torch.linspace(-1, 1, B * T * H).view(B, T, H)
weight = torch.linspace(-2, 2, V * H).view(V, H)
trained = weight.clone().requires_grad_()
lora = LoRA(torch.ones(2, H), torch.ones(V, 2), 0.5)
targets = torch.arange(N).view(B, T) % V
old = torch.full((B, T), -1.5)
advantages = torch.tensor([1.0, -1.0])
cu = torch.tensor([0, 2, N], dtype=torch.int32)
rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])


def from_logits(**changes):
    """Make a valid call, but with these changes."""
    args = {"logits": logits, "targets": targets, "old_log_probs": old, "advantages": advantages}
    return policy_loss_from_logits(**(args | changes))


def from_hidden(**changes):
    args = {"hidden": hidden, "weight": weight, "targets": targets, "old_log_probs": old,
            "advantages": advantages}  # fmt: skip
    return policy_loss_from_hidden(**(args | changes))


def hidden_log_probs(**changes):
    return log_probs_from_hidden(
        **({"hidden": hidden, "weight": weight, "targets": targets} | changes)
    )


def from_log_probs(**changes):
    args = {"log_probs": old, "old_log_probs": old, "advantages": advantages}
    return policy_loss_from_log_probs(**(args | changes))


def packed(**changes):
    args = {"log_probs": old.view(-1), "old_log_probs": old.view(-1), "cu_seqlens": cu}
    return from_log_probs(**(args | changes))


def scalar_objective(log_probs, old_log_probs, advantages, sequence_ids):
    return log_probs.sum()


def wrong_aggregation(log_probs, old_log_probs, advantages, sequence_ids):
    return log_probs


wrong_aggregation.aggregation = "mean"


class Wrong(NamedTuple):
    call: Callable[[], object]
    text: str
    error: type[Exception]
    message: str  # regex: the argument, what it was given, what is expected


def wrong(text: str, error: type[Exception], message: str) -> Wrong:
    """Return a row of the table; `text` is the call as Python code."""
    return Wrong(lambda: eval(text, vars(gspo_ops) | globals()), text, error, message)


WRONG = [
    # logits and targets
    wrong("log_probs_from_logits([1.0], targets)", TypeError,
          r"logits must be a .*Tensor, got list"),
    wrong("log_probs_from_logits(logits.int(), targets)", TypeError,
          r"logits must be float16, .*float64, got torch.int32"),
    wrong("log_probs_from_logits(logits[0, 0], targets[0, 0])", ValueError,
          r"logits must have shape \(B, T, V\) or \(N, V\), got \(5,\)"),
    wrong("log_probs_from_logits(logits[..., :0], targets)", ValueError,
          r"logits must have a non-empty vocabulary, got \(2, 3, 0\)"),
    wrong("log_probs_from_logits(logits.mT, targets)", ValueError,
          r"logits must be contiguous along the vocabulary, got strides \(15, 1, 5\)"),
    wrong("log_probs_from_logits(logits, targets[0])", ValueError,
          r"targets must have shape \(2, 3\).*got \(3,\)"),
    wrong("log_probs_from_logits(logits, targets.float())", TypeError,
          r"targets must be int32 or int64, got torch.float32"),
    wrong("log_probs_from_logits(logits, targets.to(torch.int8))", TypeError,
          r"targets must be int32 or int64, got torch.int8"),
    wrong("log_probs_from_logits(logits, targets.to('meta'))", ValueError,
          r"targets must be on cpu like the input, got meta"),
    wrong("log_probs_from_logits(logits, targets + 2)", IndexError,
          r"targets must lie in \[0, 5\).*got 5 at row 3"),
    wrong("log_probs_from_logits(logits, targets - 1)", IndexError,
          r"targets must lie in \[0, 5\).*got -1 at row 0 \(2 such rows\)"),
    wrong("from_logits(targets=targets - 100)", IndexError,
          r"targets must lie in \[0, 5\) where they count, got -100"),
    # hidden states and the head
    wrong("hidden_log_probs(hidden=[1.0])", TypeError, r"hidden must be a .*Tensor, got list"),
    wrong("hidden_log_probs(hidden=hidden.int())", TypeError,
          r"hidden must be float16, .*float64, got torch.int32"),
    wrong("hidden_log_probs(hidden=hidden[0, 0], targets=targets[0, 0])", ValueError,
          r"hidden must have shape \(B, T, H\) or \(N, H\), got \(4,\)"),
    wrong("hidden_log_probs(hidden=hidden.to_sparse())", ValueError,
          r"hidden must be a dense tensor, got torch.sparse_coo"),
    wrong("hidden_log_probs(weight=[1.0])", TypeError, r"weight must be a .*Tensor, got list"),
    wrong("hidden_log_probs(weight=weight.int())", TypeError,
          r"weight must be float16, .*float64, got torch.int32"),
    wrong("hidden_log_probs(weight=weight.T)", ValueError,
          r"weight must have shape \(V, 4\), H like hidden, got \(4, 5\)"),
    wrong("from_hidden(weight=weight[0])", ValueError,
          r"weight must have shape \(V, 4\), .*got \(4,\)"),
    wrong("from_hidden(hidden=hidden[..., :3])", ValueError,
          r"weight must have shape \(V, 3\), .*got \(5, 4\)"),
    wrong("from_hidden(weight=weight[:0])", ValueError,
          r"weight must not be empty, got \(0, 4\)"),
    wrong("from_hidden(weight=weight.to('meta'))", ValueError,
          r"weight must be on cpu like the input, got meta"),
    wrong("from_hidden(targets=targets.float())", TypeError,
          r"targets must be int32 or int64, got torch.float32"),
    wrong("from_hidden(targets=targets.view(-1))", ValueError,
          r"targets must have shape \(2, 3\), one per row of hidden, got \(6,\)"),
    wrong("hidden_log_probs(targets=targets + 2)", IndexError,
          r"targets must lie in \[0, 5\).*got 5 at row 3"),
    wrong("from_hidden(targets=targets - 1)", IndexError,
          r"targets must lie in \[0, 5\).*got -1 at row 0 \(2 such rows\)"),
    wrong("from_hidden(targets=targets + 2, plan='chunk', hidden=hidden.clone().requires_grad_())",
          IndexError, r"targets must lie in \[0, 5\).*got 5 at row"),
    wrong("from_hidden(bias=weight)", ValueError, r"bias must have shape \(5,\), got \(5, 4\)"),
    wrong("from_hidden(bias=2.0)", TypeError, r"bias must be a .*Tensor, got float"),
    wrong("hidden_log_probs(bias=torch.ones(5).int())", TypeError,
          r"bias must be float16, .*float64, got torch.int32"),
    wrong("from_hidden(lora=(lora.a, lora.b, 0.5))", TypeError,
          r"lora must be a LoRA\(a, b, scale\), got tuple"),
    wrong("from_hidden(lora=lora._replace(a=lora.a.T))", ValueError,
          r"lora.a must have shape \(4, 4\), got \(4, 2\)"),
    wrong("from_hidden(lora=lora._replace(a=lora.a[0]))", ValueError,
          r"lora.a must have shape \(r, H\), got \(4,\)"),
    wrong("from_hidden(lora=lora._replace(b=lora.b[:, :1]))", ValueError,
          r"lora.b must have shape \(5, 2\), got \(5, 1\)"),
    wrong("hidden_log_probs(lora=lora._replace(b=None))", TypeError,
          r"lora.b must be a .*Tensor, got NoneType"),
    wrong("hidden_log_probs(lora=lora._replace(scale='1'))", TypeError,
          r"lora.scale must be a number, got str"),
    wrong("hidden_log_probs(lora=lora._replace(scale=math.nan))", ValueError,
          r"lora.scale must be finite.*got nan"),
    wrong("from_hidden(lora=lora, weight=trained)", ValueError,
          r"weight requires grad, but a LoRA head trains a and b only"),
    wrong("from_hidden(plan='fast')", ValueError,
          r"plan must be one of 'auto', 'keep', 'chunk', 'recompute', got 'fast'"),
    wrong("from_hidden(plan=None)", ValueError, r"plan must be one of .*got None"),
    wrong("hidden_log_probs(plan='chunk')", ValueError,
          r"plan='chunk' needs a loss .*plan must be 'auto', 'keep' or 'recompute'"),
    wrong("from_hidden(memory_budget=-1)", ValueError, r"memory_budget must be >= 0 bytes, got -1"),
    wrong("hidden_log_probs(memory_budget=True)", TypeError,
          r"memory_budget must be an int, the number of bytes, got bool"),
    wrong("from_hidden(memory_budget=2.0**30)", TypeError,
          r"memory_budget must be an int, the number of bytes, got float"),
    wrong("from_hidden(products='cublas')", ValueError,
          r"products must be one of 'auto', 'mm', 'triton', got 'cublas'"),
    wrong("from_hidden(allow_sync=1)", TypeError, r"allow_sync must be a bool, got int"),
    wrong("from_hidden(main_grad=[0.0])", TypeError, r"main_grad must be a .*Tensor, got list"),
    wrong("from_hidden(weight=trained, main_grad=torch.zeros(V, H).bfloat16())", TypeError,
          r"main_grad must be float32, got torch.bfloat16"),
    wrong("from_hidden(weight=trained, main_grad=torch.zeros(H, V))", ValueError,
          r"main_grad must be contiguous with the weight's shape \(5, 4\), got \(4, 5\)"),
    wrong("from_hidden(weight=trained, main_grad=torch.zeros(H, V).T)", ValueError,
          r"main_grad must be contiguous .*strides \(1, 5\)"),
    wrong("from_hidden(weight=trained, main_grad=torch.zeros(V, H, requires_grad=True))",
          ValueError, r"main_grad requires grad, .*detach it"),
    wrong("from_hidden(main_grad=torch.zeros(V, H))", ValueError,
          r"main_grad is given, but weight does not require grad"),
    wrong("from_hidden(hidden=hidden.view(N, H), targets=targets.view(N), old_log_probs=None)",
          ValueError, r"cu_seqlens is needed for packed input"),
    wrong("from_hidden(cu_seqlens=cu)", ValueError, r"cu_seqlens is for packed input"),
    wrong("from_hidden(old_log_probs=old.bfloat16())", TypeError,
          r"old_log_probs must be float32 or float64, got torch.bfloat16: .*clip range"),
    wrong("from_hidden(temperature=0)", ValueError, r"temperature must be finite and > 0, got 0"),
    wrong("from_hidden(softcap=-1.0)", ValueError, r"softcap must be finite and > 0, got -1.0"),
    wrong("hidden_log_probs(return_entropy='yes')", TypeError,
          r"return_entropy must be a bool, got str"),
    wrong("from_hidden(objective=scalar_objective)", ValueError,
          r"objective must return one loss term per token, shape \(6,\), got \(\)"),
    wrong("from_hidden(objective=lambda *a: (a[0], None, None))", ValueError,
          r"objective must return one loss term per token, shape \(6,\), got tuple"),
    wrong("from_hidden(objective='GSPO')", TypeError, r"objective must be an Objective.*got str"),
    wrong("plan_from_hidden(hidden, weight.T)", ValueError,
          r"weight must have shape \(V, 4\), H like hidden, got \(4, 5\)"),
    wrong("plan_from_hidden(hidden, weight, plan='best')", ValueError,
          r"plan must be one of .*got 'best'"),
    wrong("plan_from_hidden(hidden, weight, memory_budget='1G')", TypeError,
          r"memory_budget must be an int, the number of bytes, got str"),
    # options of the softmax
    wrong("log_probs_from_logits(logits, targets, temperature=0)", ValueError,
          r"temperature must be finite and > 0, got 0"),
    wrong("from_logits(temperature=-1.0)", ValueError,
          r"temperature must be finite and > 0, got -1.0"),
    wrong("from_logits(temperature=math.nan)", ValueError, r"temperature must be finite.*got nan"),
    wrong("from_logits(temperature=math.inf)", ValueError, r"temperature must be finite.*got inf"),
    wrong("from_logits(temperature='1')", TypeError, r"temperature must be a number, got str"),
    wrong("from_logits(temperature=torch.tensor(1.0))", TypeError,
          r"temperature must be a number, got Tensor"),
    wrong("from_logits(softcap=0)", ValueError, r"softcap must be finite and > 0, got 0"),
    wrong("log_probs_from_logits(logits, targets, softcap=-30.0)", ValueError,
          r"softcap must be finite and > 0, got -30.0"),
    wrong("from_logits(return_entropy='yes')", TypeError,
          r"return_entropy must be a bool, got str"),
    # layout
    wrong("from_log_probs(log_probs=logits)", ValueError,
          r"log_probs must be padded \(B, T\) or packed \(N,\) tokens, got \(2, 3, 5\)"),
    wrong("from_log_probs(mask=old < 0, cu_seqlens=cu)", ValueError,
          r"cu_seqlens is for packed input of shape \(N,\); this input is padded, \(2, 3\)"),
    wrong("packed(cu_seqlens=None)", ValueError, r"cu_seqlens is needed for packed input"),
    wrong("packed(cu_seqlens=[0, 2, 6])", TypeError, r"cu_seqlens must be a .*Tensor, got list"),
    wrong("packed(cu_seqlens=cu.float())", TypeError,
          r"cu_seqlens must be int32 or int64, got torch.float32"),
    wrong("packed(cu_seqlens=cu[None])", ValueError,
          r"cu_seqlens must have shape \(B \+ 1,\), got \(1, 3\)"),
    wrong("packed(cu_seqlens=cu[:0])", ValueError,
          r"cu_seqlens must have shape \(B \+ 1,\), got \(0,\)"),
    wrong("packed(cu_seqlens=cu.to('meta'))", ValueError, r"cu_seqlens must be on cpu.*got meta"),
    wrong("packed(cu_seqlens=cu[::2])", ValueError,
          r"advantages must have shape \(1,\) \(one per sequence\) .*got \(2,\)"),
    wrong("packed(cu_seqlens=cu + 1)", ValueError,
          r"cu_seqlens must be non-decreasing from 0 to N=6.*got \[1, 3, 7\]"),
    wrong("packed(cu_seqlens=cu - 1)", ValueError,
          r"cu_seqlens must be non-decreasing from 0 to N=6.*got \[-1, 1, 5\]"),
    wrong("packed(cu_seqlens=torch.tensor([0, 7, 6]))", ValueError,
          r"cu_seqlens must be non-decreasing from 0 to N=6, got \[0, 7, 6\]"),
    wrong("packed(cu_seqlens=torch.tensor([0, 2, 5]))", ValueError,
          r"cu_seqlens must be non-decreasing from 0 to N=6.*got \[0, 2, 5\]"),
    wrong("from_log_probs(mask=[1, 1])", TypeError, r"mask must be a .*Tensor, got list"),
    wrong("from_log_probs(mask=torch.ones(2))", ValueError,
          r"mask must have shape \(2, 3\), got \(2,\)"),
    wrong("from_log_probs(mask=torch.full((2, 3), 0.5))", ValueError,
          r"mask must contain only 0 and 1"),
    wrong("from_log_probs(mask=torch.full((2, 3), 2))", ValueError,
          r"mask must contain only 0 and 1"),
    wrong("from_log_probs(mask=old + 0j)", TypeError, r"mask must be .*float, got torch.complex64"),
    wrong("from_log_probs(mask=torch.ones(2, 3).to_sparse())", ValueError,
          r"mask must be a dense tensor, got torch.sparse_coo"),
    # log-probs
    wrong("from_log_probs(log_probs=old.bfloat16())", TypeError,
          r"log_probs must be float32 or float64, got torch.bfloat16: .*clip range"),
    wrong("from_logits(old_log_probs=old.bfloat16())", TypeError,
          r"old_log_probs must be float32 or float64, got torch.bfloat16: .*clip range"),
    wrong("from_log_probs(ref_log_probs=old.bfloat16())", TypeError,
          r"ref_log_probs must be float32 or float64, got torch.bfloat16"),
    wrong("from_logits(old_log_probs=old.half())", TypeError,
          r"old_log_probs must be float32 or float64, got torch.float16"),
    wrong("from_logits(old_log_probs=old.view(-1))", ValueError,
          r"old_log_probs must have shape \(2, 3\), got \(6,\)"),
    wrong("from_logits(old_log_probs=old.to('meta'))", ValueError,
          r"old_log_probs must be on cpu like the input, got meta"),
    wrong("from_log_probs(old_log_probs=old.clone().requires_grad_())", ValueError,
          r"old_log_probs requires grad, .*detach it"),
    wrong("from_log_probs(ref_log_probs=old[:1])", ValueError,
          r"ref_log_probs must have shape \(2, 3\), got \(1, 3\)"),
    # advantages, weights, denominator
    wrong("from_logits(advantages=[1.0, 2.0])", TypeError,
          r"advantages must be a .*Tensor, got list"),
    wrong("from_logits(advantages=torch.ones(3))", ValueError,
          r"advantages must have shape \(2,\) .*or \(2, 3\) .*got \(3,\)"),
    wrong("from_logits(advantages=old)", ValueError,
          r"advantages must have shape \(2,\) .*'sequence', got one per token: use GSPOToken"),
    wrong("packed(advantages=old.view(-1))", ValueError,
          r"advantages must have shape \(2,\) .*'sequence', got one per token: use GSPOToken"),
    wrong("from_logits(advantages=advantages.clone().requires_grad_())", ValueError,
          r"advantages requires grad, .*detach it"),
    wrong("from_logits(advantages=advantages > 0)", TypeError,
          r"advantages must hold real numbers, got torch.bool"),
    wrong("from_logits(advantages=advantages.to('meta'))", ValueError,
          r"advantages must be on cpu like the input, got meta"),
    wrong("from_logits(rollout_weights=torch.ones(4))", ValueError,
          r"rollout_weights must have shape \(2,\) .*or \(2, 3\) .*got \(4,\)"),
    wrong("from_logits(rollout_weights=2.0)", TypeError,
          r"rollout_weights must be a .*Tensor, got float"),
    wrong("from_logits(rollout_weights=torch.ones(2, requires_grad=True))", ValueError,
          r"rollout_weights requires grad, .*detach it"),
    wrong("from_logits(denominator=0)", ValueError, r"denominator must be finite and > 0, got 0"),
    wrong("from_logits(denominator=-2.0)", ValueError,
          r"denominator must be finite and > 0, got -2.0"),
    wrong("from_logits(denominator='2')", TypeError, r"denominator must be a number, got str"),
    wrong("from_logits(denominator=torch.ones(1))", ValueError,
          r"denominator must be a number or a 0-dim tensor, got \(1,\)"),
    wrong("from_logits(denominator=torch.tensor(0.0))", ValueError,
          r"denominator must be > 0, got 0"),
    wrong("from_logits(denominator=torch.tensor(-4))", ValueError,
          r"denominator must be > 0, got -4"),
    # objectives
    wrong("from_logits(objective='GSPO')", TypeError, r"objective must be an Objective.*got str"),
    wrong("from_logits(objective=GSPO)", TypeError,
          r"objective must be an Objective, as in GSPO\(\).*got <class .*GSPO"),
    wrong("from_logits(objective=scalar_objective)", ValueError,
          r"objective must return one loss term per token, shape \(6,\), got \(\)"),
    wrong("from_logits(objective=lambda *a: None)", ValueError,
          r"objective must return one loss term per token, shape \(6,\), got NoneType"),
    wrong("from_logits(objective=wrong_aggregation)", ValueError,
          r"aggregation must be one of .*'token-sum', got 'mean'"),
    wrong("from_logits(objective=lambda *a: (a[0], a[0]))", ValueError,
          r"a bool tensor of shape \(6,\) that marks the clipped ones, got torch.float32"),
    wrong("from_logits(objective=lambda *a: (a[0], a[0][:2] > 0))", ValueError,
          r"a bool tensor of shape \(6,\) that marks .* got torch.bool \(2,\) as the second"),
    wrong("from_log_probs(objective=lambda *a: a[0], ref_log_probs=old)", ValueError,
          r"ref_log_probs is given, but the function as objective has no parameter of this name"),
    wrong("from_logits(objective=GRPO(kl_coef=0.1))", ValueError,
          r"ref_log_probs is needed for kl_coef=0.1"),
    wrong("Objective(ratio_level='group', clip_low=0.1, clip_high=0.1)", ValueError,
          r"ratio_level must be one of 'sequence', .*got 'group'"),
    wrong("Objective(clip_low=0.1)", TypeError, r"ratio_level"),
    wrong("GSPO(ratio_level='token')", TypeError, r"unexpected keyword argument 'ratio_level'"),
    wrong("GSPO(aggregation='mean')", ValueError,
          r"aggregation must be one of 'seq-mean-token-mean', .*got 'mean'"),
    wrong("GRPO(kl_estimator='k4')", ValueError,
          r"kl_estimator must be one of 'k1', .*got 'k4'"),
    wrong("GSPO(clip_low=-3e-4)", ValueError, r"clip_low must be finite and >= 0, got -0.0003"),
    wrong("GSPOToken(clip_high=-4e-4)", ValueError,
          r"clip_high must be >= 0, got -0.0004"),
    wrong("GRPO(clip_high=None)", TypeError, r"clip_high must be a number, got NoneType"),
    wrong("GRPO(kl_coef=-0.1)", ValueError, r"kl_coef must be finite and >= 0, got -0.1"),
    # group advantages
    wrong("group_advantages([1.0, 0.0], 2)", TypeError, r"rewards must be a .*Tensor, got list"),
    wrong("group_advantages(rewards.view(2, 3), 3)", ValueError,
          r"rewards must be real, of shape \(B,\), got .*\(2, 3\)"),
    wrong("group_advantages(rewards)", ValueError,
          r"one of group_size and group_ids must be given"),
    wrong("group_advantages(rewards, 2, group_ids=torch.zeros(6).long())", ValueError,
          r"exactly one of group_size and group_ids must be given"),
    wrong("group_advantages(rewards, 4)", ValueError,
          r"group_size must be positive and divide the 6 rewards, got 4"),
    wrong("group_advantages(rewards, 0)", ValueError, r"group_size must be positive .*got 0"),
    wrong("group_advantages(rewards, 2.0)", TypeError, r"group_size must be an int, got float"),
    wrong("group_advantages(rewards, group_ids=rewards)", TypeError,
          r"group_ids must be integers, got torch.float32"),
    wrong("group_advantages(rewards, group_ids=torch.zeros(5).long())", ValueError,
          r"group_ids must have shape \(6,\) .*got \(5,\)"),
    wrong("group_advantages(rewards, 2, eps=-1e-6)", ValueError,
          r"eps must be finite and >= 0, got -1e-06"),
]  # fmt: skip


def message_of(row: Wrong) -> str:
    with pytest.raises(row.error) as caught:
        row.call()
    assert caught.type is row.error
    return str(caught.value)


@pytest.mark.skipif(INTERPRETED, reason="the kernels don't check values, which would need a sync")
@pytest.mark.parametrize("row", WRONG, ids=[row.text for row in WRONG])
def test_wrong_call_is_refused_by_name(row):
    message = message_of(row)
    assert re.search(row.message, message, re.DOTALL), message


@pytest.mark.skipif(INTERPRETED, reason="the kernels don't check values, which would need a sync")
def test_good_calls_are_the_baseline():
    for call in (from_logits, from_hidden, from_log_probs, packed):
        assert call().loss.isfinite()
    assert len({row.text for row in WRONG}) == len(WRONG) >= 40


def markdown_table() -> str:
    rows = (f"| `{row.text}` | {row.error.__name__} | {message_of(row)} |" for row in WRONG)
    return "\n".join(["| call | error | message |", "|---|---|---|", *rows])


@pytest.mark.skipif(INTERPRETED, reason="the kernels don't check values, which would need a sync")
def test_printed_table():
    print(f"\n{markdown_table()}")


# Values that only the CPU can check without a sync

OUT_OF_RANGE = [V, V + 1000, -1, -100, 2**31 + 1]


def with_wrong_target(value: int, device: torch.device | str = "cpu") -> torch.Tensor:
    wrong = targets.clone()
    wrong[1, 0] = value
    return wrong.to(device)


@pytest.mark.skipif(INTERPRETED, reason="only the CPU path raises IndexError; see the test below")
@pytest.mark.parametrize("value", OUT_OF_RANGE)
@pytest.mark.parametrize("start", ["logits", "hidden"])
def test_on_policy_target_out_of_range_is_refused(start, value):
    """A wrong target is refused, if only in the backward: the forward does not read the logits."""
    call, x = {"logits": (from_logits, logits), "hidden": (from_hidden, hidden)}[start]
    leaf = x.clone().requires_grad_()
    with pytest.raises(IndexError, match=rf"targets must lie in \[0, 5\) .*got {value} at row 3"):
        call(**{start: leaf}, targets=with_wrong_target(value), old_log_probs=None).loss.backward()
    assert leaf.grad is None


@pytest.mark.kernels
@pytest.mark.parametrize("value", OUT_OF_RANGE)
@pytest.mark.parametrize("on_policy", [False, True], ids=["off_policy", "on_policy"])
def test_kernels_answer_a_target_out_of_range_with_nan(value, on_policy, device):
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("refused on CPU")
    leaf = logits.to(device, copy=True).requires_grad_()
    wrong = with_wrong_target(value, device)
    if value != -100:
        log_probs = log_probs_from_logits(leaf, wrong)
        assert log_probs.isnan().nonzero().tolist() == [[1, 0]]
        (grad,) = torch.autograd.grad(log_probs.sum(), leaf)
        assert grad[1, 0].isnan().all()
        assert grad.isnan().sum() == V
    result = from_logits(
        logits=leaf, targets=wrong, advantages=advantages.to(device), objective=GRPO(),
        old_log_probs=None if on_policy else old.to(device),
    )  # fmt: skip
    assert on_policy or result.loss.isnan()
    (grad,) = torch.autograd.grad(result.loss, leaf)
    assert grad[1, 0].isnan().all()


@pytest.mark.kernels
@pytest.mark.parametrize("call", [from_logits, from_hidden], ids=["logits", "hidden"])
def test_masked_targets_may_be_anything(call, device):
    mask = torch.ones(B, T, device=device)
    mask[1, 0] = 0
    losses = []
    for value in [0, *OUT_OF_RANGE]:
        leaf = (logits if call is from_logits else hidden).to(device, copy=True).requires_grad_()
        start = {"logits": leaf} if call is from_logits else {
            "hidden": leaf, "weight": weight.to(device)
        }  # fmt: skip
        result = call(
            **start, targets=with_wrong_target(value, device), mask=mask,
            old_log_probs=old.to(device), advantages=advantages.to(device),
        )  # fmt: skip
        result.loss.backward()
        assert leaf.grad[1, 0].count_nonzero() == 0
        losses.append((result.loss.item(), leaf.grad.sum().item()))
    assert len(set(losses)) == 1
    assert math.isfinite(losses[0][0])


@pytest.mark.kernels
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_kernels_answer_a_wrong_denominator_with_nan(value, device):
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("refused on CPU")
    leaf = logits.to(device, copy=True).requires_grad_()
    result = from_logits(
        logits=leaf, targets=targets.to(device), old_log_probs=old.to(device),
        advantages=advantages.to(device), objective=GRPO(),
        denominator=torch.tensor(value, device=device),
    )  # fmt: skip
    assert result.loss.isnan()
    assert torch.autograd.grad(result.loss, leaf)[0].isnan().any()
