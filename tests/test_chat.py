"""Talking to what a run has left, and answering files with it."""

import json
import os
import signal
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qwen_lit.chat import Chat, chosen, converse, load
from qwen_lit.cli import main
from qwen_lit.hardware import product_dtype
from qwen_lit.predict import done_lines


@pytest.fixture(scope="module")
def run(model_folder, dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    arguments = [
        "fit", "--config", "configs/qwen7b.yaml", "--output_dir", str(out), "--data.val_size", "3",
        "--model.model_name_or_path", str(model_folder), "--data.dataset_path", str(dataset),
        "--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false",
        "--trainer.val_check_interval", "8", "--model.lora_config.r", "4",
    ]  # fmt: skip
    assert main(arguments) == 0
    return out, arguments


def likeliest(folder: Path, messages: list[dict], tokens: int) -> str:
    """The greedy answer by plain transformers and PEFT; the base of an adapter is held as it was trained."""
    config = json.loads((folder / "adapter_config.json").read_text()) if folder.name == "lora_adapter" else {}
    base = config.get("base_model_name_or_path", folder)
    dtype = product_dtype(torch.device("cpu"))
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=four_bits if config else None
    )
    model = PeftModel.from_pretrained(model, folder) if config else model
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = model.eval().generate(**asked, do_sample=False, max_new_tokens=tokens)
    answer = tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer
    return answer


@pytest.mark.parametrize("name", ["lora_adapter", "final_model", "."])
def test_one_answer_from_an_adapter_a_merged_model_and_an_output_folder(run, name, capsys):
    assert main(["chat", str(run[0] / name), "--prompt", "Hi", "--greedy", "--max_new_tokens", "4"]) == 0
    folder = run[0] / ("final_model" if name == "." else name)
    assert capsys.readouterr().out == likeliest(folder, [{"role": "user", "content": "Hi"}], 4) + "\n"


def test_a_conversation_has_turns_a_system_prompt_and_is_saved_as_a_row(run, tmp_path):
    chat = Chat(*load(str(run[0]), False), max_new_tokens=3, sample=False)
    assert "under this system prompt" in chat.command("/system Be brief.")
    first = "".join(chat.ask("你好"))
    list(chat.ask("again"))
    assert [one["role"] for one in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[2]["content"] == first
    path = tmp_path / "kept.jsonl"
    chat.command(f"/save {path}")
    assert json.loads(path.read_text())["messages"] == chat.messages
    chat.command("/reset")
    assert [one["role"] for one in chat.messages] == ["system"]
    assert chat.command("/think") == "this model's chat template knows no thinking"
    chat.can_think = True
    assert chat.command("/think") == "thinking is on" and chat.command("/think") == "thinking is off"
    assert chat.command("/quit") is None and "/save" in chat.command("/unknown")


class Terminal:
    """Answers ``input`` by a script; a number sends Ctrl-C so many seconds later, an error is raised."""

    def __init__(self, *script) -> None:
        self.script = list(script)

    def __call__(self, prompt: str = "") -> str:
        line = self.script.pop(0)
        if isinstance(line, tuple):
            line, seconds = line
            Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
        if isinstance(line, type):
            raise line
        return line


def test_ctrl_c_stops_the_answer_and_gives_the_prompt_back_and_twice_ends(run, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept.jsonl"
    script = Terminal(("Hi", 2.0), f"/save {kept}", KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt)
    monkeypatch.setattr("builtins.input", script)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    adapter = str(run[0] / "lora_adapter")
    assert main(["chat", adapter, "--greedy", "--max_new_tokens", "20000"]) == 130
    said = capsys.readouterr().out
    assert said.count("(stopped; Ctrl-C again ends)") == 3 and not script.script
    assert "with its adapter, 4 bits, on cpu, thinking: none" in said.splitlines()[0]
    (row,) = kept.read_text("utf-8").splitlines()
    assert [one["role"] for one in json.loads(row)["messages"]] == ["user", "assistant"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_conversation_that_does_not_fit_is_said_in_a_sentence_and_goes_on(run, monkeypatch, capsys):
    chat = Chat(*load(str(run[0]), False), max_new_tokens=3, sample=False)

    def full(**settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    plain, chat.model.generate = chat.model.generate, full
    monkeypatch.setattr("builtins.input", Terminal("Hi", "/quit"))
    assert converse(chat) == 0 and not chat.messages
    assert "/reset starts over with a short conversation" in capsys.readouterr().out
    chat.model.generate = plain
    assert "".join(chat.ask("Hi")) and len(chat.messages) == 2


def test_the_adapter_is_taken_where_the_merged_model_does_not_fit(run, monkeypatch):
    cpu, memory = torch.device("cpu"), SimpleNamespace(available=10**12)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert chosen(run[0], cpu).name == "final_model"
    memory.available = 1000
    assert chosen(run[0], cpu).name == "lora_adapter"
    assert chosen(run[0] / "final_model", cpu).name == "final_model"


def test_what_is_neither_adapter_nor_model_is_refused(tmp_path, capsys):
    assert main(["chat", str(tmp_path), "--prompt", "Hi"]) == 2
    assert "neither an adapter nor a model" in capsys.readouterr().err


def test_predictions_stand_beside_their_rows_and_go_on_after_a_torn_line(run, tmp_path):
    rows = [{"instruction": "What is 1 plus 2?"}, {"messages": [{"role": "user", "content": "Hi"}], "id": 7}]
    rows += [{"instruction": f"Say {n}", "output": "not shown"} for n in range(3)]
    source, target = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["predict", *run[1][1:], "--source", str(source), "--target", str(target), "--batch_size", "2",
               "--max_new_tokens", "4"]  # fmt: skip
    assert main(command) == 0
    whole = target.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [{**row, "prediction": line["prediction"]} for row, line in zip(rows, lines, strict=True)] == lines
    for row, line in zip(rows, lines, strict=True):
        question = row.get("messages") or [{"role": "user", "content": row["instruction"]}]
        assert line["prediction"] == likeliest(run[0] / "lora_adapter", question, 4)
    target.write_bytes(whole[: whole.index(b"\n") + 9])
    assert done_lines(target) == 1 and main(command) == 0
    assert [json.loads(line)["id"] for line in target.read_bytes().splitlines() if b'"id"' in line] == [7]
    assert len(target.read_bytes().splitlines()) == len(rows)


def test_samples_are_answered_before_and_at_each_validation(run):
    lines = [json.loads(line) for line in (run[0] / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 1, 1, 2, 2]
    assert lines[0]["prompt"].endswith("<|im_start|>assistant\n") and lines[0]["wanted"].startswith("It is ")
