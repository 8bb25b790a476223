"""Answer the rows of a JSONL into another, in batches, going on where an earlier run has stopped."""

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from qwen_lit.data.faults import RowError
from qwen_lit.data.records import parse_line, parse_row
from qwen_lit.data.text import read_text
from qwen_lit.errors import UserError
from qwen_lit.export.pipeline import adapter_from_checkpoint
from qwen_lit.generate import generate
from qwen_lit.model.load import load_base
from qwen_lit.model.module import QwenModule
from qwen_lit.names import ADAPTER
from qwen_lit.progress import Progress

log = logging.getLogger(__name__)


def answer_rows(
    module: QwenModule,
    tokenizer: Any,
    device: torch.device,
    adapter: Path,
    source: Path,
    target: Path,
    batch_size: int,
    max_new_tokens: int,
) -> None:
    """Load an adapter on its base, and answer every row of a file.

    Args:
        module: names the base and the adapter's settings; its model is not loaded.
        tokenizer: of the base.
        device: where it answers.
        adapter: a checkpoint of ``fit``, or an adapter folder.
        source: JSONL in any of the formats of training.
        target: JSONL that gets each row with its prediction.
        batch_size: rows that are answered at a time.
        max_new_tokens: most tokens of an answer.

    Raises:
        UserError: there is no such file, or a row asks nothing.
    """
    if not source.is_file():
        raise UserError(f"source: no such file: {source}; give a JSONL of questions.")
    with tempfile.TemporaryDirectory(prefix="qwen_lit_") as folder:
        if adapter.is_file():
            path, adapter = adapter, Path(folder) / ADAPTER
            adapter_from_checkpoint(path, module.lora_config, module.name, adapter, {})
        base: Any = load_base(module.folder, module.quantization_config, device)
        base.config.use_cache = True
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
    now, before = predict(model, tokenizer, source, target, batch_size, max_new_tokens)
    log.info("%d rows answered into %s, %d were there already", now, target, before)


def done_lines(path: Path) -> int:
    """Whole lines of an output; a torn last one is cut off."""
    if not path.is_file():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return content[:whole].count(b"\n")


def questions(path: Path, tokenizer: Any) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Each row with the token ids of its prompt: its messages up to the last user or tool turn, or its raw text.

    Raises:
        UserError: a row asks nothing.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            source = f"{path}:{number}"
            try:
                row: Any = parse_line(line)
                if document := read_text(row, source):
                    yield row, list(tokenizer(document.text, add_special_tokens=False)["input_ids"])
                    continue
                messages, tools = _question(row, source)
            except RowError as error:
                raise UserError(f"{source}: {error}") from error
            asked = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)
            yield row, list(asked["input_ids"])


def _question(row: Any, source: str) -> tuple[list[dict[str, Any]], Any]:
    """A row may come with an answer, which is left out, or without."""
    asked = dict(row) if isinstance(row, dict) else row
    if isinstance(asked, dict):
        if isinstance(asked.get("messages"), list) and asked["messages"]:
            if asked["messages"][-1].get("role") != "assistant":
                asked["messages"] = [*asked["messages"], {"role": "assistant", "content": "-"}]
        else:
            for question, answer in (("instruction", "output"), ("prompt", "completion")):
                if question in asked and not asked.get(answer):
                    asked[answer] = "-"
    conversation = parse_row(asked, source)
    last = max(number for number, one in enumerate(conversation.messages) if one["role"] == "assistant")
    return conversation.messages[:last], conversation.tools


def predict(
    model: Any, tokenizer: Any, source: Path, target: Path, batch_size: int, max_new_tokens: int
) -> tuple[int, int]:
    """Append to ``target`` each row of ``source`` with the model's likeliest ``prediction``.

    Args:
        model: for generation, on its device.
        tokenizer: with a chat template.
        source: JSONL in any of the formats of training; answers in it are not shown to the model, and raw text is
            continued.
        target: JSONL; the rows it has are not answered again.
        batch_size: rows that are answered at a time.
        max_new_tokens: most tokens of an answer.

    Returns:
        Rows answered now, and rows that were there already.
    """
    rows = list(questions(source, tokenizer))
    there = done_lines(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress("answering", len(rows) - there, "rows")
    with target.open("a", encoding="utf-8") as file, progress:
        for start in range(there, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            answers = generate(model, tokenizer, [prompt for _, prompt in batch], max_new_tokens)
            for (row, _), answer in zip(batch, answers, strict=True):
                file.write(json.dumps({**row, "prediction": answer.text}, ensure_ascii=False) + "\n")
            file.flush()
            progress.advance(len(batch))
    return len(rows) - there, there
