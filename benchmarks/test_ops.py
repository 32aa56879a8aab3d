"""The hot ops under pytest-benchmark, to compare two commits.

pytest benchmarks --benchmark-only --benchmark-save=NAME
pytest benchmarks --benchmark-only --benchmark-compare='*NAME'
"""

from functools import partial

import pytest
import torch

from gspo_ops import group_advantages, log_probs_from_hidden, log_probs_from_logits
from gspo_ops.benchmarks.bench import SHAPES, step
from gspo_ops.benchmarks.measure import default_device, synchronize
from gspo_ops.benchmarks.providers import LOSSES, OURS
from gspo_ops.benchmarks.workloads import make_workload

DEVICE = default_device()
PLANS = [name for name in LOSSES["hidden"] if name.startswith(OURS)]


@pytest.fixture(scope="module")
def workloads():
    """Return a function that makes each workload once, by path and f."""
    made = {}

    def workload(path, f=1.0):
        if (path, f) not in made:
            made[path, f] = make_workload(path, SHAPES[DEVICE.type], torch.bfloat16, f, DEVICE)
        return made[path, f]

    return workload


def run(benchmark, function):
    def synchronized():
        function()
        synchronize(DEVICE)

    benchmark.pedantic(synchronized, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("f", [1.0, 0.5])
def test_policy_loss_from_logits(benchmark, workloads, f):
    run(benchmark, partial(step, LOSSES["logits"][OURS].compute, workloads("logits", f)))


@pytest.mark.parametrize("f", [1.0, 0.5])
@pytest.mark.parametrize("plan", PLANS)
def test_policy_loss_from_hidden(benchmark, workloads, plan, f):
    provider = LOSSES["hidden"][plan]
    if why := provider.missing(DEVICE):
        pytest.skip(why)
    run(benchmark, partial(step, provider.compute, workloads("hidden", f)))


@pytest.mark.parametrize("path", ["logits", "hidden"])
def test_log_probs_without_gradient(benchmark, workloads, path):
    workload = workloads(path)
    op = {"logits": log_probs_from_logits, "hidden": log_probs_from_hidden}[path]
    operands = [x.detach() for x in workload.operands]
    run(benchmark, lambda: op(*operands, workload.batch.targets))


def test_group_advantages(benchmark):
    rewards = torch.rand(4096, device=DEVICE).round()
    run(benchmark, partial(group_advantages, rewards, group_size=8))
