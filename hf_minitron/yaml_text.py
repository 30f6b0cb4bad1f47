"""YAML as recipes and cards mean it: language codes, dates and revisions are text, numbers are numbers.

PyYAML reads YAML 1.1, where `no` is false, `0123` is octal and `12:30` is a number. Here only `true` and `false` are truth
values, a number begins with no needless zero, and `1e-4` is one. What is written is read back as it was, by 1.1 and 1.2 alike.
"""

import math
import re
from typing import Any

import yaml

_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)|(?:0|[1-9][0-9_]*)\.[0-9]*|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_RESOLVERS = {"bool": (_BOOL, "tTfF"), "int": (_INT, "-+0123456789"), "float": (_FLOAT, "-+0123456789.")}


# Aliases may stand for more than any memory holds.
MOST_NODES, DEEPEST = 100_000, 50


class Loader(yaml.SafeLoader):
    """A safe loader that takes for text what YAML 1.2 does, and no key twice in a table."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] in ("null", "merge")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        """Make a table; refuse a key that stands in it twice."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = repr(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.YAMLError(f"the key {key} stands twice in a section, again in line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """A safe dumper that quotes text which YAML 1.1 or 1.2 would take for something else."""


for _tag, (_pattern, _first) in _RESOLVERS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load_yaml(text: str) -> Any:
    """Read YAML.

    Raises:
        yaml.YAMLError: for text that is none, a key that stands twice, and aliases for too much.
        RecursionError: for what is nested too deep, or in itself.
    """
    loader = Loader(text)
    node = loader.get_single_node()
    _weigh(node, (), {})
    return None if node is None else loader.construct_document(node)


def _weigh(node: yaml.Node | None, above: tuple[int, ...], known: dict[int, int]) -> int:
    """Return how many values a node stands for, aliases written out; refuse too many, or too deep."""
    if id(node) in above or len(above) > DEEPEST:
        raise RecursionError
    if id(node) not in known:
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_weigh(part, (*above, id(node)), known) for part in parts)
        if known[id(node)] > MOST_NODES:
            raise yaml.YAMLError(f"with its aliases written out it holds more than {MOST_NODES:,} values")
    return known[id(node)]


def dump_yaml(value: Any) -> str:
    """Write YAML, in the order of the value's keys."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def scalar(text: str) -> str:
    """Write text as a YAML value of one line, which stands after a key and before a comment.

    Example:

    ```python
    >>> print(scalar("data/my #1: chats.jsonl"), scalar("owner/name"))
    'data/my #1: chats.jsonl' owner/name
    ```
    """
    style = None if text.isprintable() else '"'  # else a line break is written as one
    return (
        yaml.dump([text], Dumper=Dumper, default_style=style, allow_unicode=True, width=math.inf)
        .removeprefix("- ")
        .rstrip("\n")
    )
