"""The driver behind `make gpu`: a step that fails does not stop the others."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from gspo_ops import head
from gspo_ops.benchmarks import gpu
from gspo_ops.benchmarks.gpu import Step, run_steps
from gspo_ops.benchmarks.report import updated

PYTHON = sys.executable


def python(name, code, limit=20.0):
    return Step(name, [PYTHON, "-c", code], limit)


def run(steps, limit=60.0, **options):
    found = []
    run_steps(steps, limit, found.append, **options)
    return {step["name"]: step for step in found}


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests machines without a GPU")
def test_without_a_gpu_it_ends_at_once():
    ended = subprocess.run(
        [PYTHON, "-m", "gspo_ops.benchmarks.gpu"], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1].startswith("make gpu needs a CUDA or ROCm device")
    assert not ended.stdout


def test_a_step_that_fails_or_hangs_is_written_down_and_the_next_runs():
    nap = "import time; time.sleep(60)"
    child = f"import subprocess; subprocess.run([{PYTHON!r}, '-c', {nap!r}])"
    found = run(
        [
            python("good", "print('fine')"),
            python("bad", "print('what went wrong'); raise SystemExit(3)"),
            python("hangs", "import time; print('waiting', flush=True); time.sleep(60)", 2.0),
            python("hangs in a child", child, 2.0),
            python("last", "print('x' * 100000)"),
        ]
    )
    assert found["good"]["result"] == found["last"]["result"] == "passed"
    assert found["good"]["output"] == "fine\n"
    assert found["bad"]["result"] == "failed with status 3"
    assert "what went wrong" in found["bad"]["output"]
    assert found["hangs"]["result"] == "cut off after 2 s"
    assert "waiting" in found["hangs"]["output"]
    assert found["hangs in a child"]["seconds"] < 20
    assert len(found["last"]["output"]) == 3000


def test_the_limit_of_all_steps_holds():
    slow = "import time; time.sleep(30)"
    start = time.monotonic()
    found = run([python("first", slow), python("second", slow)], limit=3.0, least=1.0)
    assert time.monotonic() - start < 15
    assert found["first"]["result"] == "cut off after 3 s"
    assert found["second"] == {"name": "second", "result": "not reached", "seconds": 0.0}


def test_the_results_file_is_whole_after_each_step(tmp_path, monkeypatch):
    out, bench = tmp_path / "new" / "gpu.json", {"benchmark": "bench", "results": []}
    sizes = []
    write = gpu.write

    def watched(path, report):
        write(path, report)
        sizes.append(len(json.loads(out.read_text())["steps"]))

    def plan(folder, *, is_dry):
        times = (
            {"part": "whole", "dtype": "bfloat16", "f": 0.5, "products": name, "ms": ms}
            for name, ms in (("mm", 3.0), ("triton", 2.0))
        )
        lines = "\n".join(map(json.dumps, times)) + "\n"
        (folder / "experiments.jsonl").write_text(lines)
        code = f"import json; json.dump({bench!r}, open({str(folder / 'b.json')!r}, 'w'))"
        return [python("bench", code), python("bad", "raise SystemExit(1)")]

    monkeypatch.setattr(gpu, "write", watched)
    table = tmp_path / "products.json"
    table.write_text('{"Other GPU": {"float32": "mm"}}')
    monkeypatch.setattr(gpu, "PRODUCTS_TABLE", table)
    monkeypatch.setattr(gpu, "plan", plan)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(gpu, "provenance", lambda: {"environment": ["here"]})
    assert gpu.main(["--out", str(out)]) == 1
    assert sizes == [1, 2, 2]  # the last write is that of the table of products
    assert json.loads(table.read_text()) == {
        "Other GPU": {"float32": "mm"}, "Some GPU": {"bfloat16": "triton"}
    }  # fmt: skip
    report = json.loads(out.read_text())
    assert report["benchmarks"] == [bench]
    assert [step["result"] for step in report["steps"]] == ["passed", "failed with status 1"]


def test_every_step_is_a_command_that_exists(tmp_path):
    """The options of the benchmark steps are known to the command."""
    from gspo_ops.benchmarks import bench

    for step in gpu.plan(tmp_path):
        if step.name.startswith("bench"):
            args = bench.parser().parse_args(list(step.command[4:]))
            words = [w for text in args.against or () for w in text.split(",")]
            for path in args.path:
                assert len(bench.select(path, words or None)) >= 2


def test_all_steps_fit_into_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    steps = gpu.plan(tmp_path)
    assert steps[-1].name == "memcheck"
    assert sum(step.limit for step in steps) <= gpu.LIMIT - 10
    names = [step.name for step in steps]
    assert names[:2] == ["probe", "tests"]
    assert names.index("profile") < names.index("bench peers-hidden")


def test_tests_need_no_plugin_of_pytest(tmp_path):
    """The tests run without pytest-xdist and pytest-timeout, which a machine may lack."""
    for name in ("xdist", "pytest_timeout"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('is not here')")
    environment = {
        **os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    (tests,) = (step for step in gpu.plan(tmp_path, is_dry=True) if step.name == "tests")
    ran = subprocess.run(tests.command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # each of the four processes has its own part
    collected = re.findall(r"^tests/test_gpu.py::(.+)$", ran.stdout, re.MULTILINE)
    assert len(collected) == len(set(collected)) > 80


def test_tensors_are_drawn_once_for_every_f(tmp_path, monkeypatch):
    from gspo_ops.benchmarks import bench

    drawn, files = [], []
    draw, write = bench.draw, bench.write

    def counting(*arguments, **options):
        drawn.append(arguments)
        return draw(*arguments, **options)

    def watched(path, report):
        write(path, report)
        files.append([row["rounds"] for row in json.loads(path.read_text())["results"]])

    monkeypatch.setattr(bench, "draw", counting)
    monkeypatch.setattr(bench, "write", watched)
    monkeypatch.setitem(bench._COPY, "cpu", 1 << 16)
    options = ["--path", "logits", "--shape", "32,50", "--dtype", "float32", "--f", "1", "0.5"]
    out = str(tmp_path / "bench.json")
    assert bench.main([*options, "--rounds", "2", "--against", "TRL", "--out", out]) == 0
    assert len(drawn) == 1
    # the file is whole after each round, so that a run that is cut off keeps what it has
    assert files == [[1], [2], [2, 1], [2, 2]]


def test_a_dry_run_takes_the_steps_that_a_gpu_would(tmp_path, monkeypatch):
    plan = gpu.plan

    def few(folder, *, is_dry):
        names = ("probe", "profile")
        return [step for step in plan(folder, is_dry=is_dry) if step.name in names]

    monkeypatch.setattr(gpu, "plan", few)
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["dry_run"]
    assert [step["result"] for step in report["steps"]] == ["passed"] * 2
    assert {finding["part"] for finding in report["experiments"]} == {"probe"}
    assert report["profiles"].keys() >= {"logits, gspo_ops", "hidden, gspo_ops"}
    monkeypatch.setattr("gspo_ops.benchmarks.report.ROOT", tmp_path)
    block = "<!-- results: gpu.json -->\nold\n<!-- end of results -->"
    with pytest.raises(SystemExit, match=r"gpu\.json comes from a dry run"):
        updated(block)


def test_auto_takes_what_was_faster(tmp_path, monkeypatch):
    table = tmp_path / "products.json"
    table.write_text("{}")
    for module in (gpu, head):
        monkeypatch.setattr(module, "PRODUCTS_TABLE", table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(head, "_measured_products", head._measured_products.__wrapped__)
    device = torch.device("cuda")
    assert head.faster_products(device, torch.bfloat16) == "triton"
    gpu.remember("Some GPU", {"bfloat16": "mm", "float32": "triton"})
    assert head.faster_products(device, torch.bfloat16) == "mm"
    assert head.faster_products(device, torch.float16) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Other GPU")
    assert head.faster_products(device, torch.bfloat16) == "triton"


def test_half_a_line_is_left_out(tmp_path):
    (tmp_path / "experiments.jsonl").write_text('{"part": "probe"}\n{"part": "who')
    assert gpu.collected(tmp_path)["experiments"] == [{"part": "probe"}]
