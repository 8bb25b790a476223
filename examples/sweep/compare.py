"""The runs of a sweep, best first: python examples/sweep/compare.py output/sweep/*/summary.json"""

import json
import sys
from pathlib import Path


def main(paths: list[str]) -> int:
    """Print one line for each summary, the lowest validation loss first."""
    runs = []
    for path in map(Path, paths):
        summary = json.loads(path.read_text(encoding="utf-8"))
        model = summary["config"]["model"]
        lora = model["lora_config"]
        curve = [loss for _, loss in summary["history"].get("val_loss", [])]
        lowest = min(curve, default=float("nan"))
        runs.append((lowest, model["learning_rate"], lora["r"], lora["lora_alpha"], path.parent.name))
    print(f"{'val loss':>9} {'lr':>8} {'r':>4} {'alpha':>6}  run")
    for lowest, rate, r, alpha, name in sorted(runs):
        print(f"{lowest:9.4f} {rate:8g} {r:4} {alpha:6}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
