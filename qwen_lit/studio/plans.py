"""What ``plan --json`` has printed, as the page shows it."""

import json
from typing import Any

GIB = 2**30
LISTED = (
    "steps",
    "tokens_per_step",
    "engine",
    "weights_gib",
    "disk_gb",
    "export_ram_gib",
    "device",
    "measured_peak_gib",
    "tokens_per_second",
    "share_of_limit",
    "run_seconds",
)
"""Figures that are listed, where the plan has them."""


def read_plan(output: str) -> dict[str, Any] | None:
    """The plan; None where nothing whole was printed.

    Args:
        output: of the command.
    """
    try:
        found = json.loads(output)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def budgets(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The plan for each card: one that was asked for or measured, or several usual ones."""
    listed = plan.get("plans")
    if isinstance(listed, list) and listed:
        return listed
    return [{**plan, "fits": True}] if "budget_gib" in plan else []


def parts(of_card: dict[str, Any]) -> dict[str, float]:
    """GiB of the estimate by what takes them, with what is left of the budget under an empty name.

    Args:
        of_card: one of ``budgets``.
    """
    explained = of_card.get("explained")
    table = explained["parts_bytes"] if isinstance(explained, dict) else {}
    found = {str(name): value / GIB for name, value in table.items() if value > 0}
    left = of_card["budget_gib"] - sum(found.values())
    return {**found, "": left} if found and left > 0 else found
