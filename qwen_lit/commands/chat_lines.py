"""``qwen-lit chat PATH --json``: a conversation as JSON objects, a line each, for a program that asks."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from qwen_lit.errors import shortened

if TYPE_CHECKING:
    from qwen_lit.commands.conversation import Chat


def converse(chat: Chat) -> int:
    """Answer each line of stdin until it ends: ``{"ask": QUESTION}`` or ``{"command": "/reset"}``.

    An answer is lines ``{"piece": TEXT}`` and then ``{"end": {"cut": BOOL}}``; what a command says, or what is wrong,
    is ``{"said": TEXT}`` or ``{"error": TEXT}``. Ctrl-C ends an answer early.
    """
    while True:
        try:
            line = sys.stdin.readline()
            if not line:
                return 0
            asked = json.loads(line)
            if "command" in asked:
                said = chat.command(asked["command"])
                if said is None:
                    return 0
                tell(said=said)
            else:
                answer(chat, asked["ask"])
        except KeyboardInterrupt:
            # Between two answers there is nothing to stop.
            continue
        except (ValueError, KeyError, TypeError):
            tell(error='not a line as {"ask": TEXT} or {"command": TEXT}')


def answer(chat: Chat, question: str) -> None:
    """One answer, piece by piece."""
    pieces = chat.ask(question)
    stopped = False
    try:
        for piece in pieces:
            if piece:
                tell(piece=piece)
    except KeyboardInterrupt:
        stopped = True
    except Exception as error:
        tell(error=f"{type(error).__name__}: {shortened(' '.join(str(error).split()))}")
        return
    finally:
        pieces.close()  # type: ignore[attr-defined]
    tell(end={"cut": chat.cut, "stopped": stopped})


def tell(**what: object) -> None:
    """Write one line."""
    print(json.dumps(what, ensure_ascii=False), flush=True)
