"""The words of the page."""

import ast
import re
from pathlib import Path
from string import Formatter

import pytest

from qwen_lit.studio.texts import LANGUAGES, preferred, texts

ROOM = Path("qwen_lit/studio")


def test_every_language_has_the_same_keys_with_the_same_values_in_them():
    first, *others = [texts(one) for one in LANGUAGES]
    for other in others:
        assert first.keys() == other.keys()
        for key in first:
            assert places(first[key]) == places(other[key]), key


def places(text):
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def test_every_word_that_is_asked_for_is_there_and_none_is_there_for_nothing():
    asked, beginnings, words = set(), set(), set()
    for path in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "t":
                words |= {one.value for one in node.args[:1] if isinstance(one, ast.Constant)}
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                asked.add(node.value)
            if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                beginnings.add(node.values[0].value)
    known = texts("en").keys()
    groups = tuple(one for one in beginnings if re.fullmatch(r"[a-z]+\.", one))
    assert words <= known
    assert [one for one in known if one not in asked and not one.startswith(groups)] == []


@pytest.mark.parametrize(
    ("cookie", "accepted", "language"),
    [("zh", "en", "zh"), (None, "zh-CN,zh;q=0.9", "zh"), (None, "fr", "en"), ("../x", "", "en")],
)
def test_the_language_is_what_was_chosen_or_the_browsers(cookie, accepted, language):
    assert preferred(cookie, accepted) == language
