import json
import math
import sys

import pytest
import torch

from gspo_ops.benchmarks import clip_error, hidden, providers, report

SHAPE = (48, 301, 24)
CPU = torch.device("cpu")


def present(table: dict, name: str):
    why = table[name].missing()
    if why:
        pytest.skip(f"{name}: {why}")
    return table[name].compute


@pytest.mark.parametrize("f", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in providers.LOSSES if n != "torch.compile"])
def test_every_provider_computes_the_same(name, dtype, f):
    loss = present(providers.LOSSES, name)
    inputs = hidden.make_inputs(*SHAPE, dtype, f, CPU)
    baseline = providers.LOSSES[hidden.BASELINE].compute
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(loss(*inputs), baseline(*inputs), atol=tolerance, rtol=0)
    errors = hidden.grad_errors({hidden.BASELINE: baseline, name: loss}, inputs)
    hidden.check_errors(errors, dtype)
    live = hidden.step(loss, inputs).hidden.flatten(1).abs().sum(1) > 0
    assert live.sum() == round(f * hidden.SEQUENCES)


@pytest.mark.parametrize("name", providers.METHODS)
def test_every_method_gives_log_probs(name):
    method = present(providers.METHODS, name)
    inputs = hidden.make_inputs(*SHAPE, torch.bfloat16, 1.0, CPU)
    log_probs = method(inputs.hidden, inputs.weight, inputs.targets)
    exact = clip_error.exact(inputs.hidden, inputs.weight, inputs.targets)
    assert (log_probs.double() - exact).abs().max() < 0.1


def test_absent_peer_is_reported():
    assert providers.Provider(torch.add, "no-such-thing").missing() == "not installed"


@pytest.mark.parametrize(
    ("ours", "peer"), [(6e-6, 1e-6), (math.nan, 1e-6), (1e-6, 0.1), (1e-6, math.nan)]
)
def test_wrong_gradients_are_not_timed(ours, peer):
    errors = {"eager": 1e-6, "peer": peer, "gspo_ops": ours}
    with pytest.raises(SystemExit, match="not timed"):
        hidden.check_errors({name: {"dhidden": e} for name, e in errors.items()}, torch.float32)


def test_summary_takes_ratios_within_rounds_and_plausible_peaks():
    eager = [hidden.Sample(1.0, 300), hidden.Sample(2.0, 300), hidden.Sample(4.0, 10)]
    ours = [hidden.Sample(0.5, 150), hidden.Sample(1.0, 150), hidden.Sample(1.0, 150)]
    of = hidden.summary(ours, eager, returned_bytes=100)
    assert of["time_ratio"] == {"median": 0.5, "min": 0.25, "max": 0.5}
    assert of["memory_ratio"] == 50 / 200


def test_hidden_from_command_line_to_table(tmp_path, monkeypatch):
    def peak_bytes(step, device):
        step()
        return 10**6

    monkeypatch.setattr(hidden, "peak_bytes", peak_bytes)
    absent = providers.Provider(torch.add, "no-such-thing")
    monkeypatch.setitem(providers.LOSSES, "Liger, chunk_size=1", absent)
    out = tmp_path / "results.json"
    arguments = ["--shape", "48x301x24", "--rounds", "2", "--dtype", "float32", "--out", str(out)]
    names = ["gspo_ops", "Liger, chunk_size=1"]
    monkeypatch.setattr(sys, "argv", ["hidden.py", *arguments, "--providers", *names])
    hidden.main()
    rows = report.render(json.loads(out.read_text())).splitlines()
    assert rows[2].startswith("| N, V, H | dtype | f | eager | gspo_ops |")
    assert sum(row.startswith("| 48, 301, 24 | float32 |") for row in rows) == 2
    assert rows[4].endswith("| not installed |")


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
        "benchmark": "clip_error", "environment": [], "threads": 1, "commit": "", "date": "",
        "model": "", "sequences": 2, "length": 128, "spread": 1.0, **spread,
        "methods": dict(methods),
    }  # fmt: skip
    at = found["methods"]["gspo_ops"]["exact"]["128"]
    narrow = found["methods"]["eager, bf16 logits"]["exact"]["128"]
    assert at["rms_error"] < 1e-6 < narrow["rms_error"]
    assert at["flipped"] < narrow["flipped"]
    rows = [r for r in report.render(found).splitlines() if r.startswith(("| exact", "| by the"))]
    assert len(rows) == 2 * len(providers.METHODS)
    pytest.importorskip("matplotlib")
    clip_error.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
