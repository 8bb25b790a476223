"""Rows of a small real model, and the model packed in 4 bits with them, as ``fidelity.py`` trains it.

A packed model is a checkpoint that transformers reads too: linears in NF4 as bitsandbytes stores them, an embedding of
the tokens that occur in the rows alone, and the rows beside it in those tokens, so that a model of 135M parameters is
one archive of 60 MB. What is cut off the vocabulary is missing from the softmax of the loss as well. Widths are made
whole multiples of 128 by zeros, which products in integers need, and nothing else is changed.
"""

import copy
import tarfile
import tempfile
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
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qwen_lit.data.batches import Batch, collate
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.packing import best_fit
from qwen_lit.data.settings import DataSettings
from qwen_lit.model.load import language_model, load_base, load_tokenizer, read_model

Document = tuple[np.ndarray, np.ndarray]
"""Token ids ``[t]`` and trained ranges ``[k, 2]``."""
ROWS = "rows.npz"
"""In the folder of a packed model."""
ARCHIVE = ".tar.gz"
UNIT = 128
"""Of which the widths of a packed model are multiples: what a Hadamard transform takes at once."""
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
        return Rows(_that_train(train), _that_train(held), longest)

    @staticmethod
    def _unpacked(file: Path, longest: int) -> "Rows":
        with np.load(file) as found:
            lengths, spans, held = found["lengths"], found["spans"], int(found["held"])
            parts = np.split(found["ids"].astype(np.int64), np.cumsum(lengths)[:-1])
        docs = [(ids, spans[spans[:, 0] == number, 1:]) for number, ids in enumerate(parts)]
        cut = [(ids[:longest], np.minimum(ranges, longest)) for ids, ranges in docs]
        cut = [(ids, ranges[ranges[:, 0] < ranges[:, 1]]) for ids, ranges in cut]
        return Rows(_that_train(cut[held:]), _that_train(cut[:held]), longest)

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
        """Packs of held-out documents, a micro-batch each, on the CPU; ``most`` of them at most."""
        return [collate(pack, 0) for pack in _packed(self.held, self.longest)[:most]]


def _that_train(docs: list[Document]) -> list[Document]:
    """Documents of which something is supervised; a cut may leave nothing of an answer."""
    return [(ids, ranges) for ids, ranges in docs if len(collate([(ids, ranges)], 0)["targets"])]


def _packed(docs: list[Document], longest: int) -> list[list[Document]]:
    return [[docs[number] for number in pack] for pack in best_fit([len(ids) for ids, _ in docs], longest)]


def pack(folder: Path, rows: Rows, out: Path, original: Path | None = None) -> int:
    """Write a model packed in 4 bits with its rows.

    Args:
        folder: of a checkpoint of the family qwen2 with a tied head.
        rows: that are trained and held out.
        out: the folder that is written, and beside it an archive of it with ``ARCHIVE`` after its name.
        original: a folder for the same model before it is quantised, in bf16; None writes none.

    Returns:
        Bytes of the archive.
    """
    config = language_model(AutoConfig.from_pretrained(folder))
    if config.model_type != "qwen2" or not config.tie_word_embeddings:
        raise SystemExit(f"{folder} is no qwen2 with a tied head, of which alone is known how its widths grow")
    used, number_of = rows.used(), np.zeros(config.vocab_size, dtype=np.int64)
    number_of[used] = np.arange(len(used))
    words = _words(load_tokenizer(folder), used)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        plain = original or Path(temporary)
        _in_whole_units(read_model(folder, torch.device("cpu")), used).save_pretrained(plain)
        load_base(plain, NF4, device).save_pretrained(out)  # type: ignore[operator]
    for place in filter(None, (out, original)):
        words.save_pretrained(place)
        rows.write(place / ROWS, number_of)
    archive = out.with_name(out.name + ARCHIVE)
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(out, out.name)
    return archive.stat().st_size


def unpacked(model: Path, place: Path) -> Path:
    """The folder of a model, which may be an archive that ``pack`` has written.

    Args:
        model: a folder or an archive.
        place: where an archive is unpacked.
    """
    if model.is_dir():
        return model
    with tarfile.open(model) as opened:
        opened.extractall(place, filter="data")
    return next(place.iterdir())


def _in_whole_units(model: Any, used: np.ndarray) -> Any:
    """The same function of the tokens that are used, by a model whose widths are multiples of ``UNIT``, in bf16.

    What is added is zero, and stays zero in the residual stream. An RMSNorm of more numbers of which the added ones
    are zero has a smaller mean: its weight and epsilon make up for that. Added heads put out zero until their adapter
    is trained.

    Args:
        model: of the family qwen2, on the CPU.
        used: int ``[packed vocabulary]``, the tokens that are kept.
    """
    old = model.config
    config, size = copy.deepcopy(old), getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    config.vocab_size, config.head_dim = len(used), size
    config.hidden_size, config.intermediate_size = _whole(old.hidden_size), _whole(old.intermediate_size)
    config.num_key_value_heads = _whole(old.num_key_value_heads * size) // size
    per_key = old.num_attention_heads // old.num_key_value_heads
    config.num_attention_heads = per_key * config.num_key_value_heads
    grown = config.hidden_size / old.hidden_size
    config.rms_norm_eps = old.rms_norm_eps / grown
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    made: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    names = dict(made.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            value = weight[torch.as_tensor(used)] if weight is model.get_input_embeddings().weight else weight
            value = value * grown**-0.5 if "norm" in name else value
            names[name].zero_()[tuple(map(slice, value.shape))] = value
    return made


def _whole(width: int) -> int:
    return -(-width // UNIT) * UNIT


def _words(tokenizer: Any, used: np.ndarray) -> PreTrainedTokenizerFast:
    """A tokenizer of the packed vocabulary, for programs that refuse a model without one; rows need none."""
    words = {f"{token} {place}": place for place, token in enumerate(tokenizer.convert_ids_to_tokens(used.tolist()))}
    first = next(iter(words))
    made = Tokenizer(WordLevel(words, unk_token=first))
    template = tokenizer.chat_template
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=first, pad_token=first, unk_token=first, chat_template=template
    )
