"""What is known of a peer's configuration while it is converted."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_lit.convert.values import is_nothing, spelled


@dataclass
class Draft:
    """A configuration between two kinds.

    Its common words are those of transformers' TrainingArguments, and, as ``lora_config.r`` and
    ``quantization_config.load_in_4bit``, those of PEFT's LoraConfig and of BitsAndBytesConfig.
    """

    path: Path
    """Of the file, beside which others are looked for."""
    peer: str
    """Whose configuration it is."""
    given: dict[str, Any]
    """Keys of the file that nothing has read yet."""
    common: dict[str, Any] = field(default_factory=dict)
    """Common word to value."""
    origins: dict[str, str] = field(default_factory=dict)
    """Common word to what the file says, such as ``lora_target: all``."""
    ours: dict[str, Any] = field(default_factory=dict)
    """Our key, with dots, to value."""
    comments: dict[str, str] = field(default_factory=dict)
    """Our key to what stands behind it in the YAML."""
    notes: list[str] = field(default_factory=list)
    """What differs in meaning or has no counterpart, a line each."""
    refused: list[str] = field(default_factory=list)
    """Why it cannot be converted."""

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key of the file, which is read with this; the default where it says nothing."""
        value = self.given.pop(key, None)
        return default if is_nothing(value) else value

    def put(self, word: str, value: Any, origin: str | None = None) -> None:
        """Give a common word its value.

        Args:
            word: the common one.
            value: of it.
            origin: what the file says; without it, the word and the value.
        """
        self.common[word] = value
        self.origins[word] = origin if origin is not None else f"{word}: {spelled(value)}"

    def move(self, key: str, word: str, read: Callable[[str, Any], Any] | None = None) -> None:
        """Give a common word what a key of the file says, if it says something."""
        value = self.take(key)
        if value is not None:
            self.put(word, read(key, value) if read else value, f"{key}: {spelled(value)}")

    def use(self, word: str, default: Any = None) -> Any:
        """The value of a common word, which is converted with this."""
        value = self.common.pop(word, None)
        return default if is_nothing(value) else value

    def origin(self, word: str) -> str:
        """What the file says of a common word."""
        return self.origins.get(word, word)

    def name(self, word: str) -> str:
        """The file's own key for a common word."""
        return self.origin(word).partition(":")[0]

    def write(self, key: str, value: Any, comment: str = "") -> None:
        """Give a key of ours its value.

        Args:
            key: with dots.
            value: plain YAML.
            comment: stands behind it: what the file says, less the value where that is the same.
        """
        self.ours[key] = value
        name, _, given = comment.partition(": ")
        shown = name if given and given == spelled(value) else comment
        if shown and shown != key.rpartition(".")[2]:
            self.comments[key] = shown

    def note(self, line: str) -> None:
        """Tell something once."""
        if line not in self.notes:
            self.notes.append(line)

    def refuse(self, line: str) -> None:
        """Tell why it cannot be converted."""
        if line not in self.refused:
            self.refused.append(line)


@dataclass(frozen=True)
class Peer:
    """A trainer whose configurations are converted."""

    name: str
    marks: frozenset[str]
    """Keys that it alone has."""
    words: dict[str, str]
    """Its key to the common word, where one stands for the other."""
    defaults: dict[str, Any]
    """Common word to what it takes where the file says nothing."""
    unneeded: dict[str, str]
    """Its key to why nothing has to be set here."""
    without: dict[str, str]
    """Its key to what it means that there is no such thing here."""
    read: Callable[[Draft], None]
    """Reads what takes more than one key, and refuses what is not done here."""

    def knows(self, key: str) -> bool:
        """Whether a key is in one of its tables."""
        return key in self.marks or key in self.words or key in self.unneeded or key in self.without


def grouped(lines: dict[str, str]) -> dict[str, str]:
    """Key to reason, of reasons and the keys they hold for."""
    return {key: reason for reason, keys in lines.items() for key in keys.split()}
