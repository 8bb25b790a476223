"""The README of what is exported: what it is, how it is served, and what it was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qwen_lit.environment import versions
from qwen_lit.export.commands import adapter_section, merged_section, request, served_form, served_name
from qwen_lit.export.folder import open_tensors, read_json, write_json
from qwen_lit.export.modelfile import ollama_imports
from qwen_lit.names import ADAPTER, TRAINED_AT, TRAINING_CONFIG, base_reference, hub_name
from qwen_lit.thinking import Form

BLOCKS = "blocks_of_raw_text_trained"
"""What the data's facts call examples that are no conversation."""


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter folder says of itself."""

    config: dict[str, Any]
    """Its adapter_config.json."""
    rank: int
    """The largest of its weights."""
    ends: tuple[str, ...]
    """Which of ``embed_tokens`` and ``lm_head`` have LoRA."""

    @classmethod
    def read(cls, adapter_dir: Path) -> AdapterFacts:
        """Read the config, and the names and shapes of the weights.

        Raises:
            ExportError: a file is missing or broken.
        """
        config, rank, ends = read_json(adapter_dir / "adapter_config.json"), 0, set()
        with open_tensors(adapter_dir / "adapter_model.safetensors") as handle:
            for name in handle.keys():
                if ".lora_A." in name or name.endswith((".lora_A", ".lora_embedding_A")):
                    rank = max(rank, handle.get_slice(name).get_shape()[0])
                ends |= {end for end in ("embed_tokens", "lm_head") if f"{end}.lora_" in name}
        return cls(config, rank or int(config.get("r") or 8), tuple(sorted(ends)))

    def unserved(self) -> list[str]:
        """What is in the adapter that vLLM and SGLang refuse, or scale wrongly without a word."""
        found = {
            "DoRA": self.config.get("use_dora"),
            "modules_to_save": self.config.get("modules_to_save"),
            "trained biases": self.config.get("bias", "none") != "none" or self.config.get("lora_bias"),
            "LoRA on " + " and ".join(self.ends): self.ends,
            "an alpha or a rank of its own for some modules": self.config.get("rank_pattern")
            or self.config.get("alpha_pattern"),
            "trained tokens": self.config.get("trainable_token_indices"),
        }
        return [name for name, there in found.items() if there]


@dataclass
class ModelCardFacts:
    """What the model card tells of a run; what is not known is left out."""

    config: dict[str, Any] = field(default_factory=dict)
    """The configuration of the run."""
    data: dict[str, Any] = field(default_factory=dict)
    """Rows, tokens, share supervised, fingerprint."""
    losses: dict[str, float] = field(default_factory=dict)
    verdict: dict[str, Any] | None = None
    merge_base: str = "original"
    held_in: str = ""
    """What the base was held in while training, as nf4; empty for bf16."""
    stopped: tuple[int, int] | None = None
    """Prompts that ended by themselves, of so many."""
    asked: str = ""
    """What answered them, where that is not the merged model."""
    adapter: AdapterFacts | None = None
    adapter_path: str = f"../{ADAPTER}"
    """Path of the adapter, relative to the model folder, or absolute."""
    gguf: str | None = None
    """Name of the GGUF file in the model folder."""
    architecture: str = ""
    """The class that the model's config.json names."""
    form: Form | None = None
    """In which form the prompts were trained; None where no conversation was."""
    served: tuple[str, ...] = ()
    """The forms of serving through which the trained prompts were asked; each sends them as they were trained."""
    unlike: dict[str, str] = field(default_factory=dict)
    """Those which do not, with the first difference."""
    missing: dict[str, str] = field(default_factory=dict)
    """What could not be exported, and why."""
    made: dict[str, Any] = field(default_factory=dict)
    """The checkpoint that the adapter is from: ``checkpoint``, ``step`` and, where they are known, ``val_loss`` and
    ``products``."""


def model_card(facts: ModelCardFacts) -> str:
    """README.md of the merged model."""
    base = str(facts.config.get("model", {}).get("model_name_or_path", "?"))
    begun = facts.config.get("model", {}).get("init_adapter")
    lora, name = facts.adapter.config if facts.adapter else {}, served_name(facts.config, base)
    blocks = int(facts.data.get(BLOCKS, 0))
    both = blocks and blocks < int(facts.data.get("examples_trained", 0))
    taught = "taught from instructions" if not blocks else "trained on raw text" + " and instructions" * bool(both)
    weights = f"weights as they were trained on, in {facts.held_in}."
    imported = facts.gguf is not None or ollama_imports(facts.architecture)
    alone = facts.adapter and adapter_section(facts.adapter, name, base, facts.adapter_path, facts.config, facts.form)
    parts = [
        _front_matter(base, {"library_name": "transformers", "tags": ["qwen_lit", "lora", "merged"]}),
        f"# {Path(base).name}, {taught}",
        f"A LoRA adapter (r={lora.get('r')}, alpha={lora.get('lora_alpha')}) trained on `{base}` and merged into its "
        + ("bf16 weights." if facts.merge_base == "original" else weights)
        + (f" The adapter was trained on from `{begun}`." if begun else "")
        + _made(facts.made),
        "## Serve",
        *merged_section(name, facts.gguf, facts.form, imported),
        *(alone or []),
    ]
    if blocks:
        parts.append(
            "Raw text was trained as it stands, without a chat template: to have it continued, send its beginning to "
            "the server's `/v1/completions`, which adds no template."
        )
    if facts.data:
        parts += ["## Data", _table({name.replace("_", " "): _shown(one) for name, one in facts.data.items()})]
    if facts.losses:
        parts += ["## Losses", _table({name: f"{value:.4f}" for name, value in facts.losses.items()})]
    if facts.verdict:
        rows = "".join(
            f"| merge, {name}{' (this model)' if name == facts.merge_base else ''} | {one['loss']:.4f} "
            f"| {one['kl']:.5f} | {one['same_top']:.2%} |\n"
            for name, one in facts.verdict["merges"].items()
        )
        parts += [
            "## Does it answer as trained?",
            f"On {facts.verdict['rows']} {facts.verdict.get('kind', 'held-out')} rows, "
            f"{facts.verdict['tokens']} tokens:",
            "| | loss | KL from the adapter | same top token |\n|---|---|---|---|\n"
            f"| adapter on its base | {facts.verdict['adapter_loss']:.4f} | | |\n{rows}",
        ]
    if facts.stopped:
        asked = f" They were answered by {facts.asked}: this model did not fit the device." if facts.asked else ""
        ended = f"{facts.stopped[0]} of {facts.stopped[1]} trained prompts ended at `<|im_end|>` by themselves."
        parts.append(ended + asked)
    if facts.served:
        parts.append(f"Asked through {' and '.join(facts.served)}, which send them as trained, token by token.")
    parts += [f"**Asked otherwise than trained** through {name}: {what}" for name, what in facts.unlike.items()]
    parts += ["## Versions", _table({name: one for name, one in versions().items() if one})]
    settings = json.dumps(facts.config, indent=1, ensure_ascii=False, default=str)
    parts += ["## Configuration", f"<details><summary>all of it</summary>\n\n```json\n{settings}\n```\n</details>"]
    return "\n\n".join(parts) + "\n"


def finish_adapter(
    folder: Path, base: str, run: dict[str, Any], made: dict[str, Any] | None = None, form: Form | None = None
) -> None:
    """Let an adapter folder name its base so that any tool finds it, keep how it was trained, and give it a card.

    Args:
        folder: as PEFT has written it.
        base: the base model's folder or hub name.
        run: the configuration of the run.
        made: of which checkpoint it is.
        form: in which its prompts were trained.
    """
    write_json(folder / TRAINING_CONFIG, run)
    if form is not None:
        form.write(folder)
    if made:
        write_json(folder / TRAINED_AT, made)
    config = read_json(folder / "adapter_config.json") | {"base_model_name_or_path": base_reference(base)}
    write_json(folder / "adapter_config.json", config)
    facts, name = AdapterFacts.read(folder), served_name(run, base)
    parts = [
        _front_matter(base, {"library_name": "peft", "tags": ["qwen_lit", "lora"]}),
        f"# LoRA adapter for {Path(base).name}",
        f"r={config.get('r')}, alpha={config.get('lora_alpha')}, trained on `{base}`.{_made(made or {})}",
        "## Serve",
        "In the terminal: `qwen-lit chat .`, in the folder of this file.",
        *adapter_section(facts, name, base, ".", run, form),
        *served_form(form),
        *(request(name) if not facts.unserved() else []),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front_matter(base: str, facts: dict[str, Any]) -> str:
    """The card's YAML; a base that is not on the hub is left out, as the hub refuses the card otherwise."""
    values = facts | {"pipeline_tag": "text-generation"}
    if hub_name(base):
        values["base_model"] = base
    return f"---\n{yaml.safe_dump(values, allow_unicode=True, sort_keys=False)}---"


def _made(made: dict[str, Any]) -> str:
    """Which step of the run it is."""
    if not made:
        return ""
    names = {"last": "the last of the run", "best": "the best of the run by validation loss"}
    loss = f"; validation loss {made['val_loss']:.4f} nats a token" if "val_loss" in made else ""
    name = names.get(made["checkpoint"], f"from `{made['checkpoint']}`")
    products = f" Products of frozen weights were computed in {made['products']}." if "products" in made else ""
    return f" It is that of optimizer step {made['step']:,}, {name}{loss}.{products}"


def _shown(value: Any) -> str:
    """A count with its thousands; a share as percent."""
    return f"{value:.1%}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _table(values: dict[str, Any]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in values.items())
