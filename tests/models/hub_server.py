"""A server that stands in for the Hugging Face hub: repositories that are folders here.

Uploads need the token TOKEN, and change the folders when they are committed.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_thetokenthatmaywrite"


class _Handler(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub when it downloads: the list of files, and files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, whole):
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path))
        listed = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/revision/\w+|/tree/\w+)?", path)
        file = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path)
        if listed and (folder := self.server.root / listed[1]).is_dir():
            names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))
            if (listed[2] or "").startswith("/tree"):
                found = [
                    {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": n}
                    for n in names
                ]
            else:
                found = {
                    "id": listed[1],
                    "modelId": listed[1],
                    "sha": COMMIT,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [{"rfilename": name} for name in names],
                }
            return self._send(200, json.dumps(found).encode(), whole)
        if file and (place := self.server.root / file[1] / file[2]).is_file():
            return self._send(200, place.read_bytes(), whole)
        inside = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/\w+/.+", path)
        there = file or (inside and (self.server.root / inside[1]).is_dir())
        headers = {"X-Error-Code": "EntryNotFound" if there else "RepoNotFound"}
        return self._send(404, b"{}", whole, headers)

    def do_POST(self):
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._send(401, b'{"error": "Invalid credentials"}', True)
        if path == "/api/validate-yaml":
            return self._send(200, b'{"errors": [], "warnings": []}', True)
        if path == "/api/repos/create":
            given = json.loads(body)
            name = (
                given["name"]
                if "/" in given["name"]
                else f"{given['organization']}/{given['name']}"
            )
            if name.startswith("others/"):
                return self._send(403, b'{"error": "You may not write to others"}', True)
            place = self.server.root / name
            found = json.dumps({"url": f"{self._origin()}/{name}", "name": name}).encode()
            if place.is_dir():
                return self._send(409, found, True)
            place.mkdir(parents=True)
            # the key depends on the library's version
            self.server.private[name] = given.get("private") or given.get("visibility") == "private"
            return self._send(200, found, True)
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", path):
            # As on the hub, files of text are parts of the commit, others are objects of their own.
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._send(200, json.dumps({"files": files}).encode(), True)
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self._origin()}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            found = {"transfer": "basic", "objects": objects}
            return self._send(200, json.dumps(found).encode(), True)
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", path):
            self._commit(self.server.root / match[1], map(json.loads, body.splitlines()))
            found = {
                "commitUrl": f"{self._origin()}/{match[1]}/commit/{COMMIT}",
                "commitOid": COMMIT,
            }
            return self._send(200, json.dumps(found).encode(), True)
        return self._send(404, b"{}", True)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self._send(200, b"", True)

    def _origin(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def _commit(self, folder, operations):
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                (folder / value["path"]).write_bytes(self.server.objects[value["oid"]])
            elif operation["key"] == "deletedFile":
                (folder / value["path"]).unlink()

    def _send(self, status, content, whole, headers=None):
        first = 0
        if status == 200 and (given := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")):
            first, status = int(given[1]), 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", '"' + hashlib.sha256(content).hexdigest() + '"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if whole:
            self.wfile.write(content[first:])


@contextmanager
def hub(root):
    """Serves the repositories in `root`, root/owner/name; gives the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.root, server.asked = root, []
    server.private, server.objects = {}, {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_with(server, cache, code, **environment):
    """Runs Python code in a process of its own: huggingface_hub reads its settings at import."""
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "no_proxy": "*",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stdout.strip(), done.stderr
