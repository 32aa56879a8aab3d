"""Routing Replay on small random models of transformers."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from gspo_ops.trainer.routing_replay import (  # noqa: E402
    RoutingReplay,
    expert_churn,
    find_routers,
)

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "Qwen3Moe": {**EXPERTS, "norm_topk_prob": True, "head_dim": 8},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 16, "norm_topk_prob": False},
    "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
}
TOKENS = torch.arange(24).reshape(2, 12) % 48 + 2


def make(family="Qwen3Moe"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for router in find_routers(model):
            router.weight.normal_()
    return model


def routers_of(model):
    return [p for name, p in model.named_parameters() if "gate.weight" in name or "router" in name]


def loss_and_logits(model, tokens=TOKENS):
    model.zero_grad()
    logits = model(tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return loss, logits.detach()


def recorded(model, tokens=TOKENS):
    routing = RoutingReplay()
    with torch.no_grad(), routing.record(model):
        model(tokens, use_cache=False)
    return routing


@pytest.mark.example("docs/trainer.md", "Routing Replay")
def test_the_documented_use(python_blocks):
    (code,) = python_blocks("docs/trainer.md")["Routing Replay"]
    model = make()
    scope = {
        "torch": torch, "model": model, "batch": TOKENS,
        "log_probs_of": lambda model, batch: loss_and_logits(model, batch)[1],
        "loss_of": lambda model, batch, old: loss_and_logits(model, batch)[0],
    }  # fmt: skip
    exec(code, scope)
    assert all(p.grad.abs().sum() > 0 for p in routers_of(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_of_native_routing_changes_nothing(family):
    model = make(family)
    loss, logits = loss_and_logits(model)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    routing = recorded(model)
    assert [x.shape for x in routing.indices] == [(24, 2)] * 2
    with routing.replay(model):
        replayed, replayed_logits = loss_and_logits(model)
        replayed.backward()
    assert (replayed - loss).item() == 0.0
    assert torch.equal(replayed_logits, logits)
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in expected)
        assert p.grad is None or torch.equal(p.grad, expected[name]), name
    assert all(p.grad.abs().sum() > 0 for p in routers_of(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_recorded_experts_are_used(family):
    """The experts stay as recorded after an update that routes differently; routers still train."""
    model = make(family)
    routing = recorded(model)
    with torch.no_grad():
        for p in routers_of(model):
            p.normal_()
    _, native = loss_and_logits(model)
    seen = []
    hooks = [
        router.register_forward_hook(lambda m, i, out: seen.append(out[2]))
        for router in find_routers(model)
    ]
    with routing.replay(model):
        loss, logits = loss_and_logits(model)
        loss.backward()
    for hook in hooks:
        hook.remove()
    assert all(map(torch.equal, seen, routing.indices))
    assert not torch.allclose(logits, native)
    assert all(p.grad.abs().sum() > 0 for p in routers_of(model))
    assert expert_churn(routing, recorded(model)) > 0.2


def test_the_same_with_gradient_checkpointing():
    model = make().train()
    routing = recorded(model)
    with torch.no_grad():
        for p in routers_of(model):
            p.normal_()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with routing.replay(model):
            loss, _ = loss_and_logits(model)
            loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_forgotten_tokens_route_natively():
    model = make()
    routing = recorded(model)
    with torch.no_grad():
        for p in routers_of(model):
            p.normal_()
    _, native = loss_and_logits(model)
    where = torch.zeros(2, 12, dtype=torch.bool)
    where[1] = True
    routing.route_natively(where)
    with routing.replay(model):
        _, logits = loss_and_logits(model)
    torch.testing.assert_close(logits[1], native[1])  # experts see other rows beside these
    assert not torch.allclose(logits[0], native[0])
    with pytest.raises(ValueError, match="where has 3 tokens, but 24 were recorded"):
        routing.route_natively(torch.ones(3, dtype=torch.bool))


def test_everything_is_put_back():
    model = make()
    before = [dict(vars(router)) for router in find_routers(model)]
    routing = recorded(model)
    with pytest.raises(RuntimeError, match="on purpose"), routing.replay(model):
        raise RuntimeError("on purpose")
    assert [dict(vars(router)) for router in find_routers(model)] == before


def test_wrong_uses_are_refused():
    model = make()
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router"):
        find_routers(dense)
    with pytest.raises(ValueError, match="nothing is recorded"), RoutingReplay().replay(model):
        pass
    routing = recorded(model)
    with pytest.raises(ValueError, match="already recorded"), routing.record(model):
        pass
    shapes = r"router 0 was recorded for .* \(24, 2\), got \(12, 2\)"
    with pytest.raises(ValueError, match=shapes), routing.replay(model):
        model(TOKENS[:1])
    missing = r"routers \[0, 1\] of 2 did not run while replaying"
    with pytest.raises(RuntimeError, match=missing), routing.replay(model):
        pass
    missing = "did not run while recording"
    with pytest.raises(RuntimeError, match=missing), RoutingReplay().record(model):
        pass
    with pytest.raises(RuntimeError, match="router 0 ran twice"), RoutingReplay().record(model):
        model(model(TOKENS).logits.argmax(-1))
    twice = "already being recorded or replayed"
    with pytest.raises(RuntimeError, match=twice), routing.replay(model), routing.replay(model):
        pass
    routing.indices[0][0, 0] = 8
    with pytest.raises(ValueError, match="8 experts, but expert 8"), routing.replay(model):
        model(TOKENS)
    routing.indices.pop()
    with pytest.raises(ValueError, match="1 routers were recorded"), routing.replay(model):
        pass


def test_churn():
    before, after = RoutingReplay(), RoutingReplay()
    before.indices = [torch.tensor([[0, 1], [2, 3]])]
    after.indices = [torch.tensor([[1, 0], [2, 4]])]  # another order is no change
    assert expert_churn(before, after) == 0.25
    assert expert_churn(before, after, torch.tensor([True, False])) == 0.0
    assert expert_churn(before, before) == 0.0
    after.indices = [torch.tensor([[1, 0]])]
    with pytest.raises(ValueError, match="the same tokens"):
        expert_churn(before, after)
