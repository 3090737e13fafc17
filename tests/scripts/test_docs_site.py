"""The site's links: those that leave docs/ become text, the others stay for mkdocs to judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("mkdocs")


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("[b](b.md)", "[b](b.md)"),
        ("[gone](gone.md#part)", "[gone](gone.md#part)"),
        ("[code](../mu/cli.py)", "code"),
        ("[README](../README.md)", "README"),
        ("[web](https://example.org/)", "[web](https://example.org/)"),
        ("![gone](gone.png)", "![gone](gone.png)"),
        ("![outside](../outside.png)", "*outside*"),
    ],
)
def test_a_link_inside_docs_stays_even_if_it_leads_nowhere(
    load_script: Callable[[str], ModuleType], tmp_path: Path, written: str, kept: str
) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "b.md").touch()
    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    site = load_script("docs_site")
    assert site.on_page_markdown(written, page, SimpleNamespace(docs_dir=str(docs))) == kept


def test_links_of_readme_lead_to_the_same_files_from_docs(load_script: Callable[[str], ModuleType]) -> None:
    written = "[a](docs/a.md) [c](configs) ![i](docs/i.png) [w](https://example.org/) [p](#part)"
    moved = "[a](a.md) [c](../configs) ![i](i.png) [w](https://example.org/) [p](#part)"
    assert load_script("docs_site").from_docs(written) == moved
