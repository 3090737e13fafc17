"""What mkdocs does with this repository (mkdocs.yml, `hooks`): README is the first page, and a reference is made.

Links in README and in docs/ are made for who reads them in the repository. Those that leave docs/ become plain text on
the site; the others stay as they are, so that mkdocs finds those that lead nowhere. The reference has a page for each
package, with all of its modules in it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "mu.ldm",
    "mu.datasets",
    "mu.unlearning",
    "mu.algorithms.saliency_unlearning",
    "mu.algorithms.esd",
    "mu.algorithms.uce",
    "mu.evaluation",
    "mu.forgetting",
    "mu.commands",
)
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")
_TARGET = re.compile(r"\]\((?!https?:|#|mailto:)")
_IMAGE = re.compile(r"!\[([^\]]*)\]\((?!https?:)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are no files of docs/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {"index.md": from_docs(readme), **reference_pages()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def from_docs(readme: str) -> str:
    """README with its links as they are from docs/, where it becomes a page."""
    return _TARGET.sub("](../", readme).replace("](../docs/", "](")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Makes plain text of links and images that leave docs/, which the site has not."""
    folder = (Path(config.docs_dir) / page.file.src_uri).parent

    def plain(found: re.Match[str]) -> str:
        target = (folder / found[2].partition("#")[0]).resolve()
        return found[0] if target.is_relative_to(config.docs_dir) else found[1]

    def shown(found: re.Match[str]) -> str:
        inside = (folder / found[2]).resolve().is_relative_to(config.docs_dir)
        return found[0] if inside else f"*{found[1]}*"

    return _LINK.sub(plain, _IMAGE.sub(shown, markdown))


def reference_pages() -> dict[str, str]:
    """Page -> Markdown that mkdocstrings fills."""
    core = [path for path in sorted((ROOT / "mu").glob("*.py")) if path.name != "__init__.py"]
    pages = {"reference/mu.md": core}
    for package in PACKAGES:
        folder = ROOT.joinpath(*package.split("."))
        modules = sorted(folder.rglob("*.py"))
        pages[f"reference/{package}.md"] = [path for path in modules if path.name != "__init__.py"]
    return {
        name: f"# {Path(name).stem}\n\n" + "\n".join(f"::: {_module(path)}\n" for path in modules)
        for name, modules in pages.items()
    }


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)
