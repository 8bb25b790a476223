"""The words of the page, in each language."""

from functools import cache
from importlib.resources import files

import yaml

LANGUAGES = {"en": "English", "zh": "中文"}


@cache
def texts(language: str) -> dict[str, str]:
    """Key to words.

    Args:
        language: one of ``LANGUAGES``.
    """
    text = files("qwen_lit.studio").joinpath("texts", f"{language}.yaml").read_text(encoding="utf-8")
    found = yaml.safe_load(text)
    return {str(key): str(value) for key, value in found.items()}


def preferred(cookie: str | None, accepted: str) -> str:
    """The language of a browser: the one that was chosen, else its own.

    Args:
        cookie: what was chosen; None or anything else is no choice.
        accepted: the header ``Accept-Language``.
    """
    if cookie in LANGUAGES:
        return str(cookie)
    return "zh" if accepted.lower().startswith("zh") else "en"
