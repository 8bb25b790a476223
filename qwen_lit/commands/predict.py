"""Answer the rows of a file into a JSONL, in batches, going on where an earlier run has stopped."""

import json
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
from qwen_lit.export.serving import end_tokens
from qwen_lit.progress import Progress


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


def questions(path: Path, data: QwenDataModule) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Each row of a file, read as training reads it, with the token ids of its prompt.

    Args:
        path: a file in any of the formats of training; its rows may have answers, which are no part of the prompt.
        data: says how rows are read (``fields``, ``odd_turns``, ``control_tokens``), and has the tokenizer.

    Raises:
        UserError: the file cannot be read, or a row asks nothing.
    """
    control, policy = control_names(data.tokenizer), data.encoder_options["control_tokens"]
    try:
        for raw in read_rows(path, data.fields.values()):
            try:
                content = read_content(raw)
                row = read_row(content, raw.source, data.fields, data.odd_turns, answered=False)
                if isinstance(row, Conversation):
                    guard(row, control, policy)
                yield content, row.prompt(data.tokenizer)
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
    ends, device = end_tokens(tokenizer), model.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[-1]
    target.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress("answering", len(rows) - there, "rows")
    with target.open("a", encoding="utf-8") as file, progress:
        for start in range(there, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            prompts = [prompt for _, prompt in batch]
            width = max(map(len, prompts))
            ids = torch.tensor([[pad] * (width - len(one)) + one for one in prompts], device=device)
            mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=ends,
                    pad_token_id=pad,
                )[:, width:]
            for (row, _), answer in zip(batch, out, strict=True):
                text = tokenizer.decode(answer, skip_special_tokens=True)
                file.write(json.dumps({**row, "prediction": text}, ensure_ascii=False, default=str) + "\n")
            file.flush()
            progress.advance(len(batch))
    return len(rows) - there, there
