"""The configurations that ship with the package, and ``configs``, which writes them out."""

import argparse
import shutil
import sys
from pathlib import Path

from qwen_lit.names import expanded


def configs() -> Path:
    """The folder of the shipped configurations, in an installed package or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def main(args: list[str]) -> int:
    """Write the shipped configurations into a folder; a file that is there stays as it is."""
    parser = argparse.ArgumentParser(prog="qwen-lit configs", description=main.__doc__)
    parser.add_argument("folder", nargs="?", default="configs", help="default: configs")
    folder = Path(expanded(parser.parse_args(args).folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in sorted(configs().glob("*.yaml")):
            target = folder / source.name
            if target.exists():
                print(f"{target} is there already")
            else:
                shutil.copyfile(source, target)
                print(f"{target} written")
    except OSError as error:
        print(f"error: cannot write to {folder} ({error.strerror or error}); give another folder.", file=sys.stderr)
        return 2
    return 0
