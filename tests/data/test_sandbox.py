"""A template renders the same when its sandbox answers at once, and may do no more."""

import itertools

import pytest

from qwen_lit.data.sandbox import answer_at_once
from tests.data.test_chatml import CONVERSATIONS, TEMPLATES, A, U, template

number = itertools.count()


def outcome(tokenizer, row):
    try:
        return tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
    except Exception as error:
        return type(error), str(error)


def before_and_after(tokenizer, text, row):
    # transformers keeps one compiled template for each text.
    tokenizer.chat_template = text + f"{{# {next(number)} #}}"
    plain = outcome(tokenizer, row)
    answer_at_once(tokenizer)
    return plain, outcome(tokenizer, row)


@pytest.mark.parametrize("shape", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_renders_every_shape_as_before(qwen_tokenizer, name, shape):
    plain, quick = before_and_after(qwen_tokenizer, template(name), CONVERSATIONS[shape])
    assert isinstance(plain, str) and quick == plain


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(messages[0]) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ messages[0].clear() }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ ('%s' % messages[0].content).format.__self__ }}",
        "{{ messages[0].content.startswith.__self__.__class__ }}",
        "{% set ns = namespace(x=1) %}{{ ns.__init__ }}{{ ns.x }}",
        "{% set ns = namespace(f='{0.__class__}'.format) %}{{ ns.f(messages) }}",
        "{% for m in messages %}{{ loop.__class__ }}{{ loop.index }}{{ loop.cycle('a', 'b') }}{% endfor %}",
        "{% set ns = namespace() %}{{ ns.missing.field }}",
        "{{ messages[0].missing.field }}",
        "{{ messages[0].items }}{{ messages[0].keys() | list }}",
        "{{ messages[0].content.startswith('W', 0, nothing=1) }}",
    ],
)
def test_what_the_sandbox_refuses_stays_refused(qwen_tokenizer, attack):
    plain, quick = before_and_after(qwen_tokenizer, attack, {"messages": [U, A]})
    for found in (plain, quick):
        assert "globals" not in str(found) or "unsafe" in str(found)
    assert str(quick).split(" at 0x")[0] == str(plain).split(" at 0x")[0]


def test_a_library_that_compiles_in_another_way_is_left_alone(qwen_tokenizer, monkeypatch):
    from transformers.utils import chat_template_utils

    monkeypatch.delattr(chat_template_utils, "_compile_jinja_template")
    answer_at_once(qwen_tokenizer)
