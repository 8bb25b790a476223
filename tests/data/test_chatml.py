"""Exactly the right tokens are trained, by hand-written expectations and by TRL's training templates."""

import unicodedata
from importlib.resources import files

import pytest

from qwen_lit.data.chatml import Encoder
from qwen_lit.data.faults import DataError, RowError
from qwen_lit.data.records import parse_row
from qwen_lit.thinking import EMPTY_THINK

TEMPLATES = ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink"]
U, A = {"role": "user", "content": "Where is 龙井 from?"}, {"role": "assistant", "content": "From 杭州。\n\nReally!"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "find", "arguments": {"tea": "龙井"}}}],
}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
RESULT = {"role": "tool", "content": "杭州 is the place"}
THOUGHT = {**A, "reasoning_content": "It is a tea\nof the lake."}
CONVERSATIONS = {
    "one turn": {"messages": [U, A]},
    "system prompt": {"messages": [{"role": "system", "content": "Be brief."}, U, A]},
    "three turns": {"messages": [U, A, U, {**A, "content": "Yes."}, U, A]},
    "reasoning": {"messages": [U, THOUGHT]},
    "reasoning in two turns": {"messages": [U, THOUGHT, U, THOUGHT]},
    "tools": {"messages": [U, CALL, RESULT, A], "tools": TOOLS},
    "reasoning before a tool": {
        "messages": [U, {**CALL, "reasoning_content": "Look it up."}, RESULT, THOUGHT],
        "tools": TOOLS,
    },
    "text before a tool": {"messages": [U, {**CALL, "content": "I will look."}, RESULT, A], "tools": TOOLS},
    "two results": {
        "messages": [U, {**CALL, "tool_calls": CALL["tool_calls"] * 2}, RESULT, RESULT, A],
        "tools": TOOLS,
    },
}


def template(name):
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(params=TEMPLATES)
def encoder(request, qwen_tokenizer):
    qwen_tokenizer.chat_template = template(request.param)
    made = Encoder(qwen_tokenizer, max_length=4096)
    made.name = request.param
    return made


def encode(encoder, row):
    (outcome,) = encoder.encode([parse_row(row, "a:1")])
    for one in outcome:
        if isinstance(one, RowError):
            raise one
    return outcome


def trained(encoder, example):
    return [encoder.tokenizer.decode(example.input_ids[begin:end]) for begin, end in example.spans]


@pytest.mark.parametrize("shape", CONVERSATIONS)
def test_masks_equal_those_of_trl_but_for_what_the_server_inserts(encoder, shape):
    row = CONVERSATIONS[shape]
    tokenizer = encoder.tokenizer
    for example, turns in zip(encode(encoder, row), expected_turns(encoder, row), strict=True):
        mine = [token for token in example.labels if token != -100]
        # TRL's templates render every turn with its thoughts, so each is compared where it is the last.
        theirs = []
        for turn in turns:
            both = tokenizer.apply_chat_template(
                row["messages"][: turn + 1],
                tools=row.get("tools"),
                chat_template=template(encoder.name + "_training"),
                return_assistant_tokens_mask=True,
                return_dict=True,
            )
            masks, ids = both["assistant_masks"], both["input_ids"]
            last = max(i for i in range(len(ids)) if masks[i] and not (i and masks[i - 1]))
            text = tokenizer.decode([i for i, m in zip(ids[last:], masks[last:], strict=True) if m])
            # Theirs also trains the newline before (Qwen2.5) and after a turn, and the empty thought of the template.
            text = text.removeprefix("\n").removesuffix("\n")
            theirs += tokenizer(text.removeprefix(EMPTY_THINK) if encoder.inserts_think else text)["input_ids"]
        assert tokenizer.decode(mine) == tokenizer.decode(theirs)
        assert mine == theirs


def expected_turns(encoder, row):
    turns = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    count = len(encode(encoder, row))
    return [turns] if count == 1 else [[turn] for turn in turns]


@pytest.mark.parametrize("shape", CONVERSATIONS)
def test_labels_read_as_the_assistants_words(encoder, shape):
    row = CONVERSATIONS[shape]
    for example in encode(encoder, row):
        for text in trained(encoder, example):
            assert text.endswith("<|im_end|>") and text.count("<|im_end|>") == 1
            assert "<|im_start|>" not in text and "tool_response" not in text
            assert U["content"] not in text and not text.startswith((EMPTY_THINK, "\n"))


@pytest.mark.parametrize("shape", CONVERSATIONS)
def test_every_assistant_turn_is_trained_exactly_once(encoder, shape):
    row = CONVERSATIONS[shape]
    turns = sum(message["role"] == "assistant" for message in row["messages"])
    assert sum(len(example.spans) for example in encode(encoder, row)) == turns


def part(kind, text, weight):
    return {"type": kind, "text": text, "loss_weight": weight}


@pytest.mark.parametrize(
    ("parts", "left_out", "kept"),
    [
        ([("Well, let me see. ", 0), ("It is 杭州。", 1)], ["Well, let me see."], ["It is 杭州。"]),
        ([("It is 杭州。", 1), ("\n\nAs an aside, hm.  ", 0)], ["As an aside, hm."], ["It is 杭州。"]),
        ([("a", 0), (" b ", 1), ("a", 1)], ["a"], ["b", "a"]),
        ([("One. ", 1), ("e\u0301 Two. ", 0), ("Three.", 1)], ["Two."], ["One.", "Three."]),
    ],
)
def test_parts_of_weight_0_are_not_trained_and_their_turn_still_ends(encoder, parts, left_out, kept):
    content = [part("text", *one) for one in parts]
    (example,) = encode(encoder, {"messages": [U, {"role": "assistant", "content": content}]})
    whole = "".join(text for text, _ in parts).strip()
    assert unicodedata.normalize("NFC", whole) in encoder.tokenizer.decode(example.input_ids)
    texts = trained(encoder, example)
    assert texts[-1].endswith("<|im_end|>") and "".join(texts).count("<|im_end|>") == 1
    said = "".join(texts)
    assert [said.count(text) for text in kept] == [1] * len(kept)
    assert sum(said.count(text) for text in left_out) == (1 if left_out == ["a"] else 0)


def test_a_thought_or_a_call_of_weight_0_is_not_trained(encoder):
    call = {"type": "tool_call", "value": CALL["tool_calls"][0]}
    parts = [part("reasoning", "It is a tea.", 0), part("text", "I will look.", 1), {**call, "loss_weight": 0}, call]
    row = {"messages": [U, {"role": "assistant", "content": parts}], "tools": TOOLS}
    if encoder.name in ("qwen2_5", "qwen3_instruct_2507"):
        parts = row["messages"][1]["content"] = parts[1:]
    (example,) = encode(encoder, row)
    said = "".join(trained(encoder, example))
    assert "It is a tea." not in said and said.count("I will look.") == 1
    assert said.count("<tool_call>") == said.count("</tool_call>") == 1
    assert encoder.tokenizer.decode(example.input_ids).count("<tool_call>\n") >= 2


def test_a_part_that_the_template_changes_is_refused(plain):
    plain.tokenizer.chat_template = plain.tokenizer.chat_template.replace("message.content", "message.content ~ '!'")
    changed = Encoder(plain.tokenizer, max_length=4096)
    parts = [part("text", "a", 0), part("text", "b", 1)]
    with pytest.raises(RowError, match="changes a text part"):
        encode(changed, {"messages": [U, {"role": "assistant", "content": parts}]})


def test_qwen3_trains_each_turn_with_the_history_the_server_shows(qwen_tokenizer):
    qwen_tokenizer.chat_template = template("qwen3")
    encoder = Encoder(qwen_tokenizer, max_length=4096)
    first, second = encode(encoder, CONVERSATIONS["reasoning in two turns"])
    assert "It is a tea" in trained(encoder, first)[0] and "It is a tea" in trained(encoder, second)[0]
    assert qwen_tokenizer.decode(second.input_ids).count("It is a tea") == 1
    prompt = qwen_tokenizer.apply_chat_template([U, A, U], add_generation_prompt=True)["input_ids"]
    assert second.input_ids[: len(prompt)] == prompt


def test_only_the_last_turn_is_trained_when_asked(encoder):
    encoder.train_on = "last"
    (example,) = encode(encoder, CONVERSATIONS["three turns"])
    assert [text.removeprefix("<think>\n\n</think>\n\n") for text in trained(encoder, example)] == [
        A["content"] + "<|im_end|>"
    ]


@pytest.fixture
def plain(qwen_tokenizer):
    qwen_tokenizer.chat_template = template("qwen2_5")
    return Encoder(qwen_tokenizer, max_length=4096)


def test_text_never_becomes_a_control_token(plain):
    row = {"messages": [{"role": "user", "content": "say <|im_end|>\n<|im_start|>system"}, A]}
    with pytest.raises(RowError, match="control_tokens: escape"):
        encode(plain, row)
    plain.control_tokens = "escape"
    (example,) = encode(plain, row)
    assert example.input_ids.count(plain.answers.end) == 3
    assert "escaped" in example.note


def test_a_long_row_loses_its_oldest_turns_first_and_never_its_answer(plain):
    system = {"role": "system", "content": "Be brief."}
    old = [{"role": "user", "content": "old " * 50}, {"role": "assistant", "content": "older " * 50}]
    row = {"messages": [system, *old, *old, U, A]}
    plain.max_length = 100
    (example,) = encode(plain, row)
    text = plain.tokenizer.decode(example.input_ids)
    assert "Be brief." in text and U["content"] in text and "old" not in text
    assert trained(plain, example) == [A["content"] + "<|im_end|>"]
    assert example.note == "oldest turns dropped"


def test_a_long_question_is_cut_in_its_middle_until_it_fits_exactly(plain):
    words = " ".join(f"第{n}句" for n in range(400))
    plain.max_length = 100
    (example,) = encode(plain, {"messages": [{"role": "user", "content": f"FIRST {words} LAST"}, A]})
    text = plain.tokenizer.decode(example.input_ids)
    assert 90 <= len(example.input_ids) <= 100
    assert "FIRST" in text and "LAST" in text and example.note == "longest user text shortened"
    assert trained(plain, example) == [A["content"] + "<|im_end|>"]


def test_a_row_whose_answer_cannot_stay_whole_is_dropped_and_named(plain):
    plain.max_length = 64
    with pytest.raises(RowError, match="cannot hold") as caught:
        encode(plain, {"messages": [U, {"role": "assistant", "content": "long " * 200}]})
    assert caught.value.kind == "overlong"
    plain.overlong = "error"
    with pytest.raises(RowError, match="more than data.max_length") as caught:
        encode(plain, {"messages": [U, {"role": "assistant", "content": "long " * 200}]})
    assert caught.value.kind == "too long"


def test_a_tokenizer_that_changes_the_text_is_refused_with_the_difference(plain):
    from tokenizers import normalizers

    changed = plain.tokenizer.backend_tokenizer
    kept = changed.normalizer
    try:
        changed.normalizer = normalizers.Lowercase()
        with pytest.raises(DataError, match="token ids differ"):
            encode(plain, {"messages": [U, A]})
    finally:
        changed.normalizer = kept


@pytest.mark.parametrize("text", ["🫠" * 100, "𠀋𠀍" * 80, "第九百句，" * 60, "a🫠b " * 90], ids=ascii)
@pytest.mark.parametrize("limit", range(60, 160, 9))
def test_a_long_question_of_any_characters_is_cut_to_fit(plain, text, limit):
    plain.max_length = limit
    (example,) = encode(plain, {"messages": [{"role": "user", "content": text}, A]})
    assert limit - 12 <= len(example.input_ids) <= limit
    assert trained(plain, example) == [A["content"] + "<|im_end|>"]


def test_assistant_text_that_the_template_loses_is_refused_and_lost_reasoning_is_named(encoder):
    twice = "<think>\nT\n</think>\n\nUse </think> to close. KEEP? And </think> again end"
    row = {"messages": [U, {**A, "content": twice}]}
    if encoder.inserts_think or encoder.name.startswith("qwen3_5"):
        with pytest.raises(RowError, match="loses assistant text to the chat template"):
            encode(encoder, row)
    else:
        assert "KEEP?" in trained(encoder, encode(encoder, row)[0])[0]
    (example,) = encode(encoder, {"messages": [U, THOUGHT]})
    kept = "It is a tea" in trained(encoder, example)[0]
    assert (example.note == "reasoning left out by the chat template") == (not kept)
    assert kept == (encoder.name not in ("qwen2_5", "qwen3_instruct_2507"))


@pytest.mark.parametrize(
    ("lost", "row", "words"),
    [
        ("nobody", {"messages": [U, CALL, RESULT, A], "tools": TOOLS}, "shows no tool calls"),
        ("tool", {"messages": [U, A, RESULT, A]}, "shows no results of tools"),
        ("system", {"messages": [{"role": "system", "content": "s"}, U, A]}, "shows no system prompts"),
    ],
)
def test_what_a_template_shows_nothing_of_is_a_fault_where_a_row_has_it(qwen_tokenizer, lost, row, words):
    said = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    kept = f"{{% if message.role != '{lost}' %}}{said}{{% endif %}}"
    qwen_tokenizer.chat_template = f"{{% for message in messages %}}{kept}{{% endfor %}}"
    encoder = Encoder(qwen_tokenizer, max_length=4096)
    (outcome,) = encoder.encode([parse_row(row, "a:1", odd_turns="merge")])
    assert isinstance(outcome[0], RowError) and words in str(outcome[0])
    (example,) = encode(encoder, {"messages": [U, A], "tools": TOOLS})
    assert example.note == "tools left out by the chat template"
    assert encode(encoder, {"messages": [U, A]})[0].note == ""


def test_one_turn_that_is_too_long_does_not_cost_the_others(qwen_tokenizer):
    qwen_tokenizer.chat_template = template("qwen3")
    encoder = Encoder(qwen_tokenizer, max_length=150)
    short, long = ({"role": "assistant", "content": text} for text in ("S.", "long " * 200))
    row = {"messages": [U, {**THOUGHT, **short}, U, long, U, {**THOUGHT, **short}]}
    (outcome,) = encoder.encode([parse_row(row, "a:1")])
    assert [isinstance(one, RowError) for one in outcome] == [False, True, False]
    assert outcome[1].kind == "overlong"


def test_a_template_without_the_header_of_chatml_is_refused_at_once(plain):
    header = "'<|im_start|>' + message.role + '\\n'"
    assert header in plain.tokenizer.chat_template
    plain.tokenizer.chat_template = plain.tokenizer.chat_template.replace(header, header.replace("\\n", " "))
    with pytest.raises(DataError, match="renders an answer without"):
        Encoder(plain.tokenizer, max_length=4096)


def test_newlines_before_an_answer_that_merge_with_the_header_are_told(plain):
    (example,) = encode(plain, {"messages": [U, {"role": "assistant", "content": "\n\nA"}]})
    assert trained(plain, example) == ["A<|im_end|>"]
    assert example.note == "newlines before an answer in one token with its header, not trained"


def test_text_that_the_template_makes_a_thought_is_told(qwen_tokenizer):
    qwen_tokenizer.chat_template = template("qwen3")
    encoder = Encoder(qwen_tokenizer, max_length=4096)
    (example,) = encode(encoder, {"messages": [U, {"role": "assistant", "content": "Use </think> to close."}]})
    assert example.note == "text before </think> made a thought by the chat template"
    (example,) = encode(encoder, {"messages": [U, {"role": "assistant", "content": "<think>\nT\n</think>\n\nA"}]})
    assert example.note == "" and trained(encoder, example) == ["<think>\nT\n</think>\n\nA<|im_end|>"]


def test_merged_turns_and_characters_that_are_not_trained_are_told_apart_by_their_tokens(encoder):
    ranges = [{"begin_offset": begin, "end_offset": end, "train": True} for begin, end in ((0, 5), (9, 12))]
    answer = {"role": "assistant", "content": "Hello bad end", "train_detail": ranges}
    (example,) = encode(encoder, {"messages": [U, answer]})
    assert "".join(trained(encoder, example)).replace(EMPTY_THINK, "") == "Hello end<|im_end|>"
    row = {"messages": [U, {**A, "train": False}, {"role": "assistant", "content": "Yes."}]}
    (outcome,) = encoder.encode([parse_row(row, "a:1", odd_turns="merge")])
    assert "".join(trained(encoder, outcome[0])).replace(EMPTY_THINK, "").strip() == "Yes.<|im_end|>"
    greeted = {"messages": [{"role": "assistant", "content": "Hello!"}, U, A]}
    (outcome,) = encoder.encode([parse_row(greeted, "a:1", odd_turns="merge")])
    assert trained(encoder, outcome[0])[0].endswith(A["content"] + "<|im_end|>") and len(outcome) == 1
    assert "assistant\nHello!<|im_end|>" in encoder.tokenizer.decode(outcome[0].input_ids)
