"""Hooks for what mkdocs lacks: pages from the repository's root, and a check of public names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ON_SITE = FROM_ROOT | {"README.md": "index.md"}
LINK = re.compile(r"\[([^]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
INTEGRATIONS = ("transformers", "trl", "verl")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in FROM_ROOT.items():
        text = LINK.sub(_link_on_site, (ROOT / name).read_text())
        files.append(File.generated(config, page, content=text))
    _require_documented(files)
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links to documents in the root, written for GitHub, to their pages."""
    for name, target in ON_SITE.items():
        markdown = markdown.replace(f"](../{name}", f"]({target}")
    return markdown


def on_page_content(html: str, **_: object) -> str:
    """Link each figure to its file, which a phone shows in full size."""
    return re.sub(r'<img [^>]*src="([^"]*)"[^>]*>', r'<a href="\1">\g<0></a>', html)


def _link_on_site(link: re.Match[str]) -> str:
    """Convert a link in a root document; keep only its text if the site has no such page."""
    text, target, anchor = link[1], link[2], link[3] or ""
    if target in ON_SITE:
        return f"[{text}]({ON_SITE[target]})"
    if target.startswith("docs/") and target.endswith(".md"):
        return f"[{text}]({target.removeprefix('docs/')}{anchor})"
    return text if (ROOT / target).exists() else link[0]


def _require_documented(files: Files) -> None:
    """Check that every public name has a docstring, with all parameters, and is on a page."""
    texts = [file.content_string for file in files.documentation_pages()]
    shown = {name for text in texts for name in re.findall(r"^::: ([\w.]+)$", text, re.M)}
    wrong = []
    for path, item in _public_names():
        if path not in shown and path.rpartition(".")[0] not in shown:
            wrong.append(f"{path} is on no page of docs/api")
        if item.docstring is None:
            wrong.append(f"{path} has no docstring")
        elif item.is_function and not path.startswith("gspo_ops.reference."):
            wrong += [f"{path} does not document {name}" for name in _undocumented(item)]
    if wrong:
        raise PluginError("\n".join(wrong))


def _public_names() -> Iterator[tuple[str, griffe.Object]]:
    extensions = griffe.load_extensions(ROOT / "docs/griffe_names.py")
    package = griffe.load(
        "gspo_ops", search_paths=[str(ROOT)], extensions=extensions, resolve_aliases=True
    )
    modules = [package, *(package[f"integrations.{name}"] for name in INTEGRATIONS)]
    for module in modules:
        for name in module.exports:
            yield f"{module.path}.{name}", module[str(name)]
    for item in package["reference"].functions.values():
        if item.is_public:
            yield item.path, item


def _undocumented(function: griffe.Function) -> list[str]:
    named = {
        parameter.name.lstrip("*")
        for section in function.docstring.parse("google")
        if section.kind is griffe.DocstringSectionKind.parameters
        for parameter in section.value
    }
    return [p.name for p in function.parameters if p.name not in named]
