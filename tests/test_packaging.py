"""The wheel and the sdist are complete, and work where the checkout can't be imported."""

import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gspo_ops
from gspo_ops.environment import ISSUES

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
# all that `gspo-ops bench` needs: the code for the repository's tables is run from a checkout
BENCHMARKS = ["bench", "clip_error", "measure", "plots", "providers", "updates", "workloads"]
HEAVY = ["transformers", "reasoning_gym", "matplotlib", "trl", "tensorboard"]

LOSS = """
import torch, gspo_ops
generator = torch.Generator().manual_seed(0)
logits = torch.randn(2, 3, 50, generator=generator, requires_grad=True)
targets = torch.randint(50, (2, 3), generator=generator)
old = torch.full((2, 3), -4.0)
loss, stats = gspo_ops.policy_loss_from_logits(logits, targets, old, torch.tensor([1.0, -1.0]),
                                               objective=gspo_ops.GRPO())
loss.backward()
result["file"] = gspo_ops.__file__
result["loss"] = loss.item()
result["grad"] = logits.grad.abs().sum().item()
result["kernels"] = "gspo_ops.kernels.logits" in sys.modules
"""

COMMANDS = """
import contextlib, io
from gspo_ops import cli
from gspo_ops.benchmarks import plots
for argv in (["--help"], ["bench", "--help"], ["verify", "--help"],
             ["bench", "--path", "logits", "--shape", "64,128,8", "--dtype", "float32", "--f", "1",
              "--rounds", "1", "--against", "eager"]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            status = cli.main(argv)
        except SystemExit as ended:
            status = ended.code
    result[" ".join(argv)] = [status, out.getvalue()]
result["files"] = [cli.__file__, plots.__file__]
"""


def run(code, *, cwd, first=None, interpret=False):
    """Run code in a fresh Python away from the checkout; return its dict `result`.

    The directory `first`, if given, goes before the site-packages, and their .pth files (such as
    an editable install's) are not processed.
    """
    packages = [p for p in sys.path if p and Path(p).resolve() != ROOT and Path(p).is_dir()]
    path = "" if first is None else f"sys.path[:] = {[str(first), *packages]!r}\n"
    program = f"import json, sys\n{path}result = {{}}\n{code}\nprint(json.dumps(result))"
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    flags = ["-I"] if first is None else ["-I", "-S"]
    done = subprocess.run(
        [sys.executable, *flags, "-c", program], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(source, out):
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", out, source)
    (wheel,) = Path(out).glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Copy the checkout, because a build leaves files behind and reads those it finds."""
    for name in ("setuptools", "pip"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is needed to build the package")
    copy = tmp_path_factory.mktemp("source") / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for kernel in KERNELS:
            text = archive.read(f"gspo_ops/kernels/{kernel}").decode()
            assert text == (ROOT / "kernels" / kernel).read_text()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gspo_ops"}
    assert "gspo_ops/py.typed" in names
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gspo_ops").rglob("*.py")}
    assert expected <= set(names)


def test_wheel_has_no_benchmarks_of_the_repository(wheel, record_property):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
    ours = {name: size for name, size in sizes.items() if name.startswith("gspo_ops/benchmarks/")}
    assert sorted(ours) == [f"gspo_ops/benchmarks/{name}.py" for name in BENCHMARKS]
    share = f"{sum(ours.values())} of {sum(sizes.values())} bytes"
    record_property("benchmarks in the wheel", share)
    print(f"benchmarks in the wheel: {share}")


def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        links = [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path, filter="data")
    assert not links
    (unpacked,) = tmp_path.iterdir()
    assert (unpacked / "LICENSE").is_file()
    assert not (unpacked / "kernels").exists()
    again = build_wheel(unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


@pytest.mark.parametrize("interpret", [False, True], ids=["torch", "interpreter"])
def test_installed_wheel_computes_a_loss(installed, tmp_path, interpret):
    patch = "from gspo_ops import testing; testing.patch_interpreter()" if interpret else ""
    result = run(patch + LOSS, cwd=tmp_path, first=installed, interpret=interpret)
    assert Path(result["file"]).is_relative_to(installed)
    assert result["kernels"] == interpret
    assert result["grad"] > 0
    here = run(LOSS, cwd=tmp_path)
    assert result["loss"] == pytest.approx(here["loss"], rel=1e-6)
    assert result["grad"] == pytest.approx(here["grad"], rel=1e-5)


def test_installed_wheel_has_its_commands(installed, tmp_path):
    result = run(COMMANDS, cwd=tmp_path, first=installed)
    assert all(Path(file).is_relative_to(installed) for file in result.pop("files"))
    assert {argv: status for argv, (status, _) in result.items()} == dict.fromkeys(result, 0)
    *helps, (_, timed) = result.values()
    assert all(text.startswith("usage: gspo-ops") for _, text in helps)
    assert "eager" in timed


def test_sdist_has_what_the_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = [
        *ROOT.glob("tests/*.py"), *ROOT.glob("examples/*"), *ROOT.glob("docs/*.md"),
        *ROOT.glob("gspo_ops/benchmarks/*.py"),
        *(ROOT / name for name in ("Makefile", "constraints.txt", "CONTRIBUTING.md", "README.md")),
    ]  # fmt: skip
    needed = [path for path in needed if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in needed} <= names
    assert not [name for name in names if name.endswith((".pyc", ".png"))]


def test_versions_and_addresses_agree(wheel):
    """The metadata, the citation, the changelog and what the commands print agree."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [x for x in archive.namelist() if x.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    citation = (ROOT / "CITATION.cff").read_text()
    version, source = (
        re.search(rf"^{key}: (\S+)$", citation, re.M)[1] for key in ("version", "repository-code")
    )
    assert version == metadata["Version"] == gspo_ops.__version__
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL"))
    assert urls["Source"] == source
    assert urls["Issues"] == ISSUES == f"{source}/issues"


def test_installed_wheel_has_no_kernels_package(installed, tmp_path):
    code = """
import importlib.util
sys.path[1:] = []
result["found"] = importlib.util.find_spec("kernels") is not None
"""
    assert not run(code, cwd=tmp_path, first=installed)["found"]


def test_kernels_of_the_checkout_are_not_importable_by_that_name(tmp_path):
    code = """
import importlib.util
import gspo_ops
import gspo_ops.kernels.logits as ours
spec = importlib.util.find_spec("kernels")
result["ours"] = ours.__file__
result["found"] = [] if spec is None else list(spec.submodule_search_locations)
"""
    result = run(code, cwd=tmp_path)
    assert Path(result["ours"]).is_file()
    assert not [p for p in result["found"] if Path(p).resolve() == (ROOT / "kernels")]


@pytest.mark.parametrize("name", ["kernels", "benchmarks"])
def test_folders_at_the_top_level_are_linked_without_init(name):
    link = ROOT / "gspo_ops" / name
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", name)
    assert not (ROOT / name / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_import_is_light(tmp_path):
    code = "import gspo_ops\nresult['loaded'] = sorted(sys.modules)"
    assert not set(run(code, cwd=tmp_path)["loaded"]) & {*HEAVY, "gspo_ops.testing"}
