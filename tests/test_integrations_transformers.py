"""loss_from_model on small random models of each family of heads, against their own logits."""

import subprocess
import sys

import pytest
import torch

from gspo_ops import GRPO, GSPO, reference
from gspo_ops.integrations.transformers import (
    log_probs_from_model,
    loss_from_model,
    output_head,
)

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
    "Phi, bias": ("Phi", {}),
}
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


def test_the_head_is_not_called():
    model = make("Llama")
    batch, mask = make_batch()
    called = []
    model.lm_head.register_forward_hook(lambda *_: called.append(1))
    loss_from_model(model, batch, None, torch.ones(4), mask=mask).loss.backward()
    assert not called
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
    with pytest.raises(ValueError, match=r"batch must have input_ids, got \['ids'\]"):
        log_probs_from_model(model, {"ids": mask}, T)
    with pytest.raises(ValueError, match=r"S > T=11 response tokens, got \(4, 11\)"):
        log_probs_from_model(model, batch, 11)
    with pytest.raises(ValueError, match=r"mask must have shape \(B, T\).*got \(4,\)"):
        loss_from_model(model, batch, None, torch.ones(4), mask=mask[:, 0])
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        log_probs_from_model(model.model, batch, T)
    model.config.logit_scale, model.config.final_logit_softcapping = 0.5, 3.0
    with pytest.raises(ValueError, match="both a scale of its logits and a soft cap"):
        output_head(model)


def test_transformers_is_not_imported():
    code = (
        "import sys, gspo_ops, gspo_ops.integrations.transformers; "
        "assert not {'transformers', 'trl', 'verl', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
