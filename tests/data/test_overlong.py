"""What is cut from conversations that are too long is what trying each start in turn would cut, at far less cost."""

import random

import pytest

from qwen_lit.data.chatml import Encoder
from qwen_lit.data.faults import RowError
from qwen_lit.data.overlong import CUT, OLDEST, SHORTENED
from qwen_lit.data.records import parse_row
from qwen_lit.data.render import Renderer
from tests.data.test_chatml import template

WORDS = ["the", "river", "龙井", "tea", "house\n", "walks", "杭州", "quickly", "said", "🙂"]


def conversation(draw, exchanges, most_words):
    def said():
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most_words)))

    messages = [{"role": "system", "content": said()}] * draw.randint(0, 1)
    for _ in range(exchanges):
        messages += [{"role": "user", "content": said()}, {"role": "assistant", "content": said()}]
        if draw.random() < 0.2:
            messages[-1]["reasoning_content"] = said()
        if draw.random() < 0.2:
            messages[-1]["weight"] = 0
    messages[-1].pop("weight", None)
    return parse_row({"messages": messages}, "a:1")


def plainly(encoder, draft):
    """The ids of one draft by trying each start in turn; None where its last exchange alone is too long."""
    messages = draft.messages
    head = messages[:1] if messages[0]["role"] == "system" else []
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    for start in [0, *starts[1:]]:
        kept = messages if not start else head + messages[start:]
        if any(turn >= start for turn in draft.turns):
            ids = encoder.tokenizer.apply_chat_template(kept, tools=draft.tools)["input_ids"]
            if len(ids) <= encoder.max_length:
                return ids
    return None


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_the_first_start_that_fits_is_taken(name, qwen_tokenizer):
    qwen_tokenizer.chat_template = template(name)
    draw, seen = random.Random(0), {"whole": 0, "cut": 0, "text cut": 0}
    for _ in range(60):
        encoder = Encoder(qwen_tokenizer, max_length=draw.choice([60, 100, 300]))
        row = conversation(draw, draw.randint(1, 14), draw.choice([3, 12, 40]))
        (drafts,) = encoder.drafts([row])
        (outcome,) = encoder.encode([row])
        assert len(outcome) == len(drafts)
        for draft, example in zip(drafts, outcome, strict=True):
            wanted = plainly(encoder, draft)
            if wanted is None:
                assert isinstance(example, RowError) or SHORTENED in example.note
                seen["text cut"] += 1
            else:
                whole = len(qwen_tokenizer.apply_chat_template(draft.messages)["input_ids"])
                assert example.input_ids == wanted
                assert (OLDEST in example.note) == (whole > len(wanted))
                seen["cut" if OLDEST in example.note else "whole"] += 1
    assert min(seen.values()) > 5


def test_a_conversation_of_200_exchanges_is_cut_without_rendering_each_start(qwen_tokenizer, monkeypatch):
    qwen_tokenizer.chat_template = template("qwen3")
    encoder = Encoder(qwen_tokenizer, max_length=256)
    rendered, plain = [], Renderer.text

    def counted(self, messages, tools=None):
        rendered.append(len(messages))
        return plain(self, messages, tools)

    monkeypatch.setattr(Renderer, "text", counted)
    (outcome,) = encoder.encode([conversation(random.Random(1), 200, 12)])
    assert len(outcome) > 100 and all(len(one.input_ids) <= 256 for one in outcome)
    # Each of the last versions could begin at 200 places; some windows of those few exchanges that fit are tried.
    assert len(rendered) < 10 * len(outcome)
    assert sum(rendered) < 200 * len(outcome)


def test_versions_that_are_too_long_are_dropped_with_their_length(qwen_tokenizer):
    qwen_tokenizer.chat_template = template("qwen3")
    encoder = Encoder(qwen_tokenizer, max_length=256, overlong="drop")
    row = conversation(random.Random(1), 60, 12)
    (drafts,) = encoder.drafts([row])
    (outcome,) = encoder.encode([row])
    for draft, one in zip(drafts, outcome, strict=True):
        ids = qwen_tokenizer.apply_chat_template(draft.messages)["input_ids"]
        if len(ids) <= 256:
            assert one.input_ids == ids
        else:
            assert one.kind == "overlong" and f"has {len(ids)} tokens" in str(one)
    assert 0 < sum(isinstance(one, RowError) for one in outcome) < len(outcome)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_truncate_drops_no_row_and_trains_no_end_of_an_answer_that_is_cut(name, qwen_tokenizer):
    qwen_tokenizer.chat_template = template(name)
    draw, seen = random.Random(2), {"whole": 0, "shortened": 0, "cut": 0}
    for _ in range(60):
        most = draw.choice([48, 100, 300])
        shorten, truncate = (Encoder(qwen_tokenizer, max_length=most, overlong=one) for one in ("shorten", "truncate"))
        row = conversation(draw, draw.randint(1, 5), draw.choice([5, 60, 400]))
        for kept, example in zip(*(one.encode([row])[0] for one in (shorten, truncate)), strict=True):
            if not isinstance(kept, RowError):
                assert example == kept
                seen["shortened" if kept.note else "whole"] += 1
                continue
            ids, (begin, end) = example.input_ids, example.spans[-1]
            if CUT not in example.note.split("; "):
                # It was too long for its system prompt.
                assert SHORTENED in example.note and len(ids) <= most and ids[end - 1] == truncate.answers.end
                continue
            assert most - 4 < len(ids) <= most
            assert end == len(ids) > begin and ids[-1] != truncate.answers.end
            said = qwen_tokenizer.decode(ids[begin:end]).strip()
            answers = [message for message in row.messages if message["role"] == "assistant"]
            texts = [
                (one.get("reasoning_content", "") and f"<think>\n{one['reasoning_content']}\n</think>\n\n")
                + one["content"]
                for one in answers
            ]
            assert "\ufffd" not in said and any(
                said in text or said.endswith(text[: len(said) // 2]) or text.startswith(said) for text in texts
            )
            # The question keeps a half at most, or no more than a token beside what the template adds.
            asked = qwen_tokenizer.decode(ids[:begin]).rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
            least = len(qwen_tokenizer.tokenize(asked)) < 2
            assert begin <= most - most // 2 or SHORTENED not in example.note or least
            seen["cut"] += 1
    assert min(seen.values()) > 5


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["👩‍🚀", "𠮷𠮷", "é", "👍🏽 " * 40])
def test_truncate_ends_where_characters_of_several_tokens_cannot_be_shortened(text, qwen_tokenizer):
    qwen_tokenizer.chat_template = template("qwen2_5")
    encoder = Encoder(qwen_tokenizer, max_length=36, overlong="truncate")
    (outcome,) = encoder.encode([parse_row({"instruction": text, "output": "b " * 50}, "a:1")])
    assert CUT in outcome[0].note and len(outcome[0].input_ids) <= 36


def test_what_not_even_a_prompt_leaves_room_for_is_dropped_by_truncate_too(qwen_tokenizer):
    qwen_tokenizer.chat_template = template("qwen2_5")
    encoder = Encoder(qwen_tokenizer, max_length=8, overlong="truncate")
    (outcome,) = encoder.encode([parse_row({"instruction": "a", "output": "b " * 50}, "a:1")])
    assert outcome[0].kind == "overlong" and "cannot hold it" in str(outcome[0])
