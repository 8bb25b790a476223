"""Answer the rows of a file into a JSONL, in batches, going on where an earlier run has stopped."""

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qwen_lit.data.control import control_names, guard
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.faults import DataError, RowError
from qwen_lit.data.records import Conversation
from qwen_lit.data.row_kinds import read_content, read_row
from qwen_lit.data.sources import read_rows
from qwen_lit.errors import UserError
from qwen_lit.export.pipeline import adapter_from_checkpoint
from qwen_lit.generate import generate
from qwen_lit.model.load import read_adapted
from qwen_lit.model.module import QwenModule
from qwen_lit.model.resume import stored
from qwen_lit.names import ADAPTER
from qwen_lit.planner.settle import settle
from qwen_lit.progress import Progress
from qwen_lit.thinking import Form, form_of, read_form

log = logging.getLogger(__name__)


def answer_rows(
    module: QwenModule,
    data: QwenDataModule,
    device: torch.device,
    adapter: Path,
    source: Path,
    target: Path,
    batch_size: int,
    max_new_tokens: int,
    think: bool | None = None,
) -> None:
    """Load an adapter on its base, and answer every row of a file.

    Args:
        module: names the base and the adapter's settings; its model is not loaded.
        data: says how rows are read; its own rows are not used.
        device: where it answers.
        adapter: a checkpoint of ``fit``, or an adapter folder.
        source: file in any of the formats of training, with answers or without.
        target: JSONL that gets each row with its prediction.
        batch_size: rows that are answered at a time.
        max_new_tokens: most tokens of an answer.
        think: let the model think first, or not; None as it was trained.

    Raises:
        UserError: there is no such file, or a row asks nothing.
    """
    if not source.is_file():
        raise UserError(f"source: no such file: {source}; give a file of questions.")
    if think is None and (form := form_at(adapter)) is not None:
        think = form.enable_thinking
        log.info("asked as trained: conversations %s", "; ".join(filter(None, [form.shares(), form.told()])))
    rows = list(questions(source, data, think))
    with tempfile.TemporaryDirectory(prefix="qwen_lit_") as folder:
        if adapter.is_file():
            path, adapter = adapter, Path(folder) / ADAPTER
            adapter_from_checkpoint(path, module.lora_config, module.name, module.family, adapter, {})
        base: Any = module.load_base(device)
        longest = max((len(prompt) for _, prompt in rows), default=0)
        settle(base, batch_size * (longest + max_new_tokens), adapter)
        base.config.use_cache = True
        model = read_adapted(base, adapter)
    now, before = predict(model, data.tokenizer, rows, target, batch_size, max_new_tokens)
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


def form_at(adapter: Path) -> Form | None:
    """In which form an adapter's prompts were trained; None where it is not known.

    Args:
        adapter: a checkpoint of ``fit``, or an adapter folder.
    """
    return form_of(stored(adapter).get("prompt_form")) if adapter.is_file() else read_form(adapter)


def questions(
    path: Path, data: QwenDataModule, think: bool | None = None
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Each row of a file, read as training reads it, with the token ids of its prompt.

    Args:
        path: a file in any of the formats of training; its rows may have answers, which are no part of the prompt.
        data: says how rows are read (``fields``, ``odd_turns``, ``control_tokens``), and has the tokenizer.
        think: the value of the chat template's switch ``enable_thinking``; None leaves it to the template.

    Raises:
        UserError: the file cannot be read, or a row asks nothing.
    """
    control, policy = control_names(data.tokenizer), data.settings.control_tokens
    try:
        for raw in read_rows(path, (data.settings.fields or {}).values()):
            try:
                content = read_content(raw)
                row = read_row(
                    content, raw.source, data.settings.fields or {}, data.settings.odd_turns, answered=False
                )
                if isinstance(row, Conversation):
                    guard(row, control, policy)
                yield content, row.prompt(data.tokenizer, think)
            except RowError as error:
                raise UserError(f"{raw.source}: {error}") from error
    except DataError as error:
        raise UserError(f"source: {error}") from error


def predict(
    model: Any,
    tokenizer: Any,
    rows: list[tuple[dict[str, Any], list[int]]],
    target: Path,
    batch_size: int,
    max_new_tokens: int,
) -> tuple[int, int]:
    """Append to ``target`` each row with the model's likeliest ``prediction``.

    Args:
        model: for generation, on its device.
        tokenizer: with a chat template.
        rows: of ``questions``, each with its prompt.
        target: JSONL; the rows it has are not answered again.
        batch_size: rows that are answered at a time.
        max_new_tokens: most tokens of an answer.

    Returns:
        Rows answered now, and rows that were there already.
    """
    there = done_lines(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress("answering", len(rows) - there, "rows")
    with target.open("a", encoding="utf-8") as file, progress:
        for start in range(there, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            answers = generate(model, tokenizer, [prompt for _, prompt in batch], max_new_tokens)
            for (row, _), answer in zip(batch, answers, strict=True):
                line = json.dumps({**row, "prediction": answer.text}, ensure_ascii=False, default=str)
                file.write(line + "\n")
            file.flush()
            progress.advance(len(batch))
    return len(rows) - there, there
