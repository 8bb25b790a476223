"""Bytes that should be UTF-8 text: what they are in all likelihood instead, and how to make UTF-8 of them."""

import shlex

from qwen_lit.data.faults import DataError, snippet

ENCODINGS = ("gb18030", "big5", "cp1252")
COMMON = frozenset(
    "的一是不了人我在有他这這个個上们們来來到时時大地为為子中你说說生国國年着著就那和要她出也得里裡后後自以会會家可下而过過天去能"
    "对對小多然于於心学學么麼之都好看起发發当當没沒成只如事把还還用第样樣道想作种種开開问問回答好您吗嗎"
)
"""Characters of which any Chinese text has many; bytes read in a wrong encoding have few."""
SAMPLE = 4096
"""Bytes that are looked at."""


def likely_encoding(raw: bytes) -> str:
    """The encoding of bytes that are not UTF-8, as far as it can be told."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or raw[:SAMPLE].count(0) > len(raw[:SAMPLE]) // 5:
        return "utf-16"
    found = {name: text for name in ENCODINGS if (text := _decoded(raw, name)) is not None}
    # Nearly every byte pair is a character in several of them; the first of those that read alike is the commonest.
    return max(found, key=lambda name: sum(map(COMMON.__contains__, found[name])), default="another encoding")


def _decoded(raw: bytes, name: str) -> str | None:
    # A sample may end within a character.
    for end in (0, 1, 2, 3) if len(raw) > SAMPLE else (0,):
        try:
            return raw[: SAMPLE - end].decode(name)
        except UnicodeError:
            continue
    return None


def not_utf8(path: str, raw: bytes, where: str, spreadsheet: bool = False) -> DataError:
    """Why a file of text cannot be read, with the command that changes its encoding.

    Args:
        path: of the file.
        raw: some of its bytes, from the first wrong line or before it.
        where: the place of the wrong byte, such as "at byte 17".
        spreadsheet: whether Excel may have written it.
    """
    name = likely_encoding(raw)
    if name == "another encoding" or (b"\0" in raw and name != "utf-16"):
        return DataError(f"{path}: is not text ({snippet(raw[:40])}); give a text file in UTF-8.")
    out = path + ".utf8" if "." not in path.rpartition("/")[2] else "{0}-utf8.{2}".format(*path.rpartition("."))
    save = "in Excel, save it as 'CSV UTF-8', or run" if spreadsheet else "make it UTF-8"
    return DataError(
        f"{path}: is not UTF-8 {where}, likely {name}; {save}: iconv -f {name} -t utf-8 {shlex.quote(path)} > "
        f"{shlex.quote(out)}"
    )
