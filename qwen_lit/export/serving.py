"""What a server and a reader need beside the weights: end tokens, tokenizer, Ollama's Modelfile, the model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_lit.export.card import ModelCardFacts, model_card
from qwen_lit.export.folder import BaseModel, ExportError, read_json, write_json
from qwen_lit.export.modelfile import modelfile, source_lines
from qwen_lit.families.table import family_of
from qwen_lit.names import TRAINING_CONFIG

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    # Of a model with a vision tower, which servers load as a whole.
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def end_tokens(tokenizer: Any) -> list[int]:
    """Ids at which generation ends.

    Raises:
        ExportError: the vocabulary has no end token at all.
    """
    vocab = tokenizer.get_vocab()
    ends = [int(vocab[token]) for token in STOP_TOKENS if token in vocab]
    if not ends and tokenizer.eos_token_id is not None:
        ends = [int(tokenizer.eos_token_id)]
    if not ends:
        raise ExportError(f"the tokenizer has none of {', '.join(STOP_TOKENS)}: the exported model would never stop")
    return ends


def write_serving_files(out_dir: Path, base_dir: Path, tokenizer: Any, facts: ModelCardFacts) -> None:
    """Write tokenizer files with the chat template, generation and training config, Modelfile, the form in which
    prompts were trained, and the model card.

    Args:
        out_dir: existing folder that receives the files (``merge_adapter`` passes its temporary one to ``finish``).
        base_dir: folder of the original model.
        tokenizer: a transformers tokenizer.
        facts: for the card; values that JSON has no form for are written as text.

    Raises:
        ExportError: the vocabulary has no end token at all, or a file of the base is not JSON.
    """
    copy_tokenizer(base_dir, out_dir, tokenizer)
    generation = generation_settings(base_dir, tokenizer)
    write_json(out_dir / "generation_config.json", generation)
    write_json(out_dir / TRAINING_CONFIG, facts.config)
    if facts.form is not None:
        facts.form.write(out_dir)
    source = source_lines(facts.architecture, facts.gguf, str(facts.config.get("output_dir") or "OUTPUT_DIR"))
    text = modelfile(tokenizer, generation, STOP_TOKENS, facts.form, source)
    (out_dir / "Modelfile").write_text(text, encoding="utf-8")
    (out_dir / "README.md").write_text(model_card(facts), encoding="utf-8")


def copy_tokenizer(base_dir: Path, out_dir: Path, tokenizer: Any) -> None:
    """Copy the base's tokenizer files byte for byte: other versions of transformers may not read what is rewritten.

    The chat template stands in tokenizer_config.json, where old readers look, and in chat_template.jinja, where new
    ones do; it is added where the base lacks it.

    Args:
        base_dir: folder of the original model.
        out_dir: existing folder that receives the files.
        tokenizer: as trained with, for its chat template.

    Raises:
        ExportError: tokenizer_config.json is not JSON.
    """
    for path in sorted(path for pattern in TOKENIZER_FILES for path in base_dir.glob(pattern)):
        target = out_dir / path.relative_to(base_dir)
        target.parent.mkdir(exist_ok=True)
        # Not copy2: the copy may be written to where the base's may not.
        shutil.copyfile(path, target)
    template = tokenizer.get_chat_template()
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if not (out_dir / "chat_template.jinja").is_file():
        (out_dir / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
        # A reader of this file does not look for further templates in tokenizer_config.json.
        for name, text in named.items():
            if name != "default":
                beside = out_dir / "additional_chat_templates"
                beside.mkdir(exist_ok=True)
                (beside / f"{name}.jinja").write_text(text, encoding="utf-8", newline="")
    path = out_dir / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if _default_template(config.get("chat_template")) != template:
        write_json(path, config | {"chat_template": template})


def _default_template(value: Any) -> str | None:
    """Of a tokenizer_config.json, which holds one template, or a list of them with names."""
    if isinstance(value, list):
        return next((one.get("template") for one in value if one.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def generation_settings(base_dir: Path, tokenizer: Any) -> dict[str, Any]:
    """The base's generation config with the end tokens of a chat.

    Its ``eos_token_id`` lists ``<|im_end|>`` and ``<|endoftext|>``, those of them that the vocabulary has: a
    chat-tuned base model stops at the end of its turn. Sampling settings go with ``do_sample``, without which
    transformers loads them but does not save them again: they turn it on, unless the base says that it is off.

    Raises:
        ExportError: the vocabulary has no end token at all, or the base's generation config is not JSON.
    """
    ends = end_tokens(tokenizer)
    source = base_dir / "generation_config.json"
    generation = read_json(source) if source.is_file() else {}
    generation.pop("_from_model_config", None)
    generation["eos_token_id"] = ends
    pad = tokenizer.pad_token_id
    generation["pad_token_id"] = int(pad) if pad is not None else ends[-1]
    sampling = {name for name in SAMPLING if generation.get(name) is not None}
    if generation.get("do_sample") is False or generation.get("temperature") == 0:
        generation = {name: value for name, value in generation.items() if name not in sampling}
        generation["do_sample"] = False
    elif sampling:
        generation["do_sample"] = True
    return generation


def untrained_end(base_dir: Path, tokenizer: Any) -> str | None:
    """Why the base model may never stop at ``<|im_end|>``: its row in the output layer is like an unused one.

    Rows past the tokenizer's vocabulary are padding that no text ever reached; a row of the same size is as unused.
    Base models that were not tuned to chat are like that.
    """
    base, family = BaseModel(base_dir), family_of(read_json(base_dir / "config.json"))
    head = family.head_on_disk if family.head_on_disk in base.where else family.embedding_on_disk
    vocab = tokenizer.get_vocab()
    if head not in base.where or STOP_TOKENS[0] not in vocab:
        return None
    weight: Tensor = base.get(head)
    unused, row = weight[len(tokenizer) :].float().norm(dim=1), weight[vocab[STOP_TOKENS[0]]].float().norm()
    used = weight[torch.linspace(0, len(tokenizer) // 2, 256).long()].float().norm(dim=1).median()
    if not len(unused) or unused.median() > 0.8 * used or row > unused.max() * 1.05:
        return None
    return (
        "<|im_end|> was never trained in this base model, so it may not stop: start from its Instruct version, or add "
        "model.lora_config.modules_to_save: [lm_head] (and embed_tokens)."
    )
