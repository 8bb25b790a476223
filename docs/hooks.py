"""What the site takes from the code while it is built: the table of all configuration keys, in each language."""

import html
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- every key -->"
OURS = ("", "model", "data", "checkpoint", "export", "samples")
"""Sections whose keys are this project's own; the others are libraries'."""
TITLES = {
    "en": {"": "The run", "model": "`model`", "data": "`data`", "checkpoint": "`checkpoint`", "export": "`export`",
           "samples": "`samples`", "head": ("key", "type", "default", "what it does"), "none": "required"},
    "zh": {"": "整个运行", "model": "`model`", "data": "`data`", "checkpoint": "`checkpoint`", "export": "`export`",
           "samples": "`samples`", "head": ("键", "类型", "默认值", "作用"), "none": "必填"},
}  # fmt: skip


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the tables where a page asks for them."""
    if MARK not in markdown:
        return markdown
    return markdown.replace(MARK, tables("zh" if page.file.src_uri.endswith(".zh.md") else "en"))


def tables(language: str) -> str:
    """The keys of each section, our own first, as Markdown."""
    words = TITLES[language]
    chinese = yaml.safe_load((ROOT / "docs" / "reference.zh.yaml").read_text(encoding="utf-8"))
    sections: dict[str, list[str]] = {}
    for one in reference():
        section = section_of(one)
        told = chinese.get(one["key"], one["help"]) if language == "zh" else one["help"]
        default = words["none"] if one["default"] is ... else f"`{json.dumps(one['default'], ensure_ascii=False)}`"
        cells = (f"`{one['key']}`", f"`{one['type']}`", default, cell(told))
        sections.setdefault(section, []).append("| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |")
    ordered = [name for name in OURS if name in sections] + [name for name in sections if name not in OURS]
    head = "| " + " | ".join(words["head"]) + " |\n|---|---|---|---|\n"
    return "\n\n".join(f"## {words.get(name, f'`{name}`')}\n\n{head}" + "\n".join(sections[name]) for name in ordered)


def cell(text: str) -> str:
    """A help line as text of a table."""
    return html.escape(" ".join(text.split()), quote=False).replace("*", "\\*").replace("_", "\\_")


def section_of(key: dict[str, Any]) -> str:
    """Ours by their first word; a library's by all but the last, as ``model.lora_config``."""
    name = key["key"]
    for library in ("model.quantization_config", "model.lora_config", "trainer"):
        if name == library or name.startswith(library + "."):
            return "model" if name == library else library
    return name.split(".")[0] if "." in name else ""


@cache
def reference() -> list[dict[str, Any]]:
    """Every key of ``fit`` with its type, default and help."""
    written = ROOT / "qwen_lit" / "reference.json"
    if written.is_file():
        return list(json.loads(written.read_text(encoding="utf-8"))["keys"])
    return from_parser()


def from_parser() -> list[dict[str, Any]]:
    """The same, asked of the command line itself."""
    from jsonargparse import set_parsing_settings

    from qwen_lit.cli import QwenCLI, QwenDataModule, QwenModule, QwenTrainer
    from qwen_lit.parsing import Parser

    class Found(Exception):
        """Carries the parser out."""

    class Reader(QwenCLI):
        """Stops where arguments would be read."""

        def parse_arguments(self, parser: Any, args: Any) -> None:
            """Not reached by a run."""
            raise Found(self._subcommand_parsers["fit"])

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        Reader(QwenModule, QwenDataModule, trainer_class=QwenTrainer, parser_class=Parser, seed_everything_default=42,
               auto_configure_optimizers=False, load_from_checkpoint_support=False, args=["fit"])  # fmt: skip
    except Found as found:
        parser = found.args[0]
    keys = []
    for action in parser._actions:
        if not action.option_strings or action.help == "==SUPPRESS==" or action.dest.endswith("help"):
            continue
        kind = getattr(action, "_typehint", None) or action.type
        keys.append({"key": action.dest, "type": getattr(kind, "__name__", str(kind)),
                     "default": ... if action.required else plain(action.default), "help": action.help or ""})  # fmt: skip
    return keys


def plain(value: Any) -> Any:
    """A default as JSON has it."""
    try:
        json.dumps(value)
    except TypeError:
        return str(value)
    return value
