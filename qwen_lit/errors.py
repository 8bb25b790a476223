"""What ends a command: what the user can fix, and what the work found wrong."""

from typing import Any

LONGEST = 200
"""Characters of a value in a message."""


class UserError(Exception):
    """Bad usage or input. The message names the thing, the value and the remedy; the command exits with 2."""


class RunError(Exception):
    """The work found something wrong. The message says what, and what is safe; the command exits with 1."""


def refuse_changes(changes: dict[str, tuple[Any, Any]]) -> None:
    """Refuse to resume a run as another one.

    Args:
        changes: key to its value in the checkpoint and its value now.

    Raises:
        UserError: there is a change.
    """
    if changes:
        lines = "".join(f"\n  {key}: {then} in the checkpoint, {now} now" for key, (then, now) in changes.items())
        raise UserError(
            f"the checkpoint is of another run:{lines}\n"
            "Give what that run began with, or another output_dir to start a new one."
        )


def shortened(text: str, longest: int = LONGEST) -> str:
    """Text that may be long, such as a file's content, as far as a line has room."""
    return text if len(text) <= longest else text[:longest] + " ..."
