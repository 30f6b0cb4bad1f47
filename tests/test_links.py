"""Every link of the documentation leads somewhere: to a file of the repository, and to a heading in it."""

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
PAGES = [path for pattern in ("*.md", "docs/*.md", "recipes/**/*.md", "model_cards/*/*.md") for path in ROOT.glob(pattern)]
MARKDOWN = MarkdownIt("commonmark").enable("table")


def inline(path):
    return [token for token in MARKDOWN.parse(path.read_text(encoding="utf-8")) if token.type == "inline"]


def links(path):
    for token in inline(path):
        for child in token.children:
            target = child.attrs.get("href") or child.attrs.get("src")
            if target and not re.match(r"[a-z]+:", target):
                yield target


def anchors(path):
    """As GitHub and MkDocs make them of headings: lower case, no punctuation, a dash for each blank."""
    tokens = MARKDOWN.parse(path.read_text(encoding="utf-8"))
    headings = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    texts = ("".join(child.content for child in heading.children) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    broken = []
    for target in links(path):
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken, "links of the site are to files, not to folders"


def test_a_page_that_is_not_there_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One two?\n\n[a](#one-two) [b](other.md) ![c](picture.png) [d](https://example.org)\n")
    assert list(links(page)) == ["#one-two", "other.md", "picture.png"]
    assert anchors(page) == {"one-two"}
