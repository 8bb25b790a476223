"""What ``--help`` and ``--version`` print, from reference.json; nothing heavy is imported."""

import json
import platform
import textwrap
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwen_lit import __version__

WIDTH = 80
TOLD = ("torch", "transformers", "peft", "lightning", "bitsandbytes")
"""Packages whose versions are asked for in a report of a fault."""
SECTIONS = {
    "": "the seed and the folder of a run",
    "model": "the base, the adapter, and how it learns",
    "data": "the rows to train on",
    "checkpoint": "what a run goes on from",
    "export": "what is written at the end",
    "samples": "answers while it trains",
    "trainer": "Lightning's Trainer: epochs, steps, GPUs, logging",
    "model.quantization_config": "transformers' BitsAndBytesConfig",
    "model.lora_config": "PEFT's LoraConfig",
}
"""In the order of the help: what they are for."""


@cache
def load() -> dict[str, Any]:
    """The reference that ships with the package."""
    return json.loads(Path(__file__).with_name("reference.json").read_text(encoding="utf-8"))


def keys_of(reference: dict[str, Any], command: str) -> list[str]:
    """The options of a command, and the keys of its configuration."""
    return [one["key"] for one in (*reference["commands"][command]["options"], *reference["keys"])]


def versions() -> str:
    """The versions of this package, of those that it rests on, and of Python."""
    found = []
    for name in TOLD:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} missing")
    return ", ".join([f"qwen_lit {__version__}", *found, f"Python {platform.python_version()}"])


def overview(reference: dict[str, Any]) -> str:
    """The commands and the sections of a configuration."""
    commands = reference["commands"]
    return "\n".join(
        [
            "qwen-lit fine-tunes Qwen models on your own GPU.",
            "",
            "Usage:   qwen-lit COMMAND [--config FILE.yaml] [--SECTION.KEY VALUE ...]",
            "         (python -m qwen_lit COMMAND is the same)",
            "Example: qwen-lit fit --config configs/qwen7b.yaml --trainer.max_epochs 1",
            "",
            "Commands:",
            *_table({name: one["help"] for name, one in commands.items()}),
            "",
            "Sections of a configuration:",
            *_table({name or "top level": text for name, text in SECTIONS.items()}),
            "",
            "qwen-lit COMMAND --help lists its keys; qwen-lit --version names the versions.",
        ]
    )


def command(reference: dict[str, Any], name: str) -> str:
    """The options of a command, and the keys of its configuration: ours, then those of the libraries."""
    command = reference["commands"][name]
    positional = [one for one in command["options"] if one.get("positional")]
    options = [one for one in command["options"] if not one.get("positional")]
    configured = any(one["key"] == "config" for one in options)
    usage = [one["key"].upper() if one["default"] is None else f"[{one['key'].upper()}]" for one in positional]
    usage += ["--config FILE.yaml", "[--SECTION.KEY VALUE ...]"] if configured else ["[--OPTION ...]"] * bool(options)
    lines = [*_wrapped(f"qwen-lit {name}: {command['help']}", ""), "", f"Usage:   qwen-lit {name} {' '.join(usage)}"]
    lines += [f"Example: {command['example']}"]
    for title, items in (("Arguments", positional), ("Options", options)):
        if items:
            lines += ["", f"{title}:", *(line for one in items for line in _entry(one))]
    if configured:
        lines += ["", "Keys, in the YAML by section or as --SECTION.KEY VALUE:"]
        for section, text in SECTIONS.items():
            keys = [one for one in reference["keys"] if one["section"] == section]
            lines += ["", f"{section or 'top level'}: {text}"]
            lines += [line for one in keys for line in _entry(one)]
    return "\n".join(lines)


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows)) + 2
    return [line for name, text in rows.items() for line in _wrapped(text, f"  {name:{width}}")]


def _entry(one: dict[str, Any]) -> list[str]:
    """An option: its name, type and default, and below it what it is."""
    default = one["default"]
    if one.get("positional"):
        name = one["key"].upper()
    else:
        name = "--" + one["key"]
    parts = [one["type"]]
    if one.get("required"):
        parts.append("required")
    elif default not in (None, ""):
        parts.append(f"default {json.dumps(default, ensure_ascii=False) if not isinstance(default, str) else default}")
    head = f"  {name}  "
    lines = textwrap.wrap(", ".join(parts), WIDTH, initial_indent=head, subsequent_indent=" " * 6)
    return [*lines, *_wrapped(one["help"], " " * 6)]


def _wrapped(text: str, head: str) -> list[str]:
    """The text in lines of at most 80 columns, the first after its head, the others below the text."""
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
