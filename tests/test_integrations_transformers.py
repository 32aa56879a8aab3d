"""loss_from_model on small random models of each family of heads, against their own logits."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from gspo_ops import GRPO, GSPO, global_denominator, reference
from gspo_ops.integrations.heads import output_head
from gspo_ops.integrations.transformers import log_probs_from_model, loss_from_model
from gspo_ops.testing import relative

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "Llama": ("Llama", {}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Gemma2, soft cap": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "Gemma3, soft cap": ("Gemma3", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "Cohere, logit scale": ("Cohere", {"logit_scale": 0.25}),
    "Cohere2, logit scale": ("Cohere2", {"logit_scale": 0.25}),
    "Granite, logits divided": ("Granite", {"logits_scaling": 3.0}),
    "HyperCLOVAX, logits multiplied": ("HyperCLOVAX", {"logits_scaling": 0.5}),
    "FalconH1, head multiplied": ("FalconH1", {
        "lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8,
    }),
    "Phi, bias": ("Phi", {}),
}  # fmt: skip
T = 5


def make(family):
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    kind = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model


def make_batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 50, (4, 11), generator=generator)
    attention = torch.ones_like(ids)
    attention[0, :3] = 0
    mask = torch.ones(4, T, dtype=torch.bool)
    mask[1, 3:] = False
    return {"input_ids": ids, "attention_mask": attention}, mask


def grads(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "objective", [GSPO(), GRPO(aggregation="token-mean")], ids=["GSPO", "GRPO"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_loss_of_the_model_s_logits(family, objective):
    model = make(family)
    batch, mask = make_batch()
    temperature = 1.3
    logits = model(**batch, use_cache=False).logits[:, -T - 1 : -1]
    targets = batch["input_ids"][:, -T:]
    new = reference.log_probs_from_logits(logits, targets, temperature=temperature)
    got = log_probs_from_model(model, batch, T, temperature=temperature)
    torch.testing.assert_close(got, new, atol=1e-5, rtol=1e-5)
    old = new.detach() + torch.tensor([[1e-4], [-2e-4], [1e-2], [-1e-2]])
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    expected, _ = reference.policy_loss_from_logits(
        logits, targets, old, advantages, mask=mask, temperature=temperature, objective=objective
    )
    loss, stats = loss_from_model(
        model, batch, old, advantages, mask=mask, temperature=temperature, objective=objective
    )
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    assert 0 < stats["active_token_frac"] <= 1
    ours = grads(model, loss)
    theirs = grads(
        model,
        reference.policy_loss_from_logits(
            model(**batch, use_cache=False).logits[:, -T - 1 : -1], targets, old, advantages,
            mask=mask, temperature=temperature, objective=objective,
        )[0],
    )  # fmt: skip
    assert set(ours) == set(theirs)
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], atol=3e-6, rtol=2e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_head(family):
    model = make(family)
    batch, _ = make_batch()
    with torch.no_grad():
        hidden = model.base_model(**batch, use_cache=False).last_hidden_state
        expected = model(**batch, use_cache=False).logits
        torch.testing.assert_close(output_head(model).logits(hidden), expected)


def test_the_head_makes_logits_of_a_few_tokens_once():
    model = make("Llama")
    batch, mask = make_batch()
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    for _ in range(3):
        loss_from_model(model, batch, None, torch.ones(4), mask=mask).loss.backward()
    assert seen == [(1, 8, 50)]
    assert model.lm_head.weight.grad.any()


def test_a_model_wrapped_by_peft():
    peft = pytest.importorskip("peft")
    model = make("Llama")
    batch, mask = make_batch()
    plain = log_probs_from_model(model, batch, T)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert torch.equal(log_probs_from_model(wrapped, batch, T), plain)  # b is 0
    loss_from_model(wrapped, batch, None, torch.ones(4), mask=mask).loss.backward()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert trained
    assert any(p.grad.any() for p in trained)


def test_wrong_arguments_are_refused():
    model = make("Llama")
    batch, mask = make_batch()
    with pytest.raises(ValueError, match=r"batch must contain input_ids, got \['ids'\]"):
        log_probs_from_model(model, {"ids": mask}, T)
    with pytest.raises(ValueError, match=r"S > T=11 response tokens, got \(4, 11\)"):
        log_probs_from_model(model, batch, 11)
    with pytest.raises(ValueError, match=r"mask must have shape \(B, T\).*got \(4,\)"):
        loss_from_model(model, batch, None, torch.ones(4), mask=mask[:, 0])
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        log_probs_from_model(model.model, batch, T)


def test_what_the_head_says_is_not_overridden():
    model = make("Gemma2, soft cap")
    batch, mask = make_batch()
    with pytest.raises(TypeError, match="multiple values for keyword argument 'softcap'"):
        log_probs_from_model(model, batch, T, softcap=None)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'softcap'"):
        loss_from_model(model, batch, None, torch.ones(4), mask=mask, softcap=None)


def test_positions_of_several_axes_reach_the_first_use():
    """The first use passes such positions, which a model for images may need even without any."""
    model, ids = make("Llama"), torch.randint(2, 50, (2, 9))
    expected = log_probs_from_model(make("Llama"), {"input_ids": ids}, T)
    own = model.forward

    def forward(input_ids=None, *, position_ids, **arguments):
        return own(input_ids, position_ids=position_ids[0], **arguments)

    model.forward = forward
    batch = {"input_ids": ids, "position_ids": torch.arange(9).expand(3, 2, 9)}
    torch.testing.assert_close(log_probs_from_model(model, batch, T), expected)


def test_the_check_can_be_left_out():
    """Without the check, what the model does to its logits is still learnt."""
    model, (batch, _) = make("Gemma2, soft cap"), make_batch()
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    got = log_probs_from_model(model, batch, T, check_model=False)
    assert not seen
    assert torch.equal(got, log_probs_from_model(make("Gemma2, soft cap"), batch, T))


def test_nothing_is_imported_or_patched():
    code = (
        "import sys, gspo_ops, gspo_ops.integrations.transformers, gspo_ops.integrations.verl; "
        "assert not {'transformers', 'trl', 'verl', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Wrapped models, over ranks

WRAPPERS = {
    "ddp": "Llama",
    "fsdp": "Qwen3",
    "fsdp, tied": "Llama, tied",
    "fsdp, the head by itself": "Qwen2",
    "fsdp, checkpointed": "Gemma2, soft cap",
    "fsdp, bf16": "Llama",
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_over_ranks(ranks, wrapper, size):
    ranks(size)(on_rank_wrapped, wrapper)


def wrap(model, wrapper):
    if wrapper == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    low = torch.bfloat16 if wrapper.endswith("bf16") else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    if wrapper.endswith("checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    parts = [*model.base_model.layers]
    if wrapper.endswith("by itself"):
        parts.append(model.get_output_embeddings())
    for part in [*parts, model]:
        fully_shard(part, mp_policy=policy)
    return model


def on_rank_wrapped(wrapper):
    """Each rank has its rows of the batch; together they give the gradient of one process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model, (batch, mask) = make(WRAPPERS[wrapper]), make_batch()
    of_one = copy.deepcopy(model)
    borders = [0, 1, 4] if size == 2 else [0, 1, 2, 3, 4]
    parts = [slice(0, 4)]
    if wrapper.endswith("bf16"):
        # a body in bf16 rounds differently in other batches, by more than the clip range
        parts = [slice(*part) for part in itertools.pairwise(borders)]
        for p in of_one.parameters():  # FSDP leaves buffers as they are
            p.data = p.data.bfloat16()
    old = log_probs_from_model(copy.deepcopy(model), batch, T).detach()
    old += torch.tensor([[1e-4], [-2e-4], [1e-2], [-1e-2]])
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])

    def loss_of(model, rows, denominator):
        mine = {name: x[rows] for name, x in batch.items()}
        return loss_from_model(
            model, mine, old[rows], advantages[rows], mask=mask[rows], denominator=denominator
        ).loss

    whole, expected = torch.zeros(()), {}
    for rows in parts:
        loss = loss_of(of_one, rows, 4)
        whole += loss.detach()
        for name, grad in grads(of_one, loss).items():
            expected[name] = expected.get(name, 0) + grad.float()

    own = slice(borders[rank], borders[rank + 1])
    denominator = global_denominator([{"mask": mask[own]}], group=dist.group.WORLD)
    wrapped = wrap(model, wrapper)
    for _ in range(2):  # hooks, if any, must fire every time
        wrapped.zero_grad()
        loss = loss_of(wrapped, own, denominator)
        loss.backward()
        total = loss.detach() / size
        dist.all_reduce(total)
        torch.testing.assert_close(total, whole)
        found = {
            name.removeprefix("module."): getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
            for name, p in wrapped.named_parameters()
        }
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            assert grad.dtype == torch.float32
            assert relative(grad, expected[name]) <= 1e-5, name
    with torch.no_grad():
        mine = {name: x[own] for name, x in batch.items()}
        got = log_probs_from_model(wrapped, mine, T)
        torch.testing.assert_close(got, log_probs_from_model(of_one, mine, T))
    assert "forward" not in vars(model)
