"""The card as one self-contained page: Markdown to HTML, pictures inside, nothing fetched and no script allowed."""

import base64
import html
import mimetypes
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

# What the card folds its recipe with: the only HTML in it that is not shown as text.
FOLD = re.compile(r"&lt;(/?(?:details|summary))&gt;")
TEMPLATE = Path(__file__).with_name("page_template.html")


def write_page(card: ModelCard, pictures: Path, path: Path) -> None:
    """Write a card as an HTML page for a browser, complete or not at all.

    Args:
        card (`ModelCard`): The card.
        pictures (`Path`): The folder that its pictures lie in.
        path (`Path`): The HTML file to write.
    """
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    markdown.add_render_rule("table_open", lambda self, tokens, idx, options, env: '<div class="wide"><table>\n')
    markdown.add_render_rule("table_close", lambda self, tokens, idx, options, env: "</table></div>\n")
    for kind in ("html_block", "html_inline"):
        markdown.add_render_rule(kind, lambda self, tokens, idx, *_: FOLD.sub(r"<\1>", html.escape(tokens[idx].content)))
    tokens = markdown.parse(card.text)
    for child in (child for token in tokens for child in token.children or () if child.type == "image"):
        file = pictures / Path(child.attrs["src"]).name
        if child.attrs["src"] != file.name or not file.is_file():  # of a text that the card quotes, not of the card
            child.attrs["src"] = ""
            continue
        kind, content = mimetypes.guess_type(file.name)[0], base64.b64encode(file.read_bytes()).decode()
        child.attrs["src"] = f"data:{kind};base64,{content}"
    sections = _sections(tokens)
    parts = {
        "title": html.escape(card.data.model_name or path.stem),
        "facts": "".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(fact)}</dd></div>" for name, fact in _facts(tokens)
        ),
        "sections": "".join(f'<li><a href="#{anchor}">{html.escape(name)}</a></li>' for anchor, name in sections.items()),
        "body": markdown.renderer.render(tokens, markdown.options, {}),
    }
    part = path.with_name(path.name + ".part")
    part.write_text(Template(TEMPLATE.read_text(encoding="utf-8")).substitute(parts), encoding="utf-8")
    part.replace(path)


def _facts(tokens: Sequence[Token]) -> list[tuple[str, str]]:
    """Return the facts that the card begins with: the rows of its first table, where that has no header."""
    kinds = [token.type for token in tokens]
    if "table_open" not in kinds:
        return []
    table = tokens[kinds.index("table_open") : kinds.index("table_close")]
    cells = ["".join(child.content for child in token.children) for token in table if token.type == "inline"]
    return list(zip(cells[2::2], cells[3::2], strict=True)) if cells[:2] == ["", ""] else []


def _sections(tokens: Sequence[Token]) -> dict[str, str]:
    """Give every section an anchor; return anchors and headings."""
    found = {}
    for number, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            token.attrSet("id", f"section-{len(found) + 1}")
            found[token.attrs["id"]] = "".join(child.content for child in tokens[number + 1].children)
    return found
