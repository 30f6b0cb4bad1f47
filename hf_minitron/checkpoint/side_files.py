"""The small files of a model's folder: which go with what is made of it, and whether config.json can be that of a model."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from hf_minitron.architecture.config import special_float

logger = logging.getLogger(__name__)

# What a user of the model needs beside weights and config.
SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_template*",
    "generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
# Far above any model's numbers; what is beyond would fill the memory before anybody could say what is wrong.
MOST_BYTES, MOST_LAYERS, MOST = 50_000_000, 10_000, 2**31


def side_files(source: Path) -> list[Path]:
    """Return the files of a model that go with what is made of it, and will be published.

    Raises:
        ValueError: for a link to nothing or out of the model's folder; those of the Hub's cache lead to its own files.
    """
    files, home = [], source.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in sorted({path for pattern in SIDE_FILES for path in source.glob(pattern)}):
        if path.is_symlink() and not any(path.resolve().is_relative_to(folder) for folder in homes):
            raise ValueError(f"{path} is a link to {path.readlink()}, out of the model's folder, and would be published: put a "
                             "copy in its place, or remove it")  # fmt: skip
        if not path.exists():
            raise ValueError(f"{path} is a link to {path.readlink()}, which is not there: put the file in its place")
        if path.is_file():
            files.append(path)
        else:
            logger.warning("%s is a folder, which does not go with what is made of the model", path)
    return files


def check_config_file(path: Path) -> dict[str, Any]:
    """Return the content of a config.json; refuse one that is no JSON object, or that has numbers which no model has.

    Raises:
        ValueError: naming the file and the key.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: not the config of a model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=special_float)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the keys of a config; download it again")
    _check_numbers(path, "", content)
    return content


def _check_numbers(path: Path, key: str, value: Any) -> None:
    items = value.items() if isinstance(value, dict) else ((key, item) for item in value) if isinstance(value, list) else ()
    for name, item in items:
        _check_numbers(path, name, item)
    limit = MOST_LAYERS if "layer" in key and key.startswith(("n_", "num_")) else MOST
    sized = "max" not in key and "theta" not in key  # Falcon-H1 has a rope_theta of 1e11
    if sized and isinstance(value, int | float) and limit < abs(value) < math.inf:
        raise ValueError(f"{path}: {key}: {value:,} is more than any model has; want at most {limit:,}")
