"""The driver behind `make gpu`: its steps survive what goes wrong in one of them."""

import json
import subprocess
import sys
import time

import pytest
import torch

from gspo_ops.benchmarks import gpu
from gspo_ops.benchmarks.gpu import Step, run_steps

PYTHON = sys.executable


def python(name, code, limit=20.0):
    return Step(name, [PYTHON, "-c", code], limit)


def run(steps, limit=60.0, **options):
    found = []
    run_steps(steps, limit, found.append, **options)
    return {step["name"]: step for step in found}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
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
    write_whole = gpu.write_whole

    def watched(path, report):
        write_whole(path, report)
        sizes.append(len(json.loads(out.read_text())["steps"]))

    def plan(folder):
        code = f"import json; json.dump({bench!r}, open({str(folder / 'b.json')!r}, 'w'))"
        return [python("bench", code), python("bad", "raise SystemExit(1)")]

    monkeypatch.setattr(gpu, "write_whole", watched)
    monkeypatch.setattr(gpu, "plan", plan)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(gpu, "provenance", lambda: {"environment": ["here"]})
    assert gpu.main(["--out", str(out)]) == 1
    assert sizes == [1, 2]
    report = json.loads(out.read_text())
    assert report["benchmarks"] == [bench]
    assert [step["result"] for step in report["steps"]] == ["passed", "failed with status 1"]


def test_every_step_is_a_command_that_exists(tmp_path):
    """Its options are those that the commands have now."""
    from gspo_ops.benchmarks import bench

    for step in gpu.plan(tmp_path):
        if step.name.startswith("bench"):
            args = bench.parser().parse_args(list(step.command[4:]))
            words = [w for text in args.against or () for w in text.split(",")]
            for path in args.path:
                assert len(bench.select(path, words or None)) >= 2
    assert sum(step.limit for step in gpu.plan(tmp_path)[:4]) <= gpu.LIMIT
