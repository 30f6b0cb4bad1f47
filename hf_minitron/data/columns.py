"""What the columns of documents are called and hold, as TRL's SFTTrainer reads them: texts, chats, or tokens."""

from collections.abc import Mapping, Sequence

# Columns that are read where there is no text: of documents, and of prompts, whose answers are left away.
CHATS = ("messages", "conversations")
DOCUMENTS = (*CHATS, "completion", "input_ids")
PROMPTS = (*CHATS, "prompt")
# Columns beside tokens that say where nothing is learnt, each in its own way.
MASKS = ("labels", "completion_mask", "assistant_masks", "attention_mask")


def _is_chat(value: Sequence) -> bool:
    """Return whether a list is one of messages, as the Hub's `messages` and `conversations` columns hold."""
    return bool(value) and all(isinstance(turn, Mapping) for turn in value)


# What the columns of documents hold: of which types, what is so of a list, and what it is called.
HOLDS = {
    "text": (str, bool, "text"),
    "messages": (list, _is_chat, "messages"),
    "prompt": (str | list, _is_chat, "text or messages"),
    "completion": (str | list, _is_chat, "text or messages"),
    "input_ids": (list, lambda ids: all(type(token) is int for token in ids[:1]), "whole numbers"),
}


def columns_of(
    source: str, there: Sequence[str], column: str, first: Mapping, prompts: bool = False
) -> tuple[dict[str, str], str]:
    """Return which columns hold documents, by the name they get, and what to do when they do not.

    What a column holds is told by its first row: text, messages, or tokens. A completion stands beside its prompt.

    Args:
        source (`str`): What errors call the text.
        there (`Sequence[str]`): Its columns.
        column (`str`): The one that is asked for; where there is no `text`, the first of `DOCUMENTS`.
        first (`Mapping`): Its first row.
        prompts (`bool`, *optional*, defaults to `False`): Of prompts, which are texts or messages, the first of `PROMPTS`.

    Raises:
        ValueError: for a missing column.
    """
    names = PROMPTS if prompts else DOCUMENTS
    texts = ", ".join(name for name, value in first.items() if isinstance(value, str)) or "none"
    chats = ", ".join(name for name, value in first.items() if holds("messages", value) and name not in names)
    advice = (
        f"Columns with text: {texts}{chats and f'; with messages: {chats}'}; set text_column. Also read are {', '.join(names)}"
    )
    found = column
    if column == "text" and column not in there:
        found = next((name for name in names if name in there), column)
    if found not in there:
        raise ValueError(f"{source} has no column {column!r}; it has {', '.join(there)}. {advice}")
    more = {name: name for name in ("tools",) if name in there}
    if found == "completion" and "prompt" in there and not prompts:
        return {"prompt": "prompt", "completion": "completion"} | more, advice
    if holds("messages", first[found]) or (found in CHATS and (found != column or isinstance(first[found], list))):
        return {"messages": found} | more, advice
    if holds("input_ids", first[found]) and not prompts:
        return {"input_ids": found} | {name: name for name in MASKS if name in there}, advice
    return {"text": found}, advice


def holds(name: str, value: object) -> bool:
    """Return whether a value is what a column of this name is to hold."""
    return isinstance(value, HOLDS[name][0]) and (isinstance(value, str) or HOLDS[name][1](value))
