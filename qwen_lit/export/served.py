"""What a server makes of a question, through each file that serves, beside the prompt as it was trained."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from qwen_lit.data.token_check import diff_ids
from qwen_lit.export.modelfile import before_system, default_system, rendered
from qwen_lit.thinking import HEADER, Asking, Form, asked

TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", re.DOTALL)
THOUGHT = re.compile(r"<think>\n(.*?)\n</think>\n\n", re.DOTALL)
MODELFILE = "Ollama's Modelfile"


def sent(text: str, tokenizer: Any, form: Form, trained: Sequence[int]) -> dict[str, list[int]]:
    """Token ids that each served form sends for the conversation of a trained prompt.

    Args:
        text: Ollama's Modelfile.
        tokenizer: as a server reads it.
        form: in which the run's prompts were trained, as the model card serves it.
        trained: token ids of the prompt.

    Returns:
        By the name of the form: the chat template, by the switch that asks as this prompt was trained; and the
        Modelfile, where the prompt is of the kind that it is for. Empty where the prompt is no conversation, or one
        that the chat template takes in another form alone.
    """
    asking, prompt = Asking.of(tokenizer), str(tokenizer.decode(trained))
    think = _switched(asking, prompt) if asking.switch else None
    of_this = dataclasses.replace(form, enable_thinking=think)
    messages = conversation(prompt, default_system(tokenizer, of_this), before_system(tokenizer, of_this))
    if not messages:
        return {}
    name = "the chat template" if think is None else f"the chat template with enable_thinking {str(think).lower()}"
    try:
        # A client sends the thoughts of earlier turns within the text, or in a field of their own.
        ways = [asked(tokenizer, one, think) for one in (messages, [_parted(message) for message in messages])]
        found = {name: next((ids for ids in ways if ids == list(trained)), ways[0])}
    except Exception:  # a template may raise anything
        return {}
    if not form.mixed or asking.opening(think) == form.opening:
        ids = tokenizer.backend_tokenizer.encode(rendered(text, messages), add_special_tokens=False).ids
        found[MODELFILE] = list(ids)
    return found


def _switched(asking: Asking, text: str) -> bool | None:
    """The value of the switch with which the template ends a prompt so; of two, that which writes more."""
    ends = [value for value in (True, False) if text.endswith(HEADER + asking.opening(value))]
    return max(ends, key=lambda value: len(asking.opening(value)), default=None)


def conversation(text: str, default: str = "", before: str = "") -> list[dict[str, str]]:
    """The messages of a prompt in ChatML, as a client sends them; none where it is another text.

    Args:
        text: of the prompt, with the header of the answer.
        default: what the chat template puts before a conversation without a system prompt.
        before: what it puts before the words of a system prompt.
    """
    body = text.rpartition(HEADER)[0].removeprefix(default)
    turns = TURN.findall(body)
    if "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in turns) != body:
        return []
    return [
        {"role": role, "content": words.removeprefix(before) if role == "system" else words} for role, words in turns
    ]


def _parted(message: dict[str, str]) -> dict[str, str]:
    """A message with its thought, if it begins with one, in a field of its own."""
    thought = THOUGHT.match(message["content"]) if message["role"] == "assistant" else None
    if thought is None:
        return message
    return {**message, "reasoning_content": thought[1], "content": message["content"][thought.end() :]}


def difference(trained: Sequence[int], found: Sequence[int], name: str, tokenizer: Any) -> str:
    """Where a prompt as it is sent parts from the one that was trained, in one line; empty where they are equal."""
    if list(trained) == list(found):
        return ""
    return "; ".join(line.strip() for line in diff_ids(trained, found, tokenizer.backend_tokenizer, name))
