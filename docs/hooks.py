"""What the site takes from the code while it is built: the table of all configuration keys, in each language."""

import html
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
KEYS, COMMANDS = "<!-- every key -->", "<!-- every command -->"
OURS = ("", "model", "data", "checkpoint", "export", "samples")
"""Sections whose keys are this project's own; the others are libraries'."""
LIBRARIES = ("model.quantization_config", "model.lora_config", "trainer")
TITLES = {
    "en": {
        "": "The run",
        "model": "`model`",
        "data": "`data`",
        "checkpoint": "`checkpoint`",
        "export": "`export`",
        "samples": "`samples`",
        "head": ("key", "what it does", "default", "type"),
        "none": "required",
    },
    "zh": {
        "": "整个运行",
        "model": "`model`",
        "data": "`data`",
        "checkpoint": "`checkpoint`",
        "export": "`export`",
        "samples": "`samples`",
        "head": ("键", "作用", "默认值", "类型"),
        "none": "必填",
    },
}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the tables where a page asks for them."""
    language = "zh" if page.file.src_uri.endswith(".zh.md") else "en"
    for mark, made in ((KEYS, tables), (COMMANDS, commands)):
        if mark in markdown:
            markdown = markdown.replace(mark, made(language))
    return markdown


def tables(language: str) -> str:
    """The keys of each section, our own first, as Markdown."""
    words = TITLES[language]
    chinese = yaml.safe_load((ROOT / "docs" / "reference.zh.yaml").read_text(encoding="utf-8"))
    sections: dict[str, list[str]] = {}
    for one in reference()["keys"]:
        told = chinese[one["key"]] if language == "zh" and one["key"] in chinese else escaped(one["help"])
        default = words["none"] if one.get("required") else f"`{shown(one['default'])}`"
        row = f"| `{one['key']}` | {told} | {default} | `{one['type']}` |"
        sections.setdefault(section_of(one["key"]), []).append(row)
    ordered = [name for name in OURS if name in sections] + [name for name in sections if name not in OURS]
    head = "| " + " | ".join(words["head"]) + " |\n|---|---|---|---|\n"
    return "\n\n".join(f"## {words.get(name, f'`{name}`')}\n\n{head}" + "\n".join(sections[name]) for name in ordered)


def commands(language: str) -> str:
    """Each command with an example and its options, as Markdown."""
    head = "| " + " | ".join(TITLES[language]["head"]) + " |\n|---|---|---|---|\n"
    parts = []
    for name, one in reference()["commands"].items():
        options = "".join(
            f"| `{'' if option.get('positional') else '--'}{option['key']}` | {escaped(option['help'])} | "
            f"`{shown(option['default'])}` | `{option['type']}` |\n"
            for option in one["options"]
        )
        parts.append(f"### `{name}`\n\n{escaped(one['help'])}\n\n```bash\n{one['example']}\n```\n\n")
        parts[-1] += head + options if options else ""
    return "\n".join(parts)


def escaped(text: str) -> str:
    """A help line, which may have marks of reStructuredText, as text of a Markdown table."""
    plain = re.sub(r":\w+:`~?([^`<]*)[^`]*`", r"\1", " ".join(text.split())).replace("`", "")
    return re.sub(r"([\\*_|\[\]])", r"\\\1", html.escape(plain, quote=False))


def shown(value: Any) -> str:
    """A default as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def section_of(key: str) -> str:
    """Ours by their first word; a library's by all but the last, as ``model.lora_config``."""
    for library in LIBRARIES:
        if key.startswith(library + "."):
            return library
    return key.split(".")[0] if "." in key else ""


@cache
def reference() -> dict[str, Any]:
    """``keys``, each with its type, default and help, and ``commands`` with their options."""
    return dict(json.loads((ROOT / "qwen_lit" / "reference.json").read_text(encoding="utf-8")))
