"""Small files that a run keeps for itself: read whatever state they are in, and never seen half-written."""

import json
from pathlib import Path


def read_json(path: Path) -> dict:
    """Read a small file that a run keeps for itself; one that is absent or damaged says nothing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_whole(path: Path, text: str) -> None:
    """Write a small file that is never seen half-written."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
