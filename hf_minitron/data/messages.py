"""Messages as a chat template reads them, of the forms in which data sets have them: OpenAI's, ShareGPT's, and parts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hf_minitron.errors import one_line

KEYS = {"from": "role", "value": "content"}
# Roles as every template knows them, by the names that they have in data sets in ShareGPT's form.
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "ai", "model"), "assistant"),
    **dict.fromkeys(("function", "observation"), "tool"),
}


def read_messages(turns: Any, template: str, name: str) -> list[dict]:
    """Return messages with `role` and `content`, which alone a turn that calls tools may lack, without nulls.

    Args:
        turns (`Any`): What a column of messages holds. Keys may be `from` and `value`, roles those of `ROLES` or any that the
            template names; a content may be a list of parts, all of them text.
        template (`str`): The chat template that shall write them.
        name (`str`): What errors call it.

    Raises:
        ValueError: for what is no message, or one that the template does not write.
    """
    if not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("holds no messages. Leave it out")
    return [_message(turn, template, name) for turn in turns]


def with_tools(row: Mapping) -> dict:
    """Return a row with its `tools`, which may be JSON, as a template reads them: a list of tables, or `None`.

    Raises:
        ValueError: for tools that are none.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools.strip() or "null")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"has tools that are not JSON: {one_line(error)}: {tools[:60]!r}. Leave it out") from error
    tools = without_nulls(tools) if tools else None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise ValueError(f"has tools that are no list of tables: {str(tools)[:60]!r}. Leave it out")
    return {**row, "tools": tools or None}


def _message(turn: Mapping, template: str, name: str) -> dict:
    made = without_nulls({KEYS.get(key, key): value for key, value in turn.items() if value is not None})
    if not isinstance(made.get("role"), str):
        raise ValueError(f"holds a message without a role: {str(turn)[:60]}. Leave it out")
    if "content" not in made and not made.get("tool_calls"):
        raise ValueError(f"holds a message without content: {str(turn)[:60]}. Leave it out")
    if made.get("tool_calls") and "tool_calls" not in template:
        raise ValueError(f"has tool_calls, which the chat template of {name} does not write. Give it a template that does, or "
                         "leave the document out")  # fmt: skip
    if calls := made.get("tool_calls"):
        made["tool_calls"] = [_call(call) for call in calls] if isinstance(calls, list) else calls
    made["role"] = _role(made["role"], template, name)
    return made | ({"content": _text(made["content"])} if "content" in made else {})


def _call(call: Any) -> Any:
    """Return a call of a tool with its arguments as a table, as templates write them, where they are JSON (OpenAI's form)."""
    if not isinstance(call, Mapping):
        return call
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": _call(function)}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, Mapping) else call


def _role(role: str, template: str, name: str) -> str:
    known = ROLES.get(role.lower())
    if known is None and not any(f"{quote}{role}{quote}" in template for quote in "'\""):
        raise ValueError(f"holds a message of {role[:40]!r}, a role that the chat template of {name} does not name. Call it "
                         "system, user, assistant or tool, or leave the document out")  # fmt: skip
    return known or role


def _text(content: Any) -> str:
    """Return a content, or the text of all of its parts, one after another."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"holds a message whose content is no text: {str(content)[:60]}. Leave it out")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"holds a message with a part of type {kind!r}, and only text is read. Leave it out")
    return "".join(part["text"] for part in content)


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that Arrow adds, as null, to tables that other rows have more keys of."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
