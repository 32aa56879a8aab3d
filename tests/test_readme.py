import json
import re
import subprocess
import sys
from pathlib import Path

import doc_code
import pytest
import torch

from gspo_ops import reference
from gspo_ops.benchmarks import plots, report
from gspo_ops.constants import STATS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_figures_come_from_results_files():
    subprocess.run([sys.executable, "-m", "gspo_ops.benchmarks.report", "--check"], check=True)


def test_every_picture_is_drawn_from_a_results_file():
    shown = {
        (path.parent / name).resolve()
        for path in report.documents()
        for name in re.findall(r"!\[[^]]*\]\((\S+\.png)\)", path.read_text())
    }
    drawn = report.pictures()
    assert shown
    assert shown <= set(drawn)
    assert all(drawn[path][0].is_file() and path.is_file() for path in shown)


def test_a_figure_without_its_results_file_fails():
    with pytest.raises(FileNotFoundError):
        report.updated("<!-- results: benchmarks/results/none.json -->\n<!-- end of results -->")


SITE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *doc_code.pages()[1:]]
LINK = re.compile(r"\[[^]]*\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def slugs(path):
    """Return the anchors that GitHub and mkdocs give the headings of a document."""
    headings = [part[1] for part in doc_code.PARTS.finditer(path.read_text()) if part[1]]
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in words}


@pytest.mark.example
@pytest.mark.parametrize("page", SITE)
def test_links_lead_somewhere(page):
    """Links resolve on GitHub too, where README.md is read but the site's check does not apply."""
    path = doc_code.ROOT / page
    text = doc_code.PARTS.sub(lambda part: part[0] if part[1] else "", path.read_text())
    for target, anchor in LINK.findall(text):
        if "://" in target:
            continue
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), f"{page}: {target}"
        assert not anchor or anchor in slugs(found), f"{page}: {target}#{anchor}"


def test_readme_is_short():
    assert README.count("\n") <= 150


def test_summary_has_a_line_for_every_input():
    report_ = json.loads((ROOT / "benchmarks/results/cpu-bench.json").read_text())
    table = [line for line in report.bench_summary(report_) if line.startswith("| from")]
    assert len(table) == len(plots.groups(report_))
    assert 4 <= len(table) <= 6


def test_every_statistic_is_defined():
    section = (ROOT / "docs/guide.md").read_text().split("\n## Statistics\n")[1]
    for name in (*STATS, "log_ratio", "entropy"):
        assert f"`{name}`" in section, name


@pytest.mark.example("README.md", "In your trainer")
def test_code_runs_and_before_equals_after(python_blocks):
    torch.manual_seed(0)
    before, after = python_blocks("README.md")["In your trainer"]
    logits, targets = torch.randn(4, 3, 50), torch.randint(50, (4, 3))
    shift = torch.tensor([1e-3, -1e-3, 1e-4, -1e-4])  # beyond both edges of the clip range, inside
    inputs = {
        "logits": logits,
        "targets": targets,
        "old_log_probs": reference.log_probs_from_logits(logits, targets) - shift[:, None],
        "advantages": torch.tensor([1.0, -1.0, 1.0, -1.0]),
        "mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]),
    }
    losses, grads = [], []
    for code in (before, after):
        logits = inputs["logits"].clone().requires_grad_()
        scope = {**inputs, "logits": logits, "torch": torch}
        exec(code, scope)
        losses.append(scope["loss"])
        grads.append(logits.grad)
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    torch.testing.assert_close(*grads)


def test_paths_from_functions_to_kernels_are_true():
    """Every function and class that docs/internals.md names is in its module."""
    text = (ROOT / "docs/internals.md").read_text()
    section = text.split("\n## From a public function to its kernels\n")[1]
    names = re.findall(r"`((?:kernels\.)?\w+)\.(\w+)`", section)
    assert len(names) > 20
    for module, name in names:
        source = (ROOT / "gspo_ops" / f"{module.replace('.', '/')}.py").read_text()
        assert re.search(rf"^(?:class|def) {name}\b", source, re.M), f"{module}.{name}"
    ways = [item.split("\n\n")[0] for item in section.split("\n- ") if item.strip()]
    assert all(way.strip().count("\n") < 6 for way in ways)
