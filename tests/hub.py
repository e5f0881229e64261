"""A server on this machine that speaks as much of the hub's API as an upload needs: repositories, LFS, commits."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_thisIsNotARealTokenButMustNeverBePrinted"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Store(BaseHTTPRequestHandler):
    """Repositories of `user`. A file ending in .safetensors or .gguf goes by LFS, as on the hub.

    Attributes:
        repositories: name to path to content, as committed.
        objects: LFS objects that have arrived, by their sha256, committed or not.
        fails: part of a request's path to what happens to it: a status, or "drop" to close the connection.
    """

    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, bytes]]
    objects: dict[str, bytes]
    commits: list[dict[str, Any]]
    asked: list[str]
    fails: dict[str, int | str]

    def do_HEAD(self) -> None:
        self.handle_one()

    def do_GET(self) -> None:
        self.handle_one()

    def do_POST(self) -> None:
        self.handle_one()

    def do_PUT(self) -> None:
        self.handle_one()

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        for part, failure in self.fails.items():
            if part in path:
                if failure == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return None
                return self.answer(int(failure), b'{"error": "so configured"}')
        if path.startswith("/objects/"):  # as on the hub, the address itself is the permission
            oid = path.rpartition("/")[2]
            if hashlib.sha256(body).hexdigest() != oid:
                return self.answer(422, b"{}")
            self.objects[oid] = body
            return self.answer(200, b"")
        if path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            wrong = [name for name in ("library_name", "license", "base_model", "pipeline_tag")
                     if not isinstance(head.get(name, ""), str)]
            errors = [{"message": f'"{name}" must be a string'} for name in wrong]
            return self.answer(400 if wrong else 200, self.json(errors=errors, warnings=[]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, b'{"error": "Invalid username or password."}')
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if not name.startswith("user/"):
                return self.answer(403, b'{"error": "You have no rights there."}')
            known = name in self.repositories
            self.repositories.setdefault(name, {})
            return self.answer(409 if known else 200, self.json(url=f"{self.address}/{name}"))
        if found := re.fullmatch(r"/(?:api/models/)?(user/[^/]+?)(?:\.git)?/(.+)", path):
            return self.repository(*found.groups(), body)
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def repository(self, name: str, what: str, body: bytes) -> None:
        if name not in self.repositories:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = self.repositories[name]
        if what.startswith("preupload/"):
            large = (".safetensors", ".gguf")
            modes = [{"path": file["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if file["path"].endswith(large) else "regular"}
                     for file in json.loads(body)["files"]]
            return self.answer(200, self.json(files=modes))
        if what == "info/lfs/objects/batch":
            objects = [entry | ({} if entry["oid"] in self.objects else {"actions": {"upload": {
                "href": f"{self.address}/objects/{entry['oid']}", "header": {}}}})
                for entry in json.loads(body)["objects"]]
            return self.answer(200, self.json(transfer="basic", objects=objects))
        if what.startswith("commit/"):
            added = {}
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    added[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    added[value["path"]] = self.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            self.commits.append(lines[0]["value"] | {"files": sorted(added)})
            files |= added
            return self.answer(200, self.json(commitUrl=f"{self.address}/{name}/commit/{COMMIT}", commitOid=COMMIT))
        if what.startswith("tree/"):
            return self.answer(200, json.dumps([
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()]).encode())
        if what.startswith("resolve/"):
            content = files.get(what.split("/", 2)[2])
            if content is None:
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            digest = hashlib.sha1(content).hexdigest()
            return self.answer(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
        return self.answer(404, b"{}")

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]

    @staticmethod
    def json(**content: Any) -> bytes:
        return json.dumps(content).encode()

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[type[Store]]:
    """A server of its own, with nothing in it; `Store.port` says where."""
    kind = type("OneStore", (Store,), {"repositories": {}, "objects": {}, "commits": [], "asked": [], "fails": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    kind.port = server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield kind
    finally:
        server.shutdown()
        server.server_close()
