"""Tools and calls of them, as the chat template takes them."""

import re
from typing import Any

from qwen_lit.data.faults import RowError, snippet
from qwen_lit.data.strict import parsed

BLOCK = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
RESPONSE = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a row: a list of objects, or the same as JSON text, as a whole or each.

    Raises:
        RowError: they are something else.
    """
    if isinstance(value, str):
        value = parsed(value, "bad tools", "tools is", snippet(value)) if value.strip() else None
    if not value:
        return None
    tools = value if isinstance(value, list) else [value]
    if tools and all(isinstance(tool, str) and tool.lstrip().startswith("{") for tool in tools):
        tools = [parsed(tool, "bad tools", "a tool is", snippet(tool)) for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("bad tools", f"tools is not a list of objects: {snippet(repr(value))}")
    # OpenAI's older functions are bare; templates take either, and servers hand over the newer form.
    return [tool if "function" in tool or "type" in tool else {"type": "function", "function": tool} for tool in tools]


def read_calls(value: Any, unread: set[str]) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, as servers hand them to the template.

    Args:
        value: a call, a list of them, or either as JSON text.
        unread: names of keys that are not read are added.

    Raises:
        RowError: a call has no name, or arguments that are no object.
    """
    value = parsed(value, "bad tool call", "a tool call is", snippet(value)) if isinstance(value, str) else value
    return [_call(call, unread) for call in (value if isinstance(value, list) else [value])]


def _call(call: Any, unread: set[str]) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("bad tool call", f"a tool call has no name: {snippet(repr(call))}")
    key = next((key for key in ("arguments", "parameters") if function.get(key) is not None), "arguments")
    arguments, name = function.get(key), function["name"]
    if isinstance(arguments, str):
        arguments = parsed(
            arguments.strip() or "{}", "bad tool call", f"the arguments of {name!r} are", snippet(arguments)
        )
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise RowError("bad tool call", f"the arguments of {name!r} are not an object.")
    if not (call.keys() <= {"id", "type", "function", "index", "name", key} and function.keys() <= {"name", key}):
        outer = call.keys() - {"id", "type", "function", "index", "name", key}
        inner = function.keys() - {"id", "type", "index", "name", key} if function is not call else set()
        unread |= {f"tool_calls.{one}" for one in outer | inner if (call | function).get(one) not in (None, "")}
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def read_function_call(value: Any, unread: set[str]) -> dict[str, Any]:
    """A turn of role ``function_call``: calls as JSON, or text with a thought and tagged calls in it.

    Returns:
        ``content``, ``tool_calls``, and ``reasoning_content`` where it has a thought.

    Raises:
        RowError: text follows a call, or what should be a call is none.
    """
    found: dict[str, Any] = {"content": ""}
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("<think>") and "</think>" in text:
            thought, _, text = text.removeprefix("<think>").partition("</think>")
            text = text.strip()
            found |= {"reasoning_content": thought.strip("\n")} if thought.strip() else {}
        blocks = BLOCK.findall(text)
        if blocks:
            before, rest = text[: text.index("<tool_call>")], BLOCK.sub("", text[text.index("<tool_call>") :])
            if rest.strip():
                raise RowError("bad tool call", f"has text after a tool call: {snippet(rest.strip())}")
            calls = [call for block in blocks for call in read_calls(block, unread)]
            return found | {"content": before.rstrip(), "tool_calls": calls}
        value = text
    return found | {"tool_calls": read_calls(value, unread)}


def results(text: str) -> list[str]:
    """What stands within a text that is wholly ``<tool_response>`` blocks, as the template writes them itself."""
    return RESPONSE.findall(text) if not RESPONSE.sub("", text).strip() else []


def null_arguments(calls: list[dict[str, Any]]) -> bool:
    """Whether an argument is null, as where a library gives every row the fields of all."""
    return any(None in call["function"]["arguments"].values() for call in calls)
