"""A small Hugging Face hub on loopback, for the real client of huggingface_hub, with faults that can be switched on.

It speaks what downloads and uploads of models ask for: facts of a repository, its tree, files with ETag and Range,
creation, preupload, LFS, branches and commits. Files of weights are LFS files, as on the hub.
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
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".onnx", ".data", ".bin")
TOKEN = "hf_loopback"


@dataclass
class Repo:
    """A repository: its commits, the commit of each branch, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    card: dict = field(default_factory=dict)

    def at(self, revision: str) -> str | None:
        """Commit hash of a branch or a commit hash, or None."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """The state of the hub.

    Attributes:
        url: Its address.
        repos: Repositories by name.
        requests: Method and path of each request.
        cuts: Name of a file -> for each of the next downloads the number of bytes after which the connection is cut.
        down: True answers every request with the status 503.
        blobs: LFS files that were uploaded, by sha256.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    down: bool = False
    blobs: dict[str, bytes] = field(default_factory=dict)

    def commit(self, name: str, files: dict[str, bytes] | Path, branch: str = "main", **facts) -> str:
        """Commit files to a repository, which is made if it is new. Returns the commit hash."""
        repo = self.repos.setdefault(name, Repo())
        for key, value in facts.items():
            setattr(repo, key, value)
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        before = repo.commits.get(repo.branches.get(branch, ""), {})
        text = json.dumps([name, len(repo.commits), sorted(files), branch])
        sha = hashlib.sha1(text.encode()).hexdigest()
        repo.commits[sha] = {**before, **files}
        repo.branches[branch] = sha
        return sha

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch."""
        repo = self.repos[name]
        return repo.commits[repo.branches[branch]]

    def downloads(self) -> list[str]:
        """Paths of the files that were downloaded."""
        return [path for method, path in self.requests if method == "GET" and "/resolve/" in path]


def environment(url: str, home: Path) -> dict[str, str]:
    """Environment of a process whose client of the hub asks a loopback hub and keeps its cache in a folder."""
    return {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers on a free port of loopback inside the block."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.requests.append((self.command, path))
        if self.state.down:
            self._json({"error": "down"}, 503)
            return
        for method, pattern, function in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                function(self, **found.groupdict())
                return
        self._json({"error": f"no route {self.command} {path}"}, 404)

    # Answers

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        self._bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})

    def _bytes(self, content: bytes, status: int, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _repo(self, name: str) -> Repo | None:
        """The repository, if the caller may know of it; else the answer has been given."""
        repo = self.state.repos.get(name)
        if repo is not None and (not repo.private or self._token() == TOKEN):
            return repo
        # As on the hub: without a token, absent and private repositories look alike.
        self._json(
            {"error": "Repository not found"},
            404 if self._token() else 401,
            **{"X-Error-Code": "RepoNotFound"},
        )
        return None

    def _commit(self, name: str, revision: str) -> tuple[Repo, str] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        sha = repo.at(revision)
        if sha is None:
            self._json({"error": "Invalid rev id"}, 404, **{"X-Error-Code": "RevisionNotFound"})
            return None
        return repo, sha

    # Reading

    def info(self, name: str, revision: str = "main") -> None:
        found = self._commit(name, revision or "main")
        if found is not None:
            repo, sha = found
            siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
            facts = {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": repo.private}
            self._json({**facts, "tags": [], "downloads": 0, "likes": 0, "cardData": repo.card})

    def tree(self, name: str, revision: str) -> None:
        found = self._commit(name, revision)
        if found is not None:
            repo, sha = found
            self._json([_entry(path, content) for path, content in sorted(repo.commits[sha].items())])

    def resolve(self, name: str, revision: str, file: str) -> None:
        found = self._commit(name, revision)
        if found is None:
            return
        repo, sha = found
        facts = {"X-Repo-Commit": sha}
        if repo.gated and self._token() != TOKEN:
            self._json({"error": "gated"}, 401, **facts, **{"X-Error-Code": "GatedRepo"})
            return
        content = repo.commits[sha].get(file)
        if content is None:
            self._json({"error": "no file"}, 404, **facts, **{"X-Error-Code": "EntryNotFound"})
            return
        entry = _entry(file, content)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        facts |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        status, part = 200, content
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked:
            start = int(asked[1])
            status, part = 206, content[start:]
            facts["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cuts = self.state.cuts.get(file) if self.command == "GET" else None
        self._bytes(part, status, facts, cuts.pop(0) if cuts else None)

    def who(self) -> None:
        if self._token() == TOKEN:
            self._json({"name": "acme", "type": "user", "orgs": []})
        else:
            self._json({"error": "Invalid credentials in Authorization header"}, 401)

    # Writing

    def _may_write(self) -> bool:
        if self._token() != TOKEN:
            self._json({"error": "Invalid username or password."}, 401)
            return False
        return True

    def create(self) -> None:
        if self._may_write():
            asked = json.loads(self.body)
            name = f"{asked.get('organization') or 'acme'}/{asked['name']}"
            facts = {"url": f"{self.state.url}/{name}", "name": name}
            if name in self.state.repos:
                self._json({**facts, "error": "You already created this model repo"}, 409)
                return
            self.state.commit(name, {".gitattributes": b""}, private=asked.get("visibility") == "private")
            self._json(facts)

    def branch(self, name: str, branch: str) -> None:
        if self._may_write():
            repo = self.state.repos[name]
            if branch in repo.branches:
                self._json({"error": "exists"}, 409)
                return
            repo.branches[branch] = repo.branches["main"]
            self._json({})

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if self._may_write():
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._json({"files": files})

    def batch(self, name: str) -> None:
        if self._may_write():
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.state.url}/lfs/{item['oid']}"}}}
                for item in json.loads(self.body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.state.blobs[oid] = self.body
        self._json({})

    def write(self, name: str, revision: str) -> None:
        if not self._may_write():
            return
        files = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
        sha = self.state.commit(name, files, revision)
        url = f"{self.state.url}/{name}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def _entry(path: str, content: bytes) -> dict:
    """A file in the answer of the tree."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if path.endswith(LFS):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_ROUTES = (
    ("GET", "/api/whoami-v2", _Handler.who),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/models/{_NAME}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", f"/api/models/{_NAME}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("POST", f"/api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", f"/api/models/{_NAME}/branch/(?P<branch>.+)", _Handler.branch),
    ("POST", f"/api/models/{_NAME}/commit/(?P<revision>.+)", _Handler.write),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Handler.upload),
    ("GET", f"/api/models/{_NAME}", _Handler.info),
    ("GET HEAD", f"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
)
