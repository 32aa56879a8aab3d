"""Recipes of docs/integrations.md for trainers that aren't installed here: their code, called as
slime and NeMo-RL call it, beside the float64 reference."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from gspo_ops import GSPO, reference
from gspo_ops.testing import relative

DOCUMENT = "docs/integrations.md"
LOW, HIGH = 3e-4, 4e-4
# mean log-ratios: clipped above, inside, clipped below, inside, beyond exp(88), a masked sequence
SHIFTS = (5e-4, 3.5e-4, -5e-4, -2e-4, 100.0, 1e-4)
ADVANTAGES = (1.0, -0.7, -1.3, 0.4, 0.9, 2.0)
CLIPPED = (0, 2, 4)
ROUNDING = 2e-6
UPSTREAM = -1.7


def run(code, modules):
    """The names that a block of code makes, with these in the place of packages."""
    stand_ins = {}
    for name, content in modules.items():
        parents = name.split(".")
        for depth in range(1, len(parents)):
            stand_ins.setdefault(".".join(parents[:depth]), ModuleType(parents[depth - 1]))
        stand_ins[name] = ModuleType(name)
        vars(stand_ins[name]).update(content)
    scope = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        exec(code, scope)
    return scope


# slime: f(args, batch, logits[1, T, V / tp], sum_of_sample_mean)

PROMPTS, RESPONSES = (2, 3, 1, 4, 2, 1), (4, 1, 5, 3, 2, 3)
VOCAB, PADDING, TEMPERATURE = 24, 5, 0.8
REFUSED = (
    "use_kl_loss", "use_tis", "use_opsm", "entropy_coef", "calculate_per_token_loss"
)  # fmt: skip


def make_slime_batch():
    """logits (1, T, V) with slime's padding at the end, and the batch without old log-probs."""
    generator = torch.Generator().manual_seed(0)
    total = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    tokens = [torch.randint(VOCAB, (n,), generator=generator) for n in total]
    masks = [torch.ones(n, dtype=torch.int) for n in RESPONSES]
    masks[2][1:3] = 0  # a tool's tokens
    masks[5][:] = 0
    batch = {
        "unconcat_tokens": tokens, "total_lengths": total, "response_lengths": list(RESPONSES),
        "loss_masks": masks, "rollout_log_probs": None,
        "advantages": [torch.full((n,), a) for n, a in zip(RESPONSES, ADVANTAGES, strict=True)],
    }  # fmt: skip
    return torch.randn(1, sum(total) + PADDING, VOCAB, generator=generator) * 3, batch


def slime_reference(logits, batch, old=None):
    """Padded, one response after another: the sum of GSPO's terms, and the responses' log-probs."""
    losses, log_probs, end = [], [], 0
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        first, end = end + prompt - 1, end + prompt + response
        rows, targets = logits[0, first : end - 1], batch["unconcat_tokens"][i][prompt:]
        log_probs.append(
            reference.log_probs_from_logits(rows, targets, temperature=TEMPERATURE).detach()
        )
        if old is not None:
            advantage = torch.tensor([ADVANTAGES[i]], dtype=torch.float64)
            loss, _ = reference.policy_loss_from_logits(
                rows[None], targets[None], old[i][None].double(), advantage,
                mask=batch["loss_masks"][i][None], temperature=TEMPERATURE, denominator=1.0,
                objective=GSPO(clip_low=LOW, clip_high=HIGH),
            )  # fmt: skip
            losses.append(loss)
    return sum(losses), log_probs


def slime_arguments(**options):
    defaults = {
        "eps_clip": LOW, "eps_clip_high": HIGH, "rollout_temperature": TEMPERATURE,
        "use_rollout_logprobs": False, **dict.fromkeys(REFUSED, 0),
    }  # fmt: skip
    return SimpleNamespace(**defaults | options)


@pytest.mark.parametrize("source", ["log_probs", "rollout_log_probs", "on-policy"])
@pytest.mark.parametrize("size", [1, 2])
def test_slime(ranks, python_blocks, size, source):
    (code,) = python_blocks(DOCUMENT)["slime"]
    ranks(size)(on_rank_slime, code, source)


def on_rank_slime(code, source):
    """Each rank its part of the vocabulary."""
    mpu = SimpleNamespace(get_tensor_model_parallel_group=lambda: dist.group.WORLD)
    gspo_loss = run(code, {"megatron.core": {"mpu": mpu}})["gspo_loss"]
    logits, batch = make_slime_batch()
    exact = logits.double().requires_grad_()
    _, old = slime_reference(exact, batch)
    if source != "on-policy":
        old = [(x - shift).float() for x, shift in zip(old, SHIFTS, strict=True)]
        batch[source] = old
    expected, _ = slime_reference(exact, batch, old)
    (UPSTREAM * expected).backward()
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = logits.chunk(size, dim=-1)[rank].clone().requires_grad_()
    arguments = slime_arguments(use_rollout_logprobs=source == "rollout_log_probs")
    loss, metrics = gspo_loss(arguments, batch, mine, lambda x: None)
    (UPSTREAM * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=ROUNDING)
    expected_grad = exact.grad.chunk(size, dim=-1)[rank]
    assert relative(mine.grad, expected_grad) <= ROUNDING
    assert torch.equal((mine.grad == 0).all(-1), (expected_grad == 0).all(-1))
    # as slime puts them together
    values = torch.tensor([0, *metrics.values()])
    assert values[1] == loss
    is_on_policy = source == "on-policy"
    assert values[2] == (0 if is_on_policy else len(CLIPPED))
    shift = 0.0 if is_on_policy else sum(SHIFTS[:-1])
    assert values[3].item() == pytest.approx(-shift, rel=1e-5)


def test_slime_refuses_what_it_does_not_do(python_blocks):
    (code,) = python_blocks(DOCUMENT)["slime"]
    mpu = SimpleNamespace(get_tensor_model_parallel_group=lambda: None)
    gspo_loss = run(code, {"megatron.core": {"mpu": mpu}})["gspo_loss"]
    logits, batch = make_slime_batch()
    for name in REFUSED:
        with pytest.raises(ValueError, match=f"{name}=True is not supported"):
            gspo_loss(slime_arguments(**{name: True}), batch, logits, None)
    with pytest.raises(ValueError, match="targets must have shape"):  # context parallelism
        gspo_loss(slime_arguments(), batch, logits[:, : logits.shape[1] // 2], None)


# NeMo-RL: f(next_token_logprobs, data, global_valid_seqs, global_valid_toks)


class ClippedPGLossFn:
    """What NeMo-RL's has and does with these settings, in its own words no more than needed."""

    def __init__(self, cfg, use_fused_linear_logprobs=False):
        vars(self).update(vars(cfg), use_fused_linear_logprobs=use_fused_linear_logprobs)

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask, advantages = data["token_mask"][:, 1:], data["advantages"][:, 1:]
        difference = (next_token_logprobs - data["prev_logprobs"][:, 1:]) * mask
        ratio = (difference.sum(-1) / mask.sum(-1).clamp(min=1)).exp()[:, None]
        clipped = ratio.clamp(1 - self.ratio_clip_min, 1 + self.ratio_clip_max)
        terms = torch.maximum(-advantages * ratio, -advantages * clipped) * mask
        means = terms.sum(-1) / mask.sum(-1).clamp(min=1)
        loss = (means * data["sample_mask"]).sum() / global_valid_seqs
        return loss, {"loss": loss.item(), "token_mult_prob_error": 1.0, "grad": loss.requires_grad}


def nemo_config(**options):
    return SimpleNamespace(
        **{
            "sequence_level_importance_ratios": True, "reference_policy_kl_penalty": 0,
            "use_importance_sampling_correction": False, "ratio_clip_c": None,
            "ratio_clip_min": LOW, "ratio_clip_max": HIGH, **options,
        }
    )  # fmt: skip


def make_nemo_batch(dtype):
    """(B, S) as NeMo-RL has them, of which a loss takes [:, 1:]."""
    generator = torch.Generator().manual_seed(0)
    batch, length = len(SHIFTS), 9
    token_mask = torch.ones(batch, length)
    for i, prompt in enumerate(PROMPTS):
        token_mask[i, :prompt] = 0
        token_mask[i, prompt + RESPONSES[i] :] = 0
    sample_mask = torch.ones(batch)
    sample_mask[-1] = 0
    log_probs = -5 * torch.rand(batch, length, generator=generator, dtype=torch.float64)
    previous = log_probs - torch.tensor(SHIFTS, dtype=torch.float64)[:, None]
    advantages = torch.tensor(ADVANTAGES)[:, None].expand(batch, length)
    data = {
        "token_mask": token_mask, "sample_mask": sample_mask,
        "prev_logprobs": previous.to(dtype), "advantages": advantages.to(dtype),
    }  # fmt: skip
    return log_probs[:, 1:].to(dtype), data


@pytest.fixture
def gspo_loss_fn(python_blocks):
    (code,) = python_blocks(DOCUMENT)["NeMo-RL"]
    return run(code, {"nemo_rl.algorithms.loss": {"ClippedPGLossFn": ClippedPGLossFn}})[
        "GSPOLossFn"
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_nemo_rl(gspo_loss_fn, packed):
    """The whole batch, or one sequence at a time, as where they are packed."""
    log_probs, data = make_nemo_batch(torch.float32)
    seqs, toks = torch.tensor(11.0), torch.tensor(123.0)  # of all micro-batches and ranks
    exact = log_probs.double().requires_grad_()
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    expected, _ = reference.policy_loss_from_log_probs(
        exact, data["prev_logprobs"][:, 1:].double(), torch.tensor(ADVANTAGES).double(), mask=mask,
        objective=GSPO(clip_low=LOW, clip_high=HIGH), denominator=11.0,
    )  # fmt: skip
    (UPSTREAM * expected).backward()
    log_probs = torch.where(mask == 0, torch.nan, log_probs).requires_grad_()
    loss_fn = gspo_loss_fn(nemo_config(), use_fused_linear_logprobs=True)
    assert loss_fn.use_fused_linear_logprobs
    rows = [slice(i, i + 1) for i in range(len(SHIFTS))] if packed else [slice(None)]
    loss = 0
    for part in rows:
        found, metrics = loss_fn(
            next_token_logprobs=log_probs[part], data={name: x[part] for name, x in data.items()},
            global_valid_seqs=seqs, global_valid_toks=toks,
        )  # fmt: skip
        assert metrics == {"loss": found.item(), "token_mult_prob_error": 1.0, "grad": False}
        loss += found
    (UPSTREAM * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=ROUNDING)
    assert relative(log_probs.grad, exact.grad) <= ROUNDING
    assert torch.equal(log_probs.grad == 0, exact.grad == 0)


def test_nemo_rl_before_and_after(gspo_loss_fn):
    """Where NeMo-RL's does not overflow; the loss knows a clip range to fp32 rounding."""
    log_probs, data = make_nemo_batch(torch.float64)
    data["prev_logprobs"][4] = data["prev_logprobs"][3]
    results = []
    for kind in (ClippedPGLossFn, gspo_loss_fn):
        x = log_probs.clone().requires_grad_()
        loss, _ = kind(nemo_config())(x, data, torch.tensor(11.0), torch.tensor(123.0))
        (UPSTREAM * loss).backward()
        results.append((loss.detach(), x.grad))
    for before, after, tolerance in zip(*results, (1e-7, 1e-14), strict=True):
        torch.testing.assert_close(after, before, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_level_importance_ratios": False}, {"reference_policy_kl_penalty": 0.01},
        {"use_importance_sampling_correction": True}, {"ratio_clip_c": 3.0},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_nemo_rl_refuses_what_it_does_not_do(gspo_loss_fn, options):
    with pytest.raises(ValueError, match="GSPOLossFn is"):
        gspo_loss_fn(nemo_config(**options))
