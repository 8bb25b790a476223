"""Rows without reasoning, on a template that thinks by itself, are asked without thinking wherever they are asked."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from qwen_lit.callbacks.checkpoint_io import last_checkpoint
from qwen_lit.cli import main
from qwen_lit.commands import chat, predict
from qwen_lit.commands.predict import form_at
from qwen_lit.export.modelfile import rendered
from qwen_lit.thinking import EMPTY_THINK, read_form
from tests.templates import TEMPLATES


@pytest.fixture(scope="module")
def run(model_folder, dataset, tmp_path_factory):
    """One step on the tiny model with Qwen3's way of asking, and what was logged."""
    folder = tmp_path_factory.mktemp("run")
    model, out = folder / "model", folder / "out"
    shutil.copytree(model_folder, model)
    (model / "chat_template.jinja").write_text(TEMPLATES["qwen3"])
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen9ForCausalLM"]}))
    options = {
        "config": "configs/qwen7b.yaml",
        "output_dir": out,
        "model.model_name_or_path": model,
        "model.quantization_config": "null",
        "data.dataset_path": dataset,
        "data.val_size": 3,
        "trainer.max_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "export.verdict_rows": 0,
        "samples.prompts": "[Hi]",
        "samples.max_new_tokens": 2,
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("qwen_lit").addHandler(handler)
    try:
        assert main(["fit", *given]) == 0
    finally:
        logging.getLogger("qwen_lit").removeHandler(handler)
    return SimpleNamespace(given=given, model=model, out=out, logged="\n".join(lines))


def test_the_start_says_how_it_will_be_served_and_samples_are_asked_so(run):
    assert "conversations all without reasoning: trained, and so served, with enable_thinking false" in run.logged
    (line, *_) = map(json.loads, (run.out / "samples.jsonl").read_text().splitlines())
    assert line["prompt"] == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{EMPTY_THINK}"


def test_the_form_stands_beside_adapter_and_model_and_in_their_cards(run):
    for name in ("lora_adapter", "final_model"):
        form = read_form(run.out / name)
        assert form.without_reasoning == 22 and form.kwargs == {"enable_thinking": False}
        card = (run.out / name / "README.md").read_text()
        served = [line for line in card.splitlines() if line.startswith(("vllm serve", "python -m sglang"))]
        assert len(served) == (2 if name == "lora_adapter" else 4)
        assert all("""--default-chat-template-kwargs '{"enable_thinking": false}'""" in line for line in served)
    told = (
        "Asked through the chat template with enable_thinking false and Ollama's Modelfile, which send them as trained"
    )
    assert told in card and "asked as trained, token by token" in run.logged


def test_the_modelfile_writes_the_block_and_says_how_ollama_gets_a_model_that_it_may_not_know(run):
    text = (run.out / "final_model" / "Modelfile").read_text()
    assert rendered(text, [{"role": "user", "content": "a"}]).endswith(f"<|im_start|>assistant\n{EMPTY_THINK}")
    command = f"#   python -m qwen_lit export --config {run.out}/config.yaml --export.gguf q8_0\nFROM .\n"
    assert "may not know Qwen9ForCausalLM" in text and command in text


def test_chat_asks_as_was_trained_unless_it_is_told_otherwise(run):
    for options, thinking in (([], "off, as trained"), (["--think"], "on"), (["--no-think"], "off")):
        for name in ("", "lora_adapter"):
            conversation, described = chat.started(chat.parser().parse_args([str(run.out / name), *options]))
            assert described.endswith(f"thinking: {thinking}") and conversation.think == (thinking == "on")


@pytest.mark.parametrize("source", ["adapter", "checkpoint", "told to think"])
def test_predict_asks_as_was_trained_unless_it_is_told_otherwise(run, dataset, tmp_path, monkeypatch, source):
    prompts = []
    monkeypatch.setattr(predict, "predict", lambda model, tokenizer, rows, *more: prompts.extend(rows) or (0, 0))
    checkpoint = last_checkpoint(run.out / "checkpoints")
    assert form_at(checkpoint) == form_at(run.out / "lora_adapter") == read_form(run.out / "lora_adapter")
    options = {"adapter": [], "checkpoint": ["--ckpt_path", str(checkpoint)], "told to think": ["--think", "true"]}
    asked = ["--source", str(dataset), "--target", str(tmp_path / "answers.jsonl"), *options[source]]
    assert main(["predict", *run.given, *asked]) == 0
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    ends = {tokenizer.decode(ids).endswith(EMPTY_THINK) for _, ids in prompts}
    assert len(prompts) == 25 and ends == {source != "told to think"}


def test_an_export_without_training_keeps_the_form_and_names_the_gguf_file(run, tmp_path):
    given = ["--ckpt_path", str(last_checkpoint(run.out / "checkpoints")), "--output_dir", str(tmp_path / "out")]
    assert main(["export", *run.given, *given, "--export.gguf", "f16"]) == 0
    for name in ("lora_adapter", "final_model"):
        assert read_form(tmp_path / "out" / name) == read_form(run.out / "lora_adapter")
    text = (tmp_path / "out" / "final_model" / "Modelfile").read_text()
    assert "\nFROM ./model-f16.gguf\n" in text and "may not know" not in text
    card = (tmp_path / "out" / "final_model" / "README.md").read_text()
    assert """--jinja --chat-template-kwargs '{"enable_thinking": false}'""" in card
