"""The kernels' reads and writes of each element of logits and dlogits, in the interpreter."""

import os

import numpy as np
import pytest
import torch

from gspo_ops import GSPO, policy_loss_from_logits

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="accesses are counted in the interpreter"
    ),
]

B, T = 4, 4
# one masked block; a ragged one; whole blocks before the ragged one
SIZES = [1000, 4097, 20000]


class Traffic:
    """The addresses that the interpreter loads from and stores to."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import InterpreterBuilder

        self.loaded, self.stored = [], []
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counting_load(builder, ptrs, mask, *args, **kwargs):
            self.loaded.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)])
            return load(builder, ptrs, mask, *args, **kwargs)

        def counting_store(builder, ptrs, value, mask, *args, **kwargs):
            self.stored.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)])
            return store(builder, ptrs, value, mask, *args, **kwargs)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)

    def take(self, *tensors):
        """Return (loads, stores) of every element of each tensor since the last call."""
        taken = [(count(self.loaded, x), count(self.stored, x)) for x in tensors]
        self.loaded, self.stored = [], []
        return taken


def count(accesses, x):
    """Count the accesses to each element of x; check that none touches the gaps between rows."""
    storage = x.untyped_storage()
    offsets = np.concatenate([a.ravel() for a in accesses]).astype(np.int64) - storage.data_ptr()
    inside = offsets[(offsets >= 0) & (offsets < storage.nbytes())]
    assert (inside % x.itemsize == 0).all()
    times = np.bincount(inside // x.itemsize, minlength=storage.nbytes() // x.itemsize)
    in_x = torch.from_numpy(times).as_strided(x.shape, x.stride(), x.storage_offset())
    assert in_x.sum() == len(inside)
    return in_x


@pytest.fixture
def traffic(monkeypatch):
    return Traffic(monkeypatch)


def make_batch(V, dtype, sliced):
    """Return logits, targets, mask, advantages, old log-probs, and which rows have a gradient."""
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(B, T + sliced, V, generator=generator).to(dtype)[:, :T].requires_grad_()
    targets = torch.randint(V, (B, T), generator=generator)
    targets[0, 0], targets[2, 0] = 0, V - 1
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 2:] = mask[1, 0] = False
    # live, clipped above, live, zero advantage
    advantages = torch.tensor([1.0, 1.0, -1.0, 0.0])
    log_probs = logits.detach().float().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    old = log_probs - torch.tensor([0.0, 0.1, 0.0, 0.0])[:, None]
    is_live = mask & torch.tensor([True, False, True, False])[:, None]
    return logits, targets, mask, advantages, old, is_live


def expected(rows, targets, times, V):
    """Return `times` everywhere in these rows, and one more at their targets."""
    once = torch.nn.functional.one_hot(targets, V)
    return torch.where(rows[..., None], times + once, 0)


def show(name, loads, stores, rows, V):
    total, live = loads.sum().item(), int(rows.sum())
    print(
        f"{name}: V={V}, {live} of {rows.numel()} rows: {total} loads of logits "
        f"({total / max(live * V, 1):.4f} per logit of these rows), "
        f"{stores.sum().item()} stores of dlogits ({stores.double().mean().item():.4f} per element)"
    )


@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("V", SIZES)
def test_each_live_logit_once(V, dtype, sliced, traffic):
    logits, targets, mask, advantages, old, is_live = make_batch(V, dtype, sliced)
    loss = policy_loss_from_logits(logits, targets, old, advantages, mask=mask).loss
    ((loads, stores),) = traffic.take(logits)
    show("forward", loads, stores, mask, V)
    assert torch.equal(loads, expected(mask, targets, 1, V))
    assert not stores.any()

    (grad,) = torch.autograd.grad(loss, logits)
    (loads, stores), (grad_loads, grad_stores) = traffic.take(logits, grad)
    show("backward", loads, grad_stores, is_live, V)
    assert torch.equal(loads, expected(is_live, targets, 1, V))
    assert (grad_stores == 1).all()
    assert not stores.any()
    assert not grad_loads.any()


@pytest.mark.parametrize("V", SIZES)
def test_on_policy_forward_reads_nothing(V, traffic):
    logits, targets, mask, advantages, _, _ = make_batch(V, torch.bfloat16, True)
    is_live = mask & (advantages != 0)[:, None]
    loss = policy_loss_from_logits(logits, targets, None, advantages, mask=mask).loss
    ((loads, stores),) = traffic.take(logits)
    show("on-policy forward", loads, stores, mask, V)
    assert not loads.any()

    # once for the maximum and the sum, once for the gradient
    (grad,) = torch.autograd.grad(loss, logits)
    (loads, _), (_, grad_stores) = traffic.take(logits, grad)
    show("on-policy backward", loads, grad_stores, is_live, V)
    assert torch.equal(loads, expected(is_live, targets, 2, V))
    assert (grad_stores == 1).all()


def test_packed(traffic):
    logits, targets, mask, advantages, old, is_live = make_batch(1000, torch.bfloat16, False)
    logits = logits.detach().view(B * T, -1).requires_grad_()
    loss = policy_loss_from_logits(
        logits, targets.view(-1), old.view(-1), advantages, mask=mask.view(-1),
        cu_seqlens=torch.arange(0, B * T + 1, T, dtype=torch.int32), objective=GSPO(),
    ).loss  # fmt: skip
    ((loads, _),) = traffic.take(logits)
    assert torch.equal(loads, expected(mask, targets, 1, 1000).view_as(loads))
    (grad,) = torch.autograd.grad(loss, logits)
    (loads, _), (_, grad_stores) = traffic.take(logits, grad)
    assert torch.equal(loads, expected(is_live, targets, 1, 1000).view_as(loads))
    assert (grad_stores == 1).all()
