"""The recipes of docs/integrations.md for slime and NeMo-RL, which aren't installed here.

Their code is called as these trainers call it, and compared with the float64 reference.
"""

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
    """Run a block of code with these modules in place of packages; return the names it defines."""
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


def make_slime_batch():
    """Return logits (1, T, V) with slime's final padding, and a batch without old log-probs."""
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


def make_reducer(batch, per_token=False, of_rollouts=None):
    """Return slime's average over the tokens of concatenated responses."""
    masks = batch["loss_masks"]
    counts = [max(int(m.sum()), 1) for m in masks] if of_rollouts is None else of_rollouts

    def reduce(x):
        parts = x.split(batch["response_lengths"])
        sums = [(part * m).sum() for part, m in zip(parts, masks, strict=True)]
        return sum(sums) if per_token else sum(s / n for s, n in zip(sums, counts, strict=True))

    return reduce


def of_responses(logits, batch):
    """Return log-probs and entropies of the concatenated responses."""
    found, end = [], 0
    for prompt, response, tokens in zip(PROMPTS, RESPONSES, batch["unconcat_tokens"], strict=True):
        first, end = end + prompt - 1, end + prompt + response
        rows, targets = logits[0, first : end - 1], tokens[prompt:]
        of_rows = (reference.log_probs_from_logits, reference.entropy_from_logits)
        found.append([f(rows, targets, temperature=TEMPERATURE) for f in of_rows])
    return (torch.cat(x) for x in zip(*found, strict=True))


def approx_kl(log_probs, ref, kl_loss_type, importance_ratio=None):
    """Compute KL as slime's compute_approx_kl does: it clamps the product."""
    d = log_probs - ref
    kl = {"k1": d, "k2": d.square() / 2}.get(kl_loss_type, (-d).exp() - 1 + d)
    kl = kl if importance_ratio is None else importance_ratio * kl
    return kl.clamp(-10, 10) if kl_loss_type == "low_var_kl" else kl


def loss_of_slime(args, batch, logits, mean):
    """Compute slime's loss and some of its metrics, with no more of its code than needed."""
    new, entropy = of_responses(logits, batch)
    dtype, lengths = new.dtype, batch["response_lengths"]
    A, mask = torch.cat(batch["advantages"]).to(dtype), torch.cat(batch["loss_masks"])

    def given(name):
        return torch.cat(batch[name]).to(dtype) if batch.get(name) else new.detach()

    def of_sequences(x):
        pairs = zip(x.split(lengths), batch["loss_masks"], strict=True)
        means = [part[m != 0].sum() / max(int(m.sum()), 1) for part, m in pairs]
        return torch.stack(means).repeat_interleave(torch.tensor(lengths))

    old = given("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
    log_ratio = new - old
    if args.advantage_estimator == "gspo":
        log_ratio = of_sequences(log_ratio)
    r, low, high = log_ratio.exp(), 1 - args.eps_clip, 1 + args.eps_clip_high
    if args.pg_loss_type == "reinforce":
        terms, stops = -A * new, torch.zeros_like(mask)
    elif args.pg_loss_type == "cispo":
        terms, stops = -A * r.detach().clamp(low, high) * new, (r < low) | (r > high)
    else:
        terms = torch.maximum(-A * r, -A * r.clamp(low, high))
        stops = -A * r.clamp(low, high) > -A * r
        if args.eps_clip_c:
            terms = torch.where(A < 0, torch.minimum(terms, -A * args.eps_clip_c), terms)
    if args.use_opsm:
        terms = terms * ~((A < 0) & (of_sequences(old - new) > args.opsm_delta))
    if args.use_tis:
        trained = new.detach() if args.pg_loss_type == "reinforce" else given("log_probs")
        w = (trained - given("rollout_log_probs")).exp()
        terms = terms * w.clamp(args.tis_clip_low, args.tis_clip)
    loss = pg_loss = mean(terms.where(mask != 0, 0.0))
    loss = loss - args.entropy_coef * mean(entropy)
    if args.use_kl_loss:
        ratio = (new - old).exp() if args.use_unbiased_kl else None
        kl = approx_kl(new, given("ref_log_probs"), args.kl_loss_type, ratio)
        loss = loss + args.kl_loss_coef * mean(kl)
    metrics = {"loss": loss, "pg_loss": pg_loss, "entropy_loss": mean(entropy),
               "pg_clipfrac": mean(stops.to(dtype)), "ppo_kl": mean(old - new)}  # fmt: skip
    return loss, metrics


def slime_arguments(**options):
    defaults = {
        "advantage_estimator": "gspo", "pg_loss_type": "ppo", "eps_clip": LOW,
        "eps_clip_high": HIGH, "eps_clip_c": None, "rollout_temperature": TEMPERATURE,
        "rollout_top_p": 1.0, "use_rollout_logprobs": False, "use_kl_loss": False,
        "kl_loss_type": "k3", "kl_loss_coef": 0.3, "use_unbiased_kl": False, "entropy_coef": 0.0,
        "use_tis": False, "tis_clip_low": 0.0, "tis_clip": 1.2, "use_opsm": False,
        "opsm_delta": 0.1, "use_score_centering": False, "get_mismatch_metrics": False,
        "custom_tis_function_path": None,
    }  # fmt: skip
    return SimpleNamespace(**defaults | options)


def make_slime_loss(code, group=None, ranks_of_context=1):
    mpu = SimpleNamespace(
        get_tensor_model_parallel_group=lambda: group,
        get_context_parallel_world_size=lambda: ranks_of_context,
    )
    modules = {
        "megatron.core": {"mpu": mpu},
        "slime.backends.megatron_utils.loss": {"policy_loss_function": loss_of_slime},
        "slime.utils.ppo_utils": {
            "compute_approx_kl": approx_kl, "get_pg_loss_type": lambda args: args.pg_loss_type,
        },
    }  # fmt: skip
    return run(code, modules)["policy_loss"]


@pytest.mark.example("docs/integrations.md", "slime")
@pytest.mark.parametrize("source", ["log_probs", "rollout_log_probs", "on-policy"])
@pytest.mark.parametrize("size", [1, 2])
def test_slime(ranks, python_blocks, size, source):
    (code,) = python_blocks(DOCUMENT)["slime"]
    ranks(size)(on_rank_slime, code, source)


def on_rank_slime(code, source):
    """Each rank has its part of the vocabulary; one ratio is beyond exp(88)."""
    policy_loss = make_slime_loss(code, dist.group.WORLD)
    logits, batch = make_slime_batch()
    exact = logits.double().requires_grad_()
    new, _ = of_responses(exact, batch)
    old = new.detach().split(RESPONSES)
    if source != "on-policy":
        old = [(x - shift).float() for x, shift in zip(old, SHIFTS, strict=True)]
        batch[source] = old
    ends = torch.tensor([0, *RESPONSES]).cumsum(0).int()
    expected, _ = reference.policy_loss_from_log_probs(
        new, torch.cat(old).double(), torch.tensor(ADVANTAGES).double(), cu_seqlens=ends,
        mask=torch.cat(batch["loss_masks"]), objective=GSPO(clip_low=LOW, clip_high=HIGH),
        denominator=1.0,
    )  # fmt: skip
    (UPSTREAM * expected).backward()
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = logits.chunk(size, dim=-1)[rank].clone().requires_grad_()
    arguments = slime_arguments(use_rollout_logprobs=source == "rollout_log_probs")
    loss, metrics = policy_loss(arguments, batch, mine, make_reducer(batch))
    (UPSTREAM * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=ROUNDING)
    expected_grad = exact.grad.chunk(size, dim=-1)[rank]
    assert relative(mine.grad, expected_grad) <= ROUNDING
    assert torch.equal((mine.grad == 0).all(-1), (expected_grad == 0).all(-1))
    torch.tensor([0, *metrics.values()])  # as slime puts them together
    assert metrics["loss"] == metrics["pg_loss"] == loss
    is_on_policy = source == "on-policy"
    assert metrics["pg_clipfrac"] == (0 if is_on_policy else len(CLIPPED))
    shift = 0.0 if is_on_policy else sum(SHIFTS[:-1])
    assert metrics["ppo_kl"].item() == pytest.approx(-shift, rel=1e-5)


GRPO_OF_SLIME = {"advantage_estimator": "grpo", "eps_clip": 0.2, "eps_clip_high": 0.28}
SLIME_SETTINGS = {
    "GSPO": {},
    "GRPO": GRPO_OF_SLIME,
    "dual clip": {**GRPO_OF_SLIME, "eps_clip_c": 1.5},
    "CISPO": {**GRPO_OF_SLIME, "pg_loss_type": "cispo", "eps_clip": 1.0},
    "REINFORCE": {**GRPO_OF_SLIME, "pg_loss_type": "reinforce"},
    "GSPO, CISPO": {"pg_loss_type": "cispo"},
    "TIS": {**GRPO_OF_SLIME, "use_tis": True, "tis_clip_low": 0.9},
    "GSPO, TIS": {"use_tis": True},
    "REINFORCE, TIS": {**GRPO_OF_SLIME, "pg_loss_type": "reinforce", "use_tis": True},
    "off-policy sequences": {**GRPO_OF_SLIME, "use_opsm": True},
    "rollout's log-probs": {**GRPO_OF_SLIME, "use_rollout_logprobs": True},
    **{kind: {**GRPO_OF_SLIME, "use_kl_loss": True, "kl_loss_type": kind}
       for kind in ("k1", "k2", "k3", "low_var_kl")},
    "GSPO, unbiased KL": {"use_kl_loss": True, "use_unbiased_kl": True,
                          "kl_loss_type": "low_var_kl"},
    "KL that is only reported": {"use_kl_loss": True, "kl_loss_coef": 0.0},
    "entropy": {"entropy_coef": 0.2},
    "all of it": {**GRPO_OF_SLIME, "use_tis": True, "use_opsm": True, "use_kl_loss": True,
                  "use_unbiased_kl": True, "entropy_coef": 0.2, "eps_clip_c": 1.5},
}  # fmt: skip
REDUCERS = {"samples": {}, "tokens": {"per_token": True},
            "rollouts": {"of_rollouts": [5, 5, 6, 6, 5, 5]}}  # fmt: skip


def make_full_batch(is_gspo):
    logits, batch = make_slime_batch()
    generator = torch.Generator().manual_seed(1)
    new, _ = of_responses(logits, batch)
    for name, width in (("log_probs", 1.0), ("rollout_log_probs", 1.0), ("ref_log_probs", 6.0)):
        noise = width * (torch.rand(new.shape, generator=generator) - 0.5)
        batch[name] = list((new + noise).split(RESPONSES))
    if is_gspo:
        pairs = zip(new.split(RESPONSES), (*SHIFTS[:4], 0.02, 0.0), strict=True)
        batch["log_probs"] = [x - shift for x, shift in pairs]
    return logits, batch


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", SLIME_SETTINGS)
def test_slime_before_and_after(python_blocks, name, reducer):
    """Every setting gives slime's gradient and metrics, with each of its averages."""
    (code,) = python_blocks(DOCUMENT)["slime"]
    arguments = slime_arguments(**SLIME_SETTINGS[name])
    logits, batch = make_full_batch(arguments.advantage_estimator == "gspo")
    results = []
    for loss_of, dtype in ((loss_of_slime, torch.float64), (make_slime_loss(code), torch.float32)):
        x = logits.to(dtype).requires_grad_()
        loss, metrics = loss_of(arguments, batch, x, make_reducer(batch, **REDUCERS[reducer]))
        (UPSTREAM * loss).backward()
        results.append((x.grad, metrics))
    (expected_grad, expected), (grad, found) = results
    assert relative(grad, expected_grad) <= 5e-6
    for key, value in expected.items():
        assert found[key].item() == pytest.approx(value.item(), rel=5e-6, abs=1e-5), key
    assert ("tis_clipfrac" in found) == arguments.use_tis
    assert ("kl_loss" in found) == arguments.use_kl_loss


@pytest.mark.parametrize("setting", ["use_score_centering", "get_mismatch_metrics",
                                     "rollout_top_p", "context parallelism"])  # fmt: skip
def test_slime_s_own_loss_for_the_rest(python_blocks, setting):
    (code,) = python_blocks(DOCUMENT)["slime"]
    is_context = setting == "context parallelism"
    policy_loss = make_slime_loss(code, ranks_of_context=2 if is_context else 1)
    options = {} if is_context else {setting: 0.9}
    logits, batch = make_full_batch(True)
    arguments, reducer = slime_arguments(**options), make_reducer(batch)
    with pytest.warns(UserWarning, match=f"the loss is slime's own, for {setting}"):
        loss, metrics = policy_loss(arguments, batch, logits, reducer)
    assert loss == loss_of_slime(arguments, batch, logits, reducer)[0]
    assert "tis" not in metrics


# NeMo-RL: f(next_token_logprobs, data, global_valid_seqs, global_valid_toks)


def calculate_kl(log_probs, ref, kl_type, input_clamp_value, output_clamp_value,
                 importance_sampling_weights):  # fmt: skip
    """Compute NeMo-RL's KL: where a clamp acts, neither estimate nor weight has a gradient."""
    d, w = log_probs - ref, importance_sampling_weights
    if input_clamp_value is not None:
        is_clamped = d.abs() > input_clamp_value
        d, w = d.clamp(-input_clamp_value, input_clamp_value), w.where(~is_clamped, w.detach())
    kl = w * {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() - 1 + d}[kl_type]
    return kl if output_clamp_value is None else kl.clamp(-output_clamp_value, output_clamp_value)


class ClippedPGLossFn:
    """NeMo-RL's loss, with no more of its code than needed, and no 1e-8 in its means."""

    def __init__(self, cfg, use_fused_linear_logprobs=False):
        vars(self).update(vars(cfg), use_fused_linear_logprobs=use_fused_linear_logprobs)

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        new, A = next_token_logprobs, data["advantages"][:, 1:]
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        kept = mask * data.get("curr_logprobs_keep_mask", 1)
        old, generated = data["prev_logprobs"][:, 1:], data["generation_logprobs"][:, 1:]
        old, of_old = (new.detach(), kept) if self.force_on_policy_ratio else (old, mask)

        def mean(x, mask):
            if self.token_level_loss:
                return (x * mask).sum() / global_valid_toks
            means = (x * mask).sum(-1) / mask.sum(-1).clamp(min=1)
            return means.sum() / global_valid_seqs

        terms = self._terms(new, old, A, kept)
        if self.use_importance_sampling_correction:
            terms = terms * self._weights(old - generated, of_old)
        loss = mean(terms, kept)
        if self.reference_policy_kl_penalty:
            x = data.get("curr_logprobs_unfiltered", new)
            base = generated if self.use_on_policy_kl_approximation else x.detach()
            loss = loss + self.reference_policy_kl_penalty * mean(calculate_kl(
                x, data["reference_policy_logprobs"][:, 1:], self.reference_policy_kl_type,
                self.kl_input_clamp_value, self.kl_output_clamp_value, (x - base).exp(),
            ), mask)  # fmt: skip
        if self.positive_example_nll_weight:
            correct = kept * (data["rewards"] > 0)[:, None]
            loss = loss - self.positive_example_nll_weight * (new * correct).sum() / correct.sum()
        return loss, {"loss": loss.item(), "token_mult_prob_error": 1.0, "grad": loss.requires_grad}

    def _terms(self, new, old, A, mask):
        low, high = 1 - self.ratio_clip_min, 1 + self.ratio_clip_max
        if self.disable_ppo_ratio:
            return -A * new
        if self.force_on_policy_ratio:
            return -A * (new - old).exp()
        log_ratio = new - old
        if self.sequence_level_importance_ratios:
            count = mask.sum(-1, keepdim=True).clamp(min=1)
            log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / count
        ratio = log_ratio.exp()
        if self.use_cispo:
            return -A * ratio.detach().clamp(low, high) * new
        terms = torch.maximum(-A * ratio, -A * ratio.clamp(low, high))
        if self.ratio_clip_c is None:
            return terms
        return torch.where(A < 0, torch.minimum(terms, -A * self.ratio_clip_c), terms)

    def _weights(self, log_weight, mask):
        kind, low = self.truncated_importance_sampling_type, 0.0
        if self.truncated_importance_sampling_ratio_min is not None:
            low = self.truncated_importance_sampling_ratio_min
        high = self.truncated_importance_sampling_ratio
        total = (log_weight * mask).sum(-1, keepdim=True)
        count = mask.sum(-1, keepdim=True).clamp(min=1)
        w = (total if self.sequence_level_importance_ratios else log_weight).exp()
        if kind == "tis":
            return w.clamp(low, high)
        decisive = (total / count).exp() if kind == "seq-mask-tis" else w
        return w if kind is None else w * ((decisive >= low) & (decisive <= high))


def nemo_config(**options):
    return SimpleNamespace(
        **{
            "sequence_level_importance_ratios": True, "token_level_loss": False,
            "ratio_clip_min": LOW, "ratio_clip_max": HIGH, "ratio_clip_c": None,
            "disable_ppo_ratio": False, "force_on_policy_ratio": False, "use_cispo": False,
            "reference_policy_kl_penalty": 0, "reference_policy_kl_type": "k3",
            "kl_input_clamp_value": 20.0, "kl_output_clamp_value": 10.0,
            "use_on_policy_kl_approximation": False, "positive_example_nll_weight": 0.0,
            "use_importance_sampling_correction": False,
            "truncated_importance_sampling_type": None, "truncated_importance_sampling_ratio": None,
            "truncated_importance_sampling_ratio_min": None, **options,
        }
    )  # fmt: skip


def make_nemo_batch(dtype):
    """Return log-probs (B, S - 1), and NeMo-RL's data (B, S), of which a loss takes [:, 1:]."""
    generator = torch.Generator().manual_seed(0)
    batch, length = len(SHIFTS), 9
    token_mask = torch.ones(batch, length)
    for i, prompt in enumerate(PROMPTS):
        token_mask[i, :prompt] = 0
        token_mask[i, prompt + RESPONSES[i] :] = 0
    sample_mask = torch.ones(batch)
    sample_mask[-1] = 0

    def random():
        return torch.rand(batch, length, generator=generator, dtype=torch.float64)

    log_probs = -5 * random()
    previous = log_probs - torch.tensor(SHIFTS, dtype=torch.float64)[:, None]
    per_token = {
        "prev_logprobs": previous, "generation_logprobs": log_probs + random() - 0.5,
        "reference_policy_logprobs": log_probs + 4 * random() - 2,
        "advantages": torch.tensor(ADVANTAGES)[:, None].expand(batch, length),
    }  # fmt: skip
    data = {name: x.to(dtype) for name, x in per_token.items()}
    data |= {"token_mask": token_mask, "sample_mask": sample_mask,
             "rewards": torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])}  # fmt: skip
    return log_probs[:, 1:].to(dtype), data


@pytest.fixture
def fused_loss_fn(python_blocks):
    (code,) = python_blocks(DOCUMENT)["NeMo-RL"]
    modules = {
        "nemo_rl.algorithms.loss": {"ClippedPGLossFn": ClippedPGLossFn},
        "nemo_rl.algorithms.utils": {"calculate_kl": calculate_kl},
    }
    return run(code, modules)["FusedPGLossFn"]


@pytest.mark.example("docs/integrations.md", "NeMo-RL")
@pytest.mark.parametrize("packed", [False, True])
def test_nemo_rl(fused_loss_fn, packed):
    """The loss is right for the whole batch, and for one sequence at a time as with packing."""
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
    loss_fn = fused_loss_fn(nemo_config(), use_fused_linear_logprobs=True)
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


PPO = {"sequence_level_importance_ratios": False, "ratio_clip_min": 0.2, "ratio_clip_max": 0.28}
TOKENS = {**PPO, "token_level_loss": True}
KL = {"reference_policy_kl_penalty": 0.3}
NO_CLAMPS = {"kl_input_clamp_value": None, "kl_output_clamp_value": None}
CLAMPS = {"kl_input_clamp_value": 1.0, "kl_output_clamp_value": 0.4}
CORRECTED = {"use_importance_sampling_correction": True}
SETTINGS = {
    "GSPO": {},
    "sequence mean": PPO,
    "token mean": TOKENS,
    "dual clip": {**TOKENS, "ratio_clip_c": 1.5},
    "GSPO, dual clip": {"ratio_clip_c": 1.0002, "ratio_clip_max": 1e-4},
    "CISPO": {**TOKENS, "use_cispo": True},
    "REINFORCE": {**TOKENS, "disable_ppo_ratio": True, "ratio_clip_c": 1.5},
    "on-policy": {**PPO, "force_on_policy_ratio": True},
    "on-policy, corrected": {**TOKENS, "force_on_policy_ratio": True, **CORRECTED},
    "GSPO, on-policy": {"force_on_policy_ratio": True},
    **{f"{kind}, clamped": {**TOKENS, **KL, **CLAMPS, "reference_policy_kl_type": kind}
       for kind in ("k1", "k2", "k3")},
    "GSPO, k3": {**KL, **NO_CLAMPS},
    "KL, on-policy approximation": {**TOKENS, **KL, **CLAMPS,
                                    "use_on_policy_kl_approximation": True},
    "corrected": {**TOKENS, **CORRECTED},
    "GSPO, corrected": CORRECTED,
    **{f"{kind}, {of}": {**base, **CORRECTED, "truncated_importance_sampling_type": kind,
                         "truncated_importance_sampling_ratio": 1.2,
                         "truncated_importance_sampling_ratio_min": 0.9}
       for kind, of, base in (("tis", "tokens", TOKENS), ("tis", "sequences", {}),
                              ("icepop", "tokens", TOKENS), ("icepop", "sequences", {}),
                              ("seq-mask-tis", "tokens", TOKENS))},
    "tis without a lower bound": {**PPO, **CORRECTED, "truncated_importance_sampling_type": "tis",
                                  "truncated_importance_sampling_ratio": 1.2},
    "NLL of correct examples": {**TOKENS, "positive_example_nll_weight": 0.2},
    "all of it": {**TOKENS, **KL, **CORRECTED, "positive_example_nll_weight": 0.2,
                  "ratio_clip_c": 1.5},
}  # fmt: skip


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_nemo_rl_before_and_after(fused_loss_fn, name, filtered):
    """Every setting gives NeMo-RL's loss and gradient where NeMo-RL's loss does not overflow."""
    log_probs, data = make_nemo_batch(torch.float64)
    noise = torch.randn(data["prev_logprobs"].shape, generator=torch.Generator().manual_seed(1))
    data["prev_logprobs"][4] += SHIFTS[4]
    if not nemo_config(**SETTINGS[name]).sequence_level_importance_ratios:
        data["prev_logprobs"] += 0.3 * noise
    results = []
    for kind in (ClippedPGLossFn, fused_loss_fn):
        x = log_probs.clone().requires_grad_()
        batch = dict(data)
        if filtered:  # by top-k: a token that is not among them has another log-prob
            keep = torch.ones_like(x).index_fill(1, torch.tensor([3, 6]), 0)
            batch |= {"curr_logprobs_keep_mask": keep, "curr_logprobs_unfiltered": x}
        new = torch.where(keep != 0, x, 0.0) if filtered else x
        loss, _ = kind(nemo_config(**SETTINGS[name]))(
            new, batch, torch.tensor(11.0), torch.tensor(123.0)
        )
        (UPSTREAM * loss).backward()
        results.append((loss.detach(), x.grad))
    assert results[0][1].any()
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after, before, atol=1e-14, rtol=1e-11)
