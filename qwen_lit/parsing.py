"""The parser of the command line: a value stays what was given, and what cannot be parsed is one line."""

import argparse
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_dumper, set_loader
from jsonargparse._actions import _ActionConfigLoad
from lightning.pytorch.cli import LightningArgumentParser

from qwen_lit.checks import NONE
from qwen_lit.errors import LONGEST, UserError, shortened
from qwen_lit.names import expanded

NULL = ("", "null", "Null", "NULL", "~")
PATHS = ("output_dir", "ckpt_path", "row", "html", "source", "target")
"""Top-level keys that name a file or folder of the user's; the sections see to their own."""
_yaml = get_loader("yaml")


def _load(text: str) -> Any:
    """YAML; but a text that is a comment to YAML, such as a prompt that begins with #, is not null."""
    value = _yaml(text)
    return text if value is None and text.strip() not in NULL else value


class _Dumper(yaml.SafeDumper):
    """Quotes every text that the loader would take for something else, such as 1e3, which is a number to it alone."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    try:
        plain = "\n" in text or isinstance(_yaml(text), str)
    except yaml.YAMLError:
        plain = True
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else "'")


_Dumper.add_representer(str, _quoted)
set_loader("yaml", _load, (yaml.YAMLError,))
set_dumper(
    "yaml",
    lambda data: yaml.dump(data, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False),
)


class Parser(LightningArgumentParser):
    """LightningCLI's parser, which reads no file but ``--config`` and a section's YAML.

    jsonargparse reads any file whose name stands where a type holds a class, a dataset as well, and takes what it says
    for the value.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make a parser as jsonargparse does, one that takes no part of a key for the key."""
        super().__init__(*args, **{"allow_abbrev": False, "prog": "qwen-lit", **kwargs})

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add a class's arguments as jsonargparse does; a value that names a file stays that name."""
        added = super().add_class_arguments(*args, **{**kwargs, "sub_configs": False})
        for action in self._actions:
            if type(action) is _ActionConfigLoad:
                action.__class__ = _Section
        return added

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration file as jsonargparse does, with errors that name it.

        Raises:
            UserError: the file is no configuration.
        """
        try:
            return super().parse_path(cfg_path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise UserError(f"{cfg_path}: is not UTF-8, so no configuration; save it as UTF-8.") from error
        except UserError as error:
            raise UserError(f"{cfg_path}: {error}") from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the command, unless this parser only tries whether a value fits.

        Raises:
            UserError: with the message in one line.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        if message.startswith("Unexpected config:"):
            message = "is not a configuration of the form KEY: VALUE."
        raise UserError(one_line(message)) from ex


class _Section(_ActionConfigLoad):
    """A section of the configuration: its keys, or a YAML file that holds them."""

    def _load_config(self, value: Any, parser: Any) -> Any:
        if isinstance(value, str) and not value.endswith((".yaml", ".yml")) and not value.lstrip().startswith("{"):
            raise TypeError(
                f"{self.dest} is a section of keys, not {shortened(value)!r}; "
                f"give --{self.dest}.KEY VALUE, or a file that ends in .yaml"
            )
        try:
            return super()._load_config(value, parser)
        except UnicodeDecodeError as error:
            raise TypeError(f"{value}: is not UTF-8; save it as UTF-8") from error


def split_command(given: list[str], commands: Collection[str]) -> tuple[str, list[str]]:
    """The command and its options; configurations with a section for each command may stand before it.

    Args:
        given: the whole command line.
        commands: that there are.

    Raises:
        UserError: there is no command, or something else stands before it.
    """
    at = next((at for at, one in enumerate(given) if one in commands), len(given))
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    before.add_argument("-c", "--config", action="append", default=[])
    try:
        known, others = before.parse_known_args(given[:at])
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if others:
        raise UserError(f"{others[0]} stands before the command; put it after.")
    sections = [_sections(path) for path in known.config]
    named = [name for one in sections for name in one if name in commands]
    if at == len(given) and not named:
        raise UserError(f"no command is given; put one of {', '.join(commands)} first.")
    command = given[at] if at < len(given) else named[0]
    own = [option for one in sections if command in one for option in ("--config", json.dumps(one[command]))]
    return command, own + given[at + 1 :]


def _sections(path: str) -> dict[str, Any]:
    """A configuration of several commands.

    Raises:
        UserError: the file cannot be read, or is none.
    """
    try:
        found = _yaml(Path(expanded(path)).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a configuration of the form KEY: VALUE.")
    return found


def expand_paths(config: Any) -> None:
    """Put the home folder in the place of ``~`` in the paths of a command's configuration."""
    for key in PATHS:
        if config.get(key):
            config[key] = expanded(config[key])


def one_line(message: str) -> str:
    """A message of jsonargparse as one line that names the key, the value and what is expected."""
    key, text = "", message
    while found := re.match(r'[\s-]*(?:Parser key "([^"]+)":|Unable to load config [^\n]*\n)\s*', text):
        key, text = found[1] or key, text[found.end() :]
    union = re.search(
        r"Subtypes: \[([^\n]*)\]\n(.*)\n\s*Given value type: <class '([\w.]+)'>\n\s*Given value: (.*)", text, re.S
    )
    single = re.search(r"Expected an? ([^\n]*?)()()\. Got value: (.*)", text, re.S)
    if unknown := re.search(r"Option '(.*?)' is not accepted|does not accept option '(.*?)'", text):
        key, text = "", f"there is no key {'.'.join(filter(None, (key, unknown[1] or unknown[2])))}; --help lists all"
    elif missing := re.search(r"No module named '([\w.]+)'", text):
        text = f"there is no module {missing[1]}; pip install {missing[1].split('.')[0]}, or correct its name"
    elif found := union or single:
        types, value = re.sub(r", (?![^\[]*\])", " or ", _named(found[1])), shortened(found[4].strip())
        text = f"expected {types}, not {value!r}{_causes(found[2])}{_remedy(types, value, found[3])}"
    text = shortened(" ".join(text.split()), 3 * LONGEST)
    return f"{key}: {text}" if key else text


def _causes(errors: str) -> str:
    """The help of a class beside the kind of its value."""
    lines = [line.strip(" -") for line in errors.splitlines()]
    plain = ("Expected", "Errors:", "Subtypes:", "Given", "Does not validate", "Problem with", "Not a valid subclass")
    causes = [line for line in lines if line and not line.startswith(plain) and not line.startswith("a ")]
    return f" ({_named(causes[0])})" if causes else ""


def _remedy(types: str, value: str, kind: str) -> str:
    if value.lower() in NONE and "null" in types:
        return "; write null for none"
    if kind == "str" and "list[str]" in types:
        return f"; give a list, as [{value}]"
    if kind != "str" and re.search(r"\bstr\b", types):
        return "; a text that YAML takes for something else goes in quotes"
    return ""


def _named(types: str) -> str:
    """Types as a user writes them."""
    types = re.sub(r"<class '([^']*)'>", r"\1", types).replace("NoneType", "null")
    types = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", types)
    return re.sub(r"\b(Lora|Quantization)Section\b", r"\1", types)
