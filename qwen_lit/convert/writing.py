"""A configuration as YAML with comments, its sections in the order in which a reader looks for them."""

import json
import re
from typing import Any

ORDER = ("seed_everything", "output_dir", "ckpt_path", "trainer", "model", "data", "checkpoint", "export", "samples")
INSIDE = {
    "trainer": (
        "max_epochs",
        "max_steps",
        "accelerator",
        "devices",
        "strategy",
        "precision",
        "accumulate_grad_batches",
        "gradient_clip_val",
        "log_every_n_steps",
    ),
    "model": (
        "model_name_or_path",
        "hub",
        "init_adapter",
        "quantization_config",
        "lora_config",
        "learning_rate",
        "optimizer",
        "lr_scheduler",
        "lr_scheduler_kwargs",
        "warmup_ratio",
    ),
    "data": ("dataset_path", "fields", "val_dataset_path", "val_size", "batch_size", "max_length"),
}
WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n", "~")
PLAIN = re.compile(r"([A-Za-z_/\u4e00-\u9fff]|~/|\.{1,2}/)[\w./~@+%=-]*")
"""Texts that are nothing else to YAML."""


def as_yaml(values: dict[str, Any], comments: dict[str, str], head: list[str]) -> str:
    """A YAML file.

    Args:
        values: key with dots to plain value.
        comments: key to what stands behind it.
        head: lines of comment at the top.
    """
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return "\n".join([*(f"# {line}" for line in head), *_block(tree, comments, "", 0)]) + "\n"


def _block(tree: dict[str, Any], comments: dict[str, str], above: str, depth: int) -> list[str]:
    order, lines = ORDER if not above else INSIDE.get(above, ()), []
    for name in sorted(tree, key=lambda one: order.index(one) if one in order else len(order)):
        value, key = tree[name], f"{above}.{name}" if above else name
        start, comment = f"{'  ' * depth}{name}:", comments.get(key, "")
        behind = f"    # {' '.join(comment.split())}" if comment else ""
        if isinstance(value, dict) and value:
            lines += [start + behind, *_block(value, comments, key, depth + 1)]
        elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
            lines.append(start + behind)
            lines += [f"{'  ' * (depth + 1)}- {flow(one)}" for one in value]
        else:
            lines.append(f"{start} {flow(value)}{behind}")
    return lines


def flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(key)}: {flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return scientific(value)
    if isinstance(value, int):
        return str(value)
    text = str(value)
    plain = PLAIN.fullmatch(text) and text.lower() not in WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)


def scientific(value: float) -> str:
    """A float that YAML reads as one: it needs a point before the e."""
    text = repr(value)
    if value and abs(value) < 0.001:
        mantissa, _, exponent = f"{value:e}".partition("e")
        short = mantissa.rstrip("0")
        text = f"{short}0e{exponent}" if short.endswith(".") else f"{short}e{exponent}"
        text = re.sub(r"e-0(\d)$", r"e-\1", text)
    return text if "." in text or "e" not in text else text.replace("e", ".0e")
