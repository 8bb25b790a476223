"""``qwen-lit data split``: a novel to rows that continue it."""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from qwen_lit.data.faults import DataError, RowError
from qwen_lit.data.kinds import TEXTS, kind_of
from qwen_lit.data.passages import Passage
from qwen_lit.data.sources import read_rows
from qwen_lit.names import expanded

HEADING = re.compile(
    r"^[ \t\u3000]*(?:#{1,6} *)?(?:"
    r"第[零〇一二三四五六七八九十百千万两\d０-９]{1,9}[章回节節卷部集篇幕][^\n。！？!?]{0,40}"
    r"|(?:序章|序幕|序言|楔子|引子|尾声|尾聲|后记|後記|番外)[^\n。！？!?]{0,40}"
    r"|(?:chapter|part|book)\s+(?:\d{1,4}|[ivxlcdm]{1,8}|[a-z]+)\b[^\n]{0,60}"
    r"|(?:prologue|epilogue)\b[^\n]{0,60}"
    r")[ \t\u3000]*\r?$",
    re.IGNORECASE | re.MULTILINE,
)
"""The heading of a chapter, on a line of its own."""
PARAGRAPH = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)+|[^\r\n]+")
SENTENCE = re.compile(r".*?(?:[。！？!?…]|\.(?=[\s\"'”’)\]]))[”’」』）\"')\]]*\s*|.+", re.DOTALL)
CHINESE = re.compile(r"[\u3400-\u9fff]")
SIZES = {True: 1000, False: 3000}
"""Characters of a passage in Chinese, and in other scripts: two of them and a question are below 2,048 tokens."""
INSTRUCTIONS = {True: "续写下面的小说片段。", False: "Continue the story from this passage."}
NEXT = "see them: qwen-lit inspect --config CONFIG.yaml --data.dataset_path"


def chapters(text: str) -> list[str]:
    """The text at each heading; joined, they are the text. What stands before the first heading goes with it."""
    starts = [found.start() for found in HEADING.finditer(text)]
    cuts = [0, *(start for start in starts[1:]), len(text)]
    return [text[begin:end] for begin, end in zip(cuts, cuts[1:], strict=False) if end > begin]


def pieces(text: str, size: int) -> Iterator[str]:
    """Paragraphs; one of more than ``size`` characters in sentences, and one of those in parts. Joined, the text."""
    for paragraph in PARAGRAPH.findall(text):
        if len(paragraph) <= size:
            yield paragraph
            continue
        for sentence in SENTENCE.findall(paragraph):
            yield from (sentence[at : at + size] for at in range(0, len(sentence), size))


def continuations(text: str, passage: int, length: int) -> list[tuple[str, str]]:
    """What precedes, and what follows it: every part of a chapter but its first follows once.

    Args:
        text: of a chapter.
        passage: most characters that precede.
        length: most characters that follow.

    Returns:
        Nothing where the chapter has one sentence alone.
    """
    parts = list(pieces(text, min(passage, length)))
    filled = [number for number, part in enumerate(parts) if part.strip()]
    if len(filled) < 2:
        return []
    # A chapter that is shorter than a passage is halved; a heading alone does not precede.
    most = min(passage, len(text) // 2)
    first = min(max(_upto(parts, 0, most), filled[0] + 1 + (len(filled) > 2)), filled[-1])
    found = []
    begin = first
    while begin < len(parts):
        end = _upto(parts, begin, length)
        if end > filled[-1]:
            end = len(parts)
        start, size = begin, 0
        while start > 0 and size + len(parts[start - 1]) <= passage:
            start -= 1
            size += len(parts[start])
        start = 0 if begin == first else min(start, begin - 1)
        before, after = "".join(parts[start:begin]).strip("\r\n"), "".join(parts[begin:end]).strip("\r\n")
        found.append((before, after))
        begin = end
    return found


def _upto(parts: list[str], begin: int, size: int) -> int:
    """The number after the last part that fits; at least one that is not blank is taken."""
    end, taken = begin, 0
    while end < len(parts) and (taken + len(parts[end]) <= size or not "".join(parts[begin:end]).strip()):
        taken += len(parts[end])
        end += 1
    return end


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        DataError: it is none, is empty, or is not UTF-8.
    """
    if not path.is_file():
        raise DataError(f"no such file: {path}; give a .txt file.")
    if kind_of(path) not in TEXTS:
        raise DataError(f"{path}: is no text file; give a .txt or .md file.")
    found = [row.content for row in read_rows(path)]
    if any(isinstance(one, RowError) for one in found):
        raise DataError(f"{path}: holds no text.")
    if not all(isinstance(one, Passage) for one in found):
        raise DataError(f"{path}: holds rows already; give it as data.dataset_path.")
    return "".join(one.text for one in found)


def rows_of(text: str, passage: int | None, length: int | None, instruction: str | None, apart: bool) -> list[dict]:
    """The rows of a text; a chapter that is too short to be split goes with the next one.

    Args:
        text: whole.
        passage: most characters of ``input``; None chooses by the script.
        length: most characters of ``output``; None chooses by the script.
        instruction: of each row; None chooses by the script.
        apart: whether no row goes over from one chapter into the next.
    """
    chinese = len(CHINESE.findall(text)) > len(text) / 10
    passage, length = passage or SIZES[chinese], length or SIZES[chinese]
    instruction = INSTRUCTIONS[chinese] if instruction is None else instruction
    found: list[tuple[str, str]] = []
    waiting = ""
    parts = chapters(text) if apart else [text]
    for number, chapter in enumerate(parts):
        whole = waiting + chapter
        made = continuations(whole, passage, length)
        waiting = whole if not made else ""
        if not made and number == len(parts) - 1 and found:
            # Nothing follows the last one: it ends the chapter before.
            found[-1] = (found[-1][0], found[-1][1] + "\n" + whole.strip("\r\n"))
        found += made
    return [{"instruction": instruction, "input": before, "output": after} for before, after in found]


def main(args: list[str]) -> int:
    """Split texts into JSONL rows that continue them: each passage is the answer to the one before it.

    No text is lost: every passage is an answer once, but for the first of each chapter, which is only continued.
    """
    parser = argparse.ArgumentParser(prog="qwen-lit data", description="Make rows of other data.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="split")
    one = commands.add_parser(
        "split", help="Cut a novel into rows that continue it.", description=main.__doc__, allow_abbrev=False
    )
    one.add_argument("files", nargs="+", metavar="novel.txt", help="text in UTF-8")
    one.add_argument("--output", help="JSONL to write; default: the first file's name with .jsonl")
    one.add_argument("--passage", type=_size, help="most characters before; default: 1000 in Chinese, else 3000")
    one.add_argument("--length", type=_size, help="most characters that follow; default: likewise")
    one.add_argument("--instruction", help=f"of each row; default: {INSTRUCTIONS[True]} or {INSTRUCTIONS[False]}")
    one.add_argument("--join-chapters", action="store_true", help="let rows go over from one chapter into the next")
    given = parser.parse_args(args)
    files = [Path(expanded(one)) for one in given.files]
    target = Path(expanded(given.output)) if given.output else _beside(files[0])
    try:
        if target.exists():
            raise DataError(f"{target} is there already; give another --output.")
        rows = [
            row
            for file in files
            for row in rows_of(read(file), given.passage, given.length, given.instruction, not given.join_chapters)
        ]
        if not rows:
            raise DataError(f"{', '.join(given.files)}: a single sentence, which nothing follows; train it as it is.")
        target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write to {target} ({error.strerror or error}); give another --output.", file=sys.stderr)
        return 2
    sizes = [len(row["input"]) + len(row["output"]) for row in rows]
    print(f"{target}: {len(rows):,} rows of {sum(sizes) // len(rows):,} characters, the longest {max(sizes):,}")
    print(f"{NEXT} {target}")
    return 0


def _beside(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".zst")).with_suffix(".jsonl")


def _size(text: str) -> int:
    number = int(text)
    if number < 20:
        raise argparse.ArgumentTypeError(f"{text}: give at least 20 characters")
    return number
