"""The benchmarks compare equal functions, refuse other ones, and report what they measured."""

import json
import math
from functools import partial

import pytest
import torch

from gspo_ops import reference
from gspo_ops.benchmarks import bench, clip_error, measure, plots, providers, report, workloads
from gspo_ops.benchmarks.providers import BASELINE, LOSSES, OURS, Provider

CPU = torch.device("cpu")
SHAPE = (48, 301, 24)
NOWHERE = {"environment": [], "threads": 1, "commit": "", "date": ""}
ALL = [(path, name) for path, table in LOSSES.items() for name in table]


def present(provider):
    if why := provider.missing(CPU):
        pytest.skip(why)
    return provider.compute


# Cases


@pytest.mark.parametrize("path", LOSSES)
@pytest.mark.parametrize("lengths", ["square", "ragged"])
@pytest.mark.parametrize("f", [1.0, 0.6, 0.1])
def test_live_sequences_and_no_others_have_a_gradient(path, lengths, f):
    workload = workloads.make_workload(path, SHAPE, torch.float32, f, CPU, lengths=lengths)
    _, (grad, *_) = bench.step(LOSSES[path][BASELINE].compute, workload)
    rows = grad.abs().sum(-1) > 0
    assert workload.live.sum() == round(16 * f)
    assert torch.equal(rows, workload.live[:, None] & workload.batch.mask)
    dead = workload.batch.advantages[~workload.live]
    if f < 1:
        assert {bool(a) for a in dead} == {True, False}, "both reasons for a dead row"
    assert workload.rows == (48, int(workload.batch.mask.sum()), int(rows.sum()))
    assert (lengths == "square") == bool(workload.batch.mask.all())


@pytest.mark.parametrize("lengths", ["square", "ragged"])
@pytest.mark.parametrize("path", LOSSES)
def test_exact_results_are_those_of_the_whole_batch(path, lengths):
    workload = workloads.make_workload(path, SHAPE, torch.float64, 0.6, CPU, lengths=lengths)
    of = getattr(reference, f"policy_loss_from_{path}")
    leaves, batch = workload.leaves(), workload.batch
    loss, _ = of(
        *leaves, batch.targets, batch.old.double(), batch.advantages.double(), mask=batch.mask
    )
    loss.backward()
    found = workloads.exact(workload)
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    for grad, leaf in zip(found.grads, leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad)


def test_least_work():
    workload = workloads.make_workload("logits", SHAPE, torch.bfloat16, 0.5, CPU)
    assert workloads.floor(workload) == (301 * 2 * (48 + 24 + 48), 0)
    workload = workloads.make_workload("hidden", SHAPE, torch.bfloat16, 0.5, CPU)
    assert workloads.floor(workload) == (0, 2 * 301 * 24 * (48 + 24 + 24))
    workload = workloads.make_workload("hidden", SHAPE, torch.bfloat16, 0.5, CPU, frozen_head=True)
    least = workloads.floor(workload)
    assert least == (0, 2 * 301 * 24 * (48 + 24))
    assert least.seconds(1.0, 10.0) == least.flops / 10


# Providers


@pytest.mark.parametrize("f", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("path", "name"), ALL)
def test_every_provider_computes_the_same(path, name, dtype, f):
    if name == "torch.compile":
        pytest.skip("compilation is slow, and what is compiled is the baseline")
    loss = present(LOSSES[path][name])
    workload = workloads.make_workload(path, SHAPE, dtype, f, CPU, lengths="ragged")
    truth = workloads.exact(workload)
    found, baseline = (
        bench.errors(of, workload, truth) for of in (loss, LOSSES[path][BASELINE].compute)
    )
    assert bench.refusal(name, found, baseline, dtype) is None
    assert found.ratio < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("path", LOSSES)
def test_frozen_head(path):
    workload = workloads.make_workload(path, SHAPE, torch.float32, 1.0, CPU, frozen_head=True)
    _, grads = bench.step(LOSSES[path][OURS].compute, workload)
    assert [grad is not None for grad in grads] == [True, False][: len(grads)]
    assert bench.errors(LOSSES[path][OURS].compute, workload, workloads.exact(workload)).grad < 5e-6


@pytest.mark.parametrize("name", providers.METHODS)
def test_every_method_gives_log_probs(name):
    method = present(providers.METHODS[name])
    workload = workloads.make_workload("hidden", SHAPE, torch.bfloat16, 1.0, CPU)
    hidden, weight = (x.detach() for x in workload.operands)
    log_probs = method(hidden, weight, workload.batch.targets)
    exact = clip_error.exact(hidden, weight, workload.batch.targets)
    assert (log_probs.double() - exact).abs().max() < 0.1


def test_absent_providers_say_why(monkeypatch):
    monkeypatch.setitem(providers.DISTRIBUTIONS, "nowhere", "no-such-thing")
    assert Provider(torch.add, "nowhere.at.all").missing(CPU) == "not installed"
    assert "not in torch" in Provider(torch.add, "torch.nn.functional:no_such_loss").missing(CPU)
    assert Provider(torch.add, gpu=True).missing(CPU) == "needs a GPU"
    assert Provider(torch.add, capability=(9, 0)).missing(CPU) == "needs sm_90"
    assert Provider(torch.add, "torch.no_such_module").missing(CPU).startswith("import fails")


def test_select_by_parts_of_names():
    assert list(providers.select("logits", ["COMPILE"])) == [BASELINE, "torch.compile", OURS]
    assert f"{OURS}, plan=keep" not in providers.select("hidden", None)
    assert f"{OURS}, plan=keep" in providers.select("hidden", ["plan=keep"])
    with pytest.raises(ValueError, match="no provider has 'nobody' in its name"):
        providers.select("hidden", ["nobody"])


# Refusal


def wrong_gradient(operands, batch):
    loss = LOSSES["logits"][BASELINE].compute(operands, batch)
    return loss + 0.06 * (loss - loss.detach())


def wrong_loss(operands, batch):
    return LOSSES["logits"][BASELINE].compute(operands, batch) + 0.1


def no_gradient(operands, batch):
    return LOSSES["logits"][BASELINE].compute(operands, batch).detach().requires_grad_()


def crashes(operands, batch):
    raise NotImplementedError("not for\nthis")


def nan(operands, batch):
    return LOSSES["logits"][BASELINE].compute(operands, batch) * math.nan


def noisy(operands, batch):
    """Return a loss as if every ratio were off by 0.1%, three times the clip range."""
    return LOSSES["logits"][BASELINE].compute(operands, batch) * 1.001


CASE = bench.Case("logits", SHAPE, torch.float32, 1.0)


def quick(loss, **options):
    table = {BASELINE: LOSSES["logits"][BASELINE], "peer": Provider(loss)}
    return bench.measure(CASE, CASE.draw(CPU), table, 2, **options)


@pytest.fixture
def timed(monkeypatch):
    """List what is timed, in order, without measuring peaks."""
    seen = []
    real = bench.sample

    def sample(loss, of):
        seen.append(loss)
        return real(loss, of)

    def peak_bytes(step, device):
        step()
        return 10**6

    monkeypatch.setattr(bench, "sample", sample)
    monkeypatch.setattr(bench, "peak_bytes", peak_bytes)
    monkeypatch.setitem(bench._COPY, "cpu", 1 << 16)
    return seen


@pytest.mark.parametrize("wrong", [wrong_gradient, wrong_loss, no_gradient, nan])
def test_wrong_provider_is_refused_before_timing(wrong, timed):
    row = quick(wrong)
    assert "more than" in row["providers"]["peer"]["refused"]
    assert wrong not in timed
    assert timed
    assert any("REFUSED" in line for line in bench.lines(row))


def test_failing_provider_is_reported_and_not_timed(timed):
    row = quick(crashes)
    assert row["providers"]["peer"] == {"missing": "NotImplementedError: not for"}
    assert crashes not in timed


def test_inexact_provider_is_timed_and_marked(timed):
    row = quick(noisy)
    of = row["providers"]["peer"]
    assert 3e-4 < of["error"]["ratio"] < 1e-2
    assert not of["exact_enough"]
    assert row["providers"][BASELINE]["exact_enough"]
    assert timed.count(noisy) == 2
    assert [line for line in bench.lines(row) if "beyond the clip range" in line]


def test_ours_is_refused_when_it_is_only_noisy(timed, monkeypatch):
    table = {BASELINE: LOSSES["logits"][BASELINE], OURS: Provider(noisy)}
    with pytest.raises(SystemExit, match="not timed: gspo_ops: gradients are off by 1"):
        bench.measure(CASE, CASE.draw(CPU), table, 1)
    assert not timed


# Measuring


def test_summary_takes_ratios_within_rounds_and_plausible_peaks():
    eager = [bench.Sample(0.5, 0.5, 300), bench.Sample(1, 1, 300), bench.Sample(2, 2, 10)]
    ours = [bench.Sample(0.2, 0.3, 150), bench.Sample(0.5, 0.5, 150), bench.Sample(0.5, 0.5, 150)]
    of = bench.summary(ours, eager, returned_bytes=100)
    assert of["time_ratio"] == {"median": 0.5, "min": 0.25, "max": 0.5}
    assert of["median_ms"] == {"forward": 500, "backward": 500, "both": 1000}
    assert of["memory_ratio"] == 50 / 200
    for hidden_peak in (0, 100):  # less than the returned gradients, or nothing beyond them
        nothing = bench.summary(ours, [bench.Sample(1, 1, hidden_peak)] * 3, returned_bytes=100)
        assert nothing["extra_bytes"] is nothing["memory_ratio"] is None


def test_inputs_take_turns_until_no_cache_holds_them():
    workload = workloads.make_workload("logits", SHAPE, torch.float32, 1.0, CPU)
    turns = bench.rotation(workload)
    assert len(turns) == 4
    assert len({x.operands[0].data_ptr() for x in turns}) == 4
    assert all(torch.equal(x.operands[0], workload.operands[0]) for x in turns)


def test_rates_are_of_a_plausible_size():
    workload = workloads.make_workload("hidden", (512, 4096, 256), torch.float32, 1.0, CPU)
    assert 1e8 < bench.copy_rate(CPU)() < 1e12
    assert 1e8 < bench.matmul_rate(workload)() < 1e14


def test_interleaved_alternates_the_order():
    order = []
    measure.interleaved({name: partial(order.append, name) for name in "ab"}, 3)
    assert "".join(order) == "abbaab"


# The command


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("--shape", "10,100,8", "multiple of 16"),
        ("--shape", "16x100", "expected N,V,H"),
        ("--shape", "16,0,8", "all positive"),
        ("--f", "0", "must lie in"),
        ("--rounds", "0", "at least 1"),
        ("--dtype", "int8", "invalid choice"),
        ("--against", "nobody", "no provider has 'nobody'"),
    ],
)
def test_bad_arguments_are_named(argument, value, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main([argument, value])
    assert message in capsys.readouterr().err


def test_from_command_line_to_table_and_plot(tmp_path, timed, capsys):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "results.json", tmp_path / "plot.png"
    arguments = ["--shape", "48,301,24", "--rounds", "2", "--f", "1", "0.5", "--against", "Liger"]
    assert bench.main([*arguments, "--out", str(out), "--plot", str(plot)]) == 0
    found = json.loads(out.read_text())
    assert [(row["path"], row["f"]) for row in found["results"]] == [
        ("logits", 1), ("logits", 0.5), ("hidden", 1), ("hidden", 0.5)
    ]  # fmt: skip
    assert {"environment", "commit", "date", "peers", "threads"} <= set(found)
    printed = capsys.readouterr().out
    assert "Liger Triton GRPO" in printed
    assert "needs a GPU" in printed
    rows = report.render(found).splitlines()
    assert sum(row.startswith("| gspo_ops |") for row in rows) == 2
    assert sum(row.startswith("| | f=1 | f=0.5 |") for row in rows) == 2
    assert plot.stat().st_size > 0


# Rounding and clip decisions


def test_flipped_decisions():
    assert clip_error.flipped(torch.zeros(3)) == 0
    # nothing is clipped from above and everything from below, or the other way round
    clipped = 0.15
    for far in (-1.0, 1.0):
        flips = clip_error.flipped(torch.tensor([far], dtype=torch.float64))
        assert flips == pytest.approx(0.5, abs=clipped)
    assert 0 < clip_error.flipped(torch.full((1,), 1e-5, dtype=torch.float64)) < 0.02


def test_spread_clips_as_many_as_the_paper_reports():
    normal = clip_error.NormalDist(0, clip_error.SPREAD)
    high, low = math.log1p(4e-4), math.log1p(-3e-4)
    assert (1 - normal.cdf(high) + normal.cdf(low)) / 2 == pytest.approx(0.15, abs=5e-3)


def test_ratio_errors_by_length():
    exact_old = -torch.rand(2, 128, dtype=torch.float64)
    exact_new = exact_old + 1e-3
    noise = torch.full((2, 128), 1e-4, dtype=torch.float64)
    noise[:, 64:] *= -1  # cancels over the whole, not over its halves
    at = clip_error.by_length(exact_new + noise, exact_old, exact_new, exact_old)
    assert set(at) == {"64", "128"}
    assert at["64"]["rms_error"] == pytest.approx(1e-4, rel=2e-3)
    assert at["128"]["rms_error"] < 1e-12
    assert at["64"]["flipped"] > 0


def test_clip_errors_to_table_and_plot(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(301, 24, generator=generator)
    old = weight + 1e-3 * torch.randn(301, 24, generator=generator)
    sampled = clip_error.Sampled(
        torch.randn(2, 128, 24, generator=generator).bfloat16(),
        torch.randint(301, (2, 128), generator=generator),
        weight.bfloat16(),
        old.bfloat16(),
    )
    (_, spread), *methods = clip_error.measure(sampled)
    found = {
        "benchmark": "clip_error", **NOWHERE,
        "model": "", "sequences": 2, "length": 128, "spread": 1.0, **spread,
        "methods": dict(methods),
    }  # fmt: skip
    at = found["methods"]["gspo_ops"]["exact"]["128"]
    narrow = found["methods"]["eager, bf16 logits"]["exact"]["128"]
    assert at["rms_error"] < 1e-6 < narrow["rms_error"]
    assert at["flipped"] < narrow["flipped"]
    rows = [r for r in report.render(found).splitlines() if r.startswith(("| exact", "| from the"))]
    assert len(rows) == 2 * len(providers.METHODS)
    pytest.importorskip("matplotlib")
    plots.clip_error(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
