"""The files around the weights: what stops, what Ollama renders, what the card tells."""

import json
import re
from pathlib import Path

import pytest
import torch
from jinja2 import Environment
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from qwen_lit.export.card import ModelCardFacts
from qwen_lit.export.modelfile import default_system, modelfile, rendered
from qwen_lit.export.serving import STOP_TOKENS, untrained_end, write_serving_files
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
    text = modelfile(tokenizer, {"temperature": 0.7, "top_p": 0.8}, STOP_TOKENS)
    wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ollama_renders(text, chat) == rendered(text, chat) == wanted
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER temperature 0.7" in text


def test_a_template_without_a_default_system_prompt_gets_none(qwen_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    qwen_tokenizer.chat_template = template
    assert default_system(qwen_tokenizer) == ""
    wanted = qwen_tokenizer.apply_chat_template(CHAT[1:], tokenize=False, add_generation_prompt=True)
    assert ollama_renders(modelfile(qwen_tokenizer, {}, STOP_TOKENS), CHAT[1:]) == wanted


@pytest.fixture
def base(tokenizer, tmp_path):
    folder = tmp_path / "base"
    tokenizer.save_pretrained(folder)
    return folder


def served(base, out, tokenizer, generation, told=None):
    """What ``write_serving_files`` makes of a base with this generation config."""
    (base / "generation_config.json").write_text(json.dumps(generation))
    out.mkdir(exist_ok=True)
    write_serving_files(out, base, tokenizer, told or ModelCardFacts())
    return json.loads((out / "generation_config.json").read_text())


def test_the_end_tokens_of_a_chat_are_the_model_s_end_tokens(tokenizer, base, tmp_path):
    config = {"seed": 1, "path": Path("x"), "text": "你好"}
    given = {"top_p": 0.8, "do_sample": True, "eos_token_id": 7}
    generation = served(base, tmp_path / "out", tokenizer, given, ModelCardFacts(config=config))
    vocab = tokenizer.get_vocab()
    ends = [vocab["<|im_end|>"], vocab["<|endoftext|>"]]
    assert generation == {"top_p": 0.8, "do_sample": True, "eos_token_id": ends, "pad_token_id": ends[1]}
    assert json.loads((tmp_path / "out" / "training_config.json").read_text("utf-8")) == {**config, "path": "x"}


SAMPLED = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (SAMPLED, SAMPLED | {"do_sample": True}),
        (SAMPLED | {"do_sample": True}, SAMPLED | {"do_sample": True}),
        (SAMPLED | {"do_sample": False, "repetition_penalty": 1.1}, {"do_sample": False, "repetition_penalty": 1.1}),
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
)
def test_a_model_with_these_sampling_settings_loads_and_saves_again(tokenizer, base, tmp_path, given, kept):
    generation = served(base, tmp_path / "out", tokenizer, given)
    assert {name: value for name, value in generation.items() if "token_id" not in name} == kept
    GenerationConfig.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    written = (tmp_path / "out" / "Modelfile").read_text()
    assert ("PARAMETER temperature 0.7" in written) == ("temperature" in kept)


def test_tokenizer_files_are_those_of_the_base_byte_for_byte(tokenizer, base, tmp_path):
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = tokenizer.chat_template
    (base / "tokenizer_config.json").write_text(json.dumps(config, indent=7))
    (base / "chat_template.jinja").unlink()
    (base / "merges.txt").write_bytes("a b\r\n好".encode())
    (base / "special_tokens_map.json").write_text('{"eos_token":   "<|im_end|>"}')
    (base / "pytorch_model.bin").write_text("not copied")
    served(base, tmp_path / "out", tokenizer, {})
    files = {"tokenizer.json", "tokenizer_config.json", "merges.txt", "special_tokens_map.json"}
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == tokenizer.chat_template
    more = {"chat_template.jinja", "generation_config.json", "training_config.json", "Modelfile", "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | more
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_a_template_that_stands_in_one_place_stands_in_both(tokenizer, base, tmp_path):
    before = json.loads((base / "tokenizer_config.json").read_text())
    assert "chat_template" not in before and (base / "chat_template.jinja").is_file()
    served(base, tmp_path / "out", tokenizer, {})
    after = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert after == before | {"chat_template": tokenizer.chat_template}
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()


def test_every_template_of_a_base_with_several_is_found_by_old_and_new_readers(tokenizer, base, tmp_path):
    config = json.loads((base / "tokenizer_config.json").read_text())
    templates = {"default": tokenizer.chat_template, "tool_use": "tools: " + tokenizer.chat_template}
    config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "chat_template.jinja").unlink()
    several = AutoTokenizer.from_pretrained(base)
    served(base, tmp_path / "out", several, {})
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == several.chat_template == templates


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
