"""A hub of one dataset on this machine, in the place of the one that ``HF_ENDPOINT`` names, and questions to it."""

import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME, COMMIT = "someone/teas", "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "train.jsonl": b'{"question": "Q1", "answer": "A1"}\n{"question": "Q2", "answer": "A2"}\n',
    "test.jsonl": b'{"question": "Q3", "answer": "A3"}\n',
}


class Hub(BaseHTTPRequestHandler):
    def log_message(self, *given):
        pass

    def say(self, code, content, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        path, about = self.path.partition("?")[0], f"/api/datasets/{NAME}"
        file = path.removeprefix(f"/datasets/{NAME}/resolve/{COMMIT}/")
        if path in (about, f"{about}/revision/{COMMIT}"):
            told = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            self.say(200, json.dumps(told).encode())
        elif path == f"{about}/tree/{COMMIT}":
            oid = {name: hashlib.sha1(content).hexdigest() for name, content in FILES.items()}
            tree = [{"type": "file", "path": n, "size": len(FILES[n]), "oid": oid[n]} for n in FILES]
            self.say(200, json.dumps(tree).encode())
        elif file in FILES:
            tag = hashlib.sha1(FILES[file]).hexdigest()
            self.say(200, FILES[file], ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
        else:
            self.say(404, b"{}", X_Error_Code="EntryNotFound" if NAME in path else "RepoNotFound")

    do_HEAD = do_GET


def main(folder: Path) -> None:
    """Ask for each source on standard input; then once more without the hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    from qwen_lit.data.hub import fetch
    from qwen_lit.data.sources import Source, read_rows

    def ask(given):
        try:
            path = fetch(Source(**given), folder / "copies")
            return [[path.name, row.content] for row in read_rows(path)]
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    asked = json.load(sys.stdin)
    told = [ask(given) for given in asked]
    server.shutdown()
    server.server_close()
    print(json.dumps({"with": told, "without": [ask(given) for given in asked]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
