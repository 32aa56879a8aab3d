"""The Python code in README.md and docs/, and the tests that execute it.

A block is executed in one of two ways. A test marked `@pytest.mark.example(page, heading)` executes
the blocks under that heading, with inputs and assertions of its own. The other blocks of a page
are executed by `test_docs.py`, one after the other, as a reader would copy them. The few that need
a GPU or a cluster begin with a comment that says so, which readers see.
"""

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
# a fence is matched as a whole, because comments in it are not headings
PARTS = re.compile(r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```$", re.M | re.S)
NOT_RUN = re.compile(r"# not run by the tests: needs (a GPU|a cluster)\n")


class Block(NamedTuple):
    page: str
    heading: str
    code: str

    def is_run(self) -> bool:
        return NOT_RUN.match(self.code) is None

    def execute(self, scope: dict) -> None:
        exec(compile(self.code, f"{self.page}, {self.heading}", "exec"), scope)


@cache
def pages() -> list[str]:
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


@cache
def blocks(page: str) -> list[Block]:
    """Return a page's blocks of Python code, each with the heading above it."""
    found, heading = [], ""
    for part in PARTS.finditer((ROOT / page).read_text()):
        title, language, code = part.groups()
        if title:
            heading = title
        elif language == "python":
            found.append(Block(page, heading, code))
    return found


@cache
def claims() -> dict[tuple[str, str], str]:
    """Return the test file that claims each example, by page and heading."""
    found = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            is_mark = isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.example"
            if is_mark and node.args:
                page, heading = map(ast.literal_eval, node.args)
                found[page, heading] = path.name
    return found


def unclaimed(page: str) -> list[Block]:
    """Return a page's blocks that are executed as they are, claimed by no test."""
    return [b for b in blocks(page) if b.is_run() and (page, b.heading) not in claims()]
