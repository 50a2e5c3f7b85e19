"""A small Hugging Face Hub on loopback: real files over the endpoints that huggingface_hub uses, and what can go wrong.

Point a process at it with `HF_ENDPOINT`, which huggingface_hub reads when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "t0ken" * 6  # of these tests alone
LARGE = 4096
"""Bytes from which a file is stored as LFS stores it, under its SHA-256."""


@dataclass
class Repository:
    """Files by commit, and branches."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit on a branch: the files of the last one, and these."""
        before = self.commits.get(self.branches.get(branch, ""), {})
        now = {**before, **files}
        text = repr((len(self.commits), sorted((name, hashlib.sha1(data).hexdigest()) for name, data in now.items())))
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = now
        self.branches[branch] = name
        return name

    def find(self, revision: str) -> str | None:
        """The commit of a branch, or itself."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Methods and paths."""
    cut: set[str] = field(default_factory=set)
    """Names of files whose next download breaks in the middle, once."""
    damage: set[str] = field(default_factory=set)
    """Names of files that come with other bytes than their hash says."""
    uploads: dict[str, bytes] = field(default_factory=dict)
    """Large files on their way, by SHA-256."""
    after: Any = None
    """Called with the path after each file that went out."""


def hash_of(data: bytes) -> str:
    """What the Hub calls a file by."""
    if len(data) >= LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing: tests read `asked`."""

    def _answer(self, status: int, body: bytes | Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("Content_Length", str(len(data)))) if (
            "Content_Length" not in headers
        ) else None
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refused(self, code: str, status: int) -> None:
        self._answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or (found.private and not known):
            self._refused("RepoNotFound", 404 if known else 401)
            return None
        if found.gated and not known:
            self._refused("GatedRepo", 403)
            return None
        return found

    def do_HEAD(self) -> None:
        """As GET."""
        self.do_GET()

    def do_GET(self) -> None:
        """Files, and what a repository is."""
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)", path)
        if found is not None:
            self._file(*found.groups())
            return
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        if found is not None:
            repository = self._repository(found[1])
            if repository is not None:
                commit = repository.find(found[2] or "main")
                files = repository.commits.get(commit or "", {})
                facts = {"id": found[1], "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                self._answer(200, {**facts, "private": repository.private, "tags": [], "downloads": 0, "likes": 0})
            return
        if path == "/api/whoami-v2":
            self._answer(200, {"name": "user", "type": "user", "orgs": []})
            return
        self._answer(404, {"error": "unknown"})

    def _file(self, name: str, revision: str, file: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        commit = repository.find(revision)
        if commit is None:
            self._refused("RevisionNotFound", 404)
            return
        data = repository.commits[commit].get(file)
        if data is None:
            self._answer(404, {"error": "none"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        headers = {"ETag": f'"{hash_of(data)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if len(data) >= LARGE:
            headers |= {"X_Linked_Etag": f'"{hash_of(data)}"', "X_Linked_Size": str(len(data))}
        if file in self.hub.damage:
            data = bytes([data[0] ^ 1]) + data[1:]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and file in self.hub.cut:
            self.hub.cut.discard(file)
            self.send_response(206 if start else 200)
            for key, value in {**headers, "Content_Length": str(len(data) - start)}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self._answer(206 if start else 200, data[start:], **headers)
        if self.command == "GET" and self.hub.after is not None:
            self.hub.after(file)

    def do_POST(self) -> None:
        """A repository is made, files are announced, and committed."""
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if name in self.hub.repositories:
                self._answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
                return
            self.hub.repositories[name] = Repository(
                private="private" in (asked.get("visibility"), asked.get("private") and "private")
            )
            self.hub.repositories[name].commit({".gitattributes": b"*.data filter=lfs\n"})
            self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            modes = ["lfs" if one["size"] >= LARGE else "regular" for one in files]
            told = [
                {"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for one, mode in zip(files, modes, strict=True)
            ]
            self._answer(200, {"files": told})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            files, lines = {}, [json.loads(line) for line in body.splitlines() if line.strip()]
            for line in lines:
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    files[line["value"]["path"]] = self.hub.uploads[line["value"]["oid"]]
            commit = self.hub.repositories[found[1]].commit(files)
            told = {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{found[1]}/commit/{commit}"}
            self._answer(200, {**told, "pullRequestUrl": None})
        else:
            self._answer(404, {"error": "unknown"})

    def do_PUT(self) -> None:
        """A large file comes."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.uploads[hashlib.sha256(data).hexdigest()] = data
        self.hub.asked.append((self.command, self.path))
        self._answer(200)


@contextmanager
def small_hub() -> Iterator[Hub]:
    """A Hub without repositories."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
