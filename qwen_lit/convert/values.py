"""Values as peers' files write them, numbers and booleans as text among them, to plain ones."""

from typing import Any

from qwen_lit.errors import UserError

NOTHING = ("", "null", "none", "~")
TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def is_nothing(value: Any) -> bool:
    """Whether a value stands for none."""
    return value is None or value == [] or value == {} or (isinstance(value, str) and value.strip().lower() in NOTHING)


def is_off(value: Any) -> bool:
    """Whether an option with this value is left out or switched off."""
    return is_nothing(value) or value is False or (isinstance(value, str) and value.lower() in ("false", "no", "off"))


def number(key: str, value: Any) -> int | float:
    """A number, which YAML takes for text where it is written as 1e-4.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    try:
        found = float(str(value).replace("_", ""))
    except ValueError:
        raise UserError(f"{key} is {value!r}; give a number.") from None
    return int(found) if found.is_integer() and not set(str(value)) & set(".eE") else found


def whole(key: str, value: Any) -> int:
    """A whole number.

    Raises:
        UserError: it is none.
    """
    found = number(key, value)
    if found != int(found):
        raise UserError(f"{key} is {value!r}; give a whole number.")
    return int(found)


def truth(key: str, value: Any) -> bool:
    """A boolean.

    Raises:
        UserError: it is none.
    """
    found = TRUTHS.get(str(value).strip().lower())
    if found is None:
        raise UserError(f"{key} is {value!r}; give true or false.")
    return found


def text(key: str, value: Any) -> str:
    """A text.

    Raises:
        UserError: it is a list or a section.
    """
    if isinstance(value, list | dict):
        raise UserError(f"{key} is {value!r}; give one text.")
    return str(value)


def listed(key: str, value: Any) -> list[Any]:
    """A list: as it is, or of a text's parts between commas, or of the one value."""
    if is_nothing(value):
        return []
    if isinstance(value, str):
        return [part.strip().strip("'\"") for part in value.strip("[]").split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def spelled(value: Any) -> str:
    """A value as a YAML file would write it on one line, shortened."""
    if isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    else:
        text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
