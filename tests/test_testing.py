"""`verify` passes on the ops as they are, and notices every kind of mistake planted in them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gspo_ops
from gspo_ops import GSPO, reference, testing

ROOT = Path(__file__).parent.parent
# verifies copies of the package, each in its own process, which ends at the first finding
VERIFY = """
import os, pathlib, sys, torch, triton
for folder in sys.argv[1:]:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    sys.path.insert(0, folder)
    from gspo_ops import testing
    from gspo_ops.testing import verification
    if {interpreted}:
        testing.patch_interpreter()
    measure = testing.measure
    def measure_or_exit(case):
        for m in measure(case):
            if not m.ok:
                pathlib.Path(folder, "findings").write_text(testing.table([m]))
                os._exit(0)
            yield m
    verification.measure = measure_or_exit
    testing.verify(torch.device("cpu"), dtypes=[torch.float32], {options})
    pathlib.Path(folder, "findings").write_text("")
    os._exit(0)
"""
OPTIONS = {
    "logits": "shapes=[(9, 3, 70)], head_shapes=[], further=[]",
    "head": "shapes=[], head_shapes=[(5, 1, 40, 1100)], quick=True",
    "objective": "shapes=[], head_shapes=[]",
}

# mistake: (file, correct line, broken line), for the kernels and for the CPU path
KERNELS = {
    "nothing": ("kernels/logits.py", "grad = e * at_others", "grad = e * at_others"),
    "zero gradient": ("kernels/logits.py", "if live:\n        x_ptr = logits_ptr + row_offset("
                      "row, T, stride_b, stride_t, ALIGN)\n        target = load_target_id("
                      "targets_ptr + row, V)\n        if target_logit_ptr is None",
                      "if live & (row < 0):\n        x_ptr = logits_ptr + row_offset("
                      "row, T, stride_b, stride_t, ALIGN)\n        target = load_target_id("
                      "targets_ptr + row, V)\n        if target_logit_ptr is None"),
    "missing softmax term": ("kernels/logits.py", "grad = e * at_others", "grad = e * 0.0"),
    "missing target term": (
        "kernels/logits.py", "tl.where(cols == target, at_target, grad)", "grad"
    ),
    "entropy without its mean": (
        "kernels/logits.py", "log_q - tl.log(row_sum) + entropy", "log_q - tl.log(row_sum)"
    ),
    "missing cross-token term": (
        "kernels/policy_loss.py",
        "g_weight = rollout_mean if IS_MEAN else rollout_weight",
        "g_weight = rollout_weight",
    ),
    "the token's ratio for the sequence's": (
        "kernels/policy_loss.py",
        "-(slope * weight) * (advantage * g_weight)",
        "-(tl.exp(token_log_ratio) * weight) * (advantage * g_weight)",
    ),
    "no length normalisation": (
        "kernels/policy_loss.py",
        'if AGGREGATION == "seq-mean-token-mean":\n        weight = inv_n',
        'if AGGREGATION == "seq-mean-token-mean":\n        weight = 1.0',
    ),
    "mask ignored": (
        "kernels/policy_loss.py",
        "in_range & (tl.load(mask_ptr + rows, mask=in_range, other=0) != 0)",
        "in_range",
    ),
    "wrong clip side": (
        "kernels/policy_loss.py",
        "valid & (advantage > 0) & (decisive > log_clip_high)",
        "valid & (advantage < 0) & (decisive > log_clip_high)",
    ),
    "clipped rows still trained": (
        "kernels/policy_loss.py",
        "g = tl.where(has_stopped, 0.0, ", "g = tl.where(has_stopped & False, 0.0, ",
    ),
}  # fmt: skip
CPU_PATH = {
    "nothing": ("gspo_ops/logits_cpu.py", "q = e.odds.q()", "q = e.odds.q()"),
    "missing softmax term": (
        "gspo_ops/logits_cpu.py",
        "torch.mul(e.p, (-rows.g * coef)[:, None], out=out)",
        "torch.mul(e.p, 0.0, out=out)",
    ),
    "missing target term": (
        "gspo_ops/logits_cpu.py", "_put(out, rows.targets, at_target)", "pass"
    ),
    "wrong clip side": (
        "gspo_ops/policy_cpu.py",
        "(advantages > 0) & (tokens.decisive > log_high)",
        "(advantages < 0) & (tokens.decisive > log_high)",
    ),
    "mask ignored": (
        "gspo_ops/policy_cpu.py", "    return valid\n", "    return torch.ones_like(valid)\n"
    ),
    "no length normalisation": (
        "gspo_ops/policy_cpu.py", "(x / tokens.n.clamp(min=1)[tokens.ids] for x", "(x for x"
    ),
}  # fmt: skip
OBJECTIVES_ON_CPU = {
    "nothing": ("gspo_ops/policy_cpu.py", "value = slope = ratio\n", "value = slope = ratio\n"),
    "a dual clip that trains": (
        "gspo_ops/policy_cpu.py", "self.is_low | self.is_high | self.is_dual",
        "self.is_low | self.is_high",
    ),
    "no gradient through a shared ratio": (
        "gspo_ops/policy_cpu.py", "g, shared = shared, g", "g = shared"
    ),
    "weights that are not clipped": (
        "gspo_ops/policy_cpu.py", "value = slope = ratio.clamp(low, high)", "value = slope = ratio"
    ),
    "one temperature": (
        "gspo_ops/policy_cpu.py", "tau.masked_fill(advantages > 0", "tau.masked_fill(advantages > 9"
    ),
    "log-ratios of tokens that are not clipped": (
        "gspo_ops/policy_cpu.py", "log_ratio.clamp(max=log_high)", "log_ratio"
    ),
    "a clamped estimate that trains": (
        "gspo_ops/policy_cpu.py", "torch.where(is_free | delta.isnan(), grad, 0.0)", "grad"
    ),
    "an estimate differentiated as written": (
        "gspo_ops/policy_cpu.py", 'kind.endswith("+")', 'kind.endswith("-")'
    ),
    "a ratio without a gradient": (
        "gspo_ops/policy_cpu.py", 'objective.kl_weight == "ratio"', 'objective.kl_weight == "none"'
    ),
    "a bonus without a gradient": ("gspo_ops/autograd.py", "h * (grad_loss", "0 * h * (grad_loss"),
    "another temperature": (
        "gspo_ops/logits_cpu.py", "x_target) / softmax.temperature",
        "x_target) / softmax.temperature**1.001",
    ),
    "another temperature of a head": (
        "gspo_ops/softmax.py", "(math.e) / self.temperature", "(math.e) / self.temperature**1.001"
    ),
    "another soft cap": (
        "gspo_ops/logits_cpu.py", "tanh_().mul_(softcap)", "tanh_().mul_(1.001 * softcap)"
    ),
    "another soft cap of a head": (
        "gspo_ops/tiles_torch.py", "z.mul_(softmax.softcap)", "z.mul_(1.001 * softmax.softcap)"
    ),
    "another denominator": (
        "gspo_ops/policy_cpu.py", "torch.where(D > 0, D,", "torch.where(D > 0, 1.001 * D,"
    ),
    "another scale of LoRA": (
        "gspo_ops/tiles.py", ") * options.lora_scale", ") * 1.001 * options.lora_scale"
    ),
    "a wrong mean": ("gspo_ops/policy_cpu.py", "totals.k3 / n", "1.001 * totals.k3 / n"),
    "a wrong fraction": (
        "gspo_ops/policy_cpu.py", "totals.active / n", "1.001 * totals.active / n"
    ),
}  # fmt: skip
HEAD_KERNELS = {
    "nothing": ("kernels/hidden.py", "acc = tl.dot(e, x, acc", "acc = tl.dot(e, x, acc"),
    "missing target term": (
        "kernels/hidden.py",
        "total = tl.sum(acc, axis=0) + tl.load(at,",
        "total = 0.0 * tl.sum(acc, axis=0) + tl.load(at,",
    ),
    "target in a recomputed tile": (
        "kernels/hidden.py",
        "tl.where(cols[None, :] == y[:, None], 0.0, e * derivative)", "e * derivative",
    ),
    "target counted twice": (
        "kernels/hidden.py",
        "tl.where(inside & (at != y), (z - base) * scale,", "tl.where(inside, (z - base) * scale,",
    ),
    "target's logit of another precision": (
        "kernels/hidden.py",
        "tl.store(target_logit_ptr + row, z_y)", "tl.store(target_logit_ptr + row, z_y + 1e-5)",
    ),
    "missing row scale": (
        "kernels/hidden.py", "total = factor * tl.load(at,", "total = tl.load(at,",
    ),
    "missing target term of rows": (
        "kernels/hidden.py", "total += at_target * w.to(tl.float32)", "total += 0.0",
    ),
    "last tile of a product dropped": (
        "kernels/hidden.py",
        "for start in range(0, K, BLOCK_K):", "for start in range(0, K - BLOCK_K + 1, BLOCK_K):",
    ),
    "dead rows in the sum": (
        "kernels/hidden.py",
        "places = tl.load(rows_ptr + rows, mask=inside, other=0)", "places = rows",
    ),
}  # fmt: skip
HEAD_CPU_PATH = {
    "nothing": ("gspo_ops/tiles_torch.py", "_exp2(z)\n    s", "_exp2(z)\n    s"),
    "target in a recomputed tile": ("gspo_ops/tiles_torch.py", "z[hit] = 0.0", "pass"),
    "missing target term of rows": (
        "gspo_ops/tiles_torch.py", "out[r] += w.index_select(0, y[r]) * at_target[r, None]", "pass"
    ),
    "missing target term of columns": (
        "gspo_ops/tiles_torch.py", "out[y, c] = sums.add_(out[y, c]).to(out.dtype)", "pass"
    ),
    "missing row scale": (
        "gspo_ops/tiles_torch.py", "out.mul_(row_grads.factor[:, None])", "pass"
    ),
    "last tile dropped": (
        "gspo_ops/tiles.py",
        "range(whole.start, whole.stop, step)", "range(whole.start, whole.stop - step + 1, step)",
    ),
    "only the last chunk's dweight": (
        "gspo_ops/chunks.py",
        "add=Wanted(weight=i > 0, bias=i > 0, lora_a=i > 0, lora_b=i > 0)", "add=Wanted()",
    ),
}  # fmt: skip

MISTAKES = {
    ("logits", True): KERNELS,
    ("logits", False): CPU_PATH,
    ("head", True): HEAD_KERNELS,
    ("head", False): HEAD_CPU_PATH,
    ("objective", False): OBJECTIVES_ON_CPU,
}


def broken_copy(folder, file, line, broken):
    shutil.copytree(ROOT / "gspo_ops", folder / "gspo_ops")  # follows the link to kernels/
    path = folder / (file if file.startswith("gspo_ops") else f"gspo_ops/{file}")
    source = path.read_text()
    assert source.count(line) == 1, f"{line!r} occurs {source.count(line)} times in {file}"
    path.write_text(source.replace(line, broken))


@pytest.mark.parametrize(
    ("start", "interpreted"),
    MISTAKES,
    ids=lambda x: ["cpu path", "kernels"][x] if x in (0, 1) else x,
)
def test_verify_notices_what_is_broken(tmp_path, interpreted, start):
    mistakes = MISTAKES[start, interpreted]
    for name, mistake in mistakes.items():
        broken_copy(tmp_path / name, *mistake)
    program = VERIFY.format(interpreted=interpreted, options=OPTIONS[start])
    done = subprocess.run(
        [sys.executable, "-c", program, *(tmp_path / name for name in mistakes)],
        env=os.environ | {"TRITON_INTERPRET": str(int(interpreted))},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    findings = {name: tmp_path / name / "findings" for name in mistakes}
    assert all(path.exists() for path in findings.values()), done.stderr
    unnoticed = [name for name, path in findings.items() if not path.read_text()]
    assert unnoticed == ["nothing"], findings["nothing"].read_text()


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("objective", "dtype"),
    [
        *((objective, torch.float32) for objective in testing.OBJECTIVES),
        (GSPO(), torch.bfloat16), (GSPO(), torch.float16),
    ],
    ids=lambda x: str(x)[6:] if isinstance(x, torch.dtype) else type(x).__name__,
)  # fmt: skip
def test_contracts(device, objective, dtype):
    """Everything that `verify` measures is within its bound.

    The objective sees log-probs, which are float32 whatever the logits are.
    """
    logits = testing.synthetic_logits(9, 4, 1000, device=device).to(dtype)
    for packed in (False, True):
        for m in testing.measure(testing.make_case(logits, objective, packed=packed)):
            assert m.ok, m


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_contracts_from_hidden(device, dtype):
    measured = testing.verify(
        device, dtypes=[dtype], shapes=[], head_shapes=[(5, 1, 21, 1100)], quick=True
    )
    assert {m.op for m in measured} == {"log_probs_from_hidden", "policy_loss_from_hidden"}
    for m in measured:
        assert m.ok, m


@pytest.mark.kernels
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests the interpreter")
def test_interpreter_leaves_no_product_to_a_blas(monkeypatch):
    """A BLAS may round a row by its place, which can feign or hide a dependence on the batch."""

    def refuse(*args, **kwargs):
        raise AssertionError("the BLAS of this machine takes part")

    monkeypatch.setattr(np, "matmul", refuse)
    hidden, weight, _ = testing.synthetic_head(1, 3, 16, 130, device=torch.device("cpu"))[:3]
    targets = torch.tensor([0, 129, 64])
    log_probs = gspo_ops.log_probs_from_hidden(hidden[0], weight, targets, products="triton")
    expected = reference.log_probs_from_hidden(hidden[0].double(), weight.double(), targets)
    assert testing.worst(log_probs - expected) <= testing.BOUNDS["log_prob from hidden"]


def test_the_cases_straddle_the_clip_edges():
    for objective in testing.OBJECTIVES:
        logits = testing.synthetic_logits(9, 4, 130, device=torch.device("cpu"))
        case = testing.make_case(logits, objective, packed=False)
        _, stats = reference.policy_loss_from_logits(
            case.double().logits, case.targets, case.old_log_probs.double(),
            case.advantages.double(), **case.double().options(),
        )  # fmt: skip
        assert 0 < stats["clip_frac_low"] < 0.5
        assert 0 < stats["clip_frac_high"] < 0.5


def test_ulp_distance():
    x = torch.tensor([1.0, -1.0, 0.0], dtype=torch.bfloat16)
    assert testing.ulp_distance(x, x.double()) == 0
    assert testing.ulp_distance(x, torch.tensor([1.0 + 2**-7, -1.0, 0.0]).double()) == 1
    assert testing.ulp_distance(x, torch.tensor([1.0, -1.0, 1e-3]).double()) > 1000
    assert testing.ulp_distance(x * float("nan"), x.double()) != 0


def test_nan_is_over_every_bound():
    m = testing.Measured("op", torch.float32, "case", "ratio", float("nan"))
    assert not m.ok
    fine = testing.Measured("op", torch.float32, "case", "ratio", 0.0)
    assert testing.worst_of([fine, m, fine]) == [m]


def test_nan_is_the_worst_of_several_measurements():
    x, nan = torch.tensor([1.0, 2.0]), float("nan")
    assert np.isnan(testing.worst(x * nan))
    for values in ([0.0, nan], [nan, 0.0], [float("inf"), nan, 1.0]):
        assert np.isnan(testing.largest(values)), values
    assert testing.largest([0.0, 2.0, 1.0]) == 2.0
