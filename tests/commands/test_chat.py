"""Talking to what a run has left, and answering files with it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qwen_lit.cli import main
from qwen_lit.commands.chat import converse
from qwen_lit.commands.chat_model import choose
from qwen_lit.commands.chat_model import load as load_choice
from qwen_lit.commands.conversation import Chat
from qwen_lit.commands.predict import done_lines
from qwen_lit.errors import UserError
from qwen_lit.hardware import product_dtype

CPU = torch.device("cpu")


def load(path, quantize=None):
    """The model and the tokenizer of a folder."""
    return load_choice(choose(str(path), quantize, CPU)[0], CPU)


@pytest.fixture(scope="module")
def run(model_folder, dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    arguments = [
        "fit",
        "--config",
        "configs/qwen7b.yaml",
        "--output_dir",
        str(out),
        "--data.val_size",
        "3",
        "--model.model_name_or_path",
        str(model_folder),
        "--data.dataset_path",
        str(dataset),
        "--trainer.accelerator",
        "cpu",
        "--trainer.max_steps",
        "2",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.val_check_interval",
        "1",
        "--model.lora_config.r",
        "4",
        "--samples.max_new_tokens",
        "4",
    ]
    assert main(arguments) == 0
    return out, arguments


def likeliest(folder: Path, messages: list[dict], tokens: int) -> str:
    """The greedy answer by plain transformers and PEFT; the base of an adapter is held as it was trained."""
    config = json.loads((folder / "adapter_config.json").read_text()) if folder.name == "lora_adapter" else {}
    base = config.get("base_model_name_or_path", folder)
    dtype = product_dtype(torch.device("cpu"))
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=four_bits if config else None)
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
    assert "cannot write to" in chat.command(f"/save {tmp_path}/no/file")
    chat.command("/reset")
    assert [one["role"] for one in chat.messages] == ["system"]
    assert chat.command("/think") == "this model's chat template has no thinking mode"
    assert chat.command("/quit") is None and "/save" in chat.command("/help")
    assert "there is no command /unknown; /help" in chat.command("/unknown")
    assert chat.command("/save") == "give a file: /save FILE.jsonl"


def test_thinking_begins_as_the_template_says_and_is_switched(run, tmp_path):
    model, tokenizer = load(run[0])
    tokenizer = type(tokenizer).from_pretrained(run[0] / "final_model")
    plain = tokenizer.chat_template
    for default in ("true", "false"):
        tokenizer.chat_template = plain + (
            "{% if enable_thinking is defined and not enable_thinking or not (enable_thinking is defined or "
            + default
            + ") %}<think></think>{% endif %}"
        )
        chat = Chat(model, tokenizer, max_new_tokens=1)
        assert chat.can_think and chat.think == (default == "true")
        said = [chat.command("/think"), chat.command("/think")]
        assert said == ["thinking is off", "thinking is on"][:: 1 if default == "true" else -1]


class Lines:
    """Answers ``input`` by a script; an error in it is raised."""

    def __init__(self, *script) -> None:
        self.script = list(script)

    def __call__(self, prompt: str = "") -> str:
        line = self.script.pop(0)
        if isinstance(line, type):
            raise line
        return line


def test_ctrl_c_stops_the_answer_and_gives_the_prompt_back_and_twice_ends(run, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept.jsonl"
    ask = Chat.ask

    def disturbed(self, question):
        sent = False
        for piece in ask(self, question):
            yield piece
            if piece and not sent:
                sent = True
                Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr(Chat, "ask", disturbed)
    script = Lines("Hi", f"/save {kept}", KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt)
    monkeypatch.setattr("builtins.input", script)
    adapter = str(run[0] / "lora_adapter")
    assert main(["chat", adapter, "--greedy", "--max_new_tokens", "20000"]) == 130
    said = capsys.readouterr()
    assert said.out.count("(Ctrl-C again leaves)") == 3 and not script.script
    name = Path(json.loads(Path(adapter, "adapter_config.json").read_text())["base_model_name_or_path"]).name
    assert f"{name} with the adapter {adapter}, 4 bits (nf4), on cpu, thinking: none" in said.err
    (row,) = kept.read_text("utf-8").splitlines()
    assert [one["role"] for one in json.loads(row)["messages"]] == ["user", "assistant"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), MemoryError(), ValueError("odd\nnews")])
def test_an_answer_that_fails_is_one_line_and_the_conversation_goes_on(run, monkeypatch, capsys, error):
    chat = Chat(*load(run[0], False), max_new_tokens=3, sample=False)

    def fail(**settings):
        raise error

    plain, chat.model.generate = chat.model.generate, fail
    monkeypatch.setattr("builtins.input", Lines("Hi", "/quit"))
    assert converse(chat) == 1 and not chat.messages
    (line,) = capsys.readouterr().err.splitlines()
    assert ("ValueError: odd news" if isinstance(error, ValueError) else "/reset starts over with a short") in line
    chat.model.generate = plain
    assert "".join(chat.ask("Hi")) and len(chat.messages) == 2


def test_an_answer_that_is_cut_says_so(run, capsys):
    command = ["chat", str(run[0]), "--prompt", "Hi", "--greedy", "--max_new_tokens"]
    assert main([*command, "4"]) == 0
    assert "(cut at 4 tokens; --max_new_tokens takes more)" in capsys.readouterr().err


def test_the_adapter_is_taken_where_the_merged_model_does_not_fit(run, tmp_path, monkeypatch):
    memory = SimpleNamespace(available=10**12)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)

    def taken(path, quantize=None):
        choice, passed = choose(str(path), quantize, CPU)
        return choice.folder.name, choice.held, passed

    assert taken(run[0]) == ("final_model", "", "")
    assert taken(run[0], True) == ("lora_adapter", "4 bits (nf4)", "")
    whole = choose(str(run[0]), None, CPU)[0].bytes_needed(CPU)
    assert whole == sum(p.numel() for p in load(run[0])[0].parameters()) * product_dtype(CPU).itemsize
    memory.available = whole
    name, held, passed = taken(run[0])
    assert (name, held) == ("lora_adapter", "4 bits (nf4)") and "final_model needs 0.0 GiB, cpu has" in passed
    assert taken(run[0] / "final_model")[:2] == ("final_model", "4 bits (nf4)")
    with pytest.raises(UserError, match="final_model needs .* lora_adapter .*needs .* Free memory"):
        memory.available = 1000
        choose(str(run[0]), None, CPU)
    with pytest.raises(UserError, match="lora_adapter needs"):
        choose(str(run[0] / "lora_adapter"), False, CPU)


def test_an_adapter_of_a_bf16_base_is_held_in_4_bits_where_only_that_fits(run, tmp_path, monkeypatch):
    adapter = shutil.copytree(run[0] / "lora_adapter", tmp_path / "lora_adapter")
    config = json.loads((adapter / "training_config.json").read_text())
    config["model"]["quantization_config"] = None
    (adapter / "training_config.json").write_text(json.dumps(config))
    memory = SimpleNamespace(available=10**12)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    choice, _ = choose(str(adapter), None, CPU)
    assert choice.held == ""
    memory.available = choice.bytes_needed(CPU)
    assert choose(str(adapter), None, CPU)[0].held == "4 bits (nf4)"


def test_memory_that_runs_out_while_loading_is_a_sentence(run, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qwen_lit.model.load.AutoModelForCausalLM.from_pretrained", full)
    assert main(["chat", str(run[0]), "--prompt", "Hi"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: chat: cpu ran out of memory while") and "--load_in_4bit" in last


@pytest.mark.parametrize("broken", ["no base", "adapter cut", "model cut", "another base", "no JSON"])
def test_a_broken_folder_is_one_line(run, tmp_path, capsys, broken, monkeypatch):
    monkeypatch.setattr("qwen_lit.model.load.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail())
    out = shutil.copytree(run[0], tmp_path / "out")
    adapter, name = out / "lora_adapter", "lora_adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    if broken == "no base":
        config["base_model_name_or_path"] = "/no/where/模型"
        words = f"the base of {adapter} is not at /no/where/模型"
    elif broken == "another base":
        base = shutil.copytree(config["base_model_name_or_path"], tmp_path / "base")
        other = AutoConfig.from_pretrained(base, num_key_value_heads=4)
        AutoModelForCausalLM.from_config(other).save_pretrained(base)
        config["base_model_name_or_path"] = str(base)
        key = "model.layers.0.self_attn.k_proj.weight"
        words = f"is not an adapter of {base} ({key}: the adapter's shapes do not fit"
    (adapter / "adapter_config.json").write_text(json.dumps(config) if broken != "no JSON" else "{")
    if broken == "no JSON":
        words = "cannot be read as JSON"
    elif broken.endswith("cut"):
        name, file, words = {
            "adapter cut": ("lora_adapter", "lora_adapter/adapter_model", "export the adapter again"),
            "model cut": (".", "final_model/model", "is damaged"),
        }[broken]
        path = out / f"{file}.safetensors"
        path.write_bytes(path.read_bytes()[:2000])
    assert main(["chat", str(out / name), "--prompt", "Hi"]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if not one.startswith("loading")]
    assert line.startswith("error: chat: ") and words in line


def test_wrong_options_are_one_line_and_load_nothing(tmp_path, capsys):
    assert main(["chat", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["chat", str(tmp_path), "--max_new_tokens", "0"]) == 2
    assert capsys.readouterr().err == "error: --max_new_tokens is 0; it must be at least 1.\n"
    code = (
        "import sys, qwen_lit.commands.chat as c\ntry: c.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: qwen-lit chat PATH"), done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_what_is_neither_adapter_nor_model_is_refused(tmp_path, capsys):
    assert main(["chat", str(tmp_path), "--prompt", "Hi"]) == 2
    assert "neither an adapter nor a model" in capsys.readouterr().err


def test_predictions_stand_beside_their_rows_and_go_on_after_a_torn_line(run, tmp_path):
    rows = [{"instruction": "What is 1 plus 2?"}, {"messages": [{"role": "user", "content": "Hi"}], "id": 7}]
    rows += [{"instruction": f"Say {n}", "output": "not shown"} for n in range(3)]
    source, target = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "predict",
        *run[1][1:],
        "--source",
        str(source),
        "--target",
        str(target),
        "--batch_size",
        "2",
        "--max_new_tokens",
        "4",
    ]
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
