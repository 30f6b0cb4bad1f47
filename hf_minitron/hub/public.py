"""What everybody may see: paths of this machine are shortened, and access tokens taken out."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_minitron.errors import TOKEN
from hf_minitron.evaluation.wording import MADE

# A path of this machine: all of a text, where blanks may be in it, and within one.
PATH = re.compile(r"/\S+|/[^\n/]+/[^\n]+")
BEGINS = r"(?<![\w/.~)\]])"
WITHIN = re.compile(BEGINS + r"(?:/[\w.@+-]+){2,}")


def public(value: Any) -> Any:
    """Return a recipe or a report with its paths shortened, and without access tokens."""
    if isinstance(value, Mapping):
        return {public(key): public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    return TOKEN.sub("<token>", shorten(value)) if isinstance(value, str) else value


def shorten(text: str) -> str:
    """Return text with its paths as everybody may see them: below this folder, below `~`, or their last two parts."""
    text = text.replace("file:///", "/")
    if PATH.fullmatch(text):
        return _short(text)
    home, here = str(Path.home()), str(Path.cwd())
    for base, prefix in ((here, ""), (home, "~/")):
        text = re.sub(f"{BEGINS}{re.escape(base)}/", lambda _, prefix=prefix: prefix, text) if base != "/" else text
    return WITHIN.sub(lambda match: _short(match[0]), text)


def _short(text: str) -> str:
    path = Path(text)
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if str(base) != "/" and path != base and path.is_relative_to(base):
            return prefix + str(path.relative_to(base))
    last = 3 if "/".join(path.parts[-2:]) in MADE else 2  # of a run's model the run's name as well
    return "/".join(["...", *path.parts[1:][-last:]])
