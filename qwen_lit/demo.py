"""``python -m qwen_lit.demo``: the main job on a tiny Qwen2 that is built on the spot, from rows that ship with it."""

import json
import os
import random
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from qwen_lit.data.batches import collate
from qwen_lit.data.chatml import Encoder, Example
from qwen_lit.data.records import parse_row
from qwen_lit.generate import generate
from qwen_lit.logs import set_up_logging
from qwen_lit.progress import through
from qwen_lit.run import Run
from qwen_lit.shipped import configs

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif -%}"
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
INPUT, OUTPUT = Path("output/demo_input"), Path("output/demo")
ORIGIN = "产自哪里？"
PROMPTS = (1, 40, 90)
"""Numbers of the shipped rows whose questions are asked before and after."""
ASKED = (
    "{}的产地是哪里？",
    "泡{}水要多热？",
    "Tell me where this tea is from.\n{}",
    "Please tell me what kind of tea {} is.",
)
"""Questions of the held-out rows, for the first four rows of a tea: each asks in other words what that one does."""


def shipped_rows() -> list[dict[str, Any]]:
    """The rows written for the demo, in Chinese and English."""
    text = files("qwen_lit").joinpath("demo_rows.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line]


def build_tokenizer(texts: list[str]) -> Any:
    """A small byte-level BPE with Qwen's normaliser, splitting rule, special tokens and ChatML."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=3000, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def held_out_rows() -> list[dict[str, Any]]:
    """What the rows teach, asked in words that they do not use: one question of each tea."""
    rows = shipped_rows()
    names = tea_names(rows)
    per_tea = len(rows) // len(names)
    found = []
    for tea, name in enumerate(names):
        kind = tea % len(ASKED)
        taught = rows[tea * per_tea + kind]
        found.append({**taught, "instruction": ASKED[kind].format(name), "input": ""})
    return found


def tea_names(rows: list[dict[str, Any]]) -> list[str]:
    """The teas of the shipped rows, in order."""
    return [row["instruction"].removesuffix(ORIGIN) for row in rows if row.get("instruction", "").endswith(ORIGIN)]


def build_demo(folder: Path) -> None:
    """Write ``model/``, ``rows.jsonl`` and ``val_rows.jsonl`` once; the marker written last says they are whole.

    Args:
        folder: for all of it.
    """
    marker = folder / "complete"
    if marker.is_file() and (folder / "val_rows.jsonl").is_file():
        return
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)
    rows = shipped_rows()
    texts = [value for row in rows for value in _texts(row)]
    for name, written in (("rows.jsonl", rows), ("val_rows.jsonl", held_out_rows())):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
        (folder / name).write_text(lines, encoding="utf-8")
    tokenizer = build_tokenizer(texts)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            initializer_range=0.06,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    _pretrain(model, tokenizer, rows)
    model.bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    marker.write_text("complete\n")


def _texts(row: dict[str, Any]) -> list[str]:
    turns = [turn["content"] for turn in row.get("messages", [])]
    return [row[key] for key in ("system", "instruction", "input", "output") if row.get(key)] + turns


def _chat(row: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in row:
        return row["messages"]
    question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    return [{"role": "system", "content": row["system"]}, *chat] if row.get("system") else chat


def _pretrain(model: Any, tokenizer: Any, rows: list[dict[str, Any]], steps: int = 200) -> None:
    """Teach ChatML, and the rows with their facts mixed up: what is said of each tea is true of another.

    So the base answers every question fluently and wrongly, and what the adapter teaches can be told apart.
    """
    names = tea_names(rows)
    per_tea = len(rows) // len(names)
    conversations = []
    for number, row in enumerate(rows):
        tea = number // per_tea
        mixed = json.dumps(row, ensure_ascii=False).replace(names[tea], names[(tea + 7) % len(names)])
        conversations.append(parse_row(json.loads(mixed), f"row {number}"))
    encoded = Encoder(tokenizer, max_length=512).encode(conversations)
    examples = [(one.input_ids, one.spans) for outcome in encoded for one in outcome if isinstance(one, Example)]
    examples.sort(key=lambda example: len(example[0]))
    batches = [collate(examples[i : i + 32], tokenizer.pad_token_id) for i in range(0, len(examples), 32)]
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in through(range(steps), "building a tiny Qwen2", "steps"):
        batch = draw.choice(batches)
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state.flatten(0, 1)
        loss = cross_entropy(model.lm_head(hidden[batch["target_index"]]), batch["targets"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def answer(model: Any, tokenizer: Any, prompts: list[list[dict[str, str]]]) -> list[tuple[str, bool]]:
    """Greedy answers, and whether each stopped at ``<|im_end|>`` by itself within 96 tokens."""
    asked = [tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in prompts]
    answers = [generate(model, tokenizer, [one], 96)[0] for one in asked]
    return [(one.text, one.ended) for one in answers]


def _answer_from(folder: Path, prompts: list[list[dict[str, str]]]) -> list[tuple[str, bool]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return answer(model, AutoTokenizer.from_pretrained(folder), prompts)


def main() -> int:
    """Build, ask, train, ask again; 1 when an answer is not as taught."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    set_up_logging()
    print("builds a tiny Qwen2, trains it on 160 rows and asks it: about two minutes on two cores", flush=True)
    print("1 of 3: building a tiny Qwen2 ...", flush=True)
    build_demo(INPUT)
    taught = [shipped_rows()[number] for number in PROMPTS]
    prompts = [_chat(row)[:-1] for row in taught]
    before = _answer_from(INPUT / "model", prompts)
    print("2 of 3: training it ...", flush=True)
    command = [sys.executable, "-m", "qwen_lit", "fit", "--config", str(configs() / "demo.yaml")]
    # The run of an earlier demo.
    shutil.rmtree(OUTPUT, ignore_errors=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        return code
    print("3 of 3: asking it ...", flush=True)
    after = _answer_from(Run(OUTPUT).merged, prompts)
    wrong = 0
    for row, prompt, (old, _), (new, stopped) in zip(taught, prompts, before, after, strict=True):
        good = new.strip() == row["output"].strip() and stopped
        wrong += not good
        print(f"\nprompt  {prompt[-1]['content']}\nbefore  {old[:80]!r}\nafter   {new!r}")
        print("        as taught, and it stopped by itself" if good else f"        NOT as taught: {row['output']!r}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
