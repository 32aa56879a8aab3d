"""The hot ops under pytest-benchmark, to compare two commits.

pytest benchmarks --benchmark-only --benchmark-save=NAME
pytest benchmarks --benchmark-only --benchmark-compare='*NAME'
"""

from functools import partial

import pytest
import torch

from gspo_ops import group_advantages, log_probs_from_hidden, log_probs_from_logits
from gspo_ops.benchmarks.bench import SHAPES, step
from gspo_ops.benchmarks.cases import make_case
from gspo_ops.benchmarks.measure import default_device, synchronize
from gspo_ops.benchmarks.providers import LOSSES, OURS

DEVICE = default_device()
PLANS = [name for name in LOSSES["hidden"] if name.startswith(OURS)]


@pytest.fixture(scope="module")
def cases():
    """Made once, by path and f."""
    made = {}

    def case(path, f=1.0):
        if (path, f) not in made:
            made[path, f] = make_case(path, SHAPES[DEVICE.type], torch.bfloat16, f, DEVICE)
        return made[path, f]

    return case


def run(benchmark, function):
    def synchronized():
        function()
        synchronize(DEVICE)

    benchmark.pedantic(synchronized, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("f", [1.0, 0.5])
def test_policy_loss_from_logits(benchmark, cases, f):
    run(benchmark, partial(step, LOSSES["logits"][OURS].compute, cases("logits", f)))


@pytest.mark.parametrize("f", [1.0, 0.5])
@pytest.mark.parametrize("plan", PLANS)
def test_policy_loss_from_hidden(benchmark, cases, plan, f):
    provider = LOSSES["hidden"][plan]
    if why := provider.missing(DEVICE):
        pytest.skip(why)
    run(benchmark, partial(step, provider.compute, cases("hidden", f)))


@pytest.mark.parametrize("path", ["logits", "hidden"])
def test_log_probs_without_gradient(benchmark, cases, path):
    case = cases(path)
    op = {"logits": log_probs_from_logits, "hidden": log_probs_from_hidden}[path]
    operands = [x.detach() for x in case.operands]
    run(benchmark, lambda: op(*operands, case.batch.targets))


def test_group_advantages(benchmark):
    rewards = torch.rand(4096, device=DEVICE).round()
    run(benchmark, partial(group_advantages, rewards, group_size=8))
