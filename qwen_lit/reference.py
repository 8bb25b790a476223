"""``python -m qwen_lit.reference``: writes reference.json, every command and key with its type, default and help.

Read without torch, it answers ``--help`` and finds misspelt keys; the documentation is made from it as well.
"""

import argparse
import collections.abc
import json
import re
import types
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin
from unittest.mock import patch

from jsonargparse import capture_parser, set_parsing_settings
from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse.typing import Path_fr

from qwen_lit import cli
from qwen_lit.config import LoraSection, QuantizationSection
from qwen_lit.front import BESIDE
from qwen_lit.wording import COMMANDS, KEYS

TARGET = Path(__file__).with_name("reference.json")
LIBRARIES = {"trainer": "Lightning", "model.lora_config": "PEFT", "model.quantization_config": "transformers"}
"""Sections whose keys are those of another library."""
SECTIONS = ("", "model", "data", "checkpoint", "export", "samples", *LIBRARIES)
"""As they are listed; the first is the top level."""
TOP = ("seed_everything", "output_dir")
"""Keys that stand in no section."""
PACKAGES = ("jsonargparse", "lightning", "peft", "transformers")
"""Their versions decide which keys there are, and their help."""


def build() -> dict[str, Any]:
    """The whole reference, as in the file."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parsers = {name: capture_parser(lambda name=name: cli.QwenCLI(name, [])) for name in cli.COMMANDS}  # type: ignore[misc]
    keys = _keys(parsers["fit"])
    known = {one["key"] for one in keys}
    commands: dict[str, Any] = {}
    for name, (description, example) in COMMANDS.items():
        shown = name.replace("_", "-")
        if name in BESIDE:
            commands |= _beside(shown, asked(import_module(BESIDE[name]).main), description, example)
        else:
            options = [one for one in _actions(parsers[name], name) if one["key"] not in known]
            commands[shown] = {"help": description, "example": example, "options": options}
    return {"versions": {name: version(name) for name in PACKAGES}, "commands": commands, "keys": keys}


def _keys(parser: Any) -> list[dict[str, Any]]:
    """What stands in a configuration: the keys of all sections."""
    found = [one for one in _actions(parser, "fit") if "." in one["key"] or one["key"] in TOP]
    for key in found:
        key["section"] = section_of(key["key"])
    section = "model.quantization_config"
    for one in get_signature_parameters(QuantizationSection):
        kind = "list[str] or null" if one.name.endswith("modules") else _kind(one.default)
        key = {"key": f"{section}.{one.name}", "type": kind, "default": one.default}
        found.append({**key, "help": _help(key["key"], one.doc), "section": section})
    found.sort(key=lambda one: SECTIONS.index(one["section"]))
    return [{**one, "library": LIBRARIES.get(one["section"])} for one in found]


def _actions(parser: Any, command: str) -> list[dict[str, Any]]:
    """Every option of a parser of jsonargparse that takes a value."""
    peft_help = {f"model.lora_config.{one.name}": one.metadata.get("help") for one in fields(LoraSection)}
    found = []
    for action in parser._actions:
        hint = Path_fr if action.dest == "config" else getattr(action, "_typehint", None)
        if hint is None or action.dest.endswith(".help") or type(action).__name__ == "ActionLink":
            continue
        default = action.default if isinstance(action.default, str | int | float | list | dict | None) else None
        one = {"key": action.dest, "type": type_name(hint), "default": default}
        if action.required or action.dest in parser._extra_required_keys:
            one["required"] = True
        found.append({**one, "help": _help(action.dest, peft_help.get(action.dest) or action.help, command)})
    return found


def section_of(key: str) -> str:
    """The section in which a key is listed, as ``model.lora_config``; empty for the top level."""
    return max((one for one in SECTIONS if key.startswith(one + ".")), key=len, default="")


def _help(key: str, text: str | None, command: str = "") -> str:
    """Ours, or the first sentences of the library's."""
    if (ours := KEYS.get(f"{command} {key}") or KEYS.get(key)) is not None:
        return ours
    text = " ".join((text or "").split())
    return plain(text) if section_of(key) in LIBRARIES else text


def plain(text: str) -> str:
    """A docstring of a library without markup: its first sentence, and the second where both are short."""
    text = re.sub(r"<a href=[^>]*>(.*?)</a>", r"\1", text)
    text = re.sub(r"\[([^\]]*)\]\(https?:[^)]*\)", r"\1", text)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    text = re.sub(r" ?Defaults?:? (to )?``?[^`]*``?\.?| ?Default: \S+$", "", text)
    text = text.replace("`", "").replace("Lora ", "LoRA ")
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
    short = " ".join(sentences[:2])
    text = short if len(short) <= 160 else sentences[0]
    return text if text.endswith((".", "!", "?")) else text + "."


def type_name(hint: Any) -> str:
    """A type as it is written in a configuration: ``str or null``, ``list[int]``, the words of a choice."""
    if hint is Any:
        return "any"
    if hint in (None, type(None)):
        return "null"
    if hint is Path_fr:
        return "file"
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        names = list(dict.fromkeys(name for one in inner if one is not Path for name in type_name(one).split(" or ")))
        return " or ".join([one for one in names if one != "null"] + ["null"] * ("null" in names))
    if origin is collections.abc.Callable:
        return "a class with its init_args"
    if origin is Literal:
        return " or ".join(str(one) for one in inner)
    name = "list" if "Iterable" in str(origin) else getattr(origin or hint, "__name__", str(hint))
    name = {"QuantizationSection": "section", "PosixPath": "str", "Path": "str"}.get(name, name)
    if not inner or name == "type":
        return name
    return f"{name}[{', '.join(type_name(one) for one in inner)}]"


def _kind(default: Any) -> str:
    return "str or null" if default is None else type(default).__name__


def _beside(name: str, parser: argparse.ArgumentParser, description: str, example: str) -> dict[str, Any]:
    """A command that has a parser of its own, and the commands below it."""
    options: list[dict[str, Any]] = []
    below: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._SubParsersAction):
            for one in action._choices_actions:
                path = f"{name} {one.dest}"
                below |= _beside(path, action.choices[one.dest], plain(one.help or ""), f"qwen-lit {path} --help")
            continue
        positional = not action.option_strings
        key = action.dest if positional else action.option_strings[0].lstrip("-")
        kind = "bool" if action.nargs == 0 else " or ".join(action.choices or ())
        default = None if action.default == argparse.SUPPRESS else action.default
        option = {"key": key, "type": kind or getattr(action.type, "__name__", "str").lstrip("_"), "default": default}
        option["help"] = " ".join((action.help or "").split())
        options.append({**option, **({"positional": True} if positional else {})})
    return {name: {"help": description, "example": example, "options": options}, **below}


def asked(main: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """The parser that a command makes for its arguments; nothing else of the command is run."""
    found: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        found.append(parser)
        raise SystemExit

    with patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            main([])
        except SystemExit:
            pass
    return found[0]


def text() -> str:
    """What the file holds."""
    return json.dumps(build(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    print(f"{TARGET} written")
