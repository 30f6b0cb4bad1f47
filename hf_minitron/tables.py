"""Text for tables and Markdown: what it holds is shown as it is."""

import re
from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows, the first of them a header, as a Markdown table with aligned columns: names left, numbers right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]  # else it would begin another cell
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def code(text: str) -> str:
    """Write a text as Markdown's code, whatever backticks are in it."""
    marks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    room = " " if "`" in text else ""
    return f"{marks}{room}{text}{room}{marks}"
