"""The files around the weights: what stops, what Ollama renders, what the card tells."""

import json
import re
from pathlib import Path

import pytest
import torch
from jinja2 import Environment
from safetensors.torch import load_file, save_file

from qwen_lit.export.serving import Told, default_system, model_card, modelfile, untrained_end, write_serving_files
from tests.export.test_merge import make_base

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "And  again?\n"},
]


def ollama_renders(text: str, messages: list[dict[str, str]]) -> str:
    """What Ollama makes of a Modelfile's template; Go's actions that it uses, put into Jinja."""
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    for go, jinja in (
        (r"{{ range \$i, \$m := \.Messages }}", "{% for m in messages %}{% set i = loop.index0 %}"),
        (r'{{ if and \(eq \$i 0\) \(ne \$m\.Role "system"\) }}', "{% if i == 0 and m.role != 'system' %}"),
        (r"{{ \$m\.Role }}", "{{ m.role }}"),
        (r"{{ \$m\.Content }}", "{{ m.content }}"),
    ):
        template = re.sub(go, jinja, template)
    for end in ("endif", "endfor") if "{% if" in template else ("endfor",):
        template = template.replace("{{ end }}", "{% " + end + " %}", 1)
    assert "{{ end }}" not in template and "$" not in template
    return Environment(keep_trailing_newline=True).from_string(template).render(messages=messages)


@pytest.mark.parametrize("chat", [CHAT, CHAT[1:], CHAT[:2]], ids=["system", "no system", "one question"])
def test_ollama_renders_what_the_tokenizer_renders(tokenizer, chat):
    text = modelfile(tokenizer, {"temperature": 0.7, "top_p": 0.8})
    wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ollama_renders(text, chat) == wanted
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER temperature 0.7" in text


def test_a_template_without_a_default_system_prompt_gets_none(qwen_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    qwen_tokenizer.chat_template = template
    assert default_system(qwen_tokenizer) == ""
    wanted = qwen_tokenizer.apply_chat_template(CHAT[1:], tokenize=False, add_generation_prompt=True)
    assert ollama_renders(modelfile(qwen_tokenizer, {}), CHAT[1:]) == wanted


def test_the_end_tokens_of_a_chat_are_the_model_s_end_tokens(tokenizer, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "generation_config.json").write_text('{"top_p": 0.8, "do_sample": true, "eos_token_id": 7}')
    out = tmp_path / "out"
    out.mkdir()
    config = {"seed": 1, "path": Path("x"), "text": "你好"}
    write_serving_files(out, base, tokenizer, Told(config=config))
    generation = json.loads((out / "generation_config.json").read_text())
    vocab = tokenizer.get_vocab()
    assert generation["eos_token_id"] == [vocab["<|im_end|>"], vocab["<|endoftext|>"]]
    assert generation["pad_token_id"] == vocab["<|endoftext|>"] and generation["top_p"] == 0.8
    assert json.loads((out / "training_config.json").read_text("utf-8")) == {**config, "path": "x"}
    assert (out / "chat_template.jinja").read_text() == tokenizer.chat_template


def test_a_base_that_never_learned_to_stop_is_named(tokenizer, tmp_path):
    base = make_base(tmp_path / "base", "qwen2")
    path = next(p for p in base.glob("*.safetensors") if "lm_head.weight" in load_file(p))
    tensors = load_file(path)
    torch.manual_seed(0)
    head = torch.randn(len(tokenizer) + 40, 64)
    head[len(tokenizer) :] *= 0.1
    for factor, named in ((1.0, False), (0.05, True)):
        changed = head.clone()
        changed[tokenizer.get_vocab()["<|im_end|>"]] *= factor
        save_file({**tensors, "lm_head.weight": changed.bfloat16()}, path, metadata={"format": "pt"})
        assert bool(untrained_end(base, tokenizer)) == named


def test_the_card_tells_data_losses_verdict_and_how_to_serve():
    model = {"model_name_or_path": "Qwen/Qwen2.5-7B-Instruct", "lora_config": {"r": 48, "lora_alpha": 64}}
    merges = {"original": {"loss": 1.5, "kl": 0.02, "same_top": 0.95}}
    told = Told(
        config={"model": model},
        data={"share supervised": "81.0%", "fingerprint": "10 rows, abc"}, losses={"train, last step": 1.25},
        verdict={"rows": 3, "tokens": 99, "adapter_loss": 1.4, "merges": merges, "kind": "held-out"}, stopped=(3, 3),
    )  # fmt: skip
    card = model_card(told)
    for words in ("base_model: Qwen/Qwen2.5-7B-Instruct", "81.0%", "10 rows, abc", "1.2500", "95.00%", "3 of 3",
                  "vllm serve .", "--max-lora-rank 64", "sglang", "ollama create"):  # fmt: skip
        assert words in card, words
