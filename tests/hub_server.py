"""A hub on this machine, which speaks as much of Hugging Face's and ModelScope's protocols as a download needs."""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class FakeHub(ThreadingHTTPServer):
    """Serves the files of a folder as a model; ``faults`` are words of an address, and what comes instead."""

    daemon_threads = True

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name = name
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.faults: dict[str, int | str] = {}
        self.asked: list[str] = []
        self.broken: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def commit(self) -> str:
        return digest("".join(map(digest, self.files.values())).encode())[:40]

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [
            one.rsplit("/", 1)[-1].rsplit("FilePath=", 1)[-1]
            for one in self.asked
            if one.startswith("GET") and ("/resolve/" in one or "FilePath=" in one)
        ]


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Nothing on the terminal."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        fault = next((what for words, what in self.server.faults.items() if words in self.path), None)
        if isinstance(fault, int):
            return self.json({"error": "no"}, fault)
        if fault == "gated":
            return self.json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        if fault == "silence":
            return threading.Event().wait(60)
        address = urlsplit(self.path)
        path, query, name, files = unquote(address.path), parse_qs(address.query), self.server.name, self.server.files
        commit = self.server.commit
        if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
            siblings = [{"rfilename": one, "size": len(content)} for one, content in files.items()]
            return self.json({"id": name, "sha": commit, "siblings": siblings})
        if path == f"/api/models/{name}/tree/{commit}":
            return self.json(
                [
                    {"type": "file", "path": one, "size": len(content), "oid": digest(content)[:40]}
                    for one, content in files.items()
                ]
            )
        if path == f"/api/v1/models/{name}/repo/files":
            listed = [
                {"Path": one, "Name": one, "Size": len(content), "Type": "blob", "Sha256": digest(content)}
                for one, content in files.items()
            ]
            return self.json({"Code": 200, "Success": True, "Data": {"Files": listed}})
        if path == f"/api/v1/models/{name}/repo":
            return self.content(files.get(query["FilePath"][0]), fault)
        if path.startswith(f"/{name}/resolve/"):
            return self.content(files.get(path.rsplit("/", 1)[-1]), fault)
        return self.json({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def content(self, content: bytes | None, fault: str | None) -> None:
        if content is None:
            return self.json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{digest(content)}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Content-Length", str(len(content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault == "break" or (fault == "break once" and self.path not in self.server.broken):
            self.server.broken.add(self.path)
            self.wfile.write(content[begin : begin + (len(content) - begin) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        for start in range(begin, len(content), 100_000 if fault == "slow" else len(content)):
            self.wfile.write(content[start : start + 100_000] if fault == "slow" else content[start:])
            time.sleep(0.5 if fault == "slow" else 0)
        return None

    def json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def serving(folder: Path, name: str) -> Iterator[FakeHub]:
    server = FakeHub(folder, name)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
