"""``qwen-lit studio``: a page on this machine that shows what the commands do, and starts them."""

import argparse
import socket
import sys
from importlib.util import find_spec

from qwen_lit.errors import UserError
from qwen_lit.studio.folders import Folders
from qwen_lit.studio.guard import LOOPBACK, new_token

INSTALL = "error: the page needs NiceGUI, which is not installed; pip install 'qwen_lit[studio]'"


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="qwen-lit studio",
        description="Open a local page: data, plan, run, chat and export without a terminal.",
        allow_abbrev=False,
    )
    found.add_argument(
        "--folder",
        action="append",
        help="a folder that the page may read and write, with all in it; give it again for more (the current one)",
    )
    found.add_argument("--port", type=int, default=7860, help="of the page (7860); 0 takes a free one")
    found.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (127.0.0.1); another one asks for a printed token"
    )
    return found


def main(args: list[str]) -> int:
    """Serve the page until Ctrl-C; runs that were started on it go on."""
    given = parser().parse_args(args)
    if find_spec("nicegui") is None:
        print(INSTALL, file=sys.stderr)
        return 2
    try:
        folders = Folders(given.folder or ["."])
        listening = listen(given.host, given.port)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    token = None if given.host in LOOPBACK else new_token()
    port = listening.getsockname()[1]
    host = f"[{given.host}]" if ":" in given.host else given.host
    print(f"studio: http://{host}:{port}/{f'?token={token}' if token else ''}", flush=True)
    if token:
        print("studio: whoever has this address can use the page; it is not encrypted", flush=True)
    print("Ctrl-C ends the page; runs go on", flush=True)
    from qwen_lit.studio.serve import serve

    serve(folders, listening, given.host, token)
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, at which a browser that comes before the page is loaded waits.

    Raises:
        UserError: it cannot be.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen()
    except (OSError, OverflowError) as error:
        found.close()
        raise UserError(f"--port: cannot listen on {host}:{port} ({error}); give another, or 0.") from error
    return found
