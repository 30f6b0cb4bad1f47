"""The card as one self-contained page: Markdown to HTML, pictures inside, nothing fetched and no script allowed."""

import base64
import html
import mimetypes
import re
from pathlib import Path
from string import Template

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

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
    body = markdown.renderer.render(tokens, markdown.options, {})
    page = Template(TEMPLATE.read_text(encoding="utf-8"))
    part = path.with_name(path.name + ".part")
    part.write_text(page.substitute(title=html.escape(card.data.model_name or path.stem), body=body), encoding="utf-8")
    part.replace(path)
