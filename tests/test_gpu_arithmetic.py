"""Contracts under the arithmetic of a GPU, in Triton's interpreter.

What a GPU computes approximately is off here by as much as its documentation allows, with either
sign or at random: exp2 by 2 ulp (ex2.approx), log by 1 ulp, `/` by 2 ulp (div.full). Sums, products
and `div_rn` are rounded to the nearest on a GPU as well.
"""

import os

import numpy as np
import pytest
import torch

from gspo_ops import log_probs_from_logits, reference
from gspo_ops.testing import BOUNDS, synthetic_logits
from gspo_ops.testing.cases import sample

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="is about the interpreter"
    ),
]
ULP = 2.0**-23


@pytest.fixture(params=["above", "below", "at random"])
def gpu_arithmetic(request, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    random = np.random.default_rng(0)

    def off(x: np.ndarray, ulps: float) -> np.ndarray:
        sign = {"above": 1.0, "below": -1.0}.get(request.param)
        if sign is None:
            sign = random.uniform(-1, 1, x.shape)
        return (x.astype(np.float64) * (1 + sign * ulps * ULP)).astype(x.dtype)

    def unary(function, ulps, is_exact):
        @np.errstate(all="ignore")
        def create(self, x):
            exact = function(x.data)
            moved = np.where(is_exact(x.data), exact, off(exact, ulps)).astype(exact.dtype)
            return TensorHandle(moved, x.dtype.scalar)

        return create

    @np.errstate(all="ignore")
    def create_fdiv(self, a, b):
        exact = a.data / b.data
        moved = exact if (b.data == 1).all() else off(exact, 2)
        return TensorHandle(moved.astype(exact.dtype), a.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_exp2", unary(np.exp2, 2, lambda x: x == 0))
    monkeypatch.setattr(InterpreterBuilder, "create_exp", unary(np.exp, 2, lambda x: x == 0))
    monkeypatch.setattr(InterpreterBuilder, "create_log", unary(np.log, 1, lambda x: x == 1))
    monkeypatch.setattr(InterpreterBuilder, "create_fdiv", create_fdiv)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("likely", [True, False], ids=["sampled", "unlikely"])
def test_log_probs(gpu_arithmetic, device, temperature, likely):
    """abs(logits) / temperature is up to 32, as the contract has it."""
    logits = synthetic_logits(6, 4, 1000, device=device).flatten(0, 1)
    logits = (logits * (32 * temperature / logits.abs().amax())).clamp(-32, 32)
    random = torch.Generator().manual_seed(0)
    targets = sample(logits / temperature, random) if likely else logits.argmin(-1)
    ours = log_probs_from_logits(logits, targets, temperature=temperature)
    exact = reference.log_probs_from_logits(logits.double(), targets, temperature=temperature)
    # the contract's bound, and what rounds a difference of logits and the result, where those are
    # so large that it is more
    steps = torch.from_numpy(np.spacing(exact.abs().float().cpu().numpy())).to(device)
    assert ((ours - exact).abs() <= (2 * steps).clamp(min=BOUNDS["log_prob"])).all()
