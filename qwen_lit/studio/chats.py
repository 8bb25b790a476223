"""Conversations on the page: each is a process of ``qwen-lit chat --json``."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from qwen_lit.errors import UserError

ENDED = "the conversation has ended"


class Talk:
    """A conversation with one model; its process ends with the page, as it holds nothing that is not shown."""

    def __init__(self, path: Path) -> None:
        """Nothing is started yet.

        Args:
            path: an output folder, or an adapter or a merged model in it.
        """
        self.path, self.told = path, ""
        self.process: asyncio.subprocess.Process | None = None
        self.busy = False
        self.thinks = False
        """Whether the model can think first."""

    def arguments(self, system: str = "") -> list[str]:
        """Of the command line."""
        return ["chat", str(self.path), "--json", *(["--system", system] if system else [])]

    async def start(self) -> None:
        """Load the model.

        Raises:
            UserError: it cannot be.
        """
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "qwen_lit",
            *self.arguments(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        first = await self._line()
        if "ready" not in first:
            assert self.process.stderr is not None
            said = (await self.process.stderr.read()).decode("utf-8", errors="replace").strip()
            await self.close()
            raise UserError(said.rpartition("error: ")[2] or ENDED)
        self.told, self.thinks = str(first["ready"]), bool(first["thinks"])
        # What it warns of while it answers must not fill the pipe.
        self.reader = asyncio.create_task(self._drain())

    async def ask(self, question: str) -> AsyncIterator[str]:
        """The answer, piece by piece.

        Raises:
            UserError: there is none.
        """
        self.busy = True
        try:
            await self._send(ask=question)
            while "end" not in (line := await self._line()):
                if "piece" not in line:
                    raise UserError(str(line.get("error", ENDED)))
                yield str(line["piece"])
        finally:
            self.busy = False

    async def command(self, text: str) -> str:
        """What one of the commands of ``chat`` says, such as ``/reset``.

        Raises:
            UserError: the process has ended.
        """
        await self._send(command=text)
        line = await self._line()
        if "said" not in line:
            raise UserError(str(line.get("error", ENDED)))
        return str(line["said"])

    def stop(self) -> None:
        """End the answer where it is."""
        if self.busy and self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal.SIGINT)

    async def close(self) -> None:
        """End the process."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def _send(self, **what: str) -> None:
        if self.process is None or self.process.stdin is None or self.process.returncode is not None:
            raise UserError(ENDED)
        self.process.stdin.write((json.dumps(what) + "\n").encode())
        await self.process.stdin.drain()

    async def _line(self) -> dict[str, Any]:
        """One object of its output; empty at the end."""
        assert self.process is not None and self.process.stdout is not None
        while line := await self.process.stdout.readline():
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                return found
        return {}

    async def _drain(self) -> None:
        assert self.process is not None and self.process.stderr is not None
        while await self.process.stderr.read(1 << 16):
            pass
