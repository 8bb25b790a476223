"""What an export has left: the verdict on the merges, and the commands that serve them."""

import re
from pathlib import Path

from qwen_lit.studio.curves import Curve

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
VERDICT = re.compile(r"^verdict/(\w+?)_(loss|kl|same_top)$")


def verdict(curves: dict[str, Curve]) -> list[dict[str, str]]:
    """A line for the adapter and for each merge: what was measured last on held-out rows.

    Args:
        curves: of the run.
    """
    found: dict[str, dict[str, str]] = {}
    for name, points in curves.items():
        match = VERDICT.match(name)
        if match and points:
            value = points[-1][1]
            text = f"{value:.2%}" if match[2] == "same_top" else f"{value:.5f}"
            found.setdefault(match[1], {"name": match[1]})[match[2]] = text
    return list(found.values())


def serving(folder: Path) -> list[str]:
    """The shell commands that the card of an exported folder gives."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    return [one.strip() for one in BLOCK.findall(card)]


def written(folder: Path) -> list[tuple[str, int]]:
    """The files of an exported folder with their bytes."""
    return [(one.name, one.stat().st_size) for one in sorted(folder.glob("*")) if one.is_file()]
