"""One way to generate: a batch answers as each prompt alone, ends where it should, and says so."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen_lit.export.serving import end_tokens
from qwen_lit.generate import generate


@pytest.fixture(scope="module")
def model(model_folder):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


def greedy(model, prompt, most):
    """By forward passes alone."""
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def prompts_of(tokenizer):
    texts = ["What is tea?", "Tell me, at length, what the oldest tea garden is called.", "a"]
    return [list(tokenizer(text)["input_ids"]) for text in texts]


def test_a_batch_gives_each_prompt_the_likeliest_tokens(model, tokenizer):
    prompts = prompts_of(tokenizer)
    ends = end_tokens(tokenizer)
    for prompt, answer in zip(prompts, generate(model, tokenizer, prompts, 6), strict=True):
        wanted = greedy(model, prompt, 6)
        last = next((number for number, one in enumerate(wanted) if one in ends), None)
        assert answer.ids == (wanted if last is None else wanted[: last + 1])
        assert answer.ended == (last is not None)
        assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)


def test_an_answer_ends_at_an_end_token_which_is_its_last(model, tokenizer, monkeypatch):
    prompts = prompts_of(tokenizer)
    likeliest = [greedy(model, prompt, 5) for prompt in prompts]
    # The third token of the first answer, where no earlier one is the same, ends every answer.
    end = next(one for number, one in enumerate(likeliest[0]) if number >= 2 and one not in likeliest[0][:number])
    monkeypatch.setattr("qwen_lit.generate.end_tokens", lambda tokenizer: [end])
    answers = generate(model, tokenizer, prompts, 5)
    assert answers[0].ended and answers[0].ids == likeliest[0][: likeliest[0].index(end) + 1]
    for answer, wanted in zip(answers[1:], likeliest[1:], strict=True):
        assert answer.ended == (end in wanted)


def test_a_model_that_is_told_nothing_ends_by_its_own_generation_config(model, tokenizer, monkeypatch):
    (prompt, *_) = prompts_of(tokenizer)
    likeliest = greedy(model, prompt, 4)
    other = next(one for one in range(len(tokenizer)) if one not in likeliest)
    monkeypatch.setattr(model.generation_config, "eos_token_id", likeliest[:1])
    # The tokenizer's end is another, at which the model would not stop.
    monkeypatch.setattr("qwen_lit.generate.end_tokens", lambda tokenizer: [other])
    (own,) = generate(model, tokenizer, [prompt], 4, own_ends=True)
    (told,) = generate(model, tokenizer, [prompt], 4)
    assert own.ids == likeliest[:1] and told.ids == likeliest
    monkeypatch.setattr("qwen_lit.generate.end_tokens", lambda tokenizer: likeliest[:1])
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    (endless,) = generate(model, tokenizer, [prompt], 4, own_ends=True)
    assert endless.ids == likeliest[:1] and endless.ended and model.generation_config.eos_token_id is None


def test_sampling_draws_by_the_generation_config(model, tokenizer, monkeypatch):
    (prompt, *_) = prompts_of(tokenizer)
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "temperature", 50.0)
    monkeypatch.setattr(model.generation_config, "top_k", 0)
    drawn = []
    for seed in range(4):
        torch.manual_seed(seed)
        drawn.append(generate(model, tokenizer, [prompt], 8, sample=True)[0].ids)
    assert len({tuple(one) for one in drawn}) > 1
    assert len({tuple(generate(model, tokenizer, [prompt], 8)[0].ids) for _ in range(3)}) == 1
