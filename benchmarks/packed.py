"""Rows of a small real model, and the model packed in 4 bits with them, as ``fidelity.py`` trains it.

A packed model is a checkpoint that transformers reads too: linears in NF4 as bitsandbytes stores them, an embedding of
the tokens that occur in the rows alone, and the rows beside it in those tokens, so that a model of 135M parameters is
one folder of 60 MB. What is cut off the vocabulary is missing from the softmax of the loss as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_base import NF4
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast

from qwen_lit.data.batches import Batch, collate
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.packing import best_fit
from qwen_lit.data.settings import DataSettings
from qwen_lit.model.load import language_model, load_base, load_tokenizer

Document = tuple[np.ndarray, np.ndarray]
"""Token ids ``[t]`` and trained ranges ``[k, 2]``."""
ROWS = "rows.npz"
"""In the folder of a packed model."""
SETTINGS: dict[str, Any] = {"overlong": "truncate", "on_bad_row": "skip", "max_bad_share": 1.0}
"""How rows are read: the most of them that a row's length allows."""


@dataclass(frozen=True)
class Rows:
    """Documents to train, and documents that are held out."""

    train: list[Document]
    held: list[Document]
    longest: int
    """Tokens of a pack of documents, which is what a step counts as a row."""

    @staticmethod
    def read(folder: Path, files: Sequence[str], longest: int, val_size: float = 0.06) -> "Rows":
        """The rows of a packed model, or those of files by the tokenizer of a checkpoint.

        Args:
            folder: of the model.
            files: as of ``data.dataset_path``; not read for a packed model.
            longest: as of ``Rows``; longer documents are cut.
            val_size: share of the files' rows that is held out.
        """
        if (folder / ROWS).is_file():
            return Rows._unpacked(folder / ROWS, longest)
        if not files:
            raise SystemExit(f"{folder} has no {ROWS}; give files of rows with --rows")
        settings = DataSettings(list(files), val_size=val_size, max_length=longest, **SETTINGS)
        data = QwenDataModule(settings, load_tokenizer(folder))
        data.setup()
        assert data.train_rows is not None and data.val_rows is not None
        train, held = ([rows[number] for number in range(len(rows))] for rows in (data.train_rows, data.val_rows))
        return Rows(train, held, longest)

    @staticmethod
    def _unpacked(file: Path, longest: int) -> "Rows":
        with np.load(file) as found:
            lengths, spans, held = found["lengths"], found["spans"], int(found["held"])
            parts = np.split(found["ids"].astype(np.int64), np.cumsum(lengths)[:-1])
        docs = [(ids, spans[spans[:, 0] == number, 1:]) for number, ids in enumerate(parts)]
        cut = [(ids[:longest], np.minimum(ranges, longest)) for ids, ranges in docs]
        cut = [(ids, ranges[ranges[:, 0] < ranges[:, 1]]) for ids, ranges in cut]
        return Rows(cut[held:], cut[:held], longest)

    def write(self, file: Path, number_of: np.ndarray) -> None:
        """Write them beside a packed model.

        Args:
            file: its path.
            number_of: int ``[vocabulary]``, the packed model's number of each token.
        """
        docs = [*self.held, *self.train]
        spans = [(number, *one) for number, (_, ranges) in enumerate(docs) for one in np.asarray(ranges).tolist()]
        ids = number_of[np.concatenate([ids for ids, _ in docs])].astype(np.int32)
        lengths = np.array([len(ids) for ids, _ in docs])
        np.savez_compressed(file, ids=ids, lengths=lengths, spans=np.array(spans), held=len(self.held))

    def used(self) -> np.ndarray:
        """The tokens that occur, in their order."""
        return np.unique(np.concatenate([ids for ids, _ in (*self.train, *self.held)]))

    @cached_property
    def packs(self) -> list[list[Document]]:
        """Training documents in packs of up to ``longest`` tokens."""
        return _packed(self.train, self.longest)

    def steps(self, seed: int, steps: int, per_step: int) -> list[Batch]:
        """Micro-batches of the steps, on the CPU; each epoch has an order of its own, drawn from the seed.

        Args:
            seed: of the run.
            steps: their number.
            per_step: packs of each.
        """
        draw, order = np.random.default_rng(seed), list[int]()
        while len(order) < steps * per_step:
            order += draw.permutation(len(self.packs)).tolist()
        parts = (order[at * per_step : (at + 1) * per_step] for at in range(steps))
        return [collate(sum((self.packs[number] for number in part), []), 0) for part in parts]

    def judged(self, most: int) -> list[Batch]:
        """Packs of held-out documents that train something, a micro-batch each, on the CPU."""
        batches = [collate(pack, 0) for pack in _packed(self.held, self.longest)]
        return [batch for batch in batches if len(batch["targets"])][:most]


def _packed(docs: list[Document], longest: int) -> list[list[Document]]:
    return [[docs[number] for number in pack] for pack in best_fit([len(ids) for ids, _ in docs], longest)]


def pack(folder: Path, rows: Rows, out: Path, original: Path | None = None) -> int:
    """Write a model packed in 4 bits with its rows.

    Args:
        folder: of a checkpoint with a tied head.
        rows: that are trained and held out.
        out: the folder that is written.
        original: a folder for the same model before it is quantised, in bf16; None writes none.

    Returns:
        Bytes of ``out``.
    """
    used = rows.used()
    config = language_model(AutoConfig.from_pretrained(folder))
    if not config.tie_word_embeddings:
        raise SystemExit(f"{folder} has a head of its own; a packed model has a tied one")
    number_of = np.zeros(config.vocab_size, dtype=np.int64)
    number_of[used] = np.arange(len(used))
    tokenizer, device = load_tokenizer(folder), torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    for place, quantization in ((out, NF4), (original, None)):
        if place is None:
            continue
        base: Any = load_base(folder, quantization, device)
        kept = base.get_input_embeddings().weight[torch.as_tensor(used, device=device)].clone()
        base.resize_token_embeddings(len(used), mean_resizing=False)
        base.get_input_embeddings().weight.data.copy_(kept)
        base.config.eos_token_id = base.config.bos_token_id = base.config.pad_token_id = None
        base.save_pretrained(place)
        _words(tokenizer, used).save_pretrained(place)
        rows.write(place / ROWS, number_of)
    return sum(file.stat().st_size for file in out.iterdir())


def _words(tokenizer: Any, used: np.ndarray) -> PreTrainedTokenizerFast:
    """A tokenizer of the packed vocabulary, for programs that refuse a model without one; rows need none."""
    words = {f"{token} {place}": place for place, token in enumerate(tokenizer.convert_ids_to_tokens(used.tolist()))}
    first = next(iter(words))
    made = Tokenizer(WordLevel(words, unk_token=first))
    template = tokenizer.chat_template
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=first, pad_token=first, unk_token=first, chat_template=template
    )
