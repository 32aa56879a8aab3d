"""loss_from_model and live_checkpointing leave sequences without a gradient out of the body.

Hooks count what is left out; losses and gradients must equal those of the whole batch.
"""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from test_models import V, make
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gspo_ops import GRPO, GSPOToken, global_denominator
from gspo_ops.integrations.transformers import (
    live_checkpointing,
    log_probs_from_model,
    loss_from_model,
)

transformers = pytest.importorskip("transformers")

B, S, T = 5, 12, 6
LIVE = torch.tensor([True, False, True, False, False])
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
# dense, with a bias, mixtures of experts, sliding windows, hybrid, state-space, shared blocks
FAMILIES = {
    "Llama": ("LlamaForCausalLM", {}),
    "Llama, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "Qwen2, sliding": ("Qwen2ForCausalLM", {"use_sliding_window": True, **SLIDING}),
    "Qwen3": ("Qwen3ForCausalLM", {}),
    "Gemma2, sliding": ("Gemma2ForCausalLM", {"final_logit_softcapping": 2.0}),
    "Phi, bias": ("PhiForCausalLM", {}),
    "GPT2, tied": ("GPT2LMHeadModel", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "Bloom, alibi": ("BloomForCausalLM", {}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {}),
    "gpt-oss, MoE, sliding": ("GptOssForCausalLM", SLIDING),
    "DeepSeek-V3, MoE": ("DeepseekV3ForCausalLM", {}),
    "OLMoE": ("OlmoeForCausalLM", {}),
    "Qwen3-Next, hybrid, MoE": (
        "Qwen3NextForCausalLM", {"layer_types": ["linear_attention", "full_attention"]}),
    "Jamba, hybrid, MoE": ("JambaForCausalLM", {}),
    "Zamba2, shared blocks": ("Zamba2ForCausalLM", {}),
    "Mamba2": ("Mamba2ForCausalLM", {}),
}  # fmt: skip
# families with layers that keep packed sequences apart without GPU kernels
PACKED = [name for name in FAMILIES if not any(
    word in name for word in ("alibi", "hybrid", "shared", "Mamba", "gpt-oss")
)]  # fmt: skip


def build(family, **options):
    name, own = FAMILIES[family]
    return make(name, own | options).train()


def padded(model):
    ids = torch.randint(2, V - 10, (B, S), generator=torch.Generator().manual_seed(0))
    attention = torch.ones_like(ids)
    attention[0, :3] = attention[1, :2] = 0
    mask = torch.ones(B, T)
    mask[2, 3:] = mask[4, 4:] = 0
    return {"input_ids": ids, "attention_mask": attention}, {"mask": mask}


def with_positions(model):
    batch, where = padded(model)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch | {"position_ids": positions}, where


def packed(model):
    lengths = torch.tensor([7, 5, 9, 4, 6])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, V - 10, (1, int(lengths.sum())), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return {"input_ids": ids, "position_ids": positions[None]}, {
        "mask": (positions >= 2).float(), "cu_seqlens": cu_seqlens
    }  # fmt: skip


LAYOUTS = {"padded": padded, "packed": packed}
BOTH = [("padded", f) for f in FAMILIES] + [("packed", f) for f in PACKED]


def log_probs(model, batch, where, **options):
    if "cu_seqlens" in where:
        return log_probs_from_model(model, batch, cu_seqlens=where["cu_seqlens"], **options)
    return log_probs_from_model(model, batch, T, **options)


def arguments(model, batch, where, dead):
    """Return old log-probs and advantages, with sequences that are dead for this reason."""
    with torch.no_grad():
        old = log_probs(model, batch, where)
    advantages = torch.tensor([1.0, -1.0, -0.5, 0.7, 2.0])
    if dead == "no advantage":
        old += 1e-4 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
        return old, advantages * LIVE
    # dead: a ratio far beyond the edge of the clip range that applies to the advantage's sign
    shift = 0.1 * torch.where(LIVE, -advantages.sign(), advantages.sign())
    if "cu_seqlens" in where:
        return old - shift.repeat_interleave(where["cu_seqlens"].diff().long()), advantages
    return old - shift[:, None], advantages


def run(model, batch, where, old, advantages, autocast=False, **options):
    """Return loss, statistics, gradients, and the rows that each layer's first product saw."""
    seen = []

    def count(module, args, output):
        seen.append(args[0].numel() // args[0].shape[-1])

    layers = [m for m in model.modules() if type(m).__name__.endswith(("Layer", "Block"))]
    products = [
        next((m for m in layer.modules() if type(m).__name__ in ("Linear", "Conv1D")), None)
        for layer in layers
    ]
    hooks = [m.register_forward_hook(count) for m in products if m is not None]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, autocast):
        loss, stats = loss_from_model(model, batch, old, advantages, **where, **options)
    in_forward = len(seen)
    (1.7 * loss).backward()
    for hook in hooks:
        hook.remove()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), stats, grads, (seen[:in_forward], seen[in_forward:])


def checkpoint(model):
    """Enable gradient checkpointing as transformers does."""
    model = getattr(model, "get_base_model", lambda: model)()
    model._set_gradient_checkpointing(
        True, functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    )


def assert_close(grads, expected, bound=2e-6):
    """Compare gradients relative to all of them, as that of a key's bias is pure rounding error."""
    assert grads.keys() == expected.keys()
    size = torch.cat([x.flatten() for x in expected.values()]).norm()
    assert size > 0
    for name, x in expected.items():
        assert (grads[name] - x).norm() <= bound * (x.norm() + 0.1 * size), name


@pytest.mark.parametrize(("layout", "family"), BOTH)
def test_sequences_without_advantage(layout, family):
    model = build(family)
    batch, where = LAYOUTS[layout](model)
    old, advantages = arguments(model, batch, where, "no advantage")
    loss, stats, grads, rows = run(model, batch, where, old, advantages, skip="dead")
    want, of_all, expected, all_rows = run(model, batch, where, old, advantages, skip="none")
    torch.testing.assert_close(loss, want, atol=1e-6, rtol=1e-6)
    assert_close(grads, expected)
    assert stats["computed"].tolist() == LIVE.tolist()
    assert of_all["computed"].all()
    assert stats["log_ratio"].isnan().tolist() == (~LIVE).tolist()
    torch.testing.assert_close(stats["log_ratio"][LIVE], of_all["log_ratio"][LIVE])
    for name in ("clip_frac_sequences", "clip_frac_tokens", "active_token_frac"):
        torch.testing.assert_close(stats[name], of_all[name], msg=name)
    whole = batch["input_ids"].numel()
    live = 2 * S if layout == "padded" else 7 + 9
    assert set(all_rows[0]) <= {whole}
    assert set(rows[0]) <= {live}


@pytest.mark.parametrize(("layout", "family"), BOTH)
def test_clipped_sequences(layout, family):
    model = build(family)
    batch, where = LAYOUTS[layout](model)
    old, advantages = arguments(model, batch, where, "clipped")
    checkpoint(model)
    loss, stats, expected, _ = run(model, batch, where, old, advantages)
    assert stats["clip_frac_sequences"] == 0.6
    live_checkpointing(model)
    for _ in range(2):  # the first use checks more
        found, _, grads, rows = run(model, batch, where, old, advantages)
        assert torch.equal(found, loss)
        assert_close(grads, expected)
    whole, live = batch["input_ids"].numel(), 2 * S if layout == "padded" else 7 + 9
    assert set(rows[0]) == {whole}
    assert set(rows[1]) == {live}


def test_positions_of_each_row():
    """A single row whose positions restart above 0, as a tree's do, is not packed."""
    model = build("Llama")
    live_checkpointing(model)
    batch, where = with_positions(model)
    old, advantages = arguments(model, batch, where, "clipped")
    assert set(run(model, batch, where, old, advantages)[3][1]) == {2 * S}
    tree = {"input_ids": batch["input_ids"][:1], "position_ids": torch.tensor([[0, 1, 2] * 4])}
    tree["position_ids"][0, 3:] += 3
    mask = torch.tensor([[False, True]]).repeat_interleave(T, 1)[:, T:]
    assert set(run(model, tree, {"mask": mask}, None, advantages[:1])[3][1]) == {S}


# What is trained, and how


def lora(model, dropout=0.0):
    peft = pytest.importorskip("peft")
    options = {"r": 4, "target_modules": "all-linear", "lora_dropout": dropout}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return wrapped.train()


def frozen(model):
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    return model


WAYS = {
    "LoRA": lora, "frozen": frozen, "bfloat16": torch.nn.Module.bfloat16,
    "LoRA with dropout": functools.partial(lora, dropout=0.3),
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "way"),
    [("Llama", way) for way in WAYS] + [("Qwen3-MoE", way) for way in list(WAYS)[:3]],
)
def test_what_is_trained(family, way):
    model = WAYS[way](build(family))
    batch, where = padded(model)
    torch.manual_seed(5)  # for dropout
    old, advantages = arguments(model, batch, where, "clipped")
    found = []
    for enable in (checkpoint, live_checkpointing, lambda model: None):
        enable(model)
        torch.manual_seed(5)
        found.append(run(model, batch, where, old, advantages))
    (loss, stats, expected, _), *ours = found
    assert stats["clip_frac_sequences"] == 0.6
    for of_live, _, grads, rows in ours:
        assert torch.equal(of_live, loss)
        assert_close(grads, expected, 2e-2 if way == "bfloat16" else 2e-6)
        assert set(rows[1]) == {2 * S}


def test_autocast():
    model = build("Llama")
    batch, where = padded(model)
    old, advantages = arguments(model, batch, where, "clipped")
    found = []
    for enable in (checkpoint, live_checkpointing):
        enable(model)
        found.append(run(model, batch, where, old, advantages, autocast=True))
    assert_close(found[1][2], found[0][2], 1e-2)
    assert set(found[1][3][1]) == {2 * S}


def test_all_sequences_live_is_bitwise_the_same():
    model = build("Llama")
    batch, where = padded(model)
    grads = []
    for enable in (checkpoint, live_checkpointing):
        enable(model)
        grads.append(run(model, batch, where, None, torch.ones(B))[2])
    assert all(torch.equal(grads[1][name], x) for name, x in grads[0].items())


@pytest.mark.parametrize("skip", ["dead", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_sequence_is_live(layout, skip):
    """Gradients are zero, not None, so that an optimizer's moments decay as they would have."""
    model = build("Llama")
    live_checkpointing(model)
    batch, where = LAYOUTS[layout](model)
    old, _ = arguments(model, batch, where, "no advantage")
    loss, stats, grads, rows = run(model, batch, where, old, torch.zeros(B), skip=skip)
    assert loss == 0
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert not any(x.any() for x in grads.values())
    assert stats["computed"].any() == (skip == "none")
    assert stats["active_token_frac"] == stats["clip_frac_tokens"] == 0
    assert stats["log_ratio"].shape == (B,)
    assert set(rows[0]) == ({2} if skip == "dead" else {batch["input_ids"].numel()})
    assert not rows[1]


def test_it_stays_when_checkpointing_is_switched_off_and_on():
    model = build("Llama")
    batch, where = padded(model)
    old, advantages = arguments(model, batch, where, "clipped")
    live_checkpointing(model)
    model.gradient_checkpointing_disable()
    rows = run(model, batch, where, old, advantages)[3]
    assert not rows[1]
    model.activation_checkpointing_enable()
    rows = run(model, batch, where, old, advantages)[3]
    assert set(rows[1]) == {2 * S}
    model.eval()
    assert not run(model, batch, where, old, advantages)[3][1]


def test_a_copy_is_as_good():
    model = build("Llama")
    live_checkpointing(model)
    batch, where = padded(model)
    old, advantages = arguments(model, batch, where, "clipped")
    run(model, batch, where, old, advantages)
    rows = run(copy.deepcopy(model), batch, where, old, advantages)[3]
    assert set(rows[1]) == {2 * S}


def test_compiled():
    model = build("Llama")
    batch, where = padded(model)
    old, advantages = arguments(model, batch, where, "clipped")
    checkpoint(model)
    expected = run(model, batch, where, old, advantages)[2]
    live_checkpointing(model)
    compiled = torch.compile(model, backend="aot_eager")
    grads = run(compiled, batch, where, old, advantages)[2]
    assert_close({k.removeprefix("_orig_mod."): x for k, x in grads.items()}, expected)


def test_router_logits_have_their_gradient():
    """Every token's router logits have a gradient, so that nothing is left out."""
    model = build("Qwen3-MoE", router_aux_loss_coef=0.1)
    batch, where = padded(model)
    old, advantages = arguments(model, batch, where, "clipped")
    found = []
    for enable in (checkpoint, live_checkpointing):
        enable(model)
        found.append(run(model, batch, where, old, advantages * LIVE, router_loss_coef=0.1))
    assert found[1][1]["computed"].all()
    assert_close(found[1][2], found[0][2])
    plain = run(model, batch, where, old, advantages * LIVE)[2]
    name = "model.layers.0.mlp.gate.weight"
    assert (plain[name] - found[0][2][name]).norm() > 1e-3 * plain[name].norm()


# Which sequences


@pytest.mark.parametrize(
    ("options", "computed"),
    [
        ({}, LIVE),
        ({"objective": GRPO(aggregation="token-mean")}, LIVE),
        ({"objective": GRPO(kl_coef=0.1)}, torch.ones(B, dtype=torch.bool)),
        ({"rollout_weights": torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0])},
         LIVE & torch.tensor([1, 1, 0, 1, 1]).bool()),
        ({"denominator": 3.0, "return_entropy": True}, LIVE),
        ({"objective": lambda new, old, advantages, ids: -advantages * (new - old)},
         torch.ones(B, dtype=torch.bool)),
    ],
    ids=["GSPO", "token-mean", "KL", "rollout weights", "denominator", "function"],
)  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_which_sequences_are_computed(layout, options, computed):
    model = build("Llama")
    batch, where = LAYOUTS[layout](model)
    old, advantages = arguments(model, batch, where, "no advantage")
    if getattr(options.get("objective"), "kl_coef", 0):
        options = options | {"ref_log_probs": old + 0.1}
    loss, stats, grads, _ = run(model, batch, where, old, advantages, **options)
    want, of_all, expected, _ = run(model, batch, where, old, advantages, skip="none", **options)
    assert stats["computed"].tolist() == computed.tolist()
    torch.testing.assert_close(loss, want, atol=1e-6, rtol=1e-6)
    assert_close(grads, expected)
    assert ("entropy" in stats) == ("entropy" in of_all) == ("return_entropy" in options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_advantage_per_token(layout):
    """A sequence is live if one of its unmasked tokens has an advantage."""
    model = build("Llama")
    batch, where = LAYOUTS[layout](model)
    old, _ = arguments(model, batch, where, "no advantage")
    advantages = torch.zeros_like(old)
    mask = where["mask"]
    at = mask.nonzero()
    for i in (at[3], at[-1]):
        advantages[tuple(i)] = 1.5
    advantages[mask == 0] = 9.0  # is not read
    options = {"objective": GSPOToken()}
    loss, stats, grads, _ = run(model, batch, where, old, advantages, **options)
    want, _, expected, _ = run(model, batch, where, old, advantages, skip="none", **options)
    assert stats["computed"].sum() == 2
    torch.testing.assert_close(loss, want, atol=1e-6, rtol=1e-6)
    assert_close(grads, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needed", [LIVE, ~LIVE, torch.zeros(B, dtype=torch.bool)])
def test_log_probs_of_some(layout, needed):
    model = build("Llama")
    batch, where = LAYOUTS[layout](model)
    whole, entropy = log_probs(model, batch, where, return_entropy=True)
    some, of_some = log_probs(model, batch, where, needed=needed, return_entropy=True)
    is_token = needed[:, None].expand(B, T)
    if layout == "packed":
        is_token = needed.repeat_interleave(where["cu_seqlens"].diff())
        firsts = where["cu_seqlens"][:-1].long()
        assert not whole[firsts].any()
    assert torch.equal(some.isnan(), ~is_token)
    torch.testing.assert_close(some[is_token], whole[is_token], atol=2e-6, rtol=0)
    torch.testing.assert_close(of_some[is_token], entropy[is_token], atol=5e-6, rtol=0)


# Over ranks, of which one has no live sequence


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_over_ranks(ranks, size, wrapper):
    ranks(size)(on_rank, wrapper)


def on_rank(wrapper):
    for family, dead in (("Llama", "clipped"), ("Qwen3-MoE", "no advantage")):
        one = build(family)
        batch, where = padded(one)
        old, advantages = arguments(one, batch, where, dead)
        checkpoint(one)
        expected = run(one, batch, where, old, advantages, skip="none")[2]
        model = build(family)
        if wrapper == "FSDP2":
            for layer in model.model.layers:
                fully_shard(layer)
            model = fully_shard(model)
        else:
            model = DistributedDataParallel(model)
        live_checkpointing(model)
        # the last rank has the last sequences, which are dead
        borders = {1: [0, 5], 2: [0, 3, 5], 4: [0, 1, 2, 3, 5]}[dist.get_world_size()]
        own = slice(*borders[dist.get_rank() :][:2])
        mask = where["mask"][own]
        denominator = global_denominator([{"mask": mask}], group=dist.group.WORLD)
        for _ in range(2):
            model.zero_grad()
            loss, stats = loss_from_model(
                model, {name: x[own] for name, x in batch.items()}, old[own], advantages[own],
                mask=mask, denominator=denominator,
            )  # fmt: skip
            (1.7 * loss).backward()
            of = LIVE[own] if dead == "no advantage" else torch.ones_like(LIVE[own])
            assert stats["computed"].tolist() == of.tolist()
            grads = {
                name.removeprefix("module."): p.grad.full_tensor() if wrapper == "FSDP2" else p.grad
                for name, p in model.named_parameters()
                if p.grad is not None
            }
            assert_close(grads, expected, 5e-6)


# What is refused


def test_arguments_that_can_not_be_cut():
    model = build("Llama")
    batch, where = padded(model)
    old, advantages = arguments(model, batch, where, "no advantage")
    batch["pixel_values"] = torch.zeros(7, 3)
    message = r"batch\['pixel_values'\] cannot be split into sequences, as skip='dead' requires"
    with pytest.raises(ValueError, match=message):
        loss_from_model(model, batch, old, advantages, **where, skip="dead")
    with pytest.raises(
        ValueError, match=r"batch\['pixel_values'\] cannot be split.*needed requires"
    ):
        log_probs_from_model(model, batch, T, needed=LIVE)
    with pytest.raises(ValueError, match="skip must be one of 'auto', 'dead', 'none', got 'all'"):
        loss_from_model(model, batch, old, advantages, **where, skip="all")
    with pytest.raises(ValueError, match=r"needed must have shape \(5,\).*got \(4,\)"):
        log_probs_from_model(model, batch, T, needed=LIVE[:4])
    with pytest.raises(TypeError, match=r"needed must be bool.*got torch\.float32"):
        log_probs_from_model(model, batch, T, needed=advantages)
    del batch["pixel_values"]
    with pytest.raises(TypeError, match=r"advantages must be a torch\.Tensor, got list"):
        loss_from_model(model, batch, old, advantages.tolist(), **where)
    with pytest.raises(ValueError, match=r"mask must have a row for each of the 5 .*got 1"):
        loss_from_model(model, batch, old, advantages, mask=where["mask"][:1])
    with pytest.raises(ValueError, match=r"advantages must have shape \(5,\).*got \(4,\)"):
        loss_from_model(model, batch, old, advantages[:4], **where, skip="dead")


def test_packed_arguments():
    model = build("Llama")
    batch, where = packed(model)
    old = log_probs(model, batch, where).detach()
    with pytest.raises(ValueError, match="batch must contain position_ids that restart"):
        log_probs(model, {"input_ids": batch["input_ids"]}, where)
    with pytest.raises(ValueError, match=r"must have shape \(1, S\) with cu_seqlens, got \(5,"):
        log_probs(model, padded(model)[0], where)
    with pytest.raises(ValueError, match=r"mask must have shape \(S,\).*got \(1, 31\)"):
        loss_from_model(model, batch, old, LIVE.float(), mask=where["mask"][None],
                        cu_seqlens=where["cu_seqlens"])  # fmt: skip
    with pytest.raises(IndexError, match="targets must lie in"):  # a first token has no log-prob
        loss_from_model(model, batch, old, LIVE.float(), mask=torch.ones(31),
                        cu_seqlens=where["cu_seqlens"])  # fmt: skip


def test_packed_sequences_that_see_each_other():
    model = build("Bloom, alibi")
    batch, where = packed(model)
    with pytest.raises(ValueError, match="BloomForCausalLM lets packed sequences see each other"):
        log_probs(model, batch, where)
    log_probs(model, batch, where, check_model=False)


def test_arguments_with_which_packed_sequences_see_each_other():
    """An attention mask turns packing off, also in a model that has been checked without one."""
    model = build("Llama")
    batch, where = packed(model)
    log_probs(model, batch, where)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(ValueError, match="see each other, given attention_mask, input_ids"):
        log_probs(model, batch, where)


@pytest.mark.parametrize("skip", ["auto", "none"])
def test_a_batch_in_which_no_token_counts(skip):
    model = build("Llama")
    batch, where = padded(model)
    old, advantages = arguments(model, batch, where, "no advantage")
    mask = torch.zeros_like(where["mask"])
    assert loss_from_model(model, batch, old, advantages, mask=mask, skip=skip).loss == 0


@pytest.mark.parametrize("is_live", [True, False])
def test_the_reference_s_kl_is_reported_whatever_is_left_out(is_live):
    model = build("Llama")
    batch, where = padded(model)
    old, _ = arguments(model, batch, where, "no advantage")
    stats = loss_from_model(model, batch, old, LIVE * float(is_live), **where, ref_log_probs=old)[1]
    assert stats["ref_kl"].isfinite()


class Normalised(transformers.models.llama.modeling_llama.LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.norm = torch.nn.BatchNorm1d(config.hidden_size)


class Coupled(transformers.models.llama.modeling_llama.LlamaMLP):
    def forward(self, x):
        return super().forward(x - x.mean(0, keepdim=True))


class WithCapacity(transformers.models.llama.modeling_llama.LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.expert_capacity = 4


def of_kind(kind):
    model = build("Llama")
    model.model.layers[0].mlp = kind(model.config)
    return model.train()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Normalised, "BatchNorm1d normalises over all"),
        (WithCapacity, "WithCapacity have a capacity"),
    ],
)
def test_sequences_that_depend_on_one_another(kind, why):
    with pytest.raises(
        ValueError, match=f"LlamaForCausalLM cannot be split into sequences: .*{why}"
    ):
        live_checkpointing(of_kind(kind))


@pytest.mark.parametrize("strict", [True, False])
def test_a_layer_that_makes_something_else_of_some_sequences(strict):
    model = of_kind(Coupled)
    batch, where = padded(model)
    old, advantages = arguments(model, batch, where, "clipped")
    checkpoint(model)
    expected = run(model, batch, where, old, advantages)[2]
    live_checkpointing(model, strict=strict)
    message = "LlamaDecoderLayer makes something else of them than of all sequences"
    if strict:
        with pytest.raises(RuntimeError, match=message):
            run(model, batch, where, old, advantages)
        return
    with pytest.warns(UserWarning, match=f"{message}; all sequences are recomputed"):
        grads = run(model, batch, where, old, advantages)[2]
    assert_close(grads, expected)
    assert_close(run(model, batch, where, old, advantages)[2], expected)


class Foreign(transformers.models.llama.modeling_llama.LlamaMLP):
    other = torch.nn.Parameter(torch.ones(64))  # belongs to the class, not to the layer

    def forward(self, x):
        return super().forward(x * self.other)


def test_a_layer_with_a_parameter_of_another_part():
    model = of_kind(Foreign)
    batch, where = padded(model)
    live_checkpointing(model)
    with pytest.raises(ValueError, match=r"a gradient for a tensor \(64,\) that is not its own"):
        loss_from_model(model, batch, None, torch.ones(B), **where)


@pytest.mark.parametrize("strict", [True, False])
def test_an_argument_of_a_layer_that_can_not_be_cut(strict):
    model = make("Gemma3nForCausalLM", {"num_kv_shared_layers": 1}).train()
    batch, where = padded(model)
    live_checkpointing(model, strict=strict)
    if strict:
        with pytest.raises(ValueError, match=r"writes into .*shared_kv_states"):
            loss_from_model(model, batch, None, torch.ones(B), **where)
    else:
        with pytest.warns(UserWarning, match="all sequences are recomputed"):
            loss_from_model(model, batch, None, torch.ones(B), **where).loss.backward()


def test_no_layers():
    with pytest.raises(ValueError, match="CTRLLMHeadModel has no layers that transformers"):
        live_checkpointing(make("CTRLLMHeadModel"))


def test_second_derivatives():
    model = build("Llama")
    live_checkpointing(model)
    batch, _ = padded(model)
    out = model(**batch).logits.square().sum()
    with pytest.raises(
        RuntimeError, match="live_checkpointing does not support second derivatives"
    ):
        torch.autograd.grad(out, list(model.parameters()), create_graph=True)
