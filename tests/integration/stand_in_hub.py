"""As much of the hub as uploading a model and loading it again asks for, on this machine.

It holds every commit as files by name and keeps nothing on disk. What needs a token is refused
without one, an upload whose bytes are not those that its hash promises is too, and a commit may
only name large files that have arrived.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_stand_in"

_ROUTES = {
    ("POST", r"/api/repos/create"): "create",
    ("POST", r"/api/validate-yaml"): "validate",
    ("POST", r"/api/models/(.+)/preupload/main"): "sort",
    ("POST", r"/(.+)\.git/info/lfs/objects/batch"): "ask_for_uploads",
    ("PUT", r"/large/(\w+)"): "take_large",
    ("POST", r"/api/models/(.+)/commit/main"): "commit",
    ("GET", r"/api/models/(.+)/tree/([^/]+)(?:/(.+))?"): "tree",
    ("GET", r"/api/models/(.+?)(?:/revision/([^/]+))?"): "describe",
    ("HEAD", r"/(.+)/resolve/([^/]+)/(.+)"): "file",
    ("GET", r"/(.+)/resolve/([^/]+)/(.+)"): "file",
}


class Hub(ThreadingHTTPServer):
    """Serve repositories; `repos` holds their files by name, `large` what came by its hash."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.large = {}, {}

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve():
    """Run a hub for as long as the context lasts."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _route(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        writes = self.command in ("POST", "PUT") and "/large/" not in path
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._fail(401, "RepoNotFound", "Invalid username or password.")
        for (command, pattern), name in _ROUTES.items():
            if command == self.command and (match := re.fullmatch(pattern, path)):
                return getattr(self, f"_{name}")(*match.groups())
        return self._fail(404, "NotImplemented", f"the stand-in knows no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = _route

    def _create(self):
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        self.server.repos.setdefault(name, {})
        self._answer({"url": f"{self.server.address}/{name}", "name": name})

    def _validate(self):
        self._answer({"errors": [], "warnings": []})

    def _sort(self, repo):
        files = json.loads(self.body)["files"]
        self._answer({"files": [{"path": f["path"], **_mode(f["path"])} for f in files]})

    def _ask_for_uploads(self, repo):
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            wanted["actions"] = {"upload": {"href": f"{self.server.address}/large/{wanted['oid']}"}}
        self._answer({"transfer": "basic", "objects": objects})

    def _take_large(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._fail(400, "BadRequest", "these bytes have another hash")
        self.server.large[oid] = self.body
        return self._answer({})

    def _commit(self, repo):
        files = {}
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.large:
                    return self._fail(400, "BadRequest", f"{value['path']} has not arrived")
                files[value["path"]] = self.server.large[value["oid"]]
        self.server.repos[repo] |= files
        sha = _sha(self.server.repos[repo])
        url = f"{self.server.address}/{repo}/commit/{sha}"
        return self._answer({"commitUrl": url, "commitOid": sha})

    def _describe(self, repo, revision):
        if (files := self._files(repo)) is not None:
            siblings = [{"rfilename": path} for path in files]
            self._answer({"id": repo, "sha": _sha(files), "siblings": siblings})

    def _tree(self, repo, revision, folder):
        if (files := self._files(repo)) is None:
            return
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": _hash(data)}
            for path, data in files.items()
            if folder is None or path.startswith(f"{folder}/")
        ]
        if folder is not None and not entries:
            self._fail(404, "EntryNotFound", f"{folder} is not there")
            return
        self._answer(entries)

    def _file(self, repo, revision, path):
        if (files := self._files(repo)) is None:
            return
        if path not in files:
            self._fail(404, "EntryNotFound", f"{path} is not there")
            return
        headers = {"ETag": f'"{_hash(files[path])}"', "X-Repo-Commit": _sha(files)}
        self._send(200, files[path], headers)

    def _files(self, repo):
        if repo not in self.server.repos:
            self._fail(404, "RepoNotFound", f"{repo} is not there")
        return self.server.repos.get(repo)

    def _answer(self, document):
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _fail(self, status, code, message):
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status, data, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _mode(path):
    large = path.endswith((".safetensors", ".bin"))
    return {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}


def _hash(data):
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _sha(files):
    """Return the name of what a repository holds, as a commit has one."""
    return _hash(repr([(path, _hash(data)) for path, data in sorted(files.items())]).encode())
