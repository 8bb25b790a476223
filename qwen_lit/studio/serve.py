"""The page's server: NiceGUI behind the guard, on a socket that is bound."""

import socket

import uvicorn
from fastapi import FastAPI
from nicegui import ui

from qwen_lit.studio.curves import Curves
from qwen_lit.studio.folders import Folders
from qwen_lit.studio.guard import Application, Guard
from qwen_lit.studio.jobs import Jobs
from qwen_lit.studio.page import build
from qwen_lit.studio.studio import Studio


def serve(folders: Folders, listening: socket.socket, host: str, token: str | None) -> None:
    """Serve until Ctrl-C.

    Args:
        folders: that the page may read and write.
        listening: the bound socket.
        host: the address of it, as it was given.
        token: what a browser must show; None asks for none.
    """
    studio = Studio(folders, Jobs(folders.home / "jobs", folders.roots[0]), Curves())
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    build(studio)
    ui.run_with(app, title="qwen-lit studio", dark=None, reconnect_timeout=10)
    guarded: Application = Guard(app, host, token)  # type: ignore[arg-type]
    config = uvicorn.Config(guarded, log_level="warning", server_header=False, timeout_graceful_shutdown=1)  # type: ignore[arg-type]
    uvicorn.Server(config).run(sockets=[listening])
