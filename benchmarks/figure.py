"""Where a benchmark leaves its figure for the README."""

import json
from pathlib import Path


def save(path: Path | None, what: str, command: str, result: str) -> None:
    """Write one row of the README's table; nothing without a path."""
    if path is not None:
        facts = {"what": what, "command": command, "result": result}
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
