"""A peer's file to a flat dictionary: YAML, JSON, or the script that calls its command."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from qwen_lit.errors import UserError, shortened

LARGEST = 2**20
"""Bytes; no configuration has more."""
SCRIPTS = (".sh", ".bash", ".zsh", ".slurm", ".sbatch")
COMMANDS = (
    (r"swift (?:sft|pt)|swift/cli/(?:sft|pt)\.py|swift\.cli\.(?:sft|pt)", "ms-swift"),
    (r"trl sft|(?:trl/)?scripts/sft\.py|trl\.scripts\.sft", "TRL"),
    (r"llamafactory-cli train|llama-factory train|src/train(?:_bash)?\.py", "LLaMA-Factory"),
    (r"axolotl train|axolotl\.cli\.train", "Axolotl"),
)
"""What a script calls, and whose it is."""
OTHERS = r"swift rlhf|megatron (?:sft|pt|rlhf)|trl (?:dpo|grpo|kto|rloo|reward)|swift/cli/rlhf\.py"
FILES = (".yaml", ".yml", ".json")
PROCESSES = r"(?:NPROC_PER_NODE=|--nproc[_-]per[_-]node[= ]|--num_processes[= ])(\d+)"
VARIABLE = re.compile(r"\$\{?(\w+)(?::-([^}]*))?\}?")


def load(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What a file says, and whose it is where a script's command tells.

    Returns:
        Its keys, or None where it holds none; and the peer's name.

    Raises:
        UserError: it cannot be read, or is none of these formats.
    """
    try:
        there = path.is_file()
    except OSError as error:
        raise UserError(f"{shortened(str(path))}: cannot be read ({error.strerror or error}).") from error
    if not there:
        # Of a pipe, what is read here would be missing where it is parsed.
        raise UserError(f"{path}: no such file.")
    try:
        if path.stat().st_size > LARGEST:
            return None, None
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8, so no configuration; save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if path.suffix in SCRIPTS or text.startswith("#!"):
        return script(path, text)
    try:
        given = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: is neither YAML nor JSON ({shortened(' '.join(str(error).split()))}).") from error
    return (given, None) if isinstance(given, dict) and all(isinstance(key, str) for key in given) else (None, None)


def script(path: Path, text: str) -> tuple[dict[str, Any] | None, str | None]:
    """The arguments of the first training command of a script; a file among them comes first.

    Raises:
        UserError: the command trains otherwise, or its quotes do not close.
    """
    text = re.sub(r"\\\r?\n", " ", text)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    set_to = (re.fullmatch(r"(?:export\s+)?(\w+)=('[^']*'|\"[^\"]*\"|\S*)", line) for line in lines)
    values = dict(os.environ) | {one[1]: one[2].strip("'\"") for one in set_to if one}
    for line in lines:
        found = next(((hit, peer) for pattern, peer in COMMANDS if (hit := re.search(pattern, line))), None)
        if found is None:
            if other := re.search(OTHERS, line):
                raise UserError(f"{path}: {other[0]} is not done here; answers to instructions are trained.")
            continue
        hit, peer = found
        try:
            words = shlex.split(line[hit.end() :], comments=True)
        except ValueError as error:
            raise UserError(f"{path}: {hit[0]}: cannot be split into arguments ({error}).") from error
        words = [VARIABLE.sub(lambda one: str(values.get(one[1], one[2] or one[0])), word) for word in words]
        given = arguments(path, words)
        if processes := re.search(PROCESSES, line[: hit.start()]) or re.search(PROCESSES, text):
            given.setdefault("nproc_per_node", processes[1])
        project = values.get("WANDB_PROJECT") if re.search(r"WANDB_PROJECT=", text) else None
        if project and peer != "Axolotl":
            given.setdefault("project", project)
        return given, peer
    return None, None


def arguments(path: Path, words: list[str]) -> dict[str, Any]:
    """Options to their values: one, a list of several, or true where there is none.

    Raises:
        UserError: a file among them cannot be read.
    """
    given: dict[str, Any] = {}
    key = None
    for word in words:
        if word in ("|", "&", "&&", ";", ">", "2>&1", ">>") or word.startswith(("2>", ">")):
            break
        option = re.match(r"--?([A-Za-z][\w.-]*)(?:=(.*))?$", word, re.DOTALL)
        if option:
            key = option[1].replace("-", "_")
            given[key] = [option[2]] if option[2] is not None else []
        elif key is None and "=" in word and not word.endswith(FILES):
            name, _, value = word.partition("=")
            given[name] = [value]
        elif key is None and word.endswith(FILES):
            given["config"] = [word]
        elif key is not None:
            given[key].append(word)
    plain: dict[str, Any] = {key: True if not one else one[0] if len(one) == 1 else one for key, one in given.items()}
    named = plain.pop("config", None)
    if not isinstance(named, str):
        return plain
    file = next((one for one in (Path(named), path.parent / named) if one.is_file()), Path(named))
    return (load(file)[0] or {}) | plain
