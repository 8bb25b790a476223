"""In which form rows are trained is asked of the chat template, and is the form in which they are served."""

import pytest

from qwen_lit.data.chatml import Encoder
from qwen_lit.data.records import parse_row
from qwen_lit.export.modelfile import modelfile, rendered
from qwen_lit.export.served import difference, sent
from qwen_lit.thinking import Asking, Form, asked, read_form, trained_form
from tests.templates import EMPTY, TEMPLATES

OPEN = "<think>\n"
Q = {"role": "user", "content": "你好, who?"}
PLAIN = {"role": "assistant", "content": "I am a tea.\n"}
REASONED = {**PLAIN, "reasoning_content": "Of the lake.\nGreen."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def with_template(qwen_tokenizer):
    def named(name):
        qwen_tokenizer.chat_template = TEMPLATES[name]
        return qwen_tokenizer

    return named


def trained_prompt(tokenizer, *messages):
    """The prompt of the last turn as it is trained."""
    (examples,) = Encoder(tokenizer, max_length=512).encode([parse_row({"messages": list(messages)}, "a:1")])
    return examples[-1].input_ids[: examples[-1].prompt_end], examples[-1]


@pytest.mark.parametrize(
    ("name", "openings", "by_itself"),
    [
        ("qwen2.5", ("", "", ""), None),
        ("instruct", ("", "", ""), None),
        ("thinking", (OPEN, OPEN, OPEN), None),
        ("qwen3", ("", "", EMPTY), True),
        ("qwen3.5", (OPEN, OPEN, EMPTY), True),
        ("qwen3.5 small", (EMPTY, OPEN, EMPTY), False),
        ("qwen3.8", (OPEN, OPEN, EMPTY), True),
    ],
)
def test_a_template_itself_says_how_it_asks(with_template, name, openings, by_itself):
    asking = Asking.of(with_template(name))
    assert (asking.default, asking.on, asking.off) == openings
    assert asking.by_itself is by_itself and asking.switch == (by_itself is not None)


@pytest.mark.parametrize("answer", [PLAIN, REASONED], ids=["plain", "reasoned"])
@pytest.mark.parametrize("name", [one for one in TEMPLATES if one != "thinking"])
@pytest.mark.parametrize("before", [[], [SYSTEM], [Q, PLAIN]], ids=["question", "system", "two turns"])
def test_what_each_served_form_sends_is_the_trained_prompt_token_by_token(with_template, name, answer, before):
    tokenizer = with_template(name)
    prompt, example = trained_prompt(tokenizer, *before, Q, answer)
    form = trained_form(tokenizer, int(example.thought), int(not example.thought))
    assert form.askable and example.thought == ("reasoning_content" in answer and name not in ("qwen2.5", "instruct"))
    text = modelfile(tokenizer, {}, (), form)
    assert asked(tokenizer, [*before, Q], form.enable_thinking) == prompt
    ollama = tokenizer(rendered(text, [*before, Q]), add_special_tokens=False)["input_ids"]
    assert ollama == prompt
    found = sent(text, tokenizer, form, prompt)
    assert len(found) == 2 and not any(difference(prompt, ids, how, tokenizer) for how, ids in found.items())


@pytest.mark.parametrize(
    ("name", "counts", "kwargs", "opening"),
    [
        ("qwen3", (0, 9), {"enable_thinking": False}, EMPTY),
        ("qwen3", (9, 0), {}, ""),
        ("qwen3.5", (0, 9), {"enable_thinking": False}, EMPTY),
        ("qwen3.5", (9, 0), {}, OPEN),
        ("qwen3.5 small", (0, 9), {}, EMPTY),
        ("qwen3.5 small", (9, 0), {"enable_thinking": True}, OPEN),
        ("qwen3", (3, 9), {"enable_thinking": False}, EMPTY),
        ("qwen3", (9, 3), {}, ""),
        ("qwen3", (3, 3), {}, ""),
        ("qwen3.5 small", (3, 3), {}, EMPTY),
        ("instruct", (0, 9), {}, ""),
        ("qwen2.5", (3, 9), {}, ""),
        ("thinking", (9, 0), {}, OPEN),
    ],
)
def test_a_run_is_served_in_the_form_of_most_of_its_rows(with_template, tmp_path, name, counts, kwargs, opening):
    form = trained_form(with_template(name), *counts)
    assert (form.kwargs, form.opening, form.askable) == (kwargs, opening, True)
    assert form.mixed == (min(counts) > 0)
    assert bool(form.told()) == bool(kwargs or form.mixed)
    form.write(tmp_path)
    assert read_form(tmp_path) == form and read_form(tmp_path / "none") is None


def test_rows_without_reasoning_for_a_template_that_always_thinks_are_told_of_and_asked_by_ollama_alone(with_template):
    tokenizer = with_template("thinking")
    prompt, example = trained_prompt(tokenizer, Q, PLAIN)
    form = trained_form(tokenizer, 0, 1)
    assert not example.thought and not form.askable and form.opening == EMPTY
    assert "only Ollama's Modelfile will ask so; give the rows reasoning" in form.told()
    found = sent(modelfile(tokenizer, {}, (), form), tokenizer, form, prompt)
    assert found["Ollama's Modelfile"] == prompt
    assert "the ids part at token" in difference(prompt, found["the chat template"], "the chat template", tokenizer)


def test_a_row_is_rendered_by_the_switch_that_will_ask_for_it(with_template):
    tokenizer = with_template("qwen3.8")
    plain, reasoned = (tokenizer.decode(trained_prompt(tokenizer, Q, one)[0]) for one in (PLAIN, REASONED))
    assert "Think hard." not in plain and plain.endswith(EMPTY)
    assert reasoned.startswith("<|im_start|>system\nThink hard.") and reasoned.endswith(OPEN)


def test_of_a_mix_each_prompt_is_compared_in_its_own_form(with_template):
    tokenizer = with_template("qwen3")
    form = trained_form(tokenizer, 1, 3)
    text = modelfile(tokenizer, {}, (), form)
    assert "# Trained on conversations 1 of 4 with reasoning (25%): each is asked" in text
    plain, reasoned = (trained_prompt(tokenizer, Q, one)[0] for one in (PLAIN, REASONED))
    assert sent(text, tokenizer, form, plain) == {
        "the chat template with enable_thinking false": plain,
        "Ollama's Modelfile": plain,
    }
    assert sent(text, tokenizer, form, reasoned) == {"the chat template with enable_thinking true": reasoned}


def test_a_modelfile_that_lacks_the_block_is_found_out(with_template):
    tokenizer = with_template("qwen3")
    prompt, _ = trained_prompt(tokenizer, Q, PLAIN)
    form = trained_form(tokenizer, 0, 1)
    text = modelfile(tokenizer, {}, (), form).replace(EMPTY, "")
    found = sent(text, tokenizer, form, prompt)
    assert "prepared, from" in difference(prompt, found["Ollama's Modelfile"], "Ollama's Modelfile", tokenizer)


def test_what_is_no_conversation_is_asked_in_no_form(with_template):
    tokenizer = with_template("qwen3")
    ids = tokenizer("A long story, <|im_start|>", add_special_tokens=False)["input_ids"]
    assert sent("", tokenizer, Form(0, 1, False, EMPTY, False, True), ids) == {}
    assert trained_form(tokenizer, 0, 0) is None


def test_thoughts_of_earlier_turns_are_sent_in_the_field_from_which_a_template_shows_them(with_template):
    tokenizer = with_template("qwen3.5")
    every = "<think>\n{{ m['reasoning_content'] }}\n</think>\n\n"
    head, _, tail = tokenizer.chat_template.partition("{% if m['reasoning_content'] %}")
    tokenizer.chat_template = head + every + tail.partition("{% endif %}")[2]
    prompt, _ = trained_prompt(tokenizer, Q, REASONED, Q, REASONED)
    found = sent("", tokenizer, Form(1, 1, False, EMPTY, False, True), prompt)
    assert found == {"the chat template with enable_thinking true": prompt}
    assert tokenizer.decode(prompt).count("Of the lake.") == 1
