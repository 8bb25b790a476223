"""The command ``convert``: reads a file, writes ours, and says what is different."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from qwen_lit.convert import hugging_face, sections
from qwen_lit.convert.draft import Draft, Peer
from qwen_lit.convert.kinds import PEERS, article, config_of, is_ours
from qwen_lit.convert.ours import to_ours
from qwen_lit.convert.reading import load
from qwen_lit.convert.values import is_nothing, is_off, spelled
from qwen_lit.convert.writing import as_yaml
from qwen_lit.errors import UserError
from qwen_lit.names import expanded

LEFT_OUT = ("no counterpart:", "not needed:")


def converted(path: Path) -> tuple[str, list[str]]:
    """A peer's configuration as our YAML.

    Returns:
        The YAML, and lines on what is different, then on what is left out.

    Raises:
        UserError: the file is none that is known, or asks for what is not done here.
    """
    found = config_of(path)
    if found is None:
        given, _ = load(path)
        if given is not None and is_ours(given):
            raise UserError(f"{path} is a configuration of qwen_lit already; give it to --config.")
        names = ", ".join(one.name for one in PEERS)
        raise UserError(f"{path} is no configuration of {names}, or of transformers' TrainingArguments.")
    peer, given = found
    draft = drafted(peer, given, path)
    if not draft.refused:
        to_ours(draft)
    if draft.refused:
        raise UserError(f"{path}: " + f"\n{path}: ".join(draft.refused))
    head = [f"Converted from {path.name}, {article(peer.name)} {peer.name} configuration"]
    notes = [line if line.startswith(LEFT_OUT) else f"different: {line}" for line in draft.notes]
    return as_yaml(draft.ours, draft.comments, head), sorted(notes, key=lambda line: line.startswith(LEFT_OUT))


def drafted(peer: Peer, given: dict[str, Any], path: Path) -> Draft:
    """A file's keys as common words, with a note on each of the others.

    Raises:
        UserError: a value is of another kind than its key takes.
    """
    draft = Draft(path, peer.name, sections.flattened(given) if peer is sections.PEER else dict(given))
    peer.read(draft)
    processes = draft.take("nproc_per_node")
    unneeded: dict[str, list[str]] = {}
    for key, value in list(draft.given.items()):
        word = peer.words.get(key) or hugging_face.RENAMED.get(key) or (key if key in hugging_face.WORDS else None)
        if word is not None:
            draft.move(key, word)
        elif is_nothing(value) or (is_off(value) and (key in peer.unneeded or key in hugging_face.UNNEEDED)):
            continue
        elif reason := peer.unneeded.get(key) or hugging_face.UNNEEDED.get(key):
            unneeded.setdefault(reason, []).append(key)
        elif reason := peer.without.get(key) or hugging_face.WITHOUT.get(key):
            if not is_off(value):
                draft.note(f"no counterpart: {key}: {spelled(value)}: {reason}")
        else:
            draft.note(f"no counterpart: {key}: {spelled(value)}")
    for reason, names in unneeded.items():
        draft.note(f"not needed: {', '.join(names)}: {reason}")
    if processes is not None and str(processes).isdigit() and int(processes) > 1:
        draft.write("trainer.devices", int(processes), "processes of the script")
        draft.write("trainer.strategy", "ddp")
    for word, value in peer.defaults.items():
        if (
            word not in draft.common
            and not (word == "warmup_steps" and "warmup_ratio" in draft.common)
            and not (word == "warmup_ratio" and "warmup_steps" in draft.common)
        ):
            draft.put(word, value, f"{peer.name}'s default")
    return draft


def main(args: list[str]) -> int:
    """Convert a configuration of LLaMA-Factory, Axolotl, ms-swift, TRL or transformers' TrainingArguments to ours."""
    parser = argparse.ArgumentParser(prog="qwen-lit convert", description=main.__doc__)
    parser.add_argument("file", metavar="FILE", help="YAML, JSON, or a script that calls swift sft or trl sft")
    parser.add_argument("--output", metavar="FILE", help="file to write; default: the terminal")
    given = parser.parse_args(args)
    path = Path(expanded(given.file))
    target = Path(expanded(given.output)) if given.output else None
    try:
        if target is not None and target.exists():
            raise UserError(f"{target} is there already; give another --output.")
        text, notes = converted(path)
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except (ArithmeticError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        print(f"error: {path}: a value is of another kind than its key takes ({error}).", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {target} ({error.strerror or error}); give another --output.", file=sys.stderr)
        return 2
    if target is None:
        print(text, end="")
    for line in notes:
        print(line, file=sys.stderr)
    if target is not None:
        print(f"{target} written; next: qwen-lit inspect --config {shlex.quote(str(target))}", file=sys.stderr)
    return 0
