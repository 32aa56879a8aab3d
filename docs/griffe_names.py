"""A griffe extension: an item `a, b: text` of a docstring documents both a and b."""

from __future__ import annotations

import re

import griffe

# the names may continue on the next line; so may the text, which is indented further
ITEM = re.compile(r"^    ([\w*]+(?:,\s+[\w*]+)+):(.*(?:\n {5,}.*)*)", re.M)


class SplitNames(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = ITEM.sub(_each, obj.docstring.value)


def _each(item: re.Match[str]) -> str:
    return "\n".join(f"    {name}:{item[2]}" for name in re.split(r",\s+", item[1]))
