"""Recognises by its keys which trainer a configuration file is for."""

import os
import shlex
from pathlib import Path
from typing import Any

from qwen_lit.convert import axolotl, hugging_face, llama_factory, sections, swift, trl
from qwen_lit.convert.draft import Peer
from qwen_lit.convert.reading import load
from qwen_lit.errors import UserError

PEERS: tuple[Peer, ...] = (llama_factory.PEER, axolotl.PEER, swift.PEER, trl.PEER)
OWN = sections.PEER
"""Where no peer's own words are found."""
OUR_SECTIONS = ("trainer", "model", "data", "checkpoint", "export", "samples")
SHARED = frozenset({*hugging_face.WORDS, *hugging_face.RENAMED, *hugging_face.UNNEEDED, *hugging_face.WITHOUT})
"""Words of transformers' TrainingArguments."""


def kind_of(config: str | os.PathLike[str] | dict[str, Any]) -> str | None:
    """The name of the trainer whose configuration this is; None for ours, and for what is none.

    Args:
        config: a file, or what it says.
    """
    found = config_of(config)
    return found[0].name if found else None


def config_of(config: str | os.PathLike[str] | dict[str, Any]) -> tuple[Peer, dict[str, Any]] | None:
    """The trainer whose configuration this is, with its keys; None for ours, and for what is none."""
    if isinstance(config, dict):
        given, named = config, None
    else:
        try:
            found, named = load(Path(config))
        except UserError:
            return None
        if found is None:
            return None
        given = found
    if named is not None:
        return next(peer for peer in PEERS if peer.name == named), given
    peer = _recognised(given)
    return (peer, given) if peer else None


def is_ours(given: dict[str, Any]) -> bool:
    """Whether the keys are those of this program."""
    if any("." in key and key.partition(".")[0] in OUR_SECTIONS for key in given):
        return True
    return any(isinstance(given.get(key), dict) for key in OUR_SECTIONS) or given.keys() <= {
        "output_dir",
        "seed_everything",
        "ckpt_path",
    }


def _recognised(given: dict[str, Any]) -> Peer | None:
    sectioned = any(key in sections.SECTIONS and isinstance(value, dict) for key, value in given.items())
    ours = any(isinstance(given.get(key), dict) for key in ("trainer", "model", "data"))
    flat = sections.flattened(given)
    shared = flat.keys() & SHARED
    if sectioned and len(shared) + len(flat.keys() & OWN.words.keys()) >= 2:
        return OWN
    if ours or is_ours(given):
        return None
    scores = {peer.name: len(given.keys() & peer.marks) for peer in PEERS}
    best = max(PEERS, key=lambda peer: scores[peer.name])
    # A single key may be a slip of the pen in a file of ours.
    known = sum(key in SHARED or best.knows(key) for key in given)
    if scores[best.name] and known >= 2:
        return best
    inner = {key.partition(".")[0] for key in flat if "." in key}
    named = flat.keys() & (OWN.words.keys() | set(" ".join(sections.PATHS.values()).split()))
    return OWN if len(shared) + len(inner) >= 2 and (named or inner or len(shared) >= 3) else None


def hint(path: str | os.PathLike[str]) -> str | None:
    """What to do with a configuration of another trainer; None for ours, and for what is none."""
    kind, name = kind_of(path), os.fspath(path)
    if kind is None:
        return None
    command = f"qwen-lit convert {shlex.quote(name)} --output my.yaml"
    return f"{name} is {article(kind)} {kind} configuration; convert it: {command}"


def article(name: str) -> str:
    """``a`` or ``an``."""
    return "an" if name[0] in "AEIOU" or name.startswith("ms") else "a"
