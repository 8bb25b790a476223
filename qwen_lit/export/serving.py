"""What a server and a reader need beside the weights: end tokens, tokenizer, Ollama's Modelfile, the model card."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_lit.export.adapter import EMBED, HEAD
from qwen_lit.export.folder import BaseModel, ExportError, read_json, write_json

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "lightning")
MODELFILE = '''# ollama create NAME -f Modelfile
FROM {source}
TEMPLATE """{{{{ range $i, $m := .Messages }}}}{default}<|im_start|>{{{{ $m.Role }}}}
{{{{ $m.Content }}}}<|im_end|>
{{{{ end }}}}<|im_start|>assistant
"""
{parameters}
'''
DEFAULT_SYSTEM = '{{ if and (eq $i 0) (ne $m.Role "system") }}%s{{ end }}'


@dataclass
class Told:
    """What the model card tells of a run; what is not known is left out."""

    config: dict[str, Any] = field(default_factory=dict)
    """The configuration of the run."""
    data: dict[str, Any] = field(default_factory=dict)
    """Rows, tokens, share supervised, fingerprint."""
    losses: dict[str, float] = field(default_factory=dict)
    verdict: dict[str, Any] | None = None
    merge_base: str = "original"
    stopped: tuple[int, int] | None = None
    """Prompts that ended by themselves, of so many."""


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


def write_serving_files(out_dir: Path, base_dir: Path, tokenizer: Any, told: Told) -> None:
    """Write tokenizer files with the chat template, generation and training config, Modelfile and model card.

    The generation config starts from the base model's, so its sampling settings stay. Its ``eos_token_id`` lists
    ``<|im_end|>`` and ``<|endoftext|>``, those of them that the vocabulary has: a chat-tuned base model stops at
    the end of its turn.

    Args:
        out_dir: existing folder that receives the files (``merge_adapter`` passes its temporary one to ``finish``).
        base_dir: folder of the original model.
        tokenizer: a transformers tokenizer.
        told: for the card; values that JSON has no form for are written as text.

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
    tokenizer.save_pretrained(str(out_dir))
    write_json(out_dir / "generation_config.json", generation)
    write_json(out_dir / "training_config.json", told.config)
    (out_dir / "Modelfile").write_text(modelfile(tokenizer, generation), encoding="utf-8")
    (out_dir / "README.md").write_text(model_card(told), encoding="utf-8")


def default_system(tokenizer: Any) -> str:
    """What the chat template puts before a conversation that has no system prompt."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    return text[: text.index("<|im_start|>user")]


def modelfile(tokenizer: Any, generation: dict[str, Any], source: str = ".") -> str:
    """Ollama's Modelfile, whose template renders conversations of system, user and assistant as the tokenizer does.

    Args:
        tokenizer: with the chat template.
        generation: the generation config; its sampling settings become parameters.
        source: the folder or GGUF file that ``FROM`` names.
    """
    system = default_system(tokenizer)
    default = DEFAULT_SYSTEM % system if system else ""
    parameters = [f'PARAMETER stop "{token}"' for token in STOP_TOKENS if token in tokenizer.get_vocab()]
    for name, ours in (("temperature", "temperature"), ("top_p", "top_p"), ("top_k", "top_k"),
                       ("repetition_penalty", "repeat_penalty")):  # fmt: skip
        if generation.get(name) is not None:
            parameters.append(f"PARAMETER {ours} {generation[name]}")
    return MODELFILE.format(source=source, default=default, parameters="\n".join(parameters))


def untrained_end(base_dir: Path, tokenizer: Any) -> str | None:
    """Why the base model may never stop at ``<|im_end|>``: its row in the output layer is like an unused one.

    Rows past the tokenizer's vocabulary are padding that no text ever reached; a row of the same size is as unused.
    Base models that were not tuned to chat are like that.
    """
    base = BaseModel(base_dir)
    head = HEAD if HEAD in base.where else EMBED
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


def model_card(told: Told) -> str:
    """README.md of the merged model: what it is, how it is served, and what it was trained on."""
    model = told.config.get("model", {})
    base = model.get("model_name_or_path", "?")
    lora = model.get("lora_config", {})
    parts = [
        f"---\nbase_model: {base}\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags: [qwen_lit, lora, merged]\n---",
        f"# {Path(base).name}, taught from instructions",
        f"A LoRA adapter (r={lora.get('r')}, alpha={lora.get('lora_alpha')}) trained on `{base}` and merged into its "
        + ("bf16 weights." if told.merge_base == "original" else "weights as they were trained on, in 4 bits."),
        "## Serve",
        "```bash\nvllm serve .\npython -m sglang.launch_server --model-path .\nollama create taught -f Modelfile\n```",
        "The adapter alone, on its base:",
        f"```bash\nvllm serve {base} --enable-lora --max-lora-rank {_rank(lora)} "
        "--lora-modules taught=../lora_adapter\n"
        f"python -m sglang.launch_server --model-path {base} --lora-paths taught=../lora_adapter\n```",
    ]
    if told.data:
        parts += ["## Data", _table(told.data)]
    if told.losses:
        parts += ["## Losses", _table({name: f"{value:.4f}" for name, value in told.losses.items()})]
    if told.verdict:
        rows = "".join(
            f"| merge, {name}{' (this model)' if name == told.merge_base else ''} | {one['loss']:.4f} "
            f"| {one['kl']:.5f} | {one['same_top']:.2%} |\n"
            for name, one in told.verdict["merges"].items()
        )
        parts += [
            "## Does it answer as trained?",
            f"On {told.verdict['rows']} {told.verdict.get('kind', 'held-out')} rows, {told.verdict['tokens']} tokens:",
            "| | loss | KL from the adapter | same top token |\n|---|---|---|---|\n"
            f"| adapter on its base | {told.verdict['adapter_loss']:.4f} | | |\n{rows}",
        ]
    if told.stopped:
        parts.append(f"{told.stopped[0]} of {told.stopped[1]} trained prompts ended at `<|im_end|>` by themselves.")
    parts += ["## Versions", _table({name: version(name) for name in LIBRARIES})]
    settings = json.dumps(told.config, indent=1, ensure_ascii=False, default=str)
    parts += ["## Configuration", f"<details><summary>all of it</summary>\n\n```json\n{settings}\n```\n</details>"]
    return "\n\n".join(parts) + "\n"


def _rank(lora: dict[str, Any]) -> int:
    """vLLM takes these ranks."""
    wanted = max([int(lora.get("r") or 8), *map(int, (lora.get("rank_pattern") or {}).values())])
    return next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= wanted), wanted)


def _table(values: dict[str, Any]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in values.items())
